"""The proof: what the record of a history shows, held against the sample order, step by step.

A history is a chain of links, one a checkpoint, each with the records of the steps since the checkpoint before. It is
followed from the newest on, one link at a time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raybert.history import CHECKSUM_LIMIT, RECORDS, Attempt, StepRecord, checksum, to_record, trained_by
from raybert.manifest import place
from raybert.order import SampleOrder, Samples, rank_slice
from raybert.storage import Directory


@dataclass(frozen=True)
class Link:
    """What one checkpoint committed.

    Args:
        name: of the checkpoint.
        parent: the checkpoint before it; None at the beginning of a run.
        records: of the steps between the two.
        damaged: numbers of lines that cannot be read, from 1.
    """

    name: str
    parent: str | None
    records: Sequence[StepRecord]
    damaged: Sequence[int]

    @property
    def file(self) -> str:
        return f"{RECORDS}/{self.name}.jsonl"

    @property
    def steps(self) -> range:
        """The steps that it should hold."""
        return range(place(self.parent)[0] if self.parent else 0, place(self.name)[0])


def read_link(run: Directory, name: str) -> Link:
    """What a checkpoint committed.

    Raises:
        FileNotFoundError: there is no record.
        ValueError: it does not begin with a parent that can be one.
    """
    header, *rows = (run / RECORDS).read(f"{name}.jsonl").split(b"\n")
    if rows and not rows[-1]:
        rows.pop()
    records, damaged = [], []
    for number, row in enumerate(rows, 2):
        try:
            records.append(to_record(json.loads(row)))
        except (ValueError, KeyError, TypeError):
            damaged.append(number)
    return Link(name, _parent(header, name), records, damaged)


def _parent(header: bytes, name: str) -> str | None:
    try:
        parent: str | None = json.loads(header)["parent"]
        step, attempt = (0, 0) if parent is None else place(parent)
    except (ValueError, KeyError, TypeError):
        raise ValueError("line 1 is damaged, which names the checkpoint before") from None
    own_step, own_attempt = place(name)
    if parent == name or step > own_step or attempt > own_attempt:
        raise ValueError(f"line 1 names {parent}, which cannot come before")
    return parent


def follow(run: Directory, name: str | None, proof: Proof) -> None:
    """Prove what is recorded of a checkpoint and of all before it."""
    while name is not None:
        try:
            link = read_link(run, name)
        except (FileNotFoundError, ValueError) as error:
            what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be followed: {error}"
            proof.note(f"{RECORDS}/{name}.jsonl {what}; nothing shows steps 0 to {place(name)[0] - 1}")
            return
        proof.add(link)
        name = link.parent


class Epochs:
    """Counts how often each sample was trained on in each epoch; an epoch that is complete takes no memory any more."""

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples
        self._counts: dict[int, npt.NDArray[np.uint8]] = {}  # [N] by epoch
        self._totals: dict[int, int] = {}
        self._complete: set[int] = set()

    def add(self, first: int, samples: Samples) -> None:
        """Count samples at the positions from `first` on."""
        while len(samples):
            epoch, at = divmod(first, self._num_samples)
            part, samples = samples[: self._num_samples - at], samples[self._num_samples - at :]
            self._count(epoch, part)
            first += len(part)

    def _count(self, epoch: int, samples: Samples) -> None:
        was_complete = epoch in self._complete
        counts = self._counts.setdefault(epoch, np.full(self._num_samples, was_complete, np.uint8))
        np.add.at(counts, samples, 1)
        self._complete.discard(epoch)
        self._totals[epoch] = self._totals.get(epoch, 0) + len(samples)
        if self._totals[epoch] == self._num_samples and counts.all():
            self._complete.add(epoch)
            del self._counts[epoch]

    def findings(self, num_positions: int) -> Iterator[str]:
        """Samples that were not trained on once in an epoch that positions [0, num_positions) touch."""
        for epoch, counts in sorted(self._counts.items()):
            again = int((counts > 1).sum())
            absent = int((counts == 0).sum()) if (epoch + 1) * self._num_samples <= num_positions else 0
            if again or absent:
                yield (
                    f"epoch {epoch}: of {self._num_samples} samples {again} were trained on more than once and "
                    f"{absent} are not shown to have been trained on"
                )

    def once(self, num_positions: int) -> tuple[int, int]:
        """Complete epochs, each sample once; and samples, each once, of the epoch that these positions end in."""
        partial = self._counts.get(num_positions // self._num_samples)
        return len(self._complete), 0 if partial is None else int((partial == 1).sum())


class Proof:
    """What the links of a history prove, which are added newest first."""

    def __init__(self, order: SampleOrder | None, global_batch_size: int, attempts: Mapping[int, Attempt]) -> None:
        """Args:
        order: of the run; None if it is not known, and samples cannot be compared.
        global_batch_size: G, samples of a step.
        attempts: those that are known, by number.
        """
        self._order, self._size, self._known = order, global_batch_size, attempts
        self.epochs = None if order is None else Epochs(order.num_samples)
        self.findings: list[str] = []
        self.skipped: dict[int, str] = {}
        self.num_proven = 0
        self.attempts: set[int] = set()  # that committed something

    def note(self, *findings: str) -> None:
        """Add findings that are older than those known."""
        self.findings[:0] = findings

    def add(self, link: Link) -> None:
        """Check the records of a link."""
        steps, attempt = Counter(record.step for record in link.records), place(link.name)[1]
        self.attempts.add(attempt)
        found = [f"line {number} is damaged" for number in link.damaged]
        found += _sequence_findings([record.step for record in link.records], link.steps)
        for record in link.records:
            if record.step not in link.steps:
                continue
            wrong = [f"step {record.step}{finding}" for finding in self._check(record, attempt)]
            found += wrong
            self.num_proven += steps[record.step] == 1 and not wrong
            if record.skipped:
                self.skipped[record.step] = record.skipped
        self.note(*(f"{link.file}: {finding}" for finding in found))

    def _check(self, record: StepRecord, attempt: int) -> Iterator[str]:
        """What is wrong with a record that an attempt's checkpoint committed; samples that are right are counted."""
        world_size = len(record.arrivals)
        expected = self._known[record.attempt].world_size if record.attempt in self._known else None
        trainer = trained_by(record.step, attempt, self._known)
        self.attempts.add(trainer)
        if record.attempt != trainer:
            yield f" is of attempt {record.attempt}, expected {trainer}"
        if not 1 <= world_size <= self._size or expected not in (None, world_size):
            yield f" arrived at {world_size} ranks, expected {expected or f'1 to {self._size}'}"
        if not 1 <= world_size <= self._size:
            return
        has_places = True
        for rank, arrival in enumerate(record.arrivals):
            mine = rank_slice(self._size, rank, world_size)
            first, stop = record.step * self._size + mine.start, record.step * self._size + mine.stop
            if (arrival.first, arrival.stop) != (first, stop):
                found = f"[{arrival.first}, {arrival.stop})"
                has_places = False
                yield f", rank {rank}: samples for places {found} arrived, expected [{first}, {stop})"
        if self._order is None or self.epochs is None or not has_places:
            return
        positions, samples = self._order.positions(record.step), self._order.global_batch(record.step)
        arrived, expected = sum(arrival.checksum for arrival in record.arrivals), checksum(positions, samples)
        if arrived % CHECKSUM_LIMIT != expected:
            found = f"checksum {arrived % CHECKSUM_LIMIT}, expected {expected}"
            yield f": other samples arrived than the sample order says ({found})"
        else:
            self.epochs.add(int(positions[0]), samples)


def _sequence_findings(found: Sequence[int], expected: range) -> Iterator[str]:
    """What is wrong with the steps that a link holds."""
    for step, count in Counter(found).items():
        if step not in expected:
            yield f"step {step} does not belong here, between steps {expected.start} and {expected.stop - 1}"
        elif count > 1:
            yield f"step {step} is recorded {count} times"
    missing = sorted(set(expected) - set(found))
    if missing:
        yield f"not recorded: {', '.join(spans(missing))}"
    once = list(dict.fromkeys(found))
    if once != sorted(once):
        at = next(i for i in range(1, len(once)) if once[i] < once[i - 1])
        yield f"step {once[at]} is out of order, behind step {once[at - 1]}"


def spans(steps: Sequence[int]) -> Iterator[str]:
    """Sorted steps in words, neighbours joined."""
    first = steps[0]
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if following != step + 1:
            yield f"step {step}" if first == step else f"steps {first} to {step}"
            first = following if following is not None else first
