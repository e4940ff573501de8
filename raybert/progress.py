"""Progress: where this process's training is, for whoever asks from another thread."""

from __future__ import annotations

Place = tuple[int, int]
"""A step, and how far it is; of two ranks the one that the other waits for has the smaller place."""

FEED, COMPUTE, AVERAGE = range(3)  # before the batch is there; before the gradients are averaged over ranks; after that

_place: Place = (-1, FEED)


def reached(step: int, phase: int) -> None:
    """Note where training is."""
    global _place
    _place = step, phase


def place() -> Place:
    """Where training is; step -1 before the first."""
    return _place


def described(place: Place) -> str:
    """The place for a person."""
    step, phase = place
    if step < 0:
        return "is not ready for its first step"
    return (f"waits for the batch of step {step}", f"computes step {step}", f"has computed step {step}")[phase]
