"""The feed: what the order says is what every rank gets, whatever the world size and wherever a run resumes."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from raybert.feed import POSITION, SAMPLE, STEP_WEIGHT, FeedError, Layout, local_batches, rank_batches, window_blocks
from raybert.history import CHECKSUM_LIMIT, checksum
from raybert.order import SampleOrder, rank_slice

WORLD_SIZES = (1, 2, 3, 5, 7)
BATCH_SIZES = (32, 33)
NUM_STEPS = 70  # of 828 samples: nearly three epochs


def make_order(index, global_batch_size=32, window_steps=8):
    return SampleOrder(index.page_sizes, 1, global_batch_size, window_steps)


def blocks_of(layout, index):
    return [block for window in layout.windows for block in window_blocks(window, layout, index)]


def rank_feeds(layout, index):
    """Every rank's batches of what the splitter hands out: block i to rank i % world_size."""
    blocks = blocks_of(layout, index)
    ranks = range(layout.world_size)
    return [list(rank_batches(blocks[rank :: layout.world_size], layout, rank)) for rank in ranks]


def assert_global_batches(layout, index):
    """What the ranks have is the order's, step by step, with the features of just these samples, dealt by length."""
    feeds = rank_feeds(layout, index)
    assert {len(feed) for feed in feeds} == {layout.num_steps - layout.start_step}
    for step, batches in zip(range(layout.start_step, layout.num_steps), zip(*feeds, strict=True), strict=True):
        samples = layout.order.global_batch(step)
        features = index.read(samples)
        assert [batch.step for batch in batches] == [step] * layout.world_size
        arrived = np.concatenate([batch.positions for batch in batches])
        in_order = np.argsort(arrived)
        np.testing.assert_array_equal(arrived[in_order], layout.order.positions(step))
        np.testing.assert_array_equal(np.concatenate([batch.samples for batch in batches])[in_order], samples)
        for name, values in features.items():
            parts = [batch.features[name] for batch in batches]
            np.testing.assert_array_equal(np.concatenate(parts)[in_order], values, err_msg=name, strict=True)
        edges = [batch.first + len(batch.samples) for batch in batches]
        assert [batch.first for batch in batches] == [step * len(samples), *edges[:-1]]
        assert edges[-1] == (step + 1) * len(samples)
        whole = sum(checksum(batch.positions, batch.samples) for batch in batches) % CHECKSUM_LIMIT
        assert [batch.global_checksum for batch in batches] == [whole] * layout.world_size
        lengths = [batch.features["input_mask"].sum(axis=1).tolist() for batch in batches]
        assert lengths == [sorted(each, reverse=True) for each in lengths]
        weight = features["masked_lm_weights"].sum(dtype=np.float64)
        assert [batch.global_weight for batch in batches] == [weight] * layout.world_size


@pytest.mark.parametrize("global_batch_size", BATCH_SIZES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_global_batch_is_the_same_for_every_world_size(index, world_size, global_batch_size):
    order = make_order(index, global_batch_size)
    assert NUM_STEPS * global_batch_size > 2 * index.num_samples
    assert_global_batches(Layout(order, world_size, 0, NUM_STEPS), index)


@pytest.mark.parametrize("window_steps", [1, 4, 64])
def test_any_window_is_fed_whole(index, window_steps):
    """Windows of one step, of parts of an epoch, and of more than two epochs."""
    assert_global_batches(Layout(make_order(index, 33, window_steps), 3, 0, 70), index)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_resume_at_every_offset_gives_the_remaining_batches(index, world_size):
    """Windows of eight steps, blocks of one to eight: every offset in both."""
    order = make_order(index, 2048, 8)
    layouts = [Layout(order, world_size, start, 10) for start in range(11)]
    assert {layout.block_steps for layout in layouts} == {min(8, 4 << (world_size - 1).bit_length())}
    whole = rank_feeds(layouts[0], index)
    for layout in layouts:
        for feed, expected in zip(rank_feeds(layout, index), whole, strict=True):
            rest = expected[layout.start_step :]
            assert [batch.step for batch in feed] == [batch.step for batch in rest]
            for batch, wanted in zip(feed, rest, strict=True):
                np.testing.assert_array_equal(batch.samples, wanted.samples)
                np.testing.assert_array_equal(batch.features["input_ids"], wanted.features["input_ids"])


@pytest.mark.parametrize("global_batch_size", BATCH_SIZES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_blocks_are_equal_and_a_multiple_of_the_ranks(index, world_size, global_batch_size):
    """Otherwise the splitter would cut the last ones anew, and drop rows."""
    order = make_order(index, global_batch_size, 8)
    for start in range(18):
        for stop in (start + 1, start + 5, 18):
            layout = Layout(order, world_size, start, stop)
            rows = {block.num_rows for block in blocks_of(layout, index)}
            assert rows == {layout.block_rows} == {8 * -(-global_batch_size // world_size)}
            assert len(blocks_of(layout, index)) % world_size == 0


def test_a_resume_reads_no_group_before_its_own(index):
    order = make_order(index, 4096, 8)
    layout = Layout(order, 2, 5, 8)
    steps = [set((np.asarray(block[POSITION]) // 4096).tolist()) for block in blocks_of(layout, index)]
    assert layout.block_steps == 4 and steps == [{4, 5, 6, 7}] * 2


def test_a_finished_run_is_fed_nothing(index):
    for stop in range(1, 18):
        assert rank_feeds(Layout(make_order(index), 3, stop, stop), index) == [[], [], []]


@pytest.mark.parametrize(("global_batch_size", "world_size"), [(32, 3), (32, 7), (33, 5), (7, 5)])
def test_padded_rows_are_zeros_without_weight(index, global_batch_size, world_size):
    layout = Layout(make_order(index, global_batch_size), world_size, 0, 8)
    for number, block in enumerate(blocks_of(layout, index)):
        mine = rank_slice(global_batch_size, number % world_size, world_size)
        for name in block.column_names:
            column = np.array(block[name].to_pylist()).reshape(layout.block_steps, layout.slice_rows, -1)
            assert not column[:, mine.stop - mine.start :].any(), name
        is_sample = np.array(block[STEP_WEIGHT].to_pylist()).reshape(layout.block_steps, -1) > 0
        assert is_sample.sum(axis=1).tolist() == [mine.stop - mine.start] * layout.block_steps


def test_a_batch_may_straddle_two_epochs(index):
    order = make_order(index)
    step = index.num_samples // 32
    assert index.num_samples % 32
    batch = list(local_batches(Layout(order, 1, 0, step + 1), index))[step]
    inside, samples = index.num_samples - step * 32, batch.samples[np.argsort(batch.positions)]
    first, second = samples[:inside], samples[inside:]
    epoch = np.concatenate([order.global_batch(i) for i in range(step)] + [first])
    np.testing.assert_array_equal(np.sort(epoch), np.arange(index.num_samples))
    assert len(np.unique(second)) == len(second) == 32 - inside


@pytest.mark.parametrize("rank", range(3))
def test_local_batches_are_a_ranks(index, rank):
    layout = Layout(make_order(index), 3, 3, 20)
    expected = rank_feeds(layout, index)[rank]
    for batch, wanted in zip(local_batches(layout, index, rank), expected, strict=True):
        np.testing.assert_array_equal(batch.samples, wanted.samples)


# --- Feeds that went wrong ------------------------------------------------------------------------------------------


def replace_column(block, name, values):
    return block.set_column(block.column_names.index(name), name, pa.array(values))


def a_row_twice(blocks):
    rows = np.arange(blocks[1].num_rows)
    rows[1] = 0
    return [blocks[0], blocks[1].take(rows), *blocks[2:]]


def swapped_samples(blocks):
    samples = np.array(blocks[1][SAMPLE].to_pylist())
    samples[[0, 1]] = samples[[1, 0]]
    return [blocks[0], replace_column(blocks[1], SAMPLE, samples), *blocks[2:]]


def wrong_sample(blocks):
    samples = np.array(blocks[1][SAMPLE].to_pylist())
    samples[5] += 1
    return [blocks[0], replace_column(blocks[1], SAMPLE, samples), *blocks[2:]]


def wrong_position(blocks):
    return [blocks[0], replace_column(blocks[1], POSITION, np.array(blocks[1][POSITION].to_pylist()) + 32), *blocks[2:]]


WRONG = {  # what arrived, and the step at which it must be seen; blocks hold 8 steps
    "a row twice": (a_row_twice, 8),
    "two samples swapped": (swapped_samples, 8),
    "wrong sample": (wrong_sample, 8),
    "wrong position": (wrong_position, 8),
    "first block dropped": (lambda blocks: blocks[1:], 5),
    "a block dropped": (lambda blocks: blocks[:1] + blocks[2:], 8),
    "blocks swapped": (lambda blocks: [blocks[0], blocks[2], blocks[1]], 8),
    "a block twice": (lambda blocks: [blocks[0], *blocks], 8),
    "a row dropped": (lambda blocks: [blocks[0], blocks[1].slice(1), blocks[2]], 8),
    "a block cut in two": (lambda blocks: [blocks[0].slice(0, 8), blocks[0].slice(8), *blocks[1:]], 0),
    "ended early": (lambda blocks: blocks[:2], 16),
    "nothing": (lambda _: [], 5),
    "one too many": (lambda blocks: [*blocks, blocks[2]], 24),
}


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_feed_is_an_error_at_its_step(index, wrong, rank):
    change, step = WRONG[wrong]
    layout = Layout(make_order(index, 33), 3, 5, 22)
    blocks = blocks_of(layout, index)[rank::3]
    assert len(blocks) == 3 and layout.block_steps == 8
    arrived = []
    with pytest.raises(FeedError, match=rf"rank {rank}, step {step}:"):
        arrived += rank_batches(change(blocks), layout, rank)


def test_a_rank_of_another_size_is_an_error(index):
    """Which of a step's samples a rank gets, their lengths say: of others of that step only the ranks together know."""
    layout = Layout(make_order(index, 33), 2, 0, 8)
    with pytest.raises(FeedError, match="rank 0, step 0"):
        list(rank_batches(blocks_of(layout, index)[::2], replace(layout, world_size=1), 0))
