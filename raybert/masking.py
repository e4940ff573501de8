"""Masked LM: which tokens of a sample are to be predicted, and what stands in their place (Devlin et al. 2019, 3.1).

Of a sample 15 % of the tokens are chosen: single tokens, whole words, or runs of whole words (n-grams). Of the chosen
ones 80 % become [MASK], 10 % another token, and 10 % stay. Whole words: google-research/bert, which decides token by
token what to put in place; n-grams: TensorFlow Model Garden, an n-gram of n words by a weight of 1/n, and one decision
for all of its tokens. Everything is a function of the sample and of its key.

Shape letters: N samples, L tokens of each, P predictions of each, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raybert.chance import Keys, Stream, below, key_of, keys_of, uniform
from raybert.jit import Flags, Ints, as_int, compiled
from raybert.wordpiece import CLS, MASK, SEP, Vocabulary

Arrays = dict[str, npt.NDArray[np.generic]]
Matrix = npt.NDArray[Any]

_MASK_SHARE, _OTHER_SHARE = 0.8, 0.1


@dataclass(frozen=True, eq=False)
class Masking:
    """How samples are masked.

    Args:
        probability: share of a sample's tokens, [CLS] and [SEP] counted, that is to be predicted.
        max_predictions_per_seq: P, at most so many.
        max_ngram: longest run of words that is masked as one; 1: single words.
        mask_id: the token [MASK].
        is_kept: [V] tokens that are never chosen: [CLS] and [SEP].
        continues_word: [V] tokens that belong to the word before them; all false: tokens are masked one by one.
        replacements: token ids that stand in for a chosen token.
    """

    probability: float
    max_predictions_per_seq: int
    max_ngram: int
    mask_id: int
    is_kept: Flags
    continues_word: Flags
    replacements: Ints


def mask(tokens: Matrix, lengths: Ints, keys: Keys, masking: Masking) -> Arrays:
    """Choose and replace tokens.

    Args:
        tokens: [N, L] token ids, padded.
        lengths: [N] real tokens of each sample.
        keys: [N] what chance depends on.
        masking: how.

    Returns:
        `input_ids` [N, L], typed as `tokens`; `masked_lm_positions`, `masked_lm_ids` and `masked_lm_weights` [N, P].
        A sample has one prediction or more, unless it has no token that may be chosen.
    """
    output = tokens.copy()
    shape = (len(tokens), masking.max_predictions_per_seq)
    positions, labels, weights = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    _mask_samples(
        tokens,
        lengths,
        keys,
        masking.probability,
        masking.max_ngram,
        masking.mask_id,
        masking.is_kept,
        masking.continues_word,
        masking.replacements,
        output,
        positions,
        labels,
        weights,
    )
    return {
        "input_ids": output,
        "masked_lm_positions": positions,
        "masked_lm_ids": labels,
        "masked_lm_weights": weights,
    }


def make_masking(
    vocabulary: Vocabulary,
    probability: float,
    max_predictions_per_seq: int,
    whole_words: bool = False,
    max_ngram: int = 1,
    any_token: bool = False,
) -> Masking:
    """The masking for a vocabulary.

    Args:
        vocabulary: of the samples.
        probability, max_predictions_per_seq, max_ngram: see `Masking`.
        whole_words: mask whole words.
        any_token: tokens are replaced by any of the vocabulary, as in Google's script; false: by those that stand for
            text, so never by [PAD], [SEP] or [unused0].
    """
    ids = np.arange(len(vocabulary.tokens))
    return Masking(
        probability=probability,
        max_predictions_per_seq=max_predictions_per_seq,
        max_ngram=max_ngram,
        mask_id=vocabulary.ids[MASK],
        is_kept=np.isin(ids, [vocabulary.ids[CLS], vocabulary.ids[SEP]]),
        continues_word=vocabulary.continues_word & whole_words,
        replacements=ids if any_token else ids[~vocabulary.is_special],
    )


@dataclass(frozen=True)
class Remasking:
    """Dynamic masking: each epoch masks other tokens (Liu et al. 2019, section 4.1).

    Args:
        seed: with epoch and number of a sample it decides alone what is masked.
        masking: how; its P must be that of the samples.
    """

    seed: int
    masking: Masking

    def apply(self, features: Arrays, samples: Ints, epochs: Ints) -> Arrays:
        """The same samples with the tokens masked that their epochs mask.

        Args:
            features: google-research/bert's names to [N, ...] arrays, masked in any way.
            samples, epochs: [N] numbers.

        Returns:
            All features, in the types in which they came.
        """
        lengths = features["input_mask"].sum(axis=1, dtype=np.int64)
        keys = keys_of(keys_of(key_of(self.seed), epochs), samples)
        made = mask(unmasked(features), lengths, keys, self.masking)
        return {name: made[name].astype(values.dtype) if name in made else values for name, values in features.items()}


def unmasked(features: Arrays) -> Matrix:
    """[N, L] `input_ids` as they were before they were masked."""
    tokens = features["input_ids"].copy()
    rows, places = np.nonzero(features["masked_lm_weights"])
    tokens[rows, features["masked_lm_positions"][rows, places]] = features["masked_lm_ids"][rows, places]
    return tokens


@compiled
def _mask_samples(
    tokens: Matrix,
    lengths: Ints,
    keys: Keys,
    probability: float,
    max_ngram: int,
    mask_id: int,
    is_kept: Flags,
    continues_word: Flags,
    replacements: Ints,
    output: Matrix,
    positions: Matrix,
    labels: Matrix,
    weights: Matrix,
) -> None:
    length = tokens.shape[1]
    word_starts, word_stops = np.zeros(length, np.int64), np.zeros(length, np.int64)
    candidates, counts = np.zeros((max_ngram, length), np.int64), np.zeros(max_ngram, np.int64)
    is_chosen = np.zeros(length, np.bool_)
    for i in range(len(tokens)):
        stream = keys[i : i + 1].copy()
        is_chosen[:] = False
        wanted = min(positions.shape[1], max(1, int(np.rint(lengths[i] * probability))))  # half to even, as Python's
        num_words = _find_words(tokens[i, : lengths[i]], is_kept, continues_word, word_starts, word_stops)
        _collect_ngrams(num_words, word_starts, word_stops, candidates, counts)
        num_chosen = 0
        while num_chosen < wanted and counts.sum() > 0:
            size = _draw_size(max_ngram, stream)
            if num_chosen + size > wanted:
                counts[size - 1] = 0  # a word has a token or more, so none of this size fits
            if counts[size - 1] == 0:
                continue
            first = _take(candidates[size - 1], counts[size - 1 : size], stream)
            start, stop = word_starts[first], word_stops[first + size - 1]
            if num_chosen + stop - start > wanted or is_chosen[start:stop].any():
                continue
            is_chosen[start:stop] = True
            num_chosen += stop - start
            _replace(output[i], start, stop, max_ngram > 1, mask_id, replacements, stream)
        if num_chosen == 0 and num_words > 0:  # every word is longer than may be masked
            start = word_starts[below(num_words, stream)]
            is_chosen[start : start + wanted] = True
            _replace(output[i], start, start + wanted, max_ngram > 1, mask_id, replacements, stream)
        _list(tokens[i], is_chosen, positions[i], labels[i], weights[i])


@compiled
def _find_words(tokens: Matrix, is_kept: Flags, continues_word: Flags, starts: Ints, stops: Ints) -> int:
    """Fill in where words start and stop; how many there are. A piece behind [CLS] or [SEP] begins a word."""
    count = 0
    in_word = False
    for k in range(len(tokens)):
        token = tokens[k]
        if is_kept[token]:
            in_word = False
            continue
        if not (in_word and continues_word[token]):
            starts[count] = k
            count += 1
        stops[count - 1] = k + 1
        in_word = True
    return count


@compiled
def _collect_ngrams(num_words: int, starts: Ints, stops: Ints, candidates: Matrix, counts: Ints) -> None:
    """Fill in the first word of every run of n words that touch, for each n."""
    counts[:] = 0
    for first in range(num_words):
        for n in range(min(len(counts), num_words - first)):
            if n > 0 and stops[first + n - 1] != starts[first + n]:
                break
            candidates[n, counts[n]] = first
            counts[n] += 1


@compiled
def _draw_size(max_ngram: int, stream: Stream) -> int:
    """n by a weight of 1/n."""
    if max_ngram == 1:
        return 1
    total = 0.0
    for n in range(1, max_ngram + 1):
        total += 1.0 / n
    rest = uniform(stream) * total
    for n in range(1, max_ngram):
        rest -= 1.0 / n
        if rest < 0:
            return n
    return max_ngram


@compiled
def _take(candidates: Ints, count: Ints, stream: Stream) -> int:
    """Take one of the first count[0] candidates out."""
    place = below(count[0], stream)
    taken = candidates[place]
    count[0] -= 1
    candidates[place] = candidates[count[0]]
    return as_int(taken)


@compiled
def _replace(
    output: Matrix, start: int, stop: int, as_one: bool, mask_id: int, replacements: Ints, stream: Stream
) -> None:
    """Put [MASK] or another token into [start, stop), or leave it, by one decision or token by token."""
    decision = uniform(stream)
    for k in range(start, stop):
        if k > start and not as_one:
            decision = uniform(stream)
        if decision < _MASK_SHARE:
            output[k] = mask_id
        elif decision < _MASK_SHARE + _OTHER_SHARE:
            output[k] = replacements[below(len(replacements), stream)]


@compiled
def _list(tokens: Ints, is_chosen: Flags, positions: Ints, labels: Ints, weights: Matrix) -> None:
    """The chosen places in ascending order, what stood there, and weight 1 for each."""
    count = 0
    for k in range(len(tokens)):
        if is_chosen[k]:
            positions[count], labels[count], weights[count] = k, tokens[k], 1
            count += 1
