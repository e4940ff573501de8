"""The objective as sums: parts of a batch add up, and one division by the counts of the global batch comes at the end.

Shape letters: B samples, M masked tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from raybert.projection import Projection, cross_entropy_sums

PartSums = tuple[Tensor, Tensor, Tensor]
"""Weighted loss, weight, and weight of what was predicted right: 0-d float64, on the device of the model."""


def mlm_sums(projection: Projection, labels: Tensor, weights: Tensor) -> PartSums:
    """sum(w * ce), sum(w) and sum(w * [argmax == label]) over masked tokens (Devlin et al. 2019, section 3.1, task 1).

    Args:
        projection: of the M masked tokens; M may be 0. Backward works once.
        labels: [M] int32 or int64 in [0, V).
        weights: [M], `masked_lm_weights` of the masked tokens.
    """
    weights = weights.double()
    loss, correct = cross_entropy_sums(projection, labels.long(), weights)
    return loss, weights.sum(), correct


def nsp_sums(nsp_logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> PartSums:
    """sum(ce), number of samples, number predicted right (Devlin et al. 2019, section 3.1, task 2).

    Args:
        nsp_logits: [B, 2], any float type.
        labels: [B] int32 or int64; 1 where the second sentence is a random one.
        weights: [B], 1 for a sample, 0 for one that only fills up the batch; None: all are samples.
    """
    labels, weights = labels.long(), (torch.ones_like(labels) if weights is None else weights).double()
    # At least fp32, also under autocast; summed in float64, so that the total hardly depends on how a batch was cut.
    precise = nsp_logits if nsp_logits.dtype == torch.float64 else nsp_logits.float()
    cross_entropy = F.cross_entropy(precise, labels, reduction="none")
    correct = precise.detach().argmax(dim=-1) == labels
    return (weights * cross_entropy).sum(), weights.sum(), (weights * correct).sum()


@dataclass(frozen=True)
class Sums:
    """Sums of masked LM and next sentence prediction over any set of samples: a micro-batch, a rank's slice, a run.

    Adding does not wait for the device; only `metrics` does. Ranks add up by an all-reduce of `values`.
    """

    values: Tensor
    """[6] float64: loss, weight and correct weight of masked LM, then of next sentence prediction."""

    @classmethod
    def of(cls, mlm: PartSums, nsp: PartSums | None) -> Sums:
        """From `mlm_sums` and `nsp_sums`; nsp is None when only masked LM is trained."""
        if nsp is None:
            nsp = (torch.zeros_like(mlm[0]),) * 3
        return cls(torch.stack([*mlm, *nsp]))

    @classmethod
    def zero(cls, device: torch.device | str = "cpu") -> Sums:
        """The sums over nothing."""
        return cls(torch.zeros(6, dtype=torch.float64, device=device))

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.values + other.values)

    def detach(self) -> Sums:
        """Without the graph, to be kept after backward."""
        return Sums(self.values.detach())

    def metrics(self) -> dict[str, float]:
        """Means by the names of Model Garden; those of next sentence prediction only if there was any.

        A mean over no weight is 0. Waits for the device.
        """
        mlm_loss, mlm_weight, mlm_correct, nsp_loss, nsp_weight, nsp_correct = self.values.tolist()
        metrics = {
            "masked_lm_accuracy": _ratio(mlm_correct, mlm_weight),
            "lm_example_loss": _ratio(mlm_loss, mlm_weight),
            "loss": _ratio(mlm_loss, mlm_weight) + _ratio(nsp_loss, nsp_weight),
        }
        if nsp_weight:
            metrics["next_sentence_accuracy"] = nsp_correct / nsp_weight
            metrics["next_sentence_loss"] = nsp_loss / nsp_weight
        return metrics


def total_loss(sums: Sums, global_weight_sum: float, global_num_samples: float, world_size: int = 1) -> Tensor:
    """What to call backward on: this part's share of the loss of the global batch, times world_size as DDP averages.

    loss = sum(w * ce) / sum(w) + sum(nsp ce) / (number of samples), both counts over the global batch; a term whose
    count is 0 is 0. The shares of all micro-batches and ranks add up to world_size times the loss.

    Args:
        sums: of one micro-batch, with its graph.
        global_weight_sum: sum of `masked_lm_weights` over the global batch.
        global_num_samples: samples in the global batch.
        world_size: ranks over which DDP averages gradients.

    Returns:
        0-d float64.
    """
    mlm_scale = _ratio(world_size, global_weight_sum)
    nsp_scale = _ratio(world_size, global_num_samples)
    return sums.values[0] * mlm_scale + sums.values[3] * nsp_scale


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
