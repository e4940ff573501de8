"""What the tests share: synthetic shards, and configurations small enough for milliseconds."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

import raybert
from raybert.config import (
    CheckpointConfig,
    ClusterConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    TrainingConfig,
)
from raybert.example import Schema, encode_example
from raybert.index import Index, index_shard
from raybert.plan import plan
from raybert.step import train_step
from raybert.storage import Directory, find_files
from raybert.tfrecord import write_tfrecord
from raybert.wordpiece import read_vocabulary

DATA = Path(__file__).parent / "data"
MORE_DATA = Path(__file__).parents[2] / "shared" / "data"  # a larger collection beside the repository, if there is one
SAMPLE_FILE = DATA / "tf_examples.tfrecord"
VOCAB_FILE = Path(raybert.__file__).parent / "sample" / "vocab.txt"
VOCABULARY = read_vocabulary(str(VOCAB_FILE))
SAMPLE_SCHEMA = Schema(max_seq_length=128, max_predictions_per_seq=20, vocab_size=30522, type_vocab_size=2)
TINY_SCHEMA = Schema(max_seq_length=16, max_predictions_per_seq=4, vocab_size=97, type_vocab_size=2)
TINY_SHARDS = (300, 7, 521)  # samples; pages hold 256
TINY_MODEL = ModelConfig(
    vocab_size=97,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
)


def random_sample(rng, seq_length, predictions, vocab_size):
    """A sample of two segments, with 1 to `predictions` masked places among its tokens and padding behind them."""
    num_tokens = int(rng.integers(max(3, predictions), seq_length + 1))
    num_masked = int(rng.integers(1, predictions + 1))
    tokens, masked = np.arange(seq_length) < num_tokens, np.arange(predictions) < num_masked
    places = np.sort(rng.choice(num_tokens, predictions, replace=False))
    return {
        "input_ids": rng.integers(1, vocab_size, seq_length) * tokens,
        "input_mask": tokens.astype(np.int64),
        "segment_ids": np.where(np.arange(seq_length) >= num_tokens // 2, tokens, 0).astype(np.int64),
        "masked_lm_positions": places * masked,
        "masked_lm_ids": rng.integers(1, vocab_size, predictions) * masked,
        "masked_lm_weights": masked.astype(np.float32),
        "next_sentence_labels": rng.integers(0, 2, 1),
    }


def take_step(state, batch, training, optimizer, world):
    """Plan a step, and take it."""
    return train_step(state, plan(batch, state.model.config, training, world.device), training, optimizer, world)


def write_samples(path, num_samples, seed, seq_length=16, predictions=4, vocab_size=97, compression=""):
    """Write a file of random samples; returns its path."""
    rng = np.random.default_rng(seed)
    samples = (random_sample(rng, seq_length, predictions, vocab_size) for _ in range(num_samples))
    write_tfrecord(path, (encode_example(sample) for sample in samples), compression)
    return path


def build_index(pattern, schema, cache):
    """The index over the files of a glob."""
    files = find_files(str(pattern), "data.input_files")
    return Index([index_shard(file, schema, Directory(str(cache))) for file in files], schema)


def tiny_index(directory):
    """The index over shards of unequal size, which are written into `directory` as shard-*.tfrecord."""
    directory = Path(directory)
    for number, num_samples in enumerate(TINY_SHARDS):
        write_samples(directory / f"shard-{number}.tfrecord", num_samples, seed=number)
    return build_index(directory / "shard-*.tfrecord", TINY_SCHEMA, directory / "index")


def tiny_config(run_dir, data_glob, **overrides):
    """A run of 8 steps of 32 samples; overrides are dotted: **{"training.num_steps": 12}."""
    config = Config(
        run_dir=str(run_dir),
        data=DataConfig(input_files=str(data_glob), max_seq_length=16, max_predictions_per_seq=4, window_size=128),
        model=TINY_MODEL,
        training=TrainingConfig(num_steps=8, global_batch_size=32, micro_batch_size=8, log_every_steps=2),
        checkpoint=CheckpointConfig(every_steps=4),
        evaluation=EvaluationConfig(),
        cluster=ClusterConfig(num_workers=0),
    )
    sections = defaultdict(dict)
    for name, value in overrides.items():
        section, _, key = name.rpartition(".")
        sections[section][key] = value
    whole = sections.pop("", {})
    return replace(config, **whole, **{name: replace(getattr(config, name), **new) for name, new in sections.items()})
