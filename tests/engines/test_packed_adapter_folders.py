"""A trial's folder scores under plain PEFT, without any code of this project, as its pack did."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import AutoPeftModelForSequenceClassification
from recorder import Recorder
from safetensors.torch import load_file

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.plans import AdapterPlan, EngineSettings, TrialPlan
from lorasweep.engines.packed import PackedEngine
from lorasweep.model.adapter import quiet_peft
from lorasweep.model.base import quiet_transformers

SETTINGS = EngineSettings(precision="fp32", device="cpu", log_every=1, eval_batch_size=16)
FP32 = 1e-5  # largest difference of a logit
# Root mean square difference of logits, which are about one. Two layers round weights and
# activations some 32 times on the way to a logit, each time by up to 2**-8 of the value to either
# side (so 2**-8 / 3**0.5 in root mean square), and independent errors add up like a root.
BF16 = 32**0.5 * 2**-8 / 3**0.5  # 0.013
ARCHITECTURES = ("bert", "distilbert", "roberta", "electra", "deberta-v2", "modernbert")


def scored_by_peft(plan: TrialPlan, split: EncodedSplit) -> NDArray[np.float32]:
    """Logits of a split's rows, one row at a time, from the folder and the base it names."""
    with quiet_transformers(), quiet_peft():
        model = AutoPeftModelForSequenceClassification.from_pretrained(str(plan.adapter_folder))
    model.eval()
    with torch.no_grad():
        rows = (torch.from_numpy(split.row(n).astype(np.int64)) for n in range(len(split)))
        return torch.cat([model(input_ids=row.unsqueeze(0)).logits for row in rows]).numpy()


def distance(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean((one - other) ** 2)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_folder_loaded_by_plain_peft_scores_as_the_pack_did(
    precision, architecture, open_tiny, splits, make_plan
):
    plans = [
        make_plan(0, seed=1, learning_rate=2e-2),
        make_plan(1, seed=2, learning_rate=1e-2, adapter=AdapterPlan(8, 32.0, 0.1)),
        make_plan(2, seed=3, epochs=3, adapter=AdapterPlan(3, 9.0, 0.0, ("all-linear",))),
    ]
    settings = replace(SETTINGS, precision=precision)
    engine = PackedEngine(open_tiny(architecture), *splits, settings, 2)
    recorder = Recorder()
    assert {outcome.reason for outcome in engine.run(plans, recorder)} == {""}
    found = [scored_by_peft(plan, splits[1]) for plan in plans]
    said = [recorder.epochs[plan.number][-1].logits for plan in plans]
    for plan, theirs, ours in zip(plans, found, said, strict=True):
        others = [logits for logits in found if logits is not theirs]
        if precision == "fp32":
            np.testing.assert_allclose(theirs, ours, rtol=0, atol=FP32)
        else:
            assert distance(theirs, ours) < BF16
        # Another trial's folder, or the same trial's an epoch earlier, would not have done.
        assert min(distance(logits, ours) for logits in others) > 10 * BF16
        assert distance(theirs, recorder.epochs[plan.number][0].logits) > 2 * BF16
        # Only the frozen base is rounded: what was trained is as exact as it was in training.
        for name, value in load_file(plan.adapter_folder / "adapter_model.safetensors").items():
            assert value.dtype == torch.float32, name
            assert not torch.equal(value, value.bfloat16().float()), name
