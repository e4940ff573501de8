"""Progress: where this process's training is, for whoever asks from another thread."""

from __future__ import annotations

Place = tuple[int, bool]
"""A step, and whether its batch has arrived; of two ranks the one that the other waits for has the smaller place."""

_place: Place = (-1, False)


def reached(step: int, has_batch: bool) -> None:
    """Note where training is."""
    global _place
    _place = step, has_batch


def place() -> Place:
    """Where training is; step -1 before the first."""
    return _place


def described(place: Place) -> str:
    """The place for a person."""
    step, has_batch = place
    if step < 0:
        return "is not ready for its first step"
    return f"is in step {step}" if has_batch else f"waits for the batch of step {step}"
