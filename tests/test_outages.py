"""Outages: a run goes on while its storage does not, over real HTTP and on a disk that is really full."""

import json
import os
import random
import threading
import time
import uuid
from itertools import islice
from pathlib import Path

import pytest
from helpers import tiny_config, tiny_index
from outages import UPLOADS, faulty_store, full, small_disk

from raybert import retry, storage
from raybert.history import ATTEMPTS, read_history
from raybert.manifest import CHECKPOINTS, MANIFEST, MODEL, find_checkpoints, find_damage, newest_checkpoint
from raybert.order import SampleOrder
from raybert.preflight import identity
from raybert.storage import Directory
from raybert.telemetry import read_metrics
from raybert.worker import Job, train_worker

NUM_STEPS, EVERY_STEPS = 400, 4  # more than a run makes during an outage
SLOW_S = 0.05


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Fractions of seconds for what takes seconds in earnest."""
    monkeypatch.setattr(retry, "FIRST_S", 0.05)
    monkeypatch.setattr(retry, "LONGEST_S", 0.2)
    monkeypatch.setattr(retry, "BLIP_S", 10.0)
    monkeypatch.setattr(storage, "SILENCE_S", 1.0)
    monkeypatch.setattr(storage, "NUM_TRIES", 1)
    storage._bucket_filesystem.cache_clear()
    yield
    storage._bucket_filesystem.cache_clear()


@pytest.fixture(scope="module")
def store_and_bucket():
    with faulty_store() as (store, bucket):
        yield store, bucket


@pytest.fixture
def store(store_and_bucket):
    yield store_and_bucket[0]
    store_and_bucket[0].end()


@pytest.fixture
def run(store_and_bucket):
    """An empty run directory in the store."""
    return Directory(f"{store_and_bucket[1]}/{uuid.uuid4().hex}")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def index(shards):
    return tiny_index(shards)


class Watched:
    """A run in this process, in a thread of its own; `events` as they come.

    It is slow, and does not come to its end, until the end of the context.
    """

    def __init__(self, run, index, **settings):
        defaults = {"checkpoint.every_steps": EVERY_STEPS, "checkpoint.outage_limit_s": 20.0}
        settings = {"training.num_steps": NUM_STEPS, "training.log_every_steps": 1, **defaults, **settings}
        self.config = tiny_config(run.uri, "shard-*", **settings)
        order = SampleOrder(index.page_sizes, 12345, 32, 4)
        self.run, self.events, self.error = run, [], None
        self.job = Job(self.config, run, order, index, None, identity(self.config), self.tell)
        self.thread, self.may_end = threading.Thread(target=self.train), threading.Event()

    def tell(self, event):
        self.events.append(event)
        if event.kind == "train":
            self.may_end.wait(60 if event.step == self.config.training.num_steps - 1 else SLOW_S)

    def train(self):
        try:
            train_worker(self.job)
        except BaseException as error:
            self.error = error

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.may_end.set()
        self.thread.join()
        if self.error:
            raise self.error

    @property
    def step(self):
        return max((event.step for event in list(self.events) if event.kind == "train"), default=0)

    def texts(self, kind, part=""):
        return [event.text for event in list(self.events) if event.kind == kind and part in event.text]

    def wait_for(self, holds, limit_s=30):
        until_s = time.monotonic() + limit_s
        while not holds():
            assert time.monotonic() < until_s and self.thread.is_alive(), (self.events[-3:], self.error)
            time.sleep(0.02)


def assert_whole(watched, num_steps=NUM_STEPS):
    """The run is at its end, every step stands once in its history, and what looks like a checkpoint is one."""
    run, warnings = watched.run, []
    checkpoint = newest_checkpoint(run, warnings.append)
    assert checkpoint.step == num_steps and warnings == []
    assert [record.step for record in read_history(run, checkpoint.name)] == list(range(num_steps))
    for name in find_checkpoints(run):
        assert not (run / CHECKPOINTS / name).exists(MANIFEST) or find_damage(run, name) is None
    assert [row["step"] for row in read_metrics(run)] == list(range(1, num_steps + 1))


# --- Retries --------------------------------------------------------------------------------------------------------


def test_pauses_double_up_to_a_bound(monkeypatch):
    monkeypatch.undo()
    longest = [min(0.5 * 2**number, 30) for number in range(12)]
    for _ in range(20):
        for pause_s, most_s in zip(retry.pauses(), longest, strict=False):
            assert most_s / 2 <= pause_s <= most_s
    assert all(15 <= pause_s <= 30 for pause_s in islice(retry.pauses(), 2000, 2010))  # hours later


def test_only_errors_of_storage_are_tried_again():
    for error in (OSError("503"), TimeoutError()):
        tries = iter([error, error, 3])

        def action(tries=tries):
            if isinstance(value := next(tries), Exception):
                raise value
            return value

        assert retry.outlast_blip(action) == 3
    for error in (ValueError(), FileNotFoundError(), NotADirectoryError(), PermissionError()):
        tries = iter([error, 3])
        with pytest.raises(type(error)):
            retry.outlast_blip(lambda tries=tries: exec("raise e", {"e": next(tries)}))
        assert next(tries) == 3
    with pytest.raises(OSError, match="lasts"):
        retry.outlast_blip(lambda: exec("raise OSError('lasts')"), limit_s=0.3)


# --- One operation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "part"),
    [("503", "uploads"), ("503", "partNumber=2"), ("503", "POST "), ("cut", "partNumber=2"), ("stall", "partNumber=2")],
)
def test_an_upload_that_fails_says_so(run, store, tmp_path, fault, part):
    """Whichever of its requests it is: the first, one in the middle, or the last."""
    source = tmp_path / "file"
    source.write_bytes(os.urandom(12_000_000))
    store.begin(fault, lambda method, path: part in f"{method} {path}" and (part != "POST " or "uploadId" in path))
    with pytest.raises(OSError, match=r"AWS Error"):
        run.upload("file", source)
    assert store.num_failed
    store.end()
    assert not run.exists("file")
    run.upload("file", source)
    assert run.read("file") == source.read_bytes()


@pytest.mark.parametrize("fault", ["503", "cut", "stall"])
def test_storage_that_is_out_is_never_an_empty_run(run, store, fault):
    """Nor are its answers taken in part."""
    (run / CHECKPOINTS / "step-00000004-attempt-0001").write(MANIFEST, b"{}" * 1000)
    store.begin(fault)
    for ask in (lambda: newest_checkpoint(run, print), lambda: run.exists("x"), lambda: run.read("x")):
        with pytest.raises(OSError) as caught:
            ask()
        assert not isinstance(caught.value, FileNotFoundError)


def test_a_request_without_an_answer_ends(run, store):
    store.begin("stall")
    started_at_s = time.monotonic()
    with pytest.raises(OSError, match="Timeout"):
        run.exists("file")
    assert time.monotonic() - started_at_s < 5


# --- A run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["503", "cut", "stall"])
def test_an_outage_delays_commits_and_nothing_else(run, store, index, fault):
    with Watched(run, index) as watched:
        watched.wait_for(lambda: watched.texts("checkpoint"))
        store.begin(fault)
        watched.wait_for(lambda: watched.texts("warning", "cannot be written"))
        committed, step = len(watched.texts("checkpoint")), watched.step
        watched.wait_for(lambda: watched.step >= step + 3 * EVERY_STEPS)
        assert len(watched.texts("checkpoint")) == committed
        store.end()
        watched.wait_for(lambda: len(watched.texts("checkpoint")) > committed)
    for once in ("cannot be written", "written again"):
        assert len(watched.texts("warning", once)) == 1
    assert_whole(watched)


def test_what_storage_took_in_part_is_no_checkpoint(run, store, index):
    """All but the manifest is there, as after a death at that point; the next attempt passes it over and clears it."""
    store.begin("503", lambda method, path: method in UPLOADS and MANIFEST in path)
    watched = Watched(run, index, **{"training.num_steps": 8, "checkpoint.outage_limit_s": 0.5})
    with pytest.raises(Exception, match="outage_limit_s"), watched:
        pass
    assert any((run / CHECKPOINTS / name).exists(MODEL) for name in find_checkpoints(run))
    assert newest_checkpoint(run, print) is None
    store.end()
    with Watched(run, index, **{"training.num_steps": 8}) as watched:
        pass
    assert_whole(watched, 8)
    assert {name.rpartition("-")[2] for name in find_checkpoints(run)} == {"0002"}


def test_flickering_storage(run, store, index):
    """Every fifth request fails, one way or the other, from the first to the last."""
    rng = random.Random(1)

    def concerns(method, path):
        store.fault = rng.choice(("503", "cut"))
        return rng.random() < 0.2

    store.begin("503", concerns)
    with Watched(run, index, **{"training.num_steps": 24}) as watched:
        pass
    store.end()
    assert_whole(watched, 24)


def test_a_blip_at_the_beginning_is_waited_for(run, store, index):
    with Watched(run, index, **{"training.num_steps": 8}):
        pass
    store.begin("503")
    with Watched(run, index, **{"training.num_steps": 12}) as watched:
        watched.wait_for(lambda: store.num_failed > 3)
        assert not watched.events
        store.end()
    (attempt,) = (event for event in watched.events if event.kind == "attempt")
    assert attempt.step == 8 and (run / ATTEMPTS).names() == ["0001.json", "0002.json"]
    assert_whole(watched, 12)


# --- A full disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", "2m") as disk:
        yield disk


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_full_disk_delays_commits_and_harms_none(disk, index):
    run = Directory(str(disk / "run"))
    with Watched(run, index) as watched:
        watched.wait_for(lambda: watched.texts("checkpoint"))
        with full(disk):
            watched.wait_for(lambda: watched.texts("warning", "cannot be written"))
            kept, step = find_checkpoints(run), watched.step
            watched.wait_for(lambda: watched.step >= step + 2 * EVERY_STEPS)
            intact = [name for name in find_checkpoints(run) if (run / CHECKPOINTS / name).exists(MANIFEST)]
            assert intact and set(intact) <= set(kept)
            assert all(find_damage(run, name) is None for name in intact)
        committed = len(watched.texts("checkpoint"))
        watched.wait_for(lambda: len(watched.texts("checkpoint")) > committed)
    for once in ("No space left", "written again"):
        assert len(watched.texts("warning", once)) == 1
    assert_whole(watched)
    for line in (Path(run.path) / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
