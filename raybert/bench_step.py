"""Benchmark of the training step: a bare loop without Ray over batches in memory, beside transformers' model.

`python -m raybert.bench_step` is the loop as a process of its own, since allocator settings are taken at its start.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raybert.allocator import MALLOC
from raybert.bench_data import batches_in_memory
from raybert.capacity import fitted
from raybert.config import Config
from raybert.config_file import config_from_yaml, config_to_yaml
from raybert.feed import RankBatch
from raybert.figure import Figure, measured, ratio, step_settings
from raybert.optim import build_optimizer, learning_rate
from raybert.plan import plan
from raybert.pretrained import save_pretrained
from raybert.step import TrainState, autocast, create_state, train_step
from raybert.world import World

WARM_UP_STEPS = 3
Step = Callable[[RankBatch], object]


def measure(config: Config, num_rounds: int, round_s: float) -> list[Figure]:
    """Samples and tokens a second of our step, and of transformers' if it is installed, in turns."""
    torch.set_num_threads(config.cluster.cpus_per_worker)
    world = usual_world()
    batches = batches_in_memory(config, num_steps=1000)
    state = create_state(config.model, config.training, config.optimizer, world)
    steps: dict[str, Step] = {}
    if importlib.util.find_spec("transformers"):
        peer = Peer(config, state, world.device)
        prepared = {id(batch): peer.prepare(batch) for batch in batches}
        steps["transformers"] = lambda batch: peer.step(prepared[id(batch)])
        peer.step(prepared[id(batches[0])])  # so that all that it keeps is there before ours is fitted
    ours = replace(config, training=fitted(state, config.data, config.training, world))
    steps = {"raybert": lambda batch: _step(state, batch, ours, world)} | steps
    rates = _in_turns(steps, batches, world.device, num_rounds, round_s)
    settings = {
        "raybert": step_settings(ours, world.device),
        "transformers": step_settings(config, world.device)
        | {"float8": False, "attention": "sdpa", "inputs": "tensors made before"},
    }
    figures = [
        measured("step", name, unit, [rate[k] for rate in rates[name]], settings[name])
        for k, unit in enumerate(("samples/s", "tokens/s"))
        for name in steps
    ]
    return figures + ([ratio(figures[0], figures[1])] if len(steps) == 2 else [])


def usual_world() -> World:
    """A GPU if there is one."""
    return World(device=torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


def _step(state: TrainState, batch: RankBatch, config: Config, world: World) -> None:
    planned = plan(batch, config.model, config.training, world.device)
    train_step(state, planned, config.training, config.optimizer, world)


def _in_turns(
    steps: dict[str, Step], batches: Sequence[RankBatch], device: torch.device, num_rounds: int, round_s: float
) -> dict[str, list[tuple[float, float]]]:
    """Samples/s and tokens/s of each side in each round; all sides of a round see the same batches."""
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for step in steps.values():
        for batch in batches[:WARM_UP_STEPS]:
            step(batch)
    for _ in range(num_rounds):
        for name, step in steps.items():
            rates[name].append(_rates(step, itertools.cycle(batches), device, round_s))
    return rates


def _rates(step: Step, batches: Iterator[RankBatch], device: torch.device, round_s: float) -> tuple[float, float]:
    synchronize(device)
    started_at_s, num_samples, num_tokens, elapsed_s = time.perf_counter(), 0, 0, 0.0
    while elapsed_s < round_s:
        batch = next(batches)
        step(batch)
        num_samples += len(batch.samples)
        num_tokens += int(batch.features["input_mask"].sum())
        elapsed_s = time.perf_counter() - started_at_s
    synchronize(device)
    elapsed_s = time.perf_counter() - started_at_s
    return num_samples / elapsed_s, num_tokens / elapsed_s


def synchronize(device: torch.device) -> None:
    """Wait for all that the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Peer:
    """transformers' BertForPreTraining with our weights, batches, precision and optimizer."""

    def __init__(self, config: Config, state: TrainState, device: torch.device) -> None:
        transformers: Any = importlib.import_module("transformers")
        transformers.logging.disable_progress_bar()
        with tempfile.TemporaryDirectory(prefix="raybert-") as directory:
            save_pretrained(directory, state.model.state_dict(), config.model)
            self.model = transformers.BertForPreTraining.from_pretrained(directory, attn_implementation="sdpa")
        self.model.to(device).train()
        if config.training.compile:
            self.model.compile()
        self._config, self._world, self._num_steps = config, World(device=device), 0
        self._optimizer = build_optimizer(self.model, config.optimizer)
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.training.precision == "fp16")

    def prepare(self, batch: RankBatch) -> dict[str, torch.Tensor]:
        """A batch by transformers' names, in its dtypes, in host memory, pinned for a GPU."""
        features = batch.features
        labels = np.full(features["input_ids"].shape, -100, np.int64)
        rows, places = np.nonzero(features["masked_lm_weights"])
        labels[rows, features["masked_lm_positions"][rows, places]] = features["masked_lm_ids"][rows, places]
        arrays = {
            "input_ids": features["input_ids"],
            "attention_mask": features["input_mask"],
            "token_type_ids": features["segment_ids"],
            "labels": labels,
            "next_sentence_label": features["next_sentence_labels"].ravel(),
        }
        tensors = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
        is_pinned = self._world.device.type == "cuda"
        return {name: tensor.pin_memory() if is_pinned else tensor for name, tensor in tensors.items()}

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """One update, micro-batch by micro-batch."""
        training, optimizer, device = self._config.training, self._config.optimizer, self._world.device
        size = training.micro_batch_size
        num_samples = len(batch["input_ids"])
        for start in range(0, num_samples, size):
            part = {name: each[start : start + size].to(device, non_blocking=True) for name, each in batch.items()}
            with autocast(training, self._world):
                loss = self.model(**part).loss
            self._scaler.scale(loss * (len(part["input_ids"]) / num_samples)).backward()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._num_steps, optimizer, training.num_steps)
        self._scaler.unscale_(self._optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), optimizer.max_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self._num_steps += 1


# --- The loop as a process of its own -------------------------------------------------------------------------------


def steady_rate(config: Config, num_skipped: int) -> list[Figure]:
    """Samples a second over the configured steps but the first ones: what a run with Ray is compared with."""
    torch.set_num_threads(config.cluster.cpus_per_worker)
    world = usual_world()
    batches = batches_in_memory(config, config.training.num_steps)
    state = create_state(config.model, config.training, config.optimizer, world)
    config = replace(config, training=fitted(state, config.data, config.training, world))
    for number, batch in enumerate(itertools.islice(itertools.cycle(batches), config.training.num_steps)):
        if number == num_skipped:
            synchronize(world.device)
            started_at_s = time.perf_counter()
        _step(state, batch, config, world)
    synchronize(world.device)
    num_samples = (config.training.num_steps - num_skipped) * config.training.global_batch_size
    rate = num_samples / (time.perf_counter() - started_at_s)
    return [measured("ray", "bare loop", "samples/s", [rate], step_settings(config, world.device))]


def run_alone(config: Config, allocator: str, *arguments: str) -> list[Figure]:
    """The figures that `python -m raybert.bench_step` makes in a process of its own.

    Args:
        config: what to measure.
        allocator: "raybert": the settings that the workers of a run get; "system": none.
        arguments: of `main`.
    """
    with tempfile.TemporaryDirectory(prefix="raybert-") as scratch:
        settings, target = Path(scratch) / "config.yaml", Path(scratch) / "figures.json"
        settings.write_text(config_to_yaml(config))
        command = [sys.executable, "-m", "raybert.bench_step", str(settings), str(target), *arguments]
        subprocess.run(command, check=True, env=environment(config, allocator))
        return [Figure(**{**row, "runs": tuple(row["runs"])}) for row in json.loads(target.read_text())]


def environment(config: Config, allocator: str) -> dict[str, str]:
    """Of a process that is to run as a worker would."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    package = str(Path(__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = {"OMP_NUM_THREADS": str(config.cluster.cpus_per_worker), "PYTHONPATH": os.pathsep.join(paths)}
    return inherited | threads | (MALLOC if allocator == "raybert" else {})


def main(argv: list[str]) -> int:
    """Measure and write the figures as JSON."""
    parser = argparse.ArgumentParser("raybert.bench_step")
    parser.add_argument("config", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--steady-after", type=int)
    options = parser.parse_args(argv)
    config = config_from_yaml(options.config.read_text())
    if options.steady_after is None:
        figures = measure(config, options.rounds, options.seconds)
    else:
        figures = steady_rate(config, options.steady_after)
    options.target.write_text(json.dumps([asdict(figure) for figure in figures]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
