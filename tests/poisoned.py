"""Steps that go wrong, as a test says: python poisoned.py SPIKE NAN GATE [...] train ...

Losses of the steps SPIKE (comma-separated) explode on every rank; those of the steps NAN are no numbers on the last
rank alone, which stands still in its step while there is a file GATE. All else is the real thing.
"""

import sys
import time
from pathlib import Path

import torch

from raybert import cli, launch, loop
from raybert.worker import Job, train_ray_worker, train_worker

EXPLODED = 100.0


def poisoned(real_step, spikes, nans, gate=None):
    """A `train_step` that goes wrong at some steps."""

    def step(state, batch, training, optimizer, world):
        factor = EXPLODED if batch.step in spikes else 1.0
        is_chosen = world.rank == world.size - 1
        if batch.step in nans and is_chosen:
            factor = torch.nan
        while gate and gate.exists() and is_chosen:
            time.sleep(0.1)
        hook = state.model.cls.predictions.transform.register_forward_hook(lambda *call: call[-1] * factor)
        try:
            return real_step(state, batch, training, optimizer, world)
        finally:
            hook.remove()

    return step


def poisoned_worker(train, *faults):
    """Runs in the worker, whose steps it poisons."""

    def run(job: Job) -> None:
        loop.train_step = poisoned(loop.train_step, *faults)
        train(job)

    return run


if __name__ == "__main__":
    steps = [set(map(int, filter(None, text.split(",")))) for text in sys.argv[1:3]]
    faults = *steps, Path(sys.argv[3])
    launch.train_worker = poisoned_worker(train_worker, *faults)
    launch.train_ray_worker = poisoned_worker(train_ray_worker, *faults)
    sys.exit(cli.main(sys.argv[sys.argv.index("train") :]))
