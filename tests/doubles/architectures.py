"""The encoders that tests make tiny bases of, and those among them that a pack carries."""

PACKED = (
    "bert",
    "camembert",
    "deberta-v2",
    "distilbert",
    "electra",
    "modernbert",
    "roberta",
    "xlm-roberta",
)
ENCODERS = (*PACKED, "albert", "deberta", "mpnet", "xlnet")
