"""Sentence pairs: the laws of Google's script on every pair, and its figures on a text of Google's own run."""

import json

import numpy as np
import pytest
from helpers import DATA, MORE_DATA, VOCABULARY

from raybert.example import Schema, decode
from raybert.instances import Documents, Recipe, make_features, make_pairs
from raybert.masking import Masking
from raybert.tfrecord import find_records
from raybert.wordpiece import CLS, MASK, SEP, Tokenizer

L, P = 128, 20
SCHEMA = Schema(L, P, len(VOCABULARY.tokens), 2)
CLS_ID, SEP_ID, MASK_ID = (VOCABULARY.ids[token] for token in (CLS, SEP, MASK))
FIGURES = json.loads((DATA / "google_figures.json").read_text())
NUM_COPIES = 400


def documents_of(sentences_by_document):
    """Documents from sentences of token ids."""
    sentences = [sentence for document in sentences_by_document for sentence in document]
    return Documents(
        tokens=np.concatenate([np.array(sentence, np.int32) for sentence in sentences]),
        sentence_starts=np.cumsum([0, *map(len, sentences)]),
        document_starts=np.cumsum([0, *map(len, sentences_by_document)]),
        numbers=np.arange(len(sentences_by_document)),
    )


def random_documents(seed, num_documents=40, longest=60):
    rng = np.random.default_rng(seed)
    return documents_of(
        [
            [rng.integers(1000, 2000, rng.integers(1, longest)) for _ in range(rng.integers(1, 30))]
            for _ in range(num_documents)
        ]
    )


@pytest.fixture(scope="module")
def genesis():
    tokenizer = Tokenizer(VOCABULARY, True)
    texts = (DATA / "genesis.txt").read_text().strip().split("\n\n")
    encoded = [tokenizer.encode(text.split("\n")) for text in texts]
    return documents_of([np.split(tokens.ids, np.cumsum(tokens.lengths)[:-1]) for tokens in encoded])


def masking(whole_words=False):
    is_kept = np.zeros(len(VOCABULARY.tokens), bool)
    is_kept[[CLS_ID, SEP_ID]] = True
    continues = VOCABULARY.continues_word & whole_words
    return Masking(0.15, P, 1, MASK_ID, is_kept, continues, np.flatnonzero(~VOCABULARY.is_special))


def sentence_of(documents, token):
    return int(np.searchsorted(documents.sentence_starts, token, side="right")) - 1


def document_of(documents, token):
    return int(np.searchsorted(documents.document_starts, sentence_of(documents, token), side="right")) - 1


RECIPES = [
    Recipe(L, 0.1),
    Recipe(32, 0.5),
    Recipe(5, 0.1),
    Recipe(L, 0.0),
    Recipe(64, 1.0),
    Recipe(32, 0.1, as_google=True),
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("seed", range(5))
def test_laws_of_a_pair(recipe, seed):
    documents = random_documents(seed)
    pairs = make_pairs(documents, recipe, seed, copy=3)
    sizes = pairs.ranges[:, [1, 3]] - pairs.ranges[:, [0, 2]]
    assert (sizes >= 1).all() and (sizes.sum(axis=1) <= recipe.max_seq_length - 3).all()
    for (a_start, a_stop, b_start, b_stop), is_random in zip(pairs.ranges.tolist(), pairs.is_random_next, strict=True):
        document = document_of(documents, a_start)
        assert document_of(documents, a_stop - 1) == document
        assert document_of(documents, b_stop - 1) == document_of(documents, b_start)
        if is_random:
            assert recipe.as_google or document_of(documents, b_start) != document
        else:
            assert document_of(documents, b_start) == document
            # What lies between A and B was cut off the end of A's last sentences or the start of B's.
            assert sentence_of(documents, a_stop - 1) < sentence_of(documents, b_start)


@pytest.mark.parametrize("seed", range(5))
def test_every_sentence_is_used_in_order_and_none_twice(seed):
    """Sentences that a random next replaces begin the next chunk; with room for all no token is lost."""
    documents = random_documents(seed, longest=8)
    pairs = make_pairs(documents, Recipe(10_000, 0.0), seed, copy=0)
    used = []
    for (a_start, a_stop, b_start, b_stop), is_random in zip(pairs.ranges.tolist(), pairs.is_random_next, strict=True):
        used += [*range(a_start, a_stop), *([] if is_random else range(b_start, b_stop))]
    assert used == list(range(len(documents.tokens)))


def test_a_chunk_of_one_sentence_has_a_random_next():
    documents = documents_of([[[5] * 200]] * 4)
    pairs = make_pairs(documents, Recipe(), 1, copy=0)
    assert len(pairs) == 4 and pairs.is_random_next.all()


def test_a_random_next_is_any_other_document_and_sentence_alike():
    documents = documents_of([[[5] * 200] * 3 for _ in range(6)])
    counts = np.zeros((6, 18))
    for copy in range(1500):
        pairs = make_pairs(documents, Recipe(), 1, copy)
        for (a_start, _, b_start, _), is_random in zip(pairs.ranges, pairs.is_random_next, strict=True):
            if is_random:
                counts[document_of(documents, a_start), sentence_of(documents, b_start)] += 1
    for document in range(6):
        others = np.delete(counts[document], range(3 * document, 3 * document + 3))
        assert counts[document].sum() == others.sum()
        assert abs(others - others.mean()).max() < 5 * np.sqrt(others.mean())


def test_truncation_takes_from_front_and_back_alike():
    documents = documents_of([[[5] * 300] * 2] * 2)
    fronts = []
    for copy in range(2000):
        for a_start, a_stop, *_ in make_pairs(documents, Recipe(short_seq_prob=0.0), 1, copy).ranges.tolist():
            start = documents.sentence_starts[sentence_of(documents, a_start)]
            fronts.append((a_start - start) / (300 - (a_stop - a_start)))
    assert abs(np.mean(fronts) - 0.5) < 0.01


def test_a_document_alone_has_no_random_next():
    alone = documents_of([[[5] * 10] * 40])
    with pytest.raises(ValueError, match="another document, and there is 1"):
        make_pairs(alone, Recipe(), 1, copy=0)
    pairs = make_pairs(alone, Recipe(as_google=True), 1, copy=0)  # Google's script takes it itself
    assert pairs.is_random_next.any()


def test_pairs_are_a_function_of_seed_copy_and_document(genesis):
    one, two = make_pairs(genesis, Recipe(), 7, copy=1), make_pairs(genesis, Recipe(), 7, copy=1)
    assert (one.ranges == two.ranges).all() and (one.keys == two.keys).all()
    assert len(np.unique(one.keys)) == len(one)
    for seed, copy in ((8, 1), (7, 2), (1, 7)):
        other = make_pairs(genesis, Recipe(), seed, copy)
        assert len(other) != len(one) or (other.ranges != one.ranges).any()
        assert not set(other.keys.tolist()) & set(one.keys.tolist())


def test_features_of_a_part_are_those_of_the_whole(genesis):
    pairs = make_pairs(genesis, Recipe(), 7, copy=1)
    whole = make_features(genesis, pairs, SCHEMA, masking(), CLS_ID, SEP_ID)
    rows = np.random.default_rng(0).permutation(len(pairs))[:50]
    part = make_features(genesis, pairs[rows], SCHEMA, masking(), CLS_ID, SEP_ID)
    for name, values in SCHEMA.empty(0).items():
        assert whole[name].dtype == values.dtype and (part[name] == whole[name][rows]).all()


def test_features_are_laid_out_as_bert_reads_them(genesis):
    pairs = make_pairs(genesis, Recipe(), 7, copy=1)
    features = make_features(genesis, pairs, SCHEMA, masking(), CLS_ID, SEP_ID)
    for i, (a_start, a_stop, b_start, b_stop) in enumerate(pairs.ranges.tolist()):
        a, b = genesis.tokens[a_start:a_stop].tolist(), genesis.tokens[b_start:b_stop].tolist()
        tokens, weights = features["input_ids"][i].copy(), features["masked_lm_weights"][i] == 1
        tokens[features["masked_lm_positions"][i][weights]] = features["masked_lm_ids"][i][weights]
        expected = [CLS_ID, *a, SEP_ID, *b, SEP_ID]
        padding = [0] * (L - len(expected))
        assert tokens.tolist() == expected + padding
        assert features["input_mask"][i].tolist() == [1] * len(expected) + padding
        assert features["segment_ids"][i].tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1) + padding
        assert features["next_sentence_labels"][i] == pairs.is_random_next[i]


def figures(features):
    """What `google_figures.json` says of one run."""
    lengths, weights = features["input_mask"].sum(axis=1, dtype=np.int64), features["masked_lm_weights"]
    rows, places = np.nonzero(weights)
    found, labels = (
        features["input_ids"][rows, features["masked_lm_positions"][rows, places]],
        features["masked_lm_ids"][rows, places],
    )
    in_b, is_random = features["segment_ids"].sum(axis=1, dtype=np.int64), features["next_sentence_labels"] == 1
    return {
        "num_samples": len(lengths),
        "tokens": lengths.mean(),
        "full": (lengths == L).mean(),
        "random_next": is_random.mean(),
        "segment_b": in_b.mean(),
        "masked": weights.sum(axis=1).mean(),
        "masked_share": weights.sum() / lengths.sum(),
        "mask_tokens": (found == MASK_ID).mean(),
        "kept": (found == labels).mean(),
        "random_next_b": in_b[is_random].mean(),
    }


@pytest.mark.parametrize("mode", FIGURES)
def test_figures_are_those_of_googles_script(genesis, mode):
    """Means over copies differ by less than four standard errors of both."""
    masked = masking(whole_words=mode == "whole_word")
    runs = [
        figures(make_features(genesis, make_pairs(genesis, Recipe(), 12345, copy), SCHEMA, masked, CLS_ID, SEP_ID))
        for copy in range(NUM_COPIES)
    ]
    for name, (mean, error) in FIGURES[mode].items():
        values = [run[name] for run in runs]
        limit = 4 * np.hypot(error, np.std(values) / np.sqrt(NUM_COPIES))
        assert abs(np.mean(values) - mean) < limit, (name, np.mean(values), mean, limit)


@pytest.mark.skipif(not MORE_DATA.exists(), reason="needs the collection beside the repository")
def test_masking_is_that_of_files_that_googles_script_wrote(genesis):
    """Shares among the 166,000 masked tokens of two of its files, written from other text."""
    content = b"".join(path.read_bytes() for path in sorted((MORE_DATA / "real128").glob("*.tfrecord")))
    records = find_records(content)
    theirs, is_good = decode(records.buffer, records.offsets, records.lengths, SCHEMA)
    assert is_good.all()
    runs = [
        make_features(genesis, make_pairs(genesis, Recipe(), 1, copy), SCHEMA, masking(), CLS_ID, SEP_ID)
        for copy in range(100)
    ]
    ours = {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}
    for name, tolerance in (("masked_share", 0.0005), ("mask_tokens", 0.004), ("kept", 0.003)):
        assert abs(figures(ours)[name] - figures(theirs)[name]) < tolerance, name
    for features in (ours, theirs):  # how many tokens are masked is a function of the length
        lengths = features["input_mask"].sum(axis=1, dtype=np.int64)
        expected = [min(P, max(1, round(length * 0.15))) for length in lengths.tolist()]
        assert features["masked_lm_weights"].sum(axis=1).tolist() == expected
    replaced = [set(_replacements(features).tolist()) for features in (ours, theirs)]
    special = set(np.flatnonzero(VOCABULARY.is_special).tolist()) - {MASK_ID}
    assert not replaced[0] & special and replaced[1] & special  # theirs are drawn from all of the vocabulary


def _replacements(features):
    """Tokens that stand in for another one, [MASK] apart."""
    rows, places = np.nonzero(features["masked_lm_weights"])
    found, labels = (
        features["input_ids"][rows, features["masked_lm_positions"][rows, places]],
        features["masked_lm_ids"][rows, places],
    )
    return found[(found != labels) & (found != MASK_ID)]
