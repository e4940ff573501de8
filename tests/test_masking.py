"""Masked LM: how many tokens are chosen, which ones, and what stands in their place."""

import json
from collections import Counter

import numpy as np
import pytest
from helpers import tiny_config

from raybert.chance import key_of, keys_of
from raybert.feed import Layout, local_batches
from raybert.masking import Masking, Remasking, mask, unmasked
from raybert.order import SampleOrder
from raybert.preflight import identity

V, CLS, SEP, MASK = 1000, 1, 2, 3
PIECES_FROM = 700  # tokens from here on continue a word
N, L, P = 4000, 64, 10


def masking(whole_words=False, max_ngram=1, probability=0.15, predictions=P):
    ids = np.arange(V)
    is_kept = (ids == CLS) | (ids == SEP)
    return Masking(probability, predictions, max_ngram, MASK, is_kept, (ids >= PIECES_FROM) & whole_words, ids[5:])


def samples(seed=0, num_samples=N):
    """[CLS] A [SEP] B [SEP] of random lengths, padded with zeros."""
    rng = np.random.default_rng(seed)
    tokens, lengths = rng.integers(5, V, (num_samples, L)), rng.integers(5, L + 1, num_samples)
    tokens[:, 0] = CLS
    tokens[np.arange(num_samples), lengths - 1] = SEP
    tokens[np.arange(num_samples), lengths // 2] = SEP
    return tokens * (np.arange(L) < lengths[:, None]), lengths, keys_of(key_of(seed), np.arange(num_samples))


def chosen(made, i):
    """Positions that sample i is to predict."""
    return made["masked_lm_positions"][i][made["masked_lm_weights"][i] == 1].tolist()


def words_of(tokens, length):
    """Where the words of a sample start and stop, by the definition."""
    starts = [
        k
        for k in range(length)
        if tokens[k] not in (CLS, SEP) and (tokens[k] < PIECES_FROM or tokens[k - 1] in (CLS, SEP))
    ]
    stops = [
        next((k for k in range(start + 1, length) if k in starts or tokens[k] in (CLS, SEP)), length)
        for start in starts
    ]
    return list(zip(starts, stops, strict=True))


MODES = {"tokens": (False, 1), "whole words": (True, 1), "3-grams": (True, 3)}


@pytest.mark.parametrize("mode", MODES)
def test_labels_are_what_stood_there_and_nothing_else_changes(mode):
    tokens, lengths, keys = samples()
    made = mask(tokens, lengths, keys, masking(*MODES[mode]))
    for i in range(N):
        places = chosen(made, i)
        assert places == sorted(set(places)) and len(places) == made["masked_lm_weights"][i].sum() > 0
        assert made["masked_lm_weights"][i].tolist() == [1.0] * len(places) + [0.0] * (P - len(places))
        assert (
            not made["masked_lm_positions"][i, len(places) :].any()
            and not made["masked_lm_ids"][i, len(places) :].any()
        )
        assert made["masked_lm_ids"][i, : len(places)].tolist() == tokens[i, places].tolist()
        assert not {CLS, SEP, 0} & set(tokens[i, places].tolist())
        others = np.setdiff1d(np.arange(L), places)
        assert (made["input_ids"][i, others] == tokens[i, others]).all()
    assert (unmasked({**made, "input_mask": lengths}) == tokens).all()


def test_so_many_tokens_are_chosen_as_googles_script_chooses():
    tokens, lengths, keys = samples()
    made = mask(tokens, lengths, keys, masking())
    expected = [min(P, max(1, round(length * 0.15)), length - 3) for length in lengths.tolist()]
    assert made["masked_lm_weights"].sum(axis=1).tolist() == expected


@pytest.mark.parametrize("mode", ["whole words", "3-grams"])
def test_words_are_chosen_whole_and_not_too_many(mode):
    tokens, lengths, keys = samples(num_samples=500)
    made = mask(tokens, lengths, keys, masking(*MODES[mode]))
    num_broken = 0
    for i in range(500):
        places, wanted = set(chosen(made, i)), min(P, max(1, round(int(lengths[i]) * 0.15)))
        assert len(places) <= wanted
        words = words_of(tokens[i].tolist(), int(lengths[i]))
        broken = [word for word in words if 0 < len(places & set(range(*word))) < word[1] - word[0]]
        if broken:  # only where no word is short enough
            assert len(broken) == 1 and len(places) == wanted < min(stop - start for start, stop in words)
            num_broken += 1
    assert num_broken < 25


def test_three_outcomes_in_their_shares():
    """80 % [MASK], 10 % another token, 10 % the same; 20,000 and more are looked at."""
    tokens, lengths, keys = samples()
    for mode in MODES.values():
        made = mask(tokens, lengths, keys, masking(*mode))
        rows, places = np.nonzero(made["masked_lm_weights"])
        found, labels = (
            made["input_ids"][rows, made["masked_lm_positions"][rows, places]],
            made["masked_lm_ids"][rows, places],
        )
        assert abs((found == MASK).mean() - 0.8) < 0.02
        assert abs((found == labels).mean() - 0.1) < 0.015
        assert found[found != MASK].min() >= 5


def test_another_token_is_any_of_the_replacements_alike():
    tokens, lengths, keys = samples(num_samples=40_000)
    made = mask(tokens, lengths, keys, masking())
    rows, places = np.nonzero(made["masked_lm_weights"])
    found, labels = (
        made["input_ids"][rows, made["masked_lm_positions"][rows, places]],
        made["masked_lm_ids"][rows, places],
    )
    others = found[(found != MASK) & (found != labels)]
    counts = np.bincount(others, minlength=V)[5:]
    expected = len(others) / (V - 5)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - (V - 6)) < 5 * np.sqrt(2 * (V - 6))  # five standard deviations


def test_every_place_is_chosen_alike():
    num_samples = 40_000
    tokens = np.tile(np.r_[CLS, np.arange(5, 5 + L - 2), SEP], (num_samples, 1))
    made = mask(tokens, np.full(num_samples, L), keys_of(key_of(4), np.arange(num_samples)), masking())
    counts = np.bincount(made["masked_lm_positions"].ravel(), minlength=L)[1:-1]
    expected = num_samples * P / (L - 2)
    assert abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_lengths_of_ngrams_are_by_their_weights():
    """1, 1/2 and 1/3 where there is room for all: the first n-gram of a long sequence."""
    num_samples, length = 20_000, 400
    tokens = np.tile(np.r_[CLS, np.arange(5, 5 + length - 2), SEP], (num_samples, 1))
    sizes = Counter()
    made = mask(
        tokens, np.full(num_samples, length), keys_of(key_of(9), np.arange(num_samples)), masking(True, 3, 0.0075, 3)
    )
    for i in range(num_samples):
        places = chosen(made, i)
        sizes[len(places), max(places) - min(places)] += 1
    # Three places: one 3-gram by 2/11; a 2-gram and a 1-gram, or three 1-grams, seldom stand together.
    assert abs(sizes[3, 2] / num_samples - 2 / 11) < 0.025
    assert set(size for size, _ in sizes) == {3}


def test_a_sample_without_words_has_no_prediction():
    tokens = np.array([[CLS, SEP, SEP, 0]])
    made = mask(tokens, np.array([3]), keys_of(key_of(1), np.arange(1)), masking())
    assert not made["masked_lm_weights"].any() and (made["input_ids"] == tokens).all()


def features(seed=3):
    tokens, lengths, keys = samples(seed, 300)
    made = mask(tokens.astype(np.uint16), lengths, keys, masking())
    mask_of_inputs = (np.arange(L) < lengths[:, None]).astype(np.uint8)
    return tokens, {**made, "input_mask": mask_of_inputs, "next_sentence_labels": np.zeros(300, np.uint8)}


def remask(features, samples, seed, epochs, masking):
    return Remasking(seed, masking).apply(features, samples, np.broadcast_to(epochs, samples.shape))


def test_dynamic_masking_is_a_function_of_seed_epoch_and_sample():
    """Whatever batch a sample comes in, and however it was masked before."""
    tokens, before = features()
    numbers = np.arange(1000, 1300)
    whole = remask(before, numbers, 5, 2, masking())
    rows = np.random.default_rng(1).permutation(300)
    parts = [
        remask({name: values[part] for name, values in before.items()}, numbers[part], 5, 2, masking())
        for part in np.array_split(rows, 7)
    ]
    again = remask(whole, numbers, 5, 2, masking())
    for name, values in whole.items():
        assert values.dtype == before[name].dtype and values.shape == before[name].shape
        assert (np.concatenate([part[name] for part in parts]) == values[rows]).all()
        assert (again[name] == values).all()
    assert (unmasked(whole) == tokens).all()


@pytest.mark.parametrize("other", [(5, 3), (6, 2), (2, 5), (3, 4)])
def test_every_epoch_and_seed_masks_anew(other):
    """Also where seed + epoch is the same, or they are swapped."""
    _, before = features()
    numbers = np.arange(300)
    one, two = remask(before, numbers, 5, 2, masking()), remask(before, numbers, *other, masking())
    same = (one["masked_lm_positions"] == two["masked_lm_positions"]).all(axis=1)
    assert same.mean() < 0.2  # short samples have few choices


def test_dynamic_masking_covers_every_token_over_the_epochs():
    _, before = features()
    seen = np.zeros((300, L), bool)
    for epoch in range(60):
        made = remask(before, np.arange(300), 5, epoch, masking())
        rows, places = np.nonzero(made["masked_lm_weights"])
        seen[rows, made["masked_lm_positions"][rows, places]] = True
    tokens = unmasked(before)
    assert seen[tokens > SEP].mean() > 0.99


# --- In the feed ------------------------------------------------------------------------------------------------------


def global_batches(index, world_size, start_step, stop_step, window_steps=4):
    """Each step's positions, samples and features, of all ranks together in the order of their positions."""
    order = SampleOrder(index.page_sizes, 11, 32, window_steps)
    remasking = Remasking(11, small_masking(index))
    layout = Layout(order, world_size, start_step, stop_step, remasking)
    for batches in zip(*(local_batches(layout, index, rank) for rank in range(world_size)), strict=True):
        positions = np.concatenate([batch.positions for batch in batches])
        rows = np.argsort(positions)
        features = {
            name: np.concatenate([batch.features[name] for batch in batches])[rows] for name in batches[0].features
        }
        weight = features["masked_lm_weights"].sum()
        assert [batch.global_weight for batch in batches] == [weight] * world_size
        yield positions[rows], np.concatenate([batch.samples for batch in batches])[rows], features


def small_masking(index):
    """For samples of any tokens: 97 of them, none is kept from being masked."""
    size = index.schema.vocab_size
    return Masking(
        0.15, index.schema.max_predictions_per_seq, 1, 4, np.zeros(size, bool), np.zeros(size, bool), np.arange(5, size)
    )


NUM_STEPS = 60  # of 32 samples: 828 samples are two epochs, and a part of the third


def test_a_run_masks_the_same_at_any_world_size_and_from_any_step(index):
    whole = list(global_batches(index, 1, 0, NUM_STEPS))
    for world_size, start in ((3, 0), (2, 17), (5, 26), (1, 51)):
        part = list(global_batches(index, world_size, start, NUM_STEPS))
        for (positions, samples, features), (_, expected_samples, expected) in zip(part, whole[start:], strict=True):
            assert (samples == expected_samples).all() and positions[0] == 32 * start
            assert all((features[name] == values).all() for name, values in expected.items())
            start += 1


def test_every_epoch_of_a_run_masks_anew_what_the_files_hold(index):
    """The same tokens each time; other ones are masked, in the epoch that a position is in."""
    seen = {}
    for positions, samples, features in global_batches(index, 1, 0, NUM_STEPS):
        tokens = unmasked(features)
        for i, sample in enumerate(samples.tolist()):
            epoch = positions[i] // index.num_samples
            seen.setdefault(sample, {})[int(epoch)] = tokens[i].tolist(), features["masked_lm_positions"][i].tolist()
    stored = unmasked(index.read(np.arange(index.num_samples)))
    both = [epochs for epochs in seen.values() if len(epochs) > 1]
    assert len(both) == index.num_samples
    assert all(tokens == stored[sample].tolist() for sample, epochs in seen.items() for tokens, _ in epochs.values())
    assert sum(epochs[0][1] != epochs[1][1] for epochs in both) > 0.7 * len(both)


def test_settings_and_vocabulary_decide_whether_a_run_may_go_on(tmp_path):
    """With dynamic masking alone: masks that the files hold are the same whatever is set."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    for name, tokens in {"one": words, "other": [*words[:5], "b", "a"]}.items():
        (tmp_path / name).write_text("\n".join(tokens))

    def identity_of(vocabulary, masking, probability):
        settings = {"masking": masking, "vocab_file": str(tmp_path / vocabulary), "masked_lm_prob": probability}
        return identity(tiny_config(tmp_path, "", **{f"data.{name}": value for name, value in settings.items()}))

    assert identity_of("one", "static", 0.15) == identity_of("other", "static", 0.2)
    dynamic = [identity_of(name, "dynamic", probability) for name in ("one", "other") for probability in (0.15, 0.2)]
    assert len({json.dumps(each, sort_keys=True) for each in dynamic}) == len(dynamic)
