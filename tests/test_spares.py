"""Laws of the processes that wait for the next group of workers; and Ray does use them."""

import os
import subprocess
import sys
from pathlib import Path

from nodes import cluster

from raybert import spares
from raybert.spares import EVERY_S, Spares

# Asks for a spare of an actor's environment, lets it import, and prints its pid and the next such actor's.
REUSE = """
import pathlib, sys, time
import ray
from raybert.spares import ENVIRONMENT, environment, prestart

@ray.remote(num_cpus=1, resources={"here": 0.1}, runtime_env=ENVIRONMENT)
class Actor:
    def pid_and_environment(self):
        import os
        return os.getpid(), environment()

def children(raylet):
    return set(pathlib.Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split())

def has_imported(pid):
    return "libtorch" in pathlib.Path(f"/proc/{pid}/maps").read_text()

def wait_for(condition):
    until_s = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < until_s
        time.sleep(0.1)
    return found

ray.init(logging_level="ERROR", log_to_driver=False)
raylet = int(sys.argv[1])
first = Actor.remote()
_, environment = ray.get(first.pid_and_environment.remote())
node = next(node for node in ray.nodes() if "here" in node["Resources"])
before = children(raylet)
prestart(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}", environment)
(spare,) = wait_for(lambda: children(raylet) - before)
wait_for(lambda: has_imported(spare))
print(spare, ray.get(Actor.remote().pid_and_environment.remote())[0])
"""


def test_a_worker_starts_in_the_process_that_waits_for_it():
    """On a real node: holds what `prestart` takes of Ray's insides."""
    with cluster(0) as nodes:
        node = nodes.add_node(num_cpus=2, resources={"here": 1})
        raylet = node.all_processes["raylet"][0].process.pid
        environment = os.environ | {"RAY_ADDRESS": nodes.address}
        command = [sys.executable, "-c", REUSE, str(raylet)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=Path(spares.__file__).parents[1]
        )
    assert done.returncode == 0, done.stderr
    spare, pid = done.stdout.split()
    assert spare == pid


def test_a_raylet_that_does_not_answer_costs_a_spare_and_no_error(monkeypatch):
    monkeypatch.setattr(spares, "CALL_S", 0.2)
    code = "import ray; from raybert import spares; ray.init(address='local', num_cpus=1, include_dashboard=False); "
    code += "spares.prestart('127.0.0.1:1', '{}'); print('went on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("went on\n"), done.stderr


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


def kept(clock, spares, wanted, seconds):
    """Keep what is wanted, looking twice a second."""
    for _ in range(int(seconds * 2)):
        for place, number in wanted.items():
            spares.keep(place, "workers", number)
        clock.now_s += 0.5


def test_one_process_at_a_time_starts_on_each_node_until_enough_wait():
    started, clock = [], Clock()
    spares = Spares(lambda place, environment: started.append((clock.now_s, place)), clock)
    kept(clock, spares, {"a": 3, "b": 1}, 30)
    assert started == [(0.0, "a"), (0.0, "b"), (EVERY_S, "a"), (2 * EVERY_S, "a")]


def test_what_a_group_has_used_is_replaced_and_what_it_has_not_is_not():
    started, clock = [], Clock()
    spares = Spares(lambda place, environment: started.append(place), clock)
    kept(clock, spares, {"a": 2, "b": 2}, 10)
    spares.use("a", "workers", 1)
    spares.use("b", "workers", 5)  # more than waited: Ray started the others
    spares.use("b", "another's", 1)
    kept(clock, spares, {"a": 2, "b": 2}, 10)
    assert [started.count("a"), started.count("b")] == [3, 4]
