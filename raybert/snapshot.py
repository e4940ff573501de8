"""Snapshots: which state is meant, wherever it is held."""

from __future__ import annotations

from dataclasses import dataclass

TRIES = 2  # attempts that begin from one snapshot: it may be what they die of
CALL_S = 20.0  # that Ray's actors may take to answer


@dataclass(frozen=True, order=True)
class Snapshot:
    """Which snapshot: the state that an attempt had after `step` global batches."""

    step: int
    attempt: int

    def __str__(self) -> str:
        return f"snapshot at step {self.step} of attempt {self.attempt}"
