"""The cadence: when the next checkpoint is due, at a fixed number of steps or by what checkpoints and failures cost.

A checkpoint stops training for a moment, a failure costs the steps since the last one. The interval between two that
wastes least follows from both (Young 1974, "A first order approximation to the optimum checkpoint interval"; Daly 2006,
"A higher order estimate of the optimum checkpoint interval for restart dumps", equation 37).
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from raybert.entry import Entry

MOST_S = 1800.0
WORKER_MTBF_S = 24 * 3600.0  # of one worker, before the run knows better: a spot node's
FIRST_STALL_S = 0.1  # what a checkpoint stops training for, before one was measured
WRITING_SHARE = 0.5  # of the time that checkpoints may be written in
NEWS = 1.5  # an interval that changed by this factor is told


@dataclass(frozen=True)
class Past:
    """What a run has lived through: seconds that it had workers, times workers, and failures in them."""

    worker_s: float = 0.0
    num_failures: int = 0

    def mtbf_s(self, world_size: int) -> float:
        """Mean time between two failures, of any of the workers: that of one worker, divided by their number.

        One failure in WORKER_MTBF_S of a worker counts as seen before, so a run that has seen none has a figure too.
        """
        return (WORKER_MTBF_S + self.worker_s) / (1 + self.num_failures) / world_size


def past(entries: Iterable[Entry]) -> Past:
    """What the ledger's attempts come to."""
    entries = list(entries)
    worker_s = sum(max(0.0, entry.stopped_at_s - entry.began_at_s) * entry.world_size for entry in entries)
    return Past(worker_s, sum(entry.is_failed for entry in entries))


def best_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Seconds to train between two checkpoints so that least is lost; at most MOST_S.

    To first order sqrt(2 * stall_s * mtbf_s). Daly's series holds for stalls below 2 * mtbf_s and stays at its value
    there beyond; it grows in both.

    Args:
        stall_s: what a checkpoint stops training for.
        mtbf_s: mean time between failures.
    """
    x = min(1.0, math.sqrt(stall_s / (2 * mtbf_s)))
    return min(MOST_S, 2 * mtbf_s * x * (1 - 2 * x / 3 + x * x / 9))


class Cadence:
    """Rank 0's: it alone decides when a checkpoint is due, by its clock, and tells the others."""

    def __init__(
        self,
        every_steps: int | Literal["auto"],
        past: Past,
        world_size: int,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        every_steps: between two checkpoints; "auto": what is best by measurement.
        past: of the run, before this attempt.
        world_size: of this attempt.
        say: told the interval, once it is known and whenever it has changed much.
        clock: seconds.
        """
        self._every_steps, self._past, self._world_size = every_steps, past, world_size
        self._say, self._clock = say, clock
        self._stalls_s: deque[float] = deque(maxlen=5)
        self._began_at_s = self._saved_at_s = self._writing_at_s = clock()
        self._step: int | None = None  # of the newest checkpoint of this attempt
        self._told_s = math.nan

    def is_due(self, step: int, is_writing: bool) -> bool:
        """Whether a checkpoint is due after `step` steps.

        By measurement none is while the one before is being written, and writing takes at most WRITING_SHARE of the
        time, so that none is left out and storage is not always busy.
        """
        if self._every_steps != "auto":
            return step % self._every_steps == 0
        now_s = self._clock()
        if is_writing:
            self._writing_at_s = now_s
        return now_s - self._saved_at_s >= self._interval_s()

    def saved(self, step: int, stall_s: float | None) -> None:
        """A checkpoint was made after `step` steps; it stopped training for `stall_s`, if that is to be counted."""
        if self._every_steps != "auto":
            return
        now_s = self._clock()
        if stall_s is not None:
            self._stalls_s.append(stall_s)
        if self._step is not None:
            self._tell((now_s - self._saved_at_s) / (step - self._step))
        self._step, self._saved_at_s, self._writing_at_s = step, now_s, now_s

    def _interval_s(self) -> float:
        written_s = self._writing_at_s - self._saved_at_s
        return max(best_interval_s(self._stall_s(), self._mtbf_s()), written_s / WRITING_SHARE)

    def _stall_s(self) -> float:
        return statistics.median(self._stalls_s) if self._stalls_s else FIRST_STALL_S

    def _mtbf_s(self) -> float:
        lived_s = (self._clock() - self._began_at_s) * self._world_size
        return Past(self._past.worker_s + lived_s, self._past.num_failures).mtbf_s(self._world_size)

    def _tell(self, step_s: float) -> None:
        interval_s = self._interval_s()
        if 1 / NEWS <= interval_s / self._told_s <= NEWS:
            return
        self._told_s = interval_s
        num_steps = max(1, math.ceil(interval_s / step_s))
        every = f"{num_steps:,} steps" if num_steps > 1 else "step"
        self._say(
            f"checkpoint about every {every} ({interval_s:.3g} s): a checkpoint stops training for "
            f"{self._stall_s():.2g} s, a failure is expected every {self._mtbf_s() / 3600:.2g} h"
        )
