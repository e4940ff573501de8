"""The ledger: what every attempt of a run cost.

The driver keeps one entry an attempt, `ledger/NNNN.json`, from the events that it sees, by its own clock: times are
late by up to 0.3 s, since it looks so often.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from types import TracebackType

from raybert.config import Config
from raybert.entry import DRIVER_LOST, FINISHED, INTERRUPTED, LEDGER, Entry, committed, progressed, read_ledger
from raybert.events import Event
from raybert.goodput import summarize
from raybert.storage import Directory

SUMMARY = "summary.json"
WRITE_EVERY_S = 10.0


class Ledger:
    """Keeps the entries of one driver; a context manager that ends the last one by what it is left with.

    A storage that fails costs the ledger, never the run: it is warned of once.
    """

    def __init__(
        self, run: Directory, config: Config, warn: Callable[[str], None], clock: Callable[[], float] | None = None
    ) -> None:
        """Args:
        run: the run directory.
        config: of the run.
        warn: told once if the ledger cannot be kept.
        clock: seconds since 1970. Default: this machine's, which does not jump while the driver lives.
        """
        offset_s = time.time() - time.monotonic()
        self._clock = clock or (lambda: offset_s + time.monotonic())
        self._run, self._warn, self._has_warned = run, warn, False
        self._batch_size, self._price = config.training.global_batch_size, config.cluster.price_per_worker_hour
        self._lock = threading.Lock()  # in one process the step's thread tells, and the checkpoint's
        self._began_at_s = self._wrote_at_s = self._clock()
        self._entries = self._read()
        self._entry: Entry | None = None  # the newest of this driver

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.end(INTERRUPTED)
        else:
            self.end(FINISHED if error is None else _first_line(error))

    def show(self, event: Event) -> None:
        """Take in what happened."""
        with self._lock:
            now_s, entry = self._clock(), self._entry
            if event.kind == "attempt":
                self._begin(event, now_s)
            elif entry is None or (event.kind in ("train", "checkpoint") and event.attempt != entry.attempt):
                return  # of an attempt that did not know of its end yet
            elif event.kind == "train":
                self._entry = progressed(entry, event, self._batch_size, now_s)
                self._write_if_due(now_s)
            elif event.kind == "checkpoint":
                self._entry = committed(entry, event.step, now_s)
                self._write(now_s)
            elif event.kind in ("failure", "resize"):
                self._close(event.text, now_s, is_planned=event.kind == "resize")

    def refresh(self) -> None:
        """Put down that the driver lives; to be called often."""
        with self._lock:
            self._write_if_due(self._clock())

    def goodput(self) -> float | None:
        """Until now, as if the newest step were in a checkpoint; None before the first attempt."""
        with self._lock:
            if self._entry is None:
                return None
            now = replace(self._entry, seen_at_s=self._clock(), committed_step=self._entry.last_step)
            return summarize([*self._entries, now]).goodput

    def end(self, reason: str) -> None:
        """The driver ends: so does the attempt that it has, and the summary is written."""
        with self._lock:
            if self._entry is None:
                return
            self._close(reason, self._clock())
            summary = summarize([*self._entries, self._entry], self._price)
            self._store(self._run, SUMMARY, asdict(summary))

    def _begin(self, event: Event, now_s: float) -> None:
        number, world_size = int(event.metrics["number"]), int(event.metrics["world_size"])
        before = self._entry
        if before is not None and before.reason is None:
            is_resize = before.world_size != world_size
            reason = f"resize: from {before.world_size} to {world_size} workers" if is_resize else "restart"
            self._close(reason, now_s, is_planned=is_resize)
        if self._entry is not None:
            self._entries.append(self._entry)
        committed_step = int(event.metrics.get("committed_step", event.step))
        self._entry = Entry(number, world_size, event.step, self._began_at_s, now_s, now_s, event.step, committed_step)
        self._write(now_s)

    def _close(self, reason: str, now_s: float, is_planned: bool = False) -> None:
        """The attempt has ended, unless it had before; its first reason counts."""
        assert self._entry
        if self._entry.reason is None:
            self._entry = replace(self._entry, ended_at_s=now_s, reason=reason, is_planned=is_planned)
        self._write(now_s)

    def _write_if_due(self, now_s: float) -> None:
        if self._entry is not None and now_s - self._wrote_at_s >= WRITE_EVERY_S:
            self._write(now_s)

    def _write(self, now_s: float) -> None:
        assert self._entry
        self._entry, self._wrote_at_s = replace(self._entry, seen_at_s=now_s), now_s
        self._store(self._run / LEDGER, f"{self._entry.attempt:04d}.json", asdict(self._entry))

    def _read(self) -> list[Entry]:
        """The entries of the drivers before; one that says no end lost its driver."""
        try:
            entries = read_ledger(self._run)
        except (OSError, ValueError) as error:
            self._fail(error)
            return []
        for number, entry in enumerate(entries):
            if entry.reason is None:
                entries[number] = replace(entry, ended_at_s=entry.seen_at_s, reason=DRIVER_LOST)
                self._store(self._run / LEDGER, f"{entry.attempt:04d}.json", asdict(entries[number]))
        return entries

    def _store(self, directory: Directory, name: str, content: Mapping[str, object]) -> None:
        try:
            directory.write(name, json.dumps(content, indent=1).encode())
        except OSError as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            self._warn(f"the ledger of attempts is not complete, the run itself goes on: {error}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
