"""The corpus: documents of sentences from text files, JSON lines and Parquet, plain or compressed, in bounded memory.

A file is read in pieces by byte ranges, unless it is compressed as a whole. A piece holds what begins in its range:
of a text file the first document, and those behind a blank line that begins there; of JSON lines the lines; of Parquet
the row groups. So every document is in one piece, whatever their size.
"""

from __future__ import annotations

import json
import math
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import sentencex
from pyarrow import parquet

from raybert.compression import DamagedStreamError, compression, decompressed_chunks
from raybert.errors import UserError
from raybert.storage import File, chunks, open_input, open_seen

Lines = Literal["sentences", "paragraphs", "wrapped"]
Kind = Literal["text", "json lines", "parquet"]

CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 64 << 20
MAX_DOCUMENT_CHARS = 16 << 20  # a longer document is cut: memory holds several
PARQUET_ROWS = 1024  # rows in memory at a time
_ENDINGS: dict[str, Kind] = {".parquet": "parquet", ".jsonl": "json lines", ".ndjson": "json lines"}


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Args:
        lines: what a line of a text is. sentences: Google's format, a blank line between documents. paragraphs: of
            several sentences each, which are found by sentencex; a blank line between documents. wrapped: paragraphs
            over many lines, a blank line between them; each file is a document. None: paragraphs in JSON lines and
            Parquet, where every row is a document, sentences in text files.
        text_column: of JSON lines and Parquet.
        language: of the text, by its code, for finding sentences.
    """

    lines: Lines | None = None
    text_column: str = "text"
    language: str = "en"


@dataclass(frozen=True)
class Piece:
    """What is read by itself.

    Args:
        file: of the input.
        start, stop: bytes in which the documents begin.
    """

    file: File
    start: int = 0
    stop: float = math.inf


@dataclass(frozen=True)
class Document:
    """Sentences, stripped; none of them blank, and perhaps none at all.

    Args:
        sentences: in order.
        is_rest: it goes on from the document before, which was too long.
    """

    sentences: Sequence[str]
    is_rest: bool = False


def cut_into_pieces(files: Iterable[File], reading: Reading, piece_bytes: int) -> Iterator[Piece]:
    """The pieces of some files, each of about `piece_bytes` where the file can be cut.

    Raises:
        UserError: a file cannot be read.
    """
    for file in files:
        if not file.size_bytes:
            continue
        if not _can_be_cut(file, reading):
            yield Piece(file)
            continue
        for start in range(0, file.size_bytes, piece_bytes):
            yield Piece(file, start, start + piece_bytes)


def kind_of(path: str) -> Kind:
    """What a file is, by its name; .gz behind it does not count."""
    name = posixpath.basename(path.partition("?")[0]).lower().removesuffix(".gz")
    return _ENDINGS.get(posixpath.splitext(name)[1], "text")


def _can_be_cut(file: File, reading: Reading) -> bool:
    kind = kind_of(file.path)
    if kind == "text" and reading.lines == "wrapped":
        return False
    return kind == "parquet" or not is_compressed(file)


def is_compressed(file: File) -> bool:
    """Whether a file is gzip or zlib, by its content.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open_input(file.path) as source:
            return bool(compression(source.read(64)))
    except OSError as error:
        raise UserError(f"Cannot read {file.path}: {error}; check the path and the credentials.") from error


def documents(piece: Piece, reading: Reading) -> Iterator[Document]:
    """The documents of a piece, in order.

    Raises:
        UserError: the file is damaged, is not UTF-8, or has no such column; with file, line and byte, or row.
        OSError: it cannot be read.
    """
    kind = kind_of(piece.file.path)
    if kind == "text":
        lines = reading.lines or "sentences"
        texts = _whole_file(piece) if lines == "wrapped" else _between_blank_lines(piece)
        whole = (_split(text, lines, reading.language) for text in texts)
    else:
        lines = reading.lines or "paragraphs"
        rows = _parquet_rows(piece, reading) if kind == "parquet" else _json_rows(piece, reading)
        whole = (_split(text.split("\n"), lines, reading.language) for text in rows)
    for sentences in whole:
        for document in _bounded(sentences):
            if document.sentences or kind != "text":  # two blank lines in a row are no document
                yield document


def _bounded(sentences: Iterable[str]) -> Iterator[Document]:
    """A document, in several if it is too long."""
    kept: list[str] = []
    num_chars, is_rest = 0, False
    for sentence in sentences:
        if num_chars + len(sentence) > MAX_DOCUMENT_CHARS and kept:
            yield Document(kept, is_rest)
            kept, num_chars, is_rest = [], 0, True
        kept.append(sentence)
        num_chars += len(sentence)
    yield Document(kept, is_rest)


def _split(text: Iterable[str], lines: Lines, language: str) -> Iterator[str]:
    """The sentences of a text that is given line by line."""
    if lines == "wrapped":
        text = _unwrapped(text)
    for line in text:
        parts = [line] if lines == "sentences" else sentencex.segment(language, line)
        yield from filter(None, map(str.strip, parts))


def _unwrapped(lines: Iterable[str]) -> Iterator[str]:
    """Paragraphs, each as one line."""
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line.strip())
        elif paragraph:
            yield " ".join(paragraph)
            paragraph = []
    if paragraph:
        yield " ".join(paragraph)


# --- Text files -------------------------------------------------------------------------------------------------------


def _whole_file(piece: Piece) -> Iterator[Iterator[str]]:
    yield (text for _, text in _decoded(piece.file, 0))


def _between_blank_lines(piece: Piece) -> Iterator[Iterator[str]]:
    """The lines of each document that begins in a piece; each is to be used up before the next is asked for."""
    lines = _decoded(piece.file, piece.start)
    begins = piece.start == 0 or _skip_to_blank(lines, piece.stop)
    while begins:
        last = [-1]  # where the blank line is that ends the document; -1: the file ends
        yield _until_blank(lines, last)
        begins = 0 <= last[0] < piece.stop


def _skip_to_blank(lines: Iterator[tuple[int, str]], stop: float) -> bool:
    """Pass over lines until a blank one; whether it begins before `stop`."""
    for at, text in lines:
        if at >= stop:
            return False
        if not text.strip():
            return True
    return False


def _until_blank(lines: Iterator[tuple[int, str]], last: list[int]) -> Iterator[str]:
    for at, text in lines:
        if not text.strip():
            last[0] = at
            return
        yield text


def _decoded(file: File, start: int) -> Iterator[tuple[int, str]]:
    """Byte offset and text of the lines that begin at `start` or later.

    Raises:
        UserError: a line is not UTF-8, or too long.
    """
    for at, line in _raw_lines(file, start):
        try:
            yield at, line.decode()
        except UnicodeDecodeError as error:
            where, byte = f"{file.path}, line {_line_number(file, at)}, byte {at + error.start}", line[error.start]
            raise UserError(
                f"{where}: 0x{byte:02x} is not UTF-8; convert the file, for example with `iconv -f latin1 -t utf-8`."
            ) from error


def _raw_lines(file: File, start: int) -> Iterator[tuple[int, bytes]]:
    """Byte offset and content of the lines that begin at `start` or later; without their ends."""
    at = max(start - 1, 0)  # with the byte before it shows whether a line begins there
    tail, is_first = b"", start > 0
    for chunk in _content(file, at):
        *lines, tail = (tail + chunk).split(b"\n")
        for line in lines:
            if not is_first:
                yield at, line
            is_first = False
            at += len(line) + 1
        if len(tail) > MAX_LINE_BYTES:
            raise UserError(
                f"{file.path}, line {_line_number(file, at)}: longer than {MAX_LINE_BYTES >> 20} MB; is this text? "
                "Give UTF-8 text with line breaks, JSON lines (.jsonl) or Parquet (.parquet)."
            )
    if tail and not is_first:
        yield at, tail


def _content(file: File, start: int) -> Iterator[bytes]:
    """A file's content, decompressed, from a byte on; a compressed one has to be read from its start.

    Raises:
        UserError: it is damaged.
    """
    with open_seen(file.path) as source:
        try:
            if start:
                source.seek(start)
                yield from chunks(source, CHUNK_BYTES)
            else:
                yield from decompressed_chunks(chunks(source, CHUNK_BYTES))
        except DamagedStreamError as error:
            raise UserError(f"{file.path}: {error}; restore the file.") from error


def _line_number(file: File, offset: int) -> int:
    """Number of the line at a byte, from 1; the file is read up to there."""
    number, at = 1, 0
    for chunk in _content(file, 0):
        number += chunk[: max(offset - at, 0)].count(b"\n")
        at += len(chunk)
        if at >= offset:
            break
    return number


# --- Rows -------------------------------------------------------------------------------------------------------------


def _json_rows(piece: Piece, reading: Reading) -> Iterator[str]:
    """The text of every line of JSON; blank lines are none."""
    for at, line in _decoded(piece.file, piece.start):
        if at >= piece.stop:
            return
        if line.strip():
            try:
                yield _text_of(_json_row(line), reading.text_column)
            except _RowError as error:
                raise UserError(f"{piece.file.path}, line {_line_number(piece.file, at)}: {error}") from error


def _json_row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise _RowError(f"no JSON: {error}; correct the line, or name text files .txt.") from error
    if not isinstance(row, dict):
        raise _RowError(f"a JSON object is expected, not {type(row).__name__}; write one object a line.")
    return row


def _parquet_rows(piece: Piece, reading: Reading) -> Iterator[str]:
    path, column, number = piece.file.path, reading.text_column, 0
    try:
        with open_seen(path) as source, parquet.ParquetFile(source) as table:
            groups, number = _row_groups(table.metadata, piece)
            if column not in table.schema_arrow.names:
                raise UserError(f"{path}: {_no_column(column, table.schema_arrow.names)}")
            for batch in table.iter_batches(PARQUET_ROWS, row_groups=groups, columns=[column]):
                for value in batch.column(0):
                    yield _text_of({column: value.as_py()}, column)
                    number += 1
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is no Parquet file, or damaged: {error}; restore the file.") from error
    except _RowError as error:
        raise UserError(f"{path}, row {number}: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, row {number}, byte {error.start} of {column}: not UTF-8; write the column again as UTF-8."
        ) from error


def _row_groups(metadata: parquet.FileMetaData, piece: Piece) -> tuple[list[int], int]:
    """The row groups that begin in a piece, and the number of the first one's first row."""
    groups, first_row = [], 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunk = group.column(0)
        starts = [start for start in (chunk.dictionary_page_offset, chunk.data_page_offset) if start]  # 0: none
        if min(starts) < piece.start:
            first_row += group.num_rows
        elif min(starts) < piece.stop:
            groups.append(number)
    return groups, first_row


class _RowError(Exception):
    """What is wrong with a row, and the remedy."""


def _text_of(row: dict[str, Any], column: str) -> str:
    """The text of a row; null is an empty document.

    Raises:
        _RowError: it is not there, or no text.
    """
    if column not in row:
        raise _RowError(_no_column(column, list(row)))
    text = row[column]
    if not isinstance(text, str | None):
        raise _RowError(f"{column} is {type(text).__name__}, not text; name another one by --text_column.")
    return text or ""


def _no_column(column: str, names: Sequence[str]) -> str:
    there = ", ".join(names[:10]) or "none"
    return f"no column {column!r} among {there}; name the column of the text by --text_column."
