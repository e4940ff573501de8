"""The guard: which steps must not be trained on again, judged by what their losses and gradients were.

An alarm ends the attempt; the next one begins at the newest checkpoint, which no alarm is older than, and consumes the
steps that gave the alarm without an update. They are kept in the run directory, one file for each attempt that was
rolled back, so positions never shift and every later attempt does the same.
"""

from __future__ import annotations

import json
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from raybert.config import GuardConfig
from raybert.errors import UserError
from raybert.history import Barred, check_newest
from raybert.storage import Directory

GUARDS = "guards"
NON_FINITE = "non-finite gradient"
HALVINGS = 16  # of fp16's first loss scale until it is 1: before that an overflow is ordinary


class RollbackError(Exception):
    """The attempt ends, and the next one begins at the newest checkpoint; not the user's to mend."""

    def __init__(self, first: int, stop: int, reason: str) -> None:
        """Args:
        first, stop: steps [first, stop) are consumed without an update from now on; may be none.
        reason: with the step.
        """
        super().__init__(first, stop, reason)
        self.first, self.stop, self.reason = first, stop, reason

    def __str__(self) -> str:
        steps = f"; {spelt(self.first, self.stop)} will make no update" if self.first < self.stop else ""
        return f"rolled back: {self.reason}{steps}"


@dataclass(frozen=True)
class Judged:
    """A step that was consumed.

    Args:
        step: its number.
        loss: of its global batch; None where it was barred.
        is_finite: whether its gradient was.
    """

    step: int
    loss: float | None
    is_finite: bool


class Guard:
    """Judges steps in their order; knows the losses since the attempt began."""

    def __init__(self, config: GuardConfig, patience: int = 0) -> None:
        """Args:
        config: when to give an alarm.
        patience: gradients in a row that are not finite and are ordinary all the same.
        """
        self._config, self._patience = config, patience
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._kind: Literal["ordinary", "non-finite", "spike"] = "ordinary"
        self._first = self._length = 0

    @property
    def is_calm(self) -> bool:
        """Whether the newest steps are nothing that may become an alarm; only then is a checkpoint to be made."""
        return self._kind == "ordinary" or (self._kind == "non-finite" and self._length <= self._patience)

    def judge(self, steps: Iterable[Judged]) -> None:
        """Raises:
        RollbackError: at the end of the first row of bad steps among these, or of them all.
        """
        for step in steps:
            kind = self._kind_of(step)
            if kind == self._kind:
                self._length += 1
                continue
            self._check()
            self._kind, self._first, self._length = kind, step.step, 1
        self._check()

    def _kind_of(self, step: Judged) -> Literal["ordinary", "non-finite", "spike"]:
        if step.loss is None:
            return "ordinary"
        if not step.is_finite:
            return "non-finite"
        if is_spike(step.loss, self._losses, self._config):
            return "spike"
        self._losses.append(step.loss)
        return "ordinary"

    def _check(self) -> None:
        stop = self._first + self._length
        if self._kind == "non-finite" and self._length >= self._config.max_non_finite + self._patience:
            reason = f"{NON_FINITE} {self._length} times in a row from step {self._first}"
            raise RollbackError(self._first, stop, reason)
        if self._kind == "spike":
            raise RollbackError(self._first, stop, f"loss spike at step {self._first}")


def is_spike(loss: float, before: Sequence[float], config: GuardConfig) -> bool:
    """Whether a loss stands out among those before it, of which there must be a whole window."""
    if not config.spike_sigma or len(before) < config.spike_window:
        return False
    mean = statistics.fmean(before)
    return loss > mean + config.spike_sigma * statistics.pstdev(before, mean)


def spelt(first: int, stop: int) -> str:
    """The steps [first, stop) for a person."""
    return f"step {first}" if stop == first + 1 else f"steps {first} to {stop - 1}"


def read_barred(run: Directory) -> tuple[Barred, ...]:
    """What the attempts that were rolled back have barred, oldest first; one entry for each of them."""
    folder = run / GUARDS
    rows = [json.loads(folder.read(name)) for name in sorted(folder.names()) if name.endswith(".json")]
    return tuple((row["first"], row["stop"], row["reason"]) for row in rows)


def newest_rollback(run: Directory) -> int:
    """Number of the newest attempt that was rolled back, 0 if none was."""
    names = (run / GUARDS).names()
    return max((int(name.removesuffix(".json")) for name in names if name.endswith(".json")), default=0)


def bar(run: Directory, attempt: int, error: RollbackError) -> None:
    """Record what an attempt that is rolled back has barred.

    Raises:
        FencedError: a newer attempt owns the run.
    """
    check_newest(run, attempt)
    row = {"attempt": attempt, "first": error.first, "stop": error.stop, "reason": error.reason}
    (run / GUARDS).write(f"{attempt:04d}.json", json.dumps(row).encode())


def reasons(barred: Iterable[Barred]) -> Mapping[int, str]:
    """Why each barred step makes no update; of two reasons the older."""
    found: dict[int, str] = {}
    for first, stop, reason in barred:
        for step in range(first, stop):
            found.setdefault(step, reason)
    return found


def check_rollbacks(barred: Sequence[Barred], config: GuardConfig, error: RollbackError) -> None:
    """Raises:
    UserError: the run has been rolled back so often that another time will not help either.
    """
    if len(barred) >= config.max_rollbacks:
        raise UserError(
            f"{error.reason[0].upper()}{error.reason[1:]} after {len(barred)} rollbacks (guard.max_rollbacks is "
            f"{config.max_rollbacks}): training has diverged; lower optimizer.learning_rate or raise "
            "optimizer.warmup_steps, or raise guard.max_rollbacks if it is the data. The checkpoints before are intact."
        )
