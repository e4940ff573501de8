"""A real Ray cluster of several nodes on this machine, and runs of the real command against it."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from ray._private.utils import get_ray_address_file
from ray.cluster_utils import Cluster
from ray.util import get_node_ip_address

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
        head |= {"include_dashboard": include_dashboard, **own_dashboard()}
        # Ray notes the cluster there, and fails where no Ray has ever run.
        Path(get_ray_address_file(None)).parent.mkdir(parents=True, exist_ok=True)
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(num_nodes):
                cluster.add_node(**NODE)
            yield cluster
        finally:
            cluster.shutdown()


def free_ports(number):
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def own_dashboard():
    """A head's argument: another's default port in use makes Ray leak a socket, even without a dashboard."""
    return {"dashboard_port": free_ports(1)[0]}


def answers(place):
    """Whether somebody listens at host:port."""
    host, port = place.split(":")
    with suppress(OSError):
        socket.create_connection((host, int(port)), 1).close()
        return True
    return False


class Head:
    """A head as a user starts it with `ray start`, closed by a token."""

    def __init__(self, directory, num_cpus):
        port, dashboard_port, agent_port, client_port = free_ports(4)
        self.directory, self.address = Path(directory), f"{get_node_ip_address()}:{port}"
        self.dashboard, self.agent = f"127.0.0.1:{dashboard_port}", f"{get_node_ip_address()}:{agent_port}"
        token = self.directory / "token"
        token.write_text(secrets.token_hex(32))
        known = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
        known["PATH"] = f"{Path(sys.executable).parent}:{known['PATH']}"  # a job's `python` is this one
        self.open_environment = known | {"RAY_API_SERVER_ADDRESS": f"http://{self.dashboard}"}
        self.environment = self.open_environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.arguments = ["start", "--head", "--block", f"--port={port}", f"--num-cpus={num_cpus}"]
        self.arguments += [f"--dashboard-port={dashboard_port}", f"--ray-client-server-port={client_port}"]
        self.arguments += [f"--dashboard-agent-listen-port={agent_port}", f"--temp-dir={directory}/ray"]
        self.arguments += ["--object-store-memory=300000000"]

    def ray(self, *arguments, environment=None):
        """A `ray` command against this head, that has ended."""
        command = [sys.executable, "-m", "ray.scripts.scripts", *map(str, arguments)]
        return subprocess.run(
            command, env=environment or self.environment, cwd=self.directory, capture_output=True, text=True
        )


@contextmanager
def ray_head(num_cpus, prepare=lambda head: None):
    """A head of its own, whose dashboard answers; `prepare` may add to its arguments and variables before it starts."""
    with tempfile.TemporaryDirectory(prefix="rb", dir="/tmp", ignore_cleanup_errors=True) as directory:
        head = Head(directory, num_cpus)
        prepare(head)
        command = [sys.executable, "-m", "ray.scripts.scripts", *head.arguments]
        with (head.directory / "log").open("w") as log:
            process = subprocess.Popen(
                command, env=head.environment, stdout=log, stderr=log, cwd=directory, start_new_session=True
            )
        try:
            deadline_s = time.monotonic() + 60
            while not (answers(head.dashboard) and answers(head.agent)):
                time.sleep(0.2)
                assert process.poll() is None and time.monotonic() < deadline_s, (head.directory / "log").read_text()
            head.pid = process.pid
            yield head
        finally:
            end_all(process)


def end_all(process):
    """End a process and all that it has started."""
    for pid in (process.pid, *descendants(process.pid)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


@contextmanager
def ray_node(address, drain_s=25):
    """A worker node as a user starts it with `ray start --block`; after SIGTERM it has so many seconds left."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
    known["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = str(drain_s)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={address}"]
    command += [f"--num-cpus={NODE['num_cpus']}", f"--object-store-memory={NODE['object_store_memory']}"]
    command += [f"--dashboard-agent-listen-port={free_ports(1)[0]}"]
    with tempfile.TemporaryDirectory(prefix="rb", dir="/tmp", ignore_cleanup_errors=True) as directory:
        with (Path(directory) / "log").open("w") as log:
            process = subprocess.Popen(
                [*command, f"--temp-dir={directory}/ray"], env=known, stdout=log, stderr=log, start_new_session=True
            )
        try:
            yield process
        finally:
            end_all(process)


@contextmanager
def running(address, *arguments, pace=None, environment=None, within=()):
    """The command `run.py train`, in a process group of its own, against a cluster (None: its own local Ray).

    Steps take at least the seconds that the file `pace` holds; `within` is a command that runs the command.
    """
    known = os.environ if environment is None else environment
    environment = {name: value for name, value in known.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_ADDRESS": address} if address else {}
    program = [str(PACED), str(pace)] if pace else [str(RUN)]
    command = [*within, sys.executable, *program, "train", *map(str, arguments)]
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


def descendants(pid):
    """Processes that a process has started, or that those have: pid to command line."""
    parents, commands = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            commands[int(entry.name)] = (entry / "cmdline").read_text()
            parents[int(entry.name)] = int(parent) if state != "Z" else 0
    found = [pid]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return {process: commands[process] for process in found[1:]}


def is_alive(pid):
    """Whether a process has not ended yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def drain(cluster, node, deadline_s):
    """Give a node the notice that it will be taken away, and take it away after the deadline."""
    notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "notice"]
    command = ["ray", "drain-node", "--address", cluster.address, "--node-id", node.node_id, *notice]
    command += ["--deadline-remaining-seconds", str(deadline_s)]
    subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *command[1:]], check=True, capture_output=True)

    def take_away():
        if node in cluster.worker_nodes:  # the test may be over
            cluster.remove_node(node, allow_graceful=False)

    timer = threading.Timer(deadline_s, take_away)
    timer.daemon = True
    timer.start()


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


def shown_steps(process):
    """Steps that the command has shown, in order; of a run whose directory cannot be read, all that is known."""
    return [int(line.split("/")[0][5:]) for line in process.read_output().splitlines() if line.startswith("step ")]


def attempts(run_dir):
    """World size and first step of each attempt."""
    folder = Directory(str(run_dir)) / "attempts"
    rows = [json.loads(folder.read(name)) for name in folder.names() if name.endswith(".json")]
    return [(row["world_size"], row["start_step"]) for row in rows]


def wait_for_steps(run_dir, world_size, number, process):
    """Wait until an attempt of so many workers has logged so many steps."""

    def done():
        newest = attempts(run_dir)[-1:]
        return newest and newest[0][0] == world_size and logged_steps(run_dir)[-1:] >= [newest[0][1] + number]

    wait_until(done, process, timeout_s=300)
