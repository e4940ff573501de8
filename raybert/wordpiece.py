"""WordPiece: text to token ids as google-research/bert's FullTokenizer gives them, each word looked up once.

What makes words of text (BasicTokenizer) is done here by Python's own Unicode tables, as in the original: the rules of
the `tokenizers` library differ from it, for example in private-use characters and in the Greek final sigma. Words
become pieces by the library's WordPiece, and are kept.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tokenizers.models import WordPiece

from raybert.errors import UserError
from raybert.jit import Flags, Ints
from raybert.storage import local_file

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_WORD_CHARS = 200  # longer words are [UNK]
MAX_WORDS_KEPT = 1 << 18
CONTINUATION = "##"
_UNUSED = re.compile(r"\[unused\d+\]")
_CHINESE = (  # CJK ideographs, which are words of one character; kana and hangul are not among them
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens, by id.

    Args:
        tokens: all of them; [PAD] first.
    """

    tokens: tuple[str, ...]

    @cached_property
    def ids(self) -> dict[str, int]:
        """Each token's id; of a token that stands twice the last one, as in the original."""
        return {token: number for number, token in enumerate(self.tokens)}

    @property
    def content(self) -> bytes:
        """The file: a token a line."""
        return "".join(f"{token}\n" for token in self.tokens).encode()

    @property
    def digest(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def continues_word(self) -> Flags:
        """[V] whether a token continues the word of the token before it."""
        return np.array([token.startswith(CONTINUATION) for token in self.tokens])

    @cached_property
    def is_special(self) -> Flags:
        """[V] whether a token stands for no text: [PAD], [UNK], [CLS], [SEP], [MASK], [unused0], ..."""
        return np.array([token in SPECIAL_TOKENS or bool(_UNUSED.fullmatch(token)) for token in self.tokens])


def read_vocabulary(uri: str) -> Vocabulary:
    """The vocabulary of a file, one token a line.

    Raises:
        UserError: there is no such file, it is not UTF-8, or special tokens are missing or [PAD] is not the first.
    """
    with local_file(uri) as path:
        content = path.read_bytes()
    try:
        lines = content.decode().rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{uri} is no vocabulary: byte {error.start} is not UTF-8; give a vocab.txt.") from error
    vocabulary = Vocabulary(tuple(line.strip() for line in lines))
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary.ids]
    if missing:
        raise UserError(
            f"{uri}: a vocabulary needs {', '.join(SPECIAL_TOKENS)}, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not among its {len(vocabulary.tokens)} tokens; give BERT's "
            "vocab.txt, or make one with `run.py vocab`."
        )
    if vocabulary.tokens[0] != PAD:
        raise UserError(
            f"{uri}: padding is token 0, so {PAD} must be the first line, not line {vocabulary.ids[PAD] + 1}; make a "
            "vocabulary with `run.py vocab`, or correct the file."
        )
    return vocabulary


class _Spaced(dict[int, str]):
    """A table for str.translate, filled as characters are met: invalid ones go, CJK ideographs stand alone."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        if char in "\t\n\r" or unicodedata.category(char) == "Zs":
            text = " "
        elif code in (0, 0xFFFD) or unicodedata.category(char) in ("Cc", "Cf"):
            text = ""
        else:
            text = f" {char} " if any(first <= code <= last for first, last in _CHINESE) else char
        self[code] = text
        return text


class _Split(dict[int, str]):
    """A table for str.translate: punctuation stands alone; all of ASCII that is no letter, digit or space is some."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        is_ascii_mark = 33 <= code <= 126 and not char.isalnum()
        self[code] = f" {char} " if is_ascii_mark or unicodedata.category(char).startswith("P") else char
        return self[code]


class _Unaccented(dict[int, str]):
    """A table for str.translate: marks that take no space of their own go."""

    def __missing__(self, code: int) -> str:
        self[code] = "" if unicodedata.category(chr(code)) == "Mn" else chr(code)
        return self[code]


_SPACED, _SPLIT, _UNACCENTED = _Spaced(), _Split(), _Unaccented()


def split_words(text: str, lowercase: bool) -> list[str]:
    """The words and punctuation marks of a text; lower case and without accents if so wanted."""
    if not (text.isascii() and text.isprintable()):
        text = text.translate(_SPACED)
    if lowercase:
        text = text.lower()
        if not text.isascii():
            text = unicodedata.normalize("NFD", text).translate(_UNACCENTED)
    return text.translate(_SPLIT).split()


@dataclass(frozen=True, eq=False)
class Tokens:
    """Sentences as token ids, one behind the other.

    Args:
        ids: [T] int32 token ids of all sentences.
        lengths: [sentences] tokens of each; may be 0.
    """

    ids: Ints
    lengths: Ints


class Tokenizer:
    """Text to token ids; keeps the pieces of the words that it has met, up to MAX_WORDS_KEPT."""

    def __init__(self, vocabulary: Vocabulary, lowercase: bool) -> None:
        self.vocabulary = vocabulary
        self._lowercase = lowercase
        self._model = WordPiece(vocabulary.ids, unk_token=UNK, max_input_chars_per_word=MAX_WORD_CHARS)
        self._forget()

    def _forget(self) -> None:
        self._numbers: dict[str, int] = {}
        self._pieces, self._ends = array("i"), array("q", [0])

    def encode(self, sentences: Sequence[str]) -> Tokens:
        """The tokens of sentences, without [CLS] and [SEP]; what looks like a special token is text."""
        if len(self._numbers) > MAX_WORDS_KEPT:
            self._forget()
        by_sentence = [split_words(sentence, self._lowercase) for sentence in sentences]
        words = list(itertools.chain.from_iterable(by_sentence))
        for word in set(words) - self._numbers.keys():
            self._numbers[word] = len(self._numbers)
            self._pieces.extend(token.id for token in self._model.tokenize(word))
            self._ends.append(len(self._pieces))
        numbers = np.fromiter(map(self._numbers.__getitem__, words), np.int64, len(words))
        first_words = np.cumsum([0, *map(len, by_sentence)])
        ends = np.frombuffer(self._ends, np.int64)
        starts, sizes = ends[numbers], ends[numbers + 1] - ends[numbers]
        stops = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])  # in the result, of each word
        places = np.arange(stops[-1]) + np.repeat(starts - stops[:-1], sizes)
        pieces = np.frombuffer(self._pieces, np.int32) if self._pieces else np.zeros(0, np.int32)
        return Tokens(pieces[places], np.diff(stops[first_words]))
