"""Micro-batches: a rank's slice of a global batch as tensors, cut for one forward and backward each.

Only real tokens are in them, sequence behind sequence. All of it is planned here, on the CPU, in numpy: a device that
had to find them would make the host wait.

Shape letters: B samples, L sequence length, P predictions per sequence, M masked tokens of non-zero weight, T tokens,
S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch

from raybert.attention import Sequences, sequences

Arrays = dict[str, npt.NDArray[np.generic]]
Held = TypeVar("Held")
Values = npt.NDArray[Any]


@dataclass(frozen=True)
class Tokens:
    """Real tokens, sequence behind sequence, the longest first.

    Args:
        input_ids, segment_ids, positions: [T]; a token's position is that in its padded sample.
        sequences: where each of the S sequences lies; the first B are samples, others only fill up.
    """

    input_ids: torch.Tensor
    segment_ids: torch.Tensor
    positions: torch.Tensor
    sequences: Sequences


@dataclass(frozen=True)
class MicroBatch:
    """Samples for one forward and backward.

    Args:
        tokens: of the samples.
        masked_places: [M] which of the T tokens are to be predicted.
        masked_labels: [M] the tokens that stood there.
        masked_weights: [M] their weights, all non-zero.
        next_sentence_labels: [B] 1 where the second sentence is random.
    """

    tokens: Tokens
    masked_places: torch.Tensor
    masked_labels: torch.Tensor
    masked_weights: torch.Tensor
    next_sentence_labels: torch.Tensor

    def pinned(self) -> MicroBatch:
        """The same in memory that a GPU copies from by itself."""
        return _moved(self, torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device; nobody waits for the copies of what is pinned."""
        return self if device.type == "cpu" else _moved(self, lambda tensor: tensor.to(device, non_blocking=True))


def _moved(held: Held, move: Callable[[torch.Tensor], torch.Tensor]) -> Held:
    """What holds tensors, however deep, with all of them moved."""
    if isinstance(held, torch.Tensor):
        return cast(Held, move(held))
    if isinstance(held, tuple):
        return cast(Held, tuple(_moved(each, move) for each in held))
    if is_dataclass(held) and not isinstance(held, type):
        moved = {field.name: _moved(getattr(held, field.name), move) for field in fields(held)}
        return cast(Held, replace(held, **moved))
    return held


def micro_batch(features: Arrays, bucket: int = 1, in_groups: bool = True) -> MicroBatch:
    """Samples as tensors.

    A token is real if its `input_mask` is 1, if it is the first of its sample, or if it is to be predicted.

    Args:
        features: google-research/bert's feature names to [B, ...] arrays.
        bucket, in_groups: see `pack`.
    """
    weights = features["masked_lm_weights"]
    samples, predictions = np.nonzero(weights)
    masked = samples, features["masked_lm_positions"][samples, predictions]
    is_real_BL = features["input_mask"].astype(bool)
    is_real_BL[:, 0] = True
    is_real_BL[masked] = True
    tokens, order, places_BL = pack(features["input_ids"], features["segment_ids"], is_real_BL, bucket, in_groups)
    return MicroBatch(
        tokens=tokens,
        masked_places=_tensor(places_BL[masked], np.int64),
        masked_labels=_tensor(features["masked_lm_ids"][samples, predictions], np.int64),
        masked_weights=_tensor(weights[samples, predictions], np.float32),
        next_sentence_labels=_tensor(features["next_sentence_labels"].ravel()[order], np.int64),
    )


def pack(
    input_ids_BL: Values, segment_ids_BL: Values, is_real_BL: Values, bucket: int = 1, in_groups: bool = True
) -> tuple[Tokens, Values, Values]:
    """Real tokens, without padding.

    Args:
        input_ids_BL, segment_ids_BL: [B, L].
        is_real_BL: [B, L] bool, which of them are; at least one of each sample.
        bucket: T is rounded up to a multiple of it by sequences of zeros behind the samples, so that few shapes occur.
        in_groups: whether sequences are to be attended to in batches (see `attention`).

    Returns:
        the tokens; [B] which sample each of the first B sequences is; [B, L] which of the T tokens each real one is.
    """
    lengths = is_real_BL.sum(axis=1)
    order = np.argsort(-lengths, kind="stable")
    rows, positions = np.nonzero(is_real_BL[order])
    real = order[rows], positions
    places_BL = np.zeros(is_real_BL.shape, np.int64)
    places_BL[real] = np.arange(len(rows))
    filling = _filling(len(rows), int(lengths.max()), bucket)
    zeros = np.zeros(filling.sum(), np.int32)
    tokens = Tokens(
        input_ids=_tensor(np.concatenate([input_ids_BL[real], zeros]), np.int32),
        segment_ids=_tensor(np.concatenate([segment_ids_BL[real], zeros]), np.int32),
        positions=_tensor(np.concatenate([positions, zeros]), np.int32),
        sequences=sequences(lengths[order], filling, is_real_BL.shape[1], in_groups),
    )
    return tokens, order, places_BL


def _filling(num_tokens: int, longest: int, bucket: int) -> npt.NDArray[np.int64]:
    """Lengths of sequences, the longest first, that bring tokens to a multiple of a bucket."""
    missing = -num_tokens % bucket
    whole, rest = divmod(missing, longest)
    return np.array([longest] * whole + [rest] * (rest > 0), np.int64)


def micro_batches(
    features: Arrays, size: int, max_tokens: int = 0, bucket: int = 1, in_groups: bool = True
) -> Iterator[tuple[int, MicroBatch]]:
    """Consecutive micro-batches, each with the place of its first sample.

    Args:
        features: google-research/bert's feature names to [B, ...] arrays.
        size: samples of a micro-batch at most.
        max_tokens: real tokens of a micro-batch at most, though one sample is always taken; 0: any number.
        bucket, in_groups: see `pack`.
    """
    for start, stop in _cuts(features["input_mask"].sum(axis=1, dtype=np.int64), size, max_tokens):
        part = {name: values[start:stop] for name, values in features.items()}
        yield start, micro_batch(part, bucket, in_groups)


def _cuts(lengths: npt.NDArray[np.int64], size: int, max_tokens: int) -> Iterator[tuple[int, int]]:
    """First sample, and the one behind the last, of each micro-batch."""
    ends, start = np.cumsum(lengths), 0
    while start < len(lengths):
        stop = min(start + size, len(lengths))
        if max_tokens:
            before = int(ends[start - 1]) if start else 0
            stop = min(stop, max(start + 1, int(np.searchsorted(ends, before + max_tokens, side="right"))))
        yield start, stop
        start = stop


def _tensor(values: npt.NDArray[np.generic], dtype: type[np.generic]) -> torch.Tensor:
    return torch.from_numpy(values.astype(dtype))
