"""Faults that are put into a running run, and how fast it is back; the same for tests and for the soak.

python tests/faults.py soak --minutes 30 --seed 1   a fault about every minute, drawn from the seed; prints what it saw
python tests/faults.py figures --rounds 3           what each fault costs, and the same with Ray's own policy: a table
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nodes import (
    NODE,
    attempts,
    cluster,
    descendants,
    drain,
    is_alive,
    logged_steps,
    ray_node,
    running,
    shown_steps,
    wait_until,
)
from runs import flags

from raybert.manifest import CHECKPOINTS, MANIFEST, MODEL, find_checkpoints
from raybert.storage import Directory

CONTROLLER = "ray::TrainController"
HELPERS = ("ray::DatasetManager", "ray::SplitCoordinator", "ray::SynchronizationActor", "ray::Inbox")  # at the head
OF_A_RUN = ("ray::RayTrainWorker", CONTROLLER, "ray::PlacementGroupCleaner", *HELPERS)
LONG = {"data__window_size": 8192, "cluster__keep_spares": "true"}  # settings of long runs: as in real ones
LEAVE_S = 15.0  # that processes of a run may outlive it


@dataclass(frozen=True)
class Recovery:
    """What a fault cost.

    Args:
        fault: its name.
        back_s: seconds from the fault to the first step of the attempt after it.
        stopped_s: seconds from the last step before to that one.
        redone: steps that were trained again.
        world_size: of the attempt after it.
    """

    fault: str
    back_s: float
    stopped_s: float
    redone: int
    world_size: int


class Scene:
    """A run on a cluster of one worker a node, and what can happen to it."""

    def __init__(self, nodes, run_dir, pace, command, contexts):
        """Args:
        nodes: the cluster.
        run_dir: of the run.
        pace: file of its pace.
        command: gives the command's context, anew each time.
        contexts: an exit stack for what is started.
        """
        self.nodes, self.run_dir, self.pace = nodes, run_dir, pace
        self._command, self._contexts = command, contexts
        self.start()

    def start(self):
        """Give the command, the first time or once more."""
        self.process = self._contexts.enter_context(self._command())

    def pid(self, rank):
        """Process of a rank, or of the last one if there are not so many."""
        size = attempts(self.run_dir)[-1][0]
        return int(self.pace.with_name(f"rank-{min(rank, size - 1)}").read_text())

    def node(self, rank):
        """The node that a rank is on."""
        pid = self.pid(rank)
        return next(node for node in self.nodes.worker_nodes if pid in descendants(raylet(node)))

    def pids(self):
        """Processes of the newest attempt's ranks."""
        return [self.pid(rank) for rank in range(attempts(self.run_dir)[-1][0])]

    def kill_worker(self, rank):
        os.kill(self.pid(rank), signal.SIGKILL)

    def stop_worker(self, rank):
        """The process is there, and answers nothing."""
        os.kill(self.pid(rank), signal.SIGSTOP)

    def kill_controller(self, rank=None):
        """Ray Train's controller dies, which ends the command; it is given again at once."""
        self.kill_helper(CONTROLLER)
        assert self.process.wait(60) == 1, self.process.read_output()
        assert "controller" in self.process.read_output() and "Traceback" not in self.process.read_output()
        self.start()

    def kill_helper(self, title):
        """The process with this title on the head's node dies."""
        found = descendants(raylet(self.nodes.head_node))
        (pid,) = [pid for pid, command in found.items() if command.startswith(title)]
        os.kill(pid, signal.SIGKILL)

    def kill_driver(self, rank=None):
        """The command dies, and is given again at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.start()

    def kill_node(self, rank):
        self.nodes.remove_node(self.node(rank), allow_graceful=False)

    def replace_node(self, rank):
        """The node dies, and another one comes at once."""
        self.kill_node(rank)
        self.nodes.add_node(**NODE)

    def drain_node(self, rank, deadline_s=25):
        """The node is given notice; it dies when that is over."""
        drain(self.nodes, self.node(rank), deadline_s)

    def kill_two(self, rank):
        """A worker and another one's node at once."""
        other = self.node(rank + 1)
        self.kill_worker(rank)
        self.nodes.remove_node(other, allow_graceful=False)

    def join(self, rank=None):
        self.nodes.add_node(**NODE)

    def kill_during_restore(self, rank):
        """A worker dies, and one of its successors before it has made a step."""
        number, old = len(attempts(self.run_dir)), self.pid(rank)
        self.kill_worker(rank)
        wait_until(lambda: len(attempts(self.run_dir)) > number and self.pid(rank) != old, self.process)
        with suppress(ProcessLookupError):
            self.kill_worker(rank)

    def kill_during_upload(self, rank):
        """Rank 0 dies while a checkpoint's files are there and its manifest is not."""
        folder = self.run_dir / "checkpoints"
        wait_until(lambda: any(not (path / "manifest.json").exists() for path in folder.iterdir()), self.process)
        self.kill_worker(0)

    def flap(self, rank=None):
        """A node comes and goes again before anybody has used it, and one dies that was used."""
        self.nodes.remove_node(self.nodes.add_node(**NODE), allow_graceful=False)
        self.kill_node(rank)

    def start_node(self, rank=None):
        """A node joins that `ray start --block` makes."""
        self.started_node = self._contexts.enter_context(ray_node(self.nodes.address))

    def terminate_node(self, rank=None):
        """That node is told to end, as Kubernetes does it."""
        self.started_node.terminate()

    def flip_a_byte(self):
        """A byte of the next checkpoint flips once it is complete; its name, and that of the one before."""
        known = self.complete_checkpoints()[0]
        wait_until(lambda: self.complete_checkpoints()[0] != known, self.process)
        flipped, before = self.complete_checkpoints()[:2]
        flip(self.run_dir / CHECKPOINTS / flipped / MODEL)
        return flipped, before

    def complete_checkpoints(self):
        """Names, newest first."""
        folder = self.run_dir / CHECKPOINTS
        return [name for name in find_checkpoints(Directory(str(self.run_dir))) if (folder / name / MANIFEST).exists()]

    def recover(self, fault, rank=0, timeout_s=120):
        """Put a fault in and wait until another attempt has made a step; what that cost. Nobody survives from before.

        The processes of the attempt before must have ended by then, whatever the fault.
        """
        number, before = len(attempts(self.run_dir)), self.pids()
        began_s = time.monotonic()
        getattr(self, fault)(rank)
        reached, reached_at_s = logged_steps(self.run_dir)[-1], began_s
        while True:
            rows, steps = attempts(self.run_dir), logged_steps(self.run_dir)
            if len(rows) == number and steps[-1] > reached:
                reached, reached_at_s = steps[-1], time.monotonic()
            elif len(rows) > number and steps and rows[-1][1] < steps[-1] < rows[-1][1] + 3:
                break
            assert self.process.poll() is None, self.process.read_output()
            assert time.monotonic() < began_s + timeout_s, f"{fault}: timed out\n{self.process.read_output()}"
            time.sleep(0.05)
        now_s, redone = time.monotonic(), max(0, reached - rows[number][1])
        recovery = Recovery(fault, now_s - began_s, now_s - reached_at_s, redone, rows[-1][0])
        assert not any(map(is_alive, before)), f"{fault}: workers of before are there, too"
        print(recovery, f"load {os.getloadavg()[0]:.1f}", flush=True)
        return recovery

    def play(self, schedule):
        """Put in the faults of a schedule of (step, rank, fault), each once its step is reached and all is well."""
        for step, rank, fault in schedule:
            wait_until(lambda step=step: logged_steps(self.run_dir)[-1] >= step, self.process)
            yield self.recover(fault, rank)
            self.wait_for_steps(3)

    def wait_for_steps(self, number):
        """Let the newest attempt make so many steps."""
        start = attempts(self.run_dir)[-1][1]
        wait_until(lambda: logged_steps(self.run_dir)[-1] >= start + number, self.process)


def flip(path):
    """Flip a byte in the middle of a file."""
    with path.open("r+b") as file:
        middle = path.stat().st_size // 2
        file.seek(middle)
        (byte,) = file.read(1)
        file.seek(middle)
        file.write(bytes([byte ^ 1]))


def raylet(node):
    return node.all_processes["raylet"][0].process.pid


@contextmanager
def scene(directory, num_nodes, pace="0.3", run_dir=None, environment=None, **settings):
    """A run that has made some steps on as many workers as there are nodes; by default below the directory."""
    path, run_dir = Path(directory) / "pace", run_dir or Path(directory) / "run"
    path.write_text(pace)
    settings = {"cluster__num_workers": f"1,{num_nodes}", "cluster__cpus_per_worker": 2} | settings
    with cluster(num_nodes) as nodes, ExitStack() as contexts:
        command = partial(running, nodes.address, *flags(run_dir, **settings), pace=path, environment=environment)
        stage = Scene(nodes, run_dir, path, command, contexts)
        wait_until(lambda: shown_steps(stage.process)[-1:] >= [7], stage.process)
        yield stage


def leftovers(nodes):
    """Processes of a run that are still there, and placement groups that are not removed."""
    until_s = time.monotonic() + LEAVE_S
    while (processes := processes_of_runs(nodes)) and time.monotonic() < until_s:
        time.sleep(0.2)
    code = (
        "import json, ray; from ray.util import placement_group_table; ray.init(log_to_driver=False); "
        "print(json.dumps([row['state'] for row in placement_group_table().values()]))"
    )
    environment = os.environ | {"RAY_ADDRESS": nodes.address}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return processes + [state for state in json.loads(done.stdout.splitlines()[-1]) if state != "REMOVED"]


def processes_of_runs(nodes):
    """What Ray's workers on all nodes do for runs."""
    raylets = [raylet(node) for node in nodes.list_all_nodes()]
    return [line for pid in raylets for line in descendants(pid).values() if line.startswith(OF_A_RUN)]


def seeded_schedule(seed, num_faults, every_steps, num_nodes):
    """Faults about every so many steps, as (step, rank, fault); a node joins where there would be too few."""
    draw, schedule, left = random.Random(seed), [], num_nodes
    for number in range(1, num_faults + 1):
        fault = draw_fault(draw, left, num_nodes)
        left -= LOST_NODES.get(fault, 0)
        schedule.append((number * every_steps + draw.randrange(every_steps // 2), draw.randrange(num_nodes), fault))
    return schedule


def draw_fault(draw, num_nodes, most_nodes):
    """A fault by chance: another node where there are fewer than two, none where there are as many as workers."""
    possible = [fault for fault in FAULTS if fault != "join" or num_nodes < most_nodes]
    return "join" if num_nodes < 2 else draw.choice(possible)


def soak(minutes, seed, num_nodes=3):
    """Print what every fault of a seeded schedule cost, and what `verify` says in the end."""
    draw, until_s = random.Random(seed), time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="rb", dir="/tmp") as directory:
        num_steps = round(minutes * 60 * 3)  # more than the pace allows in that time
        settings = {"training__num_steps": num_steps, "checkpoint__every_steps": 20, **LONG}
        with scene(directory, num_nodes, **settings) as stage:
            while time.monotonic() < until_s:
                stage.recover(draw_fault(draw, len(stage.nodes.worker_nodes), num_nodes), draw.randrange(num_nodes))
                time.sleep(draw.uniform(20, 60))
            stage.pace.write_text("0")
            code = stage.process.wait(3600)
            print("\n".join(stage.process.read_output().splitlines()[-12:]))
            print("left behind:", leftovers(stage.nodes))
        command = [sys.executable, str(Path(__file__).parents[1] / "run.py"), "verify", str(stage.run_dir)]
        return code or subprocess.run(command).returncode


FAULTS = ("kill_worker", "kill_node", "replace_node", "drain_node", "kill_two", "kill_during_restore", "join")
FAULTS += ("kill_controller", "kill_driver")
LOST_NODES = {"kill_node": 1, "drain_node": 1, "kill_two": 1, "join": -1}

FIGURES = {"notice to a node": "drain_node", "a node joins": "join", "a node dies": "kill_node"}
QUIET_S = 40.0  # between two faults, so that each meets a run that has settled


def figures(rounds):
    """Print what each fault cost, the median of some rounds and their range, with our policy and with Ray's."""
    print("| what | policy | seconds to the next step | in which nobody trains | steps redone |")
    print("| --- | --- | --- | --- | --- |")
    for policy in ("raybert's", "Ray's"):
        seen = {name: [] for name in FIGURES}
        for _ in range(rounds):
            with tempfile.TemporaryDirectory(prefix="rb", dir="/tmp") as directory:
                environment = os.environ | ({"RAYBERT_TEST_STOCK": "1"} if policy == "Ray's" else {})
                settings = {"training__num_steps": 10_000, **LONG}
                with scene(directory, 2, environment=environment, **settings) as stage:
                    for name, fault in FIGURES.items():
                        time.sleep(QUIET_S)
                        seen[name].append(stage.recover(fault, timeout_s=300))
        for name, recoveries in seen.items():
            columns = [spread(getattr(one, field) for one in recoveries) for field in ("back_s", "stopped_s", "redone")]
            print(f"| {name} | {policy} | {' | '.join(columns)} |", flush=True)
    return 0


def spread(values):
    """Median and range, for a table."""
    values = sorted(values)
    return f"{statistics.median(values):.1f} ({values[0]:.1f} to {values[-1]:.1f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A run under faults.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("soak")
    command.add_argument("--minutes", type=float, default=30)
    command.add_argument("--seed", type=int, default=1)
    command.set_defaults(run=lambda given: soak(given.minutes, given.seed))
    command = commands.add_parser("figures")
    command.add_argument("--rounds", type=int, default=3)
    command.set_defaults(run=lambda given: figures(given.rounds))
    given = parser.parse_args()
    sys.exit(given.run(given))
