"""What the benchmarks read: the index, the sample order and the first batches of a configuration."""

from __future__ import annotations

import tempfile
from operator import attrgetter
from pathlib import Path

from raybert.config import Config
from raybert.feed import Layout, RankBatch, local_batches
from raybert.index import Index, check_shards, index_shard
from raybert.preflight import sample_order, schema
from raybert.storage import Directory, find_files


def build_index(config: Config, cache: Path, option: str = "data.input_files") -> Index:
    """The index of the files that an option names.

    Raises:
        UserError: a file is damaged or does not fit the configuration.
    """
    files = find_files(attrgetter(option)(config), option)
    shards = [index_shard(file, schema(config), Directory(str(cache))) for file in files]
    check_shards(shards, option, "error")
    return Index(shards, schema(config))


def batches_in_memory(config: Config, num_steps: int) -> list[RankBatch]:
    """The first batches of the sample order, at most one epoch."""
    with tempfile.TemporaryDirectory(prefix="raybert-") as cache:
        index = build_index(config, Path(cache))
        num_steps = min(num_steps, max(1, index.num_samples // config.training.global_batch_size))
        return list(local_batches(Layout(sample_order(config, index), 1, 0, num_steps), index))
