"""The deal: every sample once, slices as always, tokens balanced."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raybert.deal import deal
from raybert.order import rank_slice


def loads(lengths, dealt, world_size):
    """[steps, ranks] tokens of each rank."""
    ordered = np.take_along_axis(lengths, dealt, axis=1)
    slices = [rank_slice(lengths.shape[1], rank, world_size) for rank in range(world_size)]
    return np.stack([ordered[:, mine].sum(axis=1) for mine in slices], axis=1)


@st.composite
def batches(draw):
    size = draw(st.integers(1, 40))
    rows = st.lists(st.integers(1, 512), min_size=size, max_size=size)
    return np.array(draw(st.lists(rows, min_size=1, max_size=3))), draw(st.integers(1, size))


@given(batches())
def test_every_sample_is_dealt_once_and_no_rank_gets_much_more(given):
    lengths, world_size = given
    dealt = deal(lengths, world_size)
    np.testing.assert_array_equal(np.sort(dealt, axis=1), np.tile(np.arange(lengths.shape[1]), (len(lengths), 1)))
    for rank in range(world_size):
        mine = dealt[:, rank_slice(lengths.shape[1], rank, world_size)]
        assert (np.diff(np.take_along_axis(lengths, mine, axis=1)) <= 0).all()
    spread = np.ptp(loads(lengths, dealt, world_size), axis=1)
    assert (spread <= lengths.max(axis=1)).all()


def test_rounds_turn_back():
    lengths = np.array([[1, 2, 3, 4, 5, 6, 7]])
    assert lengths[0][deal(lengths, 3)[0]].tolist() == [7, 2, 6, 3, 5, 4, 1]


def test_samples_of_one_length_stay_in_their_order():
    assert deal(np.full((2, 6), 9), 2).tolist() == [[0, 3, 4, 1, 2, 5]] * 2
    assert deal(np.full((1, 4), 9), 1).tolist() == [[0, 1, 2, 3]]


def test_unsigned_lengths_are_dealt_alike():
    lengths = np.random.default_rng(1).integers(1, 200, (5, 32))
    np.testing.assert_array_equal(deal(lengths.astype(np.uint8), 4), deal(lengths, 4))


def test_the_samples_real_lengths_are_balanced(sample_index):
    """32 samples at 4 ranks: as the order has them, and as they are dealt."""
    lengths = sample_index.read(np.arange(sample_index.num_samples // 32 * 32))["input_mask"].sum(axis=1, dtype=int)
    lengths = lengths.reshape(-1, 32)
    in_order = loads(lengths, np.tile(np.arange(32), (len(lengths), 1)), 4)
    dealt = loads(lengths, deal(lengths, 4), 4)
    assert (dealt.sum(axis=1) == lengths.sum(axis=1)).all()
    waits = [1 - (each.mean(axis=1) / each.max(axis=1)).mean() for each in (in_order, dealt)]
    assert waits[1] < 0.02 < waits[0]
