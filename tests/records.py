"""Records for the tests: good ones of Google's script, tiny ones, damaged ones, and how to read them."""

from pathlib import Path

import numpy as np
from tfrecord import reader

from raybert.compression import decompress
from raybert.example import Schema, bad_records, decode, encode_example
from raybert.tfrecord import BadRecord, find_records, frame

DATA = Path(__file__).parent / "data"
MORE_DATA = Path(__file__).parents[2] / "shared" / "data"  # a larger collection beside the repository, if there is one
SCHEMA = Schema(max_seq_length=128, max_predictions_per_seq=20, vocab_size=30522, type_vocab_size=2)
TINY = Schema(max_seq_length=6, max_predictions_per_seq=2, vocab_size=300, type_vocab_size=2)
NAMES = [column.name for column in SCHEMA.columns]
GOOD = (DATA / "tf_examples.tfrecord").read_bytes()
RECORDS = find_records(GOOD)
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
TINY_FILE = b"".join(frame(encode_example({**TINY_SAMPLE, "masked_lm_ids": np.array([i, 0])})) for i in range(4))
TINY_FRAME_BYTES = len(TINY_FILE) // 4

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


def read(raw, schema=SCHEMA):
    """Arrays, flags of good records, and every bad place, of a file in one piece."""
    records = find_records(decompress(raw))
    arrays, is_good = decode(records.buffer, records.offsets, records.lengths, schema)
    return arrays, is_good & records.is_intact, list(bad_records(records, is_good, schema))


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


def cut(raw, size):
    return [raw[at : at + size] for at in range(0, len(raw), size)]
