"""Ray Data between the two halves of the feed: windows are read by tasks anywhere, blocks arrive at ranks in order.

With `preserve_order` the splitter gives block i to rank i % world_size, always; `rank_batches` checks that it did.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, DataIterator, Dataset, Datasource, ExecutionOptions, ReadTask
from ray.data.block import BlockMetadata
from ray.train import DataConfig

from raybert.feed import MAX_TASKS, Layout, window_blocks
from raybert.history import Attempt
from raybert.index import Index
from raybert.masking import Remasking
from raybert.order import SampleOrder

TRAIN = "train"


class WindowSource(Datasource):
    """The windows of a layout; a read task reads one window, or some when there would be too many tasks."""

    def __init__(self, layout: Layout, index: ray.ObjectRef[Index]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layout = layout
        self._shared = ray.put(layout)  # a task that carried every page's size itself would be megabytes, times 10,000
        self._index = index

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, *_: object, **__: object) -> list[ReadTask]:
        """One task for every `windows_per_task` windows, whatever parallelism Ray would like."""
        windows = self._layout.windows or range(1)  # a run at its end has none, but a dataset needs a task
        size = windows_per_task(len(windows))
        metadata = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [
            ReadTask(_read_fn(windows[first : first + size], self._shared, self._index), metadata)
            for first in range(0, len(windows), size)
        ]


def windows_per_task(num_windows: int) -> int:
    return max(1, -(-num_windows // MAX_TASKS))


def _read_fn(
    windows: range, layout: ray.ObjectRef[Layout], index: ray.ObjectRef[Index]
) -> Callable[[], Iterator[pa.Table]]:
    def read() -> Iterator[pa.Table]:
        for window in windows:
            yield from window_blocks(window, *_fetched(layout, index))

    return read


_kept: dict[str, tuple[Layout, Index]] = {}


def _fetched(layout: ray.ObjectRef[Layout], index: ray.ObjectRef[Index]) -> tuple[Layout, Index]:
    """What read tasks share; a process keeps it, and what was worked out from it, for its next task.

    Kept are copies, not the references or what lies in the node's object store: with one of those held, Ray takes the
    process for busy, and its node, needed or not, would never be taken away for being idle.
    """
    name = layout.hex() + index.hex()
    if name not in _kept:
        _kept.clear()
        _kept[name] = copy.deepcopy((ray.get(layout), ray.get(index)))
    return _kept[name]


def split(layout: Layout, index: ray.ObjectRef[Index]) -> list[DataIterator]:
    """One iterator a rank over its blocks, in order."""
    source = WindowSource(layout, index)
    num_tasks = max(1, -(-len(layout.windows) // windows_per_task(len(layout.windows))))
    dataset: Dataset = ray.data.read_datasource(source, override_num_blocks=num_tasks)
    dataset = dataset.repartition(target_num_rows_per_block=layout.block_rows, strict=True)
    dataset.context.execution_options = ExecutionOptions(preserve_order=True)
    return list(dataset.streaming_split(layout.world_size, equal=True))


class AttemptConfig(DataConfig):
    """Where every attempt begins: runs anew for each worker group, and alone decides the step and the checkpoint.

    The decision reaches the workers as the attribute `attempt` of their iterators.
    """

    def __init__(
        self,
        order: SampleOrder,
        index: ray.ObjectRef[Index],
        num_steps: int,
        begin: Callable[[int], Attempt],
        remasking: Remasking | None = None,
    ) -> None:
        """Args:
        order: of the run.
        index: of the training files, in the object store.
        num_steps: of the run.
        begin: records a new attempt for a world size and says where it starts.
        remasking: of the training samples.
        """
        super().__init__()
        self._order, self._index, self._num_steps, self._begin = order, index, num_steps, begin
        self._remasking = remasking

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *_: object, **__: object
    ) -> list[dict[str, DataIterator]]:
        """A new attempt, and its iterators by rank."""
        quiet_data()
        attempt = self._begin(world_size)
        layout = Layout(self._order, world_size, attempt.start_step, self._num_steps, self._remasking)
        iterators = split(layout, self._index)
        for iterator in iterators:
            iterator.attempt = attempt  # type: ignore[attr-defined]
        return [dict.fromkeys(datasets, iterator) for iterator in iterators]


def placeholder() -> Dataset:
    """What stands for the training data until an attempt is configured: `DataConfig` needs a dataset to configure."""
    return ray.data.range(1)


def blocks(iterator: DataIterator) -> Iterator[pa.Table]:
    """A rank's blocks as they arrive, the next one fetched ahead."""
    whole: Any = None  # no batch size: blocks as they are
    yield from iterator.iter_batches(batch_size=whole, batch_format="pyarrow", prefetch_batches=2)


def quiet_data() -> None:
    """Ray Data without progress bars."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
