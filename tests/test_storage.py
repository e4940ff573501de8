"""Storage: globs, packages, whole files or none; the same on a local disk and on S3."""

import hashlib
import os
import pickle
import resource
import signal
import uuid

import pytest
from helpers import TINY_SCHEMA, build_index, write_samples

from raybert.errors import UserError
from raybert.storage import Directory, absolute, find_files, local_file, open_input, resolve

TREE = ("a.tfrecord", "b.tfrecord", "c.txt", "x/a.tfrecord", "x/y/a.tfrecord", ".hidden.tfrecord", ".git/a.tfrecord",
        "part[1].tfrecord", "part1.tfrecord", "with space.tfrecord", "per%20cent.tfrecord", "b#1.tfrecord")  # fmt: skip
TOP = ["a.tfrecord", "b#1.tfrecord", "b.tfrecord", "part1.tfrecord", "part[1].tfrecord", "per%20cent.tfrecord",
       "with space.tfrecord"]  # fmt: skip
GLOBS = [
    ("*.tfrecord", TOP),
    ("b.tfrecord,a.tfrecord", ["a.tfrecord", "b.tfrecord"]),
    (" a.tfrecord , *.txt,", ["a.tfrecord", "c.txt"]),
    ("a.tfrecord,[ab].tfrecord", ["a.tfrecord", "b.tfrecord"]),  # each once
    ("?.tfrecord", ["a.tfrecord", "b.tfrecord"]),
    ("*/a.tfrecord", ["x/a.tfrecord"]),  # not deeper, nothing hidden
    ("**/a.tfrecord", ["a.tfrecord", "x/a.tfrecord", "x/y/a.tfrecord"]),
    ("x/**", ["x/a.tfrecord", "x/y/a.tfrecord"]),
    ("x/**/y/*", ["x/y/a.tfrecord"]),
    (".*.tfrecord", [".hidden.tfrecord"]),
    ("part[1].tfrecord", ["part[1].tfrecord"]),  # a file of just this name
    ("part[[]1].tfrecord", ["part[1].tfrecord"]),
    ("with space.tfrecord", ["with space.tfrecord"]),
    ("per%20cent.tfrecord", ["per%20cent.tfrecord"]),
    ("b#*", ["b#1.tfrecord"]),
]
NO_MATCH = ["none.tfrecord", "*.gz", "none/*.tfrecord", "none/**", "x", "a.tfrecord/b"]


def write_tree(directory):
    for name in TREE:
        directory.write(name, name.encode())
    return directory


@pytest.fixture(params=["local", "file", "s3", "s3 with query"])
def directory(request, tmp_path):
    """An empty directory on each kind of storage."""
    if request.param == "local":
        return Directory(str(tmp_path / "a folder"))
    if request.param == "file":
        return Directory(f"file://{tmp_path}/a folder")
    plain = f"{request.getfixturevalue('bucket')}/{uuid.uuid4().hex}"
    endpoint = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    query = f"?scheme=http&endpoint_override={endpoint}&region=us-east-1" if "query" in request.param else ""
    return Directory(plain + query)


# --- Files that patterns name ---------------------------------------------------------------------------------------


def test_globs_name_files_sorted_and_each_once(directory):
    write_tree(directory)
    for patterns, expected in GLOBS:
        uris = ",".join((directory / part.strip()).uri if part.strip() else "" for part in patterns.split(","))
        files = find_files(uris, "data.input_files")
        assert [file.path for file in files] == [(directory / name).uri for name in expected], patterns
        assert [open_input(file.path).read().decode() for file in files] == expected
        assert [file.size_bytes for file in files] == list(map(len, expected))
        assert all(file.modified_ns > 0 for file in files)


def test_no_match_names_option_and_pattern(directory):
    write_tree(directory)
    for pattern in NO_MATCH:
        uri = (directory / pattern).uri
        with pytest.raises(UserError, match=r"evaluation\.input_files: .* matches no file") as caught:
            find_files(f"{(directory / 'a.tfrecord').uri},{uri}", "evaluation.input_files")
        assert repr(uri) in str(caught.value)


def test_relative_patterns_begin_at_the_working_directory(tmp_path, monkeypatch):
    write_tree(Directory(str(tmp_path)))
    monkeypatch.chdir(tmp_path / "x")
    assert [file.path for file in find_files("*.tfrecord", "o")] == [f"{tmp_path}/x/a.tfrecord"]
    assert absolute("y") == f"{tmp_path}/x/y"
    with pytest.raises(UserError, match="working directory: ") as caught:
        find_files("none*", "o")
    assert str(tmp_path / "x") in str(caught.value)


def test_package_files_are_found_wherever_the_package_is():
    (config,) = find_files("raybert://configs/sample.yaml", "o")
    assert config.path == "raybert://configs/sample.yaml"
    assert open_input(config.path).read() == Directory("raybert://configs").read("sample.yaml")
    assert len(find_files("raybert://configs/*.yaml", "o")) > 1


@pytest.mark.parametrize("uri", ["http://host/x", "hdfs://host:1/x", "s3://key:secret@bucket/x"])
def test_a_place_that_cannot_be_is_refused(uri):
    with pytest.raises(UserError) as caught:
        resolve(uri)
    assert "secret" not in str(caught.value)


def test_a_bucket_that_is_not_there_is_a_user_error(bucket):
    missing = f"s3://none-{uuid.uuid4().hex}"
    with pytest.raises(UserError, match=missing):
        find_files(f"{missing}/*.tfrecord", "data.input_files")
    with pytest.raises(UserError, match="run_dir"):
        Directory(f"{missing}/run").check_writable("run_dir")


# --- Directories ----------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(directory):
    assert directory.names() == [] and not directory.exists("file")
    content = os.urandom(100_000)
    (directory / "sub").write("file", content)
    directory.write("empty", b"")
    directory.write("file", b"old")
    directory.write("file", content)
    assert directory.names() == ["empty", "file", "sub"]
    assert directory.exists("file") and directory.exists("sub") and not directory.exists("fil")
    assert directory.read("file") == directory.read("sub/file") == (directory / "sub").read("file") == content
    assert directory.read("empty") == b""
    assert directory.digest("file") == hashlib.sha256(content).hexdigest()
    with local_file((directory / "file").uri) as path:
        assert path.read_bytes() == content
    assert pickle.loads(pickle.dumps(directory)).read("file") == content


@pytest.mark.parametrize(
    ("uri", "below"),
    [
        ("/runs/a", "/runs/a/b c"),
        ("runs/a/", "runs/a/b c"),
        ("s3://bucket/runs", "s3://bucket/runs/b c"),
        ("s3://bucket/runs/?region=x&scheme=http", "s3://bucket/runs/b c?region=x&scheme=http"),
    ],
)
def test_a_query_stays_behind_the_path(uri, below):
    assert (Directory(uri) / "b c").uri == below


def test_a_missing_file_is_not_found(directory):
    directory.write("file", b"")
    for read in (directory.read, directory.digest):
        with pytest.raises(FileNotFoundError):
            read("none")
    with pytest.raises(UserError, match=r"no file .*none"), local_file((directory / "none").uri):
        pass


def test_upload_copies_a_local_file(directory, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"content")
    directory.upload("a/b", source)
    assert directory.read("a/b") == b"content"


def test_local_has_all_files(directory):
    directory.write("a", b"1")
    directory.write("b", b"2")
    directory.write("sub/c", b"3")
    with directory.local() as path:
        assert {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()} == {"a": b"1", "b": b"2"}
    assert path.exists() == directory.is_local


def test_delete_and_remove(directory):
    directory.write("other/file", b"1")
    directory.write("doomed/file", b"1")
    directory.write("doomed/sub/file", b"1")
    (directory / "doomed").remove("sub/file")
    assert not (directory / "doomed").exists("sub/file")
    (directory / "doomed").delete()
    (directory / "doomed").delete()
    assert directory.names() == ["other"] and not directory.exists("doomed/file")


def test_check_writable_leaves_nothing(directory):
    directory.check_writable("run_dir")
    assert directory.names() == []


def test_check_writable_names_option_and_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run_dir: cannot write to .*file/run"):
        Directory(f"{tmp_path}/file/run").check_writable("run_dir")


def test_a_failing_write_leaves_the_old_content(tmp_path):
    """The disk is full after 1,000 bytes."""
    directory = Directory(str(tmp_path))
    directory.write("file", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            directory.write("file", bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert directory.names() == ["file"] and directory.read("file") == b"old"


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_a_plain_s3_uri_goes_to_the_endpoint_of_the_environment(bucket, variable, monkeypatch):
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv(variable, endpoint)
    directory = Directory(f"{bucket}?region=us-east-{len(variable)}") / uuid.uuid4().hex  # a filesystem of its own
    directory.write("file", b"content")
    assert directory.read("file") == b"content"


@pytest.mark.parametrize("compression", ["", "gzip"])
def test_index_and_samples_are_read_from_s3(bucket, tmp_path, compression):
    directory = Directory(f"{bucket}/{uuid.uuid4().hex}")
    local = write_samples(tmp_path / "a.tfrecord", 300, seed=1, compression=compression)
    directory.upload("a.tfrecord", local)
    remote = build_index((directory / "*.tfrecord").uri, TINY_SCHEMA, (directory / "index").uri)
    plain = build_index(local, TINY_SCHEMA, tmp_path / "index")
    samples = range(299, 0, -7)
    for name, values in remote.read(samples).items():
        assert (values == plain.read(samples)[name]).all()
    assert build_index((directory / "*").uri, TINY_SCHEMA, (directory / "index").uri).digest == plain.digest


def test_leftovers_of_killed_processes_are_told_from_the_users_files(tmp_path):
    hexadecimal = "0123456789abcdef" * 2
    leftovers = [f".probe-{hexadecimal}", f"..probe-{hexadecimal}.{hexadecimal}", f".a.json.{hexadecimal}"]
    kept = [".hidden", f"{hexadecimal}", f".{hexadecimal}", "a.json", ".a.json.0123"]
    for name in leftovers + kept:
        (tmp_path / name).touch()
    Directory(str(tmp_path)).remove_leftovers()
    assert Directory(str(tmp_path)).names() == sorted(kept)
