"""The display: events of a run as one live line on a terminal, or as plain lines in a log."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.live import Live
from rich.text import Text

from raybert.events import Event, Tell

T = TypeVar("T")


class Display:
    """Shows events; a context manager, so that the live line is always given back."""

    def __init__(self, num_steps: int, console: Console | None = None, save_every_steps: int = 0) -> None:
        """Args:
        num_steps: of the run, for progress and time left.
        console: default: standard output.
        save_every_steps: between two checkpoints; 0 if that changes: then the median of those that were. Once two
            are missing, the age of the last is shown.
        """
        self._num_steps = num_steps
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._started: tuple[float, int] | None = None
        self._save_every_steps, self._committed = save_every_steps, (time.monotonic(), 0)
        self._gaps: deque[int] = deque(maxlen=5)  # steps between commits
        self._hand_on: Tell | None = None

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def hand_on(self, to: Tell) -> None:
        """Let somebody have every event after it is shown, from now on."""
        self._hand_on = to

    def show(self, event: Event) -> None:
        """Show an event now."""
        self._show(event)
        if self._hand_on is not None:
            self._hand_on(event)

    def _show(self, event: Event) -> None:
        if event.kind == "train":
            left_s, commit_s = self._left_s(event.step), self._commit_s(event.step)
            self._progress(progress_line(event.step, self._num_steps, event.metrics, left_s, commit_s))
        elif event.kind == "eval":
            self.line(evaluation_line(event.step, event.metrics))
        elif event.kind == "attempt":
            self._started = (time.monotonic(), event.step)
            committed = int(event.metrics.get("committed_step", event.step))
            if committed != self._committed[1]:
                self._committed = (time.monotonic(), committed)
            self.line(attempt_line(event))
        elif event.kind == "warning":
            self.line(f"warning: {event.text}", "yellow")
        elif event.kind == "failure":
            self._show(Event("warning", text=f"attempt failed, {event.text}; another one begins."))
        elif event.kind in ("resize", "note"):
            self.line(event.text)
        elif event.kind == "checkpoint":
            self._gaps.append(event.step - self._committed[1])
            self._committed = (time.monotonic(), event.step)
            self.line(f"checkpoint {event.text}", "dim")

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
            self.line(f"{text}: {total} file{'s' * (total != 1)}")
            yield from items
            return
        for number, item in enumerate(items, 1):
            self._progress(f"{text}: {number} of {total} files")
            yield item

    def line(self, text: str, style: str = "") -> None:
        """Print a line that stays."""
        self._console.print(Text(text, style), soft_wrap=True)

    def _progress(self, text: str) -> None:
        if self._live:
            self._live.update(Text(text, overflow="ellipsis", no_wrap=True), refresh=True)
        else:
            self.line(text)

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
        f"{metrics['world_size']:.0f} workers" if metrics["world_size"] != 1 else "1 worker",
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
    workers = int(event.metrics["world_size"])
    where = f"from step {event.step}" + (f" ({event.text})" if event.text else "")
    return f"attempt {int(event.metrics['number'])}: {workers} worker{'s' * (workers != 1)}, {where}"


def duration(seconds: float) -> str:
    """Seconds for a person: 42s, 3m05s, 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
