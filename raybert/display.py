"""The display: events of a run as a block that is kept up to date on a terminal, or as plain lines in a log."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from raybert.events import Event, Tell
from raybert.view import SPARK_WIDTH, View, block, counted, duration

T = TypeVar("T")
UP = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1))
REFRESHES_PER_S = 4  # of the block, whose times pass
LOGS_A_SPARK = 50  # that a character of the loss's line stands for at most


class Display:
    """Shows events; a context manager, so that the terminal is always given back."""

    def __init__(self, num_steps: int, console: Console | None = None, save_every_steps: int = 0) -> None:
        """Args:
        num_steps: of the run, for progress and time left.
        console: default: standard output.
        save_every_steps: between two checkpoints; 0 if that changes: then the median of those that were. Once two
            are missing, the age of the last is shown.
        """
        self._num_steps = num_steps
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._view: View | None = None  # before anything is known
        self._started: tuple[float, int] | None = None
        self._save_every_steps, self._committed = save_every_steps, (time.monotonic(), 0)
        self._gaps: deque[int] = deque(maxlen=5)  # steps between commits
        self._losses: deque[float] = deque(maxlen=SPARK_WIDTH * LOGS_A_SPARK)
        self._drawn: list[int] = []  # columns of the block's lines, as they were drawn last
        self._hand_on: Tell | None = None
        self._live = self._make_live()

    def _make_live(self) -> Live | None:
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            return None
        return Live(console=self._console, get_renderable=self._block, refresh_per_second=REFRESHES_PER_S)

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.freeze()

    def freeze(self) -> None:
        """Leave the block as it stands; what is shown from now on stands below it."""
        if self._live:
            self._live.stop()
            self._live = None

    def hand_on(self, to: Tell) -> None:
        """Let somebody have every event after it is shown, from now on."""
        self._hand_on = to

    def show(self, event: Event, goodput: float | None = None) -> None:
        """Show an event now.

        Args:
            event: that happened.
            goodput: of the run until now, as far as it is known.
        """
        self._keep(event)
        if self._live:
            self._look(event, goodput)
        self._show(event)
        if self._hand_on is not None:
            self._hand_on(event)

    def _show(self, event: Event) -> None:
        if event.kind == "train" and self._live is None:
            left_s, commit_s = self._left_s(event.step), self._commit_s(event.step)
            self.line(progress_line(event.step, self._num_steps, event.metrics, left_s, commit_s))
        elif event.kind == "eval":
            self.line(evaluation_line(event.step, event.metrics))
        elif event.kind == "attempt":
            self.line(attempt_line(event))
        elif event.kind == "warning":
            self.line(f"warning: {event.text}", "yellow")
        elif event.kind == "failure":
            self.line(f"warning: attempt failed, {event.text}; another one begins.", "yellow")
        elif event.kind in ("resize", "note"):
            self.line(event.text)
        elif event.kind == "checkpoint" and self._live is None:  # the block has the newest
            self.line(f"checkpoint {event.text}")

    def _keep(self, event: Event) -> None:
        """Where the attempt began, and what was committed when."""
        if event.kind == "attempt":
            self._started = (time.monotonic(), event.step)
            committed = int(event.metrics.get("committed_step", event.step))
            if committed != self._committed[1]:
                self._committed = (time.monotonic(), committed)
        elif event.kind == "checkpoint":
            self._gaps.append(event.step - self._committed[1])
            self._committed = (time.monotonic(), event.step)

    def _look(self, event: Event, goodput: float | None) -> None:
        """Bring the view up to date; it is replaced as a whole, since another thread draws it."""
        now_s, view = time.monotonic(), self._view or View(0, self._num_steps)
        if event.kind == "attempt":
            workers = int(event.metrics["world_size"])
            view = replace(view, step=event.step, end_at_s=None, status=f"starting {counted(workers, 'worker')}")
        elif event.kind == "train":
            left_s = self._left_s(event.step)
            self._losses.append(event.metrics["training_loss"])
            view = replace(
                view,
                step=event.step,
                status="",
                metrics=event.metrics,
                losses=tuple(self._losses),
                end_at_s=None if left_s is None else now_s + left_s,
                goodput=goodput,
            )
        elif event.kind == "eval":
            view = replace(view, held_out=event.metrics)
        elif event.kind == "checkpoint":
            view = replace(view, committed_step=event.step, committed_at_s=now_s)
        elif event.kind in ("failure", "resize"):
            view = replace(view, status="restarting" if event.kind == "failure" else "resizing", end_at_s=None)
        elif self._view is None:
            return  # a word before the run begins
        self._view = view

    def _block(self) -> Text:
        """What the live view asks for right before it draws it over what it has drawn before."""
        width, is_ascii = self._console.width, not self._console.encoding.lower().startswith("utf")
        lines = block(self._view, width, time.monotonic(), is_ascii) if self._view else []
        self._console.control(*[UP] * broken_lines(self._drawn, width))
        self._drawn = [line.cell_len for line in lines]
        return Text("\n").join(lines)

    def warn(self, text: str) -> None:
        """Show a warning."""
        self.show(Event("warning", text=text))

    def held_out(self, metrics: Mapping[str, float], baselines: Mapping[str, float]) -> None:
        """Show the last evaluation beside what guessing by frequency reaches."""
        self.line(
            f"Held-out masked LM loss {metrics['lm_example_loss']:.3f} "
            f"(guessing by token frequency: {baselines['unigram_mlm_loss']:.3f}), "
            f"accuracy {metrics['masked_lm_accuracy']:.3f}"
        )
        if "next_sentence_accuracy" in metrics:
            self.line(
                f"Held-out next sentence accuracy {metrics['next_sentence_accuracy']:.3f} "
                f"(always guessing the majority: {baselines['majority_next_sentence_accuracy']:.3f})"
            )

    def track(self, items: Iterable[T], text: str, total: int) -> Iterator[T]:
        """Give the items on, counting them in a progress bar on a terminal."""
        if self._live is None:
            self.line(f"{text}: {counted(total, 'file')}")
            yield from items
            return
        for number, item in enumerate(items, 1):
            self._view = View(number, total, status=text)
            yield item
        self._view = View(0, self._num_steps, status="starting")

    def line(self, text: str, style: str = "") -> None:
        """Print a line that stays."""
        self._console.print(Text(text, style), soft_wrap=True)

    def _left_s(self, step: int) -> float | None:
        """Seconds to the end at the speed of this attempt."""
        if self._started is None or step <= self._started[1]:
            return None
        started_at_s, first = self._started
        return (time.monotonic() - started_at_s) / (step - first) * (self._num_steps - step)

    def _commit_s(self, step: int) -> float | None:
        """Seconds since the last commit, if it is older than it should be."""
        committed_at_s, committed = self._committed
        due_steps = self._save_every_steps or (statistics.median(self._gaps) if self._gaps else math.inf)
        if step - committed < 2 * due_steps:
            return None
        return time.monotonic() - committed_at_s


def broken_lines(lengths: Sequence[int], width: int) -> int:
    """How many lines more there are, now that a terminal of so many columns has broken those that do not fit."""
    return sum(max(0, length - 1) // width for length in lengths)


def progress_line(
    step: int, num_steps: int, metrics: Mapping[str, float], left_s: float | None, commit_s: float | None = None
) -> str:
    """One line of training metrics."""
    parts = [
        f"step {step}/{num_steps}",
        f"loss {metrics['training_loss']:.3f}",
        f"mlm acc {metrics['masked_lm_accuracy']:.3f}",
        *([f"nsp acc {metrics['next_sentence_accuracy']:.3f}"] if "next_sentence_accuracy" in metrics else []),
        f"lr {metrics['learning_rate']:.2e}",
        f"{metrics['samples_per_s']:,.0f} samples/s",
        f"{metrics['tokens_per_s']:,.0f} tokens/s",
        *([f"mfu {metrics['mfu']:.1%}"] if "mfu" in metrics else []),
        f"wait {metrics['data_wait']:.1%}",
        counted(int(metrics["world_size"]), "worker"),
        *([f"{duration(left_s)} left"] if left_s is not None else []),
        *([f"last commit {duration(commit_s)} ago"] if commit_s is not None else []),
    ]
    return "  ".join(parts)


def evaluation_line(step: int, metrics: Mapping[str, float]) -> str:
    """One line of held-out metrics."""
    line = f"held-out at step {step}: mlm loss {metrics['lm_example_loss']:.3f}"
    line += f"  mlm acc {metrics['masked_lm_accuracy']:.3f}"
    if "next_sentence_accuracy" in metrics:
        line += f"  nsp loss {metrics['next_sentence_loss']:.3f}  nsp acc {metrics['next_sentence_accuracy']:.3f}"
    return line


def attempt_line(event: Event) -> str:
    """How an attempt begins."""
    where = f"from step {event.step}" + (f" ({event.text})" if event.text else "")
    return f"attempt {int(event.metrics['number'])}: {counted(int(event.metrics['world_size']), 'worker')}, {where}"
