"""A run over several hosts: network namespaces with their own addresses, names and mounts on this machine."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from helpers import SAMPLE_FILE
from nodes import attempts, finish, running, wait_for_steps
from runs import assert_exactly_once, changes, flags, last_weights, relative_distance

PORT = 6379
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
QUICK = {  # the head gives a silent node up after some 5 s, not 50
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


def ip(*arguments):
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


class Host:
    """A namespace with an address, a temporary directory of its own, and a node of Ray's."""

    def __init__(self, number, directory):
        self.namespace, self.address = f"rb{os.getpid()}-{number}", f"10.213.0.{number + 1}"
        self.directory = Path(directory) / f"h{number}"
        self.directory.mkdir()
        (self.directory / "tmp").mkdir()
        self.node, self.log = None, self.directory / "log"
        self.within = ["ip", "netns", "exec", self.namespace]

    def start(self, environment, *arguments, own=()):
        """`ray start --block`, in whose sight the directories `own` are empty: the host's own."""
        mounts = [f"mount -t tmpfs tmpfs {path}" for path in own]
        script = " && ".join([f"hostname {self.namespace}", *mounts, 'exec "$@"'])
        command = [*self.within, "unshare", "--mount", "--uts", "sh", "-c", script, "sh", *RAY, "start", "--block"]
        command += [f"--node-ip-address={self.address}", f"--temp-dir={self.directory}/ray", *arguments]
        variables = environment | {"TMPDIR": f"{self.directory}/tmp"}
        with self.log.open("w") as log:
            self.node = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)

    def wait(self, timeout_s=180):
        """Wait until the node runs."""
        deadline_s = time.monotonic() + timeout_s
        while "Ray runtime started" not in self.log.read_text():
            assert self.node.poll() is None and time.monotonic() < deadline_s, self.log.read_text()
            time.sleep(0.1)

    def first_rank_began(self):
        """When a rank 0 began here last: it alone makes a directory in the host's temporary one."""
        return max((path.stat().st_ctime for path in (self.directory / "tmp").glob("raybert-*")), default=0)

    def kill(self):
        """End all processes of the namespace."""
        while pids := ip("netns", "pids", self.namespace).split():
            for pid in map(int, pids):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        if self.node:
            self.node.wait()


class Hosts:
    """A head host, and worker hosts that a bridge on it connects."""

    def __init__(self, directory, num_workers):
        self.directory = Path(directory)
        self.own = self.directory / "own"  # on each worker host another directory than on the head host
        self.own.mkdir()
        token = self.directory / "token"
        token.write_text(secrets.token_hex(32))
        known = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
        self.environment = known | QUICK | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.head, *self.workers = (Host(number, directory) for number in range(num_workers + 1))
        self.address = f"{self.head.address}:{PORT}"

    def connect(self):
        """Links and addresses."""
        space = self.head.namespace
        ip("-n", space, "link", "add", "bridge", "type", "bridge")
        for number, worker in enumerate(self.workers, 1):
            link = ("link", "add", f"w{number}", "netns", space, "type", "veth")
            ip(*link, "peer", "name", "eth0", "netns", worker.namespace)
            ip("-n", space, "link", "set", f"w{number}", "master", "bridge", "up")
        for host, device in [(self.head, "bridge"), *((worker, "eth0") for worker in self.workers)]:
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", device)
            ip("-n", host.namespace, "link", "set", device, "up")
            ip("-n", host.namespace, "link", "set", "lo", "up")

    def start(self):
        """Ray on every host."""
        memory = "--object-store-memory=300000000"
        self.head.start(self.environment, "--head", f"--port={PORT}", "--num-cpus=1", memory)
        self.head.wait()
        for worker in self.workers:
            self.join(worker)
        for worker in self.workers:
            worker.wait()

    def join(self, worker):
        """Start a worker host's node, as its supervisor does."""
        memory = "--object-store-memory=150000000"
        worker.start(self.environment, f"--address={self.address}", "--num-cpus=2", memory, own=[self.own])

    def cut(self, worker):
        """Take a host's cable out."""
        self._set(worker, "down")

    def heal(self, worker):
        self._set(worker, "up")

    def _set(self, worker, state):
        ip("-n", self.head.namespace, "link", "set", f"w{self.workers.index(worker) + 1}", state)

    def running(self, *arguments, pace=None):
        """`run.py train` on the head host."""
        return running(self.address, *arguments, pace=pace, environment=self.environment, within=self.head.within)


@contextmanager
def hosts_of(num_workers):
    """Hosts on which Ray runs; all that they are is removed."""
    with ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="rb", dir="/tmp", ignore_cleanup_errors=True)
        hosts = Hosts(stack.enter_context(temporary), num_workers)
        for host in (hosts.head, *hosts.workers):
            ip("netns", "add", host.namespace)
            stack.callback(ip, "netns", "delete", host.namespace)
            stack.callback(host.kill)
        hosts.connect()
        hosts.start()
        yield hosts


@pytest.fixture(scope="module")
def hosts():
    if not shutil.which("ip"):
        pytest.skip("no `ip` (iproute2) on this machine")
    probe = f"rb{os.getpid()}-probe"
    added = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if added.returncode:
        pytest.skip(f"this user may make no network namespace here: {added.stderr.strip()}")
    ip("netns", "delete", probe)
    with hosts_of(num_workers=2) as hosts:
        yield hosts


SETTINGS = {"cluster__num_workers": "1,2", "cluster__cpus_per_worker": 2, "cluster__collective_timeout_s": 15}


def refusal(hosts, *arguments):
    """What a run on the head host says that is refused."""
    with hosts.running(*arguments) as process:
        assert process.wait(300) != 0
        return process.read_output()


def test_a_data_file_of_the_head_host_alone_is_refused(hosts, tmp_path):
    for number in range(8):  # more than the head's one CPU indexes
        shutil.copy(SAMPLE_FILE, hosts.own / f"{number}.tfrecord")
    output = refusal(hosts, *flags(tmp_path, data__input_files=f"{hosts.own}/*.tfrecord", **SETTINGS))
    assert f".tfrecord is not there on node {hosts.head.namespace[:-1]}" in output


def test_a_run_directory_of_the_head_host_alone_is_refused(hosts):
    run_dir = hosts.own / "run"
    output = refusal(hosts, *flags(run_dir, **SETTINGS))
    assert f"run_dir: node {hosts.head.namespace[:-1]}" in output
    assert f"has another {run_dir} than the driver" in output


def test_a_host_is_cut_off_and_healed(hosts, tmp_path, pace, sample_index, undisturbed):
    """2 -> 1 -> 2 workers; the rank that was cut off, the first one, writes nothing more into the run."""
    num_steps, run_dir = 120, tmp_path / "run"

    def written_by(attempt):
        names = [path.name for kind in ("checkpoints", "history") for path in (run_dir / kind).iterdir()]
        return sorted(name for name in names if f"attempt-{attempt:04}" in name)

    with hosts.running(*flags(run_dir, training__num_steps=num_steps, **SETTINGS), pace=pace) as process:
        wait_for_steps(run_dir, 2, 12, process)
        number = len(attempts(run_dir))
        lost = max(hosts.workers, key=Host.first_rank_began)
        hosts.cut(lost)
        wait_for_steps(run_dir, 1, 6, process)
        before = written_by(number)
        hosts.heal(lost)
        assert lost.node.wait(180) != 0  # Ray ends a node that was given up
        hosts.join(lost)
        wait_for_steps(run_dir, 2, 1, process)
        pace.write_text("0")
        finish(process)
    assert [name for name in written_by(number) if name not in before] == []
    assert changes(assert_exactly_once(run_dir, num_steps, sample_index))[-3:] == [2, 1, 2]
    assert relative_distance(last_weights(run_dir), undisturbed(num_steps)) <= 1e-5
