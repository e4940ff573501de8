"""Compressed files: told by their content, not by their name, and decompressed in bounded memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Literal

from raybert.crc import masked_crc

Compression = Literal["", "gzip", "zlib"]

_HEAD_BYTES = 64  # tell a file's kind
_PIECE_BYTES = 1 << 20  # of decompressed data at a time
_WINDOW_BITS: dict[Compression, int] = {"gzip": 31, "zlib": 15}  # zlib's numbers for the two containers


class DamagedStreamError(ValueError):
    """A compressed file is damaged or cut; what could be decompressed was given before."""


def compression(head: bytes) -> Compression:
    """How a file is compressed, by its first 64 bytes.

    A plain TFRecord begins with a length, which may look like anything: the length's CRC settles it.
    """
    if len(head) >= 12 and masked_crc(head[:8]) == int.from_bytes(head[8:12], "little"):
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


def compressor(kind: Literal["gzip", "zlib"]) -> zlib._Compress:
    """An engine that compresses into such a container; the same input gives the same bytes."""
    return zlib.compressobj(wbits=_WINDOW_BITS[kind])
