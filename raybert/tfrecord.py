"""TFRecord files: framing, checksums and writing.

Format: https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
Shape letter: N records of a buffer. Framing runs in numba over whole buffers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raybert.compression import Compression, DamagedStreamError, compressor
from raybert.crc import masked_crc, masked_crc_of, read_word
from raybert.jit import Buffer, Bytes, Flags, Ints, Words, compiled, view

MAX_RECORD_BYTES = 1 << 26  # a sample is a few KB; what claims more is refused, so that memory stays bounded
HEADER_BYTES, FOOTER_BYTES = 12, 4  # length and its CRC; the payload's CRC

_WHOLE, _NO_TFRECORD, _TOO_LONG = 0, 1, 2  # why a walk over frames ended


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


@compiled
def _frame_length(data: Bytes, at: int) -> int:
    """The length that a frame at `at` claims; any that is too long reads as MAX_RECORD_BYTES + 1."""
    low, high = read_word(data, at), read_word(data, at + 4)
    return MAX_RECORD_BYTES + 1 if high or low > MAX_RECORD_BYTES else low


@compiled
def _count_frames(data: Bytes) -> int:
    """At most so many records does the buffer hold whole."""
    at, count = 0, 0
    while len(data) - at >= HEADER_BYTES:
        at += HEADER_BYTES + _frame_length(data, at) + FOOTER_BYTES
        if at > len(data):
            break
        count += 1
    return count


@compiled
def _walk_frames(data: Bytes, offsets: Ints, lengths: Ints, crcs: Words, is_intact: Flags) -> tuple[int, int, int]:
    """Fill the arrays with the buffer's whole records; how many, bytes consumed, and why it ended."""
    at = 0
    for i in range(len(offsets) + 1):
        if len(data) - at < HEADER_BYTES:
            return i, at, _WHOLE
        if masked_crc_of(data, at, at + 8) != read_word(data, at + 8):
            return i, at, _NO_TFRECORD
        length = _frame_length(data, at)
        if length > MAX_RECORD_BYTES:
            return i, at, _TOO_LONG
        start, stop = at + HEADER_BYTES, at + HEADER_BYTES + length
        if len(data) - stop < FOOTER_BYTES:
            return i, at, _WHOLE
        stored = read_word(data, stop)
        offsets[i], lengths[i], crcs[i] = start, length, stored
        is_intact[i] = masked_crc_of(data, start, stop) == stored
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
    data = view(buffer)
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
        expected = f"checksum 0x{masked_crc(header[:8]):08x}{hint}"
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


def frame(payload: bytes) -> bytes:
    """A payload as it stands in a TFRecord file: length, its CRC, payload, its CRC."""
    length = len(payload).to_bytes(8, "little")
    return length + masked_crc(length).to_bytes(4, "little") + payload + masked_crc(payload).to_bytes(4, "little")


def write_tfrecord(path: str | Path, payloads: Iterable[bytes], compression: Compression = "") -> None:
    """Write a local TFRecord file; the same payloads give the same bytes."""
    with Path(path).open("wb") as file:
        file.writelines(framed(payloads, compression))


def framed(payloads: Iterable[bytes], compression: Compression = "") -> Iterator[bytes]:
    """The content of a TFRecord file, piece by piece; the same payloads give the same bytes."""
    engine = compressor(compression) if compression else None
    for payload in payloads:
        record = frame(payload)
        yield engine.compress(record) if engine else record
    if engine:
        yield engine.flush()
