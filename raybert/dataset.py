"""The dataset: samples made of a corpus, as TFRecord shards in a directory that says when it is complete.

What is made is a function of the input, the vocabulary and the settings, whoever makes which part of it and when. The
work folder holds the deck and a record for each shard, so a prepare that was killed goes on; `dataset.json` is written
last, and the work folder is then deleted.
"""

from __future__ import annotations

import hashlib
import io
import json
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property, partial
from typing import Any, Literal

import numpy as np

from raybert.census import Census, empty_census, take_census
from raybert.compression import Compression
from raybert.corpus import Piece, Reading, cut_into_pieces, is_compressed, kind_of
from raybert.deck import Deal, Dealt, deal_piece, read_marker, read_parts
from raybert.errors import UserError
from raybert.example import Schema, encode
from raybert.index import INDEX, index_beside
from raybert.instances import MIN_SEQ_LENGTH, Documents, Pairs, Recipe, make_features, make_pairs
from raybert.masking import Masking, make_masking
from raybert.retry import outlast_blip
from raybert.storage import Directory, File
from raybert.tfrecord import framed
from raybert.wordpiece import CLS, SEP, Tokenizer, Vocabulary, read_vocabulary

DATASET, VOCABULARY, WORK, PLAN = "dataset.json", "vocab.txt", ".prepare", "plan.json"
SHARD = "samples-"  # begins the name of a shard
FORMAT_VERSION = 2
MIN_DOCUMENTS = 16  # of a part, where the corpus has so many: random nexts come from among them
BATCH = 1024  # samples that are laid out at a time
EXPANSION = {"text": 3, "json lines": 3, "parquet": 2}  # bytes of text of a compressed byte, about
_SHUFFLE = 3  # what a random stream is for; part of its seed


@dataclass(frozen=True)
class Settings:
    """What a dataset is made by; most names are those of google-research/bert's create_pretraining_data.py."""

    reading: Reading = field(default_factory=Reading)
    do_lower_case: bool = True
    max_seq_length: int = 128
    max_predictions_per_seq: int = 20
    masked_lm_prob: float = 0.15
    short_seq_prob: float = 0.1
    dupe_factor: int = 10
    do_whole_word_mask: bool = False
    max_ngram_size: int = 1
    random_seed: int = 12345
    parity: Literal["none", "google"] = "none"
    compression: Compression = ""
    shard_mb: int = 32

    def check(self) -> None:
        """Refuse settings that make no sense.

        Raises:
            UserError: naming the setting, its value and the remedy.
        """
        rules = (
            (self.max_seq_length >= MIN_SEQ_LENGTH, "max_seq_length", f"at least {MIN_SEQ_LENGTH}"),
            (1 <= self.max_predictions_per_seq < self.max_seq_length, "max_predictions_per_seq",
             "1 or more and below max_seq_length"),
            (0 < self.masked_lm_prob < 1, "masked_lm_prob", "above 0 and below 1"),
            (0 <= self.short_seq_prob <= 1, "short_seq_prob", "0 to 1"),
            (self.dupe_factor >= 1, "dupe_factor", "1 or more"),
            (self.max_ngram_size >= 1, "max_ngram_size", "1 or more"),
            (0 <= self.random_seed < 1 << 63, "random_seed", "0 or more and below 2**63"),
            (self.shard_mb >= 1, "shard_mb", "1 or more"),
        )  # fmt: skip
        for holds, name, rule in rules:
            if not holds:
                raise UserError(f"{name} must be {rule}, got {getattr(self, name)}; correct --{name}.")
        if self.max_ngram_size > 1 and not self.do_whole_word_mask:
            raise UserError(
                f"max_ngram_size {self.max_ngram_size} masks runs of whole words; add --do_whole_word_mask, or leave "
                "--max_ngram_size out."
            )


@dataclass(frozen=True)
class Plan:
    """All that decides what is made, and where.

    Args:
        output: directory of the dataset.
        settings: how it is made.
        vocabulary: digest of the vocabulary, which lies in the work folder.
        files: of the input.
        pieces: what is read by itself.
        num_parts: that documents are dealt to.
    """

    output: str
    settings: Settings
    vocabulary: str
    files: Sequence[File]
    pieces: Sequence[Piece]
    num_parts: int

    @property
    def work(self) -> Directory:
        return Directory(self.output) / WORK

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for another prepare to go on with this one."""
        described: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "settings": asdict(self.settings),
            "vocabulary": self.vocabulary,
            "files": [asdict(file) for file in self.files],
        }
        return described

    @property
    def deal(self) -> Deal:
        return Deal(self.num_parts, self.settings.shard_mb << 20, self.settings.random_seed)


def make_plan(output: str, settings: Settings, vocabulary: Vocabulary, files: Sequence[File]) -> Plan:
    """The plan for some input.

    Raises:
        UserError: an input file cannot be read.
    """
    shard_bytes = settings.shard_mb << 20
    pieces = list(cut_into_pieces(files, settings.reading, shard_bytes))
    num_parts = max(1, round(sum(map(_text_bytes, files)) / shard_bytes))
    return Plan(output, settings, vocabulary.digest, files, pieces, num_parts)


def _text_bytes(file: File) -> int:
    """Bytes of text in a file, about."""
    kind = kind_of(file.path)
    return file.size_bytes * (EXPANSION[kind] if kind == "parquet" or is_compressed(file) else 1)


# --- The two kinds of tasks, which run anywhere -----------------------------------------------------------------------


@cache
def _tokenizer(work: str, lowercase: bool) -> Tokenizer:
    """Kept by the process, with the words that it has met."""
    return Tokenizer(read_vocabulary((Directory(work) / VOCABULARY).uri), lowercase)


def tokenize_piece(plan: Plan, number: int) -> Dealt:
    """Tokenise and deal a piece, if that is not done yet.

    Raises:
        UserError: the input is damaged, or this node does not see the output directory.
    """
    if not plan.work.exists(PLAN):
        raise UserError(
            f"{plan.output} is not there on node {socket.gethostname()}; give an --output that every node sees under "
            "this path: s3://, gs:// or a shared file system."
        )
    done = read_marker(plan.work, number)
    if done is not None:
        return done
    tokenizer = _tokenizer(plan.work.uri, plan.settings.do_lower_case)
    return deal_piece(number, plan.pieces[number], plan.settings.reading, tokenizer, plan.deal, plan.work)


@dataclass(frozen=True)
class ShardTask:
    """One shard to make.

    Args:
        number, num_shards: which, of how many.
        copy: of the corpus.
        parts: whose documents go into it.
    """

    number: int
    num_shards: int
    copy: int
    parts: Sequence[int]

    def name(self, compression: Compression) -> str:
        ending = ".tfrecord.gz" if compression == "gzip" else ".tfrecord"
        return f"{SHARD}{self.number:05d}-of-{self.num_shards:05d}{ending}"


@dataclass(frozen=True)
class ShardRecord:
    """A shard that is there.

    Args:
        name: of its file.
        size_bytes, sha256: of its content.
        census: of its samples, as JSON.
    """

    name: str
    size_bytes: int
    sha256: str
    census: dict[str, Any]


def shard_tasks(dealt: Sequence[Dealt], dupe_factor: int) -> list[ShardTask]:
    """The shards of a deal: each part, or parts together that are too small alone, once a copy.

    Raises:
        UserError: the corpus has no text, or one document only.
    """
    counts = np.sum([piece.part_documents for piece in dealt], axis=0) if dealt else np.zeros(1, int)
    groups = _group(counts.tolist())
    num_shards = len(groups) * dupe_factor
    return [
        ShardTask(copy * len(groups) + place, num_shards, copy, parts)
        for copy in range(dupe_factor)
        for place, parts in enumerate(groups)
    ]


def check_documents(dealt: Sequence[Dealt], settings: Settings) -> None:
    """Refuse a corpus that no pair can be made of.

    Raises:
        UserError: it has no text, or one document only.
    """
    num_documents = sum(piece.num_documents for piece in dealt)
    if not num_documents:
        raise UserError("The input holds no text: no document with a token in it; give files with text.")
    if num_documents == 1 and settings.parity != "google":
        raise UserError(
            "The input holds one document, and next sentence prediction takes random sentences from another one; put a "
            "blank line between documents, or give more files."
        )


def _group(counts: Sequence[int]) -> list[list[int]]:
    """Parts next to each other, put together until each group has MIN_DOCUMENTS or nothing is left."""
    groups: list[list[int]] = []
    num_documents = MIN_DOCUMENTS
    for part, count in enumerate(counts):
        if num_documents >= MIN_DOCUMENTS:
            groups.append([])
            num_documents = 0
        groups[-1].append(part)
        num_documents += count
    if num_documents < MIN_DOCUMENTS and len(groups) > 1:
        last = groups.pop()
        groups[-1] += last
    return groups


def make_shard(plan: Plan, dealt: Sequence[Dealt], task: ShardTask) -> ShardRecord:
    """Make a shard and its index, if they are not there yet; each file is there whole or not at all.

    Raises:
        OSError: storage fails.
    """
    record = f"shard-{task.number:05d}.json"
    if plan.work.exists(record):
        return ShardRecord(**json.loads(plan.work.read(record)))
    maker = _Maker(plan)
    content, census = maker.shard(read_parts(plan.work, dealt, task.parts), task)
    name = task.name(plan.settings.compression)
    output = Directory(plan.output)
    outlast_blip(partial(output.write, name, content))
    outlast_blip(lambda: index_beside(output.file(name), content, maker.schema))
    made = ShardRecord(name, len(content), hashlib.sha256(content).hexdigest(), census.to_json())
    outlast_blip(partial(plan.work.write, record, json.dumps(asdict(made)).encode()))
    return made


@dataclass(frozen=True)
class _Maker:
    """Makes samples by a plan."""

    plan: Plan

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return read_vocabulary((self.plan.work / VOCABULARY).uri)

    @cached_property
    def schema(self) -> Schema:
        return schema_of(self.plan.settings, self.vocabulary)

    def shard(self, documents: Documents, task: ShardTask) -> tuple[bytes, Census]:
        """A shard's content, and what is in it."""
        settings = self.plan.settings
        recipe = Recipe(settings.max_seq_length, settings.short_seq_prob, settings.parity == "google")
        pairs = make_pairs(documents, recipe, settings.random_seed, task.copy)
        rng = np.random.default_rng([settings.random_seed, _SHUFFLE, task.number])
        censuses: list[Census] = []
        buffer = io.BytesIO()
        payloads = self._payloads(documents, pairs[rng.permutation(len(pairs))], censuses)
        buffer.writelines(framed(payloads, settings.compression))
        return buffer.getvalue(), sum(censuses, empty_census(self.schema))

    def _payloads(self, documents: Documents, pairs: Pairs, censuses: list[Census]) -> Iterator[bytes]:
        """Serialized samples, a census of each batch of them put down."""
        masking = masking_of(self.plan.settings, self.vocabulary)
        cls, sep = self.vocabulary.ids[CLS], self.vocabulary.ids[SEP]
        for start in range(0, len(pairs), BATCH):
            features = make_features(documents, pairs[start : start + BATCH], self.schema, masking, cls, sep)
            censuses.append(take_census(features, self.schema, self.vocabulary))
            yield from encode(features)


def schema_of(settings: Settings, vocabulary: Vocabulary) -> Schema:
    return Schema(settings.max_seq_length, settings.max_predictions_per_seq, len(vocabulary.tokens), 2)


def masking_of(settings: Settings, vocabulary: Vocabulary) -> Masking:
    return make_masking(
        vocabulary,
        settings.masked_lm_prob,
        settings.max_predictions_per_seq,
        settings.do_whole_word_mask,
        settings.max_ngram_size,
        any_token=settings.parity == "google",
    )


# --- Beginning and end ------------------------------------------------------------------------------------------------


def begin(plan: Plan, vocabulary: Vocabulary) -> dict[str, Any] | None:
    """Take the output directory: a new one, or one that the same plan was begun in.

    Returns:
        The dataset, if it is complete already.

    Raises:
        UserError: the directory holds something else.
    """
    output = Directory(plan.output)
    for folder in (output, plan.work, output / INDEX):
        folder.remove_leftovers()
    names = output.names()
    if DATASET in names:
        made: dict[str, Any] = json.loads(output.read(DATASET))
        _check_same(made.get("plan"), plan, f"{plan.output} holds a dataset")
        plan.work.delete()  # of one that was killed at its very end
        return made
    if WORK in names and plan.work.exists(PLAN):
        _check_same(json.loads(plan.work.read(PLAN)), plan, f"{plan.output} holds a prepare that was begun")
        return None
    if set(names) - {WORK}:
        shown = ", ".join(sorted(set(names) - {WORK})[:3])
        raise UserError(f"{plan.output} is not empty: it holds {shown}; give a new directory by --output.")
    plan.work.delete()  # pieces of nobody knows what
    plan.work.write(VOCABULARY, vocabulary.content)
    plan.work.write(PLAN, json.dumps(plan.identity).encode())
    return None


def _check_same(found: Any, plan: Plan, what: str) -> None:
    """Refuse to go on with another plan.

    Raises:
        UserError: naming what differs, and both values.
    """
    mine = json.loads(json.dumps(plan.identity))
    if found == mine:
        return
    theirs = found if isinstance(found, dict) else {}
    for name, value in _flat(mine):
        other = dict(_flat(theirs)).get(name)
        if other != value:
            raise UserError(
                f"{what} with {name} {_short(other)}, and now it is {_short(value)}; give the same input and settings, "
                "another --output, or delete the directory."
            )
    raise UserError(f"{what} in another way; give another --output, or delete the directory.")


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def discard(plan: Plan) -> None:
    """Leave nothing behind where no shard was made yet."""
    if not any(name.startswith(SHARD) for name in Directory(plan.output).names()):
        plan.work.delete()


def finish(plan: Plan, vocabulary: Vocabulary, dealt: Sequence[Dealt], shards: Sequence[ShardRecord]) -> dict[str, Any]:
    """Write the vocabulary and dataset.json, and delete the work folder; what dataset.json says."""
    census = sum(
        (Census.from_json(shard.census) for shard in shards), empty_census(schema_of(plan.settings, vocabulary))
    )
    totals = ("num_documents", "num_empty", "num_cut", "num_sentences", "num_tokens", "num_unknown")
    made = {
        "plan": plan.identity,
        "vocabulary": {"file": VOCABULARY, "size": len(vocabulary.tokens), "sha256": vocabulary.digest},
        "corpus": {
            "files": len(plan.files),
            "bytes": sum(file.size_bytes for file in plan.files),
            **{name.removeprefix("num_"): sum(getattr(piece, name) for piece in dealt) for name in totals},
        },
        "samples": census.summary(),
        "shards": [
            {
                "name": shard.name,
                "samples": shard.census["num_samples"],
                "bytes": shard.size_bytes,
                "sha256": shard.sha256,
            }
            for shard in shards
        ],
    }
    output = Directory(plan.output)
    output.write(VOCABULARY, vocabulary.content)
    output.write(DATASET, (json.dumps(made, indent=1) + "\n").encode())
    plan.work.delete()
    return made
