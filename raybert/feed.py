"""The feed: windows of the sample order become rank blocks; blocks become each rank's batches, checked on arrival.

A block is a table of one rank's slices of k consecutive steps. Ray Data carries blocks between the two halves
(`ingest`); in one process they are joined directly, with the same result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raybert.deal import deal
from raybert.history import checksum
from raybert.index import Index
from raybert.masking import Remasking
from raybert.order import SampleOrder, Samples, rank_slice

Arrays = dict[str, npt.NDArray[np.generic]]

POSITION, SAMPLE, STEP_WEIGHT = "position", "sample", "step_weight"
MIN_BLOCK_ROWS = 8192  # smaller blocks cost the splitter more than they carry
MAX_TASKS = 10_000  # read tasks of one execution; more of them delay the first batch


@dataclass(frozen=True)
class RankBatch:
    """One rank's slice of a global batch, the longest samples first.

    Args:
        step: whose global batch it is.
        first: place in the run of its first sample, once the global batch is dealt (see `deal`).
        features: google-research/bert's feature names to [B, ...] arrays.
        positions: [B] positions in the run, in any order.
        samples: [B] samples of the index.
        global_weight: sum of `masked_lm_weights` over the global batch.
        global_checksum: of the global batch (see `history.checksum`).
    """

    step: int
    first: int
    features: Arrays
    positions: Samples
    samples: Samples
    global_weight: float
    global_checksum: int


class FeedError(RuntimeError):
    """What arrived at a rank is not what the sample order says: a defect of ours or a file that changed."""


@dataclass(frozen=True)
class Layout:
    """How a window is cut into blocks for a world size; absolute steps, so that a resume cuts alike.

    Args:
        order: the sample order.
        world_size: number of ranks.
        start_step, num_steps: the steps that are still to be trained are [start_step, num_steps).
        remasking: masks the samples anew each epoch; None: they stay as they are.
    """

    order: SampleOrder
    world_size: int
    start_step: int
    num_steps: int
    remasking: Remasking | None = None

    @property
    def slice_rows(self) -> int:
        """Rows of every rank slice; shorter ones are padded with weight-0 rows."""
        return -(-self.order.global_batch_size // self.world_size)

    @property
    def block_steps(self) -> int:
        """k: steps of one block; a power of two that divides K."""
        wanted = -(-MIN_BLOCK_ROWS // self.slice_rows)
        return min(self.order.window_steps, 1 << (wanted - 1).bit_length())

    @property
    def block_rows(self) -> int:
        return self.block_steps * self.slice_rows

    @property
    def windows(self) -> range:
        """The windows that hold steps still to be trained."""
        size = self.order.window_steps
        return range(self.start_step // size, -(-self.num_steps // size))

    def groups(self, window: int) -> range:
        """First steps of the window's k-step groups that hold steps still to be trained."""
        size, k = self.order.window_steps, self.block_steps
        first = max(window * size, self.start_step // k * k)
        return range(first, min((window + 1) * size, self.num_steps), k)


def window_blocks(window: int, layout: Layout, index: Index) -> Iterator[pa.Table]:
    """Read a window once and give its blocks: group after group, each as one block of every rank, in rank order."""
    groups = layout.groups(window)
    if not groups:
        return
    order, k = layout.order, layout.block_steps
    batch_size, first_step = order.global_batch_size, window * order.window_steps
    start, stop = (groups[0] - first_step) * batch_size, (groups[-1] + k - first_step) * batch_size
    samples = order.window(window)[start:stop]
    features, positions = index.read(samples), np.arange(len(samples)) + groups[0] * batch_size
    if layout.remasking is not None:
        features = layout.remasking.apply(features, samples, positions // order.num_samples)
    dealt = deal(features["input_mask"].sum(axis=1, dtype=np.int64).reshape(-1, batch_size), layout.world_size)
    dealt += np.arange(len(dealt))[:, None] * batch_size
    weights = features["masked_lm_weights"].reshape(-1, batch_size * features["masked_lm_weights"].shape[1])
    columns: Arrays = {
        **features,
        POSITION: positions,
        SAMPLE: samples,
        STEP_WEIGHT: np.repeat(weights.sum(axis=1, dtype=np.float64), batch_size),
    }
    for group in range(len(groups)):
        for rank in range(layout.world_size):
            rows = dealt[group * k : (group + 1) * k, rank_slice(batch_size, rank, layout.world_size)].ravel()
            yield _table({name: _pad(column[rows], k, layout.slice_rows) for name, column in columns.items()})


def _pad(column: npt.NDArray[np.generic], num_steps: int, slice_rows: int) -> npt.NDArray[np.generic]:
    """Every step's slice brought to `slice_rows` rows with zeros."""
    slices = column.reshape(num_steps, -1, *column.shape[1:])
    missing = slice_rows - slices.shape[1]
    if not missing:
        return column
    widths = [(0, 0), (0, missing)] + [(0, 0)] * (slices.ndim - 2)
    return np.pad(slices, widths).reshape(num_steps * slice_rows, *column.shape[1:])


def _table(columns: Arrays) -> pa.Table:
    return pa.table({name: _column(values) for name, values in columns.items()})


def _column(values: npt.NDArray[np.generic]) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).ravel())
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _array(column: pa.ChunkedArray) -> npt.NDArray[np.generic]:
    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):  # no chunk at all
        whole = pa.concat_arrays(whole.chunks)
    if isinstance(whole.type, pa.FixedSizeListType):
        return np.asarray(whole.flatten()).reshape(len(whole), whole.type.list_size)
    return np.asarray(whole)


def rank_batches(blocks: Iterable[pa.Table], layout: Layout, rank: int) -> Iterator[RankBatch]:
    """One rank's batches of the steps [start_step, num_steps), each checked against the sample order.

    Args:
        blocks: the rank's blocks as they arrive.
        layout: how they were cut.
        rank: whose they are.

    Raises:
        FeedError: a block is missing, too many, or holds other samples than the order says.
    """
    step = layout.start_step // layout.block_steps * layout.block_steps
    mine = rank_slice(layout.order.global_batch_size, rank, layout.world_size)
    for block in blocks:
        if step >= layout.num_steps:
            raise FeedError(f"rank {rank}, step {step}: a block arrived after the last step")
        columns = {name: _array(block[name]) for name in block.column_names}
        if len(columns[SAMPLE]) != layout.block_rows:
            found, expected = len(columns[SAMPLE]), layout.block_rows
            raise FeedError(f"rank {rank}, step {step}: a block of {found} rows arrived, expected {expected}")
        for first_row in range(0, layout.block_rows, layout.slice_rows):
            if layout.start_step <= step < layout.num_steps:
                rows = slice(first_row, first_row + mine.stop - mine.start)
                yield _rank_batch(
                    step, {name: column[rows] for name, column in columns.items()}, layout.order, rank, mine
                )
            step += 1
    if max(step, layout.start_step) < layout.num_steps:
        raise FeedError(
            f"rank {rank}, step {max(step, layout.start_step)}: the feed ended before step {layout.num_steps}"
        )


def _rank_batch(step: int, columns: Arrays, order: SampleOrder, rank: int, mine: slice) -> RankBatch:
    """A rank's slice of a step; it holds what the sample order says, each sample once.

    Raises:
        FeedError: it does not.
    """
    positions, samples = (columns[name].astype(np.int64, copy=False) for name in (POSITION, SAMPLE))
    global_positions, global_samples = order.positions(step), order.global_batch(step)
    within = positions - global_positions[0]
    is_inside = (within >= 0) & (within < len(global_samples))
    is_right = is_inside & (global_samples[np.where(is_inside, within, 0)] == samples)
    if not is_right.all():
        k = int(np.argmin(is_right))
        expected = (
            f"sample {global_samples[within[k]]}"
            if is_inside[k]
            else (f"positions {global_positions[0]} to {global_positions[-1]}")
        )
        raise FeedError(
            f"rank {rank}, step {step}: sample {samples[k]} arrived for position {positions[k]}, expected {expected}"
        )
    if len(np.unique(within)) != len(within):
        raise FeedError(f"rank {rank}, step {step}: a sample arrived twice, positions {np.sort(positions)[:8]}...")
    meta = {POSITION, SAMPLE, STEP_WEIGHT}
    return RankBatch(
        step=step,
        first=int(global_positions[0]) + mine.start,
        features={name: column for name, column in columns.items() if name not in meta},
        positions=positions,
        samples=samples,
        global_weight=float(columns[STEP_WEIGHT][0]),
        global_checksum=checksum(global_positions, global_samples),
    )


def local_batches(layout: Layout, index: Index, rank: int = 0) -> Iterator[RankBatch]:
    """A rank's batches, read in this process."""
    blocks = (
        block
        for window in layout.windows
        for number, block in enumerate(window_blocks(window, layout, index))
        if number % layout.world_size == rank
    )
    return rank_batches(blocks, layout, rank)
