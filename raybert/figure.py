"""Figures of a benchmark: what was measured, how often, and under which settings."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch

from raybert.allocator import malloc_settings
from raybert.config import Config

T = TypeVar("T")


@dataclass(frozen=True)
class Figure:
    """One measured quantity.

    Args:
        part: of the benchmark.
        name: who did it, or for a ratio, who against whom.
        unit: of value and runs.
        value: the median of the runs; of ratios the ratio of the medians.
        runs: each round's; sides that are compared took turns.
        settings: under which it was measured.
    """

    part: str
    name: str
    unit: str
    value: float
    runs: tuple[float, ...]
    settings: dict[str, Any]


def measured(part: str, name: str, unit: str, runs: Sequence[float], settings: dict[str, Any]) -> Figure:
    """The figure of several rounds."""
    return Figure(part, name, unit, median(runs), tuple(runs), settings)


def ratio(ours: Figure, theirs: Figure) -> Figure:
    """Ours divided by theirs; higher is better for us where the unit is something per second."""
    runs = tuple(our / their for our, their in zip(ours.runs, theirs.runs, strict=False))
    settings = {ours.name: ours.settings, theirs.name: theirs.settings}
    return Figure(ours.part, f"{ours.name} / {theirs.name}", "times", ours.value / theirs.value, runs, settings)


def timed(times_s: dict[str, list[float]], unit: str, work: Callable[[], T]) -> T:
    """What work gives; the seconds that it took are added to those of a unit."""
    started_at_s = time.perf_counter()
    result = work()
    times_s.setdefault(unit, []).append(time.perf_counter() - started_at_s)
    return result


def step_settings(config: Config, device: torch.device) -> dict[str, Any]:
    """Under which training steps run in this process."""
    model, training = config.model, config.training
    return {
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "torch_threads": torch.get_num_threads(),
        "malloc": malloc_settings() or "system default",
        "hidden": model.hidden_size,
        "layers": model.num_hidden_layers,
        "sequence_length": config.data.max_seq_length,
        "batch": training.global_batch_size,
        "micro_batch": training.micro_batch_size,
        "micro_batch_tokens": training.micro_batch_tokens,
        "precision": training.precision,
        "weights": "float32",
        "dropout": model.hidden_dropout_prob,
        "attention_dropout": model.attention_probs_dropout_prob,
        "float8": training.float8,
        "compile": training.compile,
        "activation_checkpointing": training.activation_checkpointing,
        "optimizer": f"{config.optimizer.type}, fused",
        "files": config.data.input_files,
    }


def machine() -> dict[str, Any]:
    """What was measured on, and how busy others keep it."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
