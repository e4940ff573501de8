"""The page: a run as one HTML file that needs nothing else, no network and no script."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from raybert.canvas import COLOURS, svg
from raybert.charts import Chart, compact, end_of, state_names
from raybert.chronicle import Card, Chronicle, Row, metrics_table
from raybert.config import Config
from raybert.config_file import SECTIONS
from raybert.view import duration

MAX_ROWS = 24  # of the table of metrics
MAX_SKIPPED = 50  # records that are listed

COLUMNS = {  # of the table of metrics: what it says of which metric
    "Masked LM loss": ("lm_example_loss", "{:.4f}"),
    "Masked LM accuracy": ("masked_lm_accuracy", "{:.2%}"),
    "Next sentence accuracy": ("next_sentence_accuracy", "{:.2%}"),
    "Learning rate": ("learning_rate", "{:.3e}"),
    "Gradient norm": ("grad_norm", "{:.3f}"),
    "Tokens/s": ("tokens_per_s", "{:,.0f}"),
    "MFU": ("mfu", "{:.1%}"),
    "Workers": ("world_size", "{:.0f}"),
}


def render(chronicle: Chronicle, charts: Sequence[Chart]) -> str:
    """The page of a run; all that is the user's is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raybert", ""), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html").render(
        run=chronicle,
        name=chronicle.run.path.rstrip("/").rpartition("/")[2] or chronicle.run.uri,
        made_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        colours=COLOURS,
        figures=[_figure(chart) for chart in charts],
        tiles=list(_tiles(chronicle)),
        attempts=list(_attempts(chronicle)),
        states=list(_states(chronicle)),
        cards=[_card(chronicle, card) for card in chronicle.cards],
        skipped=list(_skipped(chronicle)),
        changed=list(_changed(chronicle.config)) if chronicle.config else [],
        barred=chronicle.attempts[-1].barred if chronicle.attempts else (),
        train=_table(chronicle.train.kept, "training_loss"),
        held_out=_table(chronicle.held_out.kept, "loss"),
    )


def _figure(chart: Chart) -> dict[str, Any]:
    wide = Markup(svg(chart.figure, chart.title, chart.description))
    narrow = None if chart.narrow is None else Markup(svg(chart.narrow, f"{chart.title}, narrow", chart.description))
    return {"name": chart.name, "wide": wide, "narrow": narrow}


def _tiles(chronicle: Chronicle) -> Iterator[tuple[str, str, str]]:
    """What the run came to: a name, a number, and what else is to be said of it."""
    config, summary = chronicle.config, chronicle.summary
    epochs = _epochs(chronicle)
    told = "" if epochs is None else f", {epochs:.3g} epochs"
    yield "Steps", f"{chronicle.last_step:,}", f"of {chronicle.num_steps:,}{told}"
    train, held_out = ((rows.kept[-1] if rows.kept else {}) for rows in (chronicle.train, chronicle.held_out))
    for name, of_train, of_held_out, spell in (
        ("Loss", "training_loss", "loss", "{:.3f}"),
        ("MLM accuracy", "masked_lm_accuracy", "masked_lm_accuracy", "{:.1%}"),
        ("NSP accuracy", "next_sentence_accuracy", "next_sentence_accuracy", "{:.1%}"),
    ):
        trained = _spelt(train[of_train], spell) if of_train in train else ""
        if of_held_out in held_out:
            beside = f"held-out, train {trained}" if trained else "held-out"
            yield name, _spelt(held_out[of_held_out], spell), beside
        elif trained:
            yield name, trained, "train"
    if config:
        num_samples, per_sample = chronicle.last_step * config.training.global_batch_size, chronicle.tokens_per_sample
        tokens = "" if per_sample is None else f"{compact(num_samples * per_sample)} tokens"
        yield "Samples", compact(num_samples), tokens
    if summary:
        yield "Goodput", f"{summary.goodput:.1%}", f"of {duration(summary.wall_s)}"
        if summary.cost is not None:
            yield "Cost", f"{summary.cost:,.2f}", f"{summary.useful_cost or 0:,.2f} useful"


def _epochs(chronicle: Chronicle) -> float | None:
    size = next((card.num_samples for card in chronicle.cards if card.name == "Training"), 0)
    if chronicle.config is None or not size:
        return None
    return chronicle.last_step * chronicle.config.training.global_batch_size / size


def _spelt(value: float, spell: str) -> str:
    return spell.format(value) if math.isfinite(value) else "not finite"


def _attempts(chronicle: Chronicle) -> Iterator[dict[str, Any]]:
    """A row an attempt; what only the ledger knows is left out where there is none."""
    if chronicle.summary is None:
        names = ("useful", "redone", "lost", "kind", "reason")
        for record in chronicle.attempts:
            known = {"number": record.number, "began": record.started_at, "workers": record.world_size}
            yield known | {"steps": f"from {record.start_step:,}"} | dict.fromkeys(names, "")
        return
    for entry, attempt in zip(chronicle.entries, chronicle.summary.attempts, strict=True):
        yield {
            "number": entry.attempt,
            "began": datetime.fromtimestamp(entry.began_at_s, UTC).strftime("%Y-%m-%d %H:%M:%S"),
            "workers": entry.world_size,
            "steps": f"{entry.start_step:,} to {attempt.last_step:,}",
            "useful": f"{attempt.useful_steps:,}",
            "redone": f"{attempt.redone_steps:,}",
            "lost": "" if attempt.lost_s is None else duration(attempt.lost_s),
            "kind": end_of(entry) or "",
            "reason": entry.reason or "has not ended",
        }


def _states(chronicle: Chronicle) -> Iterator[tuple[str, str, float, float, float]]:
    """Colour, name, seconds, their share, and worker seconds by what they were spent on."""
    if chronicle.summary is not None:
        seconds, workers = asdict(chronicle.summary.seconds), asdict(chronicle.summary.worker_seconds)
        for state, name in state_names(chronicle).items():
            yield state, name, seconds[state], seconds[state] / (chronicle.summary.wall_s or 1), workers[state]


def _card(chronicle: Chronicle, card: Card) -> dict[str, Any]:
    """What is known of the data, by name."""
    assert chronicle.config
    data, known = chronicle.config.data, {"Files": f"{card.num_files:,} ({card.size_bytes / 1e6:,.1f} MB)"}
    known["Samples"] = f"{card.num_samples:,}"
    if card.name == "Training" and chronicle.tokens_per_sample is not None:
        known["Tokens a sample"] = f"{chronicle.tokens_per_sample:.1f} of {data.max_seq_length}, as trained on"
        known["Padding"] = f"{1 - chronicle.tokens_per_sample / data.max_seq_length:.1%}, on which no work is done"
    if card.num_samples:
        by_files = ", as the files mask them" if data.masking == "dynamic" else ""
        masked = f"{card.num_masked / card.num_samples:.1f} of at most {data.max_predictions_per_seq}{by_files}"
        known["Masked a sample"] = masked
        random = card.num_random_next / card.num_samples
        known["Next sentences"] = f"{1 - random:.1%} next, {random:.1%} random"
    if card.num_bad:
        known["Left out"] = f"{card.num_bad:,} bad records"
    if card.name == "Held-out" and "unigram_mlm_loss" in chronicle.baselines:
        known["Guessing by token frequency"] = f"masked LM loss {chronicle.baselines['unigram_mlm_loss']:.3f}"
    if card.name == "Held-out" and "majority_next_sentence_accuracy" in chronicle.baselines:
        majority = chronicle.baselines["majority_next_sentence_accuracy"]
        known["Guessing the majority"] = f"next sentence accuracy {majority:.1%}"
    return {"name": card.name, "paths": card.paths, "known": known}


def _skipped(chronicle: Chronicle) -> Iterator[dict[str, Any]]:
    for option, files in chronicle.skipped.items():
        records = [f"{path}: {record}" for path, records in files.items() for record in records]
        yield {"option": option, "count": len(records), "files": len(files), "shown": records[:MAX_SKIPPED]}


def _changed(config: Config) -> Iterator[tuple[str, str, str]]:
    """Every setting that is not the default: name, value, default."""
    ours, defaults = asdict(config), asdict(Config())
    for name, value in ours.items():
        if name not in SECTIONS:
            pairs = [(name, value, defaults[name])]
        else:
            pairs = [(f"{name}.{key}", one, defaults[name][key]) for key, one in value.items()]
        yield from ((name, _as_yaml(one), _as_yaml(default)) for name, one, default in pairs if one != default)


def _as_yaml(value: object) -> str:
    text: str = yaml.safe_dump(value, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()


def _table(rows: Sequence[Row], loss: str) -> dict[str, Any]:
    """Some of the rows as text, and how many there are; only columns that say something."""
    columns = {"Loss": (loss, "{:.4f}")} | COLUMNS
    told = {name: column for name, column in columns.items() if any(column[0] in row for row in rows)}
    shown = [
        [f"{row['step']:,}", *(_spelt(row[metric], spell) if metric in row else "" for metric, spell in told.values())]
        for row in metrics_table(rows, MAX_ROWS)
    ]
    return {"columns": ["Step", *told], "rows": shown, "count": len(rows)}
