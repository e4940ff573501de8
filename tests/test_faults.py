"""Nothing is lost: faults that are put into real runs on real clusters of several raylets.

One of them runs with all other tests; `pytest -m nightly tests/test_faults.py` puts in each by itself, and
`python tests/faults.py` a long seeded mixture.
"""

import pytest
import torch
from faults import leftovers, scene
from nodes import cluster, finish, running
from runs import assert_exactly_once, changes, flags, last_weights, relative_distance

CHECKPOINT_STEPS = 5  # of runs.SETTINGS


def test_notice_to_the_first_ranks_node_and_a_joining_node_cost_no_step(tmp_path, sample_index, undisturbed):
    """2 -> 1 -> 2 workers: every step is trained once, not only once in the history."""
    num_steps = 150
    with scene(tmp_path, 2, training__num_steps=num_steps) as stage:
        assert stage.recover("drain_node", rank=0).redone == 0
        stage.wait_for_steps(6)
        assert stage.recover("join").redone == 0
        stage.wait_for_steps(3)
        stage.pace.write_text("0")
        finish(stage.process)
        assert leftovers(stage.nodes) == []
    assert changes(assert_exactly_once(stage.run_dir, num_steps, sample_index)) == [2, 1, 2]
    assert relative_distance(last_weights(stage.run_dir), undisturbed(num_steps)) <= 1e-5


@pytest.fixture(scope="module")
def weights_of_two(tmp_path_factory):
    """Weights after 60 steps of two workers that nothing happens to."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    settings = {"training__num_steps": 60, "cluster__num_workers": 2, "cluster__cpus_per_worker": 2}
    with cluster(2) as nodes, running(nodes.address, *flags(run_dir, **settings)) as process:
        finish(process)
    return last_weights(run_dir)


def check_at_two(directory, fault, sample_index, weights_of_two):
    """Two workers before and after: at most a checkpoint interval is trained again, and the weights are the same."""
    with scene(directory, 2, training__num_steps=60, cluster__num_workers=2) as stage:
        recovery = stage.recover(fault)
        assert recovery.redone <= CHECKPOINT_STEPS + 1  # the step that a worker died in may be logged
        stage.wait_for_steps(3)
        stage.pace.write_text("0")
        finish(stage.process)
        assert leftovers(stage.nodes) == []
    assert assert_exactly_once(stage.run_dir, 60, sample_index) == [2] * 60
    assert torch.equal(last_weights(stage.run_dir), weights_of_two)


@pytest.mark.nightly
@pytest.mark.parametrize("fault", ["kill_worker", "replace_node", "kill_during_restore", "kill_during_upload"])
def test_at_the_same_world_size_every_fault_is_forgotten(fault, tmp_path, sample_index, weights_of_two):
    check_at_two(tmp_path, fault, sample_index, weights_of_two)


@pytest.mark.nightly
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("fault", ["kill_node", "drain_node", "kill_two", "flap", "kill_worker"])
def test_on_three_elastic_workers_every_fault_is_forgotten(fault, rank, tmp_path, sample_index, undisturbed):
    with scene(tmp_path, 3, training__num_steps=100) as stage:
        recovery = stage.recover(fault, rank)
        assert recovery.redone <= (0 if fault == "drain_node" else CHECKPOINT_STEPS + 1)
        stage.wait_for_steps(3)
        stage.pace.write_text("0")
        finish(stage.process)
        assert leftovers(stage.nodes) == []
    assert_exactly_once(stage.run_dir, 100, sample_index)
    assert relative_distance(last_weights(stage.run_dir), undisturbed(100)) <= 1e-5
