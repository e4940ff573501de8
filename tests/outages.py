"""Outages for tests: a local S3 server behind a proxy that fails as it is told, and a disk that can be full."""

import http.client
import subprocess
import threading
import uuid
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
UPLOADS = ("PUT", "POST", "DELETE")
HOP_BY_HOP = {"transfer-encoding", "connection", "content-length", "date", "server"}


class Store(ThreadingHTTPServer):
    """Forwards to an S3 server; while `fault` is set, requests that `concerns` names fail by it.

    Faults: "503" answers so; "stall" takes the request and never answers; "cut" closes the connection half-way through
    the request's body, or through the answer's.
    """

    daemon_threads = True

    def __init__(self, backend):
        super().__init__(("127.0.0.1", 0), Handler)
        self.backend, self.fault, self.concerns = backend, None, None
        self.requests, self.num_failed, self.is_healed = [], 0, threading.Event()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def begin(self, fault, concerns=lambda method, path: True):
        self.is_healed.clear()
        self.num_failed, self.concerns, self.fault = 0, concerns, fault

    def end(self):
        self.fault = None
        self.is_healed.set()

    @contextmanager
    def outage(self, fault, concerns=lambda method, path: True):
        self.begin(fault, concerns)
        try:
            yield
        finally:
            self.end()

    def handle_error(self, *_):
        """Clients give up: that is the point."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def forward(self):
        store, path = self.server, unquote(self.path)
        store.requests.append((self.command, path))
        fault = store.fault if store.fault and store.concerns(self.command, path) else None
        store.num_failed += fault is not None
        size = int(self.headers.get("content-length") or 0)
        is_chunked = self.headers.get("transfer-encoding") == "chunked"
        if fault == "cut" and (size or is_chunked or self.command == "HEAD"):
            self.rfile.read(100 if is_chunked else size // 2)
            self.hang_up()
            return
        body = self.chunked_body() if is_chunked else self.rfile.read(size)
        if fault == "stall":
            store.is_healed.wait()
            self.hang_up()
        elif fault == "503":
            self.answer(503, {"content-type": "application/xml"}, SLOW_DOWN)
        else:
            self.pass_on(body, is_cut=fault == "cut")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

    def chunked_body(self):
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def pass_on(self, body, is_cut):
        connection = http.client.HTTPConnection(*self.server.backend)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
        connection.request(self.command, self.path, body, headers)
        response = connection.getresponse()
        content = response.read()
        self.answer(response.status, dict(response.getheaders()), content, is_cut)
        connection.close()

    def answer(self, status, headers, content, is_cut=False):
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        size = headers.get("Content-Length") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(size or 0))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if is_cut else content)
        if is_cut:
            self.hang_up()

    def hang_up(self):
        self.close_connection = True
        self.connection.shutdown(2)

    def log_message(self, *_):
        pass


@contextmanager
def faulty_store():
    """A store and the URI of an empty bucket in it, which AWS_ENDPOINT_URL names."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    store = Store(moto.get_host_and_port())
    threading.Thread(target=store.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", store.endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "user")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("NO_PROXY", "127.0.0.1")
        bucket = f"bucket-{uuid.uuid4().hex}"
        address = store.endpoint.removeprefix("http://")
        fs.S3FileSystem(endpoint_override=address, scheme="http", allow_bucket_creation=True).create_dir(bucket)
        yield store, f"s3://{bucket}"
    store.end()
    store.shutdown()
    store.server_close()
    moto.stop()


@contextmanager
def small_disk(path, size):
    """A disk of its own: a tmpfs, which only root may mount."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk of its own can be mounted here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@contextmanager
def full(disk):
    """No byte of the disk is free."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            pass
    try:
        yield
    finally:
        ballast.unlink()
