"""Train transformers' BertForPreTraining beside raybert's model, and write what both have learned at the same steps.

    python docs/reference.py --num_steps 300

Both begin with the same weights and see the same batches in the same order, masks included; optimizer and learning
rates are the same too. Held-out figures of both come from the same evaluation. Run it where the configuration finds its
files (docs/LEARNING.md). Without dropout, since the two draw different random numbers. One difference is left:
transformers divides by the masked tokens of each micro-batch, raybert by those of the batch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from raybert.bench_data import build_index
from raybert.bench_step import Peer
from raybert.config import Config
from raybert.config_file import load_config
from raybert.errors import UserError
from raybert.evaluate import evaluate
from raybert.feed import Layout, local_batches
from raybert.model import BertForPreTraining
from raybert.plan import plan
from raybert.preflight import remasking, resolve, sample_order
from raybert.step import create_state, train_step
from raybert.world import World

METRICS = ("lm_example_loss", "masked_lm_accuracy", "next_sentence_loss", "next_sentence_accuracy")


def main(argv: list[str] | None = None) -> None:
    """A line of JSON for every so many steps: both sides' held-out metrics."""
    parser = argparse.ArgumentParser("python docs/reference.py", description="raybert and transformers, side by side.")
    parser.add_argument("--config", default="laptop", help="a YAML file or a shipped configuration")
    parser.add_argument("--num_steps", type=int, default=300, help="steps to take of those that are configured")
    parser.add_argument("--every_steps", type=int, default=100, help="steps between two evaluations")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    try:
        config = comparable(resolve(load_config(options.config)))
        for step, metrics in side_by_side(config, options.num_steps, options.every_steps):
            print(json.dumps({"step": step, **metrics}), flush=True)
    except UserError as error:
        parser.error(str(error))


def comparable(config: Config) -> Config:
    """The same without dropout.

    Raises:
        UserError: there is nothing to compare on.
    """
    if not config.evaluation.input_files:
        raise UserError("evaluation.input_files is empty; give a --config that names held-out files.")
    return replace(config, model=replace(config.model, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def side_by_side(config: Config, num_steps: int, every_steps: int) -> Iterator[tuple[int, dict[str, dict[str, float]]]]:
    """Held-out metrics of both sides every so many steps, and before the first."""
    with tempfile.TemporaryDirectory(prefix="raybert-") as cache:
        index = build_index(config, Path(cache))
        held_out = build_index(config, Path(cache), "evaluation.input_files")
        world, training = World(), config.training
        ours = create_state(config.model, training, config.optimizer, world)
        theirs = Peer(config, ours, world.device)
        twin = BertForPreTraining(config.model)  # for the same evaluation
        layout = Layout(sample_order(config, index), 1, 0, num_steps, remasking(config))

        def metrics() -> dict[str, dict[str, float]]:
            weights = theirs.model.state_dict()
            twin.load_state_dict({name: weights[name] for name in twin.state_dict()})
            sides = {"raybert": ours.model, "transformers": twin}
            found = {side: evaluate(model, held_out, None, training, world) for side, model in sides.items()}
            return {side: {name: round(values[name], 4) for name in METRICS} for side, values in found.items()}

        yield 0, metrics()
        for batch in local_batches(layout, index):
            train_step(ours, plan(batch, config.model, training, world.device), training, config.optimizer, world)
            theirs.step(theirs.prepare(batch))
            if ours.step % every_steps == 0:
                yield ours.step, metrics()


if __name__ == "__main__":
    main()
