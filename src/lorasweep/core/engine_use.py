"""What an engine did in one command: how full its lanes were, how much of its work was real."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineUse:
    """How one command trained its trials; a sweep that was cut off has several.

    What only a pack has is None for an engine that trains one trial after another.

    Attributes:
        engine: Which engine, and why this one, in a few words.
        trials: Trials that the command began.
        lanes: Trials that it had room for at the same time, at the end of the command.
        halvings: Times that memory ran out and the lanes were halved.
        bytes_per_lane: Memory that one more lane takes, with its weights and moments, at the
            longest rows, the largest batch and rank, and all modules that a trial of the sweep
            may adapt. Measured; counted on a CPU without the compiled allocator.
        pack_steps: Steps of the pack, each of them one optimizer step of every lane in it.
        lane_steps: Optimizer steps of all trials together.
        empty_places: Sum over pack steps of the places that stood empty while trials remained.
        tokens: Real tokens of training and evaluation.
        computed_tokens: Tokens computed for them: with filling tokens, or where there are none
            (without compiled kernels) with attention's padding. Not counted is what pads LoRA's
            narrow products to the longest lane where torch has no grouped kernel for them.
        seconds: From the pack's first plan to its last outcome.
        step_seconds: Of those, what went into steps of the pack. In the rest all lanes stand
            still: evaluation, building lanes, checkpoints, and telling study and store. None on
            an accelerator, which goes on meanwhile.
    """

    engine: str
    trials: int
    lanes: int
    halvings: int | None = None
    bytes_per_lane: int | None = None
    pack_steps: int | None = None
    lane_steps: int | None = None
    empty_places: int | None = None
    tokens: int | None = None
    computed_tokens: int | None = None
    seconds: float | None = None
    step_seconds: float | None = None

    @property
    def trials_at_once(self) -> float | None:
        """Trials in the pack, mean over its steps; None before the first."""
        if not self.pack_steps or self.lane_steps is None:
            return None
        return self.lane_steps / self.pack_steps

    @property
    def busy_share(self) -> float | None:
        """Share of the places that had a trial, of those that a trial was there for; 0 to 1."""
        if not self.lane_steps or self.empty_places is None:
            return None
        return self.lane_steps / (self.lane_steps + self.empty_places)

    @property
    def step_time_share(self) -> float | None:
        """Share of the time that went into steps, 0 to 1."""
        if not self.seconds or self.step_seconds is None:
            return None
        return self.step_seconds / self.seconds

    @property
    def real_share(self) -> float | None:
        """Share of real tokens among those that were computed, 0 to 1."""
        if not self.computed_tokens or self.tokens is None:
            return None
        return self.tokens / self.computed_tokens


def in_mebibytes(size: int) -> str:
    """Return a size for people.

    >>> in_mebibytes(150_000_000), in_mebibytes(700_000)
    ('143 MiB', '0.7 MiB')
    """
    found = size / 2**20
    return f"{found:.0f} MiB" if found >= 10 else f"{found:.1f} MiB"
