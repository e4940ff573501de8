"""The begin of an attempt: where it starts, decided once for all workers.

Runs in a small process that starts with every group of workers, which wait for it: so nothing here imports torch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from raybert.events import Event, Tell
from raybert.guard import newest_rollback, read_barred, spelt
from raybert.history import Attempt, begin_attempt, read_attempts
from raybert.manifest import newest_checkpoint
from raybert.retry import outlast_blip
from raybert.snapshot import CALL_S, TRIES, Snapshot
from raybert.storage import Directory


@dataclass(frozen=True)
class Begin:
    """Begins attempts of a run at its newest intact checkpoint, or a snapshot after it; the one decision about that."""

    run: Directory
    tell: Tell
    peers: Any = None

    def __call__(self, world_size: int) -> Attempt:
        checkpoint = outlast_blip(lambda: newest_checkpoint(self.run, self._warn))
        step, name = (checkpoint.step, checkpoint.name) if checkpoint else (0, None)
        barred = outlast_blip(lambda: read_barred(self.run))
        metrics, text, snapshot = {"committed_step": step}, name or "", None
        found = self._snapshot(step)
        if found is not None:
            (step, snapshot), name, text = astuple(found[0]), found[1], str(found[0])
        attempt = outlast_blip(lambda: begin_attempt(self.run, world_size, step, name, barred, snapshot))
        metrics |= {"number": attempt.number, "world_size": world_size}
        self.tell(Event("attempt", step, text, metrics))
        for first, stop, reason in barred:
            if max(first, step) < stop:
                self._warn(f"{spelt(max(first, step), stop)} will make no update: {reason}.")
        return attempt

    def _snapshot(self, committed_step: int) -> tuple[Snapshot, str | None] | None:
        """The snapshot to begin from, and the checkpoint that it stands on; None: begin from the newest checkpoint."""
        if self.peers is None:
            return None
        attempts = outlast_blip(lambda: read_attempts(self.run))
        begun = Counter(Snapshot(one.start_step, one.snapshot) for one in attempts if one.snapshot is not None)
        tried = [snapshot for snapshot, number in begun.items() if number >= TRIES]
        rolled_back = outlast_blip(lambda: newest_rollback(self.run))
        try:
            found: tuple[Snapshot, str | None] | None = ray.get(
                self.peers.find.remote(committed_step, rolled_back, tried), timeout=CALL_S
            )
        except RayError as error:
            self._warn(f"Snapshots are not used, since nobody knows of them any more: {error}")
            return None
        return found

    def _warn(self, text: str) -> None:
        self.tell(Event("warning", text=text))
