"""The history of a run: which attempts there were, and which samples each committed step was trained on.

Attempts are numbered files; the newest number owns the run, and an older attempt that wakes up may not commit any
more. Steps are recorded by what arrived at each rank, and each checkpoint commits the records since the one before (its
parent), so the effective history is what the newest checkpoint reaches through its parents. What no checkpoint carries
is not history.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from raybert.errors import UserError
from raybert.order import Samples
from raybert.splitmix import STEP, mixed
from raybert.storage import Directory

ATTEMPTS, RECORDS = "attempts", "history"
CHECKSUM_LIMIT = 1 << 63  # below it a number is an int64 of torch's

Barred = tuple[int, int, str]
"""Steps [first, stop) that are consumed without an update, and why."""


@dataclass(frozen=True)
class Attempt:
    """One life of the worker group.

    Args:
        number: from 1.
        world_size: number of workers.
        start_step: first step it trains.
        checkpoint: name of the checkpoint it began from; None at the beginning of a run.
        started_at: ISO 8601, UTC.
        barred: what the attempts before have barred, those that were rolled back.
        snapshot: attempt whose snapshot of `start_step` it began from, instead of the checkpoint, which only says where
            the records begin that its next checkpoint commits; None where it began from the checkpoint.
    """

    number: int
    world_size: int
    start_step: int
    checkpoint: str | None
    started_at: str
    barred: tuple[Barred, ...] = ()
    snapshot: int | None = None


class FencedError(UserError):
    """A newer attempt owns the run: this one must not write any more, and trying again would only fence the other."""


def newest_attempt(run: Directory) -> int:
    """Number of the newest attempt, 0 if there was none."""
    names = (run / ATTEMPTS).names()
    return max((int(name.removesuffix(".json")) for name in names if name.endswith(".json")), default=0)


def begin_attempt(
    run: Directory,
    world_size: int,
    start_step: int,
    checkpoint: str | None,
    barred: tuple[Barred, ...] = (),
    snapshot: int | None = None,
) -> Attempt:
    """Record a new attempt, which fences all older ones."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    attempt = Attempt(newest_attempt(run) + 1, world_size, start_step, checkpoint, now, barred, snapshot)
    (run / ATTEMPTS).write(f"{attempt.number:04d}.json", json.dumps(asdict(attempt)).encode())
    return attempt


def read_attempts(run: Directory) -> list[Attempt]:
    """Every attempt of the run, oldest first."""
    folder = run / ATTEMPTS
    attempts = [_to_attempt(json.loads(folder.read(name))) for name in folder.names() if name.endswith(".json")]
    return sorted(attempts, key=lambda attempt: attempt.number)


def _to_attempt(row: dict[str, Any]) -> Attempt:
    attempt = Attempt(**row)
    return replace(attempt, barred=tuple((first, stop, reason) for first, stop, reason in attempt.barred))


def trained_by(step: int, attempt: int, attempts: Mapping[int, Attempt]) -> int:
    """The attempt that trained a step which a checkpoint of `attempt` commits: before its start those it descends from.

    Args:
        step: number of the step.
        attempt: of the checkpoint.
        attempts: by number; one that is not known descends from none.
    """
    while (one := attempts.get(attempt)) and step < one.start_step and one.snapshot and one.snapshot < attempt:
        attempt = one.snapshot
    return attempt


def check_newest(run: Directory, attempt: int) -> None:
    """Raises:
    FencedError: another attempt has begun since.
    OSError: the storage does not know this one, as where nothing is mounted any more.
    """
    newest = newest_attempt(run)
    if newest < attempt:
        raise OSError(f"{run.uri} does not hold the record of attempt {attempt}")
    if newest > attempt:
        raise FencedError(
            f"run_dir: attempt {attempt} may not write to {run.uri} any more, since attempt {newest} has taken the run "
            "over; let that one go on, or give this run another run_dir."
        )


@dataclass(frozen=True)
class Arrival:
    """What arrived at one rank for one step: samples for the places [first, stop) of the run, and their checksum."""

    first: int
    stop: int
    checksum: int


@dataclass(frozen=True)
class StepRecord:
    """A step that was consumed.

    Args:
        step: its number.
        attempt: that trained it.
        arrivals: what arrived, by rank.
        skipped: why the update was skipped; None if it was made.
    """

    step: int
    attempt: int
    arrivals: tuple[Arrival, ...]
    skipped: str | None = None


def checksum(positions: Samples, samples: Samples) -> int:
    """Of [B] samples at [B] positions of the run, in any order: a sum of 64-bit hashes, modulo CHECKSUM_LIMIT.

    So the checksums of the ranks, which get the samples of a batch in another order than its own, add up to the
    batch's.
    """
    hashes = mixed(mixed(positions.astype(np.uint64) * STEP) ^ samples.astype(np.uint64))
    return int(hashes.sum()) % CHECKSUM_LIMIT


def to_lines(records: Sequence[StepRecord], parent: str | None) -> bytes:
    """JSON lines: the parent checkpoint's name, then a line a step."""
    lines = [json.dumps({"parent": parent})]
    for record in records:
        arrivals = [[arrival.first, arrival.stop, arrival.checksum] for arrival in record.arrivals]
        row = {"step": record.step, "attempt": record.attempt, "arrivals": arrivals}
        lines.append(json.dumps(row | ({"skipped": record.skipped} if record.skipped else {})))
    return "\n".join(lines).encode() + b"\n"


def write_records(run: Directory, checkpoint: str, parent: str | None, records: Sequence[StepRecord]) -> None:
    """Store the records that a checkpoint commits; they count once the checkpoint is complete."""
    (run / RECORDS).write(f"{checkpoint}.jsonl", to_lines(records, parent))


def read_history(run: Directory, checkpoint: str | None) -> list[StepRecord]:
    """The effective history that ends in a checkpoint, oldest step first."""
    chain: list[list[StepRecord]] = []
    while checkpoint is not None:
        header, *lines = (run / RECORDS).read(f"{checkpoint}.jsonl").decode().splitlines()
        chain.append([to_record(json.loads(line)) for line in lines])
        checkpoint = json.loads(header)["parent"]
    return [record for records in reversed(chain) for record in records]


def to_record(row: dict[str, Any]) -> StepRecord:
    """The record that a line holds."""
    arrivals = tuple(Arrival(*arrival) for arrival in row["arrivals"])
    return StepRecord(row["step"], row["attempt"], arrivals, row.get("skipped"))
