"""Telemetry of a run: metrics.jsonl, TensorBoard and the training summary, by Model Garden's names.

Files grow in a local directory; on a remote run directory they are uploaded with every checkpoint, since object stores
cannot append. What was logged after the step that an attempt begins at is dropped: it is not history.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from raybert.storage import Directory

METRICS, SUMMARIES, SUMMARY = "metrics.jsonl", "summaries", "training_summary.txt"
TRAIN, EVAL = "train", "eval"


class Telemetry:
    """Writes the metrics of one attempt; rank 0 has one."""

    def __init__(self, run: Directory, start_step: int, scratch: Path) -> None:
        """Args:
        run: the run directory.
        start_step: step the attempt begins at.
        scratch: a local directory for files on their way to a remote run directory.
        """
        self._run = run
        self._path = Path(run.path) if run.is_local else scratch / "telemetry"
        lines = _lines_until(run, start_step)
        self._path.mkdir(parents=True, exist_ok=True)
        Directory(str(self._path)).write(METRICS, "".join(lines).encode())
        self._metrics = (self._path / METRICS).open("a")
        self._boards = {
            kind: SummaryWriter(str(self._path / SUMMARIES / kind), purge_step=start_step + 1) for kind in (TRAIN, EVAL)
        }

    def log(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Append metrics of kind "train" or "eval" after a step."""
        self._metrics.write(json.dumps({"kind": kind, "step": step, **metrics}) + "\n")
        self._metrics.flush()
        for name, value in metrics.items():
            self._boards[kind].add_scalar(name, value, step)

    def sync(self) -> None:
        """Bring the run directory up to date."""
        for board in self._boards.values():
            board.flush()
        if not self._run.is_local:
            for file in self._path.rglob("*"):
                if file.is_file():
                    self._run.upload(str(file.relative_to(self._path)), file)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the training summary and close."""
        (self._path / SUMMARIES / SUMMARY).write_text(json.dumps(summary, indent=4) + "\n")
        self.sync()
        self.close()

    def close(self) -> None:
        """Close all files."""
        self._metrics.close()
        for board in self._boards.values():
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


def read_metrics(run: Directory) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl, oldest first; empty if there is none."""
    if not run.exists(METRICS):
        return []
    return [json.loads(line) for line in run.read(METRICS).decode().splitlines() if line.endswith("}")]


def _lines_until(run: Directory, step: int) -> list[str]:
    return [json.dumps(row) + "\n" for row in read_metrics(run) if row["step"] <= step]
