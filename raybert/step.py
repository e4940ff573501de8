"""One training step: micro-batches to gradients, clip, update."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from raybert.batch import MicroBatch
from raybert.config import ModelConfig, OptimizerConfig, TrainingConfig
from raybert.example import Schema
from raybert.float8 import check_device, use_float8
from raybert.loss import Sums, mlm_sums, nsp_sums, total_loss
from raybert.model import BertForPreTraining
from raybert.optim import build_optimizer, gradient_norm, learning_rate, update
from raybert.plan import Plan, cut
from raybert.progress import AVERAGE, reached
from raybert.stopwatch import Mark, mark
from raybert.world import World, without_sync

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class TrainState:
    """All that a run is, at a step.

    Args:
        model: the weights, fp32.
        parallel: the model, averaging gradients over ranks.
        optimizer: its moments.
        scaler: of fp16's loss; does nothing in other precisions.
        step: global batches consumed; position, epoch, learning rate and random numbers follow from it.
        num_skipped: 0-d int64 on the device, steps whose update was skipped.
    """

    model: BertForPreTraining
    parallel: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int
    num_skipped: torch.Tensor


@dataclass(frozen=True)
class StepResult:
    """What one rank knows of a step; tensors stay on the device.

    Args:
        sums: loss and accuracy sums of this rank's slice.
        grad_norm: 0-d, norm of the global gradient before clipping.
        skipped: 0-d bool, whether the update was skipped; the same on all ranks.
        num_tokens: real tokens that this rank has computed.
        flops: operations that the model needs for them.
        averaging: when the backward began that averages gradients over ranks; None where nothing was computed.
    """

    sums: Sums
    grad_norm: torch.Tensor
    skipped: torch.Tensor
    num_tokens: int
    flops: int
    averaging: Mark | None = None


def create_state(model: ModelConfig, training: TrainingConfig, optimizer: OptimizerConfig, world: World) -> TrainState:
    """The state at step 0, with weights that depend on the seed alone."""
    torch.manual_seed(training.seed)
    bert = BertForPreTraining(model, training.use_next_sentence_label).to(world.device)
    bert.bert.encoder.recomputes = training.activation_checkpointing
    if training.float8:
        check_device(world.device)
        use_float8(bert.bert.encoder)
    if training.compile:
        for layer in bert.bert.encoder.layer:
            layer.compile(dynamic=True)
    return TrainState(
        model=bert,
        parallel=world.wrap(bert),
        optimizer=build_optimizer(bert, optimizer),
        scaler=torch.amp.GradScaler(world.device.type, enabled=training.precision == "fp16"),
        step=0,
        num_skipped=torch.zeros((), dtype=torch.int64, device=world.device),
    )


def train_step(
    state: TrainState, plan: Plan, training: TrainingConfig, optimizer: OptimizerConfig, world: World
) -> StepResult:
    """Consume one global batch: gradients of all its samples, one clip, one update.

    A gradient that is not finite makes none. It is the global gradient, so all ranks know alike.
    """
    sums, averaging = _backward(state, plan, training, world)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, optimizer, training.num_steps)
    state.scaler.unscale_(state.optimizer)
    grad_norm = gradient_norm(state.optimizer)
    skipped = update(state.optimizer, grad_norm, optimizer.max_grad_norm)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.num_skipped += skipped
    state.step += 1
    return StepResult(sums, grad_norm, skipped, plan.num_tokens, plan.flops, averaging)


def pass_over(state: TrainState, world: World) -> StepResult:
    """Consume one global batch without an update."""
    state.num_skipped += 1
    state.step += 1
    nothing = torch.full((), torch.nan, device=world.device)
    return StepResult(Sums.zero(world.device), nothing, nothing.isnan(), 0, 0)


def _backward(state: TrainState, plan: Plan, training: TrainingConfig, world: World) -> tuple[Sums, Mark]:
    """Accumulate gradients of this rank's slice; the last micro-batch averages them over ranks, from the mark on."""
    batch, total, averaging = plan.batch, Sums.zero(world.device), mark(world.device)
    with autocast(training, world):  # around all of them, so that the weights are cast once
        for number, (start, part) in enumerate(plan.parts):
            # Random numbers belong to the place in the run, so that nothing random has to be saved.
            torch.manual_seed(_random_seed(training.seed, batch.first + start))
            last = number == len(plan.parts) - 1
            with nullcontext() if last else without_sync(state.parallel):
                sums = forward(state.parallel, part.to(world.device))
                with torch.autocast(world.device.type, enabled=False):
                    loss = total_loss(sums, batch.global_weight, training.global_batch_size, world.size)
                    if last:
                        reached(batch.step, AVERAGE)
                        averaging = mark(world.device)
                    state.scaler.scale(loss).backward()
            total += sums.detach()
    return total, averaging


def forward(model: nn.Module, batch: MicroBatch) -> Sums:
    """Loss and accuracy sums of a micro-batch."""
    projection, nsp_logits = model(batch.tokens, batch.masked_places)
    mlm, labels = mlm_sums(projection, batch.masked_labels, batch.masked_weights), batch.next_sentence_labels
    return Sums.of(mlm, None if nsp_logits is None else nsp_sums(nsp_logits[: len(labels)], labels))


def autocast(training: TrainingConfig, world: World) -> AbstractContextManager[object]:
    """Mixed precision as configured."""
    if training.precision == "fp32":
        return nullcontext()
    return torch.autocast(world.device.type, AUTOCAST[training.precision])


def settle_buckets(state: TrainState, seq_length: int, training: TrainingConfig, world: World) -> None:
    """Run one forward and backward whose gradients are thrown away.

    DDP regroups its gradients after the first backward, which changes the order of summation at three or more ranks.
    Done here, before the first step of every attempt, a resumed run sums as the uninterrupted one does.
    """
    if world.size == 1:
        return
    features = Schema(seq_length, 1, 1, 1).empty(1) | {"masked_lm_weights": np.ones((1, 1), np.float32)}
    ((_, batch),) = cut(features, state.model.config, training, world.device)
    with autocast(training, world):
        sums = forward(state.parallel, batch.to(world.device))
    total_loss(sums, 1, 1).backward()
    state.optimizer.zero_grad(set_to_none=True)


def _random_seed(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
