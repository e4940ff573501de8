"""The ledger: what every attempt of a run cost, and how much of it is in the result.

The driver keeps one entry an attempt, `ledger/NNNN.json`, from the events that it sees, by its own clock: times are
late by up to 0.3 s, since it looks so often. Steps are known where they are reported: as progress (every
`training.log_every_steps`) and as checkpoints; those between the last report and a crash are not counted.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import TracebackType

from raybert.config import Config
from raybert.events import Event
from raybert.storage import Directory

LEDGER, SUMMARY = "ledger", "summary.json"
WRITE_EVERY_S = 10.0
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


# What it comes to


@dataclass(frozen=True)
class Spent:
    """Seconds by what they were spent on.

    Args:
        useful: in steps that are in the result.
        redone: in steps that had to be done again, or that no checkpoint carries.
        starting: from an attempt's begin to its first step: workers, weights, the feed.
        preparing: from a driver's begin to its first attempt: Ray, the index, nodes that are not there yet.
        waiting: between attempts, and after the last.
        other: evaluation, waiting for checkpoints, and from an attempt's last reported step to its end.
    """

    useful: float = 0.0
    redone: float = 0.0
    starting: float = 0.0
    preparing: float = 0.0
    waiting: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        return self.useful + self.redone + self.starting + self.preparing + self.waiting + self.other

    def __add__(self, more: Spent) -> Spent:
        return Spent(*(a + b for a, b in zip(asdict(self).values(), asdict(more).values(), strict=True)))

    def __mul__(self, factor: float) -> Spent:
        return Spent(*(value * factor for value in asdict(self).values()))


@dataclass(frozen=True)
class AttemptSummary:
    """What became of an attempt.

    Args:
        attempt, world_size, start_step, last_step, reason: as its entry says.
        useful_steps: that are in the result.
        redone_steps: the others.
        lost_s: seconds from the last step of the attempt before to this one's first; None where either is not known or
            another driver lies between.
    """

    attempt: int
    world_size: int
    start_step: int
    last_step: int
    reason: str | None
    useful_steps: int
    redone_steps: int
    lost_s: float | None


@dataclass(frozen=True)
class Summary:
    """What a run has cost until now.

    Args:
        goodput: useful seconds of wall seconds.
        wall_s: seconds in which the run had a driver, from its begin to its end.
        stopped_s: seconds between drivers, not in `wall_s`.
        seconds: wall seconds by what they were spent on; their sum is `wall_s`.
        worker_seconds: the same, times workers (GPU-seconds where each has one). While none live as many count as were
            there before and after.
        restarts: attempts after the first.
        useful_steps: steps in the result.
        redone_steps: steps done that are not.
        price_per_worker_hour: as configured; None if it is not.
        cost: of all worker seconds, in the unit of the price.
        useful_cost: of the useful ones.
        attempts: oldest first.
    """

    goodput: float
    wall_s: float
    stopped_s: float
    seconds: Spent
    worker_seconds: Spent
    restarts: int
    useful_steps: int
    redone_steps: int
    price_per_worker_hour: float | None
    cost: float | None
    useful_cost: float | None
    attempts: Sequence[AttemptSummary]


def summarize(entries: Sequence[Entry], price_per_worker_hour: float | None = None) -> Summary:
    """What the entries of a run, oldest first, come to; a pure function of them."""
    entries = [*_as_shown_by_the_next(entries)]
    kept = kept_steps(entries)
    drivers = [list(group) for _, group in itertools.groupby(entries, key=lambda entry: entry.driver_began_at_s)]
    spans = [(driver[0].driver_began_at_s, max(_last_seen(entry) for entry in driver)) for driver in drivers]
    pairs = [*_spent_in_attempts(entries, kept), *(pair for driver in drivers for pair in _waited(driver))]
    seconds = sum((spent for spent, _ in pairs), Spent())
    worker_seconds = sum((spent * workers for spent, workers in pairs), Spent())
    price = None if price_per_worker_hour is None else price_per_worker_hour / 3600
    attempts = list(_attempt_summaries(entries, kept))
    return Summary(
        goodput=seconds.useful / seconds.total if seconds.total else 0.0,
        wall_s=seconds.total,
        stopped_s=sum(max(0.0, begin - end) for (_, end), (begin, _) in itertools.pairwise(spans)),
        seconds=seconds,
        worker_seconds=worker_seconds,
        restarts=max(0, len(entries) - 1),
        useful_steps=sum(kept),
        redone_steps=sum(attempt.redone_steps for attempt in attempts),
        price_per_worker_hour=price_per_worker_hour,
        cost=None if price is None else worker_seconds.total * price,
        useful_cost=None if price is None else worker_seconds.useful * price,
        attempts=attempts,
    )


def _as_shown_by_the_next(entries: Sequence[Entry]) -> Iterator[Entry]:
    """The entries; one that lost its driver came at least to where the next attempt starts."""
    for entry, following in zip(entries, [*entries[1:], None], strict=False):
        reached = entry.last_step if following is None else max(entry.last_step, following.start_step)
        yield replace(entry, last_step=reached)


def kept_steps(entries: Sequence[Entry]) -> list[int]:
    """How many steps of each attempt are in the result: those before every later attempt's start, and committed."""
    kept, until = [], entries[-1].committed_step if entries else 0
    for entry in reversed(entries):
        kept.append(max(0, min(entry.last_step, until) - entry.start_step))
        until = min(until, entry.start_step)
    return kept[::-1]


def _spent_in_attempts(entries: Sequence[Entry], kept: Sequence[int]) -> Iterator[tuple[Spent, int]]:
    """What each attempt's seconds were spent on, and by how many workers."""
    for entry, num_kept in zip(entries, kept, strict=True):
        lived_s = max(0.0, entry.stopped_at_s - entry.began_at_s)
        started_at_s = entry.stopped_at_s if entry.first_step_at_s is None else entry.first_step_at_s
        starting_s = min(lived_s, started_at_s - entry.began_at_s)
        num_steps = entry.last_step - entry.start_step
        training_s = entry.training_s * num_steps / entry.timed_steps if entry.timed_steps else 0.0
        training_s = min(training_s, lived_s - starting_s)
        useful_s = training_s * num_kept / num_steps if num_steps else 0.0
        other_s = lived_s - starting_s - training_s
        spent = Spent(useful_s, training_s - useful_s, starting_s, other=other_s)
        yield spent, entry.world_size


def _waited(driver: Sequence[Entry]) -> Iterator[tuple[Spent, int]]:
    """What a driver waited before, between and after its attempts, and how many workers were there."""
    first, last = driver[0], driver[-1]
    yield Spent(preparing=max(0.0, first.began_at_s - first.driver_began_at_s)), first.world_size
    for before, after in itertools.pairwise(driver):
        waited_s = max(0.0, after.began_at_s - before.stopped_at_s)
        yield Spent(waiting=waited_s), min(before.world_size, after.world_size)
    yield Spent(waiting=max(0.0, _last_seen(last) - last.stopped_at_s)), last.world_size


def _last_seen(entry: Entry) -> float:
    return max(entry.seen_at_s, entry.stopped_at_s)


def _attempt_summaries(entries: Sequence[Entry], kept: Sequence[int]) -> Iterator[AttemptSummary]:
    for before, entry, num_kept in zip([None, *entries], entries, kept, strict=False):
        lost_s = None
        if before is not None and before.driver_began_at_s == entry.driver_began_at_s:
            since_s = before.last_step_at_s
            if since_s is not None and entry.first_step_at_s is not None:
                lost_s = entry.first_step_at_s - since_s
        yield AttemptSummary(
            attempt=entry.attempt,
            world_size=entry.world_size,
            start_step=entry.start_step,
            last_step=entry.last_step,
            reason=entry.reason,
            useful_steps=num_kept,
            redone_steps=entry.last_step - entry.start_step - num_kept,
            lost_s=lost_s,
        )


def lines(summary: Summary) -> Iterator[str]:
    """The summary for a person, in one to three lines."""
    seconds = summary.seconds
    restarts, redone = _count(summary.restarts, "restart"), _count(summary.redone_steps, "step")
    yield (
        f"Goodput {100 * summary.goodput:.1f} %: {seconds.useful:,.0f} s of {summary.wall_s:,.0f} s; "
        f"{restarts}, {redone} done again"
    )
    rest = {
        "preparing (Ray, index)": seconds.preparing,
        "starting workers": seconds.starting,
        "waiting": seconds.waiting,
        "done again": seconds.redone,
        "evaluation and other": seconds.other,
        "between drivers (apart)": summary.stopped_s,
    }
    told = [f"{value:,.0f} s {name}" for name, value in rest.items() if value >= 0.5]
    if told:
        yield f"  the rest: {', '.join(told)}"
    if summary.cost is not None and summary.useful_cost is not None:
        hours = summary.worker_seconds.total / 3600
        yield (
            f"  cost {summary.cost:,.2f} ({hours:,.2f} worker hours at {summary.price_per_worker_hour:g}), of it "
            f"{summary.useful_cost:,.2f} useful"
        )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
