"""TFRecord files of BERT samples: framing, decoding, validation and writing.

Framing and decoding run in numba over whole buffers. The fast path takes what it knows for certain to be a good sample;
every other record goes, one by one, through the protobuf library, which decides, and which alone words the complaints.

Shape letters: N records of a buffer, L max_seq_length, P max_predictions_per_seq.
Format: https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, cast

import crc32c
import numba
import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[np.generic]]
Bytes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint32]
Buffer = bytes | bytearray | memoryview | Bytes
Compression = Literal["", "gzip", "zlib"]

MAX_RECORD_BYTES = 1 << 26  # a sample is a few KB; what claims more is refused, so that memory stays bounded
HEADER_BYTES, FOOTER_BYTES = 12, 4  # length and its CRC; the payload's CRC

_HEAD_BYTES = 64  # tell a file's kind
_PIECE_BYTES = 1 << 20  # of decompressed data at a time
_WINDOW_BITS: dict[Compression, int] = {"gzip": 31, "zlib": 15}  # zlib's numbers for the two containers


# --- What a sample must look like -----------------------------------------------------------------------------------

ALIASES = {"input_ids": "input_word_ids", "segment_ids": "input_type_ids"}  # TensorFlow Model Garden's names


@dataclass(frozen=True)
class Column:
    """One feature of a sample.

    Args:
        name: google-research/bert's name.
        dtype: of the decoded array; holds every valid value.
        length: how many values it has.
        length_rule: the setting behind `length`, for messages.
        limit: values are integers in [0, limit); None: finite floats, not negative.
        limit_rule: what is expected of a value, for messages.
    """

    name: str
    dtype: type[np.generic]
    length: int
    length_rule: str
    limit: int | None
    limit_rule: str


@dataclass(frozen=True)
class Schema:
    """What a sample must look like.

    Args:
        max_seq_length: L, tokens of each sample.
        max_predictions_per_seq: P, masked positions of each sample.
        vocab_size: token ids are in [0, vocab_size).
        type_vocab_size: segment ids are in [0, type_vocab_size); at most 256.

    Raises:
        ValueError: a number is outside what the decoded dtypes hold.
    """

    max_seq_length: int
    max_predictions_per_seq: int
    vocab_size: int
    type_vocab_size: int

    def __post_init__(self) -> None:
        numbers = (self.max_seq_length, self.max_predictions_per_seq, self.vocab_size)
        if not all(0 < number < 1 << 31 for number in numbers) or not 0 < self.type_vocab_size <= 256:
            raise ValueError(f"Sizes must be positive, below 2**31, and type_vocab_size at most 256; got {self}.")

    @property
    def token_dtype(self) -> type[np.generic]:
        """Smallest dtype here that holds every token id."""
        return _index_dtype(self.vocab_size)

    @functools.cached_property
    def columns(self) -> tuple[Column, ...]:
        """The features of a sample, in the order of google-research/bert."""
        length, places, vocab = self.max_seq_length, self.max_predictions_per_seq, self.vocab_size
        tokens, segments = f"vocab_size {vocab}", f"type_vocab_size {self.type_vocab_size}"
        rules = (
            ("input_ids", self.token_dtype, length, vocab, f"0 <= input_ids < {tokens}"),
            ("input_mask", np.uint8, length, 2, "input_mask 0 or 1"),
            ("segment_ids", np.uint8, length, self.type_vocab_size, f"0 <= segment_ids < {segments}"),
            ("masked_lm_positions", _index_dtype(length), places, length,
             f"0 <= masked_lm_positions < max_seq_length {length}"),
            ("masked_lm_ids", self.token_dtype, places, vocab, f"0 <= masked_lm_ids < {tokens}"),
            ("masked_lm_weights", np.float32, places, None, "a finite masked_lm_weights >= 0"),
            ("next_sentence_labels", np.uint8, 1, 2, "next_sentence_labels 0 or 1"),
        )  # fmt: skip
        return tuple(
            Column(name, dtype, count, _length_rule(name, count), limit, rule)
            for name, dtype, count, limit, rule in rules
        )

    def empty(self, num_records: int) -> Arrays:
        """Zeros for so many samples: [N, L], [N, P] and, for `next_sentence_labels`, [N]."""
        return {
            column.name: np.zeros(
                num_records if column.name == "next_sentence_labels" else (num_records, column.length), column.dtype
            )
            for column in self.columns
        }


def _index_dtype(limit: int) -> type[np.generic]:
    return np.uint16 if limit <= 1 << 16 else np.int32


def _length_rule(name: str, count: int) -> str:
    if name == "next_sentence_labels":
        return "1"
    return f"{count} (data.{'max_predictions_per_seq' if name.startswith('masked') else 'max_seq_length'})"


@dataclass(frozen=True)
class BadRecord:
    """One damaged place.

    Args:
        record: its number in the file, from 0.
        offset: byte offset of its frame in the decompressed stream.
        found: what stands there.
        expected: what should.
        ends_file: framing is lost, nothing after it can be read.
    """

    record: int
    offset: int
    found: str
    expected: str
    ends_file: bool = False

    def __str__(self) -> str:
        rest = "; the rest of the file cannot be read" if self.ends_file else ""
        return f"record {self.record} at byte {self.offset}: found {self.found}, expected {self.expected}{rest}"


# --- Compression ----------------------------------------------------------------------------------------------------


class DamagedStreamError(ValueError):
    """A compressed file is damaged or cut; what could be decompressed was given before."""


def compression(head: bytes) -> Compression:
    """How a file is compressed, by its first 64 bytes.

    A plain TFRecord begins with a length, which may look like anything: the length's CRC settles it.
    """
    if len(head) >= HEADER_BYTES and _masked(head[:8]) == int.from_bytes(head[8:12], "little"):
        return ""
    if head[:3] == b"\x1f\x8b\x08":
        return "gzip"
    if len(head) < 2 or head[0] & 0x0F != 8 or head[0] >> 4 > 7 or int.from_bytes(head[:2], "big") % 31:
        return ""
    try:  # those bits alone are met by some text and by some lengths
        zlib.decompressobj().decompress(head[:_HEAD_BYTES])
    except zlib.error:
        return ""
    return "zlib"


def decompressed_chunks(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """A file's content, decompressed if it is gzip or zlib, piece by piece in bounded memory.

    Args:
        chunks: the file as it lies in storage, cut anywhere.

    Raises:
        DamagedStreamError: the compressed stream is damaged or ends early; everything before was given.
    """
    stream = iter(chunks)
    head = b""
    for chunk in stream:
        head += chunk
        if len(head) >= _HEAD_BYTES:
            break
    kind = compression(head)
    whole = _chained(head, stream)
    yield from _decompressed(whole, kind) if kind else whole


def _chained(head: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if head:
        yield head
    yield from rest


def _decompressed(chunks: Iterator[bytes], kind: Compression) -> Iterator[bytes]:
    engine = zlib.decompressobj(_WINDOW_BITS[kind])
    for chunk in chunks:
        rest = chunk
        while rest:
            if engine.eof:  # gzip files may be joined, and padded with zeros
                rest = rest.lstrip(b"\0") if kind == "gzip" else rest
                if not rest:
                    break
                if kind == "zlib":
                    raise DamagedStreamError(f"{len(rest)} bytes or more follow the end of the zlib stream")
                engine = zlib.decompressobj(_WINDOW_BITS[kind])
            try:
                piece = engine.decompress(rest, _PIECE_BYTES)
            except zlib.error as error:
                raise DamagedStreamError(f"the {kind} stream is damaged: {error}") from error
            if piece:
                yield piece
            rest = engine.unused_data if engine.eof else engine.unconsumed_tail
    yield from _flushed(engine, kind)


def _flushed(engine: zlib._Decompress, kind: Compression) -> Iterator[bytes]:
    """What the engine still holds back, and whether it reached the end of its stream."""
    while not engine.eof:
        try:
            piece = engine.decompress(b"", _PIECE_BYTES)
        except zlib.error as error:
            raise DamagedStreamError(f"the {kind} stream is damaged: {error}") from error
        if not piece and not engine.eof:
            raise DamagedStreamError(f"the {kind} stream ends early")
        if piece:
            yield piece


def decompress(raw: bytes) -> bytes:
    """A whole file's content, decompressed if it is gzip or zlib.

    Raises:
        DamagedStreamError: the compressed stream is damaged or ends early.
    """
    return b"".join(decompressed_chunks([raw]))


# --- Numba ----------------------------------------------------------------------------------------------------------

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def _compiled(function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Compiled at its first call and kept on disk, for the many short-lived processes that need it; frees the GIL."""
    return cast(Callable[_Args, _Result], numba.njit(cache=True, nogil=True)(function))


# Numba makes a float64 of uint64 with int64, so every integer that is read becomes an int64 first; int() would not do.
_int = cast(Callable[[Any], int], np.int64)


def _view(buffer: Buffer) -> Bytes:
    """Bytes as a read-only array: always the same type, so that numba compiles once."""
    array = np.frombuffer(buffer, np.uint8)
    array.flags.writeable = False
    return array


# --- Framing --------------------------------------------------------------------------------------------------------


def _crc_tables() -> Words:
    """[8, 256] tables of CRC32C, eight bytes at a time (Kounavis and Berry 2005, "slicing-by-8")."""
    tables = np.zeros((8, 256), np.uint32)
    tables[0] = np.arange(256)
    for _ in range(8):
        tables[0] = (tables[0] >> 1) ^ np.where(tables[0] & 1, np.uint32(0x82F63B78), np.uint32(0))
    for k in range(1, 8):
        tables[k] = (tables[k - 1] >> 8) ^ tables[0][tables[k - 1] & 255]
    return tables


_TABLES = _crc_tables()
_WHOLE, _NO_TFRECORD, _TOO_LONG = 0, 1, 2  # why a walk over frames ended


def _masked(data: bytes) -> int:
    """Masked CRC32C, as TFRecord stores it: rotated and moved, since a CRC of data that holds CRCs is weak."""
    crc = crc32c.crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@_compiled
def _masked_crc(data: Bytes, start: int, stop: int) -> int:
    """`_masked` of data[start:stop], without a call into Python."""
    crc = np.uint32(0xFFFFFFFF)
    while stop - start >= 8:
        low = crc ^ (
            np.uint32(data[start])
            | np.uint32(data[start + 1]) << np.uint32(8)
            | np.uint32(data[start + 2]) << np.uint32(16)
            | np.uint32(data[start + 3]) << np.uint32(24)
        )
        crc = np.uint32(
            _TABLES[7, low & np.uint32(255)]
            ^ _TABLES[6, (low >> np.uint32(8)) & np.uint32(255)]
            ^ _TABLES[5, (low >> np.uint32(16)) & np.uint32(255)]
            ^ _TABLES[4, (low >> np.uint32(24)) & np.uint32(255)]
            ^ _TABLES[3, data[start + 4]]
            ^ _TABLES[2, data[start + 5]]
            ^ _TABLES[1, data[start + 6]]
            ^ _TABLES[0, data[start + 7]]
        )
        start += 8
    while start < stop:
        crc = np.uint32(_TABLES[0, (crc ^ np.uint32(data[start])) & np.uint32(255)] ^ (crc >> np.uint32(8)))
        start += 1
    value = _int(crc) ^ 0xFFFFFFFF
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


@_compiled
def _read_word(data: Bytes, at: int) -> int:
    """Little-endian uint32."""
    return _int(data[at]) | _int(data[at + 1]) << 8 | _int(data[at + 2]) << 16 | _int(data[at + 3]) << 24


@_compiled
def _frame_length(data: Bytes, at: int) -> int:
    """The length that a frame at `at` claims; any that is too long reads as MAX_RECORD_BYTES + 1."""
    low, high = _read_word(data, at), _read_word(data, at + 4)
    return MAX_RECORD_BYTES + 1 if high or low > MAX_RECORD_BYTES else low


@_compiled
def _count_frames(data: Bytes) -> int:
    """At most so many records does the buffer hold whole."""
    at, count = 0, 0
    while len(data) - at >= HEADER_BYTES:
        at += HEADER_BYTES + _frame_length(data, at) + FOOTER_BYTES
        if at > len(data):
            break
        count += 1
    return count


@_compiled
def _walk_frames(data: Bytes, offsets: Ints, lengths: Ints, crcs: Words, is_intact: Flags) -> tuple[int, int, int]:
    """Fill the arrays with the buffer's whole records; how many, bytes consumed, and why it ended."""
    at = 0
    for i in range(len(offsets) + 1):
        if len(data) - at < HEADER_BYTES:
            return i, at, _WHOLE
        if _masked_crc(data, at, at + 8) != _read_word(data, at + 8):
            return i, at, _NO_TFRECORD
        length = _frame_length(data, at)
        if length > MAX_RECORD_BYTES:
            return i, at, _TOO_LONG
        start, stop = at + HEADER_BYTES, at + HEADER_BYTES + length
        if len(data) - stop < FOOTER_BYTES:
            return i, at, _WHOLE
        stored = _read_word(data, stop)
        offsets[i], lengths[i], crcs[i] = start, length, stored
        is_intact[i] = _masked_crc(data, start, stop) == stored
        at = stop + FOOTER_BYTES
    return len(offsets), at, _WHOLE


@dataclass(frozen=True, eq=False)
class Records:
    """The whole records of a piece of a file, N of them.

    Args:
        buffer: the piece.
        first_record: number of its first record in the file.
        first_offset: byte offset of the piece in the decompressed file.
        offsets, lengths: [N] int64, the payloads in `buffer`.
        crcs: [N] uint32, the payloads' CRCs as stored (masked).
        is_intact: [N], whether the payload agrees with its CRC.
        consumed: bytes of whole records; what follows belongs to the next piece.
        lost: why the rest of the file cannot be read; None: it can.
    """

    buffer: Bytes
    first_record: int
    first_offset: int
    offsets: Ints
    lengths: Ints
    crcs: Words
    is_intact: Flags
    consumed: int
    lost: BadRecord | None

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def frame_offsets(self) -> Ints:
        """[N] int64 byte offsets of the frames in the decompressed file."""
        return self.offsets + (self.first_offset - HEADER_BYTES)

    def payload(self, i: int) -> bytes:
        """The i-th record of the piece."""
        return self.buffer[self.offsets[i] : self.offsets[i] + self.lengths[i]].tobytes()


def find_records(buffer: Buffer, *, first_record: int = 0, first_offset: int = 0, is_last: bool = True) -> Records:
    """Find the whole records of a piece of a file and check both of their CRCs. Damage is told, not raised.

    Args:
        buffer: the piece, beginning at a frame.
        first_record: number of its first record in the file.
        first_offset: byte offset of the piece in the decompressed file.
        is_last: the file ends with this piece, so a record cut off at its end is damage.
    """
    data = _view(buffer)
    count = _count_frames(data)
    offsets, lengths = np.zeros(count, np.int64), np.zeros(count, np.int64)
    crcs, is_intact = np.zeros(count, np.uint32), np.zeros(count, np.bool_)
    found, consumed, ending = _walk_frames(data, offsets, lengths, crcs, is_intact)
    lost = None
    if ending != _WHOLE or (is_last and consumed < len(data)):
        lost = _lost(data[consumed:], ending, first_record + found, first_offset + consumed)
    return Records(
        data,
        first_record,
        first_offset,
        offsets[:found],
        lengths[:found],
        crcs[:found],
        is_intact[:found],
        consumed,
        lost,
    )


def _lost(rest: Bytes, ending: int, record: int, offset: int) -> BadRecord:
    """Why framing ends at the frame that `rest` begins with."""
    hint = "" if record else " (is this a TFRecord file?)"
    header = rest[:HEADER_BYTES].tobytes()
    length = int.from_bytes(header[:8], "little")
    if len(rest) < HEADER_BYTES:
        found = f"the end of the file after {len(rest)} bytes of a record"
        expected = f"a {HEADER_BYTES}-byte header{hint}"
    elif ending == _NO_TFRECORD:
        found = f"a record length of {length} with checksum 0x{int.from_bytes(header[8:], 'little'):08x}"
        expected = f"checksum 0x{_masked(header[:8]):08x}{hint}"
    elif ending == _TOO_LONG:
        found, expected = f"a record of {length} bytes", f"at most {MAX_RECORD_BYTES}"
    else:
        found = f"the end of the file after {len(rest)} bytes of a record"
        expected = f"{HEADER_BYTES + length + FOOTER_BYTES} bytes"
    return BadRecord(record, offset, found, expected, ends_file=True)


def walk(pieces: Iterable[bytes]) -> Iterator[Records]:
    """Find the records of a file that comes in pieces, cut anywhere; memory is that of a piece and a record.

    A `DamagedStreamError` of `decompressed_chunks` becomes the last piece's `lost`.

    Args:
        pieces: the decompressed file in order, for example 16 MB at a time.
    """
    tail, record, offset = b"", 0, 0
    damage: DamagedStreamError | None = None
    try:
        for piece in pieces:
            records = find_records(tail + piece, first_record=record, first_offset=offset, is_last=False)
            yield records
            if records.lost:
                return
            tail = records.buffer[records.consumed :].tobytes()
            record, offset = record + len(records), offset + records.consumed
    except DamagedStreamError as error:
        damage = error
    if damage:
        lost = BadRecord(record, offset, str(damage), "a whole compressed file", ends_file=True)
        yield dataclasses.replace(find_records(b"", first_record=record, first_offset=offset), lost=lost)
    elif tail:
        yield find_records(tail, first_record=record, first_offset=offset)


# --- Decoding: the fast path ----------------------------------------------------------------------------------------

# Wire tags (field number << 3 | 2): Example.features, Features.feature and *List.value are all field 1.
_FIELD_1, _ENTRY_VALUE, _FLOAT_LIST, _INT64_LIST = 0x0A, 0x12, 0x12, 0x1A
_IDS, _MASK, _SEGMENTS, _POSITIONS, _MASKED_IDS, _WEIGHTS, _LABELS = range(7)
_ALL_COLUMNS = (1 << 7) - 1
_Columns = tuple[npt.NDArray[Any], ...]  # [N, values] in the order of Schema.columns; weights as bit patterns
_INFINITY_BITS = 0x7F800000  # float32 bit patterns below it are the finite values from +0 up


def _name_table() -> tuple[Bytes, Ints, Ints]:
    """Feature names as [9, 20] zero-padded bytes, their [9] lengths and their [9] columns."""
    columns = [column.name for column in Schema(1, 1, 1, 1).columns]
    names = [*columns, *ALIASES.values()]
    table = np.zeros((len(names), max(map(len, names))), np.uint8)
    for row, name in zip(table, names, strict=True):
        row[: len(name)] = np.frombuffer(name.encode(), np.uint8)
    numbers = [*range(len(columns)), *(columns.index(name) for name in ALIASES)]
    return table, np.array([len(name) for name in names]), np.array(numbers)


_NAMES, _NAME_LENGTHS, _NAME_COLUMNS = _name_table()


@_compiled
def _enter(data: Bytes, at: int, stop: int, tag: int) -> tuple[int, int]:
    """Bounds of the field with this tag at `at`; the second is -1 if there is none or it leaves [at, stop)."""
    if at >= stop or data[at] != tag:
        return at, -1
    at += 1
    length = 0
    for shift in range(0, 35, 7):
        if at >= stop:
            return at, -1
        byte = _int(data[at])
        at += 1
        length |= (byte & 127) << shift
        if byte < 128:
            return at, at + length if length <= stop - at else -1
    return at, -1


@_compiled
def _find_column(data: Bytes, start: int, stop: int) -> int:
    """The column that a feature name belongs to, or -1."""
    for row in range(len(_NAME_LENGTHS)):
        if _NAME_LENGTHS[row] == stop - start:
            k = 0
            while k < stop - start and data[start + k] == _NAMES[row, k]:
                k += 1
            if k == stop - start:
                return _int(_NAME_COLUMNS[row])
    return -1


@_compiled
def _read_ints(data: Bytes, start: int, stop: int, limit: int, row: npt.NDArray[Any]) -> bool:
    """Packed varints into a row; whether they are just its length and all in [0, limit), limit at most 2**31."""
    if stop - start == len(row):  # every varint is one byte; a loop without branches
        highest = np.uint8(0)
        for k in range(len(row)):
            highest = max(highest, data[start + k])
            row[k] = data[start + k]
        return bool(highest < min(limit, 128))
    for k in range(len(row)):
        value = 0
        shift = 0
        while True:
            if start >= stop or shift > 28:  # longer ones are negative or too large: protobuf decides
                return False
            byte = _int(data[start])
            start += 1
            value |= (byte & 127) << shift
            if byte < 128:
                break
            shift += 7
        if value >= limit:
            return False
        row[k] = value
    return start == stop


@_compiled
def _read_weights(data: Bytes, start: int, stop: int, row: Words) -> bool:
    """Packed floats into a row of bit patterns; whether they are just its length, finite and not negative."""
    if stop - start != 4 * len(row):
        return False
    for k in range(len(row)):
        bits = _read_word(data, start + 4 * k)
        if bits >= _INFINITY_BITS:
            return False
        row[k] = bits
    return True


@_compiled
def _read_column(data: Bytes, at: int, stop: int, column: int, limit: int, columns: _Columns, i: int) -> bool:
    """Read a column's values into its i-th row. One branch a column, since the arrays differ in dtype."""
    if column == _IDS:
        return _read_ints(data, at, stop, limit, columns[_IDS][i])
    if column == _MASK:
        return _read_ints(data, at, stop, limit, columns[_MASK][i])
    if column == _SEGMENTS:
        return _read_ints(data, at, stop, limit, columns[_SEGMENTS][i])
    if column == _POSITIONS:
        return _read_ints(data, at, stop, limit, columns[_POSITIONS][i])
    if column == _MASKED_IDS:
        return _read_ints(data, at, stop, limit, columns[_MASKED_IDS][i])
    if column == _WEIGHTS:
        return _read_weights(data, at, stop, columns[_WEIGHTS][i])
    return _read_ints(data, at, stop, limit, columns[_LABELS][i])


@_compiled
def _masks_tokens_only(mask: Bytes, positions: npt.NDArray[Any], weights: Words) -> bool:
    """Whether every masked position that counts stands on a token."""
    on_padding = 0
    for k in range(len(weights)):
        on_padding += weights[k] != 0 and mask[positions[k]] == 0
    return on_padding == 0


@_compiled
def _decode_record(data: Bytes, at: int, stop: int, limits: Ints, columns: _Columns, i: int) -> bool:
    """Decode one Example into the i-th rows; False unless it is certainly a good sample in packed form."""
    seen = 0
    at, end = _enter(data, at, stop, _FIELD_1)
    if end != stop:
        return False
    while at < stop:
        entry, end = _enter(data, at, stop, _FIELD_1)
        key, key_end = _enter(data, entry, end, _FIELD_1)
        kind, kind_end = _enter(data, key_end, end, _ENTRY_VALUE)
        if key_end < 0 or kind_end < 0 or kind_end != end:
            return False
        at = end
        column = _find_column(data, key, key_end)
        if column < 0:  # a feature that we do not read
            continue
        field, field_end = _enter(data, kind, end, _FLOAT_LIST if column == _WEIGHTS else _INT64_LIST)
        values, values_end = _enter(data, field, end, _FIELD_1)
        if field_end != end or values_end != end or seen >> column & 1:
            return False
        seen |= 1 << column
        if not _read_column(data, values, end, column, limits[column], columns, i):
            return False
    return seen == _ALL_COLUMNS and _masks_tokens_only(columns[_MASK][i], columns[_POSITIONS][i], columns[_WEIGHTS][i])


@_compiled
def _decode_records(data: Bytes, spans: Ints, limits: Ints, columns: _Columns, is_good: Flags) -> None:
    """Decode the [N, 2] spans of `data` into the rows of the columns."""
    for i in range(len(spans)):
        is_good[i] = _decode_record(data, spans[i, 0], spans[i, 1], limits, columns, i)


# --- Decoding: any record -------------------------------------------------------------------------------------------


class InvalidSampleError(ValueError):
    """A record's payload is no valid sample.

    Args:
        found: what it holds.
        expected: what it should hold.
    """

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"found {found}, expected {expected}")
        self.found, self.expected = found, expected


def parse_example(payload: bytes, schema: Schema) -> Arrays:
    """Decode and check one record of any legal form: one row of `Schema.empty`'s arrays.

    Raises:
        InvalidSampleError: it is not a sample of the schema; of several faults the first is told.
    """
    features = _features(payload)
    sample: Arrays = {column.name: _values(features, column) for column in schema.columns}
    positions = sample["masked_lm_positions"].astype(np.int64)
    padding = (sample["masked_lm_weights"] != 0) & (sample["input_mask"][positions] == 0)
    if padding.any():
        k = int(np.argmax(padding))
        raise InvalidSampleError(f"masked_lm_positions[{k}] = {positions[k]}, where input_mask is 0", "a token there")
    return {**sample, "next_sentence_labels": sample["next_sentence_labels"].reshape(())}


@functools.cache
def _example() -> Any:
    """The Example message. Imported when first needed, since the `tfrecord` package imports torch, seconds long."""
    from tfrecord import example_pb2

    return example_pb2


def _features(payload: bytes) -> Mapping[str, Any]:
    from google.protobuf.message import DecodeError

    try:
        return cast(Mapping[str, Any], _example().Example.FromString(payload).features.feature)
    except DecodeError as error:
        found = f"a payload of {len(payload)} bytes that is no protobuf"
        raise InvalidSampleError(found, "a tf.train.Example") from error


def _values(features: Mapping[str, Any], column: Column) -> npt.NDArray[np.generic]:
    """A feature's values, checked for presence, type, length and range."""
    name = column.name if column.name in features else ALIASES.get(column.name, column.name)
    wanted = "float_list" if column.limit is None else "int64_list"
    if name not in features:
        raise InvalidSampleError(f"no feature {column.name}", f"{wanted} of {column.length_rule}")
    kind = features[name].WhichOneof("kind")
    if kind != wanted:
        raise InvalidSampleError(f"{name} is {'without a type' if kind is None else f'a {kind}'}", f"{wanted}")
    values: npt.NDArray[Any] = np.array(
        getattr(features[name], kind).value, np.float32 if column.limit is None else np.int64
    )
    if len(values) != column.length:
        raise InvalidSampleError(f"{name} has {len(values)} values", column.length_rule)
    limit = np.inf if column.limit is None else column.limit
    is_good = (values >= 0) & (values < limit)  # false for NaN
    if not is_good.all():
        k = int(np.argmin(is_good))
        raise InvalidSampleError(f"{name}[{k}] = {values[k]}", column.limit_rule)
    return cast(npt.NDArray[np.generic], values.astype(column.dtype))


def decode(buffer: Buffer, offsets: Ints, lengths: Ints, schema: Schema) -> tuple[Arrays, Flags]:
    """Decode records into fixed-width arrays, and check them.

    Features that the schema does not name are passed over unread. CRCs are the business of `find_records`.

    Args:
        buffer: where the records lie.
        offsets, lengths: [N] payloads in it, in bytes.
        schema: what they must look like.

    Returns:
        The arrays of `schema.empty(N)`, and [N] whether the record is good; `bad_records` tells why not. Rows of bad
        records are zero.

    Raises:
        ValueError: a record reaches beyond the buffer.
    """
    data = _view(buffer)
    spans = np.stack([offsets, offsets + lengths], axis=1).astype(np.int64, copy=False)
    if np.any((spans[:, 0] < 0) | (spans[:, 1] < spans[:, 0]) | (spans[:, 1] > len(data))):
        raise ValueError(f"A record reaches beyond the buffer of {len(data)} bytes; was the file changed?")
    arrays, is_good = schema.empty(len(offsets)), np.zeros(len(offsets), np.bool_)
    columns = tuple(arrays[column.name].reshape(len(offsets), column.length) for column in schema.columns)
    bits = tuple(column.view(np.uint32) if column.dtype == np.float32 else column for column in columns)
    limits = np.array([column.limit or 0 for column in schema.columns])
    _decode_records(data, spans, limits, bits, is_good)
    for i in np.flatnonzero(~is_good).tolist():
        is_good[i] = _decode_slowly(data[spans[i, 0] : spans[i, 1]].tobytes(), i, schema, arrays)
    return arrays, is_good


def _decode_slowly(payload: bytes, i: int, schema: Schema, arrays: Arrays) -> bool:
    """What the fast path left: fill row i if the record is good after all, else clear it."""
    try:
        sample = parse_example(payload, schema)
    except InvalidSampleError:
        sample = {name: np.zeros((), column.dtype) for name, column in arrays.items()}
        good = False
    else:
        good = True
    for name, values in sample.items():
        arrays[name][i] = values
    return good


def bad_records(records: Records, is_good: Flags, schema: Schema) -> Iterator[BadRecord]:
    """Every damaged place among the records, in order.

    Args:
        records: of `find_records` or `walk`.
        is_good: [N] of `decode` on them.
        schema: what they must look like.
    """
    frames = records.frame_offsets
    for i in np.flatnonzero(~(is_good & records.is_intact)).tolist():
        found, expected = _complaint(records, i, schema)
        yield BadRecord(records.first_record + i, int(frames[i]), found, expected)
    if records.lost:
        yield records.lost


def _complaint(records: Records, i: int, schema: Schema) -> tuple[str, str]:
    payload = records.payload(i)
    if not records.is_intact[i]:
        found = f"a payload of {len(payload)} bytes with checksum 0x{int(records.crcs[i]):08x}"
        return found, f"checksum 0x{_masked(payload):08x}"
    try:
        parse_example(payload, schema)
    except InvalidSampleError as error:
        return error.found, error.expected
    raise AssertionError(f"decode() refused record {records.first_record + i}, parse_example() takes it")


# --- Writing --------------------------------------------------------------------------------------------------------


def encode_example(sample: Mapping[str, npt.ArrayLike]) -> bytes:
    """One sample as a serialized tf.train.Example, floats as float_list and integers as int64_list; keys sorted."""
    messages = _example()
    example = messages.Example()
    for name, values in sample.items():
        array = np.atleast_1d(values)
        feature = example.features.feature[name]
        target = feature.float_list if array.dtype.kind == "f" else feature.int64_list
        target.value.extend(array.tolist())
    return cast(bytes, example.SerializeToString(deterministic=True))


def frame(payload: bytes) -> bytes:
    """A payload as it stands in a TFRecord file: length, its CRC, payload, its CRC."""
    length = len(payload).to_bytes(8, "little")
    return length + _masked(length).to_bytes(4, "little") + payload + _masked(payload).to_bytes(4, "little")


def write_tfrecord(path: str | Path, payloads: Iterable[bytes], compression: Compression = "") -> None:
    """Write a local TFRecord file; the same payloads give the same bytes."""
    engine = zlib.compressobj(wbits=_WINDOW_BITS[compression]) if compression else None
    with Path(path).open("wb") as file:
        for payload in payloads:
            record = frame(payload)
            file.write(engine.compress(record) if engine else record)
        if engine:
            file.write(engine.flush())
