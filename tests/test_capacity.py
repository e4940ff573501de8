"""The capacity that is found fits, is about the most that does, and leaves no trace of the search."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from allocations import peak_bytes
from helpers import TINY_MODEL, TINY_SCHEMA, take_step
from ranks import run_ranks

from raybert.capacity import NEARBY, SHARE, capacity, fitted, full_samples, most_tokens, trial
from raybert.config import DataConfig, OptimizerConfig, TrainingConfig
from raybert.errors import UserError
from raybert.feed import Layout, local_batches
from raybert.order import SampleOrder
from raybert.plan import cut
from raybert.step import create_state, settle_buckets
from raybert.world import CPU, World

BUCKET = 8
DATA = DataConfig(max_seq_length=16, max_predictions_per_seq=4)
TRAINING = TrainingConfig(num_steps=10, global_batch_size=512, micro_batch_size=8, micro_batch_tokens="auto")
OPTIMIZER = OptimizerConfig(learning_rate=1e-2)


def ends_at(limit, shape):
    """A shape of memory that ends sooner than the budget says."""

    def measure(tokens):
        if tokens > limit:
            raise torch.OutOfMemoryError
        return shape(tokens)

    return measure


SHAPES = {
    "a line": lambda tokens: 30 * tokens,
    "a line with an offset": lambda tokens: 20_000 + 30 * tokens,
    "flatter from somewhere on": lambda tokens: 40 * min(tokens, 500) + 20 * tokens,
    "steeper and steeper": lambda tokens: 10 * tokens + 0.02 * tokens**2,
    "in small leaps": lambda tokens: 30 * math.ceil(tokens / 24) * 24,
    "an early end": ends_at(777, lambda tokens: 30 * tokens),
    "an end at the first": ends_at(16, lambda tokens: 30 * tokens),
    "always the same": lambda tokens: 5,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("largest", [16, 24, 400, 100_000])
@pytest.mark.parametrize("budget_bytes", [30_000, 100_000])
def test_the_most_that_fits_is_found(shape, largest, budget_bytes):
    tried = []

    def measure(tokens):
        tried.append(tokens)
        return SHAPES[shape](tokens)

    def fits(tokens):
        try:
            return tokens <= largest and SHAPES[shape](tokens) <= budget_bytes
        except torch.OutOfMemoryError:
            return False

    found = most_tokens(measure, budget_bytes, 16, largest, BUCKET)
    assert fits(found) and found in tried and len(tried) <= 20
    assert all(tokens % BUCKET == 0 and 16 <= tokens <= largest for tokens in tried)
    more = found + max(BUCKET, 2 * NEARBY * found)
    assert not fits(math.ceil(more / BUCKET) * BUCKET) or found > (1 - NEARBY) * largest


@pytest.mark.parametrize("measure", [lambda tokens: 30 * tokens, ends_at(8, lambda tokens: 1)])
def test_where_one_sample_does_not_fit_it_says_what_helps(measure):
    rule = (
        "training.micro_batch_tokens: a sample of 512 tokens must fit the GPU's memory, got 1.4e-05 GiB.*smaller model"
    )
    with pytest.raises(UserError, match=rule):
        most_tokens(measure, 15_000, 512, 1024)


@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 512, 1000])
def test_trials_are_of_as_many_tokens_as_they_say(tokens):
    """And of as many masked ones as there can be."""
    samples = full_samples(tokens, 16, 4)
    (_, batch), *more = cut(samples, TINY_MODEL, replace(TRAINING, micro_batch_size=100), CPU)
    assert not more and len(batch.tokens.input_ids) == tokens
    assert len(batch.masked_places) == tokens // 16 * 4 + min(tokens % 16, 4)
    assert {
        name: array.dtype for name, array in samples.items() if "input_ids" not in name and "lm_ids" not in name
    } == {
        name: array.dtype
        for name, array in TINY_SCHEMA.empty(1).items()
        if "input_ids" not in name and "lm_ids" not in name
    }


class HostMemory:
    """The CPU's as torch hands it out, of which some is free."""

    def __init__(self, free_bytes):
        self._free_bytes = free_bytes

    def free_bytes(self):
        return self._free_bytes

    def peak_bytes(self, work):
        return peak_bytes(work)


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
@pytest.mark.parametrize("has_moments", [False, True])
def test_a_models_memory_is_used_but_for_a_rest(index, kind, has_moments):
    """By torch's own record of forward and backward; the place of moments that are not there yet is kept."""
    optimizer, world = replace(OPTIMIZER, type=kind), World()
    state = create_state(TINY_MODEL, TRAINING, optimizer, world)
    if has_moments:
        take_step(state, batch_of(index, world), TRAINING, optimizer, world)

    def taken(tokens):
        return peak_bytes(lambda: trial(state, full_samples(tokens, 16, 4), TRAINING, world))

    taken(512)  # gradients
    moments_bytes = 8 * sum(parameter.numel() for parameter in state.model.parameters())
    memory = HostMemory(taken(4096) / SHARE + moments_bytes / 2)
    assert capacity(state, DATA, TRAINING, world, memory) == (4096 if has_moments else 4096 - 512)
    assert taken(4096 + 512) > taken(4096) + moments_bytes


def test_a_ranks_slice_is_enough():
    state = create_state(TINY_MODEL, TRAINING, OPTIMIZER, World())
    assert capacity(state, DATA, TRAINING, World(), HostMemory(1 << 40)) == 512 * 16
    assert capacity(state, DATA, TRAINING, World(rank=0, size=3), HostMemory(1 << 40)) == 6 * 512  # 171 * 16 is less


def batch_of(index, world):
    order = SampleOrder(index.page_sizes, seed=3, global_batch_size=512, window_steps=1)
    return next(local_batches(Layout(order, world.size, 0, 1), index, world.rank))


def trained(world, index, is_searched):
    """Weights after steps with dropout, and the random state before them; the capacity of all ranks."""
    state = create_state(TINY_MODEL, TRAINING, OPTIMIZER, world)
    settle_buckets(state, 16, TRAINING, world)
    before, tokens = torch.get_rng_state(), 0
    if is_searched:
        memory = HostMemory((4 + 2 * world.rank) * 1_000_000)
        mine = capacity(state, DATA, TRAINING, world, memory)
        tokens = world.min(mine), world.gather(torch.tensor(mine)).tolist()
        assert all(parameter.grad is None for parameter in state.model.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    batch = batch_of(index, world)
    for step in range(2):
        take_step(state, replace(batch, step=step), TRAINING, OPTIMIZER, world)
    return torch.cat([parameter.detach().ravel() for parameter in state.model.parameters()]), tokens


def test_the_search_leaves_no_trace_and_the_smallest_of_all_ranks_counts(index):
    alone, alone_searched = (trained(World(), index, is_searched) for is_searched in (False, True))
    two, two_searched = run_ranks([(2, trained, (index, is_searched)) for is_searched in (False, True)])
    assert torch.equal(alone[0], alone_searched[0]) and torch.equal(two[0], two_searched[0])
    smallest, each = two_searched[1]
    assert smallest == min(each) == each[0] < max(each)


def test_on_a_cpu_auto_is_no_limit_of_tokens(index):
    state = create_state(TINY_MODEL, TRAINING, OPTIMIZER, World())
    assert fitted(state, DATA, TRAINING, World()) is TRAINING
    features = index.read(np.arange(40))
    auto, none = (
        [start for start, _ in cut(features, TINY_MODEL, replace(TRAINING, micro_batch_tokens=tokens), CPU)]
        for tokens in ("auto", 0)
    )
    assert auto == none == [0, 8, 16, 24, 32]
