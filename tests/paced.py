"""`run.py train` at a pace that does not depend on the machine: python paced.py SECONDS_PER_STEP train ...

Every step of every worker takes at least so long, so that a test can meet a run half-way. All else is the real thing.
"""

import sys
import time

from raybert import cli, launch, loop
from raybert.worker import Job, train_worker

STEP_S = float(sys.argv[1])


def paced_worker(job: Job) -> None:
    """Runs in the worker, where it slows the loop down."""
    real_step = loop.train_step

    def slow_step(*arguments):
        time.sleep(STEP_S)
        return real_step(*arguments)

    loop.train_step = slow_step
    train_worker(job)


if __name__ == "__main__":
    launch.train_worker = paced_worker
    sys.exit(cli.main(sys.argv[2:]))
