"""An entry of the ledger: how far one attempt came, when, and why it ended.

Steps are known where they are reported: as progress (every `training.log_every_steps`) and as checkpoints; those
between the last report and a crash are not counted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from raybert.events import Event
from raybert.storage import Directory

LEDGER = "ledger"
FINISHED, INTERRUPTED, DRIVER_LOST = "finished", "interrupted", "driver lost"


@dataclass(frozen=True)
class Entry:
    """One attempt. Times (`_at_s`) are seconds since 1970 by the driver's clock.

    Args:
        attempt: its number.
        world_size: number of workers.
        start_step: first step it trains.
        driver_began_at_s: when its driver began; which driver it is of.
        began_at_s: when it began.
        seen_at_s: when its driver last wrote this, or ended.
        last_step: last step reached, as far as was reported.
        committed_step: step of its newest checkpoint; while it has none, of the one it began from, which lies before
            `start_step` where it began from a snapshot.
        first_step_at_s: when its first step began; None before the first report of progress.
        last_step_at_s: when `last_step` was reported.
        timed_steps: steps that `training_s` is of.
        training_s: seconds in these steps, waiting for data included (but for the first batch), evaluation not.
        ended_at_s: when it ended; None while it lives.
        reason: why it ended.
        is_planned: whether it was ended for another number of workers, or for other nodes.
    """

    attempt: int
    world_size: int
    start_step: int
    driver_began_at_s: float
    began_at_s: float
    seen_at_s: float
    last_step: int
    committed_step: int
    first_step_at_s: float | None = None
    last_step_at_s: float | None = None
    timed_steps: int = 0
    training_s: float = 0.0
    ended_at_s: float | None = None
    reason: str | None = None
    is_planned: bool = False

    @property
    def stopped_at_s(self) -> float:
        """When it ended, or was last seen."""
        return self.seen_at_s if self.ended_at_s is None else self.ended_at_s

    @property
    def is_failed(self) -> bool:
        """Whether it ended, and neither at the last step nor by a planned resize."""
        return self.reason not in (None, FINISHED) and not self.is_planned


def progressed(entry: Entry, event: Event, global_batch_size: int, now_s: float) -> Entry:
    """The entry after a report of progress."""
    num_steps = event.step - entry.start_step - entry.timed_steps
    elapsed_s = num_steps * global_batch_size / event.metrics["samples_per_s"]
    first_step_at_s = entry.first_step_at_s
    if first_step_at_s is None:  # the wait for the first batch is the feed's start
        elapsed_s *= 1 - event.metrics["data_wait"]
        first_step_at_s = max(now_s - elapsed_s, entry.began_at_s)
    return replace(
        entry,
        last_step=event.step,
        first_step_at_s=first_step_at_s,
        last_step_at_s=now_s,
        timed_steps=entry.timed_steps + num_steps,
        training_s=entry.training_s + elapsed_s,
    )


def committed(entry: Entry, step: int, now_s: float) -> Entry:
    """The entry after a checkpoint, which may be of a step that no report of progress came to."""
    entry = replace(entry, committed_step=max(step, entry.committed_step))
    return entry if step <= entry.last_step else replace(entry, last_step=step, last_step_at_s=now_s)


def read_ledger(run: Directory) -> list[Entry]:
    """Every entry of a run, oldest first.

    Raises:
        ValueError: one is damaged, naming it.
    """
    folder = run / LEDGER
    entries = []
    for name in folder.names():
        if name.endswith(".json"):
            try:
                entries.append(Entry(**json.loads(folder.read(name))))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{LEDGER}/{name} is damaged: {error}") from None
    return sorted(entries, key=lambda entry: entry.attempt)
