"""The index: for every shard, where its pages of records begin, which records are left out, and what its content is.

Building it reads each file once and verifies every record, so training never meets a bad record that the index did not
name. It is cached under the run directory; `prepare` puts it beside what it makes, too. A file is read again when its
size or modification time has changed.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import fs

from raybert.compression import compression, decompressed_chunks
from raybert.errors import UserError
from raybert.example import Schema, bad_records, decode
from raybert.storage import Directory, File, chunks, containing, open_seen, resolve
from raybert.tfrecord import BadRecord, find_records, walk

Ints = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[np.generic]]

INDEX, LIST = "index", "files.json"  # in a run directory, or beside shards; in there, which files are trained on
PAGE_RECORDS = 256
MAX_BAD_SHOWN = 20
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One TFRecord file, verified.

    Args:
        file: the file as it was when it was indexed.
        data_path: where records are read from; differs from the file's path when that is compressed.
        page_offsets: [pages + 1] byte offsets in `data_path` at which pages begin, and the end of the last.
        page_records: [pages + 1] number of the first record of each page, and the end of the last.
        page_checksums: [pages] CRC-32 of the stored checksums of each page's records.
        skipped: [skipped] numbers of the records that are left out.
        label_counts: [V] how often each token is a masked label.
        num_random_next: samples whose second sentence is random.
        digest: of the records' stored checksums.
        bad: what is wrong with the file.
    """

    file: File
    data_path: str
    page_offsets: Ints
    page_records: Ints
    page_checksums: Ints
    skipped: Ints
    label_counts: Ints
    num_random_next: int
    digest: str
    bad: tuple[BadRecord, ...]

    @property
    def page_sizes(self) -> Ints:
        """[pages] samples of each page."""
        skipped_before = np.searchsorted(self.skipped, self.page_records)
        sizes: Ints = np.diff(self.page_records) - np.diff(skipped_before)
        return sizes


def index_shard(file: File, schema: Schema, cache: Directory, max_bad: int | None = None) -> Shard:
    """The index of a file, from the cache, from beside the file, or by reading the file once.

    Args:
        file: a TFRecord file; gzip and zlib are recognised by content and copied once, decompressed, into the cache.
        schema: what each record must look like.
        cache: where indices are kept.
        max_bad: stop after so many bad records; such an index is not cached. Default: find all.

    Raises:
        UserError: this node does not see the file.
    """
    name = _entry_name(file.path, schema)
    cached = _load(cache, name, file)
    if cached is not None:
        return cached
    beside = _load_beside(file, schema)
    if beside is not None:
        cache.write(f"{name}.index", _to_bytes(beside))
        return beside
    with open_seen(file.path) as source:
        is_compressed = bool(compression(source.read(64)))
        source.seek(0)
        if not is_compressed:
            shard = _scan(file, file.path, chunks(source), schema, max_bad)
        else:
            shard = _scan_compressed(file, source, cache, name, schema, max_bad)
    if max_bad is None or len(shard.bad) < max_bad:
        cache.write(f"{name}.index", _to_bytes(shard))
    return shard


def index_beside(file: File, content: bytes, schema: Schema) -> None:
    """Put a new file's index beside it, unless it is compressed; training then need not read the file first.

    Args:
        file: a TFRecord file that was just written.
        content: what was written.
        schema: what each record must look like.

    Raises:
        OSError: the file is not as long as what was written, or storage fails.
    """
    if file.size_bytes != len(content):
        raise OSError(f"{file.path} has {file.size_bytes} bytes after {len(content)} were written")
    if compression(content[:64]):
        return
    shard = _scan(file, file.path, chunks(pa.BufferReader(content)), schema, max_bad=1)
    assert not shard.bad, f"{file.path} was made wrong: {shard.bad[0]}"
    folder, name = _beside(file, schema)
    folder.write(name, _to_bytes(shard))


def _load_beside(file: File, schema: Schema) -> Shard | None:
    """What `index_beside` wrote, unless the file has changed since; the directory may have been moved."""
    shard = None
    with suppress(OSError):  # to be allowed to read the file is enough
        shard = _read_entry(*_beside(file, schema))
    if shard is None or (shard.file.size_bytes, shard.file.modified_ns) != (file.size_bytes, file.modified_ns):
        return None
    return replace(shard, file=file, data_path=file.path)


def _beside(file: File, schema: Schema) -> tuple[Directory, str]:
    """Where a file's index is beside it, and its name there."""
    folder, name = containing(file.path)
    return folder / INDEX, f"{name}-{_entry_name('', schema)}.index"


def _scan_compressed(
    file: File, source: fs.NativeFile, cache: Directory, name: str, schema: Schema, max_bad: int | None
) -> Shard:
    """Scan a compressed file and write its decompressed copy on the way: it has no random access itself."""
    copy = cache / f"{name}.tfrecord"
    filesystem, path = resolve(copy.uri)
    filesystem.create_dir(resolve(cache.uri)[1], recursive=True)
    with filesystem.open_output_stream(f"{path}.part") as target:

        def copied() -> Iterator[bytes]:
            for chunk in decompressed_chunks(chunks(source)):
                target.write(chunk)
                yield chunk

        shard = _scan(file, copy.uri, copied(), schema, max_bad)
    filesystem.move(f"{path}.part", path)
    return shard


def _scan(file: File, data_path: str, pieces: Iterable[bytes], schema: Schema, max_bad: int | None) -> Shard:
    """One pass over a file's decompressed content."""
    pages: list[tuple[int, int]] = []  # first record and byte offset
    bad: list[BadRecord] = []
    label_counts = np.zeros(schema.vocab_size, np.int64)
    num_random_next, num_records, end = 0, 0, 0
    crcs: list[npt.NDArray[np.uint32]] = []
    for records in walk(pieces):
        arrays, is_good = decode(records.buffer, records.offsets, records.lengths, schema)
        bad += itertools.islice(bad_records(records, is_good, schema), max_bad)
        is_good &= records.is_intact
        first = -records.first_record % PAGE_RECORDS  # pages begin at multiples of PAGE_RECORDS
        frames = records.frame_offsets.tolist()
        pages += [(records.first_record + i, frames[i]) for i in range(first, len(records), PAGE_RECORDS)]
        labels = arrays["masked_lm_ids"][is_good][arrays["masked_lm_weights"][is_good] != 0]
        label_counts += np.bincount(labels, minlength=schema.vocab_size)
        num_random_next += int(arrays["next_sentence_labels"][is_good].sum())
        crcs.append(records.crcs)
        num_records, end = records.first_record + len(records), records.first_offset + records.consumed
        if max_bad is not None and len(bad) >= max_bad:
            break
    pages.append((num_records, end))
    all_crcs = np.concatenate([*crcs, np.zeros(0, np.uint32)])
    return Shard(
        file=file,
        data_path=data_path,
        page_offsets=np.array([offset for _, offset in pages]),
        page_records=np.array([record for record, _ in pages]),
        page_checksums=np.array([_checksum(all_crcs[a:b]) for (a, _), (b, _) in itertools.pairwise(pages)], np.int64),
        skipped=np.array([record.record for record in bad if not record.ends_file], np.int64),
        label_counts=label_counts,
        num_random_next=num_random_next,
        digest=hashlib.sha256(all_crcs.astype("<u4").tobytes()).hexdigest(),
        bad=tuple(bad),
    )


def _checksum(crcs: npt.NDArray[np.uint32]) -> int:
    return zlib.crc32(crcs.astype("<u4").tobytes())


def _to_bytes(shard: Shard) -> bytes:
    """A digest, and what it is of."""
    meta = {"file": asdict(shard.file), "bad": [asdict(record) for record in shard.bad]}
    meta |= {name: getattr(shard, name) for name in ("data_path", "num_random_next", "digest")}
    names = ("page_offsets", "page_records", "page_checksums", "skipped", "label_counts")
    buffer = io.BytesIO()
    arrays = {name: getattr(shard, name) for name in names}
    np.savez_compressed(buffer, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)
    return hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()


def _entry_name(path: str, schema: Schema) -> str:
    return hashlib.sha256(f"{path}\0{schema}\0{FORMAT_VERSION}".encode()).hexdigest()[:24]


def _load(cache: Directory, name: str, file: File) -> Shard | None:
    """A cached index, unless the file has changed since or the cache entry is damaged."""
    shard = _read_entry(cache, f"{name}.index")
    if shard is None or shard.file != file:
        return None
    if shard.data_path == file.path:
        return shard
    if not cache.exists(f"{name}.tfrecord"):  # of a compressed file: the copy, wherever the cache is by now
        return None
    return replace(shard, data_path=(cache / f"{name}.tfrecord").uri)


def cached_shard(path: str, schema: Schema, cache: Directory) -> Shard | None:
    """The index of a file as it was cached, be the file still there or not; None if the entry is missing or damaged."""
    return _read_entry(cache, f"{_entry_name(path, schema)}.index")


def write_list(index: Index, cache: Directory) -> None:
    """Put down which files an index is of."""
    cache.write(LIST, json.dumps([shard.file.path for shard in index.shards], indent=1).encode())


def read_list(cache: Directory) -> list[str]:
    """Paths of the files that a run was last trained on, in the order of its index.

    Raises:
        FileNotFoundError: there is no list.
        ValueError: it is damaged.
    """
    paths = json.loads(cache.read(LIST))
    if not (isinstance(paths, list) and all(isinstance(path, str) for path in paths)):
        raise ValueError(f"{LIST} is no list of paths")
    return paths


def _read_entry(cache: Directory, name: str) -> Shard | None:
    try:
        entry = cache.read(name)
    except FileNotFoundError:
        return None
    digest, content = entry[:32], entry[32:]
    if hashlib.sha256(content).digest() != digest:
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    meta = json.loads(arrays.pop("meta").tobytes())
    file, bad = File(**meta.pop("file")), tuple(BadRecord(**record) for record in meta.pop("bad"))
    return Shard(file=file, bad=bad, **meta, **arrays)


@dataclass(frozen=True)
class Index:
    """The samples of many shards: numbered shard after shard, record after record, those left out not counted.

    Args:
        shards: sorted by path.
        schema: of their records.
    """

    shards: Sequence[Shard]
    schema: Schema

    @cached_property
    def page_sizes(self) -> Ints:
        """[pages] samples of each page, of all shards."""
        return np.concatenate([shard.page_sizes for shard in self.shards] or [np.zeros(0, np.int64)])

    @property
    def num_samples(self) -> int:
        return int(self.page_sizes.sum())

    @property
    def label_counts(self) -> Ints:
        """[V] how often each token is a masked label."""
        counts: Ints = np.sum([shard.label_counts for shard in self.shards], axis=0)
        return counts

    def for_reading(self) -> Index:
        """The same samples, without the label counts: of thousands of files they are gigabytes that no reader needs."""
        return replace(self, shards=[replace(shard, label_counts=np.zeros(0, np.int64)) for shard in self.shards])

    @property
    def num_random_next(self) -> int:
        """Samples whose second sentence is random (label 1)."""
        return sum(shard.num_random_next for shard in self.shards)

    @property
    def digest(self) -> str:
        """Of the content and its order, wherever the files lie."""
        parts = [(shard.digest, shard.page_records[-1].item(), shard.skipped.tolist()) for shard in self.shards]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def _page_table(self) -> Ints:
        """[pages, 2] the shard of each page, and the page within it."""
        counts = [len(shard.page_sizes) for shard in self.shards]
        pages = np.concatenate([np.arange(count) for count in counts])
        return np.stack([np.repeat(np.arange(len(counts)), counts), pages], axis=1)

    def read(self, samples: Ints) -> Arrays:
        """Read and decode samples, each page of theirs once, CRCs checked.

        Args:
            samples: [B] sample numbers, in any order.

        Returns:
            google-research/bert's feature names to [B, ...] arrays, in the order of `samples`.

        Raises:
            UserError: a file has changed since it was indexed, or this node does not see it.
        """
        ends = np.cumsum(self.page_sizes)
        pages, page_of = np.unique(np.searchsorted(ends, samples, side="right"), return_inverse=True)
        places = samples - (ends - self.page_sizes)[pages][page_of]
        contents = self._read_pages(pages)
        starts = np.cumsum([0, *(len(content["input_ids"]) for content in contents)])
        rows = starts[page_of] + places
        return {name: np.concatenate([content[name] for content in contents])[rows] for name in self.schema.empty(0)}

    def _read_pages(self, pages: Ints) -> list[Arrays]:
        """The good records of some pages."""
        by_shard = itertools.groupby(self._page_table[pages].tolist(), key=lambda entry: entry[0])
        contents: list[Arrays] = []
        for number, entries in by_shard:
            shard = self.shards[number]
            with open_seen(shard.data_path) as source:
                contents += [_read_page(source, shard, page, self.schema) for _, page in entries]
        return contents


def _read_page(source: fs.NativeFile, shard: Shard, page: int, schema: Schema) -> Arrays:
    start, stop = shard.page_offsets[page : page + 2].tolist()
    first, last = shard.page_records[page : page + 2].tolist()
    records = find_records(source.read_at(stop - start, start), first_record=first, first_offset=start)
    arrays, is_good = decode(records.buffer, records.offsets, records.lengths, schema)
    is_good &= records.is_intact
    expected = ~np.isin(np.arange(first, last), shard.skipped)
    is_same = _checksum(records.crcs) == shard.page_checksums[page]
    if records.lost or not is_same or not np.array_equal(is_good, expected):
        raise UserError(
            f"{shard.file.path}: records {first} to {last - 1} are not what they were when the file was indexed; "
            "restore the file, or begin a new run on the changed one."
        )
    return {name: values[is_good] for name, values in arrays.items()} if len(shard.skipped) else arrays


def check_shards(shards: Sequence[Shard], option: str, on_bad_record: str) -> None:
    """Refuse damaged files, all their bad records in one message, and files without a sample.

    Args:
        shards: as indexed.
        option: the setting that the files come from.
        on_bad_record: "error" or "skip".

    Raises:
        UserError: naming file, record, byte offset, what was found and what was expected, for up to 20 bad records.
    """
    bad = [f"  {shard.file.path}: {record}" for shard in shards for record in shard.bad]
    if bad and on_bad_record == "error":
        more = f"\n  ... and more ({len(bad)} found so far)" if len(bad) > MAX_BAD_SHOWN else ""
        raise UserError(
            f"{option}: bad records:\n" + "\n".join(bad[:MAX_BAD_SHOWN]) + more + "\n"
            "Restore or rewrite the files, correct the settings they are compared with, or leave bad records out with "
            "--data.on_bad_record skip."
        )
    if not sum(int(shard.page_sizes.sum()) for shard in shards):
        names = ", ".join(shard.file.path for shard in shards[:5])
        raise UserError(f"{option}: no sample in {len(shards)} files ({names}); give TFRecord files that hold samples.")
