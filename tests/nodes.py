"""A real Ray cluster of several nodes on this machine, and runs of the real command against it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from ray.cluster_utils import Cluster

from raybert.storage import Directory

# More torch threads than cores: those that wait must not spin, or everybody crawls.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

RUN = Path(__file__).parents[1] / "run.py"
PACED = Path(__file__).parent / "paced.py"
NODE = {"num_cpus": 2, "object_store_memory": 150_000_000}  # room for one worker of two CPUs


@contextmanager
def cluster(num_nodes, include_dashboard=False):
    """A head that feeds, with no room for a worker, and nodes with room for one worker each."""
    with tempfile.TemporaryDirectory(prefix="rb", dir="/tmp") as directory:
        head = {"num_cpus": 1, "object_store_memory": 300_000_000, "temp_dir": directory}
        head["include_dashboard"] = include_dashboard
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(num_nodes):
                cluster.add_node(**NODE)
            yield cluster
        finally:
            cluster.shutdown()


@contextmanager
def running(address, *arguments, pace=None):
    """The command `run.py train`, in a process group of its own, against a cluster (None: its own local Ray).

    Steps take at least the seconds that the file `pace` holds.
    """
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_ADDRESS": address} if address else {}
    program = [str(PACED), str(pace)] if pace else [str(RUN)]
    command = [sys.executable, *program, "train", *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
        )
        process.read_output = lambda: (output.seek(0), output.read())[1]
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def drain(cluster, node, deadline_s):
    """Give a node the notice that it will be taken away, and take it away after the deadline."""
    notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "notice"]
    command = ["ray", "drain-node", "--address", cluster.address, "--node-id", node.node_id, *notice]
    command += ["--deadline-remaining-seconds", str(deadline_s)]
    subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *command[1:]], check=True, capture_output=True)
    threading.Timer(deadline_s, cluster.remove_node, (node, False)).start()


def finish(process, timeout_s=300):
    """Wait for the command to succeed; returns what it printed."""
    code = process.wait(timeout_s)
    assert code == 0, process.read_output()
    return process.read_output()


def wait_until(condition, process, timeout_s=120):
    """Wait for a condition while the command runs."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"the run ended early:\n{process.read_output()}"
        assert time.monotonic() < deadline_s, f"timed out:\n{process.read_output()}"
        time.sleep(0.1)


def logged_steps(run_dir):
    """Steps with training metrics, in the order they were logged."""
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [
        row["step"] for row in map(json.loads, filter(lambda line: line.endswith("}"), lines)) if row["kind"] == "train"
    ]


def attempts(run_dir):
    """World size and first step of each attempt."""
    folder = Directory(str(run_dir)) / "attempts"
    rows = [json.loads(folder.read(name)) for name in folder.names() if name.endswith(".json")]
    return [(row["world_size"], row["start_step"]) for row in rows]
