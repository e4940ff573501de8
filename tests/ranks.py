"""Real gloo process groups of several ranks on this machine, started once for a table of tasks."""

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from raybert.world import World


def run_ranks(tasks: list[tuple[int, Callable[..., object], tuple[object, ...]]]) -> list[object]:
    """Run each (world size, task, arguments) as task(world, *arguments) on every rank; rank 0's results in order.

    The processes are shared: as many as the largest world. Each task has a process group of its own.
    """
    with tempfile.TemporaryDirectory() as directory:
        num_processes = max(size for size, _, _ in tasks)
        mp.spawn(_run, (tasks, directory), num_processes)
        return [torch.load(Path(directory) / f"{number}.pt", weights_only=False) for number in range(len(tasks))]


def _run(rank: int, tasks: list[tuple[int, Callable[..., object], tuple[object, ...]]], directory: str) -> None:
    torch.set_num_threads(1)
    for number, (size, task, arguments) in enumerate(tasks):
        if rank < size:
            store = f"file://{directory}/store-{number}"
            dist.init_process_group("gloo", store, timedelta(seconds=120), world_size=size, rank=rank)
            result = task(World.current(torch.device("cpu")), *arguments)
            dist.destroy_process_group()
            if rank == 0:
                torch.save(result, Path(directory) / f"{number}.pt")
