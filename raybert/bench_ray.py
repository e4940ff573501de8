"""Benchmarks that need Ray: the feed alone, and what Ray Train costs a run."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.data import DataIterator

from raybert import cluster, ingest
from raybert.allocator import MALLOC
from raybert.bench_data import build_index
from raybert.bench_step import environment, run_alone
from raybert.config import Config
from raybert.config_file import config_to_yaml
from raybert.feed import Layout, rank_batches
from raybert.figure import Figure, measured, ratio
from raybert.preflight import sample_order
from raybert.storage import Directory
from raybert.telemetry import TRAIN, read_metrics

# --- The feed alone -------------------------------------------------------------------------------------------------


def measure_feed(config: Config, num_rounds: int, num_samples: int) -> list[Figure]:
    """Samples a second that reach the ranks, which only check them; a round begins with its first batch."""
    num_steps = -(-num_samples // config.training.global_batch_size)
    with tempfile.TemporaryDirectory(prefix="raybert-") as cache:
        index = build_index(config, Path(cache))
        order = sample_order(config, index)
        layout = Layout(order, config.cluster.worker_range()[1], 0, num_steps)
        with cluster.connected(config.cluster, verbose=False):
            cluster.quiet(verbose=False)
            ingest.quiet_data()
            reference = ray.put(index)
            runs = [_feed_rate(ingest.split(layout, reference), layout) for _ in range(num_rounds)]
    settings = {
        "workers": layout.world_size,
        "threads": "one process a worker; the feed's tasks beside them",
        "malloc": MALLOC,
        "batch": order.global_batch_size,
        "sequence_length": config.data.max_seq_length,
        "window": order.window_steps * order.global_batch_size,
        "block_rows": layout.block_rows,
        "samples": num_steps * order.global_batch_size,
        "epochs": num_steps * order.global_batch_size / order.num_samples,
        "files": config.data.input_files,
        "checked": "both checksums and the ranges of every record, the samples and positions of every batch",
    }
    return [measured("feed", "raybert", "samples/s", runs, settings)]


def _feed_rate(iterators: Sequence[DataIterator], layout: Layout) -> float:
    remote = ray.remote(num_cpus=1)(consume)
    pending = [remote.remote(iterator, layout, rank) for rank, iterator in enumerate(iterators)]
    spans: list[tuple[float, float]] = ray.get(pending)
    started_at_s, ended_at_s = min(start for start, _ in spans), max(end for _, end in spans)
    return (layout.num_steps - 1) * layout.order.global_batch_size / (ended_at_s - started_at_s)


def consume(iterator: DataIterator, layout: Layout, rank: int) -> tuple[float, float]:
    """Take a rank's batches; when the first and the last were there, by the wall clock."""
    batches = rank_batches(ingest.blocks(iterator), layout, rank)
    next(batches)
    started_at_s = time.time()
    for _ in batches:
        pass
    return started_at_s, time.time()


# --- What Ray Train costs -------------------------------------------------------------------------------------------


def measure_ray(config: Config, num_rounds: int, num_skipped: int) -> list[Figure]:
    """Runs through Ray Train at one worker, in turns with the bare loop over the same steps.

    Both leave out the first `num_skipped` steps, and what follows the last one.
    """
    bare: list[Figure] = []
    runs: list[tuple[float, float]] = []
    for _ in range(num_rounds):
        bare += run_alone(config, "raybert", "--steady-after", str(num_skipped))
        runs.append(_train(config, num_skipped))
    loop = measured("ray", "bare loop", "samples/s", [figure.value for figure in bare], bare[0].settings)
    settings: dict[str, Any] = loop.settings | {"workers": 1, "steps": config.training.num_steps}
    train = measured("ray", "Ray Train, 1 worker", "samples/s", [rate for rate, _ in runs], settings)
    wait = measured("ray", "data wait", "of step time", [wait for _, wait in runs], settings)
    return [train, loop, ratio(train, loop), wait]


def _train(config: Config, num_skipped: int) -> tuple[float, float]:
    """Samples/s and share of data wait of a run on an own local Ray."""
    with tempfile.TemporaryDirectory(prefix="raybert-") as scratch:
        settings, log = Path(scratch) / "config.yaml", Path(scratch) / "log"
        settings.write_text(config_to_yaml(replace(config, run_dir=f"{scratch}/run")))
        command = [sys.executable, "-m", "raybert", "train", "--config", str(settings)]
        with log.open("w") as output:
            code = subprocess.run(
                command, stdout=output, stderr=output, env=environment(config, "system"), cwd=scratch
            ).returncode
        if code:
            raise RuntimeError(f"the run ended with exit code {code}:\n{log.read_text()}")
        rows = [row for row in read_metrics(Directory(f"{scratch}/run")) if row["kind"] == TRAIN]
    return steady(rows, num_skipped)


def steady(rows: Sequence[dict[str, Any]], num_skipped: int) -> tuple[float, float]:
    """Samples/s and share of data wait over the lines of metrics.jsonl that follow the first steps."""
    lines = [
        (row["step"] - before["step"], row["samples_per_s"], row["data_wait"])
        for before, row in zip([{"step": 0}, *rows], rows, strict=False)
        if before["step"] >= num_skipped
    ]
    num_steps = sum(steps for steps, _, _ in lines)
    relative_time = sum(steps / rate for steps, rate, _ in lines)
    return num_steps / relative_time, sum(wait * steps / rate for steps, rate, wait in lines) / relative_time


def has_gpu() -> bool:
    """Whether a worker here trains on a GPU."""
    return torch.cuda.is_available()
