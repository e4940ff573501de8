"""Ray's real autoscaler (v2) under a run: nodes of the local provider come from none, one is taken away, all go."""

import signal
import time
from contextlib import contextmanager

import pytest
import yaml
from nodes import attempts, descendants, finish, ray_head, running, wait_for_steps, wait_until
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from runs import assert_exactly_once, flags, last_weights, relative_distance

MAX_NODES = 3
IDLE_S = 6
VARIABLES = {
    "RAY_enable_autoscaler_v2": "1",
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
}


def write_config(head, max_workers):
    """The autoscaler's file, which it reads again at every look."""
    node = {"resources": {"CPU": 2, "object_store_memory": 150_000_000}, "node_config": {}, "min_workers": 0}
    config = {
        "cluster_name": "rb",
        "max_workers": max_workers,
        "idle_timeout_minutes": IDLE_S / 60,
        "upscaling_speed": 100,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": head.address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,  # nothing is to be installed
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "worker": node | {"max_workers": max_workers},
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
    }
    path = head.directory / "autoscaling.yaml"
    aside = path.with_suffix(".new")
    aside.write_text(yaml.safe_dump(config))
    aside.rename(path)
    return path


def prepare(head):
    head.arguments.append(f"--autoscaling-config={write_config(head, MAX_NODES)}")
    head.environment |= VARIABLES


@pytest.fixture(scope="module")
def head():
    with ray_head(1, prepare) as head:
        yield head


def num_nodes(head):
    """Nodes that the autoscaler has started and not yet taken away."""
    return sum(command.split("\0")[0].endswith("/raylet") for command in descendants(head.pid).values()) - 1


def assert_no_node_is_left(head):
    """Not much longer than nodes may be idle; a request that nobody gives up expires after 180 s."""
    deadline_s = time.monotonic() + IDLE_S + 60
    while num_nodes(head):
        assert time.monotonic() < deadline_s, f"{num_nodes(head)} nodes are left"
        time.sleep(0.5)


@contextmanager
def run_of_two(head, run_dir, num_steps, pace):
    settings = {"training__num_steps": num_steps, "cluster__num_workers": "1,2", "cluster__cpus_per_worker": 2}
    with running(head.address, *flags(run_dir, **settings), pace=pace, environment=head.environment) as process:
        yield process


def test_nodes_come_from_none_one_is_taken_away_and_all_go(head, tmp_path, pace, sample_index, undisturbed):
    """As many nodes as the run asks for, though there may be more; the one taken away is replaced, and trained on."""
    num_steps, run_dir = 200, tmp_path / "run"
    assert num_nodes(head) == 0
    with run_of_two(head, run_dir, num_steps, pace) as process:
        wait_for_steps(run_dir, 2, 12, process)
        assert num_nodes(head) == 2
        number = len(attempts(run_dir))
        write_config(head, 1)
        wait_until(lambda: num_nodes(head) == 1, process)
        write_config(head, MAX_NODES)  # at once: for a request that the file does not allow whole, Ray keeps no node
        wait_until(lambda: len(attempts(run_dir)) > number, process, timeout_s=300)
        wait_for_steps(run_dir, 2, 6, process)
        assert num_nodes(head) == 2
        pace.write_text("0")
        finish(process)
    assert_no_node_is_left(head)
    sizes = assert_exactly_once(run_dir, num_steps, sample_index)
    assert sizes[0] == sizes[-1] == 2
    assert relative_distance(last_weights(run_dir), undisturbed(num_steps)) <= 1e-5


def test_no_node_is_left_by_an_interrupted_run(head, tmp_path, pace):
    run_dir = tmp_path / "run"
    with run_of_two(head, run_dir, 1000, pace) as process:
        wait_for_steps(run_dir, 2, 1, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(180) == 128 + signal.SIGINT
    assert_no_node_is_left(head)
