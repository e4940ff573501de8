"""Attention over packed sequences is each sequence's attention to itself."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from raybert.attention import NEW_GROUP, attend, groups, sequences

NUM_HEADS, HEAD = 3, 8
NONE = np.zeros(0, np.int64)
LENGTHS = ([5], [1], [7, 7, 7], [9, 4, 4, 1], [400, 390, 128, 128, 20, 3], [512, 300, 299, 40, 2, 1, 1])


def inputs(num_tokens):
    torch.manual_seed(0)
    shape = (num_tokens, NUM_HEADS, HEAD)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def straight(query, key, value, lengths):
    """One sequence after the other, by torch's own function."""
    parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    contexts = [F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part)).transpose(0, 1) for part in parts]
    return torch.cat(contexts)


@pytest.mark.parametrize("filling", [[], [4, 1]])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_each_sequence_attends_to_itself(lengths, filling):
    """In float64, with gradients; what fills up is a sequence like others."""
    every = inputs(sum(lengths) + sum(filling))
    found = attend(*every, sequences(np.array(lengths), np.array(filling, np.int64), 512), 0.0)
    expected = straight(*every, [*lengths, *filling])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.manual_seed(1)
    direction = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((result * direction).sum(), every) for result in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_groups_are_neighbours_and_waste_little(lengths):
    found = groups(np.array(lengths), start=11)
    assert [part.start for part in found] == [11, *(part.stop for part in found[:-1])]
    assert found[-1].stop == 11 + sum(lengths)
    at = 0
    for part in found:
        mine = lengths[at : at + part.shape[0]]
        assert (part.shape[1], part.stop - part.start) == (mine[0], sum(mine))
        assert sum(mine[0] ** 2 - length**2 for length in mine) <= NEW_GROUP
        at += len(mine)
    assert at == len(lengths)


def test_where_sequences_lie():
    found = sequences(np.array([4, 2]), np.array([3]), 9, in_groups=False)
    assert (found.starts.tolist(), found.longest, found.groups) == ([0, 4, 6, 9], 9, ())
    assert found.starts.dtype == torch.int32


def test_dropout_drops_weights_and_keeps_their_mean():
    """Of values that are all 1 the context is the sum of the weights that were kept, scaled up."""
    length = 200
    query, key, _ = inputs(length)
    value = torch.ones(length, NUM_HEADS, HEAD, dtype=torch.float64)
    once = sequences(np.array([length]), NONE, length)
    torch.manual_seed(0)
    context = attend(query, key, value, once, 0.1)
    assert context.mean().item() == pytest.approx(1, abs=0.01)
    assert 0.005 < context.std().item() < 0.2
    torch.testing.assert_close(attend(query, key, value, once, 0.0), value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention needs a GPU")
@pytest.mark.parametrize("lengths", LENGTHS)
def test_as_they_lie_on_a_gpu(lengths):
    every = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in inputs(sum(lengths))]
    exact = [x.detach().double().cpu().requires_grad_() for x in every]
    found = attend(*every, _on_gpu(sequences(np.array(lengths), NONE, 512, in_groups=False)), 0.0)
    torch.testing.assert_close(found.double().cpu(), straight(*exact, lengths), rtol=2e-2, atol=2e-2)


def _on_gpu(found):
    return type(found)(found.starts.cuda(), found.longest)
