"""Telemetry of a run: metrics.jsonl, TensorBoard and the training summary, by Model Garden's names.

Files grow in a local directory; on a remote run directory they are uploaded with every checkpoint, since object stores
cannot append. What was logged after the step that an attempt begins at is dropped: it is not history. A full disk stops
nothing: metrics.jsonl is written later, TensorBoard has a gap.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from raybert.retry import outlast_blip
from raybert.storage import Directory

# The writer needs no TensorFlow, yet imports one that is installed, for seconds in every worker; this says not to.
sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
from torch.utils.tensorboard import SummaryWriter  # noqa: E402

METRICS, SUMMARIES, SUMMARY = "metrics.jsonl", "summaries", "training_summary.txt"
TRAIN, EVAL = "train", "eval"


class Telemetry:
    """Writes the metrics of one attempt; rank 0 has one."""

    def __init__(self, run: Directory, start_step: int, scratch: Path, warn: Callable[[str], None]) -> None:
        """Args:
        run: the run directory.
        start_step: step the attempt begins at.
        scratch: a local directory for files on their way to a remote run directory.
        warn: told if what was logged before cannot be read.
        """
        self._run = run
        self._path = Path(run.path) if run.is_local else scratch / "telemetry"
        lines = outlast_blip(lambda: _lines_until(run, start_step, warn))
        self._path.mkdir(parents=True, exist_ok=True)
        Directory(str(self._path)).write(METRICS, "".join(lines).encode())
        self._metrics, self._unwritten = (self._path / METRICS).open("ab", buffering=0), b""
        self._boards = {kind: self._board(kind, start_step + 1) for kind in (TRAIN, EVAL)}

    def log(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Append metrics of kind "train" or "eval" after a step."""
        self._unwritten += json.dumps({"kind": kind, "step": step, **metrics}).encode() + b"\n"
        with suppress(OSError):  # what is unwritten waits for the next line
            self._write_lines()
        try:
            board = self._boards[kind] = self._boards.get(kind) or self._board(kind, step)
            for name, value in metrics.items():
                board.add_scalar(name, value, step)
        except OSError:
            self._boards.pop(kind, None)  # it never writes again; the next has a file of its own

    def _board(self, kind: str, purge_step: int) -> SummaryWriter:
        return SummaryWriter(str(self._path / SUMMARIES / kind), purge_step=purge_step)

    def _write_lines(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._metrics.write(self._unwritten) :]

    def sync(self) -> None:
        """Bring the run directory up to date.

        Raises:
            OSError: the storage failed; the next call makes up for it.
        """
        for board in list(self._boards.values()):
            with suppress(OSError):
                board.flush()
        if not self._run.is_local:
            for file in self._path.rglob("*"):
                if file.is_file():
                    self._run.upload(str(file.relative_to(self._path)), file)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the training summary, bring the run directory up to date and close.

        Raises:
            OSError: the storage failed.
        """
        outlast_blip(self._write_lines)
        outlast_blip(lambda: self._write_summary(summary))
        outlast_blip(self.sync)
        self.close()

    def _write_summary(self, summary: Mapping[str, Any]) -> None:
        (self._path / SUMMARIES / SUMMARY).write_text(json.dumps(summary, indent=4) + "\n")

    def close(self) -> None:
        """Close all files."""
        self._metrics.close()
        for board in self._boards.values():
            with suppress(OSError):
                board.close()


def training_summary(
    num_steps: int, train: Mapping[str, float], evaluation: Mapping[str, float] | None
) -> dict[str, Any]:
    """Model Garden's training_summary.txt: totals, the last metrics, and each model metric by its own name."""
    summary: dict[str, Any] = {"total_training_steps": num_steps, "train_loss": train.get("training_loss")}
    names = ("masked_lm_accuracy", "lm_example_loss", "next_sentence_accuracy", "next_sentence_loss")
    summary |= {"last_train_metrics": train.get("training_loss")}
    summary |= {name: train[name] for name in names if name in train}
    return summary | ({"eval_metrics": dict(evaluation)} if evaluation else {})


def read_metrics(run: Directory, damaged: list[int] | None = None) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl, oldest first; empty if there is none.

    Args:
        run: the run directory.
        damaged: takes the numbers, from 1, of lines that cannot be read, which are left out; a last one may be cut off.
    """
    rows: list[dict[str, Any]] = []
    lines = run.read(METRICS).split(b"\n") if run.exists(METRICS) else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({"kind": row["kind"], "step": int(row["step"]), **row})
        except (ValueError, TypeError, KeyError):
            if damaged is not None and number < len(lines):  # a last one was cut off
                damaged.append(number)
    return rows


def _lines_until(run: Directory, step: int, warn: Callable[[str], None]) -> list[str]:
    damaged: list[int] = []
    rows = read_metrics(run, damaged)
    if damaged:
        warn(f"{METRICS}: {len(damaged)} lines cannot be read and are left out, the first is line {damaged[0]}.")
    return [json.dumps(row) + "\n" for row in rows if row["step"] <= step]
