"""raybert pretrains BERT from TFRecords on an elastic Ray cluster.

    import raybert

    config = raybert.load_config("sample", run_dir="runs/first", training={"num_steps": 100})
    losses = []

    def on_log(event):
        if event.kind == "train":
            losses.append((event.step, event.metrics["training_loss"]))

    checkpoint = raybert.train(config, on_log=on_log)

Importing this imports neither torch nor Ray; `train` does.
"""

from __future__ import annotations

from raybert.config import Config
from raybert.config_file import load_config
from raybert.errors import UserError
from raybert.events import Event, Tell

__all__ = ["Config", "Event", "UserError", "load_config", "train"]


def train(config: Config, on_log: Tell | None = None, verbose: bool = False) -> str:
    """Pretrain, or continue the run found in `config.run_dir`, as `run.py train` does.

    Args:
        config: of the run; see `load_config`.
        on_log: called with every `Event` that is shown (its `kind`, `step`, `metrics` and `text`), and at last with one
            of kind "end"; in this process, in a thread of its own, in order. It cannot slow the run. An error of it is
            warned of once and ends nothing; by raising KeyboardInterrupt it interrupts the run, as Ctrl-C does.
        verbose: log what Ray and raybert do.

    Returns:
        The newest checkpoint's directory, which transformers opens.

    Raises:
        UserError: something the user can mend; the run, if there is one, can be resumed.
        KeyboardInterrupt: the run was interrupted; the same call resumes it.
    """
    from raybert import launch

    return launch.train(config, on_log, verbose)
