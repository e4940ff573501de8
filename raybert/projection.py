"""The projection of hidden states to the vocabulary, and the cross-entropy of its logits, never all of them at once.

Those of a large micro-batch are gigabytes. Here one part of them after the other becomes its share of the sums and, at
once, of the gradients, which backward then only scales: no part is kept, and none is computed twice. As in Liger
Kernel's fused linear cross-entropy (Hsu et al. 2024, section 3.2).

Shape letters: M masked tokens, N of them in a part, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from raybert.softmax import cross_entropy

PART_LOGITS = 1 << 25  # at most: 128 MiB in fp32, and still products that keep a GPU busy


class Projection(NamedTuple):
    """Logits that nobody has computed yet: hidden_MD @ table_VD.T + bias_V."""

    hidden_MD: Tensor
    table_VD: Tensor
    bias_V: Tensor

    def logits(self) -> Tensor:
        """[M, V], all of them."""
        return F.linear(*self)


def cross_entropy_sums(projection: Projection, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """sum(w * ce) and sum(w * [argmax == label]), 0-d float64; backward from the first works once.

    Matrix products are in autocast's type, all else is in fp32 at least.

    Args:
        projection: of M tokens; with M = 0 the gradients are zeros.
        labels: [M] int64 in [0, V).
        weights: [M] float64.
    """
    apply: Callable[..., tuple[Tensor, Tensor]] = _CrossEntropySums.apply
    return apply(*projection, labels, weights, torch.is_grad_enabled())


@torch.no_grad()
def cross_entropies(projection: Projection, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token what `cross_entropy_sums` sums up: [M] losses, fp32 at least, and [M] whether it was predicted."""
    lowered = _lowered(projection)
    with torch.autocast(labels.device.type, enabled=False):
        parts = [cross_entropy(part.logits(), rows)[:2] for part, rows, _ in _parts(lowered, labels, labels)]
    losses, hits = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(hits)


def _lowered(projection: Projection) -> Projection:
    """In autocast's type."""
    kind = projection.hidden_MD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else projection.table_VD.dtype
    return Projection(*(x.to(dtype) for x in projection))


def _parts(projection: Projection, labels: Tensor, weights: Tensor) -> Iterator[tuple[Projection, Tensor, Tensor]]:
    """Rows that have few enough logits, with their labels and weights."""
    hidden_MD, table_VD, bias_V = projection
    num_rows = max(1, PART_LOGITS // len(table_VD))
    for hidden_ND, *rows in zip(*(x.split(num_rows) for x in (hidden_MD, labels, weights)), strict=True):
        yield Projection(hidden_ND, table_VD, bias_V), rows[0], rows[1]


class _CrossEntropySums(torch.autograd.Function):
    """Until backward knows what the sum is multiplied by, its gradients are those of the sum alone.

    In fp16 they need no loss scale for that: a logit's is in [-1, 1], however large the global batch is, and what the
    products make of it is kept in fp32, where it bears any.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, table_VD: Tensor, bias_V: Tensor, labels: Tensor, weights: Tensor, is_trained: bool
    ) -> tuple[Tensor, Tensor]:
        sums = weights.new_zeros(2)
        hidden_grads: list[Tensor] = []
        table_grad = bias_grad = None
        lowered = _lowered(Projection(hidden_MD, table_VD, bias_V))
        with torch.autocast(hidden_MD.device.type, enabled=False):
            for part, part_labels, part_weights in _parts(lowered, labels, weights):
                part_sums, gradients = _part(part, part_labels, part_weights, is_trained)
                sums += part_sums
                if gradients is not None:
                    hidden_grads.append(gradients.hidden_MD)
                    table_grad, bias_grad = _plus(table_grad, gradients.table_VD), _plus(bias_grad, gradients.bias_V)
        ctx.gradients = (torch.cat(hidden_grads), table_grad, bias_grad) if is_trained else None
        loss, correct = sums[0].clone(), sums[1].clone()
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, and given away
        assert gradients is not None, "backward works once"
        return *(gradient.mul_(grads[0]) for gradient in gradients), None, None, None


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _part(
    projection: Projection, labels: Tensor, weights: Tensor, is_trained: bool
) -> tuple[Tensor, Projection | None]:
    """The two sums over some rows, and the gradients of the first by all that is projected.

    All that is as large as the logits is freed when it returns; three such tensors live at once.
    """
    hidden_ND, table_VD, _ = projection
    losses_N, hits_N, errors_NV = cross_entropy(projection.logits(), labels)
    sums = torch.stack([weights @ losses_N.double(), weights @ hits_N.double()])
    if not is_trained:
        return sums, None
    exact = losses_N.dtype
    low_NV, exact_weights = errors_NV.to(table_VD.dtype), weights.to(exact)
    hidden_grad_ND = (low_NV @ table_VD).to(exact) * exact_weights[:, None]
    table_grad_VD = low_NV.T @ (hidden_ND * weights[:, None].to(hidden_ND.dtype))
    bias_grad_V = weights.to(errors_NV.dtype) @ errors_NV
    return sums, Projection(hidden_grad_ND, table_grad_VD.to(exact), bias_grad_V.to(exact))
