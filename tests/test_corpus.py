"""The corpus: every document once, from every kind of file; what cannot be read is named."""

import gzip
import json
import zlib

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from raybert import corpus
from raybert.corpus import Piece, Reading, cut_into_pieces, documents
from raybert.errors import UserError
from raybert.storage import find_files

GOOGLE = b"One.\nTwo.\n\nThree.\n  \t\n\n\nFour.\r\nFive.\n\n"
SENTENCES = [["One.", "Two."], ["Three."], ["Four.", "Five."]]


def read(path, reading=None, piece_bytes=1 << 30):
    """The sentences of each document of a file."""
    reading = reading or Reading()
    pieces = cut_into_pieces(find_files(str(path), "--input"), reading, piece_bytes)
    return [list(document.sentences) for piece in pieces for document in documents(piece, reading)]


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zlib.compress])
def test_googles_format(tmp_path, compress):
    assert read(written(tmp_path, "text.txt", compress(GOOGLE))) == SENTENCES
    many = read(written(tmp_path, "many.txt", compress(GOOGLE * 5000)), piece_bytes=1000)  # far more than it is packed
    assert many == SENTENCES * 5000


@given(st.lists(st.sampled_from([b"a", b"bc d", "é".encode(), b"", b" ", b"\r"])), st.booleans(), st.integers(1, 9))
def test_pieces_of_any_size_hold_every_document_once(tmp_path_factory, lines, ends, piece_bytes):
    path = written(tmp_path_factory.mktemp("text"), "text.txt", b"\n".join(lines) + b"\n" * ends)
    expected, document = [], []
    for line in [*(line.decode().strip() for line in lines), ""]:
        if line:
            document.append(line)
        elif document:
            expected.append(document)
            document = []
    assert read(path, piece_bytes=piece_bytes) == read(path) == expected


def test_pieces_are_of_the_size_that_is_asked_for(tmp_path):
    files = find_files(str(written(tmp_path, "text.txt", GOOGLE)), "--input")
    pieces = list(cut_into_pieces(files, Reading(), 10))
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 10), (10, 20), (20, 30), (30, 40)]
    assert list(cut_into_pieces(files, Reading(lines="wrapped"), 10)) == [Piece(files[0])]
    packed = find_files(str(written(tmp_path, "text.gz", gzip.compress(GOOGLE))), "--input")
    assert len(list(cut_into_pieces(packed, Reading(), 10))) == 1


def test_paragraphs_are_split_into_sentences(tmp_path):
    path = written(tmp_path, "text.txt", b"Mr. Smith left. He paid $3.50!\nWas it enough?\n\nNo. It was not.")
    expected = [["Mr. Smith left.", "He paid $3.50!", "Was it enough?"], ["No.", "It was not."]]
    assert read(path, Reading(lines="paragraphs")) == expected
    assert read(path, Reading(lines="paragraphs"), piece_bytes=7) == expected


def test_wrapped_text_is_one_document_a_file(tmp_path):
    path = written(tmp_path, "text.txt", b"It was\nlate. We\n left.\n\n\nNext day\nit rained.\n")
    assert read(path, Reading(lines="wrapped")) == [["It was late.", "We left.", "Next day it rained."]]


ROWS = ["First. Second.\nThird.", None, "", "Fourth."]
OF_ROWS = [["First.", "Second.", "Third."], [], [], ["Fourth."]]


@pytest.mark.parametrize("piece_bytes", [1 << 30, 70, 30, 1])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.ndjson"])
def test_json_lines(tmp_path, name, piece_bytes):
    content = "\n".join(json.dumps({"id": 1, "text": row}) for row in ROWS).encode() + b"\n\n"
    path = written(tmp_path, name, gzip.compress(content) if name.endswith("gz") else content)
    assert read(path, piece_bytes=piece_bytes) == OF_ROWS
    assert read(path, Reading(lines="sentences"))[0] == ["First. Second.", "Third."]


@pytest.mark.parametrize("piece_bytes", [1 << 30, 300, 1])
@pytest.mark.parametrize("use_dictionary", [False, True])
@pytest.mark.parametrize("row_group_size", [1, 2, 3, 4])
def test_parquet(tmp_path, piece_bytes, use_dictionary, row_group_size):
    path = tmp_path / "rows.parquet"
    table = pa.table({"id": range(4), "body": ROWS})
    parquet.write_table(table, path, row_group_size=row_group_size, use_dictionary=use_dictionary)
    assert read(path, Reading(text_column="body"), piece_bytes) == OF_ROWS


def test_a_document_that_is_too_long_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_CHARS", 10)
    path = written(tmp_path, "text.txt", b"12345\n1234\n12\n123456789012\n1\n\nend")
    (piece,) = cut_into_pieces(find_files(str(path), "--input"), Reading(), 100)
    found = [(document.sentences, document.is_rest) for document in documents(piece, Reading())]
    assert found == [
        (["12345", "1234"], False),
        (["12"], True),
        (["123456789012"], True),
        (["1"], True),
        (["end"], False),
    ]


LONG = b"x" * 4096
BAD = {
    "latin1.txt": (b"good\n\ncaf\xe9 au lait\n", "line 3, byte 9: 0xe9 is not UTF-8"),
    "late.txt": ((LONG + b"\n") * 5 + b"\n" + LONG + b"\n\xff", "line 8, byte 24583: 0xff is not UTF-8"),
    "cut.gz": (gzip.compress(GOOGLE * 99)[:-20], "the gzip stream ends early"),
    "damaged.gz": (gzip.compress(GOOGLE * 99)[:40] + bytes(99), "the gzip stream is damaged"),
    "binary.txt": (b"a\n" + b"x" * 20_000, "line 2: longer than 0 MB; is this text?"),
    "bad.jsonl": (b'{"text": "a"}\n\n{"text": \n', "line 3: no JSON: Expecting value"),
    "list.jsonl": (b"[1]\n", "line 1: a JSON object is expected, not list"),
    "column.jsonl": (b'{"id": 1, "body": "a"}\n', "line 1: no column 'text' among id, body; name the column"),
    "number.jsonl": (b'{"text": "a"}\n{"text": 3}\n', "line 2: text is int, not text"),
    "late.jsonl": (b'{"text": "' + LONG + b'"}\n' + b'{"text": "a"}\n' * 9 + b"[1]\n", "line 11: a JSON object is"),
    "latin1.jsonl": (b'{"text": "\xe9"}\n', "line 1, byte 10: 0xe9 is not UTF-8"),
    "text.parquet": (b"plain text, and long enough for a footer", "is no Parquet file, or damaged"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("piece_bytes", [1 << 30, 1000])
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, name, piece_bytes):
    """With file, line and byte, in whichever piece it is."""
    monkeypatch.setattr(corpus, "MAX_LINE_BYTES", 10_000)
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 4096)
    content, message = BAD[name]
    path = written(tmp_path, name, content)
    with pytest.raises(UserError) as caught:
        read(path, piece_bytes=piece_bytes)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_a_row_of_parquet_that_is_no_text_is_named(tmp_path):
    """By its number in the file, whichever piece it is in."""
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": [1, 2, None]}), path, row_group_size=1)
    messages = []
    for piece in cut_into_pieces(find_files(str(path), "--input"), Reading(), 1):
        try:
            list(documents(piece, Reading()))
        except UserError as error:
            messages.append(str(error).removeprefix(f"{path}, "))
    ending = "text is int, not text; name another one by --text_column."
    assert messages == [f"row 0: {ending}", f"row 1: {ending}"]


def test_a_parquet_file_without_the_column(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"id": [1], "body": ["a"]}), path)
    with pytest.raises(UserError, match="no column 'text' among id, body"):
        read(path)


def test_parquet_that_is_not_utf8(tmp_path):
    path = tmp_path / "rows.parquet"
    text = pa.array([b"good", b"caf\xe9"]).view(pa.binary()).cast(pa.binary())
    parquet.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 2, text.buffers())}), path)
    with pytest.raises(UserError, match="row 1, byte 3 of text: not UTF-8"):
        read(path)
