"""Fixtures that more than one test file uses."""

import functools
import signal
import uuid

import hypothesis
import pytest
import torch
from helpers import SAMPLE_FILE, SAMPLE_SCHEMA, build_index, tiny_index
from pyarrow import fs

from raybert.storage import Directory

hypothesis.settings.register_profile("shared", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("shared")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # by a background shell, and so our children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # a second thread only slows models as small as these down


@pytest.fixture(scope="session")
def index(tmp_path_factory):
    """Over synthetic shards of unequal size: 828 samples, seq 16, 4 predictions, vocabulary 97."""
    return tiny_index(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def sample_index(tmp_path_factory):
    """Over 118 records that Google's script wrote: seq 128, 20 predictions, vocabulary 30,522."""
    return build_index(SAMPLE_FILE, SAMPLE_SCHEMA, tmp_path_factory.mktemp("index"))


@pytest.fixture
def run(tmp_path):
    """An empty run directory."""
    return Directory(str(tmp_path / "run"))


@pytest.fixture(scope="module")
def bucket():
    """A bucket of a local S3 server, which AWS_ENDPOINT_URL names."""
    from moto.server import ThreadedMotoServer  # not above: it takes a second

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "user")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        name = f"bucket-{uuid.uuid4().hex}"
        store = fs.S3FileSystem(endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True)
        store.create_dir(name)
        yield f"s3://{name}"
    server.stop()


@pytest.fixture
def pace(tmp_path):
    """Seconds per step of a paced run."""
    path = tmp_path / "pace"
    path.write_text("0.5")
    return path


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Weights of a run in one process, by number of steps."""
    from runs import undisturbed_weights  # not above: most tests need no Ray

    return functools.cache(lambda num_steps: undisturbed_weights(tmp_path_factory.mktemp("undisturbed"), num_steps))
