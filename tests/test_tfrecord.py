"""TFRecord: frames are found in pieces of any size, and no damage passes."""

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import (
    DAMAGED,
    DATA,
    GOOD,
    PAYLOADS,
    RECORDS,
    SCHEMA,
    TINY,
    TINY_FILE,
    TINY_FRAME_BYTES,
    cut,
    large_damaged,
    read,
)
from tfrecord.writer import TFRecordWriter

from raybert.compression import compression, decompress, decompressed_chunks
from raybert.example import bad_records, decode
from raybert.tfrecord import HEADER_BYTES, MAX_RECORD_BYTES, BadRecord, find_records, frame, walk, write_tfrecord


@pytest.mark.parametrize("name", large_damaged())
def test_every_class_of_damaged_framing_gives_its_clear_error(name):
    _, is_good, bad = read(large_damaged()[name])
    expected = DAMAGED[name]
    assert len(bad) == 1 and (bad[0].record, bad[0].offset) == (expected.record, expected.offset)
    assert bad[0].ends_file == expected.ends_file and is_good.sum() == (100 if expected.ends_file else 117)
    if name != "flip_payload.tfrecord":  # which bit of it was flipped is of no interest
        assert bad[0] == expected


def test_a_bad_record_reads_as_one_sentence():
    bad = BadRecord(7, 5654, "input_ids[5] = 30522", "0 <= input_ids < vocab_size 30522")
    assert str(bad) == ("record 7 at byte 5654: found input_ids[5] = 30522, expected 0 <= input_ids < vocab_size 30522")


@given(st.integers(0, len(TINY_FILE) - 1), st.integers(1, 255))
def test_every_flipped_byte_is_reported_at_its_record(at, mask):
    raw = bytearray(TINY_FILE)
    raw[at] ^= mask
    records = find_records(bytes(raw))
    _, is_good = decode(records.buffer, records.offsets, records.lengths, TINY)
    bad = list(bad_records(records, is_good, TINY))
    record = at // TINY_FRAME_BYTES
    assert [(place.record, place.offset) for place in bad] == [(record, record * TINY_FRAME_BYTES)]
    assert bad[0].ends_file == (at % TINY_FRAME_BYTES < HEADER_BYTES)


def test_a_cut_at_every_byte_is_reported_but_at_the_boundaries():
    for size in range(len(TINY_FILE)):
        _, is_good, bad = read(TINY_FILE[:size], TINY)
        record, rest = divmod(size, TINY_FRAME_BYTES)
        assert is_good.tolist() == [True] * record
        assert [(place.record, place.offset, place.ends_file) for place in bad] == (
            [(record, record * TINY_FRAME_BYTES, True)] if rest else []
        )
        assert not rest or f"the end of the file after {rest} bytes" in bad[0].found


@given(st.binary(max_size=300), st.booleans())
def test_garbage_never_crashes(raw, has_header):
    if has_header:
        raw = frame(raw)
    list(walk(decompressed_chunks([raw])))
    records = find_records(raw)
    _, is_good = decode(records.buffer, records.offsets, records.lengths, TINY)
    assert len(list(bad_records(records, is_good, TINY))) == bool(raw)


@pytest.mark.parametrize("length", [MAX_RECORD_BYTES + 1, 1 << 38, 1 << 63, (1 << 64) - 1])
def test_a_huge_length_is_refused_and_allocates_nothing(length):
    header = struct.pack("<Q", length)
    raw = TINY_FILE + header + TFRecordWriter.masked_crc(header) + b"rest"
    find_records(raw)  # compiled
    tracemalloc.start()
    *_, last = walk([raw])
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert last.lost == BadRecord(
        4, len(TINY_FILE), f"a record of {length} bytes", f"at most {MAX_RECORD_BYTES}", ends_file=True
    )
    assert peak_bytes < 1 << 16


def summary(pieces):
    """What a walk found, whatever the pieces."""
    walked = list(walk(pieces))
    bad = [place for records in walked for place in bad_records(records, np.ones(len(records), bool), SCHEMA)]
    payloads = [records.payload(i) for records in walked for i in range(len(records))]
    frames = np.concatenate([records.frame_offsets for records in walked]).tolist()
    crcs = np.concatenate([records.crcs for records in walked]).tolist()
    counts = np.cumsum([0, *(len(records) for records in walked)])
    assert [records.first_record for records in walked] == counts[:-1].tolist()
    return bad, payloads, frames, crcs


@pytest.mark.parametrize("name", ["good", *large_damaged()])
@pytest.mark.parametrize("size", [97, 811, 812, 4096, 96_679])
def test_pieces_of_any_size_give_the_same(name, size):
    raw = {"good": GOOD, **large_damaged()}[name]
    assert summary(cut(raw, size)) == summary([raw])


@given(st.integers(1, len(TINY_FILE)))
def test_small_pieces_of_any_size_give_the_same(size):
    assert summary(cut(TINY_FILE, size)) == summary([TINY_FILE])
    assert summary(cut(TINY_FILE[:-3], size)) == summary([TINY_FILE[:-3]])


def test_crcs_are_those_stored():
    stored = [struct.unpack("<I", TFRecordWriter.masked_crc(payload))[0] for payload in PAYLOADS]
    assert RECORDS.crcs.tolist() == stored and RECORDS.is_intact.all()


@pytest.mark.parametrize("length", range(20))
def test_checksums_of_any_length_agree_with_the_library(length):
    payload = bytes(range(250, 250 - length, -1))
    assert find_records(frame(payload)).is_intact.tolist() == [True]


def test_the_good_beginning_of_a_cut_stream_is_read():
    raw = (DATA / "tf_examples.tfrecord.gz").read_bytes()
    walked = list(walk(decompressed_chunks(cut(raw[:9000], 1000))))
    payloads = [records.payload(i) for records in walked for i in range(len(records))]
    lost = walked[-1].lost
    assert 20 < len(payloads) < 118 and payloads == PAYLOADS[: len(payloads)]
    assert lost == BadRecord(
        len(payloads),
        int(RECORDS.frame_offsets[len(payloads)]),
        "the gzip stream ends early",
        "a whole compressed file",
        ends_file=True,
    )


@pytest.mark.parametrize("kind", ["", "gzip", "zlib"])
def test_what_we_write_is_read_back_and_written_alike_again(tmp_path, kind):
    for name in ("one", "two"):
        write_tfrecord(tmp_path / name, PAYLOADS, kind)
    raw = (tmp_path / "one").read_bytes()
    assert raw == (tmp_path / "two").read_bytes()
    assert compression(raw[:64]) == kind and decompress(raw) == GOOD
