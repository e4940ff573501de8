"""The index: pages, what is refused or left out, what is kept; and that what is read is what was indexed."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import DATA, MORE_DATA, SAMPLE_FILE, SAMPLE_SCHEMA, TINY_SCHEMA, TINY_SHARDS, build_index, write_samples

from raybert.errors import UserError
from raybert.example import decode
from raybert.index import PAGE_RECORDS, check_shards, index_beside, index_shard
from raybert.storage import Directory, find_files
from raybert.tfrecord import find_records, frame, write_tfrecord

IO_COUNTS = Path("/proc/self/io")
DAMAGED = {  # file: bad record, its byte offset, what is found there, what is expected, good records
    "garbage_proto.tfrecord": (1, 811, "a payload of 50 bytes that is no protobuf", "a tf.train.Example", 2),
    "missing_feature.tfrecord": (3, 2346, "no feature masked_lm_weights", "float_list of 20", 9),
    "not_tfrecord.txt.tfrecord": (0, 0, "a record length of ", "is this a TFRecord file?", 0),
    "position_ge_seq.tfrecord": (
        7,
        5654,
        "masked_lm_positions[0] = 128",
        "masked_lm_positions < max_seq_length 128",
        9,
    ),
    "token_id_ge_vocab.tfrecord": (7, 5654, "input_ids[5] = 30522", "input_ids < vocab_size 30522", 9),
    "wrong_length_one.tfrecord": (5, 4024, "input_ids has 64 values", "128 (data.max_seq_length)", 9),
    "wrong_type.tfrecord": (3, 2346, "masked_lm_positions is a float_list", "int64_list", 9),
    "flip_length.tfrecord": (100, 81885, "a record length of ", "checksum 0x", 100),
    "flip_payload.tfrecord": (100, 81885, "a payload of 822 bytes with checksum 0x", "checksum 0x", 117),
    "trunc_payload.tfrecord": (100, 81885, "the end of the file after 423 bytes", "838 bytes", 100),
}


def straight(path, schema):
    """All samples of a good file, decoded in one piece."""
    records = find_records(path.read_bytes())
    arrays, is_good = decode(records.buffer, records.offsets, records.lengths, schema)
    assert is_good.all() and records.is_intact.all()
    return arrays


def concatenated(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def assert_same(found, expected, rows=slice(None)):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values[rows], err_msg=name, strict=True)


def damaged_files(folder):
    """The files of DAMAGED: some as fixtures, some made of a good file."""
    good = bytearray(SAMPLE_FILE.read_bytes())
    made = {
        "flip_length.tfrecord": good[: 81885 + 4] + bytes([good[81885 + 4] ^ 64]) + good[81885 + 5 :],
        "flip_payload.tfrecord": good[: 81885 + 300] + bytes([good[81885 + 300] ^ 1]) + good[81885 + 301 :],
        "trunc_payload.tfrecord": good[: 81885 + 423],
    }
    for name in DAMAGED:
        content = bytes(made[name]) if name in made else (DATA / "damaged" / name).read_bytes()
        (folder / name).write_bytes(content)
    return folder


# --- Reading --------------------------------------------------------------------------------------------------------


def test_pages_begin_at_multiples_of_their_size(index):
    assert index.num_samples == sum(TINY_SHARDS)
    assert index.page_sizes.tolist() == [256, 44, 7, 256, 256, 9]
    for shard in index.shards:
        size = find_files(shard.file.path, "o")[0].size_bytes
        assert (shard.page_records[:-1] % PAGE_RECORDS == 0).all()
        assert shard.page_offsets[0] == 0 and shard.page_offsets[-1] == size
        assert (np.diff(shard.page_offsets) > 0).all()


@pytest.mark.parametrize("num_samples", [1, 255, 256, 257, 512, 513])
def test_every_page_is_full_but_the_last(tmp_path, num_samples):
    write_samples(tmp_path / "a.tfrecord", num_samples, seed=1)
    index = build_index(tmp_path / "a.tfrecord", TINY_SCHEMA, tmp_path / "index")
    full, rest = divmod(num_samples, PAGE_RECORDS)
    assert index.page_sizes.tolist() == [PAGE_RECORDS] * full + [rest] * (rest > 0)
    samples = np.arange(num_samples)[::-1]
    assert_same(index.read(samples), straight(tmp_path / "a.tfrecord", TINY_SCHEMA), samples)


@pytest.mark.parametrize("seed", range(5))
def test_reading_in_any_order_equals_decoding_the_files(index, seed):
    rng = np.random.default_rng(seed)
    expected = concatenated([straight(Path(shard.file.path), TINY_SCHEMA) for shard in index.shards])
    orders = (
        rng.permutation(index.num_samples),
        rng.integers(0, index.num_samples, 50),  # some twice
        np.array([index.num_samples - 1, 0]),
        np.array([299, 300, 306, 307]),  # at the borders of shards
    )
    for samples in orders:
        assert_same(index.read(samples), expected, samples)


def test_googles_records_are_read_as_they_are(sample_index):
    samples = np.random.default_rng(0).permutation(118)
    assert_same(sample_index.read(samples), straight(SAMPLE_FILE, SAMPLE_SCHEMA), samples)


def test_labels_are_counted(index):
    arrays = index.read(np.arange(index.num_samples))
    labels = arrays["masked_lm_ids"][arrays["masked_lm_weights"] > 0]
    np.testing.assert_array_equal(index.label_counts, np.bincount(labels, minlength=97))
    assert index.num_random_next == arrays["next_sentence_labels"].sum()


@pytest.mark.parametrize("end", [".gz", ".zlib"])
def test_compressed_files_read_like_plain_ones(tmp_path, sample_index, end):
    cache = tmp_path / "index"
    index = build_index(f"{SAMPLE_FILE}{end}", SAMPLE_SCHEMA, cache)
    samples = np.arange(118)[::-1]
    assert index.digest == sample_index.digest
    assert_same(index.read(samples), sample_index.read(samples))
    moved = cache.rename(tmp_path / "moved")
    assert_same(build_index(f"{SAMPLE_FILE}{end}", SAMPLE_SCHEMA, moved).read(samples), sample_index.read(samples))
    next(moved.glob("*.tfrecord")).unlink()  # the copy is made again
    assert_same(build_index(f"{SAMPLE_FILE}{end}", SAMPLE_SCHEMA, moved).read(samples), sample_index.read(samples))


@pytest.mark.skipif(not IO_COUNTS.exists(), reason="the kernel does not count what a process reads")
def test_a_page_is_read_once(tmp_path):
    path = write_samples(tmp_path / "a.tfrecord", 512, seed=1)
    index = build_index(path, TINY_SCHEMA, tmp_path / "index")

    def bytes_read(samples):
        before = int(IO_COUNTS.read_text().split()[1])
        index.read(samples)
        return int(IO_COUNTS.read_text().split()[1]) - before

    sizes = np.diff(index.shards[0].page_offsets)
    shuffled = np.random.default_rng(0).permutation(256)
    for samples, size in (([5], sizes[0]), (shuffled, sizes[0]), ([3, 511, 4, 256], sizes.sum())):
        assert size <= bytes_read(np.array(samples)) < size + 1000


# --- The cache ------------------------------------------------------------------------------------------------------


def test_a_cached_index_is_the_index(tmp_path):
    path = write_samples(tmp_path / "a.tfrecord", 300, seed=1)
    first, cached = (build_index(path, TINY_SCHEMA, tmp_path / "index") for _ in range(2))
    entry = next((tmp_path / "index").iterdir())
    written_at = entry.stat().st_mtime_ns
    again = build_index(path, TINY_SCHEMA, tmp_path / "index")
    assert entry.stat().st_mtime_ns == written_at
    for shards in zip(first.shards, cached.shards, again.shards, strict=True):
        for name in vars(shards[0]):
            values = [getattr(shard, name) for shard in shards]
            np.testing.assert_array_equal(values[1], values[0], err_msg=name)
            np.testing.assert_array_equal(values[2], values[0], err_msg=name)


def test_a_changed_file_is_indexed_again(tmp_path):
    path = write_samples(tmp_path / "a.tfrecord", 20, seed=1)
    digests = [build_index(path, TINY_SCHEMA, tmp_path / "index").digest]
    write_samples(path, 21, seed=1)
    os.utime(path, ns=(0, 1))
    digests.append(build_index(path, TINY_SCHEMA, tmp_path / "index").digest)  # size and time differ
    content = bytearray(path.read_bytes())
    frames = find_records(content)
    other = frame(frames.payload(0)[::-1])
    path.write_bytes(bytes(other + content[len(other) :]))
    os.utime(path, ns=(0, 1))
    assert build_index(path, TINY_SCHEMA, tmp_path / "index").digest == digests[1]  # neither: not noticed
    os.utime(path, ns=(0, 2))
    digests.append(build_index(path, TINY_SCHEMA, tmp_path / "index").digest)  # only the time
    assert len(set(digests)) == 3


def test_another_schema_is_another_index(tmp_path):
    path = write_samples(tmp_path / "a.tfrecord", 20, seed=1)
    assert build_index(path, TINY_SCHEMA, tmp_path / "index").num_samples == 20
    smaller = replace(TINY_SCHEMA, vocab_size=50)
    assert build_index(path, smaller, tmp_path / "index").num_samples < 20


def test_an_index_beside_the_file_is_the_index_wherever_both_are_moved(tmp_path, monkeypatch):
    """Then the file need not be read; and the cache holds it, too."""
    (tmp_path / "made").mkdir()
    path = write_samples(tmp_path / "made" / "a.tfrecord", 300, seed=1)
    samples = np.arange(300)
    read = build_index(path, TINY_SCHEMA, tmp_path / "read")
    content = read.read(samples)
    index_beside(Directory(str(path.parent)).file(path.name), path.read_bytes(), TINY_SCHEMA)
    (tmp_path / "made").rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "a.tfrecord"
    with monkeypatch.context() as patch:
        patch.setattr("raybert.index.chunks", None)  # reading would fail
        found, cached = (build_index(moved, TINY_SCHEMA, tmp_path / "cache") for _ in range(2))
    assert found.digest == cached.digest == read.digest and found.shards[0].file.path == str(moved)
    assert_same(found.read(samples), content)
    os.utime(moved, ns=(0, 1))  # changed since, for all one knows
    with pytest.raises(TypeError), monkeypatch.context() as patch:
        patch.setattr("raybert.index.chunks", None)
        build_index(moved, TINY_SCHEMA, tmp_path / "other")
    assert build_index(moved, TINY_SCHEMA, tmp_path / "other").digest == read.digest


def test_a_file_that_was_cut_off_gets_no_index(tmp_path):
    path = write_samples(tmp_path / "a.tfrecord", 20, seed=1)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(OSError, match=f"has {len(content) - 1} bytes after {len(content)} were written"):
        index_beside(Directory(str(tmp_path)).file(path.name), content, TINY_SCHEMA)
    assert not (tmp_path / "index").exists()


def test_a_damaged_cache_entry_is_ignored(tmp_path):
    path = write_samples(tmp_path / "a.tfrecord", 20, seed=1)
    digest = build_index(path, TINY_SCHEMA, tmp_path / "index").digest
    (entry,) = (tmp_path / "index").iterdir()
    content = entry.read_bytes()
    flipped = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in range(0, len(content), 97)]
    for damaged in (b"", b"text", content[:-1], content[: len(content) // 2], *flipped):
        entry.write_bytes(damaged)
        assert build_index(path, TINY_SCHEMA, tmp_path / "index").digest == digest
        assert entry.read_bytes() == content


# --- Bad records ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_told_with_file_record_offset_found_and_expected(tmp_path, name):
    path = damaged_files(tmp_path) / name
    record, offset, found, expected, num_good = DAMAGED[name]
    index = build_index(path, SAMPLE_SCHEMA, tmp_path / "index")
    with pytest.raises(UserError) as caught:
        check_shards(index.shards, "data.input_files", "error")
    message = str(caught.value)
    assert f"{path}: record {record} at byte {offset}: found {found}" in message
    assert expected in message.partition("expected ")[2]
    assert "data.input_files" in message and "--data.on_bad_record skip" in message
    assert index.num_samples == num_good


@pytest.mark.skipif(not MORE_DATA.exists(), reason="no larger collection beside the repository")
def test_damage_that_others_made_is_seen_too(tmp_path):
    for name, about in json.loads((MORE_DATA / "damaged_expected.json").read_text()).items():
        (path,) = MORE_DATA.glob(f"*/{name}")
        index = build_index(path, SAMPLE_SCHEMA, tmp_path / "index")
        is_legal = path.parent.name == "legal" or about["bytes"] == 0
        assert len(index.shards[0].bad) == (not is_legal), name
        if name in DAMAGED:
            assert (index.shards[0].bad[0].record, index.num_samples) == (DAMAGED[name][0], DAMAGED[name][-1])


def test_all_bad_records_are_told_at_once(tmp_path):
    files = damaged_files(tmp_path)
    index = build_index(files / "*.tfrecord", SAMPLE_SCHEMA, tmp_path / "index")
    with pytest.raises(UserError) as caught:
        check_shards(index.shards, "data.input_files", "error")
    assert str(caught.value).count(": record ") == len(DAMAGED)


@pytest.mark.parametrize(("num_bad", "shown", "more"), [(20, 20, False), (21, 20, True), (300, 20, True)])
def test_at_most_twenty_bad_records_are_shown(tmp_path, num_bad, shown, more):
    path = tmp_path / "a.tfrecord"
    write_tfrecord(path, [b"no example"] * num_bad)
    with pytest.raises(UserError) as caught:
        check_shards(build_index(path, TINY_SCHEMA, tmp_path / "index").shards, "o", "error")
    assert str(caught.value).count(": record ") == shown
    assert (f"and more ({num_bad} found so far)" in str(caught.value)) == more


def test_a_search_that_was_stopped_early_is_not_cached(tmp_path):
    path = tmp_path / "a.tfrecord"
    write_tfrecord(path, [b"no example"] * 30)
    (file,) = find_files(str(path), "o")
    cache = Directory(str(tmp_path / "index"))
    assert len(index_shard(file, TINY_SCHEMA, cache, max_bad=5).bad) == 5 and not cache.names()
    assert len(index_shard(file, TINY_SCHEMA, cache).bad) == 30


def test_what_readers_get_reads_the_same_and_carries_no_counts(index):
    lean, samples = index.for_reading(), np.arange(index.num_samples)
    for name, values in index.read(samples).items():
        np.testing.assert_array_equal(lean.read(samples)[name], values)
    assert (lean.digest, lean.page_sizes.tolist()) == (index.digest, index.page_sizes.tolist())
    assert not sum(shard.label_counts.size for shard in lean.shards)


def mixed_payloads(num_samples, is_bad, path):
    """Payloads of good samples with a bad one wherever asked for."""
    records = find_records(write_samples(path, num_samples, seed=1).read_bytes())
    return [b"no example" if is_bad(i) else records.payload(i) for i in range(num_samples)]


@pytest.mark.parametrize(
    "is_bad", [lambda i: i % 3 == 0, lambda i: i < 256, lambda i: i >= 256, lambda i: i == 599], ids=range(4)
)
def test_skipped_records_are_left_out_and_listed(tmp_path, is_bad):
    payloads = mixed_payloads(600, is_bad, tmp_path / "good")
    write_tfrecord(tmp_path / "a.tfrecord", payloads)
    write_tfrecord(tmp_path / "clean", [payload for payload in payloads if payload != b"no example"])
    expected = straight(tmp_path / "clean", TINY_SCHEMA)
    fresh, cached = (build_index(tmp_path / "a.tfrecord", TINY_SCHEMA, tmp_path / "index") for _ in range(2))
    afresh = build_index(tmp_path / "a.tfrecord", TINY_SCHEMA, tmp_path / "another")
    bad = [i for i in range(600) if is_bad(i)]
    for index in (fresh, cached, afresh):
        check_shards(index.shards, "o", "skip")
        assert [record.record for record in index.shards[0].bad] == index.shards[0].skipped.tolist() == bad
        assert index.num_samples == 600 - len(bad)
        assert index.digest == fresh.digest
        np.testing.assert_array_equal(index.page_sizes, fresh.page_sizes)
        samples = np.random.default_rng(0).permutation(index.num_samples)
        assert_same(index.read(samples), expected, samples)


def test_what_lies_before_lost_framing_is_kept(tmp_path, sample_index):
    path = damaged_files(tmp_path) / "trunc_payload.tfrecord"
    index = build_index(path, SAMPLE_SCHEMA, tmp_path / "index")
    assert_same(index.read(np.arange(100)), sample_index.read(np.arange(100)))


def test_an_empty_file_among_good_ones_is_no_matter(tmp_path):
    (tmp_path / "a.tfrecord").write_bytes(b"")
    write_samples(tmp_path / "b.tfrecord", 10, seed=1)
    (tmp_path / "c.tfrecord").write_bytes(b"")
    index = build_index(tmp_path / "*.tfrecord", TINY_SCHEMA, tmp_path / "index")
    check_shards(index.shards, "o", "error")
    assert_same(index.read(np.arange(10)), straight(tmp_path / "b.tfrecord", TINY_SCHEMA))


@pytest.mark.parametrize("payloads", [[], [b"no example"]])
def test_no_sample_at_all_is_an_error(tmp_path, payloads):
    write_tfrecord(tmp_path / "a.tfrecord", payloads)
    index = build_index(tmp_path / "a.tfrecord", TINY_SCHEMA, tmp_path / "index")
    with pytest.raises(UserError, match=r"data\.input_files: no sample in 1 files"):
        check_shards(index.shards, "data.input_files", "skip")


# --- Identity -------------------------------------------------------------------------------------------------------


def test_the_digest_is_of_content_and_order_not_of_places(tmp_path):
    def digest(folder, *seeds):
        (tmp_path / folder).mkdir()
        for number, seed in enumerate(seeds):
            write_samples(tmp_path / folder / f"{number}.tfrecord", 10 + seed, seed)
        return build_index(tmp_path / folder / "*", TINY_SCHEMA, tmp_path / "index").digest

    first, elsewhere = digest("a", 1, 2), digest("b", 1, 2)
    assert first == elsewhere
    assert len({first, digest("c", 2, 1), digest("d", 1), digest("e", 1, 2, 3), digest("f", 1, 3)}) == 5


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


CHANGES = {
    "one bit": damage,
    "cut": lambda path: os.truncate(path, 1000),
    "empty": lambda path: path.write_bytes(b""),
    "other samples": lambda path: write_samples(path, 300, seed=2),
    "two samples swapped": lambda path: swap_first_records(path),
    "gone": lambda path: path.unlink(),
}


def swap_first_records(path):
    records = find_records(path.read_bytes())
    payloads = [records.payload(i) for i in range(len(records))]
    equal = next(i for i in range(1, 256) if len(payloads[i]) == len(payloads[0]))
    payloads[0], payloads[equal] = payloads[equal], payloads[0]
    write_tfrecord(path, payloads)


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_since_is_refused(tmp_path, change):
    path = write_samples(tmp_path / "a.tfrecord", 300, seed=1)
    index = build_index(path, TINY_SCHEMA, tmp_path / "index")
    CHANGES[change](path)
    with pytest.raises(UserError, match=r"a\.tfrecord.*restore"):
        index.read(np.arange(300))
