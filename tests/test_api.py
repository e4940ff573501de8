"""raybert from Python: a run in ten lines, and a callable that hears its events and cannot harm it."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from io import StringIO
from pathlib import Path

import pytest
from helpers import tiny_config, write_samples
from rich.console import Console

import raybert
from raybert.config_file import config_to_yaml
from raybert.display import Display
from raybert.events import Event
from raybert.listener import Listeners
from raybert.manifest import newest_checkpoint
from raybert.storage import Directory

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path):
    path = write_samples(tmp_path / "samples.tfrecord", 500, seed=1)

    def make(**overrides):
        return tiny_config(tmp_path / "run", path, **overrides)

    return make


# Configurations


def test_overrides_are_laid_over_a_configuration():
    config = raybert.load_config("sample", run_dir="runs/x", training={"num_steps": 7}, **{"cluster.num_workers": 0})
    sample = raybert.load_config("sample")
    assert (config.run_dir, config.training.num_steps, config.cluster.num_workers) == ("runs/x", 7, 0)
    assert config.training.global_batch_size == sample.training.global_batch_size
    assert raybert.load_config() == raybert.Config()


REFUSED = [
    (
        {"training": {"num_stepz": 1}},
        r"load_config: unknown setting training.num_stepz; did you mean training.num_steps\?",
    ),
    ({"trainin": {"num_steps": 1}}, r"load_config: unknown setting trainin; did you mean training\?"),
    ({"training": 5}, "load_config: training is a section; give a mapping of its fields, got 5"),
    ({"training": {"num_steps": "many"}}, "load_config: training.num_steps must be int, got 'many'"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_a_wrong_override_is_refused_with_its_place(overrides, message):
    with pytest.raises(raybert.UserError, match=message):
        raybert.load_config("sample", **overrides)


def test_importing_raybert_imports_neither_torch_nor_ray_nor_numpy():
    code = "import sys, raybert; print(sorted({'torch', 'ray', 'numpy'} & set(sys.modules)), raybert.train.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[] train\n"


# Runs


def test_on_log_hears_all_that_is_shown_in_order_and_the_end(config, capsys):
    heard, threads = [], set()

    def on_log(event):
        heard.append(event)
        threads.add(threading.current_thread())

    checkpoint = raybert.train(config(), on_log)
    assert Path(checkpoint, "model.safetensors").exists() and checkpoint.endswith("step-00000008-attempt-0001")
    kinds = [event.kind for event in heard if event.kind != "checkpoint"]  # which are written behind the steps
    assert kinds == ["attempt", "train", "train", "train", "train", "end"]
    assert [event.step for event in heard if event.kind == "train"] == [2, 4, 6, 8]
    assert [event.step for event in heard if event.kind == "checkpoint"] == [4, 8]
    assert heard[-1].text == "finished" and threads.isdisjoint({threading.main_thread()}) and len(threads) == 1
    losses = [event.metrics["training_loss"] for event in heard if event.kind == "train"]
    shown = capsys.readouterr().out
    assert all(f"loss {loss:.3f}" in shown for loss in losses)


IN_TEN_LINES = """
import raybert

config = raybert.load_config({config!r})
losses = []

def on_log(event):
    if event.kind == "train":
        losses.append((event.step, event.metrics["world_size"]))

checkpoint = raybert.train(config, on_log)
print(losses, checkpoint.rpartition("/")[2])
"""


def test_on_log_hears_a_run_on_workers(config, tmp_path):
    (tmp_path / "config.yaml").write_text(config_to_yaml(config(**{"cluster.num_workers": 2})))
    script = IN_TEN_LINES.format(config=str(tmp_path / "config.yaml"))
    known = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with tempfile.TemporaryDirectory(prefix="rb", dir="/tmp", ignore_cleanup_errors=True) as directory:
        known |= {"RAY_TMPDIR": directory, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=known, cwd=tmp_path)
    expected = f"{[(step, 2) for step in (2, 4, 6, 8)]} step-00000008-attempt-0001"
    assert done.stdout.splitlines()[-1:] == [expected], done.stderr


def test_an_error_of_on_log_is_warned_of_once_and_ends_nothing(config, capsys):
    heard = []

    def on_log(event):
        heard.append(event)
        raise ValueError(f"no {event.kind}")

    raybert.train(config(), on_log)
    shown = capsys.readouterr().out
    assert f"warning: on_log failed with ValueError: no attempt ({__file__}, line " in shown
    assert shown.count("on_log failed") == 1 and heard[-1].kind == "end" and len(heard) > 6


def test_a_slow_on_log_does_not_slow_the_run(config):
    times = []

    def on_log(event):
        times.append((event.kind, time.monotonic()))
        time.sleep(0.3)

    started_at_s = time.monotonic()
    raybert.train(config(), on_log)
    # All events are heard, though the steps were over long before.
    assert times[-1][0] == "end" and times[-1][1] - started_at_s > 0.3 * (len(times) - 1)


def test_on_log_interrupts_a_run_as_ctrl_c_does_and_the_same_call_resumes_it(config, capsys):
    heard = []

    def on_log(event):
        heard.append(event)
        if event.kind == "checkpoint":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        raybert.train(config(**{"training.num_steps": 100_000}), on_log)
    assert "Interrupted; the same command resumes the run" in capsys.readouterr().out
    assert heard[-1] == Event("end", text="interrupted")
    num_steps = newest_checkpoint(Directory(config().run_dir), print).step + 8
    raybert.train(config(**{"training.num_steps": num_steps}))
    assert "attempt 2: 1 worker, from step " in capsys.readouterr().out


def test_a_failure_is_one_event():
    heard = []
    display = Display(10, Console(file=StringIO()))
    display.hand_on(heard.append)
    display.show(Event("failure", 3, "a worker died"))
    display.warn("late")
    assert [event.kind for event in heard] == ["failure", "warning"]


def test_a_user_error_reaches_the_caller_and_on_log(config, tmp_path):
    heard = []
    (tmp_path / "samples.tfrecord").write_bytes(b"no records")
    with pytest.raises(raybert.UserError, match="bad records") as caught:
        raybert.train(config(), heard.append)
    assert heard[-1] == Event("end", text=str(caught.value))


# Listeners


def test_one_listener_that_hangs_is_left_behind_and_the_others_hear_all(monkeypatch):
    monkeypatch.setattr("raybert.listener.PATIENCE_S", 0.2)
    warnings, heard, free = [], [], threading.Event()
    with Listeners(warnings.append) as listeners:
        listeners.add(lambda event: free.wait(), "the slow one")
        listeners.add(heard.append, "the other")
        for step in range(5):
            listeners.hear(Event("train", step))
    free.set()
    assert [event.step for event in heard[:-1]] == list(range(5)) and heard[-1].text == "finished"
    assert warnings == ["the slow one does not come to an end: 6 events are left out."]
