"""Compression: files are told by content, and damaged streams are clear errors."""

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import DATA, GOOD, cut

from raybert.compression import DamagedStreamError, compression, decompress, decompressed_chunks
from raybert.tfrecord import frame, walk


@pytest.mark.parametrize("kind", ["gzip", "zlib"])
@pytest.mark.parametrize("size", [1, 100, 1 << 24])
def test_compressed_files_read_as_the_plain_one(kind, size):
    raw = (DATA / f"tf_examples.tfrecord.{'gz' if kind == 'gzip' else kind}").read_bytes()
    assert compression(raw[:64]) == kind
    assert b"".join(decompressed_chunks(cut(raw, size))) == GOOD


def test_joined_and_padded_gzip_is_read():
    part = (DATA / "tf_examples.tfrecord.gz").read_bytes()
    assert decompress(part + part + b"\0" * 512) == GOOD + GOOD


def test_pieces_of_a_decompressed_file_are_small():
    engine = zlib.compressobj(wbits=31)
    bomb = engine.compress(bytes(1 << 25)) + engine.flush()
    assert max(map(len, decompressed_chunks([bomb]))) <= 1 << 20


@pytest.mark.parametrize(("length", "looks_like"), [(0x9C78, "zlib"), (0x088B1F, "gzip")])
def test_a_plain_file_that_begins_like_a_compressed_one_is_plain(length, looks_like):
    raw = frame(bytes(length))
    assert compression(raw[:8]) == looks_like or looks_like == "zlib"
    assert compression(raw[:64]) == ""
    assert decompress(raw) == raw


@pytest.mark.parametrize("text", [b"hCard is a format.", b"x^2 + 1", b"Hello", b"x", b""])
def test_text_is_not_taken_for_zlib(text):
    assert compression(text) == ""


@pytest.mark.parametrize("name", ["tf_examples.tfrecord.gz", "tf_examples.tfrecord.zlib"])
def test_a_cut_or_damaged_stream_is_a_clear_error(name):
    raw = (DATA / name).read_bytes()
    for size in [3, 20, 5000, len(raw) - 1]:
        with pytest.raises(DamagedStreamError, match="ends early"):
            decompress(raw[:size])
    flipped = raw[:9000] + bytes([raw[9000] ^ 255]) + raw[9001:]
    with pytest.raises(DamagedStreamError, match="is damaged"):
        decompress(flipped)
    with pytest.raises(DamagedStreamError, match=r"follow|damaged"):
        decompress(raw + b"something else")


@given(st.binary(max_size=200))
def test_damaged_streams_never_crash(tail):
    for head in (b"", b"\x1f\x8b\x08", b"\x78\x9c"):
        *_, last = [None, *walk(decompressed_chunks([head + tail]))]
        assert last is None or last.lost
