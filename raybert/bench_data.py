"""What the benchmarks read: the index, the sample order and the first batches of a configuration."""

from __future__ import annotations

import tempfile
from pathlib import Path

from raybert.config import Config
from raybert.example import Schema
from raybert.feed import Layout, RankBatch, local_batches
from raybert.index import Index, check_shards, index_shard
from raybert.order import SampleOrder, steps_per_window
from raybert.storage import Directory, find_files


def schema(config: Config) -> Schema:
    """What each sample must look like."""
    data, model = config.data, config.model
    return Schema(data.max_seq_length, data.max_predictions_per_seq, model.vocab_size, model.type_vocab_size)


def build_index(config: Config, cache: Path) -> Index:
    """The index of the configured files.

    Raises:
        UserError: a file is damaged or does not fit the configuration.
    """
    files = find_files(config.data.input_files, "data.input_files")
    shards = [index_shard(file, schema(config), Directory(str(cache))) for file in files]
    check_shards(shards, "data.input_files", "error")
    return Index(shards, schema(config))


def sample_order(config: Config, index: Index) -> SampleOrder:
    """The order that a run of this configuration has."""
    size = config.training.global_batch_size
    return SampleOrder(index.page_sizes, config.training.seed, size, steps_per_window(config.data.window_size, size))


def batches_in_memory(config: Config, num_steps: int) -> list[RankBatch]:
    """The first batches of the sample order, at most one epoch."""
    with tempfile.TemporaryDirectory(prefix="raybert-") as cache:
        index = build_index(config, Path(cache))
        num_steps = min(num_steps, max(1, index.num_samples // config.training.global_batch_size))
        return list(local_batches(Layout(sample_order(config, index), 1, 0, num_steps), index))
