"""Micro-batches: a rank's slice of a global batch as tensors, cut for one forward and backward each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch

# B samples, L sequence length, P predictions per sequence, M masked tokens of non-zero weight in the micro-batch

Arrays = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class MicroBatch:
    """Samples for one forward and backward.

    Args:
        input_ids, input_mask, segment_ids: [B, L].
        masked_positions: [M] places of masked tokens in the flattened [B * L] sequence.
        masked_labels: [M] the tokens that stood there.
        masked_weights: [M] their weights, all non-zero.
        next_sentence_labels: [B] 1 where the second sentence is random.
    """

    input_ids: torch.Tensor
    input_mask: torch.Tensor
    segment_ids: torch.Tensor
    masked_positions: torch.Tensor
    masked_labels: torch.Tensor
    masked_weights: torch.Tensor
    next_sentence_labels: torch.Tensor

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device; copies to a GPU are pinned and do not wait."""
        if device.type == "cpu":
            return self
        tensors = (getattr(self, field.name) for field in fields(self))
        return MicroBatch(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors))


def micro_batch(features: Arrays) -> MicroBatch:
    """Samples as tensors, with the masked tokens planned here, on the CPU, so that no device is waited for.

    Args:
        features: google-research/bert's feature names to [B, ...] arrays.
    """
    weights = features["masked_lm_weights"]
    samples, predictions = np.nonzero(weights)
    seq_length = features["input_ids"].shape[1]
    positions = samples * seq_length + features["masked_lm_positions"][samples, predictions]
    return MicroBatch(
        input_ids=_tensor(features["input_ids"], np.int32),
        input_mask=_tensor(features["input_mask"], np.bool_),
        segment_ids=_tensor(features["segment_ids"], np.int32),
        masked_positions=_tensor(positions, np.int64),
        masked_labels=_tensor(features["masked_lm_ids"][samples, predictions], np.int64),
        masked_weights=_tensor(weights[samples, predictions], np.float32),
        next_sentence_labels=_tensor(features["next_sentence_labels"].ravel(), np.int64),
    )


def micro_batches(features: Arrays, size: int) -> Iterator[tuple[int, MicroBatch]]:
    """Consecutive micro-batches of at most `size` samples, each with the place of its first sample."""
    num_samples = len(features["input_ids"])
    for start in range(0, num_samples, size):
        yield start, micro_batch({name: values[start : start + size] for name, values in features.items()})


def _tensor(values: npt.NDArray[np.generic], dtype: type[np.generic]) -> torch.Tensor:
    return torch.from_numpy(values.astype(dtype))
