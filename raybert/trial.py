"""Trials: a few steps of the real model on real batches, timed, by a worker as a run has it."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

from raybert.capacity import fitted
from raybert.config import Config
from raybert.feed import Layout, RankBatch, local_batches
from raybert.finding import Trial
from raybert.index import INDEX, MAX_BAD_SHOWN, Index, check_shards, index_shard
from raybert.plan import plan
from raybert.preflight import sample_order, schema
from raybert.step import TrainState, create_state, settle_buckets, train_step
from raybert.storage import Directory, File
from raybert.world import World

SAMPLE_BYTES, SAMPLE_FILES = 256 << 20, 16  # of data, that is read for a trial
WARM_UP_STEPS, MAX_STEPS, STEPS_S = 2, 20, 15.0
AVERAGED_BYTES, AVERAGINGS = 64 << 20, 5


def some_files(files: Sequence[File]) -> list[File]:
    """The smallest files, and of them no more than a trial reads; at least one."""
    ordered = sorted(files, key=lambda file: (file.size_bytes, file.path))[:SAMPLE_FILES]
    ends = np.cumsum([file.size_bytes for file in ordered])
    return ordered[: max(1, int((ends <= SAMPLE_BYTES).sum()))]


def index_some(config: Config, files: Sequence[File], option: str) -> Index:
    """The index of some files of a setting, as the run will use it.

    Raises:
        UserError: a file is damaged, or does not fit the configuration.
    """
    cache = Directory(config.run_dir) / INDEX
    max_bad = MAX_BAD_SHOWN if config.data.on_bad_record == "error" else None
    shards = [index_shard(file, schema(config), cache, max_bad) for file in sorted(files, key=lambda file: file.path)]
    check_shards(shards, option, config.data.on_bad_record)
    return Index(shards, schema(config))


def batches_of(config: Config, index: Index, world: World, number: int) -> list[RankBatch]:
    """The first batches of a rank."""
    layout = Layout(sample_order(config, index), world.size, 0, number)
    return list(islice(local_batches(layout, index, world.rank), number))


def run_trial(config: Config, index: Index, world: World) -> Trial:
    """Time some steps; all ranks call it.

    Raises:
        UserError: not even one sample fits a GPU.
    """
    torch.set_num_threads(config.cluster.cpus_per_worker)
    state = create_state(config.model, config.training, config.optimizer, world)
    settle_buckets(state, config.data.max_seq_length, config.training, world)
    config = replace(config, training=fitted(state, config.data, config.training, world))
    batches = batches_of(config, index, world, 8)
    averaging_s = _averaging_s(world)
    free = [_free_bytes(world)]
    steps_s = []
    for step_s in timed_steps(config, state, batches, world, STEPS_S):
        steps_s.append(step_s)
        free.append(_free_bytes(world))
    tokens = float(np.mean([batch.features["input_mask"].sum() for batch in batches]))
    mine = torch.tensor([tokens, _used_bytes(world), min(free)], dtype=torch.float64, device=world.device)
    ranks = world.gather(mine).tolist()
    return Trial(
        world_size=world.size,
        steps_s=tuple(steps_s),
        tokens=sum(row[0] for row in ranks),
        parameters=sum(parameter.numel() for parameter in state.model.parameters()),
        device=torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU",
        averaging_bytes=AVERAGED_BYTES,
        averaging_s=averaging_s,
        worker_bytes=int(max(row[1] for row in ranks)),
        free_bytes=int(min(row[2] for row in ranks)),
        total_bytes=_total_bytes(world),
    )


def timed_steps(
    config: Config, state: TrainState, batches: Sequence[RankBatch], world: World, limit_s: float
) -> Iterator[float]:
    """Seconds of steps after warming up, until a time is over; at least one, and as many on all ranks."""
    num_steps, started_at_s = WARM_UP_STEPS + MAX_STEPS, time.perf_counter()
    for number, batch in enumerate(islice(cycle(batches), num_steps)):
        began_at_s = time.perf_counter()
        planned = plan(batch, config.model, config.training, world.device)
        train_step(state, planned, config.training, config.optimizer, world)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        is_over = number >= WARM_UP_STEPS and world.any(time.perf_counter() - started_at_s > limit_s)()
        if number >= WARM_UP_STEPS:
            yield time.perf_counter() - began_at_s
        if is_over:
            return


def _averaging_s(world: World) -> float:
    """Seconds of an all-reduce, the best of some."""
    if world.size == 1:
        return 0.0
    values, times_s = torch.zeros(AVERAGED_BYTES // 4, device=world.device), []
    for _ in range(AVERAGINGS):
        world.any(False)()  # begin together
        began_at_s = time.perf_counter()
        float(world.sum(values)[0])  # waits for the device
        times_s.append(time.perf_counter() - began_at_s)
    return min(times_s)


def _used_bytes(world: World) -> int:
    if world.device.type == "cuda":
        return torch.cuda.max_memory_reserved(world.device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _free_bytes(world: World) -> int:
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info(world.device)[0]
    return _meminfo("MemAvailable")


def _total_bytes(world: World) -> int:
    return torch.cuda.mem_get_info(world.device)[1] if world.device.type == "cuda" else _meminfo("MemTotal")


def _meminfo(name: str) -> int:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])
