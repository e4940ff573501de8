"""Faults that are put into a running run, and how fast it is back; the same for tests and for the soak.

python tests/faults.py --minutes 30 --seed 1      a fault about every minute, drawn from the seed; prints what it saw
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from nodes import NODE, attempts, cluster, descendants, drain, logged_steps, running, wait_until
from runs import flags

WORKER = "ray::RayTrainWorker"


@dataclass(frozen=True)
class Recovery:
    """What a fault cost.

    Args:
        fault: its name.
        back_s: seconds from the fault to the first step of the attempt after it.
        redone: steps that were trained again.
        world_size: of the attempt after it.
    """

    fault: str
    back_s: float
    redone: int
    world_size: int


class Scene:
    """A run on a cluster of one worker a node, and what can happen to it."""

    def __init__(self, nodes, process, run_dir, pace):
        self.nodes, self.process, self.run_dir, self.pace = nodes, process, run_dir, pace

    def pid(self, rank):
        """Process of a rank, or of the last one if there are not so many."""
        size = attempts(self.run_dir)[-1][0]
        return int(self.pace.with_name(f"rank-{min(rank, size - 1)}").read_text())

    def node(self, rank):
        """The node that a rank is on."""
        pid = self.pid(rank)
        return next(node for node in self.nodes.worker_nodes if pid in descendants(raylet(node)))

    def kill_worker(self, rank):
        os.kill(self.pid(rank), signal.SIGKILL)

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

    def recover(self, fault, rank=0, timeout_s=120):
        """Put a fault in and wait until another attempt has made a step; what that cost."""
        number = len(attempts(self.run_dir))
        began_s = time.monotonic()
        getattr(self, fault)(rank)
        reached = logged_steps(self.run_dir)[-1]
        while True:
            rows, steps = attempts(self.run_dir), logged_steps(self.run_dir)
            if len(rows) == number:
                reached = max(reached, *steps)
            elif steps and rows[-1][1] < steps[-1] < rows[-1][1] + 3:
                return Recovery(fault, time.monotonic() - began_s, max(0, reached - rows[number][1]), rows[-1][0])
            assert self.process.poll() is None, self.process.read_output()
            assert time.monotonic() < began_s + timeout_s, f"{fault}: timed out\n{self.process.read_output()}"
            time.sleep(0.05)

    def wait_for_steps(self, number):
        """Let the newest attempt make so many steps."""
        start = attempts(self.run_dir)[-1][1]
        wait_until(lambda: logged_steps(self.run_dir)[-1] >= start + number, self.process)


def raylet(node):
    return node.all_processes["raylet"][0].process.pid


@contextmanager
def scene(directory, num_nodes, pace="0.3", **settings):
    """A run that has made some steps on as many workers as there are nodes."""
    directory = Path(directory)
    path, run_dir = directory / "pace", directory / "run"
    path.write_text(pace)
    settings = {"cluster__num_workers": f"1,{num_nodes}", "cluster__cpus_per_worker": 2} | settings
    with cluster(num_nodes) as nodes, running(nodes.address, *flags(run_dir, **settings), pace=path) as process:
        wait_until(lambda: logged_steps(run_dir)[-1:] >= [7], process)
        yield Scene(nodes, process, run_dir, path)


def leftovers(nodes):
    """Processes of workers that are still there, and placement groups that are not removed."""
    raylets = [raylet(node) for node in nodes.list_all_nodes()]
    processes = [line for pid in raylets for line in descendants(pid).values() if line.startswith(WORKER)]
    code = (
        "import json, ray; from ray.util import placement_group_table; ray.init(log_to_driver=False); "
        "print(json.dumps([row['state'] for row in placement_group_table().values()]))"
    )
    environment = os.environ | {"RAY_ADDRESS": nodes.address}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return processes + [state for state in json.loads(done.stdout.splitlines()[-1]) if state != "REMOVED"]


def soak(minutes, seed, num_nodes=3):
    """Print what every fault of a seeded schedule cost, and what `verify` says in the end."""
    draw, until_s = random.Random(seed), time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="rb", dir="/tmp") as directory:
        num_steps = round(minutes * 60 * 20)
        settings = {"training__num_steps": num_steps, "checkpoint__every_steps": 20}
        with scene(directory, num_nodes, **settings) as stage:
            while time.monotonic() < until_s:
                is_low = len(stage.nodes.worker_nodes) < 2
                fault = "join" if is_low else draw.choice(SOAK)
                print(stage.recover(fault, draw.randrange(num_nodes)), flush=True)
                time.sleep(draw.uniform(20, 60))
            stage.pace.write_text("0")
            code = stage.process.wait(3600)
            print("\n".join(stage.process.read_output().splitlines()[-12:]))
            print("left behind:", leftovers(stage.nodes))
        command = [sys.executable, str(Path(__file__).parents[1] / "run.py"), "verify", str(stage.run_dir)]
        return code or subprocess.run(command).returncode


SOAK = ("kill_worker", "kill_node", "replace_node", "drain_node", "kill_two", "kill_during_restore", "join")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A run under faults.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    sys.exit(soak(given.minutes, given.seed))
