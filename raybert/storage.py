"""Where files are: local directories, s3:// and gs:// behind one small interface over pyarrow's filesystems."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import posixpath
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from raybert.errors import UserError
from raybert.retry import outlast_blip
from raybert.scratch import scratch

PACKAGE = "raybert://"  # files that ship with raybert, wherever each node has it
_PACKAGE_PATH = Path(__file__).parent
_GLOB = re.compile(r"[*?\[]")
_SECRET = re.compile(r"[?&]\w*(key|secret|token|password)\w*=", re.IGNORECASE)  # an option that is one
_QUERY = re.compile(r"\?\w+=[^?*]*$")  # ends a URI: options such as endpoint_override; any other ? is a glob's
_LEFTOVER = re.compile(r"\.(probe-|.+\.)[0-9a-f]{32}")  # what this module names files that are not to stay
CHUNK_BYTES = 16 << 20
SILENCE_S, NUM_TRIES = 10.0, 3  # a request without a byte for so long is tried again, so often; then it is an error


@dataclass(frozen=True)
class File:
    """A file as it was when it was listed; a changed file differs in size or modification time."""

    path: str
    size_bytes: int
    modified_ns: int


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem behind a path or URI, and the path within it.

    Raises:
        UserError: the URI is none of ours.
        OSError: its store cannot be reached.
    """
    if uri.startswith(PACKAGE):
        return fs.LocalFileSystem(), str(_PACKAGE_PATH / uri.removeprefix(PACKAGE))
    if "://" not in uri:
        return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    place, query = _split_query(uri)
    scheme, _, path = place.partition("://")
    if scheme == "file":
        return fs.LocalFileSystem(), path
    return _bucket_filesystem(scheme, path.partition("/")[0], query), path.rstrip("/")


def _split_query(uri: str) -> tuple[str, str]:
    """A place and the query behind it; the place is taken as it is written, nothing in it is percent-encoded."""
    query = _QUERY.search(uri) if "://" in uri else None
    return (uri[: query.start()], query.group()) if query else (uri, "")


@cache
def _bucket_filesystem(scheme: str, bucket: str, query: str) -> fs.FileSystem:
    """The filesystem that a bucket is in; kept, since making one asks the store where the bucket is."""
    if scheme not in ("s3", "gs"):
        raise UserError(f"Unknown scheme {scheme}://; give a local path, s3://... or gs://....")
    if "@" in bucket or _SECRET.search(query):
        raise UserError(f"A {scheme}:// path must not hold credentials; set them in the environment.")
    place = f"{scheme}://{bucket}{query}"
    try:
        made = fs.FileSystem.from_uri(place)[0]
    except ValueError as error:
        raise UserError(f"Cannot open {place}: {error}; correct the path.") from error
    # A URI cannot say how long to wait for an answer: by default a request that hangs is given up after minutes.
    _, (options,) = made.__reduce__()
    if scheme == "gs":
        return fs.GcsFileSystem(**options | {"retry_time_limit": timedelta(seconds=SILENCE_S * NUM_TRIES)})
    tries = fs.AwsStandardS3RetryStrategy(max_attempts=NUM_TRIES)
    return fs.S3FileSystem(**options | {"request_timeout": SILENCE_S, "retry_strategy": tries})


@contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """A file as a local path; a remote one is downloaded for the time of the context.

    Raises:
        UserError: there is no such file, or it cannot be fetched.
    """
    filesystem, path = resolve(uri)
    if filesystem.get_file_info(path).type != fs.FileType.File:
        raise UserError(f"There is no file {uri!r}; correct the path.")
    if isinstance(filesystem, fs.LocalFileSystem):
        yield Path(path)
        return
    with scratch() as directory:
        local = directory / posixpath.basename(path)
        try:
            with filesystem.open_input_stream(path) as source:
                local.write_bytes(source.read())
        except OSError as error:
            raise UserError(f"Cannot read {uri!r}: {error}; check the network and the credentials.") from error
        yield local


def open_input(uri: str) -> pa.NativeFile:
    """A random access file, read only."""
    filesystem, path = resolve(uri)
    return filesystem.open_input_file(path)


def open_seen(uri: str) -> pa.NativeFile:
    """A random access file that another node of the cluster has seen.

    Raises:
        UserError: it is not there, or not on this node.
    """
    try:
        return open_input(uri)
    except FileNotFoundError as error:
        raise UserError(
            f"{uri} is not there on node {socket.gethostname()}; restore it, or put it where every node sees it under "
            "this path: s3://, gs:// or a file system mounted on all of them."
        ) from error


def chunks(source: pa.NativeFile, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """What is left of a file, in order."""
    while chunk := source.read(chunk_bytes):
        yield chunk


def find_files(patterns: str, option: str) -> list[File]:
    """The files that comma-separated paths or globs name, sorted by path, each once.

    Globs are a shell's: ** is any number of directories, and a leading dot is matched only by a dot. A file whose name
    is the pattern, letter for letter, is that file.

    Args:
        patterns: paths or globs, separated by commas; local, s3:// or gs://.
        option: the setting they come from, for messages.

    Raises:
        UserError: a pattern matches no file, or its storage cannot be read.
    """
    found: dict[str, File] = {}
    for pattern in (part.strip() for part in patterns.split(",")):
        if not pattern:
            continue
        files = list(_match(pattern, option))
        if not files:
            where = "" if "://" in pattern else f" (working directory: {Path.cwd()})"
            raise UserError(f"{option}: {pattern!r} matches no file{where}; correct the path or the glob.")
        found.update((file.path, file) for file in files)
    return [found[path] for path in sorted(found)]


def _match(pattern: str, option: str) -> Iterator[File]:
    try:
        filesystem, path = resolve(pattern)
        infos = [filesystem.get_file_info(path)]
        glob = _GLOB.search(path)
        if glob and infos[0].type != fs.FileType.File:
            infos = _list_files(filesystem, path[: glob.start()].rpartition("/")[0] or "/", path)
    except OSError as error:
        raise UserError(f"{option}: cannot list {pattern!r}: {error}; check the path and the credentials.") from error
    for info in infos:
        if info.type == fs.FileType.File:
            yield File(_uri(info.path, pattern), info.size, info.mtime_ns or 0)


def _list_files(filesystem: fs.FileSystem, root: str, glob: str) -> list[fs.FileInfo]:
    """What matches a glob under the directory that it begins with."""
    recursive = "**" in glob or glob.count("/") > root.rstrip("/").count("/") + 1
    infos = filesystem.get_file_info(fs.FileSelector(root, recursive=recursive, allow_not_found=True))
    return [info for info in infos if _is_match(info.path.split("/"), glob.split("/"))]


def _is_match(names: list[str], globs: list[str]) -> bool:
    if not names or not globs:
        return not names and all(glob == "**" for glob in globs)
    name, glob = names[0], globs[0]
    if glob == "**" and _is_match(names, globs[1:]):
        return True
    if name.startswith(".") and not glob.startswith("."):
        return False
    return fnmatch.fnmatchcase(name, glob) and _is_match(names[1:], globs if glob == "**" else globs[1:])


def _uri(path: str, like: str) -> str:
    """The URI of a path in the filesystem that another URI is in."""
    if like.startswith(PACKAGE):
        return PACKAGE + str(Path(path).relative_to(_PACKAGE_PATH))
    place, query = _split_query(like)
    scheme, separator, _ = place.partition("://")
    return f"{scheme}://{path}{query}" if separator else path


def absolute(uri: str) -> str:
    """The same place, independent of the working directory."""
    return uri if "://" in uri else resolve(uri)[1]


def containing(uri: str) -> tuple[Directory, str]:
    """The directory that a file is in, and its name there."""
    place, query = _split_query(absolute(uri))
    folder, _, name = place.rpartition("/")
    return Directory((folder or "/") + query), name


@dataclass(frozen=True)
class Directory:
    """A directory of the user's storage. Names are relative to it; object stores need no directories to exist."""

    uri: str

    @property
    def filesystem(self) -> fs.FileSystem:
        return resolve(self.uri)[0]

    @property
    def path(self) -> str:
        """The path within `filesystem`."""
        return resolve(self.uri)[1]

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def __truediv__(self, name: str) -> Directory:
        place, query = _split_query(self.uri)
        return Directory(f"{place.rstrip('/')}/{name}{query}")

    def _at(self, name: str) -> str:
        return posixpath.join(self.path, name)

    def names(self) -> list[str]:
        """Names of what the directory holds, sorted; nothing if it does not exist."""
        selector = fs.FileSelector(self.path, allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    def file(self, name: str) -> File:
        """A file that is there, as it is now."""
        info = self.filesystem.get_file_info(self._at(name))
        return File(_uri(info.path, self.uri), info.size, info.mtime_ns or 0)

    def exists(self, name: str) -> bool:
        return bool(self.filesystem.get_file_info(self._at(name)).type != fs.FileType.NotFound)

    def read(self, name: str) -> bytes:
        """A file's content.

        Raises:
            FileNotFoundError: there is no such file.
        """
        with self.filesystem.open_input_file(self._at(name)) as file:
            return bytes(file.read())

    def digest(self, name: str) -> str:
        """SHA-256 of a file's content, hexadecimal.

        Raises:
            FileNotFoundError: there is no such file.
        """
        sha256 = hashlib.sha256()
        with self.filesystem.open_input_stream(self._at(name)) as file:
            while chunk := file.read(8 << 20):
                sha256.update(chunk)
        return sha256.hexdigest()

    def write(self, name: str, content: bytes) -> None:
        """Write a file that is there whole or not at all: renamed into place, or put as one object."""
        if self.is_local:
            _write_local(Path(self._at(name)), content)
            return
        with self.filesystem.open_output_stream(self._at(name)) as file:
            file.write(content)

    def upload(self, name: str, source: Path) -> None:
        """Copy a local file here under a name, whole.

        Its size is looked at afterwards. Its content is not: reading a checkpoint back would double the traffic, the
        store compares checksums of what it receives, and a checkpoint is verified by digest before it is loaded.

        Raises:
            OSError: it may be there in part, or another of this name before.
        """
        if self.is_local and Path(self._at(name)).resolve() == source.resolve():
            return
        if self.is_local:
            Path(self._at(name)).parent.mkdir(parents=True, exist_ok=True)
        # Not fs.copy_files, which says nothing of an upload that fails at its end.
        with source.open("rb") as file, self.filesystem.open_output_stream(self._at(name)) as target:
            shutil.copyfileobj(file, target, CHUNK_BYTES)
            sent = file.tell()
        found = self.filesystem.get_file_info(self._at(name)).size
        if found != sent:
            raise OSError(f"{self._at(name)} has {found} bytes after an upload of {sent}")

    def remove(self, name: str) -> None:
        """Delete one file."""
        self.filesystem.delete_file(self._at(name))

    @contextmanager
    def local(self) -> Iterator[Path]:
        """The directory as a local path; the files of a remote one are downloaded for the time of the context."""
        if self.is_local:
            yield Path(self.path)
            return
        with scratch() as directory:
            for info in outlast_blip(partial(self.filesystem.get_file_info, fs.FileSelector(self.path))):
                if info.type == fs.FileType.File:
                    content = outlast_blip(partial(self.read, info.base_name))
                    (directory / info.base_name).write_bytes(content)
            yield directory

    def delete(self) -> None:
        """Delete the directory and all it holds; nothing happens if it does not exist."""
        if self.filesystem.get_file_info(self.path).type != fs.FileType.NotFound:
            self.filesystem.delete_dir(self.path)

    def remove_leftovers(self) -> None:
        """Delete what killed processes were writing here; nobody may be writing now."""
        for name in self.names():
            if _LEFTOVER.fullmatch(name):
                self.remove(name)

    def check_writable(self, option: str) -> None:
        """Write, read back and delete a probe.

        Raises:
            UserError: the directory cannot be written; nothing is left behind.
        """
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            self.write(probe, b"probe")
            self.filesystem.delete_file(self._at(probe))
        except OSError as error:
            raise UserError(f"{option}: cannot write to {self.uri!r}: {error}; choose a writable directory.") from error


def _write_local(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
