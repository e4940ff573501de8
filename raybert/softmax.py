"""Softmax and cross-entropy of logits; on a CPU row by row, while a row lies in the cache, in compiled code.

Shape letters: N rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from raybert.jit import Flags, Ints, compiled

LANES = 16
SHIFTS = {torch.bfloat16: (torch.int16, 16), torch.float32: (torch.int32, 0)}  # of a number's bits to those of float32


def cross_entropy(logits_NV: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of each row, and its gradient by the logits: softmax less 1 at the label.

    Arithmetic is in fp32 at least. A row with a NaN or +inf has NaN for its loss and for all of its gradient.

    Args:
        logits_NV: [N, V] of any float type; may be overwritten.
        labels: [N] int64 in [0, V).

    Returns:
        [N] losses, fp32 at least; [N] bool whether the label is the first of the highest logits; [N, V] gradients.
    """
    if logits_NV.device.type == "cpu" and logits_NV.dtype in SHIFTS:
        return _compiled(logits_NV.contiguous(), labels)
    return _anywhere(logits_NV, labels)


def _anywhere(logits_NV: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`cross_entropy` on any device."""
    exact, rows = torch.promote_types(logits_NV.dtype, torch.float32), torch.arange(len(labels), device=labels.device)
    probabilities_NV = torch.softmax(logits_NV, dim=-1, dtype=exact)
    highest_N, predicted_N = logits_NV.max(dim=-1)
    # By the one probability that cannot underflow; the logits are subtracted first, which may be large.
    differences_N = highest_N.to(exact) - logits_NV[rows, labels].to(exact)
    losses_N = differences_N - probabilities_NV[rows, predicted_N].log()
    errors_NV = probabilities_NV
    errors_NV[rows, labels] -= 1
    return losses_N, predicted_N == labels, errors_NV


def _compiled(logits_NV: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`cross_entropy` on a CPU; the logits become the gradients."""
    bits, shift = SHIFTS[logits_NV.dtype]
    losses, hits = np.zeros(len(labels), np.float32), np.zeros(len(labels), np.bool_)
    _rows(logits_NV.view(bits).numpy(), np.int32(shift), labels.numpy(), losses, hits)
    return torch.from_numpy(losses), torch.from_numpy(hits), logits_NV


@compiled
def _rows(rows: np.ndarray[Any, Any], shift: np.int32, labels: Ints, losses: np.ndarray[Any, Any], hits: Flags) -> None:
    """`_compiled` of rows of bits."""
    num_logits = rows.shape[1]
    bits = np.zeros(-(-num_logits // LANES) * LANES, np.int32)  # of one row, widened; behind it zeros
    scales = np.zeros(num_logits, np.int32)
    numbers = bits.view(np.float32)
    for i in range(len(rows)):
        highest, label = _widen(rows[i], shift, bits), labels[i]
        losses[i] = highest - numbers[label]
        hits[i] = numbers[label] == highest and not np.any(numbers[:label] == highest)
        _exponentiate(numbers[:num_logits], highest, scales)
        total = _sum(numbers)
        losses[i] += np.log(total)
        for j in range(num_logits):
            numbers[j] /= total
        numbers[label] -= np.float32(1)
        _narrow(bits, shift, rows[i])


@compiled
def _widen(row: np.ndarray[Any, Any], shift: np.int32, bits: np.ndarray[Any, Any]) -> np.float32:
    """A row's numbers as float32, and the highest of them; NaN if one of them is a positive NaN."""
    highest = np.int32(-(1 << 31))
    for j in range(len(row)):
        number = np.int32(np.int32(row[j]) << shift)
        bits[j] = number
        # As integers the bits of negative numbers are in the wrong order.
        highest = max(highest, np.int32(number ^ np.int32(np.int32(number >> 31) & np.int32(0x7FFFFFFF))))
    one = np.full(1, highest ^ ((highest >> 31) & 0x7FFFFFFF), np.int32).view(np.float32)
    return one[0] if one[0] < np.inf else np.float32(np.nan)


@compiled
def _exponentiate(x: np.ndarray[Any, Any], highest: np.float32, scales: np.ndarray[Any, Any]) -> None:
    """exp(x - highest) in place, to 2 units of the last place, as in Moshier's Cephes: 2^k times a polynomial."""
    for j in range(len(x)):
        r = x[j] - highest
        r = np.float32(-87) if r < np.float32(-87) else r  # a NaN stays
        k = np.floor(r * np.float32(1.44269504) + np.float32(0.5))
        scales[j] = (np.int32(k) + 127) << 23
        r = r - k * np.float32(0.693359375) + k * np.float32(2.12194440e-4)  # less k * log(2), in two parts
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        x[j] = p * r * r + r + np.float32(1)
    powers = scales.view(np.float32)
    for j in range(len(x)):
        x[j] *= powers[j]


@compiled
def _sum(numbers: np.ndarray[Any, Any]) -> np.float32:
    """The sum of a multiple of LANES numbers."""
    lanes = np.zeros(LANES, np.float32)
    for j in range(0, len(numbers), LANES):
        for k in range(LANES):
            lanes[k] += numbers[j + k]
    return np.float32(lanes.sum())


@compiled
def _narrow(bits: np.ndarray[Any, Any], shift: np.int32, row: np.ndarray[Any, Any]) -> None:
    """float32 numbers as a row's, rounded to the nearest, ties to even."""
    if shift == 0:
        for j in range(len(row)):
            row[j] = bits[j]
    else:
        for j in range(len(row)):
            b = np.uint32(bits[j])
            rounded = np.uint32(b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1)))
            row[j] = np.int16(rounded >> np.uint32(16))
