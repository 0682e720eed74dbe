"""Passes of a pack: laid out, cut in parts, and each part taken through the base by a thread."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from lorasweep.core.corpora import EncodedSplit
from lorasweep.model.batch_parts import cut
from lorasweep.model.packed_batch import LaneRows, PackedBatch, lay_out
from lorasweep.model.packed_lora import PackedModel
from lorasweep.model.torch_errors import is_out_of_memory

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# With fewer, two parts take as long as the whole (docs/decisions/0011-halves-of-a-pass.md).
_FEWEST_TOKENS = 1024


class Passes:
    """Takes rows of many lanes through a model.

    On a CPU of two cores the rows of a pass are cut in halves, and each goes through the whole
    base in a thread of its own. So cores wait for one another once a pass instead of once an
    operation (docs/decisions/0011-halves-of-a-pass.md).

    Args:
        model: The pack.

    Attributes:
        most: Parts of a pass; 1 for no threads.
        fewest: Tokens that parts must have on average.
    """

    def __init__(self, model: PackedModel) -> None:
        self.model = model
        self.most = _most_parts() if model.device.type == "cpu" else 1
        self.fewest = _FEWEST_TOKENS
        self._pool: ThreadPoolExecutor | None = None

    def lay_out(
        self, split: EncodedSplit, entries: Sequence[LaneRows], *, training: bool
    ) -> list[PackedBatch]:
        """Lay out the rows of a pass, in as many parts as pay.

        Args:
            split: Tokens and labels.
            entries: One a lane; may have no rows.
            training: Make dropout streams.
        """
        parts = cut(entries, split.lengths, self.most, self.fewest)
        if len(parts) > 1:
            self.model.shared.keep(split, training)  # by all cores, before the parts need it
        return [
            lay_out(
                split,
                part.entries,
                self.model.device,
                training=training,
                filled=self.model.filled,
                first_lane=part.first_lane,
                part=number,
            )
            for number, part in enumerate(parts)
        ]

    def each(self, work: Callable[[PackedBatch], _T], batches: Sequence[PackedBatch]) -> list[_T]:
        """Do something with each part of a pass, all at the same time.

        Args:
            work: Called with each; it has its thread's share of torch's threads.
            batches: From :meth:`lay_out`.

        Returns:
            What each call returned.

        Raises:
            Exception: What the first of them raised, after all have ended; a lack of memory
                before anything else, since the other may come of it.
        """
        pool = self._threads() if len(batches) > 1 else None
        if pool is None:
            return [work(batch) for batch in batches]
        under_way: list[Future[_T]] = []
        try:
            under_way.extend(pool.submit(work, batch) for batch in batches)
            wait(under_way)
        finally:
            # Also on Ctrl-C: nobody may change what a part still reads.
            wait(under_way)
        for future in under_way:
            if is_out_of_memory(future.exception()):
                future.result()
        return [future.result() for future in under_way]

    def _threads(self) -> ThreadPoolExecutor | None:
        """Return the threads, started when first asked for; None where the system has none."""
        if self._pool is None and self.most > 1:
            try:
                self._pool = _pool(self.most)
            except RuntimeError as error:
                _log.warning("passes go through the base in one piece: %s", error)
                self.most = 1
        return self._pool


def _most_parts() -> int:
    """Two where torch has two threads, on two cores; more cores were never measured."""
    # Where OpenMP binds threads to cores, threads that Python starts are on the core of the main
    # one, and so would both halves be.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    return 2 if torch.get_num_threads() == 2 and cores > 1 else 1


def _pool(threads: int) -> ThreadPoolExecutor:
    """Start threads that have an equal share of torch's own each.

    Raises:
        RuntimeError: The system starts no more threads.
    """
    whole = torch.get_num_threads()
    all_there = threading.Barrier(threads)

    def begin() -> None:
        # Asked first: a thread takes over the process's number when it first asks or computes,
        # and would forget its own.
        torch.get_num_threads()
        torch.set_num_threads(max(1, whole // threads))

    pool = ThreadPoolExecutor(threads, thread_name_prefix="pass", initializer=begin)
    try:
        wait([pool.submit(all_there.wait) for _ in range(threads)])
    except BaseException:
        all_there.abort()  # else whoever is there waits for the others for ever
        pool.shutdown()
        raise
    finally:
        torch.set_num_threads(whole)  # the process's number is that of whoever set it last
    return pool
