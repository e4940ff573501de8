"""Elasticity and exactness through a real TorchTrainer on real clusters: several raylets, real kills, real files."""

import os
import signal

import pytest
import torch
from nodes import NODE, attempts, cluster, finish, logged_steps, running, wait_until
from runs import assert_exactly_once, changes, flags, last_weights, relative_distance


def test_a_node_dies_and_one_joins(tmp_path, pace, sample_index, undisturbed):
    """3 -> 2 -> 3 workers: every position once, and the weights of an undisturbed run."""
    num_steps, run_dir = 150, tmp_path / "run"
    settings = {"training__num_steps": num_steps, "cluster__num_workers": "1,3", "cluster__cpus_per_worker": 2}
    with cluster(3) as nodes, running(nodes.address, *flags(run_dir, **settings), pace=pace) as process:
        wait_until(lambda: logged_steps(run_dir)[-1:] >= [12], process)
        nodes.remove_node(nodes.list_all_nodes()[-1], allow_graceful=False)
        wait_until(lambda: attempts(run_dir)[-1][0] == 2, process)
        wait_until(lambda: logged_steps(run_dir)[-1] >= attempts(run_dir)[-1][1] + 6, process)
        nodes.add_node(**NODE)
        wait_until(lambda: attempts(run_dir)[-1][0] == 3, process)
        pace.write_text("0")
        finish(process)
    assert changes(assert_exactly_once(run_dir, num_steps, sample_index)) == [3, 2, 3]
    assert relative_distance(last_weights(run_dir), undisturbed(num_steps)) <= 1e-5


@pytest.fixture(scope="module")
def two_nodes():
    with cluster(2) as nodes:
        yield nodes


def test_seven_workers_share_a_batch_of_32(tmp_path, sample_index, undisturbed):
    """Slices of 4 and 5 samples: every position once, and the weights of one process."""
    settings = {"training__num_steps": 20, "cluster__num_workers": 7}
    with running(None, *flags(tmp_path, **settings)) as process:
        finish(process)
    assert assert_exactly_once(tmp_path, 20, sample_index) == [7] * 20
    assert relative_distance(last_weights(tmp_path), undisturbed(20)) <= 1e-5


def test_a_killed_run_equals_an_uninterrupted_one_at_two_workers(tmp_path, pace, sample_index, two_nodes):
    """Bitwise, with dropout, through Ray: the driver is killed, and the same command goes on."""
    settings = {
        "training__num_steps": 40,
        "cluster__num_workers": 2,
        "cluster__cpus_per_worker": 2,
        "model__hidden_dropout_prob": 0.1,
        "model__attention_probs_dropout_prob": 0.1,
    }
    with running(two_nodes.address, *flags(tmp_path / "whole", **settings)) as process:
        finish(process)
    killed = flags(tmp_path / "killed", **settings)
    with running(two_nodes.address, *killed, pace=pace) as process:
        wait_until(lambda: logged_steps(tmp_path / "killed")[-1:] >= [13], process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with running(two_nodes.address, *killed) as process:
        finish(process)
    starts = attempts(tmp_path / "killed")
    assert [size for size, _ in starts] == [2, 2]
    assert 0 < starts[1][1] < 40
    assert assert_exactly_once(tmp_path / "killed", 40, sample_index) == [2] * 40
    assert torch.equal(last_weights(tmp_path / "killed"), last_weights(tmp_path / "whole"))
