"""Events: what a run tells the person who watches it, from wherever it happens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Args:
        kind: "attempt" began, "train" metrics, "eval" metrics, a "checkpoint" is complete, a "warning", a "resize" is about
            to end the attempt.
        step: global batches consumed.
        text: for a person; a checkpoint's name.
        metrics: of "train" and "eval"; of "attempt" its number and world size.
    """

    kind: Literal["attempt", "train", "eval", "checkpoint", "warning", "resize"]
    step: int = 0
    text: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


Tell = Callable[[Event], None]
