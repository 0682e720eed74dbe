"""Time lorasweep's two engines on the same trials, architecture by architecture.

python benchmarks/architectures.py                                    # all of them, in bf16
python benchmarks/architectures.py "bert, packed, fp32" "bert, trainer, fp32"
python benchmarks/architectures.py --trials 4 --train-rows 64 --validation-rows 32 --repeats 1

Each has MiniLM's shape (6 layers, 384 wide) and random weights: times are an architecture's own,
scores those of a base that knows nothing. `engine: auto` packs these; is it faster?
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

from packed_contender import packed, trainer_engine
from scores import summary
from turns import Contender, command_line, parse
from workload import MINILM, Work, add_work, run_on_made

_SHAPE = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 514,
}
# camembert and xlm-roberta are roberta's code under other names.
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": _SHAPE,
    "distilbert": {
        "dim": 384,
        "n_layers": 6,
        "n_heads": 12,
        "hidden_dim": 1536,
        "max_position_embeddings": 514,
    },
    "roberta": _SHAPE,
    "electra": {**_SHAPE, "embedding_size": 128},
    # What DeBERTa-v3's own configurations say of positions.
    "deberta-v2": {
        **_SHAPE,
        "relative_attention": True,
        "position_buckets": 256,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "modernbert": {**_SHAPE, "intermediate_size": 768},  # which its gates double
}


def _on(architecture: str, engine: str, precision: Literal["bf16", "fp32"], work: Work) -> Any:
    measure = packed if engine == "packed" else trainer_engine
    own = dataclasses.replace(work, model=str(Path(work.model) / architecture))
    return measure(own, precision=precision)


CONTENDERS = {
    f"{architecture}, {engine}, {precision}": Contender(
        functools.partial(_on, architecture, engine, precision),
        f"{architecture} by the {engine} engine, in {precision}",
        against=f"{architecture}, packed, {precision}",
    )
    for architecture in CONFIGS
    for precision in ("bf16", "fp32")
    for engine in ("packed", "trainer")
}


def make_models(folder: Path) -> None:
    """Write a base of each architecture, as a download of one is laid out."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModel, AutoTokenizer
    from transformers_contender import model_folder

    tokenizer = AutoTokenizer.from_pretrained(model_folder(MINILM))
    for architecture, shape in CONFIGS.items():
        config = CONFIG_MAPPING[architecture](
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
            cls_token_id=tokenizer.cls_token_id,
            sep_token_id=tokenizer.sep_token_id,
            **shape,
        )
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder / architecture)
        tokenizer.save_pretrained(folder / architecture)


def main() -> None:
    chosen = tuple(name for name in CONTENDERS if name.endswith("bf16"))
    parser = command_line(__doc__, CONTENDERS, chosen)
    add_work(parser, trials=8, epochs=(1,), made=True)
    parser.set_defaults(train_rows=240, validation_rows=120)
    arguments = parse(parser, CONTENDERS)
    summarise = functools.partial(summary, contenders=CONTENDERS)
    model = "MiniLM's shape, random weights"
    run_on_made(make_models, arguments, CONTENDERS, summarise, model=model)


if __name__ == "__main__":
    main()
