"""Instances: sentence pairs of documents, as google-research/bert's create_pretraining_data.py makes them.

A document's sentences are gathered into chunks of about a sequence's length. A chunk is cut into A and B at a sentence;
half of the time B is instead taken from another document (label 1: a random next), and the sentences that it replaces
begin the next chunk. A chunk of one sentence always gets a random next, so these are more than half. What is too long
is cut token by token, the longer side first, at its front or back by chance (Devlin et al. 2019, appendix A.2).

Tokens of A, and of B, stand next to each other in the documents, so a pair is two ranges. Chance is a function of
(seed, copy, document), whatever else is made beside it.

Shape letters: T tokens, S sentences, D documents, N pairs, L sequence length, P predictions of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raybert.chance import Keys, Stream, below, key_of, keys_of, uniform
from raybert.example import Arrays, Schema
from raybert.jit import Flags, Ints, compiled
from raybert.masking import Masking, mask

Matrix = npt.NDArray[Any]

NUM_SPECIAL = 3  # [CLS], and [SEP] behind A and behind B
MIN_SEQ_LENGTH = NUM_SPECIAL + 2
_OTHER_TRIES = 10  # of Google's script, for another document
_PAIRS, _MASKS = 0, 1  # what a random stream is for; part of its key


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents of sentences of tokens; none is empty.

    Args:
        tokens: [T] token ids.
        sentence_starts: [S + 1] first token of each sentence, and T.
        document_starts: [D + 1] first sentence of each document, and S.
        numbers: [D] which document each one is, in the whole corpus.
    """

    tokens: Matrix
    sentence_starts: Ints
    document_starts: Ints
    numbers: Ints

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class Recipe:
    """How documents become pairs.

    Args:
        max_seq_length: L, tokens of a sequence with [CLS] and [SEP]s; at least MIN_SEQ_LENGTH.
        short_seq_prob: share of documents whose sequences are shorter, by a length drawn for each.
        as_google: where a document has no other beside it, or ten draws found none, it is its own random next, as in
            Google's script; false: never.
    """

    max_seq_length: int = 128
    short_seq_prob: float = 0.1
    as_google: bool = False


@dataclass(frozen=True, eq=False)
class Pairs:
    """Sentence pairs as ranges of tokens, N of them.

    Args:
        ranges: [N, 4] first and last (exclusive) token of A, then of B.
        is_random_next: [N] whether B is of another document.
        keys: [N] what chance depends on from here on.
    """

    ranges: Ints
    is_random_next: Flags
    keys: Keys

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, rows: Any) -> Pairs:
        return Pairs(self.ranges[rows], self.is_random_next[rows], self.keys[rows])


def make_pairs(documents: Documents, recipe: Recipe, seed: int, copy: int) -> Pairs:
    """The pairs of all documents, document after document.

    Args:
        documents: where random nexts come from, too; two or more, unless `recipe.as_google`.
        recipe: how.
        seed: of everything random.
        copy: which of the `dupe_factor` copies of the corpus it is.

    Raises:
        ValueError: there is one document only.
    """
    if len(documents) < 2 and not recipe.as_google:
        raise ValueError(f"a random next comes from another document, and there is {len(documents)}")
    num_sentences = len(documents.sentence_starts) - 1  # every pair uses up one or more
    ranges, is_random = np.zeros((num_sentences, 4), np.int64), np.zeros(num_sentences, np.bool_)
    owners = np.zeros(num_sentences, np.int64)
    count = _pair_documents(
        documents.sentence_starts,
        documents.document_starts,
        keys_of(key_of(seed, copy, _PAIRS), documents.numbers),
        recipe.max_seq_length - NUM_SPECIAL,
        recipe.short_seq_prob,
        recipe.as_google,
        ranges,
        is_random,
        owners,
    )
    owners = owners[:count]
    places = np.arange(count) - np.searchsorted(owners, owners)  # of each pair among its document's
    keys = keys_of(key_of(seed, copy, _MASKS), documents.numbers)
    return Pairs(ranges[:count], is_random[:count], keys_of(keys[owners], places))


def make_features(documents: Documents, pairs: Pairs, schema: Schema, masking: Masking, cls: int, sep: int) -> Arrays:
    """Pairs as masked samples.

    Args:
        documents: that the pairs are of.
        pairs: N of them.
        schema: L and P.
        masking: how tokens are masked; its P is the schema's.
        cls, sep: token ids.

    Returns:
        google-research/bert's feature names to [N, ...] arrays, as `schema.empty(N)`.
    """
    features = schema.empty(len(pairs))
    tokens, lengths = np.zeros((len(pairs), schema.max_seq_length), np.int32), np.zeros(len(pairs), np.int64)
    _lay_out(documents.tokens, pairs.ranges, cls, sep, tokens, lengths, features["segment_ids"])
    features["input_mask"][:] = np.arange(schema.max_seq_length) < lengths[:, None]
    features["next_sentence_labels"][:] = pairs.is_random_next
    for name, values in mask(tokens, lengths, pairs.keys, masking).items():
        features[name][:] = values
    return features


@compiled
def _pair_documents(
    sentence_starts: Ints,
    document_starts: Ints,
    keys: Keys,
    max_num_tokens: int,
    short_seq_prob: float,
    as_google: bool,
    ranges: Ints,
    is_random: Flags,
    owners: Ints,
) -> int:
    """Fill in the pairs of all documents; how many there are."""
    count = 0
    for document in range(len(keys)):
        stream = keys[document : document + 1].copy()
        target = max_num_tokens
        if uniform(stream) < short_seq_prob:
            target = 2 + below(max_num_tokens - 1, stream)
        last = document_starts[document + 1] - 1
        first = i = document_starts[document]  # the chunk is the sentences [first, i]
        while i <= last:
            if i == last or sentence_starts[i + 1] - sentence_starts[first] >= target:
                size = i - first + 1
                in_a = 1 if size == 1 else 1 + below(size - 1, stream)
                pair = ranges[count]
                pair[0], pair[1] = sentence_starts[first], sentence_starts[first + in_a]
                pair[2], pair[3] = pair[1], sentence_starts[i + 1]
                if size == 1 or uniform(stream) < 0.5:
                    is_random[count] = True
                    other = _draw_other(document, len(keys), as_google, stream)
                    wanted = target - (pair[1] - pair[0])
                    pair[2], pair[3] = _draw_next(other, wanted, sentence_starts, document_starts, stream)
                    i -= size - in_a
                _truncate(pair, max_num_tokens, stream)
                owners[count] = document
                count += 1
                first = i + 1
            i += 1
    return count


@compiled
def _draw_other(document: int, num_documents: int, as_google: bool, stream: Stream) -> int:
    """A document that is not this one."""
    if not as_google:
        other = below(num_documents - 1, stream)
        return other + 1 if other >= document else other
    for _ in range(_OTHER_TRIES):
        other = below(num_documents, stream)
        if other != document:
            break
    return other


@compiled
def _draw_next(
    document: int, wanted: int, sentence_starts: Ints, document_starts: Ints, stream: Stream
) -> tuple[int, int]:
    """A random sentence of a document and those behind it, until there are `wanted` tokens; as a range of tokens."""
    first, stop = document_starts[document], document_starts[document + 1]
    i = first + below(stop - first, stream)
    start = sentence_starts[i]
    while i < stop - 1 and sentence_starts[i + 1] - start < wanted:
        i += 1
    return start, sentence_starts[i + 1]


@compiled
def _truncate(pair: Ints, max_num_tokens: int, stream: Stream) -> None:
    """Drop tokens of the longer side, at its front or back by chance, until A and B fit."""
    while pair[1] - pair[0] + pair[3] - pair[2] > max_num_tokens:
        side = 0 if pair[1] - pair[0] > pair[3] - pair[2] else 2
        if uniform(stream) < 0.5:
            pair[side] += 1
        else:
            pair[side + 1] -= 1


@compiled
def _lay_out(
    document_tokens: Matrix, ranges: Ints, cls: int, sep: int, tokens: Matrix, lengths: Ints, segments: Matrix
) -> None:
    """Fill in [CLS] A [SEP] B [SEP], the lengths, and 1 for the segment of B."""
    for i in range(len(ranges)):
        size_a, size_b = ranges[i, 1] - ranges[i, 0], ranges[i, 3] - ranges[i, 2]
        tokens[i, 0], tokens[i, size_a + 1], tokens[i, size_a + size_b + 2] = cls, sep, sep
        for k in range(size_a):
            tokens[i, 1 + k] = document_tokens[ranges[i, 0] + k]
        for k in range(size_b):
            tokens[i, size_a + 2 + k] = document_tokens[ranges[i, 2] + k]
        lengths[i] = size_a + size_b + NUM_SPECIAL
        segments[i, size_a + 2 : size_a + size_b + 3] = 1
