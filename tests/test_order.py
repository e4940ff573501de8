"""Laws of the sample order, over tables of sizes."""

import numpy as np
import pytest

from raybert.order import SampleOrder, rank_slice, steps_per_window

ORDERS = [  # page sizes, G, K
    ([10] * 10, 8, 4),
    ([256, 256, 3], 32, 4),
    ([7, 1, 0, 5, 11], 5, 2),  # a page whose records were all skipped
    ([3], 8, 4),  # an epoch smaller than a batch
    ([100], 10, 16),  # a window longer than an epoch
    ([1] * 37, 4, 1),
]


def make_order(page_sizes, global_batch_size, window_steps, seed=1):
    return SampleOrder(np.array(page_sizes), seed, global_batch_size, window_steps)


@pytest.mark.parametrize("sizes", ORDERS)
def test_every_sample_once_per_epoch(sizes):
    order = make_order(*sizes)
    num_steps = -(-5 * order.num_samples // order.global_batch_size)
    run = np.concatenate([order.global_batch(step) for step in range(num_steps)])
    for epoch in range(5):
        samples = run[epoch * order.num_samples : (epoch + 1) * order.num_samples]
        np.testing.assert_array_equal(np.sort(samples), np.arange(order.num_samples))


@pytest.mark.parametrize("global_batch_size", [7, 32, 33])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7])
def test_rank_slices_are_the_global_batch(global_batch_size, world_size):
    batch = np.arange(global_batch_size)
    slices = [batch[rank_slice(global_batch_size, rank, world_size)] for rank in range(world_size)]
    np.testing.assert_array_equal(np.concatenate(slices), batch)
    assert max(map(len, slices)) - min(map(len, slices)) <= 1
    assert min(map(len, slices)) >= 1


@pytest.mark.parametrize(("rank", "world_size"), [(0, 9), (2, 2), (-1, 2)])
def test_a_slice_of_nothing_is_refused(rank, world_size):
    with pytest.raises(ValueError, match="no slice"):
        rank_slice(8, rank, world_size)


def test_order_depends_on_seed_and_epoch_as_a_pair():
    """seed + epoch would make (seed 1, epoch 1) and (seed 2, epoch 0) equal."""
    first, second = make_order([8] * 8, 8, 1, seed=1), make_order([8] * 8, 8, 1, seed=2)
    epochs = [
        np.concatenate([order.global_batch(8 * epoch + step) for step in range(8)]).tolist()
        for order in (first, second)
        for epoch in range(3)
    ]
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_order_is_a_pure_function():
    """What was asked for before, in this epoch or another, does not matter."""
    order = make_order([10] * 10, 8, 4)
    for step in [17, 3, 17, 0, 1, 26, 13]:
        np.testing.assert_array_equal(order.global_batch(step), make_order([10] * 10, 8, 4).global_batch(step))


def test_a_window_reads_few_pages():
    """At most 1.1 times the pages that its samples fill."""
    order = make_order([256] * 400, 256, 128)
    for number in range(3):
        pages = np.unique(order.window(number) // 256)
        assert len(pages) <= 1.1 * 128


def test_samples_travel_far():
    """Neighbours in the file are not neighbours in the run, beyond the window too."""
    order = make_order([256] * 40, 32, 16)
    run = np.concatenate([order.global_batch(step) for step in range(320)])
    assert np.mean(np.abs(np.diff(run)) == 1) < 0.01
    place = np.argsort(run)
    assert np.corrcoef(place, np.arange(len(run)))[0, 1] < 0.2


@pytest.mark.parametrize(
    ("window_size", "global_batch_size", "steps"), [(32768, 256, 128), (32768, 96, 256), (10, 32, 1), (64, 32, 2)]
)
def test_steps_per_window_is_a_power_of_two(window_size, global_batch_size, steps):
    assert steps_per_window(window_size, global_batch_size) == steps
