"""Goodput: what the attempts of a run have cost, and how much of it is in the result; pure functions of the ledger."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from raybert.entry import Entry
from raybert.view import counted


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
    restarts, redone = counted(summary.restarts, "restart"), counted(summary.redone_steps, "step")
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
