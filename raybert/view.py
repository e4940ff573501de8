"""The view: how a run stands now, as a block of lines for a terminal of any width. Pure functions of what is known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.text import Text

LABEL, GAP = 10, 3  # columns: of a row's label, between two of its fields
MAX_WIDTH = 100  # a bar that is longer says no more
SPARKS, SPARK_WIDTH = "▁▂▃▄▅▆▇█", 24
SPARK_LOG = 20.0  # the larger, the more is seen of what is small beside the first losses
DIM, ACCENT, HELD_OUT = "bright_black", "green", "yellow"


@dataclass(frozen=True)
class View:
    """What is known of a run. Times (`_at_s`) are of one clock that does not jump.

    Args:
        step, num_steps: done, and of the run.
        status: what is going on while no step is trained; empty while one is.
        metrics: the newest of training.
        held_out: the newest of an evaluation.
        losses: of training, oldest first.
        end_at_s: when the run ends at this pace; None before that is known.
        committed_step: of the newest checkpoint.
        committed_at_s: when that was complete; None if no checkpoint is.
        goodput: share of the time that is in the result.
    """

    step: int
    num_steps: int
    status: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    held_out: Mapping[str, float] = field(default_factory=dict)
    losses: Sequence[float] = ()
    end_at_s: float | None = None
    committed_step: int = 0
    committed_at_s: float | None = None
    goodput: float | None = None


def block(view: View, width: int, now_s: float, is_ascii: bool = False) -> list[Text]:
    """The view, in lines of at most `width` columns; fields that do not fit go to the next line."""
    width = min(width, MAX_WIDTH)
    lines = [Text(), _progress(view, width, now_s, is_ascii)]
    for label, fields in _rows(view, now_s, is_ascii):
        lines += _flowed(label, fields, width)
    for line in lines:
        line.truncate(width)
    return lines


def _rows(view: View, now_s: float, is_ascii: bool) -> Iterator[tuple[str, list[Text]]]:
    """Labels, and fields that belong together."""
    metrics, held_out = view.metrics, view.held_out
    if metrics:
        sparks = [] if is_ascii else [Text(sparkline(view.losses, SPARK_WIDTH), ACCENT)]
        yield "loss", [_value(f"{metrics['training_loss']:.3f}"), *sparks, *_held_out(held_out, "loss", "{:.3f}")]
    for label, name in (("mlm acc", "masked_lm_accuracy"), ("nsp acc", "next_sentence_accuracy")):
        if name in metrics:
            yield label, [_value(f"{metrics[name]:.3f}"), *_held_out(held_out, name, "{:.3f}")]
    if metrics:
        yield (
            "speed",
            [
                _value(f"{metrics['samples_per_s']:,.0f}", "samples/s"),
                _value(f"{metrics['tokens_per_s']:,.0f}", "tokens/s"),
                *([_value(f"{metrics['mfu']:.1%}", "mfu")] if "mfu" in metrics else []),
                _value(f"{metrics['data_wait']:.1%}", "waiting for data"),
            ],
        )
        size = int(metrics["world_size"])
        yield (
            "run",
            [
                _value(f"{size}", f"worker{'s' * (size != 1)}"),
                _value(f"{metrics['learning_rate']:.2e}", "lr"),
                *([] if view.goodput is None else [_value(f"{view.goodput:.1%}", "goodput")]),
            ],
        )
    if view.committed_at_s is not None:
        age = Text(f"{duration(now_s - view.committed_at_s)} ago", DIM)
        yield "saved", [Text.assemble(("step ", DIM), f"{view.committed_step:,}"), age]


def _value(number: str, unit: str = "") -> Text:
    return Text.assemble((number, "bold"), (f" {unit}" if unit else "", DIM))


def _held_out(metrics: Mapping[str, float], name: str, spell: str) -> list[Text]:
    return [Text.assemble((spell.format(metrics[name]), HELD_OUT), (" held-out", DIM))] if name in metrics else []


def _progress(view: View, width: int, now_s: float, is_ascii: bool) -> Text:
    """A bar, and beside it how far the run is."""
    share = view.step / view.num_steps if view.num_steps else 0.0
    is_timed = view.end_at_s is not None and view.step < view.num_steps
    left = f"{duration(max(0.0, (view.end_at_s or 0.0) - now_s))} left" if is_timed else ""
    told = view.status or left
    more = (f"  {told}" if told else "", DIM)
    behind = Text.assemble((f"  {view.step:,}/{view.num_steps:,}", "bold"), f"  {share:.0%}", more)
    room = max(4, width - cell_len(behind.plain))
    full, empty = ("#", "-") if is_ascii else ("━", "━")
    done = min(room, int(share * room))
    return Text.assemble((full * done, ACCENT), (empty * (room - done), DIM), behind)


def _flowed(label: str, fields: Sequence[Text], width: int) -> Iterator[Text]:
    """The fields behind their label, in as many lines as they need."""
    line = Text(f"{label:<{LABEL}}", DIM)
    is_empty = True
    for one in fields:
        gap = 0 if is_empty else GAP
        if not is_empty and line.cell_len + gap + one.cell_len > width:
            yield line
            line, gap = Text(" " * LABEL), 0
        line = Text.assemble(line, " " * gap, one)
        is_empty = False
    yield line


def sparkline(values: Sequence[float], width: int) -> str:
    """At most so many characters, each as high as the mean of its values; a blank where none is finite."""
    size = max(1, -(-len(values) // width))
    parts = [[value for value in values[i : i + size] if math.isfinite(value)] for i in range(0, len(values), size)]
    means = [sum(part) / len(part) if part else math.nan for part in parts]
    finite = [mean for mean in means if not math.isnan(mean)]
    if not finite:
        return " " * len(means)
    low, span = min(finite), (max(finite) - min(finite)) or 1.0

    def spark(mean: float) -> str:
        height = math.log1p(SPARK_LOG * (mean - low) / span) / math.log1p(SPARK_LOG)
        return SPARKS[round(height * (len(SPARKS) - 1))]

    return "".join(" " if math.isnan(mean) else spark(mean) for mean in means)


def duration(seconds: float) -> str:
    """Seconds for a person: 42s, 3m05s, 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def counted(number: int, noun: str) -> str:
    """As in: 1 file, 1,234 files."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
