"""Time the same fixed trials with lorasweep, and with what a user would write with transformers.

python benchmarks/makespan.py                              # packed, tuned and as shipped
python benchmarks/makespan.py packed tuned "as shipped" notebook --repeats 3 notebook=1
python benchmarks/makespan.py --trials 4 --train-rows 640 --validation-rows 200 --repeats 1
"""

from __future__ import annotations

import functools

from packed_contender import packed, trainer_engine
from scores import summary
from transformers_contender import trainer_search
from turns import Contender
from workload import time_trials

CONTENDERS = {
    "packed": Contender(packed, "lorasweep's packed engine"),
    "tuned": Contender(
        lambda work: trainer_search(work, bf16=True, grouped=True),
        "Trainer.hyperparameter_search, tuned by hand: bf16, batches grouped by length",
    ),
    "as shipped": Contender(
        trainer_search, "Trainer.hyperparameter_search: fp32, batches padded to their longest row"
    ),
    "notebook": Contender(
        lambda work: trainer_search(work, padded=True),
        "Trainer.hyperparameter_search: fp32, everything padded to 128 tokens",
    ),
    "trainer engine": Contender(
        trainer_engine, "lorasweep's trainer engine: one Trainer per trial, bf16, like lengths"
    ),
}


def main() -> None:
    summarise = functools.partial(summary, contenders=CONTENDERS)
    time_trials(__doc__, CONTENDERS, ("packed", "tuned", "as shipped"), summarise)


if __name__ == "__main__":
    main()
