"""A group of workers whose process group cannot be set up is tried again, for real, and not for ever."""

import subprocess
import sys

import pytest

# Two workers; something happens to one of them, the first times, where the process group is set up.
REFUSED = """
import os, pathlib
import ray
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR as HOOK
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from raybert.starts import PatientTorchConfig

HERE = pathlib.Path(__file__).parent

def begin():
    from ray.train.torch import config
    real = config._setup_torch_process_group
    def set_up(*arguments, world_rank, **named):
        marks = len(list(HERE.glob("mark*")))
        if world_rank == 1 and marks < TIMES:
            (HERE / f"mark{marks}").touch()
            HAPPENS
        return real(*arguments, world_rank=world_rank, **named)
    config._setup_torch_process_group = set_up

def work():
    from torch import distributed
    assert distributed.get_world_size() == 2

if __name__ == "__main__":
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    environment = {"env_vars": {"PYTHONPATH": str(HERE), HOOK: "refusing.begin"}}
    failures = FailureConfig(max_failures=-1)
    run = RunConfig(storage_path=str(HERE / "ray"), failure_config=failures, worker_runtime_env=environment)
    tell = lambda event: (HERE / "told").open("a").write(event.text)
    patient = PatientTorchConfig(timeout_s=10, tell=tell, limit=3)
    TorchTrainer(work, torch_config=patient, scaling_config=ScalingConfig(num_workers=2), run_config=run).fit()
    print("finished")
"""


def refused(directory, happens, times):
    """What the trainer came to whose process group fails so often, and what was told."""
    script = directory / "refusing.py"
    script.write_text(REFUSED.replace("HAPPENS", happens).replace("TIMES", str(times)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    told = directory / "told"
    return done, told.read_text() if told.exists() else ""


UNREACHED = 'raise RuntimeError("Gloo connectFullMesh failed")'


@pytest.mark.parametrize("happens", ["os._exit(1)", pytest.param(UNREACHED, marks=pytest.mark.nightly)])
def test_a_process_group_that_cannot_be_set_up_is_tried_again(happens, tmp_path):
    done, told = refused(tmp_path, happens, 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "finished"
    assert told.count("The workers could not be started, another try") == 1


@pytest.mark.nightly
def test_not_for_ever(tmp_path):
    done, told = refused(tmp_path, UNREACHED, 3)
    assert done.returncode == 1 and "Gloo connectFullMesh failed" in done.stderr
    assert told.count("The workers could not be started, another try") == 2
