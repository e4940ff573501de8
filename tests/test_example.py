"""Example: what Google's script wrote is read exactly, and every bad sample is named."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import (
    DAMAGED,
    DATA,
    GOOD,
    MORE_DATA,
    NAMES,
    PAYLOADS,
    SCHEMA,
    TINY,
    TINY_SAMPLE,
    assert_same,
    peer_samples,
    read,
)
from tfrecord import example_pb2
from tfrecord.writer import TFRecordWriter

from raybert.example import ALIASES, InvalidSampleError, Schema, decode, encode, encode_example, parse_example
from raybert.tfrecord import find_records, frame, framed, write_tfrecord


def read_payload(payload, schema=TINY):
    return decode(payload, np.array([0]), np.array([len(payload)]), schema)


def complaint(payload, schema=TINY):
    with pytest.raises(InvalidSampleError) as caught:
        parse_example(payload, schema)
    return caught.value.found, caught.value.expected


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
    arrays, is_good = read_payload(encode_example(sample), schema)
    assert is_good.all() and arrays["input_ids"].dtype == np.int32
    assert arrays["input_ids"][0].tolist() == sample["input_ids"].tolist()


@pytest.mark.parametrize("sizes", [(0, 1, 1, 1), (1, 1, 1 << 31, 1), (1, 1, 1, 257), (1, -1, 1, 1)])
def test_sizes_that_no_dtype_holds_are_refused(sizes):
    with pytest.raises(ValueError, match="must be positive"):
        Schema(*sizes)


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
    names = ALIASES if use_aliases else {}
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
    payload = encode_example({**TINY_SAMPLE, "input_ids": np.array([299, 7, 1, 1, 1])})
    _, is_good = read_payload(payload)
    assert not is_good.any()
    assert complaint(payload) == ("input_ids has 5 values", "6 (data.max_seq_length)")


def test_an_entry_does_not_reach_into_what_follows_the_record():
    entries = b"".join(entry(name, values) for name, values in TINY_SAMPLE.items())
    whole = field(1, entries[:-1]) + entries[-1:]
    _, is_good = decode(whole, np.array([0]), np.array([len(whole) - 1]), TINY)
    assert not is_good.any()


@settings(max_examples=300)
@given(st.data())
def test_fast_path_and_protobuf_agree_on_mutated_payloads(data):
    payload = bytearray(encode_example(TINY_SAMPLE))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload) - 1))
        payload[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    arrays, is_good = read_payload(bytes(payload))
    try:
        sample = parse_example(bytes(payload), TINY)
    except InvalidSampleError:
        assert not is_good.any() and not any(values.any() for values in arrays.values())
    else:
        assert is_good.all()
        assert_same({name: values[0] for name, values in arrays.items()}, sample)


@pytest.mark.parametrize("path", sorted([*DATA.glob("damaged/*.tfrecord"), *MORE_DATA.glob("damaged/*.tfrecord")]))
def test_every_damaged_file_gives_its_clear_error(path):
    _, _, bad = read(path.read_bytes())
    assert bad == ([DAMAGED[path.name]] if path.stat().st_size else [])


def test_all_bad_records_are_reported():
    bad_sample = {**TINY_SAMPLE, "input_ids": np.array([300, 0, 0, 0, 0, 0])}
    frames = [frame(encode_example(bad_sample if i % 2 else TINY_SAMPLE)) for i in range(10)]
    frames[4] = frames[4][:-1] + bytes([frames[4][-1] ^ 1])
    arrays, is_good, bad = read(b"".join(frames) + b"\0", TINY)
    assert [place.record for place in bad] == [1, 3, 4, 5, 7, 9, 10]
    assert [place.ends_file for place in bad] == [False] * 6 + [True]
    assert is_good.tolist() == [True, False, True, False, False, False, True, False, True, False]
    assert not arrays["input_ids"][1].any()


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
    payload = encode_example({**TINY_SAMPLE, name: np.array(values)})
    _, is_good = read_payload(payload)
    assert not is_good.any()
    assert complaint(payload) == (found, expected)


def test_a_feature_without_a_type_is_named():
    entries = b"".join(entry(name, values) for name, values in TINY_SAMPLE.items() if name != "input_mask")
    untyped = field(1, field(1, b"input_mask") + field(2, b""))
    assert complaint(field(1, entries + untyped)) == ("input_mask is without a type", "int64_list")


def test_an_unweighted_position_may_stand_on_padding():
    payload = encode_example({**TINY_SAMPLE, "masked_lm_positions": np.array([2, 5])})
    _, is_good = read_payload(payload)
    assert is_good.all()


def test_offsets_beyond_the_buffer_are_refused():
    for offset, length in [(-1, 2), (0, len(GOOD) + 1), (len(GOOD), 1), (0, -1), ((1 << 63) - 1, 2)]:
        with pytest.raises(ValueError, match="beyond the buffer"):
            decode(GOOD, np.array([offset]), np.array([length]), SCHEMA)


def test_a_peer_reads_what_we_encode(tmp_path):
    arrays, _, _ = read(GOOD)
    samples = [{name: values[i] for name, values in arrays.items()} for i in range(len(PAYLOADS))]
    write_tfrecord(tmp_path / "ours", map(encode_example, samples))
    assert_same(arrays, peer_samples(tmp_path / "ours"))
    messages = [example_pb2.Example.FromString(encode_example(sample)) for sample in samples]
    assert messages == [example_pb2.Example.FromString(payload) for payload in PAYLOADS]


def test_messages_of_tensorflow_and_of_the_tfrecord_package_are_no_matter():
    """Both are named tensorflow.Example, in files that clash; ours go with either."""
    code = """
from google.protobuf import descriptor_pb2, descriptor_pool
file = descriptor_pb2.FileDescriptorProto(name="tensorflow/core/example/feature.proto", package="tensorflow")
for name in ("BytesList", "FloatList", "Int64List", "Feature", "Features", "Example"):
    file.message_type.add(name=name)
descriptor_pool.Default().Add(file)
from raybert.example import encode_example
print(encode_example({"next_sentence_labels": [1]}).hex())
try:
    import tfrecord.example_pb2
    print("no clash")
except TypeError:
    print("clash")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = example_pb2.Example()
    expected.features.feature["next_sentence_labels"].int64_list.value.append(1)
    assert done.stdout.split("\n")[:2] == [expected.SerializeToString().hex(), "clash"]


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
from raybert.example import Schema, decode
from raybert.tfrecord import find_records
records = find_records(open({str(DATA / "tf_examples.tfrecord")!r}, "rb").read())
_, is_good = decode(records.buffer, records.offsets, records.lengths, Schema(128, 20, 30522, 2))
assert is_good.all()
assert not {{"torch", "tfrecord", "ray"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])


@given(st.integers(0, 2**32 - 1), st.sampled_from([127, 128, 16383, 16384, 30522, 2**31 - 1]), st.integers(1, 40))
def test_many_samples_are_encoded_as_each_alone(seed, largest, length):
    """Byte for byte, at the limits of a varint's bytes too."""
    rng = np.random.default_rng(seed)
    arrays = {
        "input_ids": rng.integers(0, largest, (5, length), endpoint=True),
        "masked_lm_weights": rng.random((5, length), np.float32),
        "next_sentence_labels": rng.integers(0, 2, 5).astype(np.uint8),
        "b": np.full((5, 1), largest, np.int32),
    }
    expected = [encode_example({name: values[i] for name, values in arrays.items()}) for i in range(5)]
    assert list(encode(arrays)) == expected


def test_samples_are_decoded_as_they_were_encoded(sample_index):
    features = sample_index.read(np.arange(118))
    content = b"".join(framed(encode(features)))
    records = find_records(content)
    decoded, is_good = decode(records.buffer, records.offsets, records.lengths, SCHEMA)
    assert is_good.all()
    assert all((decoded[name] == values).all() for name, values in features.items())
