"""Attention within sequences that lie one behind the other without padding (Vaswani et al. 2017, section 3.2.1).

On a CPU neighbours of about the same length are brought to one length, and attended to as a batch; on CUDA the flash
kernels take the sequences as they lie.

Shape letters: T tokens, S sequences, H heads, K head size; of a group of G sequences, N tokens, L the longest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from raybert.dropout import dropout

NEW_GROUP = 128 * 128  # queries times keys that a batch of its own costs


@dataclass(frozen=True)
class Group:
    """Neighbouring sequences, to be brought to the length of the longest.

    Args:
        start, stop: their tokens.
        shape: (G, L).
        places: [N] int64 where each token comes to lie among the G * L; None if all sequences are as long.
        sources: [G * L] int64 which token lies at each place; any where nobody looks. None likewise.
        bias: [G, 1, 1, L] float32, 0 for keys that are tokens, -inf for others; None likewise.
    """

    start: int
    stop: int
    shape: tuple[int, int]
    places: Tensor | None = None
    sources: Tensor | None = None
    bias: Tensor | None = None


def has_flash(device: torch.device, precision: str, head_size: int) -> bool:
    """Whether flash attention can take sequences as they lie."""
    if device.type != "cuda" or precision == "fp32" or head_size % 8:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@dataclass(frozen=True)
class Sequences:
    """Where sequences lie, one behind the other, the longest first.

    Args:
        starts: [S + 1] int32 the first token of each, and T.
        longest: tokens of the longest at most; the same for all batches of a run, since code is compiled for it.
        groups: how they are attended to in batches; none where a kernel takes them as they lie.
    """

    starts: Tensor
    longest: int
    groups: tuple[Group, ...] = ()


def sequences(
    lengths: npt.NDArray[np.int64], filling: npt.NDArray[np.int64], longest: int, in_groups: bool = True
) -> Sequences:
    """Sequences of some lengths, and of others behind them; each from the longest to the shortest, none 0."""
    starts = torch.from_numpy(np.cumsum([0, *lengths, *filling], dtype=np.int32))
    found = groups(lengths, 0) + groups(filling, int(lengths.sum())) if in_groups else []
    return Sequences(starts, longest, tuple(found))


def attend(query_THK: Tensor, key_THK: Tensor, value_THK: Tensor, sequences: Sequences, p: float) -> Tensor:
    """Each sequence's attention to itself, [T, H, K]; `p` is the dropout of its weights."""
    if sequences.groups:
        return attend_in_groups(query_THK, key_THK, value_THK, sequences.groups, p)
    return attend_as_they_lie(query_THK, key_THK, value_THK, sequences, p)


def groups(lengths: npt.NDArray[np.int64], start: int) -> list[Group]:
    """How sequences are attended to in batches.

    Args:
        lengths: from the longest to the shortest, none 0.
        start: where the first of them begins.
    """
    parts, first, waste = [], 0, 0
    for number, length in enumerate(lengths):
        waste += int(lengths[first]) ** 2 - int(length) ** 2
        if waste > NEW_GROUP:
            parts.append(lengths[first:number])
            first, waste = number, 0
    if len(lengths):
        parts.append(lengths[first:])
    starts = np.cumsum([start, *(part.sum() for part in parts)])
    return [_group(part, int(at)) for part, at in zip(parts, starts, strict=False)]


def _group(lengths: npt.NDArray[np.int64], start: int) -> Group:
    longest, stop = int(lengths[0]), start + int(lengths.sum())
    shape = len(lengths), longest
    if lengths[-1] == longest:
        return Group(start, stop, shape)
    is_token = np.arange(longest) < lengths[:, None]  # [G, L]
    sources = np.where(is_token, np.cumsum(is_token).reshape(shape) - 1, 0).ravel()
    bias = np.where(is_token, np.float32(0), np.float32(-np.inf))[:, None, None, :]
    places = torch.from_numpy(np.flatnonzero(is_token))
    return Group(start, stop, shape, places, torch.from_numpy(sources), torch.from_numpy(bias))


def attend_in_groups(query_THK: Tensor, key_THK: Tensor, value_THK: Tensor, parts: Sequence[Group], p: float) -> Tensor:
    """Each sequence's attention to itself, [T, H, K]; `p` is the dropout of its weights."""
    contexts = []
    for part in parts:
        query, key, value = (x[part.start : part.stop] for x in (query_THK, key_THK, value_THK))
        contexts.append(_attend(query, key, value, part, p))
    return torch.cat(contexts) if len(contexts) > 1 else contexts[0]


def _attend(query_NHK: Tensor, key_NHK: Tensor, value_NHK: Tensor, group: Group, p: float) -> Tensor:
    query_GHLK, key_GHLK, value_GHLK = (
        _spread(x, group).unflatten(0, group.shape).transpose(1, 2) for x in (query_NHK, key_NHK, value_NHK)
    )
    scores_GHLL = query_GHLK @ (key_GHLK.transpose(2, 3) * (1 / math.sqrt(query_NHK.shape[-1])))
    if group.bias is not None:
        scores_GHLL = scores_GHLL + group.bias.to(scores_GHLL.dtype)
    weights_GHLL = dropout(torch.softmax(scores_GHLL, dim=-1), p)
    return _gather((weights_GHLL @ value_GHLK).transpose(1, 2).flatten(0, 1), group)


def _spread(tokens: Tensor, group: Group) -> Tensor:
    """[N, ...] tokens to [G * L, ...] places."""
    if group.places is None:
        return tokens
    apply: Callable[..., Tensor] = _Spread.apply
    return apply(tokens, group.places, group.sources)


def _gather(spread: Tensor, group: Group) -> Tensor:
    """[G * L, ...] places to [N, ...] tokens."""
    if group.places is None:
        return spread
    apply: Callable[..., Tensor] = _Gather.apply
    return apply(spread, group.places)


class _Spread(torch.autograd.Function):
    """Its gradient reads the tokens' places alone: at the others it is 0."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, places: Tensor, sources: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return tokens.index_select(0, sources)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return grads[0].index_select(0, places), None, None


class _Gather(torch.autograd.Function):
    """Its gradient is written to the tokens' places, and added to nothing."""

    @staticmethod
    def forward(ctx: Any, spread: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(spread)
        return spread.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.size, *grads[0].shape[1:]).index_copy_(0, places, grads[0]), None


def attend_as_they_lie(query_THK: Tensor, key_THK: Tensor, value_THK: Tensor, sequences: Sequences, p: float) -> Tensor:
    """The same by flash attention on CUDA, in 16 bits (Dao 2023); without dropout by version 3 where torch has it."""
    starts, longest = sequences.starts, sequences.longest
    every = query_THK, key_THK, value_THK, starts, starts, longest, longest
    context: Any = torch.ops.aten._flash_attention_forward(*every, p, False, False)[0] if p else varlen_attn(*every)
    result: Tensor = context
    return result
