"""The charts of a run: curves over its steps, its workers over time, and where its seconds went."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, NullFormatter, NullLocator

from raybert.canvas import LIGHT, SMALL, key, new_figure, place, write
from raybert.chronicle import Chronicle, Row, step_time_s
from raybert.entry import DRIVER_LOST, FINISHED, INTERRUPTED, Entry
from raybert.goodput import AttemptSummary
from raybert.view import duration

Floats = npt.NDArray[np.float64]

PANEL = (400, 232)  # pixels
WIDE, NARROW = (1176, 264), (400, 320)
FOLDS: Sequence[Callable[[Floats], np.floating[Any]]] = (np.mean, np.min, np.max)
MAX_DOTS = 40  # of a curve whose points are larger
MAX_POINTS = 200  # of a curve; of more, means over neighbours, and their range
LOG_RANGE = 30.0  # above it, largest to smallest, an axis is logarithmic
KEY_WIDTH, TIMELINE_KEY = 132, 126
FREE, LOG, ZERO = "free", "log", "zero"  # axes: as the values are, logarithmic where they spread, from 0
TICKS_S = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
BASELINE_NAMES = ("unigram_mlm_loss", "majority_next_sentence_accuracy")
STATES = {  # of seconds, and their names
    "useful": "in the result",
    "redone": "done again",
    "starting": "starting",
    "preparing": "preparing",
    "waiting": "waiting",
    "other": "evaluation, other",
}
FAILURE, RESIZE, STOP = "failure", "resize", "stop"
MARKERS = {FAILURE: ("failure", "X"), RESIZE: ("resize", "D"), STOP: ("preparing", "s")}  # colour and shape


def state_names(chronicle: Chronicle) -> Mapping[str, str]:
    """The states of seconds by name; while a run is not complete, steps in no checkpoint may still be saved."""
    return STATES if chronicle.state == "complete" else STATES | {"redone": "again, or unsaved"}


@dataclass(frozen=True)
class Chart:
    """A figure with its names.

    Args:
        name: of its file.
        title, description: for who cannot see it.
        figure: the drawing.
        narrow: the same for a narrow page; None where one serves both.
    """

    name: str
    title: str
    description: str
    figure: Figure
    narrow: Figure | None = None


@dataclass(frozen=True)
class Panel:
    """Curves of one quantity over the steps.

    Args:
        name, title: of the chart.
        train, held_out: the metrics that are drawn.
        spell: a value for a person.
        axis: how values are laid out.
    """

    name: str
    title: str
    train: str
    held_out: str | None
    spell: Callable[[float], str]
    axis: str


def compact(value: float) -> str:
    """A number in few characters: 0.25, 1,500, 12.3k, 3.4M."""
    if value == 0:
        return "0"
    if abs(value) < 1e-2:
        return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")
    if abs(value) < 10_000:
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{float(f'{value / size:.3g}'):,g}{unit}"
    raise AssertionError(value)


PERCENT, NSP = "{:.1%}".format, "next_sentence_accuracy"
PANELS = (
    Panel("loss", "Loss", "training_loss", "loss", "{:.3f}".format, FREE),
    Panel("mlm_accuracy", "Masked LM accuracy", "masked_lm_accuracy", "masked_lm_accuracy", PERCENT, ZERO),
    Panel("nsp_accuracy", "Next sentence accuracy", NSP, NSP, PERCENT, FREE),
    Panel("learning_rate", "Learning rate", "learning_rate", None, "{:.2e}".format, ZERO),
    Panel("gradient_norm", "Gradient norm", "grad_norm", None, compact, LOG),
    Panel("tokens_per_s", "Tokens a second", "tokens_per_s", None, compact, ZERO),
    Panel("mfu", "Model FLOPs utilization", "mfu", None, PERCENT, ZERO),
    Panel("flops_per_s", "Model FLOP/s", "flops_per_s", None, compact, ZERO),
    Panel("data_wait", "Waiting for data", "data_wait", None, "{:.2%}".format, ZERO),
)


def draw(chronicle: Chronicle) -> Iterator[Chart]:
    """Every chart that the run has something for; operations a second only where utilization is not known."""
    logged = {name for rows in (chronicle.train, chronicle.held_out) for row in rows.kept for name in row}
    if chronicle.summary is not None:
        yield timeline(chronicle)
    for panel in PANELS:
        if panel.train in logged and not (panel.train == "flops_per_s" and "mfu" in logged):
            yield curves(chronicle, panel)
    if chronicle.summary is not None:
        yield seconds(chronicle)


# --- Curves over steps ------------------------------------------------------------------------------------------------


def curves(chronicle: Chronicle, panel: Panel) -> Chart:
    """A panel: the newest values beside its keys, and where attempts began."""
    figure = new_figure(*PANEL, panel.title)
    axes = place(figure, 46, 58, PANEL[0] - 58, PANEL[1] - 84)
    told: list[str] = []
    drawn: list[Floats] = []
    for source, metric, rows in (
        ("train", panel.train, chronicle.train),
        ("held-out", panel.held_out, chronicle.held_out),
    ):
        kept = [row for row in rows.kept if metric in row]
        if metric is None or not kept:
            continue
        values = _curve(axes, kept, metric, source, chronicle)
        overridden = [row for row in rows.overridden if metric in row]
        axes.plot(*_points(overridden, metric), color=LIGHT[source], alpha=0.25, linewidth=1)
        told.append(f"{source} {panel.spell(float(values[-1])) if len(values) else 'not finite'}")
        key(figure, KEY_WIDTH * (len(told) - 1), 27, told[-1], source)
        drawn.append(values)
    guess = _guess(chronicle, panel)
    if guess is not None:
        axes.axhline(guess, color=LIGHT["muted"], linewidth=1, dashes=(4, 3))
        told.append(f"guessing {panel.spell(guess)}")
        key(figure, KEY_WIDTH * (len(told) - 1), 27, told[-1], "muted", marker="_")
    _steps_axis(axes, chronicle)
    _values_axis(axes, np.concatenate(drawn), panel)
    for step, kind in attempt_begins(chronicle):
        colour = LIGHT[MARKERS[kind][0]]
        axes.axvline(step, color=colour, linewidth=1, alpha=0.55, zorder=0.5)
        axes.plot(step, 1, "v", color=colour, markersize=5, markeredgewidth=0, **_at_height(axes))
    text = f"{panel.title} over {chronicle.last_step:,} steps. Newest: {', '.join(told)}."
    return Chart(panel.name, panel.title, text, figure)


def _at_height(axes: Axes) -> dict[str, Any]:
    """Of marks that are placed by step, and by their height in the panel."""
    return {"transform": axes.get_xaxis_transform(), "clip_on": False}


def _points(rows: Sequence[Row], metric: str) -> tuple[Floats, Floats]:
    steps = np.array([row["step"] for row in rows], float)
    return steps, np.array([row[metric] for row in rows], float)


def _curve(axes: Axes, rows: Sequence[Row], metric: str, colour: str, chronicle: Chronicle) -> Floats:
    """Draw a line, paler where no checkpoint has the steps, with points where there are few, as evaluations are.

    Returns:
        The finite values; crosses at the bottom stand for the others.
    """
    every_step, every_value = _points(rows, metric)
    is_finite = np.isfinite(every_value)
    steps, means, lows, highs = thinned(every_step, every_value)
    size = 0.0 if colour == "train" and len(steps) > 1 else 4.5 if len(steps) <= MAX_DOTS else 2.5
    style: dict[str, Any] = {"color": LIGHT[colour], "linewidth": 1.6, "marker": "o", "markeredgewidth": 0}
    committed = math.inf if chronicle.state == "complete" else chronicle.committed_step
    last = int(np.searchsorted(steps, committed, side="right"))
    if (highs > lows).any():
        axes.fill_between(steps, lows, highs, color=LIGHT[colour], alpha=0.16, linewidth=0)
    for part, alpha in ((slice(0, last), 1.0), (slice(max(0, last - 1), None), 0.4)):
        axes.plot(steps[part], means[part], **style, markersize=size, alpha=alpha)
    lost = every_step[~is_finite]
    axes.plot(lost, np.full(len(lost), 0.03), "x", color=LIGHT["failure"], markersize=5, **_at_height(axes))
    return every_value[is_finite]


def thinned(steps: Floats, values: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Steps, and mean, least and largest value around each, at most `MAX_POINTS`; NaN where no value is finite."""
    size = -(-len(steps) // MAX_POINTS)
    parts = np.split(np.arange(len(steps)), range(size, len(steps), size))
    finite = [values[part][np.isfinite(values[part])] for part in parts]
    ends = np.array([steps[part[-1]] for part in parts])
    means, lows, highs = (np.array([fold(some) if len(some) else math.nan for some in finite]) for fold in FOLDS)
    return ends, means, lows, highs


def _steps_axis(axes: Axes, chronicle: Chronicle) -> None:
    steps = [chronicle.last_step, *(row["step"] for row in chronicle.train.overridden)]
    axes.set_xlim(0, max(1, *steps))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: compact(step) if step else "step 0"))


def _values_axis(axes: Axes, values: Floats, panel: Panel) -> None:
    """By the finite values that are drawn."""
    if panel.axis == LOG and len(values) and values.min() > 0 and values.max() > LOG_RANGE * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.margins(y=0.08)
        if panel.axis == ZERO:
            axes.set_ylim(bottom=0)
    is_share = "%" in panel.spell(0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.3g}%" if is_share else compact(y)))


def _guess(chronicle: Chronicle, panel: Panel) -> float | None:
    """What it takes to know how often labels occur and nothing else: unigrams, and the majority and its entropy."""
    unigram, majority = (chronicle.baselines.get(name) for name in BASELINE_NAMES)
    evaluated = chronicle.held_out.kept[-1] if chronicle.held_out.kept else {}
    if panel.held_out is None or panel.held_out not in evaluated:
        return None
    if panel.name == "nsp_accuracy":
        return majority
    if panel.name != "loss" or unigram is None or NSP not in evaluated:
        return unigram if panel.name == "loss" else None
    return None if majority is None else unigram - sum(p * math.log(p) for p in (majority, 1 - majority) if p > 0)


# --- Workers over time ------------------------------------------------------------------------------------------------


def attempt_begins(chronicle: Chronicle) -> Iterator[tuple[int, str]]:
    """First step of each attempt but the first, and why there was another."""
    ends = {entry.attempt: end_of(entry) for entry in chronicle.entries}
    for attempt in chronicle.attempts[1:]:
        yield attempt.start_step, ends.get(attempt.number - 1) or STOP


def end_of(entry: Entry) -> str | None:
    """What kind of end an attempt had; None if it has none, or the run's."""
    if entry.reason is None or entry.reason == FINISHED:
        return None
    if entry.is_planned:
        return RESIZE
    return STOP if entry.reason in (INTERRUPTED, DRIVER_LOST) else FAILURE


class Clock:
    """Seconds of a run that had a driver, one after the other: what lies between two drivers is left out."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._spans: list[tuple[float, float, float]] = []  # begin and end of a driver, and seconds before it
        self.stops: list[tuple[float, float]] = []  # where, and how long there was none
        begun_s = 0.0
        for _, group in itertools.groupby(entries, key=lambda entry: entry.driver_began_at_s):
            driver = list(group)
            begin_s = driver[0].driver_began_at_s
            end_s = max(begin_s, *(max(entry.seen_at_s, entry.stopped_at_s) for entry in driver))
            if self._spans:
                self.stops.append((begun_s, max(0.0, begin_s - self._spans[-1][1])))
            self._spans.append((begin_s, end_s, begun_s))
            begun_s += end_s - begin_s
        self.total_s = begun_s

    def __call__(self, entry: Entry, at_s: float) -> float:
        """The seconds until then, which is a time in an attempt's life."""
        begin_s, end_s, before_s = next(span for span in self._spans if span[0] == entry.driver_began_at_s)
        return before_s + min(max(at_s, begin_s), end_s) - begin_s


@dataclass(frozen=True)
class Block:
    """A stretch of time in which so many workers did one thing."""

    begin_s: float
    end_s: float
    num_workers: int
    state: str


def blocks(entries: Sequence[Entry], attempts: Sequence[AttemptSummary], clock: Clock) -> Iterator[Block]:
    """What the workers did, oldest first; nobody waits or prepares, so no worker is there."""
    free_s, driver = 0.0, math.nan
    for entry, attempt in zip(entries, attempts, strict=True):
        begin_s, end_s = clock(entry, entry.began_at_s), clock(entry, entry.stopped_at_s)
        is_first = entry.driver_began_at_s != driver
        driver = entry.driver_began_at_s
        yield Block(free_s, begin_s, 0, "preparing" if is_first else "waiting")
        first_s = clock(entry, step_time_s(entry, entry.start_step))
        last_s = clock(entry, step_time_s(entry, entry.last_step))
        num_steps = attempt.useful_steps + attempt.redone_steps
        useful_s = first_s + (last_s - first_s) * (attempt.useful_steps / num_steps if num_steps else 0)
        marks = (begin_s, first_s, useful_s, last_s, end_s)
        for (a, b), state in zip(itertools.pairwise(marks), ("starting", "useful", "redone", "other"), strict=True):
            yield Block(a, b, entry.world_size, state)
        free_s = end_s


def timeline(chronicle: Chronicle) -> Chart:
    """How many workers there were, what they did, and what happened."""
    summary = chronicle.summary
    assert summary
    title = "Workers over time"
    sizes = sorted({entry.world_size for entry in chronicle.entries})
    text = f"{summary.restarts} restarts and resizes in {duration(summary.wall_s)}, {sizes[0]} to {sizes[-1]} workers."
    return Chart("timeline", title, text, _timeline(chronicle, *WIDE), _timeline(chronicle, *NARROW))


def _timeline(chronicle: Chronicle, width: int, height: int) -> Figure:
    summary, clock = chronicle.summary, Clock(chronicle.entries)
    assert summary
    figure = new_figure(width, height, "Workers over time")
    drawn = [block for block in blocks(chronicle.entries, summary.attempts, clock) if block.end_s > block.begin_s]
    ends = [(clock(entry, entry.stopped_at_s), end_of(entry)) for entry in chronicle.entries]
    states, kinds = {block.state for block in drawn}, {kind for _, kind in ends}
    keys = [(name, state, "s") for state, name in state_names(chronicle).items() if state in states]
    keys += [(kind, *mark) for kind, mark in MARKERS.items() if kind in kinds]
    num_rows = _timeline_keys(figure, width, keys)
    left, top = 84, 36 + 19 * num_rows
    rail = place(figure, left, top, width - left - 12, 54)
    axes = place(figure, left, top + 54, width - left - 12, height - top - 54 - 26)
    top_workers = max(entry.world_size for entry in chronicle.entries)
    for block in drawn:  # without workers a low bar says why
        height_workers, width_s = block.num_workers or 0.04 * top_workers, block.end_s - block.begin_s
        axes.bar(block.begin_s, height_workers, width_s, align="edge", color=LIGHT[block.state], linewidth=0)
    _draw_attempt_numbers(axes, chronicle.entries, clock, width)
    _draw_rail(rail, chronicle, clock, ends)
    for where_s, stopped_s in clock.stops:
        axes.axvline(where_s, color=LIGHT["ink"], linewidth=1, dashes=(2, 2))
        axes.annotate(f" {duration(stopped_s)} without driver", (where_s, 1), xycoords=("data", "axes fraction"),
                      fontsize=SMALL - 1, color=LIGHT["muted"], va="top")  # fmt: skip
    for part in (rail, axes):
        part.set_xlim(0, max(1.0, clock.total_s))
    axes.set_ylim(0, top_workers * 1.22)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_ylabel("workers", labelpad=8)
    axes.xaxis.set_major_locator(MultipleLocator(_tick_s(clock.total_s, max(4, width // 110))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: duration(seconds).replace("m00s", "m")))
    return figure


def _tick_s(total_s: float, num_ticks: int) -> float:
    """Seconds between two ticks, round for a clock."""
    return next(
        (every_s for every_s in TICKS_S if total_s < every_s * num_ticks),
        TICKS_S[-1] * 2 ** math.ceil(math.log2(max(1.0, total_s / TICKS_S[-1] / num_ticks))),
    )


def _timeline_keys(figure: Figure, width: int, keys: Sequence[tuple[str, str, str]]) -> int:
    """Name, colour and marker of what is drawn; in how many rows they are."""
    a_row = width // TIMELINE_KEY
    for number, (name, colour, marker) in enumerate(keys):
        key(figure, number % a_row * TIMELINE_KEY, 27 + 19 * (number // a_row), name, colour, marker)
    return -(-len(keys) // a_row)


def _draw_attempt_numbers(axes: Axes, entries: Sequence[Entry], clock: Clock, width: int) -> None:
    """Above each that is wide enough for it."""
    for entry in entries:
        begin_s, end_s = clock(entry, entry.began_at_s), clock(entry, entry.stopped_at_s)
        if (end_s - begin_s) / max(1.0, clock.total_s) * width >= 18:
            axes.annotate(f"{entry.attempt}", ((begin_s + end_s) / 2, entry.world_size), xytext=(0, 3), ha="center",
                          textcoords="offset points", fontsize=SMALL, color=LIGHT["muted"])  # fmt: skip


def _draw_rail(rail: Axes, chronicle: Chronicle, clock: Clock, ends: Sequence[tuple[float, str | None]]) -> None:
    """Three rows of marks: how attempts ended, evaluations, checkpoints."""
    entries = chronicle.entries
    by_number = {entry.attempt: entry for entry in entries}
    for at_s, kind in ends:
        if kind is not None:
            colour, marker = MARKERS[kind]
            rail.plot(at_s, 2, marker, color=LIGHT[colour], markersize=7, markeredgewidth=0, clip_on=False)
    evaluated = [
        clock(entry, step_time_s(entry, row["step"]))
        for row in chronicle.held_out.kept
        if (entry := next((e for e in reversed(entries) if e.start_step < row["step"]), None))
    ]
    saved = [
        clock(by_number[attempt], step_time_s(by_number[attempt], step))
        for step, attempt in chronicle.saved
        if attempt in by_number
    ]
    rail.plot(evaluated, [1] * len(evaluated), "o", color=LIGHT["held-out"], markersize=5, markeredgewidth=0)
    rail.plot(saved, [0] * len(saved), "|", color=LIGHT["muted"], markersize=8, markeredgewidth=1.2)
    rail.set(ylim=(-0.6, 2.6), yticks=(0, 1, 2), yticklabels=("checkpoints", "evaluations", "restarts"), xticks=())


# --- Where the seconds went -------------------------------------------------------------------------------------------


def seconds(chronicle: Chronicle) -> Chart:
    """Seconds by state, as bars from the left."""
    summary = chronicle.summary
    assert summary
    spent, names = asdict(summary.seconds), state_names(chronicle)
    figure = new_figure(*PANEL, f"Goodput {summary.goodput:.1%}")
    write(figure, 0, 27, f"of {duration(summary.wall_s)} with a driver", "muted")
    axes = place(figure, 116, 52, PANEL[0] - 116 - 96, PANEL[1] - 52 - 8)
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    rows = range(len(STATES))
    axes.barh(rows, [spent[state] for state in STATES], color=[LIGHT[state] for state in STATES], height=0.62)
    axes.set(yticks=list(rows), yticklabels=list(names.values()), xticks=(), xlim=(0, max([1e-9, *spent.values()])))
    axes.invert_yaxis()
    for row, state in enumerate(STATES):
        share = spent[state] / summary.wall_s if summary.wall_s else 0.0
        axes.annotate(f"{duration(spent[state])}  {share:.1%}", (spent[state], row), xytext=(6, 0),
                      textcoords="offset points", va="center", fontsize=SMALL, color=LIGHT["ink"])  # fmt: skip
    told = ", ".join(f"{name} {duration(spent[state])}" for state, name in names.items())
    return Chart("goodput", "Goodput", f"Seconds by what they were spent on: {told}.", figure)
