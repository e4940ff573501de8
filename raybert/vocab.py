"""`vocab`: a WordPiece vocabulary learned from the user's text, the same for the same text.

Tokens are learned by the `tokenizers` library, from words as `wordpiece` splits them. Left to itself the library
numbers pieces of one character in an order that differs from run to run, and ties between pairs go by these numbers; so
the alphabet is given to it, sorted.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.trainers import WordPieceTrainer

from raybert.corpus import Piece, Reading, documents
from raybert.errors import UserError
from raybert.options import add_reading, boolean, reading_of
from raybert.storage import Directory, File, absolute, find_files
from raybert.wordpiece import CONTINUATION, MAX_WORD_CHARS, SPECIAL_TOKENS, UNK, Vocabulary, split_words

MAX_ALPHABET = 1000  # rarer characters are left out, and words with them: they will be [UNK]
MIN_FREQUENCY = 2  # of a pair of pieces that is to become one


def main(argv: list[str]) -> int:
    """Learn a vocabulary and write it.

    Raises:
        UserError: the input or a setting is not as it must be, or the file is there already.
    """
    options = _parser().parse_args(argv)
    folder, _, name = absolute(options.output).rpartition("/")
    output = Directory(folder)
    if output.exists(name):
        raise UserError(f"{options.output} is there already; give another --output, or delete it.")
    files = find_files(",".join(options.input), "--input")
    vocabulary = learn(files, reading_of(options), options.do_lower_case, options.size)
    try:
        output.write(name, vocabulary.content)
    except OSError as error:
        raise UserError(f"Cannot write {options.output}: {error}; choose another --output.") from error
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{options.output}: {len(vocabulary.tokens):,} tokens")
    if len(vocabulary.tokens) < options.size:
        console.print(f"The text gives no more of the {options.size:,} that were asked for.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python run.py vocab",
        allow_abbrev=False,
        description="Learn a WordPiece vocabulary from text, special tokens first; the same text gives the same file. "
        "Different words of the text are kept in memory.",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="a new file; local, s3:// or gs://")
    parser.add_argument("--size", type=int, default=30522, metavar="INT", help="tokens, at most; default: 30522")
    add_reading(parser)
    parser.add_argument(
        "--do_lower_case", type=boolean, nargs="?", const=True, default=True, metavar="BOOL",
        help="lower case without accents; default: True",
    )  # fmt: skip
    return parser


def learn(files: Sequence[File], reading: Reading, lowercase: bool, size: int) -> Vocabulary:
    """A vocabulary of the text of some files: special tokens, the alphabet, then pieces as they were learned.

    Raises:
        UserError: the files are damaged or hold no text, or `size` is too small for the alphabet.
    """
    words = partial(_words, files, reading, lowercase)
    alphabet = _alphabet(words)
    if not alphabet:
        raise UserError("The input holds no text to learn a vocabulary from; give files with text.")
    first = [*SPECIAL_TOKENS, *alphabet, *(CONTINUATION + char for char in alphabet)]
    if size < len(first):
        raise UserError(
            f"A vocabulary of {size} tokens has no room for {len(alphabet)} characters, each at the beginning of a "
            f"word and inside of one; give --size {len(first)} or more."
        )
    tokenizer = Tokenizer(WordPiece(unk_token=UNK))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    trainer = WordPieceTrainer(vocab_size=size, min_frequency=MIN_FREQUENCY, special_tokens=first, show_progress=False)
    known = set(alphabet)
    sentences = (" ".join(word for word in sentence if known.issuperset(word)) for sentence in words())
    tokenizer.train_from_iterator(sentences, trainer)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    return Vocabulary(tuple(sorted(ids, key=ids.__getitem__)))


def _words(files: Sequence[File], reading: Reading, lowercase: bool) -> Iterator[list[str]]:
    """The words of every sentence; those that are [UNK] for their length left out."""
    for file in files:
        for document in documents(Piece(file), reading):
            for sentence in document.sentences:
                yield [word for word in split_words(sentence, lowercase) if len(word) <= MAX_WORD_CHARS]


def _alphabet(words: Callable[[], Iterator[list[str]]]) -> list[str]:
    """The most frequent characters, sorted."""
    counts: Counter[str] = Counter()
    for sentence in words():
        counts.update("".join(sentence))
    frequent = sorted(counts, key=lambda char: (-counts[char], char))[:MAX_ALPHABET]
    return sorted(frequent)
