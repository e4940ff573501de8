"""`fill`: what a checkpoint would put in the place of each [MASK], and how likely it finds it.

Shape letters: B sentences (or pairs), L tokens of the longest, M masks, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from raybert.batch import pack
from raybert.errors import UserError
from raybert.pretrained import is_uncased
from raybert.storage import Directory
from raybert.weights import VOCABULARY, Opened, open_model
from raybert.wordpiece import CLS, MASK, SEP, Tokenizer, Vocabulary, read_vocabulary

PAIR = "|||"
SENTENCES_AT_ONCE = 32


@dataclass(frozen=True)
class Guess:
    """A token for a place, and its probability."""

    token: str
    probability: float


@dataclass(frozen=True)
class Filled:
    """A sentence, or a pair, and the guesses for each of its masks, best first.

    Args:
        text: as it was given.
        masks: for each [MASK] its guesses.
        next_sentence_probability: that the second sentence follows the first; None for one sentence, or where this
            was not trained.
    """

    text: str
    masks: list[list[Guess]]
    next_sentence_probability: float | None


def main(argv: list[str]) -> int:
    """Fill in sentences and print the guesses.

    Raises:
        UserError: the checkpoint has no masked LM head or no vocabulary, or a sentence has no mask or is too long.
    """
    options = _parser().parse_args(argv)
    if options.top_k < 1:
        raise UserError(f"--top_k must be at least 1, got {options.top_k}; raise it.")
    opened = open_model(options.checkpoint)
    tokenizer = _tokenizer(opened, options.vocab)
    filled = fill(opened, tokenizer, options.text, options.top_k)
    print(json.dumps([asdict(each) for each in filled], indent=1) if options.json else "\n".join(_lines(filled)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python run.py fill",
        description=f"What a checkpoint puts in the place of each {MASK}: tokens, and how likely each is.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a raybert checkpoint or run, or a directory of transformers")
    add(
        "text", nargs="+", metavar="TEXT",
        help=f"a sentence with one {MASK} or several; two sentences with '{PAIR}' between them are a pair, of which is "
        "also said how likely the second follows the first",
    )  # fmt: skip
    add("--top_k", type=int, default=5, metavar="INT", help="tokens to show for each; default: 5")
    add("--vocab", metavar="FILE", help="the vocabulary; default: vocab.txt of the checkpoint")
    add("--json", action="store_true", help="print the guesses as JSON")
    return parser


def _tokenizer(opened: Opened, given: str | None) -> Tokenizer:
    """The checkpoint's, lower-casing as it says."""
    folder = Directory(opened.uri)
    if given is None and not folder.exists(VOCABULARY):
        raise UserError(f"{opened.uri} has no {VOCABULARY}; name the vocabulary that it was trained with by --vocab.")
    vocabulary = read_vocabulary(given or (folder / VOCABULARY).uri)
    if len(vocabulary.tokens) > opened.model.config.vocab_size:
        raise UserError(
            f"The vocabulary has {len(vocabulary.tokens)} tokens, and the model in {opened.uri} "
            f"{opened.model.config.vocab_size}; give the one that it was trained with by --vocab."
        )
    says = json.loads(folder.read("tokenizer_config.json")) if folder.exists("tokenizer_config.json") else {}
    return Tokenizer(vocabulary, bool(says.get("do_lower_case", is_uncased(list(vocabulary.tokens)))))


@torch.no_grad()
def fill(opened: Opened, tokenizer: Tokenizer, texts: Sequence[str], top_k: int) -> list[Filled]:
    """The guesses for each text.

    Args:
        opened: the model.
        tokenizer: of its vocabulary.
        texts: sentences or pairs, with masks.
        top_k: guesses for each mask.

    Raises:
        UserError: one has no mask, or is longer than the model allows.
    """
    limit = opened.model.config.max_position_embeddings
    encoded = [_encode(text, tokenizer, limit) for text in texts]
    starts = range(0, len(texts), SENTENCES_AT_ONCE)
    parts = [slice(start, start + SENTENCES_AT_ONCE) for start in starts]
    return [each for part in parts for each in _fill(opened, tokenizer, texts[part], encoded[part], top_k)]


def _encode(text: str, tokenizer: Tokenizer, limit: int) -> tuple[list[int], list[int]]:
    """Token ids and segment ids of [CLS] A [SEP], or of [CLS] A [SEP] B [SEP]."""
    ids = tokenizer.vocabulary.ids
    sentences = text.split(PAIR)
    if len(sentences) > 2:
        raise UserError(f"A pair has one '{PAIR}', got {len(sentences) - 1} in {text!r}; give two sentences.")
    tokens, segments = [ids[CLS]], [0]
    for number, sentence in enumerate(sentences):
        pieces = tokenizer.encode(sentence.split(MASK))
        places = np.cumsum(pieces.lengths)[:-1]  # one mask between two pieces of text
        own = [*np.insert(pieces.ids, places, ids[MASK]).tolist(), ids[SEP]]
        tokens, segments = tokens + own, segments + [number] * len(own)
    if ids[MASK] not in tokens:
        raise UserError(f"There is no {MASK} in {text!r}; put one where a token is to be guessed.")
    if len(tokens) > limit:
        raise UserError(f"{text[:60]!r}... has {len(tokens)} tokens, and the model takes {limit}; shorten it.")
    return tokens, segments


def _fill(
    opened: Opened,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    encoded: Sequence[tuple[list[int], list[int]]],
    top_k: int,
) -> Iterator[Filled]:
    """Of a few texts, computed at once."""
    lengths = np.array([len(tokens) for tokens, _ in encoded])
    is_real_BL = np.arange(lengths.max()) < lengths[:, None]
    ids_BL, segments_BL = np.zeros(is_real_BL.shape, np.int32), np.zeros(is_real_BL.shape, np.int32)
    ids_BL[is_real_BL] = np.concatenate([tokens for tokens, _ in encoded])
    segments_BL[is_real_BL] = np.concatenate([segments for _, segments in encoded])
    tokens, order, places_BL = pack(ids_BL, segments_BL, is_real_BL)
    is_mask_BL = (ids_BL == tokenizer.vocabulary.ids[MASK]) & is_real_BL
    projection, nsp_logits = opened.model(tokens, torch.from_numpy(places_BL[is_mask_BL]))
    best = projection.logits().float().softmax(dim=-1).topk(min(top_k, opened.model.config.vocab_size))
    guesses = iter(zip(best.values.tolist(), best.indices.tolist(), strict=True))
    follows = nsp_logits.float().softmax(dim=-1)[np.argsort(order), 0].tolist()
    for text, num_masks, probability in zip(texts, is_mask_BL.sum(axis=1).tolist(), follows, strict=True):
        masks = [_guesses(*next(guesses), tokenizer.vocabulary) for _ in range(num_masks)]
        is_pair = PAIR in text and not opened.masked_lm_only
        yield Filled(text, masks, probability if is_pair else None)


def _guesses(probabilities: list[float], numbers: list[int], vocabulary: Vocabulary) -> list[Guess]:
    """Of one mask; a row of the table beyond the vocabulary is shown by its number."""
    known = len(vocabulary.tokens)
    names = (vocabulary.tokens[number] if number < known else f"[{number}]" for number in numbers)
    return [Guess(token, probability) for token, probability in zip(names, probabilities, strict=True)]


def _lines(filled: Sequence[Filled]) -> Iterator[str]:
    for each in filled:
        yield each.text
        for number, guesses in enumerate(each.masks, 1):
            if len(each.masks) > 1:
                yield f"  {MASK} {number}"
            yield from (f"  {guess.probability:8.4f}  {guess.token}" for guess in guesses)
        if each.next_sentence_probability is not None:
            yield f"  {each.next_sentence_probability:8.4f}  that the second sentence follows the first"
