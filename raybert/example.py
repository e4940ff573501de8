"""BERT samples as serialized tf.train.Examples: schema, decoding, validation and encoding.

Decoding runs in numba over whole buffers. The fast path takes what it knows for certain to be a good sample; every
other record goes, one by one, through the protobuf library, which decides, and which alone words the complaints.

Shape letters: N records of a buffer, L max_seq_length, P max_predictions_per_seq.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from raybert.crc import masked_crc, read_word
from raybert.jit import Buffer, Bytes, Flags, Ints, Words, as_int, compiled, view
from raybert.tfrecord import BadRecord, Records

Arrays = dict[str, npt.NDArray[np.generic]]


# --- What a sample must look like -------------------------------------------------------------------------------------

ALIASES = {"input_ids": "input_word_ids", "segment_ids": "input_type_ids"}  # TensorFlow Model Garden's names


@dataclass(frozen=True)
class Column:
    """One feature of a sample.

    Args:
        name: google-research/bert's name.
        dtype: of the decoded array; holds every valid value.
        length: how many values it has.
        length_rule: the setting behind `length`, for messages.
        limit: values are integers in [0, limit); None: finite floats, not negative.
        limit_rule: what is expected of a value, for messages.
    """

    name: str
    dtype: type[np.generic]
    length: int
    length_rule: str
    limit: int | None
    limit_rule: str


@dataclass(frozen=True)
class Schema:
    """What a sample must look like.

    Args:
        max_seq_length: L, tokens of each sample.
        max_predictions_per_seq: P, masked positions of each sample.
        vocab_size: token ids are in [0, vocab_size).
        type_vocab_size: segment ids are in [0, type_vocab_size); at most 256.

    Raises:
        ValueError: a number is outside what the decoded dtypes hold.
    """

    max_seq_length: int
    max_predictions_per_seq: int
    vocab_size: int
    type_vocab_size: int

    def __post_init__(self) -> None:
        numbers = (self.max_seq_length, self.max_predictions_per_seq, self.vocab_size)
        if not all(0 < number < 1 << 31 for number in numbers) or not 0 < self.type_vocab_size <= 256:
            raise ValueError(f"Sizes must be positive, below 2**31, and type_vocab_size at most 256; got {self}.")

    @property
    def token_dtype(self) -> type[np.generic]:
        """Smallest dtype here that holds every token id."""
        return _index_dtype(self.vocab_size)

    @functools.cached_property
    def columns(self) -> tuple[Column, ...]:
        """The features of a sample, in the order of google-research/bert."""
        length, places, vocab = self.max_seq_length, self.max_predictions_per_seq, self.vocab_size
        tokens, segments = f"vocab_size {vocab}", f"type_vocab_size {self.type_vocab_size}"
        rules = (
            ("input_ids", self.token_dtype, length, vocab, f"0 <= input_ids < {tokens}"),
            ("input_mask", np.uint8, length, 2, "input_mask 0 or 1"),
            ("segment_ids", np.uint8, length, self.type_vocab_size, f"0 <= segment_ids < {segments}"),
            ("masked_lm_positions", _index_dtype(length), places, length,
             f"0 <= masked_lm_positions < max_seq_length {length}"),
            ("masked_lm_ids", self.token_dtype, places, vocab, f"0 <= masked_lm_ids < {tokens}"),
            ("masked_lm_weights", np.float32, places, None, "a finite masked_lm_weights >= 0"),
            ("next_sentence_labels", np.uint8, 1, 2, "next_sentence_labels 0 or 1"),
        )  # fmt: skip
        return tuple(
            Column(name, dtype, count, _length_rule(name, count), limit, rule)
            for name, dtype, count, limit, rule in rules
        )

    def empty(self, num_records: int) -> Arrays:
        """Zeros for so many samples: [N, L], [N, P] and, for `next_sentence_labels`, [N]."""
        return {
            column.name: np.zeros(
                num_records if column.name == "next_sentence_labels" else (num_records, column.length), column.dtype
            )
            for column in self.columns
        }


def _index_dtype(limit: int) -> type[np.generic]:
    return np.uint16 if limit <= 1 << 16 else np.int32


def _length_rule(name: str, count: int) -> str:
    if name == "next_sentence_labels":
        return "1"
    return f"{count} (data.{'max_predictions_per_seq' if name.startswith('masked') else 'max_seq_length'})"


# --- Decoding: the fast path ------------------------------------------------------------------------------------------

# Wire tags (field number << 3 | 2): Example.features, Features.feature and *List.value are all field 1.
_FIELD_1, _ENTRY_VALUE, _FLOAT_LIST, _INT64_LIST = 0x0A, 0x12, 0x12, 0x1A
_IDS, _MASK, _SEGMENTS, _POSITIONS, _MASKED_IDS, _WEIGHTS, _LABELS = range(7)
_ALL_COLUMNS = (1 << 7) - 1
_Columns = tuple[npt.NDArray[Any], ...]  # [N, values] in the order of Schema.columns; weights as bit patterns
_INFINITY_BITS = 0x7F800000  # float32 bit patterns below it are the finite values from +0 up


def _name_table() -> tuple[Bytes, Ints, Ints]:
    """Feature names as [9, 20] zero-padded bytes, their [9] lengths and their [9] columns."""
    columns = [column.name for column in Schema(1, 1, 1, 1).columns]
    names = [*columns, *ALIASES.values()]
    table = np.zeros((len(names), max(map(len, names))), np.uint8)
    for row, name in zip(table, names, strict=True):
        row[: len(name)] = np.frombuffer(name.encode(), np.uint8)
    numbers = [*range(len(columns)), *(columns.index(name) for name in ALIASES)]
    return table, np.array([len(name) for name in names]), np.array(numbers)


_NAMES, _NAME_LENGTHS, _NAME_COLUMNS = _name_table()


@compiled
def _enter(data: Bytes, at: int, stop: int, tag: int) -> tuple[int, int]:
    """Bounds of the field with this tag at `at`; the second is -1 if there is none or it leaves [at, stop)."""
    if at >= stop or data[at] != tag:
        return at, -1
    at += 1
    length = 0
    for shift in range(0, 35, 7):
        if at >= stop:
            return at, -1
        byte = as_int(data[at])
        at += 1
        length |= (byte & 127) << shift
        if byte < 128:
            return at, at + length if length <= stop - at else -1
    return at, -1


@compiled
def _find_column(data: Bytes, start: int, stop: int) -> int:
    """The column that a feature name belongs to, or -1."""
    for row in range(len(_NAME_LENGTHS)):
        if _NAME_LENGTHS[row] == stop - start:
            k = 0
            while k < stop - start and data[start + k] == _NAMES[row, k]:
                k += 1
            if k == stop - start:
                return as_int(_NAME_COLUMNS[row])
    return -1


@compiled
def _read_ints(data: Bytes, start: int, stop: int, limit: int, row: npt.NDArray[Any]) -> bool:
    """Packed varints into a row; whether they are just its length and all in [0, limit), limit at most 2**31."""
    if stop - start == len(row):  # every varint is one byte; a loop without branches
        highest = np.uint8(0)
        for k in range(len(row)):
            highest = max(highest, data[start + k])
            row[k] = data[start + k]
        return bool(highest < min(limit, 128))
    for k in range(len(row)):
        value = 0
        shift = 0
        while True:
            if start >= stop or shift > 28:  # longer ones are negative or too large: protobuf decides
                return False
            byte = as_int(data[start])
            start += 1
            value |= (byte & 127) << shift
            if byte < 128:
                break
            shift += 7
        if value >= limit:
            return False
        row[k] = value
    return start == stop


@compiled
def _read_weights(data: Bytes, start: int, stop: int, row: Words) -> bool:
    """Packed floats into a row of bit patterns; whether they are just its length, finite and not negative."""
    if stop - start != 4 * len(row):
        return False
    for k in range(len(row)):
        bits = read_word(data, start + 4 * k)
        if bits >= _INFINITY_BITS:
            return False
        row[k] = bits
    return True


@compiled
def _read_column(data: Bytes, at: int, stop: int, column: int, limit: int, columns: _Columns, i: int) -> bool:
    """Read a column's values into its i-th row. One branch a column, since the arrays differ in dtype."""
    if column == _IDS:
        return _read_ints(data, at, stop, limit, columns[_IDS][i])
    if column == _MASK:
        return _read_ints(data, at, stop, limit, columns[_MASK][i])
    if column == _SEGMENTS:
        return _read_ints(data, at, stop, limit, columns[_SEGMENTS][i])
    if column == _POSITIONS:
        return _read_ints(data, at, stop, limit, columns[_POSITIONS][i])
    if column == _MASKED_IDS:
        return _read_ints(data, at, stop, limit, columns[_MASKED_IDS][i])
    if column == _WEIGHTS:
        return _read_weights(data, at, stop, columns[_WEIGHTS][i])
    return _read_ints(data, at, stop, limit, columns[_LABELS][i])


@compiled
def _masks_tokens_only(mask: Bytes, positions: npt.NDArray[Any], weights: Words) -> bool:
    """Whether every masked position that counts stands on a token."""
    on_padding = 0
    for k in range(len(weights)):
        on_padding += weights[k] != 0 and mask[positions[k]] == 0
    return on_padding == 0


@compiled
def _decode_record(data: Bytes, at: int, stop: int, limits: Ints, columns: _Columns, i: int) -> bool:
    """Decode one Example into the i-th rows; False unless it is certainly a good sample in packed form."""
    seen = 0
    at, end = _enter(data, at, stop, _FIELD_1)
    if end != stop:
        return False
    while at < stop:
        entry, end = _enter(data, at, stop, _FIELD_1)
        key, key_end = _enter(data, entry, end, _FIELD_1)
        kind, kind_end = _enter(data, key_end, end, _ENTRY_VALUE)
        if key_end < 0 or kind_end < 0 or kind_end != end:
            return False
        at = end
        column = _find_column(data, key, key_end)
        if column < 0:  # a feature that we do not read
            continue
        field, field_end = _enter(data, kind, end, _FLOAT_LIST if column == _WEIGHTS else _INT64_LIST)
        values, values_end = _enter(data, field, end, _FIELD_1)
        if field_end != end or values_end != end or seen >> column & 1:
            return False
        seen |= 1 << column
        if not _read_column(data, values, end, column, limits[column], columns, i):
            return False
    return seen == _ALL_COLUMNS and _masks_tokens_only(columns[_MASK][i], columns[_POSITIONS][i], columns[_WEIGHTS][i])


@compiled
def _decode_records(data: Bytes, spans: Ints, limits: Ints, columns: _Columns, is_good: Flags) -> None:
    """Decode the [N, 2] spans of `data` into the rows of the columns."""
    for i in range(len(spans)):
        is_good[i] = _decode_record(data, spans[i, 0], spans[i, 1], limits, columns, i)


# --- Decoding: any record ---------------------------------------------------------------------------------------------


class InvalidSampleError(ValueError):
    """A record's payload is no valid sample.

    Args:
        found: what it holds.
        expected: what it should hold.
    """

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"found {found}, expected {expected}")
        self.found, self.expected = found, expected


def parse_example(payload: bytes, schema: Schema) -> Arrays:
    """Decode and check one record of any legal form: one row of `Schema.empty`'s arrays.

    Raises:
        InvalidSampleError: it is not a sample of the schema; of several faults the first is told.
    """
    features = _features(payload)
    sample: Arrays = {column.name: _values(features, column) for column in schema.columns}
    positions = sample["masked_lm_positions"].astype(np.int64)
    padding = (sample["masked_lm_weights"] != 0) & (sample["input_mask"][positions] == 0)
    if padding.any():
        k = int(np.argmax(padding))
        raise InvalidSampleError(f"masked_lm_positions[{k}] = {positions[k]}, where input_mask is 0", "a token there")
    return {**sample, "next_sentence_labels": sample["next_sentence_labels"].reshape(())}


_EXAMPLE = """
name: "example.proto"  package: "raybert"  syntax: "proto3"
message_type { name: "Int64List"  field { name: "value"  number: 1  label: LABEL_REPEATED  type: TYPE_INT64 } }
message_type { name: "FloatList"  field { name: "value"  number: 1  label: LABEL_REPEATED  type: TYPE_FLOAT } }
message_type { name: "BytesList"  field { name: "value"  number: 1  label: LABEL_REPEATED  type: TYPE_BYTES } }
message_type {
  name: "Feature"
  oneof_decl { name: "kind" }
  field { name: "bytes_list"  number: 1  type: TYPE_MESSAGE  type_name: ".raybert.BytesList"  oneof_index: 0 }
  field { name: "float_list"  number: 2  type: TYPE_MESSAGE  type_name: ".raybert.FloatList"  oneof_index: 0 }
  field { name: "int64_list"  number: 3  type: TYPE_MESSAGE  type_name: ".raybert.Int64List"  oneof_index: 0 }
}
message_type {
  name: "Features"
  field { name: "feature"  number: 1  label: LABEL_REPEATED  type: TYPE_MESSAGE  type_name: ".raybert.Features.Entry" }
  nested_type {
    name: "Entry"
    field { name: "key"  number: 1  type: TYPE_STRING }
    field { name: "value"  number: 2  type: TYPE_MESSAGE  type_name: ".raybert.Feature" }
    options { map_entry: true }
  }
}
message_type {
  name: "Example"
  field { name: "features"  number: 1  type: TYPE_MESSAGE  type_name: ".raybert.Features" }
}
"""  # as in tensorflow/core/example; the wire knows no names


@functools.cache
def _example() -> Any:
    """The Example message, of a pool of its own: in the common one TensorFlow's clashes with the tfrecord package's.

    Imported when first needed: most records go without it.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_EXAMPLE, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("raybert.Example"))


def _features(payload: bytes) -> Mapping[str, Any]:
    from google.protobuf.message import DecodeError

    try:
        return cast(Mapping[str, Any], _example().FromString(payload).features.feature)
    except DecodeError as error:
        found = f"a payload of {len(payload)} bytes that is no protobuf"
        raise InvalidSampleError(found, "a tf.train.Example") from error


def _values(features: Mapping[str, Any], column: Column) -> npt.NDArray[np.generic]:
    """A feature's values, checked for presence, type, length and range."""
    name = column.name if column.name in features else ALIASES.get(column.name, column.name)
    wanted = "float_list" if column.limit is None else "int64_list"
    if name not in features:
        raise InvalidSampleError(f"no feature {column.name}", f"{wanted} of {column.length_rule}")
    kind = features[name].WhichOneof("kind")
    if kind != wanted:
        raise InvalidSampleError(f"{name} is {'without a type' if kind is None else f'a {kind}'}", f"{wanted}")
    values: npt.NDArray[Any] = np.array(
        getattr(features[name], kind).value, np.float32 if column.limit is None else np.int64
    )
    if len(values) != column.length:
        raise InvalidSampleError(f"{name} has {len(values)} values", column.length_rule)
    limit = np.inf if column.limit is None else column.limit
    is_good = (values >= 0) & (values < limit)  # false for NaN
    if not is_good.all():
        k = int(np.argmin(is_good))
        raise InvalidSampleError(f"{name}[{k}] = {values[k]}", column.limit_rule)
    return cast(npt.NDArray[np.generic], values.astype(column.dtype))


def sizes_of(payload: bytes) -> tuple[int, int]:
    """L and P of a sample, by its features.

    Raises:
        InvalidSampleError: it is no Example, or lacks them.
    """
    features = _features(payload)
    names = [next((name for name in (wanted, ALIASES.get(wanted)) if name in features), None)
             for wanted in ("input_ids", "masked_lm_positions")]  # fmt: skip
    length, places = (len(features[name].int64_list.value) if name else 0 for name in names)
    if not length or not places:
        raise InvalidSampleError("no input_ids or no masked_lm_positions", "both")
    return length, places


def decode(buffer: Buffer, offsets: Ints, lengths: Ints, schema: Schema) -> tuple[Arrays, Flags]:
    """Decode records into fixed-width arrays, and check them.

    Features that the schema does not name are passed over unread. CRCs are the business of `find_records`.

    Args:
        buffer: where the records lie.
        offsets, lengths: [N] payloads in it, in bytes.
        schema: what they must look like.

    Returns:
        The arrays of `schema.empty(N)`, and [N] whether the record is good; `bad_records` tells why not. Rows of bad
        records are zero.

    Raises:
        ValueError: a record reaches beyond the buffer.
    """
    data = view(buffer)
    spans = np.stack([offsets, offsets + lengths], axis=1).astype(np.int64, copy=False)
    if np.any((spans[:, 0] < 0) | (spans[:, 1] < spans[:, 0]) | (spans[:, 1] > len(data))):
        raise ValueError(f"A record reaches beyond the buffer of {len(data)} bytes; was the file changed?")
    arrays, is_good = schema.empty(len(offsets)), np.zeros(len(offsets), np.bool_)
    columns = tuple(arrays[column.name].reshape(len(offsets), column.length) for column in schema.columns)
    bits = tuple(column.view(np.uint32) if column.dtype == np.float32 else column for column in columns)
    limits = np.array([column.limit or 0 for column in schema.columns])
    _decode_records(data, spans, limits, bits, is_good)
    for i in np.flatnonzero(~is_good).tolist():
        is_good[i] = _decode_slowly(data[spans[i, 0] : spans[i, 1]].tobytes(), i, schema, arrays)
    return arrays, is_good


def _decode_slowly(payload: bytes, i: int, schema: Schema, arrays: Arrays) -> bool:
    """What the fast path left: fill row i if the record is good after all, else clear it."""
    try:
        sample = parse_example(payload, schema)
    except InvalidSampleError:
        sample = {name: np.zeros((), column.dtype) for name, column in arrays.items()}
        good = False
    else:
        good = True
    for name, values in sample.items():
        arrays[name][i] = values
    return good


def bad_records(records: Records, is_good: Flags, schema: Schema) -> Iterator[BadRecord]:
    """Every damaged place among the records, in order.

    Args:
        records: of `find_records` or `walk`.
        is_good: [N] of `decode` on them.
        schema: what they must look like.
    """
    frames = records.frame_offsets
    for i in np.flatnonzero(~(is_good & records.is_intact)).tolist():
        found, expected = _complaint(records, i, schema)
        yield BadRecord(records.first_record + i, int(frames[i]), found, expected)
    if records.lost:
        yield records.lost


def _complaint(records: Records, i: int, schema: Schema) -> tuple[str, str]:
    payload = records.payload(i)
    if not records.is_intact[i]:
        found = f"a payload of {len(payload)} bytes with checksum 0x{int(records.crcs[i]):08x}"
        return found, f"checksum 0x{masked_crc(payload):08x}"
    try:
        parse_example(payload, schema)
    except InvalidSampleError as error:
        return error.found, error.expected
    raise AssertionError(f"decode() refused record {records.first_record + i}, parse_example() takes it")


# --- Encoding ---------------------------------------------------------------------------------------------------------


def encode_example(sample: Mapping[str, npt.ArrayLike]) -> bytes:
    """One sample as a serialized tf.train.Example, floats as float_list and integers as int64_list; keys sorted."""
    example = _example()()
    for name, values in sample.items():
        array = np.atleast_1d(values)
        feature = example.features.feature[name]
        target = feature.float_list if array.dtype.kind == "f" else feature.int64_list
        target.value.extend(array.tolist())
    return cast(bytes, example.SerializeToString(deterministic=True))


def encode(arrays: Arrays) -> Iterator[bytes]:
    """Many samples as serialized tf.train.Examples, byte for byte those of `encode_example`.

    Args:
        arrays: google-research/bert's feature names to [N, ...] arrays, integers in [0, 2**31) and float32.
    """
    names = sorted(arrays)
    matrices = [array.reshape(len(array), -1) for array in map(arrays.__getitem__, names)]
    is_float = np.array([matrix.dtype.kind == "f" for matrix in matrices])
    offsets = np.cumsum([0, *(matrix.shape[1] for matrix in matrices)])
    values = np.concatenate([_as_words(matrix) for matrix in matrices], axis=1)
    name_ends = np.cumsum([len(name) for name in names])
    buffer, ends = _encode_records(values, offsets, is_float, view("".join(names).encode()), name_ends)
    content = buffer.tobytes()
    for start, end in itertools.pairwise([0, *ends.tolist()]):
        yield content[start:end]


def _as_words(matrix: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Integers as they are, floats as their bit patterns."""
    return matrix.view(np.int32) if matrix.dtype == np.float32 else matrix.astype(np.int32)


@compiled
def _encode_records(
    values: npt.NDArray[np.int32], offsets: Ints, is_float: Flags, names: Bytes, name_ends: Ints
) -> tuple[Bytes, Ints]:
    """The records one behind the other, and where each one ends."""
    num_records, num_values = values.shape
    num_features = len(is_float)
    # A varint has 5 bytes at most; a feature has 5 lengths and as many tags around its name and values.
    buffer = np.empty(num_records * (5 * num_values + 30 * num_features + len(names) + 6), np.uint8)
    ends, sizes = np.empty(num_records, np.int64), np.empty(num_features, np.int64)
    at = 0
    for i in range(num_records):
        total = 0
        for f in range(num_features):
            sizes[f] = _values_size(values[i, offsets[f] : offsets[f + 1]], is_float[f])
            total += _field_size(_entry_size(name_ends, f, sizes[f]))
        at = _put_header(buffer, at, _FIELD_1, total)
        for f in range(num_features):
            name_start = name_ends[f - 1] if f else 0
            at = _put_header(buffer, at, _FIELD_1, _entry_size(name_ends, f, sizes[f]))
            at = _put_header(buffer, at, _FIELD_1, name_ends[f] - name_start)
            for k in range(name_start, name_ends[f]):
                buffer[at] = names[k]
                at += 1
            at = _put_header(buffer, at, _ENTRY_VALUE, _field_size(_field_size(sizes[f])))
            at = _put_header(buffer, at, _FLOAT_LIST if is_float[f] else _INT64_LIST, _field_size(sizes[f]))
            at = _put_header(buffer, at, _FIELD_1, sizes[f])
            for k in range(offsets[f], offsets[f + 1]):
                at = _put_fixed(buffer, at, values[i, k]) if is_float[f] else _put_varint(buffer, at, values[i, k])
        ends[i] = at
    return buffer[:at], ends


@compiled
def _values_size(values: npt.NDArray[np.int32], is_float: bool) -> int:
    if is_float:
        return 4 * len(values)
    size = 0
    for value in values:
        size += _varint_size(value)
    return size


@compiled
def _entry_size(name_ends: Ints, f: int, size: int) -> int:
    """Bytes of a map entry: a feature's name, and its values, in a Feature that holds an Int64List or FloatList."""
    name_size = name_ends[f] - name_ends[f - 1] if f else name_ends[f]
    return _field_size(name_size) + _field_size(_field_size(_field_size(size)))


@compiled
def _field_size(size: int) -> int:
    """Bytes of a field of so many bytes, with its tag and length."""
    return 1 + _varint_size(size) + size


@compiled
def _varint_size(value: int) -> int:
    size = 1
    while value >= 128:
        value >>= 7
        size += 1
    return size


@compiled
def _put_header(buffer: Bytes, at: int, tag: int, size: int) -> int:
    buffer[at] = tag
    return _put_varint(buffer, at + 1, size)


@compiled
def _put_varint(buffer: Bytes, at: int, value: int) -> int:
    while value >= 128:
        buffer[at] = value & 127 | 128
        value >>= 7
        at += 1
    buffer[at] = value
    return at + 1


@compiled
def _put_fixed(buffer: Bytes, at: int, value: int) -> int:
    """Four bytes, little-endian."""
    for k in range(4):
        buffer[at + k] = value >> 8 * k & 255
    return at + 4
