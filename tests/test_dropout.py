"""Dropout zeroes by chance, keeps the mean, and follows torch's seed."""

import math

import pytest
import torch
from torch import nn

from raybert.dropout import Dropout, dropout, keep_mask

NUM = 1 << 20
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def mask(p=0.1, size=NUM, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return keep_mask(torch.Size([size]), p, dtype)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_many_are_dropped_as_asked_for_and_the_others_are_scaled_up(dtype, p):
    found = mask(p, dtype=dtype)
    kept = torch.tensor(1 / (1 - p), dtype=dtype)
    assert torch.equal(found.unique(), torch.stack([torch.zeros_like(kept), kept]))
    share, sigma = (found == 0).double().mean().item(), math.sqrt(p * (1 - p) / NUM)
    assert abs(share - p) < 5 * sigma + 1 / 65536


def test_elements_are_dropped_independently_of_their_neighbours():
    """No correlation at any of many distances, in rows or columns of the usual widths, or with the next draw."""
    dropped = (mask(0.1) == 0).double() - 0.1
    variance, limit = 0.09, 5 / math.sqrt(NUM)
    for distance in (*range(1, 70), 128, 256, 512, 768, 1024, 3072, 65536):
        assert abs((dropped[:-distance] * dropped[distance:]).mean().item() / variance) < limit * 1.1
    following = (keep_mask(torch.Size([NUM]), 0.1, torch.float32) == 0).double() - 0.1
    assert abs((dropped * following).mean().item() / variance) < limit
    by_lane = dropped.view(-1, 4).mean(dim=0)
    assert (by_lane.abs() < 10 * math.sqrt(variance / NUM)).all()


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 1023])
def test_any_shape_is_filled(size):
    found = mask(0.5, size)
    assert found.shape == (size,) and set(found.tolist()) <= {0.0, 2.0}


def test_the_seed_decides():
    assert torch.equal(mask(seed=7), mask(seed=7))
    assert not torch.equal(mask(seed=7), mask(seed=8))
    torch.manual_seed(7)
    first = keep_mask(torch.Size([NUM]), 0.1, torch.float32)
    assert not torch.equal(first, keep_mask(torch.Size([NUM]), 0.1, torch.float32))


def test_the_gradient_is_of_what_was_kept():
    x = torch.full((1000,), 3.0, requires_grad=True)
    torch.manual_seed(0)
    y = dropout(x, 0.25)
    y.sum().backward()
    assert torch.equal(y, x * x.grad) and torch.equal(x.grad.unique(), torch.tensor([0, 4 / 3]))


def test_nothing_is_dropped_outside_of_training_or_by_chance_0():
    x = torch.randn(100)
    assert Dropout(0.5).eval()(x) is x and dropout(x, 0.0) is x
    assert not torch.equal(Dropout(0.5)(x), x)
    assert repr(Dropout(0.1)) == repr(nn.Dropout(0.1)).replace(", inplace=False", "")
