"""The chronicle of a run: all that its directory has recorded, for whoever draws it; nothing of it is computed anew.

What is missing is left out. What is damaged is left out and named, since a page about the rest is still worth having.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from raybert import preflight
from raybert.config import Config
from raybert.config_file import CONFIG, config_from_yaml
from raybert.entry import DRIVER_LOST, FINISHED, INTERRUPTED, LEDGER, Entry, read_ledger
from raybert.errors import UserError
from raybert.example import Schema
from raybert.goodput import Summary, summarize
from raybert.history import ATTEMPTS, RECORDS, Attempt, read_attempts
from raybert.index import INDEX, Shard, cached_shard, read_list
from raybert.ledger import WRITE_EVERY_S
from raybert.manifest import CHECKPOINTS, MANIFEST, find_checkpoints, place
from raybert.storage import Directory, find_files
from raybert.telemetry import EVAL, METRICS, TRAIN, read_metrics

SKIPPED, BASELINES, REPORT = "skipped_records.json", "baselines.json", "report.html"  # in a run directory
ALIVE_S = 6 * WRITE_EVERY_S  # since a driver has written, by its own clock
READERS = 16  # threads that read the index

Row = Mapping[str, float]
T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """Metrics of one kind, by step.

    Args:
        kept: those that are in the result or may still be, oldest first.
        overridden: of steps that were done again later.
    """

    kept: Sequence[Row]
    overridden: Sequence[Row]


@dataclass(frozen=True)
class Card:
    """What samples a run has.

    Args:
        name: Training or Held-out.
        paths: as the setting names them.
        num_files, size_bytes, num_samples: of the files, as they were indexed.
        num_masked: places to be predicted, as the files mask them.
        num_random_next: samples of label 1.
        num_bad: damaged places that are left out.
    """

    name: str
    paths: str
    num_files: int
    size_bytes: int
    num_samples: int
    num_masked: int
    num_random_next: int
    num_bad: int


@dataclass(frozen=True)
class Chronicle:
    """A run as its directory shows it.

    Args:
        run: the directory.
        config: what it was last started with; None if that is not there.
        yaml: the same as text.
        train, held_out: metrics.
        attempts: by their records, oldest first.
        entries, summary: of the ledger; None where there is none.
        committed_step: of the newest complete checkpoint; 0 if there is none.
        saved: (step, attempt) of every checkpoint there ever was.
        baselines: what guessing by frequency reaches on the held-out set.
        cards: the data.
        tokens_per_sample: real ones, of the samples that were trained on; None before the first metrics.
        skipped: records that are left out, by option and file.
        problems: what could not be read.
        is_alive: whether its driver has written to the ledger lately.
    """

    run: Directory
    config: Config | None
    yaml: str
    train: Rows
    held_out: Rows
    attempts: Sequence[Attempt]
    entries: Sequence[Entry]
    summary: Summary | None
    committed_step: int
    saved: Sequence[tuple[int, int]]
    baselines: Mapping[str, float]
    cards: Sequence[Card]
    tokens_per_sample: float | None
    skipped: Mapping[str, Mapping[str, Sequence[str]]]
    problems: Sequence[str]
    is_alive: bool

    @property
    def num_steps(self) -> int:
        """Of the whole run, as far as is known."""
        return self.last_step if self.config is None else self.config.training.num_steps

    @property
    def last_step(self) -> int:
        """That was ever reported, and not taken back since."""
        steps = [int(rows.kept[-1]["step"]) for rows in (self.train, self.held_out) if rows.kept]
        return max([self.committed_step, *steps])

    @property
    def state(self) -> str:
        """How the run stands, for a person."""
        if self.config is not None and self.committed_step >= self.num_steps:
            return "complete"
        reason = self.entries[-1].reason if self.entries else ""
        if reason is None:
            return "running" if self.is_alive else "cut off"
        return {"": "begun", FINISHED: "stopped", INTERRUPTED: "interrupted", DRIVER_LOST: "cut off"}.get(
            reason, "failed"
        )


def read_chronicle(run: Directory) -> Chronicle:
    """All that a run directory has recorded.

    Raises:
        UserError: it is no run's.
        OSError: the storage could not be read.
    """
    if not any(run.exists(name) for name in (CONFIG, ATTEMPTS, METRICS, LEDGER)):
        raise UserError(f"There is no run in {run.uri}; give the run_dir of a run.")
    problems: list[str] = []

    def read(what: str, reading: Callable[[], T], otherwise: T) -> T:
        """What is there; `otherwise` where it is not, or damaged."""
        try:
            return reading()
        except FileNotFoundError:
            return otherwise
        except (ValueError, TypeError, KeyError, AttributeError, UserError) as error:
            problems.append(f"{what} cannot be read: {error}")
            return otherwise

    damaged: list[int] = []
    rows = read_metrics(run, damaged)
    if damaged:
        problems.append(f"{METRICS}: {len(damaged)} lines cannot be read, the first is line {damaged[0]}.")
    yaml = read(CONFIG, lambda: run.read(CONFIG).decode(), "")
    config = read(CONFIG, lambda: config_from_yaml(yaml, CONFIG) if yaml else None, None)
    entries: list[Entry] = read(LEDGER, lambda: read_ledger(run), [])
    train = effective(row for row in rows if row["kind"] == TRAIN)
    return Chronicle(
        run=run,
        config=config,
        yaml=yaml,
        train=train,
        held_out=effective(row for row in rows if row["kind"] == EVAL),
        attempts=read(ATTEMPTS, lambda: read_attempts(run), []),
        entries=entries,
        summary=summarize(entries, config.cluster.price_per_worker_hour if config else None) if entries else None,
        committed_step=_committed_step(run),
        saved=_saved(run),
        baselines=read(BASELINES, lambda: _baselines(run), {}),
        cards=read(INDEX, lambda: list(_cards(run, config)), []) if config else [],
        tokens_per_sample=_tokens_per_sample(train.kept),
        skipped=read(SKIPPED, lambda: _skipped(run), {}),
        problems=problems,
        is_alive=bool(entries) and time.time() - entries[-1].seen_at_s < ALIVE_S,
    )


def effective(rows: Iterable[Row]) -> Rows:
    """Metrics of one kind in the order they were written: a step that comes again takes back all from it on."""
    kept: list[Row] = []
    overridden: list[Row] = []
    for row in rows:
        while kept and kept[-1]["step"] >= row["step"]:
            overridden.append(kept.pop())
        kept.append(row)
    return Rows(kept, sorted(overridden, key=lambda row: row["step"]))


def _baselines(run: Directory) -> dict[str, float]:
    return {str(name): float(value) for name, value in json.loads(run.read(BASELINES)).items()}


def _skipped(run: Directory) -> dict[str, dict[str, list[str]]]:
    known = json.loads(run.read(SKIPPED)).items()
    return {option: {path: list(map(str, records)) for path, records in files.items()} for option, files in known}


def _committed_step(run: Directory) -> int:
    folder = run / CHECKPOINTS
    names = (name for name in find_checkpoints(run) if folder.exists(f"{name}/{MANIFEST}"))
    return next((place(name)[0] for name in names), 0)


def _saved(run: Directory) -> list[tuple[int, int]]:
    """Of every checkpoint there ever was, since its records stay."""
    names = (name.removesuffix(".jsonl") for name in (run / RECORDS).names() if name.endswith(".jsonl"))
    return sorted(_places(names))


def _places(names: Iterable[str]) -> Iterator[tuple[int, int]]:
    for name in names:
        try:
            yield place(name)
        except ValueError:  # somebody else's file
            continue


def _tokens_per_sample(rows: Sequence[Row]) -> float | None:
    """Mean over the samples that metrics are of: each row is of the steps since the one before."""
    rows = [row for row in rows if row.get("samples_per_s") and "tokens_per_s" in row]
    steps = [0, *(int(row["step"]) for row in rows)]
    counts = [after - before for before, after in itertools.pairwise(steps)]
    if not rows:
        return None
    tokens = sum(n * row["tokens_per_s"] / row["samples_per_s"] for n, row in zip(counts, rows, strict=True))
    return tokens / sum(counts)


# --- The data ---------------------------------------------------------------------------------------------------------


def _cards(run: Directory, config: Config) -> Iterator[Card]:
    """What the index knows of the files; of held-out ones as far as they are still there."""
    schema, held_out = preflight.schema(config), config.evaluation.input_files
    yield from _card(run, schema, "Training", config.data.input_files, lambda: read_list(run / INDEX))
    if held_out:
        yield from _card(
            run, schema, "Held-out", held_out, lambda: [file.path for file in find_files(held_out, "held-out")]
        )


def _card(run: Directory, schema: Schema, name: str, paths: str, files: Callable[[], list[str]]) -> Iterator[Card]:
    try:
        names = files()
    except (FileNotFoundError, UserError):
        return
    card = Card(name, paths, 0, 0, 0, 0, 0, 0)
    with ThreadPoolExecutor(READERS) as pool:
        for shard in pool.map(lambda path: cached_shard(path, schema, run / INDEX), names):
            card = card if shard is None else _with(card, shard)
    if card.num_files:
        yield card


def _with(card: Card, shard: Shard) -> Card:
    return replace(
        card,
        num_files=card.num_files + 1,
        size_bytes=card.size_bytes + shard.file.size_bytes,
        num_samples=card.num_samples + int(shard.page_sizes.sum()),
        num_masked=card.num_masked + int(shard.label_counts.sum()),
        num_random_next=card.num_random_next + shard.num_random_next,
        num_bad=card.num_bad + len(shard.bad),
    )


def step_time_s(entry: Entry, step: float) -> float:
    """When an attempt was at a step, by the times of its first and its last; never outside of its life."""
    begin_s = entry.stopped_at_s if entry.first_step_at_s is None else entry.first_step_at_s
    end_s = begin_s if entry.last_step_at_s is None else max(begin_s, entry.last_step_at_s)
    num_steps = entry.last_step - entry.start_step
    share = (step - entry.start_step) / num_steps if num_steps > 0 else 1.0
    return begin_s + min(1.0, max(0.0, share)) * (end_s - begin_s)


def metrics_table(rows: Sequence[Row], num_shown: int) -> list[Row]:
    """At most so many rows, evenly spread, the first and the last among them."""
    if len(rows) <= num_shown:
        return list(rows)
    places = [round(i * (len(rows) - 1) / (num_shown - 1)) for i in range(num_shown)]
    return [rows[i] for i in places]
