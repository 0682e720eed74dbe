"""Time fixed trials on DistilBERT's shape: 6 layers, 768 wide, random weights, real sentences.

python benchmarks/distilbert.py                            # packed, tuned and as shipped
python benchmarks/distilbert.py --trials 4 --train-rows 160 --validation-rows 64 --repeats 1

The weights are random because none can be downloaded everywhere: times are DistilBERT's, scores
are those of a base that knows nothing.
"""

from __future__ import annotations

import functools
from pathlib import Path

from makespan import CONTENDERS
from scores import summary
from turns import command_line, parse
from workload import MINILM, add_work, run_on_made


def make_model(folder: Path) -> None:
    """Write what a download of distilbert-base-uncased holds, with the embedded tokenizer."""
    import torch
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertForMaskedLM
    from transformers_contender import model_folder

    tokenizer = AutoTokenizer.from_pretrained(model_folder(MINILM))
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        n_layers=6,
        n_heads=12,
        dim=768,
        hidden_dim=3072,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    DistilBertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = command_line(__doc__, CONTENDERS, ("packed", "tuned", "as shipped"))
    add_work(parser, trials=8, epochs=(1,), made=True)
    parser.set_defaults(train_rows=640, validation_rows=200)
    arguments = parse(parser, CONTENDERS)
    summarise = functools.partial(summary, contenders=CONTENDERS)
    model = "DistilBERT's shape, random weights"
    run_on_made(make_model, arguments, CONTENDERS, summarise, model=model)


if __name__ == "__main__":
    main()
