"""TFRecord: what Google's script wrote is read exactly, and no damage passes."""

import json
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tfrecord import example_pb2, reader
from tfrecord.writer import TFRecordWriter

from raybert import tfrecord
from raybert.tfrecord import BadRecord, InvalidSampleError, Schema

DATA = Path(__file__).parent / "data"
MORE_DATA = Path(__file__).parents[2] / "shared" / "data"  # a larger collection beside the repository, if there is one
SCHEMA = Schema(max_seq_length=128, max_predictions_per_seq=20, vocab_size=30522, type_vocab_size=2)
TINY = Schema(max_seq_length=6, max_predictions_per_seq=2, vocab_size=300, type_vocab_size=2)
NAMES = [column.name for column in SCHEMA.columns]
GOOD = (DATA / "tf_examples.tfrecord").read_bytes()
RECORDS = tfrecord.find_records(GOOD)
PAYLOADS = [RECORDS.payload(i) for i in range(len(RECORDS))]
TINY_SAMPLE = {
    "input_ids": np.array([101, 299, 7, 102, 0, 0]),
    "input_mask": np.array([1, 1, 1, 1, 0, 0]),
    "segment_ids": np.array([0, 0, 1, 1, 0, 0]),
    "masked_lm_positions": np.array([2, 0]),
    "masked_lm_ids": np.array([200, 0]),
    "masked_lm_weights": np.array([1.0, 0.0], np.float32),
    "next_sentence_labels": np.array([1]),
}
TINY_FILE = b"".join(
    tfrecord.frame(tfrecord.encode_example({**TINY_SAMPLE, "masked_lm_ids": np.array([i, 0])})) for i in range(4)
)
TINY_FRAME_BYTES = len(TINY_FILE) // 4


def read(raw, schema=SCHEMA):
    """Arrays, flags of good records, and every bad place, of a file in one piece."""
    records = tfrecord.find_records(tfrecord.decompress(raw))
    arrays, is_good = tfrecord.decode(records.buffer, records.offsets, records.lengths, schema)
    return arrays, is_good & records.is_intact, list(tfrecord.bad_records(records, is_good, schema))


def read_payload(payload, schema=TINY):
    return tfrecord.decode(payload, np.array([0]), np.array([len(payload)]), schema)


def complaint(payload, schema=TINY):
    with pytest.raises(InvalidSampleError) as caught:
        tfrecord.parse_example(payload, schema)
    return caught.value.found, caught.value.expected


def assert_same(arrays, others):
    assert arrays.keys() == others.keys()
    for name, values in arrays.items():
        np.testing.assert_array_equal(values, others[name], err_msg=name)


def peer_samples(path):
    """What the `tfrecord` package reads, an independent implementation."""
    kinds = {name: "float" if name == "masked_lm_weights" else "int" for name in NAMES}
    samples = list(reader.tfrecord_loader(str(path), None, kinds))
    stacked = {name: np.stack([sample[name] for sample in samples]) for name in NAMES}
    return {**stacked, "next_sentence_labels": stacked["next_sentence_labels"][:, 0]}


# --- Good files -----------------------------------------------------------------------------------------------------


def test_first_records_equal_what_tensorflow_parsed():
    arrays, is_good, bad = read(GOOD)
    expected = json.loads((DATA / "first3.json").read_text())
    assert len(is_good) == 118 and is_good.all() and not bad
    for i, sample in enumerate(expected):
        assert {name: np.atleast_1d(values[i]).tolist() for name, values in arrays.items()} == sample


@pytest.mark.parametrize(
    ("path", "length", "places"),
    [
        pytest.param(path, length, places, id=path.name)
        for folder, glob, length, places in [
            (DATA, "tf_examples.tfrecord", 128, 20),
            (DATA, "legal/*", 128, 20),
            (MORE_DATA, "legal/*", 128, 20),
            (MORE_DATA, "real128/*00000*", 128, 20),
            (MORE_DATA, "real512/*00000*", 512, 76),
        ]
        for path in sorted(folder.glob(glob))
    ],
)
def test_every_record_equals_an_independent_peers(path, length, places):
    arrays, is_good, bad = read(path.read_bytes(), Schema(length, places, 30522, 2))
    assert not bad and is_good.all()
    assert_same(arrays, peer_samples(path))


def test_dtypes_are_small():
    arrays, _, _ = read(GOOD)
    assert {name: values.dtype.name for name, values in arrays.items()} == {
        "input_ids": "uint16",
        "input_mask": "uint8",
        "segment_ids": "uint8",
        "masked_lm_positions": "uint16",
        "masked_lm_ids": "uint16",
        "masked_lm_weights": "float32",
        "next_sentence_labels": "uint8",
    }


def test_a_large_vocabulary_takes_int32():
    schema = Schema(6, 2, 1 << 20, 2)
    sample = {**TINY_SAMPLE, "input_ids": np.array([0, 127, 128, 65_535, 65_536, (1 << 20) - 1])}
    arrays, is_good = read_payload(tfrecord.encode_example(sample), schema)
    assert is_good.all() and arrays["input_ids"].dtype == np.int32
    assert arrays["input_ids"][0].tolist() == sample["input_ids"].tolist()


@pytest.mark.parametrize("sizes", [(0, 1, 1, 1), (1, 1, 1 << 31, 1), (1, 1, 1, 257), (1, -1, 1, 1)])
def test_sizes_that_no_dtype_holds_are_refused(sizes):
    with pytest.raises(ValueError, match="must be positive"):
        Schema(*sizes)


# --- Legal but unusual ----------------------------------------------------------------------------------------------


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def entry(name, values, *, packed=True):
    """One map entry of Features, hand-made."""
    if np.asarray(values).dtype.kind == "f":
        items, kind, tag = [struct.pack("<f", value) for value in values], 2, b"\x0d"
    else:
        items, kind, tag = [varint(int(value) & (1 << 64) - 1) for value in values], 3, b"\x08"
    content = field(1, b"".join(items)) if packed else b"".join(tag + item for item in items)
    return field(1, field(1, name.encode()) + field(2, field(kind, content)))


@given(st.permutations(NAMES), st.sets(st.sampled_from(NAMES)), st.booleans(), st.booleans())
def test_any_key_order_encoding_and_generation_of_names(order, unpacked, use_aliases, with_extra):
    names = tfrecord.ALIASES if use_aliases else {}
    entries = [entry(names.get(name, name), TINY_SAMPLE[name], packed=name not in unpacked) for name in order]
    extra = [entry("a feature of someone else's", [1, 2])] if with_extra else []
    arrays, is_good = read_payload(field(1, b"".join([*entries[:3], *extra, *entries[3:]])))
    assert is_good.all()
    assert_same({name: np.atleast_1d(values[0]) for name, values in arrays.items()}, TINY_SAMPLE)


def test_the_last_of_two_equal_keys_wins():
    entries = b"".join(entry(name, values) for name, values in TINY_SAMPLE.items())
    arrays, is_good = read_payload(field(1, entries + entry("next_sentence_labels", [0])))
    assert is_good.all() and arrays["next_sentence_labels"].tolist() == [0]
    _, is_good = read_payload(field(1, entries + entry("next_sentence_labels", [2])))
    assert not is_good.any()


def test_googles_name_wins_over_model_gardens():
    entries = [entry(name, values) for name, values in TINY_SAMPLE.items()]
    for both in ([entry("input_word_ids", [9] * 6), *entries], [*entries, entry("input_word_ids", [9] * 6)]):
        arrays, is_good = read_payload(field(1, b"".join(both)))
        assert is_good.all() and arrays["input_ids"][0].tolist() == TINY_SAMPLE["input_ids"].tolist()


def test_as_many_bytes_as_values_are_not_always_as_many_values():
    payload = tfrecord.encode_example({**TINY_SAMPLE, "input_ids": np.array([299, 7, 1, 1, 1])})
    _, is_good = read_payload(payload)
    assert not is_good.any()
    assert complaint(payload) == ("input_ids has 5 values", "6 (data.max_seq_length)")


def test_an_entry_does_not_reach_into_what_follows_the_record():
    entries = b"".join(entry(name, values) for name, values in TINY_SAMPLE.items())
    whole = field(1, entries[:-1]) + entries[-1:]
    _, is_good = tfrecord.decode(whole, np.array([0]), np.array([len(whole) - 1]), TINY)
    assert not is_good.any()


@settings(max_examples=300)
@given(st.data())
def test_fast_path_and_protobuf_agree_on_mutated_payloads(data):
    payload = bytearray(tfrecord.encode_example(TINY_SAMPLE))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload) - 1))
        payload[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    arrays, is_good = read_payload(bytes(payload))
    try:
        sample = tfrecord.parse_example(bytes(payload), TINY)
    except InvalidSampleError:
        assert not is_good.any() and not any(values.any() for values in arrays.values())
    else:
        assert is_good.all()
        assert_same({name: values[0] for name, values in arrays.items()}, sample)


# --- Bad samples ----------------------------------------------------------------------------------------------------

DAMAGED = {
    "garbage_proto.tfrecord": BadRecord(1, 811, "a payload of 50 bytes that is no protobuf", "a tf.train.Example"),
    "missing_feature.tfrecord": BadRecord(
        3, 2346, "no feature masked_lm_weights", "float_list of 20 (data.max_predictions_per_seq)"
    ),
    "position_ge_seq.tfrecord": BadRecord(
        7, 5654, "masked_lm_positions[0] = 128", "0 <= masked_lm_positions < max_seq_length 128"
    ),
    "token_id_ge_vocab.tfrecord": BadRecord(7, 5654, "input_ids[5] = 30522", "0 <= input_ids < vocab_size 30522"),
    "wrong_length_one.tfrecord": BadRecord(5, 4024, "input_ids has 64 values", "128 (data.max_seq_length)"),
    "wrong_type.tfrecord": BadRecord(3, 2346, "masked_lm_positions is a float_list", "int64_list"),
    "not_tfrecord.txt.tfrecord": BadRecord(
        0,
        0,
        f"a record length of {int.from_bytes(b'This tex', 'little')} with checksum 0x73692074",
        "checksum 0x5e68c31b (is this a TFRecord file?)",
        ends_file=True,
    ),
    "flip_length.tfrecord": BadRecord(
        100,
        81885,
        f"a record length of {(1 << 38) + 822} with checksum 0x4a3b0755",
        "checksum 0xbafa3609",
        ends_file=True,
    ),
    "flip_payload.tfrecord": BadRecord(
        100, 81885, "a payload of 822 bytes with checksum 0x9fb78aa9", "checksum 0x0ffe8e06"
    ),
    "trunc_payload.tfrecord": BadRecord(
        100, 81885, "the end of the file after 423 bytes of a record", "838 bytes", ends_file=True
    ),
}


def large_damaged():
    """The damaged files that are too large to keep, made from the good one as theirs were."""
    flipped_length, flipped_payload = bytearray(GOOD), bytearray(GOOD)
    flipped_length[81885 + 4] ^= 1 << 6
    flipped_payload[81885 + 12 + 411] ^= 1
    return {
        "flip_length.tfrecord": bytes(flipped_length),
        "flip_payload.tfrecord": bytes(flipped_payload),
        "trunc_payload.tfrecord": GOOD[: 81885 + 423],
    }


@pytest.mark.parametrize("path", sorted([*DATA.glob("damaged/*.tfrecord"), *MORE_DATA.glob("damaged/*.tfrecord")]))
def test_every_damaged_file_gives_its_clear_error(path):
    _, _, bad = read(path.read_bytes())
    assert bad == ([DAMAGED[path.name]] if path.stat().st_size else [])


@pytest.mark.parametrize("name", large_damaged())
def test_every_class_of_damaged_framing_gives_its_clear_error(name):
    _, is_good, bad = read(large_damaged()[name])
    expected = DAMAGED[name]
    assert len(bad) == 1 and (bad[0].record, bad[0].offset) == (expected.record, expected.offset)
    assert bad[0].ends_file == expected.ends_file and is_good.sum() == (100 if expected.ends_file else 117)
    if name != "flip_payload.tfrecord":  # which bit of it was flipped is of no interest
        assert bad[0] == expected


def test_all_bad_records_are_reported():
    bad_sample = {**TINY_SAMPLE, "input_ids": np.array([300, 0, 0, 0, 0, 0])}
    frames = [tfrecord.frame(tfrecord.encode_example(bad_sample if i % 2 else TINY_SAMPLE)) for i in range(10)]
    frames[4] = frames[4][:-1] + bytes([frames[4][-1] ^ 1])
    arrays, is_good, bad = read(b"".join(frames) + b"\0", TINY)
    assert [place.record for place in bad] == [1, 3, 4, 5, 7, 9, 10]
    assert [place.ends_file for place in bad] == [False] * 6 + [True]
    assert is_good.tolist() == [True, False, True, False, False, False, True, False, True, False]
    assert not arrays["input_ids"][1].any()


def test_a_bad_record_reads_as_one_sentence():
    bad = BadRecord(7, 5654, "input_ids[5] = 30522", "0 <= input_ids < vocab_size 30522")
    assert str(bad) == ("record 7 at byte 5654: found input_ids[5] = 30522, expected 0 <= input_ids < vocab_size 30522")


@pytest.mark.parametrize(
    ("name", "values", "found", "expected"),
    [
        ("input_ids", [0, 0, 300, 0, 0, 0], "input_ids[2] = 300", "0 <= input_ids < vocab_size 300"),
        ("input_ids", [0, -1, 0, 0, 0, 0], "input_ids[1] = -1", "0 <= input_ids < vocab_size 300"),
        ("input_ids", [0, 0, 0, 0, 0, (1 << 16) + 5], "input_ids[5] = 65541", "0 <= input_ids < vocab_size 300"),
        ("input_ids", [(1 << 32) + 5, 0, 0, 0, 0, 0], "input_ids[0] = 4294967301", "0 <= input_ids < vocab_size 300"),
        ("input_mask", [1, 1, 1, 2, 0, 0], "input_mask[3] = 2", "input_mask 0 or 1"),
        ("segment_ids", [0, 0, 0, 0, 0, 2], "segment_ids[5] = 2", "0 <= segment_ids < type_vocab_size 2"),
        ("segment_ids", [256] * 6, "segment_ids[0] = 256", "0 <= segment_ids < type_vocab_size 2"),
        ("masked_lm_positions", [6, 0], "masked_lm_positions[0] = 6", "0 <= masked_lm_positions < max_seq_length 6"),
        ("masked_lm_positions", [4, 0], "masked_lm_positions[0] = 4, where input_mask is 0", "a token there"),
        ("masked_lm_ids", [0, 300], "masked_lm_ids[1] = 300", "0 <= masked_lm_ids < vocab_size 300"),
        ("masked_lm_weights", [np.nan, 0.0], "masked_lm_weights[0] = nan", "a finite masked_lm_weights >= 0"),
        ("masked_lm_weights", [1.0, np.inf], "masked_lm_weights[1] = inf", "a finite masked_lm_weights >= 0"),
        ("masked_lm_weights", [-1.0, 0.0], "masked_lm_weights[0] = -1.0", "a finite masked_lm_weights >= 0"),
        ("masked_lm_weights", [1, 0], "masked_lm_weights is a int64_list", "float_list"),
        ("masked_lm_weights", [1.0], "masked_lm_weights has 1 values", "2 (data.max_predictions_per_seq)"),
        ("next_sentence_labels", [2], "next_sentence_labels[0] = 2", "next_sentence_labels 0 or 1"),
        ("next_sentence_labels", [0, 0], "next_sentence_labels has 2 values", "1"),
        ("input_ids", [0] * 7, "input_ids has 7 values", "6 (data.max_seq_length)"),
    ],
)
def test_a_bad_value_is_named(name, values, found, expected):
    payload = tfrecord.encode_example({**TINY_SAMPLE, name: np.array(values)})
    _, is_good = read_payload(payload)
    assert not is_good.any()
    assert complaint(payload) == (found, expected)


def test_a_feature_without_a_type_is_named():
    entries = b"".join(entry(name, values) for name, values in TINY_SAMPLE.items() if name != "input_mask")
    untyped = field(1, field(1, b"input_mask") + field(2, b""))
    assert complaint(field(1, entries + untyped)) == ("input_mask is without a type", "int64_list")


def test_an_unweighted_position_may_stand_on_padding():
    payload = tfrecord.encode_example({**TINY_SAMPLE, "masked_lm_positions": np.array([2, 5])})
    _, is_good = read_payload(payload)
    assert is_good.all()


def test_offsets_beyond_the_buffer_are_refused():
    for offset, length in [(-1, 2), (0, len(GOOD) + 1), (len(GOOD), 1), (0, -1), ((1 << 63) - 1, 2)]:
        with pytest.raises(ValueError, match="beyond the buffer"):
            tfrecord.decode(GOOD, np.array([offset]), np.array([length]), SCHEMA)


# --- Framing --------------------------------------------------------------------------------------------------------


@given(st.integers(0, len(TINY_FILE) - 1), st.integers(1, 255))
def test_every_flipped_byte_is_reported_at_its_record(at, mask):
    raw = bytearray(TINY_FILE)
    raw[at] ^= mask
    records = tfrecord.find_records(bytes(raw))
    _, is_good = tfrecord.decode(records.buffer, records.offsets, records.lengths, TINY)
    bad = list(tfrecord.bad_records(records, is_good, TINY))
    record = at // TINY_FRAME_BYTES
    assert [(place.record, place.offset) for place in bad] == [(record, record * TINY_FRAME_BYTES)]
    assert bad[0].ends_file == (at % TINY_FRAME_BYTES < tfrecord.HEADER_BYTES)


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
        raw = tfrecord.frame(raw)
    list(tfrecord.walk(tfrecord.decompressed_chunks([raw])))
    records = tfrecord.find_records(raw)
    _, is_good = tfrecord.decode(records.buffer, records.offsets, records.lengths, TINY)
    assert len(list(tfrecord.bad_records(records, is_good, TINY))) == bool(raw)


@pytest.mark.parametrize("length", [tfrecord.MAX_RECORD_BYTES + 1, 1 << 38, 1 << 63, (1 << 64) - 1])
def test_a_huge_length_is_refused_and_allocates_nothing(length):
    header = struct.pack("<Q", length)
    raw = TINY_FILE + header + TFRecordWriter.masked_crc(header) + b"rest"
    tfrecord.find_records(raw)  # compiled
    tracemalloc.start()
    *_, last = tfrecord.walk([raw])
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert last.lost == BadRecord(
        4, len(TINY_FILE), f"a record of {length} bytes", f"at most {tfrecord.MAX_RECORD_BYTES}", ends_file=True
    )
    assert peak_bytes < 1 << 16


def summary(pieces):
    """What a walk found, whatever the pieces."""
    walked = list(tfrecord.walk(pieces))
    bad = [place for records in walked for place in tfrecord.bad_records(records, np.ones(len(records), bool), SCHEMA)]
    payloads = [records.payload(i) for records in walked for i in range(len(records))]
    frames = np.concatenate([records.frame_offsets for records in walked]).tolist()
    crcs = np.concatenate([records.crcs for records in walked]).tolist()
    counts = np.cumsum([0, *(len(records) for records in walked)])
    assert [records.first_record for records in walked] == counts[:-1].tolist()
    return bad, payloads, frames, crcs


def cut(raw, size):
    return [raw[at : at + size] for at in range(0, len(raw), size)]


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
    assert tfrecord.find_records(tfrecord.frame(payload)).is_intact.tolist() == [True]


# --- Compression ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gzip", "zlib"])
@pytest.mark.parametrize("size", [1, 100, 1 << 24])
def test_compressed_files_read_as_the_plain_one(kind, size):
    raw = (DATA / f"tf_examples.tfrecord.{'gz' if kind == 'gzip' else kind}").read_bytes()
    assert tfrecord.compression(raw[:64]) == kind
    assert b"".join(tfrecord.decompressed_chunks(cut(raw, size))) == GOOD


def test_joined_and_padded_gzip_is_read():
    part = (DATA / "tf_examples.tfrecord.gz").read_bytes()
    assert tfrecord.decompress(part + part + b"\0" * 512) == GOOD + GOOD


def test_pieces_of_a_decompressed_file_are_small():
    engine = zlib.compressobj(wbits=31)
    bomb = engine.compress(bytes(1 << 25)) + engine.flush()
    assert max(map(len, tfrecord.decompressed_chunks([bomb]))) <= 1 << 20


@pytest.mark.parametrize(("length", "looks_like"), [(0x9C78, "zlib"), (0x088B1F, "gzip")])
def test_a_plain_file_that_begins_like_a_compressed_one_is_plain(length, looks_like):
    raw = tfrecord.frame(bytes(length))
    assert tfrecord.compression(raw[:8]) == looks_like or looks_like == "zlib"
    assert tfrecord.compression(raw[:64]) == ""
    assert tfrecord.decompress(raw) == raw


@pytest.mark.parametrize("text", [b"hCard is a format.", b"x^2 + 1", b"Hello", b"x", b""])
def test_text_is_not_taken_for_zlib(text):
    assert tfrecord.compression(text) == ""


@pytest.mark.parametrize("name", ["tf_examples.tfrecord.gz", "tf_examples.tfrecord.zlib"])
def test_a_cut_or_damaged_stream_is_a_clear_error(name):
    raw = (DATA / name).read_bytes()
    for size in [3, 20, 5000, len(raw) - 1]:
        with pytest.raises(tfrecord.DamagedStreamError, match="ends early"):
            tfrecord.decompress(raw[:size])
    flipped = raw[:9000] + bytes([raw[9000] ^ 255]) + raw[9001:]
    with pytest.raises(tfrecord.DamagedStreamError, match="is damaged"):
        tfrecord.decompress(flipped)
    with pytest.raises(tfrecord.DamagedStreamError, match=r"follow|damaged"):
        tfrecord.decompress(raw + b"something else")


def test_the_good_beginning_of_a_cut_stream_is_read():
    raw = (DATA / "tf_examples.tfrecord.gz").read_bytes()
    walked = list(tfrecord.walk(tfrecord.decompressed_chunks(cut(raw[:9000], 1000))))
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


@given(st.binary(max_size=200))
def test_damaged_streams_never_crash(tail):
    for head in (b"", b"\x1f\x8b\x08", b"\x78\x9c"):
        *_, last = [None, *tfrecord.walk(tfrecord.decompressed_chunks([head + tail]))]
        assert last is None or last.lost


# --- Writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["", "gzip", "zlib"])
def test_what_we_write_is_read_back_and_written_alike_again(tmp_path, kind):
    for name in ("one", "two"):
        tfrecord.write_tfrecord(tmp_path / name, PAYLOADS, kind)
    raw = (tmp_path / "one").read_bytes()
    assert raw == (tmp_path / "two").read_bytes()
    assert tfrecord.compression(raw[:64]) == kind and tfrecord.decompress(raw) == GOOD


def test_a_peer_reads_what_we_encode(tmp_path):
    arrays, _, _ = read(GOOD)
    samples = [{name: values[i] for name, values in arrays.items()} for i in range(len(PAYLOADS))]
    tfrecord.write_tfrecord(tmp_path / "ours", map(tfrecord.encode_example, samples))
    assert_same(arrays, peer_samples(tmp_path / "ours"))
    messages = [example_pb2.Example.FromString(tfrecord.encode_example(sample)) for sample in samples]
    assert messages == [example_pb2.Example.FromString(payload) for payload in PAYLOADS]


def test_we_read_what_a_peer_writes(tmp_path):
    writer = TFRecordWriter(str(tmp_path / "theirs"))
    kinds = {name: "float" if name == "masked_lm_weights" else "int" for name in NAMES}
    writer.write({name: (values.tolist(), kinds[name]) for name, values in TINY_SAMPLE.items()})
    writer.close()
    arrays, is_good, bad = read((tmp_path / "theirs").read_bytes(), TINY)
    assert is_good.tolist() == [True] and not bad
    assert_same({name: np.atleast_1d(values[0]) for name, values in arrays.items()}, TINY_SAMPLE)


def test_a_good_file_is_read_without_importing_torch():
    """The `tfrecord` package imports it, which takes seconds in every short-lived worker process."""
    script = f"""
import sys
from raybert import tfrecord
records = tfrecord.find_records(open({str(DATA / "tf_examples.tfrecord")!r}, "rb").read())
_, is_good = tfrecord.decode(records.buffer, records.offsets, records.lengths, tfrecord.Schema(128, 20, 30522, 2))
assert is_good.all()
assert not {{"torch", "tfrecord", "ray"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])
