"""The deck: a corpus as tokens, its documents dealt to parts by chance.

Every part becomes a shard, or one for each copy of the corpus. Its documents come from everywhere in the corpus, so a
part is a small corpus of its own, and random nexts can be drawn inside of it as if from the whole.

A piece of the input is tokenised by one task, in bounded memory: whenever `deal_chars` of text are at hand, their
documents are dealt, and written as one Arrow file with a record batch for each part. A piece's marker, written last,
says that it is complete, and what is in it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from raybert.corpus import Document, Piece, Reading, documents
from raybert.instances import Documents
from raybert.jit import Ints
from raybert.retry import outlast_blip
from raybert.storage import Directory, open_input
from raybert.wordpiece import UNK, Tokenizer, Vocabulary

MAX_TOKEN_16 = 1 << 16  # ids below it are stored in two bytes
MAX_PIECE_DOCUMENTS = 1 << 32
_DEAL = 2  # what a random stream is for; part of its seed


@dataclass(frozen=True)
class Deal:
    """How a corpus is dealt.

    Args:
        num_parts: that its documents are dealt to.
        deal_chars: text in memory at a time, in characters; one document more may be.
        seed: of the deal.
    """

    num_parts: int
    deal_chars: int
    seed: int


@dataclass(frozen=True)
class Dealt:
    """What one piece held.

    Args:
        number: of the piece.
        files: names of its Arrow files, and for each the parts that its record batches belong to.
        num_documents: documents with tokens.
        num_empty: rows without any.
        num_cut: documents that were too long for one, each cut counted.
        num_sentences, num_tokens, num_unknown: in all; unknown are [UNK].
        part_documents: [num_parts] documents of each part.
    """

    number: int
    files: Sequence[tuple[str, Sequence[int]]]
    num_documents: int
    num_empty: int
    num_cut: int
    num_sentences: int
    num_tokens: int
    num_unknown: int
    part_documents: Sequence[int]


@dataclass
class _Hand:
    """Tokenised documents at hand."""

    numbers: list[int]
    lengths: list[Ints]  # of their sentences
    tokens: list[Ints]


def read_marker(deck: Directory, number: int) -> Dealt | None:
    """What a piece held; None if it is not complete."""
    name = _marker(number)
    return Dealt(**json.loads(deck.read(name))) if deck.exists(name) else None


def deal_piece(number: int, piece: Piece, reading: Reading, tokenizer: Tokenizer, deal: Deal, deck: Directory) -> Dealt:
    """Tokenise a piece of the input and deal its documents; the same input gives the same bytes.

    Args:
        number: of the piece; with a document's place in the piece it is the document's number.
        piece: what to read.
        reading: how.
        tokenizer: of the vocabulary.
        deal: to how many parts, in how much memory.
        deck: where it is written.

    Raises:
        UserError: the input is damaged.
        OSError: storage fails.
    """
    files: list[tuple[str, Sequence[int]]] = []
    counts = dict.fromkeys(("num_documents", "num_empty", "num_cut", "num_sentences", "num_tokens", "num_unknown"), 0)
    part_documents = np.zeros(deal.num_parts, np.int64)
    for hand in _hands(number, documents(piece, reading), tokenizer, deal.deal_chars, counts):
        name = f"piece-{number:05d}-{len(files):04d}.arrow"
        parts = _deal(len(hand.numbers), deal, number, len(files))
        content = _to_arrow(hand, parts, tokenizer.vocabulary)
        outlast_blip(partial(deck.write, name, content))
        files.append((name, np.unique(parts).tolist()))
        part_documents += np.bincount(parts, minlength=deal.num_parts)
    dealt = Dealt(number, files, **counts, part_documents=part_documents.tolist())
    outlast_blip(partial(deck.write, _marker(number), json.dumps(asdict(dealt)).encode()))
    return dealt


def _marker(number: int) -> str:
    return f"piece-{number:05d}.json"


def _hands(
    number: int, found: Iterator[Document], tokenizer: Tokenizer, deal_chars: int, counts: dict[str, int]
) -> Iterator[_Hand]:
    """Documents, as many at a time as fit in memory; those without tokens left out, and counted."""
    hand, num_chars, unknown = _Hand([], [], []), 0, tokenizer.vocabulary.ids[UNK]
    for document in found:
        tokens = tokenizer.encode(document.sentences)
        lengths = tokens.lengths[tokens.lengths > 0]
        counts["num_cut"] += document.is_rest
        if not len(lengths):
            counts["num_empty"] += 1
            continue
        hand.numbers.append(number * MAX_PIECE_DOCUMENTS + counts["num_documents"])
        hand.lengths.append(lengths)
        hand.tokens.append(tokens.ids)
        counts["num_documents"] += 1
        counts["num_sentences"] += len(lengths)
        counts["num_tokens"] += len(tokens.ids)
        counts["num_unknown"] += int((tokens.ids == unknown).sum())
        num_chars += sum(map(len, document.sentences))
        if num_chars >= deal_chars:
            yield hand
            hand, num_chars = _Hand([], [], []), 0
    if hand.numbers:
        yield hand


def _deal(num_documents: int, deal: Deal, *place: int) -> Ints:
    """[documents] the part of each: dealt round after round from a random part on, in random order."""
    rng = np.random.default_rng([deal.seed, _DEAL, *place])
    parts: Ints = (rng.permutation(num_documents) + rng.integers(deal.num_parts)) % deal.num_parts
    return parts


def _to_arrow(hand: _Hand, parts: Ints, vocabulary: Vocabulary) -> bytes:
    """An Arrow file with a record batch for each part that has documents, in order."""
    token = pa.uint16() if len(vocabulary.tokens) <= MAX_TOKEN_16 else pa.int32()
    schema = pa.schema({"number": pa.int64(), "sentence_lengths": pa.list_(pa.int32()), "tokens": pa.list_(token)})
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, schema) as writer:
        for part in np.unique(parts):
            rows = np.flatnonzero(parts == part)
            columns = [
                pa.array([hand.numbers[row] for row in rows], pa.int64()),
                _lists([hand.lengths[row] for row in rows], pa.int32()),
                _lists([hand.tokens[row] for row in rows], token),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return buffer.getvalue()


def _lists(arrays: Sequence[Ints], kind: Any) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, arrays)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(arrays).astype(kind.to_pandas_dtype())))


def read_parts(deck: Directory, dealt: Sequence[Dealt], parts: Sequence[int]) -> Documents:
    """The documents of some parts, in an order that their numbers and parts decide.

    Args:
        deck: where they are.
        dealt: of every piece.
        parts: which.
    """
    batches = []
    for piece in dealt:
        for name, there in piece.files:
            wanted = [place for place, part in enumerate(there) if part in parts]
            if wanted:
                with open_input((deck / name).uri) as source, pa.ipc.open_file(source) as file:
                    batches += [file.get_batch(place) for place in wanted]
    table = pa.Table.from_batches(batches)
    lengths = table["sentence_lengths"].combine_chunks()
    return Documents(
        tokens=np.asarray(table["tokens"].combine_chunks().flatten()),
        sentence_starts=_starts(lengths.flatten()),
        document_starts=_starts(lengths.value_lengths()),
        numbers=np.asarray(table["number"]),
    )


def _starts(lengths: pa.Array) -> Ints:
    """Where things of these lengths begin, one behind the other, and where the last one ends."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(np.asarray(lengths), out=starts[1:])
    return starts
