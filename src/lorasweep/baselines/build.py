"""From a baseline's name in the spec to the baseline."""

from __future__ import annotations

from lorasweep.baselines.linear_probe import LinearProbeBaseline
from lorasweep.baselines.majority import MajorityBaseline
from lorasweep.baselines.tfidf import TfidfBaseline
from lorasweep.baselines.untrained import UntrainedBaseline
from lorasweep.core.plans import EngineSettings
from lorasweep.core.protocols import Baseline
from lorasweep.model.base import Base


def build_baseline(name: str, *, base: Base, seed: int, settings: EngineSettings) -> Baseline:
    """Return the baseline that the spec calls ``name``.

    Args:
        name: ``untrained``, ``majority``, ``tfidf`` or ``linear_probe``.
        base: The sweep's frozen base; majority and tfidf don't look at it.
        seed: Of the head that the untrained baseline draws; the others are deterministic.
        settings: Device, precision and rows per forward pass.

    Raises:
        LookupError: There is no such baseline; the spec's schema never lets one through.
    """
    if name == "majority":
        return MajorityBaseline()
    if name == "tfidf":
        return TfidfBaseline()
    if name == "untrained":
        return UntrainedBaseline(base, seed, settings)
    if name == "linear_probe":
        return LinearProbeBaseline(base, seed, settings)
    raise LookupError(f"there is no baseline named {name!r}")
