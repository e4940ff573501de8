"""Benchmark of decoding: records a second on one core, both checksums of every record checked."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from raybert.compression import decompress
from raybert.config import Config
from raybert.example import Schema, decode
from raybert.figure import Figure, measured, ratio
from raybert.preflight import schema
from raybert.storage import find_files, open_input
from raybert.tfrecord import find_records, frame

PASS_S = 0.3  # a pass lasts at least so long
PEER_RECORDS = 2000


def measure(config: Config, num_rounds: int) -> list[Figure]:
    """Ours and the `tfrecord` package's, in turns, over files that are read before."""
    files = find_files(config.data.input_files, "data.input_files")
    contents = [_read(file.path) for file in files]
    wanted = schema(config)
    ours: list[float] = []
    theirs: list[float] = []
    _decode_all(contents, wanted)  # compiled
    with tempfile.TemporaryDirectory(prefix="raybert-") as scratch:
        part = Path(scratch) / "part.tfrecord"
        part.write_bytes(_first_records(contents[0]))
        for _ in range(num_rounds):
            ours.append(_rate(lambda: _decode_all(contents, wanted)))
            theirs.append(_rate(lambda: _peer(part, wanted), least_s=0))
    settings: dict[str, Any] = {
        "threads": 1,
        "files": config.data.input_files,
        "sequence_length": wanted.max_seq_length,
        "read_from": "memory",
        "checked": "both checksums, schema and ranges of every record",
    }
    peer_settings = settings | {"read_from": "local file, cached", "checked": "nothing", "at_most": PEER_RECORDS}
    figure = measured("decode", "raybert", "records/s", ours, settings)
    peer = measured("decode", "tfrecord package", "records/s", theirs, peer_settings)
    return [figure, peer, ratio(figure, peer)]


def _read(path: str) -> bytes:
    with open_input(path) as source:
        return decompress(source.read())


def _first_records(content: bytes) -> bytes:
    """The peer's part: it is slow, and leaves a file open that it does not read to its end."""
    return b"".join(itertools.islice((frame(payload) for payload in _payloads(content)), PEER_RECORDS))


def _payloads(content: bytes) -> Iterator[bytes]:
    records = find_records(content)
    return map(records.payload, range(len(records)))


def _rate(work: Callable[[], int], least_s: float = PASS_S) -> float:
    """Records a second of work that returns how many records it did, repeated for `least_s`."""
    started_at_s, count, elapsed_s = time.perf_counter(), 0, 0.0
    while not count or elapsed_s < least_s:
        count += work()
        elapsed_s = time.perf_counter() - started_at_s
    return count / elapsed_s


def _decode_all(contents: Sequence[bytes], wanted: Schema) -> int:
    count = 0
    for content in contents:
        records = find_records(content)
        _, is_good = decode(records.buffer, records.offsets, records.lengths, wanted)
        count += int((is_good & records.is_intact).sum())
    return count


def _peer(path: Path, wanted: Schema) -> int:
    from tfrecord.reader import tfrecord_loader

    kinds = {column.name: "int" if column.limit is not None else "float" for column in wanted.columns}
    return sum(1 for _ in tfrecord_loader(str(path), None, kinds))
