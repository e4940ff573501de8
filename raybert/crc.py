"""CRC32C, masked as TFRecord stores it: in Python for single checksums, compiled for many."""

from __future__ import annotations

import crc32c
import numpy as np

from raybert.jit import Bytes, Words, as_int, compiled


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


def masked_crc(data: bytes) -> int:
    """Masked CRC32C, as TFRecord stores it: rotated and moved, since a CRC of data that holds CRCs is weak."""
    crc = crc32c.crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@compiled
def masked_crc_of(data: Bytes, start: int, stop: int) -> int:
    """`masked_crc` of data[start:stop], without a call into Python."""
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
    value = as_int(crc) ^ 0xFFFFFFFF
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


@compiled
def read_word(data: Bytes, at: int) -> int:
    """Little-endian uint32."""
    return as_int(data[at]) | as_int(data[at + 1]) << 8 | as_int(data[at + 2]) << 16 | as_int(data[at + 3]) << 24
