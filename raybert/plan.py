"""The plan of a step: a rank's batch cut into micro-batches for its device, made while the step before is computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from raybert.attention import has_flash
from raybert.batch import Arrays, MicroBatch, micro_batches
from raybert.config import ModelConfig, TrainingConfig
from raybert.feed import RankBatch
from raybert.flops import training_flops

TOKEN_BUCKET = 512  # on a GPU, where a shape that was not seen before costs time

Made = TypeVar("Made")


@dataclass(frozen=True)
class Plan:
    """What one rank computes in a step.

    Args:
        batch: the rank's slice of the global batch.
        parts: its micro-batches, in host memory, each with the place of its first sample in the slice.
        num_tokens: real tokens of the slice.
        flops: operations that the model needs for it.
    """

    batch: RankBatch
    parts: tuple[tuple[int, MicroBatch], ...]
    num_tokens: int
    flops: int

    @property
    def step(self) -> int:
        """Whose global batch it is of."""
        return self.batch.step


def plan(batch: RankBatch, model: ModelConfig, training: TrainingConfig, device: torch.device) -> Plan:
    """The plan of a batch."""
    lengths = batch.features["input_mask"].sum(axis=1)
    num_masked = int(np.count_nonzero(batch.features["masked_lm_weights"]))
    flops = training_flops(model, training.use_next_sentence_label, lengths, num_masked)
    return Plan(batch, tuple(cut(batch.features, model, training, device)), int(lengths.sum()), flops)


def cut(
    features: Arrays, model: ModelConfig, training: TrainingConfig, device: torch.device
) -> Iterator[tuple[int, MicroBatch]]:
    """Samples as micro-batches that a device takes best, each with the place of its first sample."""
    in_groups = not has_flash(device, training.precision, model.hidden_size // model.num_attention_heads)
    bucket = TOKEN_BUCKET if device.type == "cuda" else 1
    tokens = training.micro_batch_tokens
    max_tokens = 0 if tokens == "auto" else tokens  # on GPUs `capacity` has put a number there
    for start, part in micro_batches(features, training.micro_batch_size, max_tokens, bucket, in_groups):
        yield start, part.pinned() if device.type == "cuda" else part


def ahead(items: Iterable[Made]) -> Iterator[Made]:
    """The items, each made in another thread while the one before is used."""
    iterator, pool = iter(items), ThreadPoolExecutor(1, "ahead")
    try:
        pending = pool.submit(next, iterator, None)
        while (item := pending.result()) is not None:
            pending = pool.submit(next, iterator, None)
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # what makes the items may wait for ever
