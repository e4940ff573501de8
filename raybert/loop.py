"""The training loop: from state.step to num_steps; metrics, evaluation and checkpoints when due."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from raybert.config import Config, TrainingConfig
from raybert.errors import UserError
from raybert.feed import RankBatch
from raybert.flops import peak_flops
from raybert.history import Arrival, StepRecord, samples_checksum
from raybert.loss import Sums
from raybert.optim import learning_rate
from raybert.step import StepResult, TrainState, train_step
from raybert.world import World


class Observer(Protocol):
    """What the loop tells rank 0's surroundings."""

    def train_metrics(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def eval_metrics(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def is_asked_to_hold(self) -> bool: ...
    def save(self, state: TrainState, records: list[StepRecord]) -> None: ...
    def save_and_hold(self, state: TrainState, records: list[StepRecord]) -> None: ...


@dataclass
class Result:
    """What is left to write after the last step: the newest metrics, and records that no checkpoint carries yet."""

    train: Mapping[str, float] = field(default_factory=dict)
    evaluation: Mapping[str, float] | None = None
    records: list[StepRecord] = field(default_factory=list)


@dataclass
class Meter:
    """Sums of the steps since the last drain; draining is the only time that the device is waited for.

    Args:
        world: of the ranks that are measured.
        global_batch_size: samples of a step.
        peak_flops: operations a second that this rank's device can do; NaN if not known.
    """

    world: World
    global_batch_size: int
    peak_flops: float
    sums: Sums
    num_steps: int = 0
    num_tokens: int = 0
    flops: int = 0
    wait_s: float = 0.0
    started_at_s: float = field(default_factory=time.perf_counter)

    @classmethod
    def start(cls, world: World, training: TrainingConfig) -> Meter:
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
        peak = peak_flops(name, training.precision)
        return cls(world, training.global_batch_size, math.nan if peak is None else peak, Sums.zero(world.device))

    def add(self, result: StepResult, wait_s: float) -> None:
        """Count a step whose batch was waited for `wait_s`."""
        self.sums += result.sums
        self.num_steps += 1
        self.num_tokens += result.num_tokens
        self.flops += result.flops
        self.wait_s += wait_s

    def drain(self, newest: StepResult) -> dict[str, float]:
        """Metrics over all ranks since the last drain, which every rank must call; then starts over."""
        counts = [self.num_tokens, self.flops, self.peak_flops, self.wait_s]
        counted = torch.tensor(counts, dtype=torch.float64, device=self.world.device)
        *sums, num_tokens, flops, peak, wait_s = self.world.sum(torch.cat([self.sums.values, counted])).tolist()
        elapsed_s = time.perf_counter() - self.started_at_s
        metrics = Sums(torch.tensor(sums, dtype=torch.float64)).metrics()
        metrics["training_loss"] = metrics.pop("loss")
        metrics |= {
            "grad_norm": float(newest.grad_norm),
            "samples_per_s": self.num_steps * self.global_batch_size / elapsed_s,
            "tokens_per_s": num_tokens / elapsed_s,
            "flops_per_s": flops / elapsed_s,
            "data_wait": wait_s / self.world.size / elapsed_s,
            "world_size": self.world.size,
        }
        if math.isfinite(peak):
            metrics["mfu"] = flops / elapsed_s / peak
        self.sums, self.num_steps, self.num_tokens, self.flops = Sums.zero(self.world.device), 0, 0, 0
        self.wait_s, self.started_at_s = 0.0, time.perf_counter()
        return metrics

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time inside."""
        paused_at_s = time.perf_counter()
        yield
        self.started_at_s += time.perf_counter() - paused_at_s


def is_due(step: int, every_steps: int) -> bool:
    """Whether something done every so many steps (0: never) is due after `step` steps."""
    return every_steps > 0 and step % every_steps == 0


def train(
    state: TrainState,
    batches: Iterable[RankBatch],
    config: Config,
    world: World,
    attempt: int,
    evaluate: Callable[[], dict[str, float]] | None,
    observer: Observer | None,
) -> Result:
    """Train until num_steps; all ranks call it.

    Args:
        state: where to begin; changed in place.
        batches: this rank's, of steps [state.step, num_steps).
        config: of the run.
        world: this rank's.
        attempt: number, for the records.
        evaluate: metrics over the held-out set, called by all ranks at the same steps.
        observer: what rank 0 does with metrics and checkpoints; None on other ranks.

    Raises:
        UserError: training has diverged.
        FeedError: what arrived is not what the sample order says.
    """
    meter, trail, result = Meter.start(world, config.training), Trail(world, attempt), Result()
    for wait_s, batch in _timed(batches):
        is_hold_asked = world.any(observer is not None and observer.is_asked_to_hold())
        outcome = train_step(state, batch, config.training, config.optimizer, world)
        meter.add(outcome, wait_s)
        trail.add(batch, outcome)
        is_hold = is_hold_asked()
        is_last = state.step == config.training.num_steps
        if is_due(state.step, config.training.log_every_steps) or is_last:
            result.train = _checked(meter.drain(outcome), state, config)
            if observer:
                observer.train_metrics(state.step, result.train)
        if evaluate and (is_due(state.step, config.evaluation.every_steps) or is_last):
            with meter.paused():
                result.evaluation = evaluate()
            if observer:
                observer.eval_metrics(state.step, result.evaluation)
        if is_last:
            _check_finite(outcome, state)
        elif is_hold:
            _check_finite(outcome, state)
            records = trail.drain()
            if observer:  # the others meet it, or their end, in the next step
                with meter.paused():
                    observer.save_and_hold(state, records)
        elif is_due(state.step, config.checkpoint.every_steps):
            _check_finite(outcome, state)
            records = trail.drain()
            if observer:
                observer.save(state, records)
    result.records = trail.drain()
    return result


def _timed(batches: Iterable[RankBatch]) -> Iterator[tuple[float, RankBatch]]:
    """Each batch with the seconds it was waited for."""
    iterator = iter(batches)
    while True:
        asked_at_s = time.perf_counter()
        batch = next(iterator, None)
        if batch is None:
            return
        yield time.perf_counter() - asked_at_s, batch


def _checked(metrics: dict[str, float], state: TrainState, config: Config) -> dict[str, float]:
    """The metrics with what the state adds to them, unless training has diverged."""
    if not math.isfinite(metrics["training_loss"]):
        raise _diverged(f"loss is {metrics['training_loss']}", state)
    metrics["learning_rate"] = learning_rate(state.step - 1, config.optimizer, config.training.num_steps)
    metrics["num_skipped"] = int(state.num_skipped)
    return metrics


def _check_finite(newest: StepResult, state: TrainState) -> None:
    """Refuse to save weights that are not numbers any more: their gradient is not one either."""
    if not (state.scaler.is_enabled() or math.isfinite(newest.grad_norm)):
        raise _diverged(f"norm of the gradient is {float(newest.grad_norm)}", state)


def _diverged(what: str, state: TrainState) -> UserError:
    return UserError(
        f"The {what} at step {state.step}: training has diverged; lower optimizer.learning_rate or raise "
        "optimizer.warmup_steps. The checkpoints before are intact."
    )


class Trail:
    """What arrived at this rank since the last checkpoint."""

    def __init__(self, world: World, attempt: int) -> None:
        self._world, self._attempt = world, attempt
        self._arrived: list[list[int]] = []
        self._skipped: list[torch.Tensor] = []

    def add(self, batch: RankBatch, result: StepResult) -> None:
        """Note a step's arrivals."""
        positions = batch.positions
        arrived = [batch.step, int(positions[0]), int(positions[-1]) + 1, samples_checksum(batch.samples)]
        self._arrived.append(arrived)
        self._skipped.append(result.skipped)

    def drain(self) -> list[StepRecord]:
        """The records of all ranks, which every rank must ask for; then starts over."""
        if not self._arrived:
            return []
        mine = torch.tensor(self._arrived, dtype=torch.int64, device=self._world.device)
        ranks = self._world.gather(mine).tolist()
        skipped = torch.stack(self._skipped).tolist()
        self._arrived, self._skipped = [], []
        return [
            StepRecord(
                step=steps[0][0],
                attempt=self._attempt,
                arrivals=tuple(Arrival(*arrival) for _, *arrival in steps),
                skipped="non-finite gradient" if was_skipped else None,
            )
            for *steps, was_skipped in zip(*ranks, skipped, strict=True)
        ]
