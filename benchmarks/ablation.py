"""Switch off one part of the packed engine after the other, on the same trials.

python benchmarks/ablation.py
python benchmarks/ablation.py --lanes 2 --trials 4 --train-rows 64 --validation-rows 64 --repeats 1

Trials have unequal epochs and are more than the lanes, so that refill counts. The cache of the
lower layers has work of its own (LoRA in the top two layers, no dropout in the base), since it has
nothing to do where every layer is adapted. "× as long" above 1 is what the part saves.
"""

from __future__ import annotations

import functools

from packed_contender import packed
from scores import summary
from turns import Contender
from workload import time_trials

_top = functools.partial(packed, top_layers=2, base_dropout=0.0)

CONTENDERS = {
    "everything on": Contender(packed, "the engine as it is"),
    "padded to the lane": Contender(
        functools.partial(packed, padded="lane"),
        "each row padded to the longest of its batch; padding is read as words: time only",
        comparable=False,
    ),
    "padded to the pack": Contender(
        functools.partial(packed, padded="pack"),
        "each row padded to the longest of all lanes, as in one rectangular batch: time only",
        comparable=False,
    ),
    "fp32": Contender(functools.partial(packed, precision="fp32"), "without bfloat16"),
    "one lane": Contender(functools.partial(packed, lanes=1), "without packing"),
    "whole passes": Contender(
        functools.partial(packed, whole=True), "all rows through the base in one piece"
    ),
    "weights not laid out": Contender(
        functools.partial(packed, laid_out=False), "F.linear with the base's weights as they are"
    ),
    "no dropout": Contender(
        functools.partial(packed, base_dropout=0.0, dropout=0.0),
        "without the base's and the adapters' dropout; they learn otherwise: time only",
        comparable=False,
    ),
    "fixed packs": Contender(functools.partial(packed, packs="fixed"), "without refill"),
    "kernels off": Contender(
        packed, "without compiled kernels and allocator", {"LORASWEEP_KERNELS": "0"}
    ),
    "top layers": Contender(
        _top,
        "LoRA in the top two layers, no base dropout, lower layers kept",
        against="top layers",
    ),
    "top layers, not kept": Contender(
        functools.partial(_top, shared=False),
        "the same, the lower layers computed at every step",
        against="top layers",
    ),
}


def main() -> None:
    summarise = functools.partial(summary, contenders=CONTENDERS)
    time_trials(__doc__, CONTENDERS, tuple(CONTENDERS), summarise, epochs=(1, 3, 2, 2), lanes=8)


if __name__ == "__main__":
    main()
