"""Benchmark of checkpoints: what saving stops training for, beside copying as many bytes, and what follows behind."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from raybert.bench_data import batches_in_memory
from raybert.bench_step import synchronize, usual_world
from raybert.checkpoint import HostCopy, Writer, host_copy, restore, room_for
from raybert.config import Config
from raybert.figure import Figure, measured, ratio, timed
from raybert.history import begin_attempt
from raybert.manifest import CHECKPOINTS, newest_checkpoint, open_checkpoint
from raybert.plan import plan
from raybert.step import create_state, train_step
from raybert.storage import Directory

STALL, MEMCPY = "s that training stops", "s of memcpy"


def measure(config: Config, num_rounds: int) -> list[Figure]:
    """Every part of saving and restoring the configured model, on this machine's temporary directory."""
    training = replace(config.training, global_batch_size=1)
    world, times_s = usual_world(), dict[str, list[float]]()
    state = create_state(config.model, training, config.optimizer, world)
    (batch,) = batches_in_memory(replace(config, training=training), 1)
    train_step(state, plan(batch, config.model, training, world.device), training, config.optimizer, world)
    room = timed(times_s, "s to get the memory, behind the first steps", partial(room_for, state))
    copy = timed(times_s, "s that the first one stops it", partial(host_copy, state, room))
    with tempfile.TemporaryDirectory(prefix="raybert-") as scratch:
        run = Directory(scratch)
        begin_attempt(run, 1, 0, None)
        writer = Writer(run, 1, config.model, None, {}, keep=1)
        for number in range(1, num_rounds + 1):
            state.step = number
            synchronize(world.device)
            copy = timed(times_s, STALL, partial(host_copy, state, copy))
            timed(times_s, MEMCPY, _memcpy(copy))
            name = timed(times_s, "s of write, fsync and digest behind it", partial(writer.write, copy, None, []))
            writer.prune(name)
            timed(times_s, "s of verification", partial(newest_checkpoint, run, print))
            timed(times_s, "s of restore", partial(restore, open_checkpoint(run, name), state))
        size_bytes = sum(file.stat().st_size for file in (Path(scratch) / CHECKPOINTS / name).iterdir())
    side = f"checkpoint, {config.model.num_hidden_layers}x{config.model.hidden_size}"
    settings: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "device": world.device.type,
        "threads": torch.get_num_threads(),
        "directory": tempfile.gettempdir(),
    }
    figures = {unit: measured("checkpoint", side, unit, runs, settings) for unit, runs in times_s.items()}
    against = replace(ratio(figures[STALL], figures[MEMCPY]), name=f"{side}, against memcpy")
    return [*figures.values(), against, measured("checkpoint", side, "bytes", [size_bytes], settings)]


def _memcpy(copy: HostCopy) -> Callable[[], None]:
    """Copies as many bytes as a host copy has, in as large parts, between memory that was used before."""
    sources = [*copy.model.values(), *copy.optimizer.values()]
    targets = [source.clone() for source in sources]

    def work() -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    return work
