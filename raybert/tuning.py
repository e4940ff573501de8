"""`tune-batch`: which bound of a forward and backward is the fastest, by trying some on real batches.

On a GPU the bound is tokens: what its memory has room for, and parts of that. On a CPU it is samples, which decide what
stays in its caches. The result of a run depends on it only in rounding and dropout.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError
from rich.console import Console
from rich.table import Table

from raybert import cluster, preflight
from raybert.capacity import fitted
from raybert.checks import check_config
from raybert.config import Config, TrainingConfig
from raybert.errors import UserError
from raybert.feed import RankBatch
from raybert.index import Index
from raybert.step import TrainState, create_state
from raybert.storage import Directory, find_files
from raybert.trial import batches_of, index_some, some_files, timed_steps
from raybert.world import CPU, World

NUM_BATCHES = 4
CANDIDATE_S, ALL_S = 5.0, 90.0
SMALLEST = 4  # samples
WORSE, GIVE_UP = 1.1, 2  # so many in a row that are so much slower than the fastest end the search


@dataclass(frozen=True)
class Candidate:
    """A bound that was tried.

    Args:
        micro_batch_size, micro_batch_tokens: as in the training section.
        step_s: seconds of a step, of this worker's slice of a global batch.
        tokens_per_s: real tokens, of this worker.
    """

    micro_batch_size: int
    micro_batch_tokens: int
    step_s: float
    tokens_per_s: float

    def flags(self) -> str:
        return (
            f"--training.micro_batch_size {self.micro_batch_size} --training.micro_batch_tokens "
            f"{self.micro_batch_tokens}"
        )


def main(config: Config, as_json: bool = False, verbose: bool = False) -> int:
    """Try bounds, and print the flags of the fastest.

    Raises:
        UserError: the configuration or a file is wrong, or not even one sample fits a GPU.
    """
    cluster.quiet(verbose)
    check_config(config)
    config = preflight.resolve(config)
    cluster.check_gpus(config.cluster)
    preflight.check_run_dir(Directory(config.run_dir), lambda _: None)  # the index is kept there
    files = some_files(find_files(config.data.input_files, "data.input_files"))
    index = index_some(config, files, "data.input_files")
    candidates = _tried(config, index, verbose)
    best = min(candidates, key=lambda candidate: candidate.step_s)
    if as_json:
        print(json.dumps({"best": asdict(best), "candidates": [asdict(each) for each in candidates]}, indent=1))
        return 0
    table = Table("micro_batch_size", "micro_batch_tokens", "s a step", "tokens/s")
    for each in candidates:
        bounds = (str(each.micro_batch_size), str(each.micro_batch_tokens))
        table.add_row(*bounds, f"{each.step_s:.3f}", f"{each.tokens_per_s:,.0f}", style="bold" if each is best else "")
    Console(highlight=False).print(table)
    print(f"use: {best.flags()}")
    return 0


def _tried(config: Config, index: Index, verbose: bool) -> list[Candidate]:
    """On a cluster, where a worker would be; else in this process."""
    if config.cluster.worker_range()[1] == 0 or cluster.is_local():
        return try_candidates(config, index)
    with cluster.connected(config.cluster, verbose):
        cluster.check_capacity(config.cluster)
        needs: Any = {"num_cpus": config.cluster.cpus_per_worker, "num_gpus": int(config.cluster.use_gpu)}
        try:
            found: list[Candidate] = ray.get(ray.remote(**needs)(try_candidates).remote(config, index.for_reading()))
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from error
        return found


def try_candidates(config: Config, index: Index) -> list[Candidate]:
    """The candidates that could be timed, in the order they were tried; by one worker, on its slices of global batches.

    Raises:
        UserError: not even one sample fits a GPU.
    """
    torch.set_num_threads(config.cluster.cpus_per_worker)
    world = World(device=torch.device("cuda", 0) if config.cluster.use_gpu else CPU)
    as_first = World(size=max(1, config.cluster.worker_range()[1]))
    batches = batches_of(config, index, as_first, NUM_BATCHES)
    state = create_state(config.model, config.training, config.optimizer, world)
    found: list[Candidate] = []
    until_s = time.perf_counter() + ALL_S
    for training in _bounds(config, state, len(batches[0].samples), world):
        if found and (gets_worse(found) or time.perf_counter() > until_s):
            break
        candidate = _timed(replace(config, training=training), state, batches, world)
        found += [candidate] if candidate else []
    return found


def _bounds(config: Config, state: TrainState, slice_size: int, world: World) -> Iterator[TrainingConfig]:
    """What to try: the likeliest first on a GPU, the smallest first on a CPU."""
    training = config.training
    if world.device.type == "cuda":
        most = fitted(state, config.data, replace(training, micro_batch_tokens="auto"), world)
        assert isinstance(most.micro_batch_tokens, int)
        for part in (1, 2, 4, 8):
            yield replace(most, micro_batch_tokens=max(config.data.max_seq_length, most.micro_batch_tokens // part))
        return
    size = min(SMALLEST, slice_size)
    while size < slice_size:
        yield replace(training, micro_batch_size=size, micro_batch_tokens=0)
        size *= 2
    yield replace(training, micro_batch_size=slice_size, micro_batch_tokens=0)


def gets_worse(found: Sequence[Candidate]) -> bool:
    best_s = min(candidate.step_s for candidate in found)
    last = found[-GIVE_UP:]
    return len(found) > GIVE_UP and all(candidate.step_s > WORSE * best_s for candidate in last)


def _timed(config: Config, state: TrainState, batches: Sequence[RankBatch], world: World) -> Candidate | None:
    """A candidate's time; None where it does not fit the memory."""
    try:
        steps_s = list(timed_steps(config, state, batches, world, CANDIDATE_S))
    except torch.OutOfMemoryError:
        state.optimizer.zero_grad(set_to_none=True)
        return None
    tokens = sum(int(batch.features["input_mask"].sum()) for batch in batches) / len(batches)
    step_s, training = statistics.median(steps_s), config.training
    assert isinstance(training.micro_batch_tokens, int)
    return Candidate(training.micro_batch_size, training.micro_batch_tokens, step_s, tokens / step_s)
