"""The capacity of a GPU: how many real tokens one forward and backward may have, found by trying.

A run that is resumed finds it anew; only where that is the same number is the run bitwise the uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch

from raybert.batch import Arrays
from raybert.config import DataConfig, TrainingConfig
from raybert.errors import UserError
from raybert.example import Schema
from raybert.loss import total_loss
from raybert.plan import TOKEN_BUCKET, cut
from raybert.step import TrainState, autocast, forward
from raybert.world import World, without_sync

SHARE = 0.9  # of the memory that is free; the rest is for what lies scattered in it
NEARBY = 0.02  # of the tokens that fit: a gain that is worth no further trial


@dataclass(frozen=True)
class Memory:
    """A GPU's, as torch hands it out."""

    device: torch.device

    def free_bytes(self) -> int:
        """What could be handed out now."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def peak_bytes(self, work: Callable[[], None]) -> int:
        """The most that work has at once, beyond what is there before it."""
        torch.cuda.empty_cache()  # in one piece, as far as it can be
        torch.cuda.reset_peak_memory_stats(self.device)
        before_bytes = torch.cuda.memory_allocated(self.device)
        work()
        return torch.cuda.max_memory_allocated(self.device) - before_bytes


def fitted(state: TrainState, data: DataConfig, training: TrainingConfig, world: World) -> TrainingConfig:
    """With the number that `micro_batch_tokens: auto` stands for on GPUs, the same for all ranks, which all call it.

    Samples are no bound then. On a CPU auto stays what it is: no bound on tokens, but one on samples. Weights must be
    on the device, and moments if there are any; no gradient and no other state of the random generators is left.

    Raises:
        UserError: not even one sample fits.
    """
    if training.micro_batch_tokens != "auto" or world.device.type != "cuda":
        return training
    tokens = world.min(capacity(state, data, training, world, Memory(world.device)))
    return replace(training, micro_batch_tokens=tokens, micro_batch_size=training.global_batch_size)


def most_tokens(
    measure: Callable[[int], float], budget_bytes: float, smallest: int, largest: int, bucket: int = TOKEN_BUCKET
) -> int:
    """How many tokens take a budget of memory, to NEARBY.

    Memory grows about linearly: tried is what the two largest that fit let expect; where that was too much, what lies
    half way to it.

    Args:
        measure: bytes that so many tokens take; raises torch.OutOfMemoryError where the memory ends.
        budget_bytes: at most.
        smallest, largest: tokens, multiples of the bucket.
        bucket: only multiples of it are tried.

    Raises:
        UserError: the smallest number does not fit.
    """
    fitting, too_many = [(smallest, _bytes(measure, smallest))], math.inf
    if fitting[0][1] > budget_bytes:
        raise UserError(
            f"training.micro_batch_tokens: a sample of {smallest} tokens must fit the GPU's memory, got "
            f"{budget_bytes / 2**30:.3g} GiB beside weights, gradients and moments; use training.precision bf16, "
            "training.activation_checkpointing, a smaller model or a larger GPU."
        )
    while True:
        tokens, most = _next(fitting, too_many, budget_bytes, largest, bucket), fitting[-1][0]
        if tokens - most < max(bucket, NEARBY * most):
            return most
        size_bytes = _bytes(measure, tokens)
        if size_bytes <= budget_bytes:
            fitting.append((tokens, size_bytes))
        else:
            too_many = tokens


def _next(fitting: list[tuple[int, float]], too_many: float, budget_bytes: float, largest: int, bucket: int) -> int:
    """Tokens to try after those that fit, each with its bytes, and those that do not."""
    most, size_bytes = fitting[-1]
    wanted: float = 2 * most
    if len(fitting) > 1:
        slope = (size_bytes - fitting[-2][1]) / (most - fitting[-2][0])
        wanted = most + (budget_bytes - size_bytes) / slope if slope > 0 else math.inf
    wanted = min(wanted, largest)
    return int((wanted if wanted < too_many else (most + too_many) / 2) // bucket) * bucket


def _bytes(measure: Callable[[int], float], tokens: int) -> float:
    try:
        return measure(tokens)
    except torch.OutOfMemoryError:
        return math.inf


def capacity(state: TrainState, data: DataConfig, training: TrainingConfig, world: World, memory: Memory) -> int:
    """Tokens that this rank's memory has room for, at most those of its slice of a global batch."""
    length, slice_size = data.max_seq_length, -(-training.global_batch_size // world.size)
    smallest, largest = (_rounded_up(num_samples * length) for num_samples in (1, slice_size))

    def measure(tokens: int) -> int:
        samples = full_samples(tokens, length, data.max_predictions_per_seq)
        return memory.peak_bytes(lambda: trial(state, samples, training, world))

    with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
        with suppress(torch.OutOfMemoryError):  # the search will speak of it
            measure(smallest)  # now gradients are there, as in all micro-batches but the first, and workspaces
        budget_bytes = SHARE * (memory.free_bytes() - _missing_bytes(state.optimizer))
        try:
            return most_tokens(measure, budget_bytes, smallest, largest)
        finally:
            state.optimizer.zero_grad(set_to_none=True)


def trial(state: TrainState, samples: Arrays, training: TrainingConfig, world: World) -> None:
    """One forward and backward of all samples at once, by which gradients grow; ranks do not wait for each other."""
    whole = replace(training, micro_batch_size=len(samples["input_ids"]), micro_batch_tokens=0)
    ((_, batch),) = cut(samples, state.model.config, whole, world.device)
    with without_sync(state.parallel):
        with autocast(training, world):
            sums = forward(state.parallel, batch.to(world.device))
        total_loss(sums, 1, 1).backward()


def full_samples(tokens: int, length: int, num_predictions: int) -> Arrays:
    """Samples of so many real tokens together, all but the last of the full length, with as many masked as can be."""
    lengths = np.full(-(-tokens // length), length)
    lengths[-1] -= lengths.sum() - tokens
    samples = Schema(length, num_predictions, 1, 1).empty(len(lengths))
    samples["input_mask"][:] = np.arange(length) < lengths[:, None]
    samples["masked_lm_positions"][:] = np.arange(num_predictions)
    samples["masked_lm_weights"][:] = np.arange(num_predictions) < lengths[:, None]
    return samples


def _missing_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the two moments of each parameter that has none yet."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return sum(2 * parameter.nbytes for parameter in parameters if not optimizer.state.get(parameter))


def _rounded_up(tokens: int) -> int:
    return -(-tokens // TOKEN_BUCKET) * TOKEN_BUCKET
