"""`run.py train` at a pace that a test sets: python paced.py FILE train ...

The file holds the seconds that every step of every worker takes at least, so that a test can meet a run half-way and
then let it go, whatever the machine's speed. Beside it, `rank-N` holds the process id of rank N, and `pace-N`, if it is
there, the pace of that rank. All else is the real
thing, but for Ray's own scaling policy where the variable RAYBERT_TEST_STOCK is set, to compare with.
"""

import os
import sys
import time
from pathlib import Path

import ray.train
from ray.train.torch import TorchTrainer

from raybert import cli, launch, loop
from raybert.worker import Job, train_ray_worker

PACE = Path(sys.argv[1])


def paced_worker(job: Job) -> None:
    """Runs in the worker, where it slows the loop down."""
    real_step = loop.train_step

    rank = ray.train.get_context().get_world_rank()
    own = PACE.with_name(f"pace-{rank}")

    def slow_step(*arguments):
        time.sleep(float((own if own.exists() else PACE).read_text()))
        return real_step(*arguments)

    loop.train_step = slow_step
    PACE.with_name(f"rank-{rank}").write_text(str(os.getpid()))
    train_ray_worker(job)


if __name__ == "__main__":
    launch.train_ray_worker = paced_worker
    if "RAYBERT_TEST_STOCK" in os.environ:
        launch._trainer_class = lambda *_: TorchTrainer
    sys.exit(cli.main(sys.argv[2:]))
