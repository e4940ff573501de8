"""Micro-batches hold the real tokens of their samples, and nothing else."""

import numpy as np
import pytest
import torch
from helpers import TINY_SCHEMA

from raybert.batch import micro_batch, micro_batches

L, P = TINY_SCHEMA.max_seq_length, TINY_SCHEMA.max_predictions_per_seq


def features(lengths, seed=0):
    """Samples of these lengths; each token's id says where it stands: 1 + place in the flattened batch, modulo 97."""
    random, samples = np.random.default_rng(seed), TINY_SCHEMA.empty(len(lengths))
    samples["input_ids"][:] = ((np.arange(len(lengths) * L) + 1) % 97).reshape(-1, L)
    samples["input_mask"][:] = np.arange(L) < np.array(lengths)[:, None]
    samples["segment_ids"][:] = np.arange(L) % 2
    for row, length in enumerate(lengths):
        count = random.integers(0, P + 1) if length >= P else 0
        samples["masked_lm_positions"][row, :count] = np.sort(random.choice(length, count, replace=False))
        samples["masked_lm_ids"][row, :count] = random.integers(0, 97, count)
        samples["masked_lm_weights"][row, :count] = 1 + np.arange(count)
    samples["next_sentence_labels"][:] = np.arange(len(lengths)) % 2
    return samples


@pytest.mark.parametrize("bucket", [1, 8, 64])
@pytest.mark.parametrize("lengths", [[16], [1], [3, 16, 16, 7], [5, 5, 5], [1, 2, 3, 4, 5, 16]])
def test_real_tokens_lie_one_behind_the_other(lengths, bucket):
    samples = features(lengths)
    batch = micro_batch(samples, bucket)
    order = np.argsort(-np.array(lengths), kind="stable")
    ids = np.concatenate([samples["input_ids"][row, : lengths[row]] for row in order])
    total = -(-sum(lengths) // bucket) * bucket
    assert batch.tokens.input_ids.tolist() == [*ids, *[0] * (total - sum(lengths))]
    assert batch.tokens.positions.tolist()[: sum(lengths)] == [at for row in order for at in range(lengths[row])]
    assert batch.tokens.segment_ids.tolist()[: sum(lengths)] == [at % 2 for row in order for at in range(lengths[row])]
    starts = batch.tokens.sequences.starts.tolist()
    assert np.diff(starts)[: len(lengths)].tolist() == sorted(lengths, reverse=True)
    assert (starts[0], starts[-1]) == (0, total) and max(np.diff(starts)) <= batch.tokens.sequences.longest == L
    assert batch.next_sentence_labels.tolist() == [row % 2 for row in order]


def test_what_is_to_be_predicted_is_found_among_them():
    samples = features([9, 16, 4, 12, 16], seed=3)
    batch = micro_batch(samples)
    rows, columns = np.nonzero(samples["masked_lm_weights"])
    positions = samples["masked_lm_positions"][rows, columns]
    assert len(rows) > 5
    found = batch.tokens.input_ids[batch.masked_places]
    assert found.tolist() == samples["input_ids"][rows, positions].tolist()
    assert batch.masked_labels.tolist() == samples["masked_lm_ids"][rows, columns].tolist()
    assert batch.masked_weights.tolist() == samples["masked_lm_weights"][rows, columns].tolist()


def test_a_sample_keeps_its_first_token_and_what_is_to_be_predicted():
    """Whatever its mask says: one without any token, and one whose mask has holes."""
    samples = features([0, 6])
    samples["input_mask"][1, 2] = 0
    samples["masked_lm_positions"][1, 0], samples["masked_lm_weights"][1, 0] = 9, 1.0
    samples["masked_lm_weights"][1, 1:] = 0
    batch = micro_batch(samples)
    assert batch.tokens.positions.tolist() == [0, 1, 3, 4, 5, 9, 0]
    assert batch.tokens.positions[batch.masked_places].tolist() == [9]
    assert batch.next_sentence_labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("size", "max_tokens", "starts"),
    [
        (3, 0, [0, 3, 6]),
        (100, 0, [0]),
        (100, 20, [0, 2, 3, 5]),
        (2, 20, [0, 2, 3, 5, 7]),
        (100, 1, [0, 1, 2, 3, 4, 5, 6, 7]),
        (100, 16, [0, 1, 2, 3, 4, 7]),
        (100, 10**6, [0]),
    ],
)
def test_a_batch_is_cut_by_samples_and_by_tokens(size, max_tokens, starts):
    samples = features([12, 8, 16, 16, 4, 6, 6, 4])
    parts = list(micro_batches(samples, size, max_tokens))
    assert [start for start, _ in parts] == starts
    labels = torch.cat([part.next_sentence_labels for _, part in parts])
    assert sorted(labels.tolist()) == sorted(samples["next_sentence_labels"].tolist())
    assert sum(len(part.tokens.input_ids) for _, part in parts) == 72
