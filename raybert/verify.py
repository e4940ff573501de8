"""`verify`: prove from a run directory alone that every sample was trained on exactly once, and check its checkpoints.

The record says what arrived at which rank for every step that a checkpoint committed; the sample order, computed anew
from the cached index and the identity in the checkpoint, says what should have. No data file is needed. From the newest
intact checkpoint the record is followed through the parents, newest first, one checkpoint's records at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from raybert import ledger, preflight
from raybert.config import Config
from raybert.config_file import CONFIG, FIELDS, Setting, build_config, config_from_yaml
from raybert.errors import UserError
from raybert.history import (
    ATTEMPTS,
    RECORDS,
    Attempt,
    StepRecord,
    read_attempts,
    samples_checksum,
    to_record,
    trained_by,
)
from raybert.index import INDEX, LIST, Index, Shard, cached_shard, index_shard, read_list
from raybert.ledger import Summary, read_ledger, summarize
from raybert.manifest import CHECKPOINTS, MANIFEST, Checkpoint, find_checkpoints, find_damage, open_checkpoint, place
from raybert.order import SampleOrder, Samples, rank_slice
from raybert.scratch import scratch
from raybert.storage import Directory, absolute, find_files

HOLDS, DOES_NOT_HOLD, CANNOT_SAY = 0, 1, 2  # exit codes
MAX_SHOWN = 20


@dataclass(frozen=True)
class CheckpointState:
    """What became of a checkpoint directory.

    Args:
        name: of the directory.
        is_complete: it has a manifest; one without is no checkpoint, and ignored.
        damage: what is wrong with a complete one; None if it is intact.
    """

    name: str
    is_complete: bool
    damage: str | None

    @property
    def is_intact(self) -> bool:
        return self.is_complete and self.damage is None


@dataclass(frozen=True)
class Report:
    """What a run directory proves.

    Args:
        run_dir: its URI.
        checkpoint: the newest intact one, whose history was followed; None if all are damaged.
        step: global batches that it consumed.
        num_steps: global batches of the whole run; None if config.yaml does not say.
        num_samples: N, samples of an epoch; None if the sample order could not be computed.
        proven_steps: steps that are there once, with every rank's positions and samples right.
        complete_epochs: epochs in which each sample was trained on exactly once.
        partial_samples: samples, each once, of the epoch after these.
        skipped: steps whose update was skipped, and why.
        checkpoints: every checkpoint directory, newest first.
        summary: what the attempts came to, by their ledger; None if there is none.
        findings: what does not hold or could not be checked; empty if all holds.
    """

    run_dir: str
    checkpoint: str | None
    step: int
    num_steps: int | None
    num_samples: int | None
    proven_steps: int
    complete_epochs: int
    partial_samples: int
    skipped: Mapping[int, str]
    checkpoints: Sequence[CheckpointState]
    summary: Summary | None
    findings: Sequence[str]

    @property
    def holds(self) -> bool:
        return not self.findings


def main(argv: list[str]) -> int:
    """Verify a run and print the report; 0 if all holds, 1 if not, 2 if there is nothing to verify."""
    options = _parser().parse_args(argv)
    run = Directory(absolute(options.run_dir))
    try:
        report = verify(run)
    except (UserError, OSError) as error:
        what = error if isinstance(error, UserError) else f"cannot read {run.uri}: {error}"
        print(f"raybert: error: {what}", file=sys.stderr)
        return CANNOT_SAY
    print(json.dumps({"holds": report.holds, **asdict(report)}, indent=1) if options.json else "\n".join(lines(report)))
    return HOLDS if report.holds else DOES_NOT_HOLD


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python run.py verify",
        description="Prove from a run directory alone that every sample was trained on exactly once an epoch, and "
        "check every checkpoint's digests. Data files are not needed while the run's index/ is there.",
        epilog="Exit code: 0 if all holds, 1 if something does not or could not be checked, 2 if there is no such run.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a local directory, s3:// or gs://")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def verify(run: Directory) -> Report:
    """What a run directory proves.

    Raises:
        UserError: it holds no run, or none that has a checkpoint yet.
        OSError: the storage could not be read.
    """
    states = check_checkpoints(run)
    if not any(state.is_complete for state in states):
        raise _nothing_to_verify(run)
    name = next((state.name for state in states if state.is_intact), None)
    findings = [f"{CHECKPOINTS}/{state.name} is damaged: {state.damage}" for state in states if state.damage]
    if name is None:
        findings.append("no checkpoint is intact: no history ends in weights that are still there")
        return Report(run.uri, None, 0, _num_steps(run), None, 0, 0, 0, {}, states, None, findings)
    checkpoint = open_checkpoint(run, name)
    batch_size = checkpoint.state["identity"]["training.global_batch_size"]
    order, unknown = sample_order(run, checkpoint)
    attempts = _attempts(run)
    proof = Proof(order, batch_size, {} if isinstance(attempts, str) else attempts)
    positions = checkpoint.step * batch_size
    follow(run, name, proof)
    epochs, rest = proof.epochs.once(positions) if proof.epochs else (0, 0)
    repeated = proof.epochs.findings(positions) if proof.epochs else ()
    summary, unread = _summary(run)
    return Report(
        run_dir=run.uri,
        checkpoint=name,
        step=checkpoint.step,
        num_steps=_num_steps(run),
        num_samples=order.num_samples if order else None,
        proven_steps=proof.num_proven,
        complete_epochs=epochs,
        partial_samples=rest,
        skipped=dict(sorted(proof.skipped.items())),
        checkpoints=states,
        summary=summary,
        findings=[
            *findings,
            *unknown,
            *_attempt_findings(proof.attempts, attempts),
            *proof.findings,
            *repeated,
            *unread,
        ],
    )


def check_checkpoints(run: Directory) -> list[CheckpointState]:
    """Every checkpoint directory of a run, newest first, all digests compared."""
    return [_checked(run, name) for name in find_checkpoints(run)]


def _checked(run: Directory, name: str) -> CheckpointState:
    def is_complete() -> bool:
        return (run / CHECKPOINTS / name).exists(MANIFEST)

    try:
        damage = find_damage(run, name) if is_complete() else None
    except FileNotFoundError:  # the manifest
        damage = None
    return CheckpointState(name, True, damage) if is_complete() else CheckpointState(name, False, None)  # a run deletes


def _nothing_to_verify(run: Directory) -> UserError:
    if run.exists(CONFIG) or run.exists(ATTEMPTS):
        return UserError(
            f"The run in {run.uri} has no complete checkpoint yet: nothing is committed that could be shown."
        )
    return UserError(f"There is no run in {run.uri}; give the run_dir of a run.")


def _num_steps(run: Directory) -> int | None:
    config = _stored_config(run)
    return None if config is None else config.training.num_steps


def _stored_config(run: Directory) -> Config | None:
    """The configuration kept in the run directory, if it is there and whole."""
    try:
        return config_from_yaml(run.read(CONFIG).decode(), CONFIG)
    except (FileNotFoundError, UnicodeDecodeError, UserError):
        return None


def _summary(run: Directory) -> tuple[Summary | None, list[str]]:
    """What the run's ledger comes to; or None, and what is wrong with it."""
    try:
        entries = read_ledger(run)
    except ValueError as error:
        return None, [str(error)]
    config = _stored_config(run)
    price = None if config is None else config.cluster.price_per_worker_hour
    return (summarize(entries, price) if entries else None), []


def _attempts(run: Directory) -> dict[int, Attempt] | str:
    """Each attempt by its number; or what is wrong with the attempts' files."""
    try:
        return {attempt.number: attempt for attempt in read_attempts(run)}
    except (ValueError, TypeError) as error:
        return f"{ATTEMPTS}/ is damaged: {error}"


def _attempt_findings(committed: Iterable[int], attempts: Mapping[int, Attempt] | str) -> list[str]:
    if isinstance(attempts, str):
        return [attempts]
    return [f"{ATTEMPTS}/{number:04d}.json is missing" for number in sorted(committed) if number not in attempts]


# The sample order, from the identity that the checkpoint's digests protect


def sample_order(run: Directory, checkpoint: Checkpoint) -> tuple[SampleOrder | None, list[str]]:
    """The sample order of a run; or None, and why it is not known."""
    identity = checkpoint.state["identity"]
    config = build_config(Setting(name, value, MANIFEST) for name, value in identity.items() if name in FIELDS)
    try:
        index = _index(run, config)
    except UserError as error:
        return None, [f"not checked, which samples arrived: {error}"]
    if index.digest != identity["data"]:
        return None, [
            f"not checked, which samples arrived: {INDEX}/ is of other data (digest {index.digest[:12]}) than the run "
            f"was trained on ({identity['data'][:12]})"
        ]
    return preflight.sample_order(config, index), []


def _index(run: Directory, config: Config) -> Index:
    """The index of the training files, as it is cached; entries that are gone are built again.

    Raises:
        UserError: neither an entry nor its file is there.
    """
    schema, cache = preflight.schema(config), run / INDEX
    with scratch() as directory:

        def shard(path: str) -> Shard:
            cached = cached_shard(path, schema, cache)
            return cached or index_shard(find_files(path, f"{INDEX}/{LIST}")[0], schema, Directory(str(directory)))

        return Index([shard(path) for path in _training_files(run)], schema)


def _training_files(run: Directory) -> list[str]:
    """Paths of the files that the run was trained on.

    Raises:
        UserError: nothing says which they are.
    """
    try:
        return read_list(run / INDEX)
    except (FileNotFoundError, ValueError):
        config = _stored_config(run)
    if config is None:
        raise UserError(f"neither {INDEX}/{LIST} nor {CONFIG} says which files the run was trained on")
    return [file.path for file in find_files(config.data.input_files, f"{INDEX}/{LIST} is missing; data.input_files")]


# The history


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
        samples = self._order.global_batch(record.step) if self._order else None
        for rank, arrival in enumerate(record.arrivals):
            mine = rank_slice(self._size, rank, world_size)
            first, stop = record.step * self._size + mine.start, record.step * self._size + mine.stop
            if (arrival.first, arrival.stop) != (first, stop):
                found = f"[{arrival.first}, {arrival.stop})"
                yield f", rank {rank}: positions {found} arrived, expected [{first}, {stop})"
            elif samples is not None and arrival.checksum != samples_checksum(samples[mine]):
                found = f"checksum {arrival.checksum}, expected {samples_checksum(samples[mine])}"
                yield f", rank {rank}: other samples arrived than the sample order says ({found})"
            elif samples is not None and self.epochs:
                self.epochs.add(first, samples[mine])


def _sequence_findings(found: Sequence[int], expected: range) -> Iterator[str]:
    """What is wrong with the steps that a link holds."""
    for step, count in Counter(found).items():
        if step not in expected:
            yield f"step {step} does not belong here, between steps {expected.start} and {expected.stop - 1}"
        elif count > 1:
            yield f"step {step} is recorded {count} times"
    missing = sorted(set(expected) - set(found))
    if missing:
        yield f"not recorded: {', '.join(_spans(missing))}"
    once = list(dict.fromkeys(found))
    if once != sorted(once):
        at = next(i for i in range(1, len(once)) if once[i] < once[i - 1])
        yield f"step {once[at]} is out of order, behind step {once[at - 1]}"


def _spans(steps: Sequence[int]) -> Iterator[str]:
    """Sorted steps in words, neighbours joined."""
    first = steps[0]
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if following != step + 1:
            yield f"step {step}" if first == step else f"steps {first} to {step}"
            first = following if following is not None else first


# For a person


def lines(report: Report) -> Iterator[str]:
    """The report, line by line."""
    of = "" if report.num_steps is None else f" of {report.num_steps}"
    yield f"Run: {report.run_dir}"
    yield f"History: step {report.step}{of}, as {report.checkpoint or 'no checkpoint'} records it"
    yield f"  {report.proven_steps} of {report.step} steps are there exactly once{_what_arrived(report)}"
    if report.num_samples is not None:
        epochs = f"{report.complete_epochs} complete epoch{'s' * (report.complete_epochs != 1)}"
        yield (
            f"  {epochs} of {report.num_samples} samples, each sample exactly once; {report.partial_samples} samples, "
            "each once, of the next"
        )
    reasons = Counter(report.skipped.values())
    for reason, count in reasons.items():
        steps = [step for step, why in report.skipped.items() if why == reason]
        more = " ..." if count > MAX_SHOWN else ""
        yield f"  {count} updates skipped ({reason}): {', '.join(_spans(steps[:MAX_SHOWN]))}{more}"
    yield f"Checkpoints: {sum(state.is_intact for state in report.checkpoints)} intact"
    for state in report.checkpoints:
        if not state.is_intact:
            yield f"  {state.name}: " + (f"DAMAGED, {state.damage}" if state.is_complete else "incomplete, ignored")
    if report.summary is not None:
        yield from ledger.lines(report.summary)
    if report.holds:
        yield "All of it holds."
        return
    yield f"{len(report.findings)} findings:"
    yield from (f"  {finding}" for finding in report.findings[:MAX_SHOWN])
    if len(report.findings) > MAX_SHOWN:
        yield "  ... (--json lists all)"


def _what_arrived(report: Report) -> str:
    return (
        ", positions right; samples NOT CHECKED" if report.num_samples is None else ", the right samples at every rank"
    )
