"""The encoders that tests make tiny bases of, and those among them that a pack carries."""

from lorasweep.model.packed_check import PROVEN

PACKED = tuple(sorted(PROVEN))  # so what `engine: auto` packs is what tests go through
ENCODERS = (*PACKED, "albert", "deberta", "mpnet", "xlnet")
