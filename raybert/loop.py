"""The training loop: from state.step to num_steps; metrics, evaluation and checkpoints when due."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from typing import Protocol

import torch
from torch import nn

from raybert.cadence import Cadence, Past
from raybert.config import Config, TrainingConfig
from raybert.feed import FeedError, RankBatch
from raybert.flops import peak_flops
from raybert.guard import HALVINGS, NON_FINITE, Guard, Judged, RollbackError, spelt
from raybert.history import CHECKSUM_LIMIT, Arrival, StepRecord, checksum
from raybert.loss import Sums
from raybert.optim import learning_rate
from raybert.plan import Plan, ahead, plan
from raybert.progress import COMPUTE, FEED, reached
from raybert.step import StepResult, TrainState, pass_over, train_step
from raybert.stopwatch import Mark, mark, seconds_between
from raybert.straggler import Pace, Stragglers
from raybert.world import World


class Observer(Protocol):
    """What the loop tells rank 0's surroundings."""

    def train_metrics(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def eval_metrics(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def is_asked_to_hold(self) -> bool: ...
    def is_writing(self) -> bool: ...
    def past(self) -> Past: ...
    def save(self, state: TrainState, records: list[StepRecord]) -> None: ...
    def save_and_hold(self, state: TrainState, records: list[StepRecord]) -> None: ...
    def warn(self, text: str) -> None: ...
    def say(self, text: str) -> None: ...


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
        sums: of all ranks, over the steps that made an update.
    """

    world: World
    global_batch_size: int
    peak_flops: float
    sums: Sums = field(default_factory=Sums.zero)
    is_warm: bool = False
    num_steps: int = 0
    num_tokens: int = 0
    flops: int = 0
    wait_s: float = 0.0
    waits_s: list[float] = field(default_factory=list)
    computed: list[tuple[Mark, Mark]] = field(default_factory=list)
    started_at_s: float = field(default_factory=time.perf_counter)

    @classmethod
    def start(cls, world: World, training: TrainingConfig) -> Meter:
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
        peak = peak_flops(name, training.precision)
        return cls(world, training.global_batch_size, math.nan if peak is None else peak)

    def add(self, result: StepResult, wait_s: float, arrived: Mark) -> None:
        """Count a step of this rank, whose batch was waited for `wait_s` and arrived then."""
        self.num_steps += 1
        self.num_tokens += result.num_tokens
        self.flops += result.flops
        self.wait_s += wait_s
        if self.is_warm:  # the first batch waits for the feed to start, and kernels are chosen in the first step
            self.waits_s.append(wait_s)
            if result.averaging is not None:
                self.computed.append((arrived, result.averaging))
        self.is_warm = True

    def drain(self, newest: StepResult) -> tuple[dict[str, float], list[Pace]]:
        """Metrics over all ranks since the last drain, and each rank's pace; every rank must call it. Then starts over.

        The device must have done the steps, as it has once they were judged.
        """
        counts = [self.num_tokens, self.flops, self.peak_flops, self.wait_s, *astuple(self._pace())]
        ranks = self.world.gather(torch.tensor(counts, dtype=torch.float64, device=self.world.device)).tolist()
        num_tokens, flops, peak, wait_s, *_ = map(sum, zip(*ranks, strict=True))
        elapsed_s = time.perf_counter() - self.started_at_s
        metrics = self.sums.metrics()
        if not self.sums.values[1]:  # no step made an update
            metrics = dict.fromkeys(metrics, math.nan)
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
        self.sums, self.num_steps, self.num_tokens, self.flops = Sums.zero(), 0, 0, 0
        self.waits_s, self.computed = [], []
        self.wait_s, self.started_at_s = 0.0, time.perf_counter()
        return metrics, [Pace(*counts[-2:]) for counts in ranks]

    def _pace(self) -> Pace:
        """This rank's; NaN where no step tells it."""
        computes_s = [seconds_between(*marks) for marks in self.computed]
        return Pace(
            statistics.median(computes_s) if computes_s else math.nan,
            statistics.fmean(self.waits_s) if self.waits_s else math.nan,
        )

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
    barred: Mapping[int, str],
    evaluate: Callable[[], dict[str, float]] | None,
    observer: Observer | None,
    snapshot: Callable[[TrainState, list[StepRecord]], None] | None = None,
) -> Result:
    """Train until num_steps; all ranks call it.

    Args:
        state: where to begin; changed in place.
        batches: this rank's, of steps [state.step, num_steps).
        config: of the run.
        world: this rank's.
        attempt: number, for the records.
        barred: steps that are consumed without an update, and why.
        evaluate: metrics over the held-out set, called by all ranks at the same steps.
        observer: what rank 0 does with metrics and checkpoints; None on other ranks.
        snapshot: called by all ranks every `checkpoint.snapshot_every_steps`; with the records since the last save or
            snapshot, which it hands to the next save. None: there are none.

    Raises:
        RollbackError: the guard gave an alarm, at the same step on all ranks.
        FeedError: what arrived is not what the sample order says.
    """
    meter, trail, result = Meter.start(world, config.training), Trail(world, attempt), Result()
    watch, stragglers = Watch(world, config), Stragglers(world.hosts())
    cadence = _cadence(config, world, observer) if observer else None
    plans = ahead(plan(batch, config.model, config.training, world.device) for batch in batches)
    for wait_s, planned in _timed(plans, state):
        batch = planned.batch
        arrived = mark(world.device)
        answers = world.vote(*_wishes(batch.step, cadence, observer))
        reason = barred.get(batch.step)
        outcome = pass_over(state, world) if reason else _train_step(state, planned, config, world)
        meter.add(outcome, wait_s, arrived)
        trail.add(batch, outcome, reason)
        watch.add(batch.step, outcome, reason is not None)
        is_hold, is_due_to_save = answers()
        is_last = state.step == config.training.num_steps
        is_logged = is_due(state.step, config.training.log_every_steps) or is_last
        is_saved = is_due_to_save or is_hold or is_last
        is_snapshot = snapshot is not None and is_due(state.step, config.checkpoint.snapshot_every_steps)
        if is_logged or is_saved or is_snapshot:
            meter.sums += watch.look(observer)
        if is_logged:
            metrics, paces = meter.drain(outcome)
            result.train = metrics | _standing(state, config)
            if observer:
                observer.train_metrics(state.step, result.train)
                for text in stragglers.judge(paces, time.monotonic()):
                    observer.warn(text)
        if evaluate and (is_due(state.step, config.evaluation.every_steps) or is_last):
            with meter.paused():
                result.evaluation = evaluate()
            if observer:
                observer.eval_metrics(state.step, result.evaluation)
        if is_last:
            _check_weights(state)
        elif is_saved and watch.is_calm:
            stopped_at_s = time.perf_counter()  # the device is idle since the guard has looked
            _check_weights(state)
            records = trail.drain()
            if observer and is_hold:  # the others meet it, or their end, in the next step
                with meter.paused():
                    observer.save_and_hold(state, records)
            elif observer:
                observer.save(state, records)
            if cadence:
                cadence.saved(state.step, None if is_hold else time.perf_counter() - stopped_at_s)
        elif snapshot is not None and is_snapshot and watch.is_calm:
            _check_weights(state)
            snapshot(state, trail.drain())
    result.records = trail.drain()
    return result


def _cadence(config: Config, world: World, observer: Observer) -> Cadence:
    every_steps = config.checkpoint.every_steps
    return Cadence(every_steps, observer.past() if every_steps == "auto" else Past(), world.size, observer.say)


def _wishes(step: int, cadence: Cadence | None, observer: Observer | None) -> tuple[bool, bool]:
    """Whether rank 0 is asked to hold, and whether a checkpoint is due, after this step; it alone knows."""
    if cadence is None or observer is None:
        return False, False
    return observer.is_asked_to_hold(), cadence.is_due(step + 1, observer.is_writing())


def _timed(plans: Iterator[Plan], state: TrainState) -> Iterator[tuple[float, Plan]]:
    """Each plan with the seconds it was waited for."""
    while True:
        asked_at_s = time.perf_counter()
        reached(state.step, FEED)
        planned = next(plans, None)
        if planned is None:
            return
        reached(planned.step, COMPUTE)
        yield time.perf_counter() - asked_at_s, planned


def _train_step(state: TrainState, planned: Plan, config: Config, world: World) -> StepResult:
    return train_step(state, planned, config.training, config.optimizer, world)


def _standing(state: TrainState, config: Config) -> dict[str, float]:
    """The metrics that are the state's."""
    rate = learning_rate(state.step - 1, config.optimizer, config.training.num_steps)
    return {"learning_rate": rate, "num_skipped": int(state.num_skipped)}


def _check_weights(state: TrainState) -> None:
    """Refuse to save weights that are not numbers any more; the gradient that made them so may have been one.

    Raises:
        RollbackError: barring no step, since which of them it was is not known.
    """
    norm = nn.utils.get_total_norm(state.model.parameters())
    if not torch.isfinite(norm):
        raise RollbackError(state.step, state.step, f"weights that are not finite at step {state.step}")


class Watch:
    """The global losses of the steps since the guard last judged; judging waits for the device."""

    def __init__(self, world: World, config: Config) -> None:
        self._world = world
        self._is_fp16 = config.training.precision == "fp16"
        self._guard = Guard(config.guard, HALVINGS if self._is_fp16 else 0)
        self._steps: list[tuple[int, bool]] = []
        self._losses: list[torch.Tensor] = []
        self._skipped: list[torch.Tensor] = []

    @property
    def is_calm(self) -> bool:
        """Whether a checkpoint may be made."""
        return self._guard.is_calm

    def add(self, step: int, result: StepResult, is_barred: bool) -> None:
        """Note a step."""
        self._steps.append((step, is_barred))
        self._losses.append(result.sums.values)
        self._skipped.append(result.skipped)

    def look(self, observer: Observer | None) -> Sums:
        """Judge the steps since the last look, which every rank must do; the sums of those that made an update.

        Raises:
            RollbackError: on all ranks alike.
        """
        if not self._steps:
            return Sums.zero()
        sums = self._world.sum(torch.stack(self._losses)).cpu()
        skipped = torch.stack(self._skipped).cpu()
        rows = zip(self._steps, sums, skipped.tolist(), strict=True)
        judged = [
            Judged(step, None if is_barred else Sums(values).metrics()["loss"], not was_skipped)
            for (step, is_barred), values, was_skipped in rows
        ]
        self._steps, self._losses, self._skipped = [], [], []
        if observer and not self._is_fp16:  # whose loss scale makes an overflow ordinary
            for step in judged:
                if step.loss is not None and not step.is_finite:
                    observer.warn(f"{spelt(step.step, step.step + 1)} made no update: {NON_FINITE}.")
        self._guard.judge(judged)
        return Sums(sums[~skipped].sum(dim=0))


class Trail:
    """What arrived at this rank since the last checkpoint."""

    def __init__(self, world: World, attempt: int) -> None:
        self._world, self._attempt = world, attempt
        self._arrived: list[list[int]] = []
        self._skipped: list[torch.Tensor] = []
        self._reasons: list[str] = []

    def add(self, batch: RankBatch, result: StepResult, reason: str | None = None) -> None:
        """Note a step's arrivals, and why it was to make no update."""
        arrival = [batch.first, batch.first + len(batch.samples), checksum(batch.positions, batch.samples)]
        self._arrived.append([batch.step, batch.global_checksum, *arrival])
        self._skipped.append(result.skipped)
        self._reasons.append(reason or NON_FINITE)

    def drain(self) -> list[StepRecord]:
        """The records of all ranks, for rank 0 alone, though every rank must ask for them; then starts over.

        Raises:
            FeedError: what arrived at the ranks together is not the global batch.
        """
        if not self._arrived:
            return []
        mine = torch.tensor(self._arrived, dtype=torch.int64, device=self._world.device)
        ranks, skipped, reasons = self._world.gather(mine), self._skipped, self._reasons
        self._arrived, self._skipped, self._reasons = [], [], []
        if not self._world.is_first:
            return []
        return [
            StepRecord(
                step=rows[0][0],
                attempt=self._attempt,
                arrivals=_arrivals(rows),
                skipped=reason if was_skipped else None,
            )
            for *rows, was_skipped, reason in zip(*ranks.tolist(), torch.stack(skipped).tolist(), reasons, strict=True)
        ]


def _arrivals(rows: list[list[int]]) -> tuple[Arrival, ...]:
    """What arrived for a step, of each rank's row (see `Trail.add`); together it is the global batch."""
    (step, expected), arrivals = rows[0][:2], tuple(Arrival(*arrival) for _, _, *arrival in rows)
    found = sum(arrival.checksum for arrival in arrivals) % CHECKSUM_LIMIT
    if found != expected:
        raise FeedError(
            f"step {step}: the samples that arrived at {len(rows)} ranks are not its global batch "
            f"(checksum {found}, expected {expected})"
        )
    return arrivals
