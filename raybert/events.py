"""Events: what a run tells the person who watches it, from wherever it happens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Args:
        kind: "attempt" began, "train" metrics, "eval" metrics, a "checkpoint" is complete, a "warning" or a
            "note" for a person, a "resize" is about to end the attempt, a "failure" has ended it and the next one will
            begin; "end" is the last one that a listener hears, and is not shown.
        step: global batches consumed.
        text: for a person; a checkpoint's name; why an attempt ends; of "end" "finished", "interrupted" or an error.
        metrics: of "train" and "eval"; of "attempt" its number, world size, and the newest checkpoint's step as
            "committed_step" where it began from a snapshot.
        attempt: number of the attempt that "train" and "checkpoint" are of: one that was cut off may still speak.
    """

    kind: Literal["attempt", "train", "eval", "checkpoint", "warning", "note", "resize", "failure", "end"]
    step: int = 0
    text: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    attempt: int = 0


Tell = Callable[[Event], None]
