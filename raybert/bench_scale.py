"""Benchmark of what grows with the ranks: the feed with stub ranks, history, index, checkpoint, start-up, all-reduce.

A stub rank takes its blocks and checks what arrived, and trains on nothing; all of them are threads of one process,
so that one machine can have 64. cluster/SCALING.md reads the figures.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import DataIterator
from ray.experimental import get_local_object_locations
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import RunConfig, ScalingConfig

from raybert import bench_checkpoint, cluster, ingest
from raybert.bench_data import build_index
from raybert.config import Config
from raybert.feed import MIN_BLOCK_ROWS, Layout, RankBatch, rank_batches
from raybert.figure import Figure, measured, timed
from raybert.history import CHECKSUM_LIMIT, checksum, to_lines
from raybert.index import Index, index_shard
from raybert.loop import Trail
from raybert.loss import Sums
from raybert.model import BertForPreTraining
from raybert.order import SampleOrder
from raybert.preflight import sample_order, schema
from raybert.step import StepResult
from raybert.storage import Directory, find_files, open_input
from raybert.world import CPU, World

PART = "scale"
RANK_SAMPLES = 32  # of a rank slice
CHECKPOINT_STEPS = 1000  # between two
ORDER_SAMPLES = (10**6, 10**8, 10**9)


def measure(
    config: Config,
    ranks: Sequence[int],
    num_processes: Sequence[int],
    num_shards: Sequence[int],
    num_rounds: int,
    num_windows: int,
) -> list[Figure]:
    """Every part.

    Args:
        config: of the model, the files and, up to 32 samples a rank, the global batch.
        ranks: numbers of stub ranks.
        num_processes: numbers of ranks that are processes of their own, each with torch.
        num_shards: numbers of files that are indexed.
        num_rounds: of every measurement, but for start-up and building, which are slow.
        num_windows: of a round of the feed, of which the middle half is measured; few of it may have been read ahead.
    """
    figures = [*_history(ranks, num_rounds), *bench_checkpoint.measure(config, num_rounds)]
    with cluster.connected(replace(config.cluster, num_workers=0), verbose=False):
        cluster.quiet(verbose=False)
        ingest.quiet_data()
        figures += _feed(config, ranks, num_rounds, num_windows)
        figures += _index(config, num_shards, num_rounds)
        figures += _order(config, num_rounds)
        for size in num_processes:
            figures += _processes(config, size, num_rounds)
    return figures


# --- The feed -------------------------------------------------------------------------------------------------------


def _feed(config: Config, ranks: Sequence[int], num_rounds: int, num_windows: int) -> list[Figure]:
    """Under the configured window, and under one that gives every rank blocks of MIN_BLOCK_ROWS."""
    with tempfile.TemporaryDirectory(prefix="raybert-") as cache:
        index = build_index(config, Path(cache))
        reference = ray.put(index)
        layouts = [
            _layout(config, index, size, window, num_windows)
            for size in ranks
            for window in sorted({config.data.window_size, max(config.data.window_size, MIN_BLOCK_ROWS * size)})
        ]
        rounds = [[_feed_run(layout, reference) for layout in layouts] for _ in range(num_rounds)]
    figures = []
    for layout, runs in zip(layouts, zip(*rounds, strict=True), strict=True):
        name = f"feed, {layout.world_size} ranks, blocks of {layout.block_rows}"
        settings = {
            "ranks": f"{layout.world_size} threads of one process",
            "cpus of the feed": cluster.LOCAL_FEED_CPUS,
            "batch": layout.order.global_batch_size,
            "window": layout.order.window_steps * layout.order.global_batch_size,
            "samples": layout.num_steps * layout.order.global_batch_size,
            "epochs": layout.num_steps * layout.order.global_batch_size / layout.order.num_samples,
        }
        rates, costs = zip(*runs, strict=True)
        figures += [
            measured(PART, name, "samples/s", rates, settings),
            measured(PART, name, "blocks a second", [rate / layout.block_rows for rate in rates], settings),
            measured(PART, name, "ms of coordinator CPU a block", [1e3 * cost for cost in costs], settings),
            measured(PART, name, "samples/s at most", [layout.block_rows / cost for cost in costs], settings),
        ]
    return figures


def _layout(config: Config, index: Index, world_size: int, window_size: int, num_windows: int) -> Layout:
    batch_size = max(config.training.global_batch_size, RANK_SAMPLES * world_size)
    training = replace(config.training, global_batch_size=batch_size)
    order = sample_order(replace(config, training=training, data=replace(config.data, window_size=window_size)), index)
    return Layout(order, world_size, 0, num_windows * order.window_steps)


def _feed_run(layout: Layout, index: ray.ObjectRef[Index]) -> tuple[float, float]:
    iterators = ingest.split(layout, index)
    remote = ray.remote(num_cpus=0)(_take)
    result: tuple[float, float] = ray.get(remote.remote(iterators, layout))
    return result


def _take(iterators: Sequence[DataIterator], layout: Layout) -> tuple[float, float]:
    """All ranks take and check; samples/s, and the coordinator's CPU seconds a block, of the blocks in the middle.

    As many blocks are on their way when the middle begins as when it ends.
    """
    num_blocks = layout.world_size * layout.num_steps // layout.block_steps
    meter = _Meter(iterators[0]._coord_actor, (num_blocks // 4, 3 * num_blocks // 4))  # type: ignore[attr-defined]

    def consume(rank: int) -> None:
        own = replace(layout, order=replace(layout.order))  # an order keeps the newest window: not for two threads
        for _ in rank_batches(meter.counted(ingest.blocks(iterators[rank])), own, rank):
            pass

    with ThreadPoolExecutor(layout.world_size) as pool:
        list(pool.map(consume, range(layout.world_size)))
    (started_at_s, cpu_before_s), (ended_at_s, cpu_after_s) = meter.readings
    first, last = meter.marks
    rate = (last - first) * layout.block_rows / (ended_at_s - started_at_s)
    return rate, (cpu_after_s - cpu_before_s) / (last - first)


@dataclass
class _Meter:
    """Reads the clock, and the CPU time of the coordinator's process, at some numbers of blocks."""

    coordinator: Any
    marks: tuple[int, int]
    readings: list[tuple[float, float]] = field(default_factory=list)
    num_blocks: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def counted(self, blocks: Iterable[pa.Table]) -> Iterator[pa.Table]:
        for block in blocks:
            with self.lock:
                self.num_blocks += 1
                is_mark = self.num_blocks in self.marks
            if is_mark:
                cpu_s = ray.get(self.coordinator.__ray_call__.remote(lambda _: time.process_time()))
                self.readings.append((time.perf_counter(), cpu_s))
            yield block


# --- History and order ----------------------------------------------------------------------------------------------


class _Alike(World):
    """Ranks that all send what this one does: the work of the rank that gathers, without the others."""

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack([values] * self.size)


def _history(ranks: Sequence[int], num_rounds: int) -> list[Figure]:
    """What the records of a checkpoint's steps cost: the drain stops training, the lines are written behind it."""
    figures = []
    for size in ranks:
        drains_s, lines_s, num_bytes = [], [], []
        for _ in range(num_rounds):
            trail = Trail(_Alike(size=size), attempt=1)
            for step in range(CHECKPOINT_STEPS):
                trail.add(*_stub_step(step, size))
            started_at_s = time.perf_counter()
            records = trail.drain()
            drained_at_s = time.perf_counter()
            lines = to_lines(records, None)
            lines_s.append(time.perf_counter() - drained_at_s)
            drains_s.append(drained_at_s - started_at_s)
            num_bytes.append(len(lines) / CHECKPOINT_STEPS)
        name, settings = f"history, {size} ranks", {"steps of a checkpoint": CHECKPOINT_STEPS}
        figures += [
            measured(PART, name, "bytes a step", num_bytes, settings),
            measured(PART, name, "s of drain a checkpoint", drains_s, settings),
            measured(PART, name, "s of lines a checkpoint", lines_s, settings),
        ]
    return figures


def _stub_step(step: int, num_ranks: int) -> tuple[RankBatch, StepResult]:
    first = 10**8 + step * RANK_SAMPLES * num_ranks
    positions = np.arange(first, first + RANK_SAMPLES)
    whole = checksum(positions, positions) * num_ranks % CHECKSUM_LIMIT
    zero = torch.zeros(())
    return RankBatch(step, first, {}, positions, positions, 1.0, whole), StepResult(
        Sums.zero(CPU), zero, zero > 0, 0, 0
    )


def _order(config: Config, num_rounds: int) -> list[Figure]:
    """What every rank pays for each window, to know what should arrive; and once an epoch."""
    figures, index = [], ray.put(Index([], schema(config)))
    for num_samples in ORDER_SAMPLES:
        firsts_s, nexts_s = [], []
        for _ in range(num_rounds):
            order = SampleOrder(np.full(num_samples // 256, 256), 1, 256, 128)
            started_at_s = time.perf_counter()
            order.window(0)
            had_first_at_s = time.perf_counter()
            order.window(1)
            nexts_s.append(time.perf_counter() - had_first_at_s)
            firsts_s.append(had_first_at_s - started_at_s)
        tasks = ingest.WindowSource(Layout(order, 1, 0, 128), index).get_read_tasks()
        task = ray.put(tasks[0])
        size_bytes = get_local_object_locations([task])[task]["object_size"]
        name, settings = f"order, {num_samples:.0e} samples", {"window": 32768}
        figures += [
            measured(PART, name, "s for an epoch's first window", firsts_s, settings),
            measured(PART, name, "s for another window", nexts_s, settings),
            measured(PART, name, "bytes of a read task", [size_bytes], settings),
        ]
    return figures


# --- Index ----------------------------------------------------------------------------------------------------------


def _index(config: Config, num_shards: Sequence[int], num_rounds: int) -> list[Figure]:
    """Indices of many files, each the first of the configured ones under another name."""
    wanted, figures = schema(config), []
    remote: Any = ray.remote(index_shard)
    first = find_files(config.data.input_files, "data.input_files")[0].path
    with open_input(first) as source:
        content = source.read()
    for number in num_shards:
        with tempfile.TemporaryDirectory(prefix="raybert-") as scratch:
            for name in range(number):
                path = Path(scratch) / f"{name:06d}.tfrecord"
                path.write_bytes(content) if not name else os.link(Path(scratch) / "000000.tfrecord", path)
            cache, times_s = Directory(f"{scratch}/cache"), dict[str, list[float]]()
            files = find_files(f"{scratch}/*.tfrecord", "data.input_files")

            def build(files: Any = files, cache: Directory = cache) -> list[Any]:
                return ray.get([remote.remote(file, wanted, cache) for file in files])

            index = Index(timed(times_s, "s to build", build), wanted)
            for _ in range(num_rounds):
                timed(times_s, "s to load at a start", build)
                reference = ray.put(index.for_reading())
                fetched: Any = timed(times_s, "s of a read task to fetch", partial(ray.get, reference))
                timed(times_s, "s of its first read", partial(fetched.read, np.zeros(1, np.int64)))
                timed(times_s, "s of another read", partial(fetched.read, np.zeros(1, np.int64)))
            size_bytes = get_local_object_locations([reference])[reference]["object_size"]
        side, settings = f"index, {number} files", {"records of a file": index.num_samples // number, "source": first}
        figures += [measured(PART, side, unit, runs, settings) for unit, runs in times_s.items()]
        built = index.num_samples / times_s["s to build"][0]
        figures += [
            measured(PART, side, "records/s", [built], settings),
            measured(PART, side, "bytes in the object store", [size_bytes], settings),
        ]
    return figures


# --- Start-up and all-reduce ----------------------------------------------------------------------------------------


def _processes(config: Config, num_workers: int, num_rounds: int) -> list[Figure]:
    """Through Ray Train: until every rank runs, and a sum over ranks as large as the gradients, on this machine."""
    with torch.device("meta"):
        model = BertForPreTraining(config.model, config.training.use_next_sentence_label)
    size = sum(parameter.numel() for parameter in model.parameters())
    with tempfile.TemporaryDirectory(prefix="raybert-") as scratch:
        scaling: Any = ScalingConfig(num_workers=num_workers, resources_per_worker={"CPU": 1 / num_workers})
        started_at_s = time.time()
        worker = partial(_sum_gradients, size, num_rounds, Path(scratch) / "times.json")
        run: Any = RunConfig(name="ray", storage_path=scratch)
        TorchTrainer(worker, scaling_config=scaling, run_config=run).fit()
        running_at_s, sums_s = json.loads((Path(scratch) / "times.json").read_text())
    name, settings = f"{num_workers} worker processes", {"parameters": size, "backend": "gloo over loopback"}
    return [
        measured(PART, name, "s to start", [running_at_s - started_at_s], settings),
        measured(PART, name, "s of all-reduce", sums_s, settings),
    ]


def _sum_gradients(size: int, num_rounds: int, result: Path) -> None:
    torch.set_num_threads(1)
    world, gradients, sums_s = World.current(CPU), torch.ones(size), []
    world.sum(torch.ones(1))  # every rank is here
    running_at_s = time.time()
    for _ in range(num_rounds):
        started_at_s = time.perf_counter()
        world.sum(gradients)
        sums_s.append(time.perf_counter() - started_at_s)
    if world.is_first:
        result.write_text(json.dumps([running_at_s, sums_s]))
