"""Marks: moments in a device's work, put down without waiting for it and read later."""

from __future__ import annotations

import time

import torch

Mark = float | torch.cuda.Event
"""On the host seconds; on a GPU an event in the stream of its work."""


def mark(device: torch.device) -> Mark:
    """Now, in the work that was given to the device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(first: Mark, second: Mark) -> float:
    """Seconds between two marks of one device, which must have come to both."""
    if isinstance(first, torch.cuda.Event) and isinstance(second, torch.cuda.Event):
        return float(first.elapsed_time(second)) / 1000
    assert isinstance(first, float) and isinstance(second, float), "of one device, both are of one kind"
    return second - first
