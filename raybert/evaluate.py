"""Held-out evaluation: exact sums over the evaluation set, the same at any world size up to rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from raybert.batch import MicroBatch
from raybert.config import ModelConfig, TrainingConfig
from raybert.index import Index, Ints
from raybert.loss import Sums
from raybert.model import BertForPreTraining
from raybert.plan import cut
from raybert.step import autocast, forward
from raybert.world import World

READ_SAMPLES = 4096


@torch.no_grad()
def evaluate(
    model: BertForPreTraining, index: Index, num_steps: int | None, training: TrainingConfig, world: World
) -> dict[str, float]:
    """Masked LM and next sentence metrics, by Model Garden's names, on every rank.

    Args:
        model: not wrapped for data parallelism.
        index: of the evaluation files; each sample counts once.
        num_steps: at most so many global batches of samples, in file order; None is all.
        training: micro-batch size and precision.
        world: ranks that share the work, each a contiguous part.
    """
    limit = index.num_samples if num_steps is None else num_steps * training.global_batch_size
    num_samples = min(index.num_samples, limit)
    start, stop = num_samples * world.rank // world.size, num_samples * (world.rank + 1) // world.size
    was_training = model.training
    model.eval()
    total = Sums.zero(world.device)
    for batch in batches(index, start, stop, model.config, training, world):
        with autocast(training, world):
            total += forward(model, batch)
    model.train(was_training)
    return Sums(world.sum(total.values)).metrics()


def batches(
    index: Index, start: int, stop: int, model: ModelConfig, training: TrainingConfig, world: World
) -> Iterator[MicroBatch]:
    """The samples [start, stop) in file order, on this rank's device."""
    for first in range(start, stop, READ_SAMPLES):
        features = index.read(np.arange(first, min(first + READ_SAMPLES, stop)))
        for _, batch in cut(features, model, training, world.device):
            yield batch.to(world.device)


def unigram_loss(train_counts: Ints, held_out_counts: Ints) -> float:
    """Cross-entropy, in nats, of held-out masked tokens under the training set's frequencies, add-one smoothed.

    What a model reaches that knows how often tokens occur and nothing else.

    Args:
        train_counts, held_out_counts: [V] how often each token is a masked label.
    """
    log_probabilities = np.log(train_counts + 1.0) - math.log(train_counts.sum() + len(train_counts))
    return float(-(held_out_counts * log_probabilities).sum() / held_out_counts.sum())
