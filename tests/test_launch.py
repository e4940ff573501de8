"""Laws of a launched run: it ends well, or says why and can be resumed; every step is trained exactly once."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from helpers import tiny_config, write_samples
from nodes import descendants, is_alive, own_dashboard
from ray.cluster_utils import Cluster
from ray.exceptions import RayActorError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from raybert.cli import main
from raybert.config_file import config_to_yaml
from raybert.errors import UserError
from raybert.failures import ALIKE_LIMIT, STUCK_LIMIT, StopRetrying
from raybert.history import begin_attempt, read_attempts, read_history
from raybert.storage import Directory
from raybert.worker import check_shared

ROOT = Path(__file__).parents[1]
BATCH_SIZE = 32
OUR_LINES = re.compile(
    r"indexing |attempt \d+: |step \d+/|held-out at step |Held-out |checkpoint step-|Checkpoint: |Report: |"
    r"Open it with |  from transformers import |warning: |Interrupted; |Goodput |  the rest: "
)


@pytest.fixture
def config_file(tmp_path):
    """Writes the configuration of a tiny run, and its data, and gives the file's path."""

    def write(**overrides):
        write_samples(tmp_path / "samples.tfrecord", 500, seed=1)
        config = tiny_config(tmp_path / "run", tmp_path / "samples.tfrecord", **overrides)
        (tmp_path / "config.yaml").write_text(config_to_yaml(config))
        return str(tmp_path / "config.yaml")

    return write


@pytest.fixture
def run(tmp_path):
    return Directory(str(tmp_path / "run"))


def check_history(run, num_steps):
    """Every position was trained on once, in order, in the history that ends in the newest checkpoint."""
    newest = (run / "checkpoints").names()[-1]
    records = read_history(run, newest)
    assert [record.step for record in records] == list(range(num_steps))
    slices = [arrival for record in records for arrival in record.arrivals]
    assert [arrival.first for arrival in slices] == [0, *(arrival.stop for arrival in slices[:-1])]
    assert slices[-1].stop == num_steps * BATCH_SIZE


def contents(run):
    return {path: path.stat().st_mtime_ns for path in Path(run.path).rglob("*")}


# In one process


def test_finished_run_is_left_alone_and_an_extended_one_goes_on(config_file, run, capsys):
    argv = ["train", "--config", config_file()]
    assert main(argv) == 0
    check_history(run, 8)
    before = contents(run)
    capsys.readouterr()
    assert main(argv) == 0
    assert f"The run in {run.path} is complete: step 8 of 8." in capsys.readouterr().out
    assert contents(run) == before
    assert main([*argv, "--training.num_steps", "11"]) == 0
    assert "attempt 2: 1 worker, from step 8" in capsys.readouterr().out
    check_history(run, 11)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_in_one_process_is_resumed(config_file, run, tmp_path, number):
    path = config_file(**{"training.num_steps": 3000, "training.log_every_steps": 1, "checkpoint.every_steps": 5})
    process = start(tmp_path, "--config", path)
    wait_for(process, "checkpoint step-")
    process.send_signal(number)
    said, _ = finish(process)
    assert process.returncode == 128 + number
    assert f"Interrupted; the same command resumes the run in {run.path}." in said
    flags = ["--training.num_steps=200", "--training.log_every_steps=50", "--checkpoint.every_steps=50"]
    assert main(["train", "--config", path, *flags]) == 0
    assert read_attempts(run)[1].start_step >= 5
    check_history(run, 200)


FAULTY = """
import sys
from raybert import cli, launch

def explode_at_step_3():
    from raybert import loop
    train_step = loop.train_step

    def explode(state, *arguments):
        if state.step == 3:
            raise RuntimeError("boom")
        return train_step(state, *arguments)

    loop.train_step = explode

def faulty(train):
    def run(job):
        explode_at_step_3()
        train(job)
    return run

launch.train_worker, launch.train_ray_worker = faulty(launch.train_worker), faulty(launch.train_ray_worker)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def faulty(tmp_path):
    """The command, with a defect at step 3."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    return tmp_path / "faulty.py"


def test_defect_keeps_its_traceback_and_exits_with_70(config_file, tmp_path, faulty):
    process = start(tmp_path, "--config", config_file(), command=faulty)
    _, errors = finish(process)
    assert process.returncode == 70
    assert "Traceback" in errors
    assert 'raise RuntimeError("boom")' in errors
    assert "raybert: error:" not in errors


# On a Ray of its own


def start(tmp_path, *argv, command=ROOT / "run.py", **environment):
    """The command in a process group of its own; its errors go to a file."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
    known |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with (tmp_path / "stderr").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(command), "train", *argv],
            env=known | environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    process.errors = tmp_path / "stderr"
    process.said = ""
    return process


def wait_for(process, text):
    """Read what the process says until a line has the text."""
    for line in process.stdout:
        process.said += line
        if text in line:
            return
    pytest.fail(f"{text!r} was not said, but:\n{process.said}\n{process.errors.read_text()}")


def finish(process):
    """All that the process says, and its errors."""
    rest, _ = process.communicate(timeout=150)
    return process.said + rest, process.errors.read_text()


def check_gone(processes):
    """The processes end within seconds."""
    until_s = time.monotonic() + 15
    while time.monotonic() < until_s and any(map(is_alive, processes)):
        time.sleep(0.2)
    assert {pid: command for pid, command in processes.items() if is_alive(pid)} == {}


@pytest.fixture
def ray_tmpdir():
    """Ray's directory on this machine, with the record of a cluster that is gone; a socket's path must be short."""
    with tempfile.TemporaryDirectory(prefix="rb-", dir="/tmp", ignore_cleanup_errors=True) as path:
        (Path(path) / "ray").mkdir()
        (Path(path) / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
        yield path


def test_interrupted_run_on_ray_leaves_no_process_and_is_resumed(config_file, run, tmp_path, ray_tmpdir):
    overrides = {"training.num_steps": 400, "training.log_every_steps": 10, "checkpoint.every_steps": 20}
    argv = ["--config", config_file(**overrides | {"cluster.num_workers": 2})]
    home = f"{argv[1]}/home"  # below a file: nothing can be written there

    process = start(tmp_path, *argv, RAY_TMPDIR=ray_tmpdir, HOME=home)
    wait_for(process, "checkpoint step-")
    processes = descendants(process.pid)
    assert len(processes) > 5
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, errors = finish(process)
    assert process.returncode == 130
    assert f"Interrupted; the same command resumes the run in {run.path}." in said
    assert errors == ""
    check_gone(processes)

    process = start(tmp_path, *argv, RAY_TMPDIR=ray_tmpdir, HOME=home)
    said, errors = finish(process)
    assert process.returncode == 0
    assert errors == ""
    assert [line for line in said.splitlines() if not OUR_LINES.match(line)] == []
    starts = [attempt.start_step for attempt in read_attempts(run)]
    assert 0 == starts[0] < starts[1]
    check_history(run, 400)


# On a cluster that goes on


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, **own_dashboard()})
    yield cluster
    cluster.shutdown()


def test_termination_stops_the_training_on_a_cluster(config_file, tmp_path, cluster):
    overrides = {"training.num_steps": 100_000, "checkpoint.every_steps": 20, "cluster.num_workers": 2}
    process = start(tmp_path, "--config", config_file(**overrides), "-v", RAY_ADDRESS=cluster.address)
    wait_for(process, "checkpoint step-")
    workers = {pid: command for pid, command in descendants(os.getpid()).items() if "::RayTrain" in command}
    assert len(workers) >= 2
    process.send_signal(signal.SIGTERM)
    said, errors = finish(process)
    assert process.returncode == 143
    assert "Interrupted; " in said
    assert "(TrainController pid=" in said + errors  # -v shows Ray's logs
    check_gone(workers)


def test_user_error_in_a_worker_ends_the_run_at_once(config_file, run, tmp_path, cluster):
    overrides = {"training.num_steps": 20_000, "cluster.num_workers": 2}
    process = start(tmp_path, "--config", config_file(**overrides), RAY_ADDRESS=cluster.address)
    wait_for(process, "attempt 1: 2 workers")
    samples = tmp_path / "samples.tfrecord"
    os.truncate(samples, samples.stat().st_size // 2)
    _, errors = finish(process)
    assert process.returncode == 1
    assert errors.startswith(f"raybert: error: {samples}: records ")
    assert "not what they were when the file was indexed; restore the file" in errors
    assert "Traceback" not in errors
    assert len(read_attempts(run)) == 1


def test_crash_loop_ends_the_run_with_its_reason(config_file, run, tmp_path, cluster, faulty):
    path = config_file(**{"cluster.num_workers": 2})
    process = start(tmp_path, "--config", path, command=faulty, RAY_ADDRESS=cluster.address)
    said, errors = finish(process)
    assert process.returncode == 1
    assert errors.startswith("raybert: error: The run failed 3 times alike, at step 3 with RuntimeError: boom. ")
    assert f"the same command resumes the run in {run.path}" in errors
    assert 'raise RuntimeError("boom")' in errors
    assert said.count("warning: attempt failed, at step 3 with RuntimeError: boom;") == ALIKE_LIMIT - 1
    assert [attempt.start_step for attempt in read_attempts(run)] == [0] * ALIKE_LIMIT


def test_a_node_with_another_run_directory_is_refused(run):
    begin_attempt(run, 2, 0, None)
    check_shared(run, 1, timeout_s=0)
    with pytest.raises(UserError, match=r"run_dir: node .* has another .*run than the driver; give a directory"):
        check_shared(run, 2, timeout_s=0)


# Whether a failure is worth another attempt


@pytest.fixture
def stopper(run):
    begin_attempt(run, 2, 0, None)
    return StopRetrying(run, lambda event: None)


def raised(text, step=3):
    error = RuntimeError(text)
    error.add_note(f"at step {step}")
    error.add_note(f"Traceback of {text}")
    return error


def died():
    return WorkerHealthCheckFailedError("A worker health check failed.", RayActorError())


def fail(stopper, *errors):
    stopper.after_exception(None, dict(enumerate(errors)))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda error: error,
        lambda error: RayTaskError("f", "Traceback", error),
        lambda error: RayTaskError("f", "Traceback", RayTaskError("g", "Traceback", error)),
    ],
)
def test_our_own_error_is_never_retried(stopper, wrap):
    with pytest.raises(UserError, match=r"^restore the file$"):
        fail(stopper, raised("collateral"), wrap(UserError("restore the file")))


def test_one_error_at_one_step_is_retried_twice(stopper):
    for _ in range(ALIKE_LIMIT - 1):
        fail(stopper, raised("boom"))
    with pytest.raises(UserError, match=r"3 times alike, at step 3 with RuntimeError: boom[^\n]*\nTraceback of boom"):
        fail(stopper, raised("boom"))


def test_error_without_a_step_is_retried_twice(stopper):
    for _ in range(ALIKE_LIMIT - 1):
        fail(stopper, ValueError("no room"))
    with pytest.raises(UserError, match="3 times alike, ValueError: no room"):
        fail(stopper, ValueError("no room"))


@pytest.mark.parametrize(
    "errors",
    [
        [(raised("boom", step),) for step in range(3, 3 + STUCK_LIMIT)],
        [(raised(f"boom {number}"),) for number in range(STUCK_LIMIT)],
        [(raised("connection reset"), died())] * STUCK_LIMIT,
        [(died(),), (raised("a"),), (raised("a"),)] * 3 + [(died(),)],
    ],
    ids=["other steps", "other errors", "dead workers", "mixed"],
)
def test_failures_without_progress_are_retried_nine_times(stopper, errors):
    for several in errors[:-1]:
        fail(stopper, *several)
    with pytest.raises(UserError, match="10 times without a new checkpoint, at last"):
        fail(stopper, *errors[-1])


@pytest.mark.parametrize("errors", [(raised("boom"),), (died(),)], ids=["raised", "died"])
def test_progress_starts_the_count_again(stopper, run, errors):
    for attempt in range(2 * STUCK_LIMIT):
        begin_attempt(run, 2, attempt, f"step-{attempt}")
        fail(stopper, *errors)
