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

from raybert import goodput, preflight
from raybert.config import Config
from raybert.config_file import CONFIG, FIELDS, Setting, build_config, config_from_yaml
from raybert.entry import read_ledger
from raybert.errors import UserError
from raybert.goodput import Summary, summarize
from raybert.history import ATTEMPTS, Attempt, read_attempts
from raybert.index import INDEX, LIST, Index, Shard, cached_shard, index_shard, read_list
from raybert.manifest import CHECKPOINTS, MANIFEST, Checkpoint, find_checkpoints, find_damage, open_checkpoint
from raybert.order import SampleOrder
from raybert.proof import Proof, follow, spans
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
        yield f"  {count} updates skipped ({reason}): {', '.join(spans(steps[:MAX_SHOWN]))}{more}"
    yield f"Checkpoints: {sum(state.is_intact for state in report.checkpoints)} intact"
    for state in report.checkpoints:
        if not state.is_intact:
            yield f"  {state.name}: " + (f"DAMAGED, {state.damage}" if state.is_complete else "incomplete, ignored")
    if report.summary is not None:
        yield from goodput.lines(report.summary)
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
