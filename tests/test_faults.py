"""Nothing is lost: faults that are put into real runs on real clusters of several raylets.

Some of them run with all other tests; `pytest -m nightly tests/test_faults.py` puts in each by itself, and
`python tests/faults.py` a long seeded mixture. What each cost, and the machine's load, is printed (`-rP` shows it).
"""

import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from faults import HELPERS, leftovers, raylet, scene, seeded_schedule
from helpers import SAMPLE_FILE, SAMPLE_SCHEMA, build_index
from nodes import attempts, cluster, descendants, finish, is_alive, logged_steps, running, shown_steps, wait_until
from outages import UPLOADS, faulty_store, full, small_disk
from runs import assert_exactly_once, changes, flags, last_weights, relative_distance, undisturbed_weights

from raybert.cli import main
from raybert.history import read_attempts, read_history
from raybert.manifest import newest_checkpoint, place
from raybert.storage import Directory

CHECKPOINT_STEPS = 5  # of runs.SETTINGS
REDONE = CHECKPOINT_STEPS + 1  # the step that a worker died in may be logged
NUM_STEPS = 60  # of two workers
POISONED = Path(__file__).parent / "poisoned.py"
NON_FINITE = "non-finite gradient"


def end(stage, num_steps, index):
    """Let a run come to its end, and hold that nothing is lost or left behind; the world size of every step."""
    stage.pace.write_text("0")
    finish(stage.process)
    assert leftovers(stage.nodes) == []
    return proven(stage.run_dir, num_steps, index)


def proven(run_dir, num_steps, index):
    """Hold that every step is there exactly once, and that `verify` says so; the world size of each."""
    sizes = assert_exactly_once(run_dir, num_steps, index)
    assert main(["verify", str(run_dir)]) == 0
    return sizes


# --- As many workers after it as before: the weights are the same, bitwise ------------------------------------------


@pytest.fixture(scope="module")
def weights_of_two(tmp_path_factory):
    """Weights after two workers that nothing happens to."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    settings = {"training__num_steps": NUM_STEPS, "cluster__num_workers": 2, "cluster__cpus_per_worker": 2}
    with cluster(2) as nodes, running(nodes.address, *flags(run_dir, **settings)) as process:
        finish(process)
    return last_weights(run_dir)


@contextmanager
def two_workers(directory, index, weights, **settings):
    """A scene of exactly two workers, at whose end their weights are the same as ever."""
    with scene(directory, 2, training__num_steps=NUM_STEPS, cluster__num_workers=2, **settings) as stage:
        yield stage
        stage.wait_for_steps(3)
        assert end(stage, NUM_STEPS, index) == [2] * NUM_STEPS
    assert torch.equal(last_weights(stage.run_dir), weights)


@pytest.mark.nightly
def test_without_its_controller_a_run_ends_and_the_same_command_resumes_it(tmp_path, sample_index, weights_of_two):
    with two_workers(tmp_path, sample_index, weights_of_two) as stage:
        assert stage.recover("kill_controller").redone <= REDONE


@pytest.mark.nightly
def test_without_the_head_a_run_ends_and_another_cluster_resumes_it(tmp_path, sample_index, weights_of_two):
    """All of the head's node dies at once but the command, which ends by itself; no worker goes on."""
    with scene(tmp_path, 2, training__num_steps=NUM_STEPS, cluster__num_workers=2) as stage:
        workers = stage.pids()
        for processes in stage.nodes.head_node.all_processes.values():
            for each in processes:
                os.kill(each.process.pid, signal.SIGKILL)
        code = stage.process.wait(180)
        print(code, stage.process.read_output()[-3000:])
        assert code != 0
        until_s = time.monotonic() + 120
        while any(map(is_alive, workers)):
            assert time.monotonic() < until_s
            time.sleep(0.5)
    settings = {"training__num_steps": NUM_STEPS, "cluster__num_workers": 2, "cluster__cpus_per_worker": 2}
    with cluster(2) as nodes, running(nodes.address, *flags(stage.run_dir, **settings)) as process:
        finish(process)
        assert leftovers(nodes) == []
    assert proven(stage.run_dir, NUM_STEPS, sample_index) == [2] * NUM_STEPS
    assert torch.equal(last_weights(stage.run_dir), weights_of_two)


@pytest.mark.nightly
def test_a_flipped_byte_costs_one_more_checkpoint(tmp_path, sample_index, weights_of_two):
    """The run goes on from the checkpoint before it, and is fed from that one's step on."""
    with two_workers(tmp_path, sample_index, weights_of_two) as stage:
        flipped, before = stage.flip_a_byte()
        assert stage.recover("kill_worker", rank=1).redone <= REDONE + CHECKPOINT_STEPS
        newest = read_attempts(Directory(str(stage.run_dir)))[-1]
        assert (newest.checkpoint, newest.start_step) == (before, place(before)[0])
        assert f"{flipped} is damaged (model.safetensors has digest" in stage.process.read_output()


@pytest.mark.nightly
@pytest.mark.parametrize(
    "fault",
    ["kill_worker", "stop_worker", "replace_node", "kill_driver", "kill_during_restore", "kill_during_upload"],
)
def test_at_the_same_world_size_every_fault_is_forgotten(fault, tmp_path, sample_index, weights_of_two):
    settings = {"cluster__hang_timeout_s": 12} if fault == "stop_worker" else {}
    with two_workers(tmp_path, sample_index, weights_of_two, **settings) as stage:
        (pid, *_) = stage.pids()
        assert stage.recover(fault).redone <= REDONE
        said = stage.process.read_output()
        if fault == "stop_worker":
            assert f"warning: rank 0 (process {pid} on " in said and ") is killed and replaced." in said


@pytest.mark.nightly
@pytest.mark.parametrize("title", [*HELPERS, "ray::_AutoscalingCoordinatorActor"])
def test_a_process_beside_the_workers_that_dies_is_forgotten(title, tmp_path, sample_index, weights_of_two):
    """Where it is one that feeds, another attempt begins; then a worker dies, too."""
    with two_workers(tmp_path, sample_index, weights_of_two) as stage:
        reached = logged_steps(stage.run_dir)[-1]
        stage.kill_helper(title)
        wait_until(lambda: logged_steps(stage.run_dir)[-1] >= reached + 20, stage.process)
        assert len(attempts(stage.run_dir)) <= 2
        assert stage.recover("kill_worker").redone <= REDONE


@pytest.mark.nightly
def test_what_ray_keeps_for_itself_may_be_damaged(tmp_path, sample_index, weights_of_two):
    """All that Ray Train has written about the run is cut in half, and the driver dies."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with two_workers(
        tmp_path, sample_index, weights_of_two, environment=os.environ | {"TMPDIR": str(scratch)}
    ) as stage:
        files = [path for path in scratch.glob("raybert-*/**/*") if path.is_file()]
        print("written by Ray Train:", [f"{path.relative_to(scratch)} {path.stat().st_size}" for path in files])
        for path in files:
            os.truncate(path, path.stat().st_size // 2)
        assert stage.recover("kill_driver").redone <= REDONE


@pytest.mark.nightly
def test_a_full_disk_and_then_a_lost_worker_are_forgotten(tmp_path, sample_index, weights_of_two):
    with small_disk(tmp_path / "disk", "64m") as disk:
        run_dir = disk / "run"
        with two_workers(tmp_path, sample_index, weights_of_two, run_dir=run_dir) as stage:
            began = last_step_of_outage(stage, full(disk))
            assert stage.recover("kill_worker").redone <= REDONE
            assert attempts(run_dir)[-1][1] > began


# --- More or fewer workers after it: the weights are the same but for rounding --------------------------------------


def test_notice_to_the_first_ranks_node_and_a_joining_node_cost_no_step(tmp_path, sample_index, undisturbed):
    """2 -> 1 -> 2 workers: every step is trained once, not only once in the history."""
    num_steps = 150
    with scene(tmp_path, 2, training__num_steps=num_steps, cluster__keep_spares="true") as stage:
        assert stage.recover("drain_node", rank=0).redone == 0
        stage.wait_for_steps(6)
        assert stage.recover("join").redone == 0
        stage.wait_for_steps(3)
        assert changes(end(stage, num_steps, sample_index)) == [2, 1, 2]
    assert relative_distance(last_weights(stage.run_dir), undisturbed(num_steps)) <= 1e-5


@pytest.mark.nightly
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("fault", ["kill_node", "drain_node", "kill_two", "flap", "kill_worker"])
def test_on_three_elastic_workers_every_fault_is_forgotten(fault, rank, tmp_path, sample_index, undisturbed):
    with scene(tmp_path, 3, training__num_steps=100) as stage:
        recovery = stage.recover(fault, rank)
        assert recovery.redone <= (0 if fault == "drain_node" else REDONE)
        stage.wait_for_steps(3)
        end(stage, 100, sample_index)
    assert relative_distance(last_weights(stage.run_dir), undisturbed(100)) <= 1e-5


@pytest.mark.nightly
def test_a_node_that_is_told_to_end_costs_no_step_and_leaves(tmp_path, sample_index, undisturbed):
    """1 -> 2 -> 1 workers: the second node is a real `ray start --block`, which SIGTERM gives 25 s."""
    settings = {"training__num_steps": 150, "cluster__num_workers": "1,2"}
    with scene(tmp_path, 1, **settings) as stage:
        assert stage.recover("start_node").redone == 0
        stage.wait_for_steps(6)
        recovery = stage.recover("terminate_node")
        assert (recovery.redone, recovery.world_size) == (0, 1)
        assert recovery.back_s < 25
        wait_until(lambda: stage.started_node.poll() is not None, stage.process, timeout_s=30)
        stage.wait_for_steps(3)
        assert changes(end(stage, 150, sample_index)) == [1, 2, 1]
    assert relative_distance(last_weights(stage.run_dir), undisturbed(150)) <= 1e-5


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [1])
def test_a_seeded_schedule_of_faults_is_forgotten(seed, tmp_path, sample_index, undisturbed):
    schedule = seeded_schedule(seed, num_faults=4, every_steps=40, num_nodes=3)
    print(schedule)
    with scene(tmp_path, 3, training__num_steps=220) as stage:
        assert len(list(stage.play(schedule))) == len(schedule)
        end(stage, 220, sample_index)
    assert relative_distance(last_weights(stage.run_dir), undisturbed(220)) <= 1e-5


# --- Storage --------------------------------------------------------------------------------------------------------


def last_step_of_outage(stage, outage):
    """Let a run make steps through an outage of its storage, and commit again; the step that the outage began at."""

    def said(text):
        return text in stage.process.read_output()

    with outage:
        wait_until(lambda: said("Checkpoints cannot be written"), stage.process)
        began = shown_steps(stage.process)[-1]
        wait_until(lambda: shown_steps(stage.process)[-1] >= began + 2 * CHECKPOINT_STEPS, stage.process)
    wait_until(lambda: said("Checkpoints are written again"), stage.process)
    return began


@pytest.mark.nightly
def test_an_outage_and_then_a_lost_node_are_forgotten(tmp_path, sample_index, undisturbed):
    """The run directory is a bucket, which takes nothing for a while."""
    with faulty_store() as (store, bucket):
        run_dir = f"{bucket}/run"
        with scene(tmp_path, 3, run_dir=run_dir, training__num_steps=100) as stage:
            began = last_step_of_outage(stage, store.outage("503", lambda method, path: method in UPLOADS))
            stage.kill_node(1)
            wait_until(lambda: len(attempts(run_dir)) == 2, stage.process)
            number = len(shown_steps(stage.process))
            wait_until(lambda: len(shown_steps(stage.process)) > number + 3, stage.process)
            sizes = end(stage, 100, sample_index)
            assert changes(sizes) == [3, 2] and attempts(run_dir)[1][1] > began
            assert relative_distance(last_weights(run_dir), undisturbed(100)) <= 1e-5


# --- The index ------------------------------------------------------------------------------------------------------

NUM_COPIES = 300


@pytest.mark.nightly
def test_a_node_that_dies_while_it_indexes_is_forgotten(tmp_path):
    files, run_dir, folder = str(tmp_path / "copies" / "*.tfrecord"), tmp_path / "run", tmp_path / "run" / "index"
    (tmp_path / "copies").mkdir()
    for number in range(NUM_COPIES):
        shutil.copy(SAMPLE_FILE, tmp_path / "copies" / f"{number:03d}.tfrecord")
    settings = {"training__num_steps": 40, "cluster__num_workers": "1,2", "cluster__cpus_per_worker": 2}
    arguments = flags(run_dir, **settings, data__input_files=files)
    with cluster(2) as nodes, running(nodes.address, *arguments) as process:
        doomed = next(iter(nodes.worker_nodes))

        def is_indexing():
            commands = descendants(raylet(doomed)).values()
            return any(folder.glob("*.index")) and any(line.startswith("ray::index_shard") for line in commands)

        wait_until(is_indexing, process)
        nodes.remove_node(doomed, allow_graceful=False)
        num_built = len(list(folder.glob("*.index")))
        assert num_built < NUM_COPIES
        print(f"{num_built} of {NUM_COPIES} files were indexed")
        finish(process)
        assert leftovers(nodes) == []
    assert changes(proven(run_dir, 40, build_index(files, SAMPLE_SCHEMA, tmp_path / "cache"))) == [1]
    weights = undisturbed_weights(tmp_path / "undisturbed", 40, data__input_files=files)
    assert relative_distance(last_weights(run_dir), weights) <= 1e-5


# --- Steps that go wrong --------------------------------------------------------------------------------------------

ROLLED_BACK = f"{NON_FINITE} 3 times in a row from step 17"


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("spikes", "nans", "starts", "skipped"),
    [
        ("", "7", [0], {7: NON_FINITE}),
        ("", "7,17,18,19", [0, 15], {7: NON_FINITE, **dict.fromkeys((17, 18, 19), ROLLED_BACK)}),
        ("8", "", [0, 5], {8: "loss spike at step 8"}),
    ],
    ids=["one NaN", "NaNs in a row", "poison"],
)
def test_steps_that_go_wrong_are_left_out_alike(spikes, nans, starts, skipped, tmp_path, sample_index):
    """On the last of three ranks or on all: as where one process has these steps, and no position shifts."""
    run_dir, num_steps = tmp_path / "run", 30
    guard = {"guard__spike_sigma": 50, "guard__spike_window": 4}
    program = [sys.executable, str(POISONED), spikes, nans, "no gate"]
    settings = {"training__num_steps": num_steps, "cluster__num_workers": 3, "cluster__cpus_per_worker": 2}
    with cluster(3) as nodes, running(nodes.address, *flags(run_dir, **settings, **guard), within=program) as process:
        finish(process)
        assert leftovers(nodes) == []
    assert proven(run_dir, num_steps, sample_index) == [3] * num_steps
    assert attempts(run_dir) == [(3, start) for start in starts]
    run = Directory(str(run_dir))
    history = read_history(run, newest_checkpoint(run, print).name)
    assert {record.step: record.skipped for record in history if record.skipped} == skipped
    weights = undisturbed_weights(tmp_path / "undisturbed", num_steps, program, **guard)
    assert relative_distance(last_weights(run_dir), weights) <= 1e-5
