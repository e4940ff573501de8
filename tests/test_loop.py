"""The loop and what it leaves: metrics, evaluation, and a rollback when training has diverged."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY_MODEL, tiny_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import raybert
from raybert.batch import micro_batch
from raybert.cadence import Past
from raybert.evaluate import evaluate, unigram_loss
from raybert.feed import Layout, local_batches
from raybert.flops import training_flops
from raybert.guard import RollbackError
from raybert.loop import is_due, train
from raybert.loss import Sums
from raybert.model import BertForPreTraining
from raybert.order import SampleOrder
from raybert.step import create_state, forward
from raybert.storage import Directory
from raybert.telemetry import EVAL, METRICS, SUMMARIES, SUMMARY, TRAIN, Telemetry, read_metrics, training_summary
from raybert.world import World

TRAIN_NAMES = {
    "masked_lm_accuracy",
    "lm_example_loss",
    "training_loss",
    "next_sentence_accuracy",
    "next_sentence_loss",
    "grad_norm",
    "samples_per_s",
    "tokens_per_s",
    "flops_per_s",
    "data_wait",
    "world_size",
    "learning_rate",
    "num_skipped",
}
EVAL_NAMES = {"masked_lm_accuracy", "lm_example_loss", "loss", "next_sentence_accuracy", "next_sentence_loss"}


@dataclass
class Observed:
    """What the loop told rank 0."""

    train: list = field(default_factory=list)
    evaluation: list = field(default_factory=list)
    saved: list = field(default_factory=list)
    warnings: list = field(default_factory=list)
    notes: list = field(default_factory=list)
    lived: Past = field(default_factory=Past)

    def train_metrics(self, step, metrics):
        self.train.append((step, dict(metrics)))

    def eval_metrics(self, step, metrics):
        self.evaluation.append((step, dict(metrics)))

    def save(self, state, records):
        self.saved.append((state.step, records))

    def is_asked_to_hold(self):
        return False

    def is_writing(self):
        return False

    def past(self):
        return self.lived

    def warn(self, text):
        self.warnings.append(text)

    def say(self, text):
        self.notes.append(text)


def run_loop(index, start_step=0, with_evaluation=True, **overrides):
    """Train a tiny model from the beginning; what was observed, the result, the state."""
    config = tiny_config("unused", "unused", **overrides)
    state = create_state(config.model, config.training, config.optimizer, World())
    state.step = start_step
    order = SampleOrder(index.page_sizes, 1, config.training.global_batch_size, 4)
    batches = local_batches(Layout(order, 1, start_step, config.training.num_steps), index)
    observed = Observed()
    steps = config.evaluation.num_steps
    evaluator = (lambda: evaluate(state.model, index, steps, config.training, World())) if with_evaluation else None
    result = train(state, batches, config, World(), 3, {}, evaluator, observed)
    return observed, result, state


@pytest.fixture(scope="module")
def trained(index):
    return run_loop(index, **{"training.num_steps": 7, "checkpoint.every_steps": 3, "evaluation.every_steps": 4})


# --- What is done when ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "every_steps", "due"),
    [(0, 5, True), (5, 5, True), (4, 5, False), (6, 5, False), (3, 1, True), (3, 0, False)],
)
def test_is_due(step, every_steps, due):
    assert is_due(step, every_steps) == due


def test_everything_happens_at_its_steps_and_at_the_end(trained):
    observed, result, state = trained
    assert [step for step, _ in observed.train] == [2, 4, 6, 7]
    assert [step for step, _ in observed.evaluation] == [4, 7]
    assert [step for step, _ in observed.saved] == [3, 6]  # the last one is the caller's
    assert state.step == 7
    assert observed.train[-1] == (7, result.train) and observed.evaluation[-1] == (7, result.evaluation)


def test_records_are_of_every_step_once(trained, index):
    observed, result, _ = trained
    carried = [records for _, records in observed.saved] + [result.records]
    assert [[record.step for record in records] for records in carried] == [[0, 1, 2], [3, 4, 5], [6]]
    for records in carried:
        for record in records:
            (arrival,) = record.arrivals
            assert (arrival.first, arrival.stop) == (record.step * 32, record.step * 32 + 32)
            assert record.attempt == 3 and record.skipped is None


def test_metrics_have_model_gardens_names(trained):
    observed, _, _ = trained
    for step, metrics in observed.train:
        assert metrics.keys() == TRAIN_NAMES
        assert all(math.isfinite(value) for value in metrics.values())
        loss = metrics["lm_example_loss"] + metrics["next_sentence_loss"]
        assert metrics["training_loss"] == pytest.approx(loss, rel=1e-12)
        assert 0 <= metrics["data_wait"] < 1 and metrics["world_size"] == 1 and metrics["num_skipped"] == 0
        assert metrics["learning_rate"] == pytest.approx(1e-4 * (7 - (step - 1)) / 7)
    for _, metrics in observed.evaluation:
        assert metrics.keys() == EVAL_NAMES


def test_logged_sums_are_of_the_steps_since_the_last_line(index):
    """Logged every step or every second one, at a learning rate of nearly nothing: means of the same samples."""
    still = {"optimizer.learning_rate": 1e-30, "training.num_steps": 4}
    dropless = replace(TINY_MODEL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    single, _, _ = run_loop(index, False, **still, model=dropless, **{"training.log_every_steps": 1})
    double, _, _ = run_loop(index, False, **still, model=dropless, **{"training.log_every_steps": 2})
    order = SampleOrder(index.page_sizes, 1, 32, 4)
    weights = [index.read(order.global_batch(step))["masked_lm_weights"].sum() for step in range(4)]
    losses = [metrics["lm_example_loss"] for _, metrics in single.train]
    for i, (_, metrics) in enumerate(double.train):
        pair = slice(2 * i, 2 * i + 2)
        assert metrics["lm_example_loss"] == pytest.approx(np.average(losses[pair], weights=weights[pair]), rel=1e-6)


def test_operations_are_those_of_the_steps_since_the_last_line(trained, index):
    """A token costs what it costs in the samples of these steps, padding left out."""
    observed, _, _ = trained
    order = SampleOrder(index.page_sizes, 1, 32, 4)
    for (step, metrics), steps in zip(observed.train, ([0, 1], [2, 3], [4, 5], [6]), strict=True):
        assert step == steps[-1] + 1
        features = index.read(np.concatenate([order.global_batch(each) for each in steps]))
        lengths = features["input_mask"].sum(axis=1)
        flops = training_flops(TINY_MODEL, True, lengths, int(features["masked_lm_weights"].sum()))
        assert metrics["flops_per_s"] / metrics["tokens_per_s"] == pytest.approx(flops / lengths.sum(), rel=1e-12)


def test_a_finished_run_does_nothing(index):
    observed, result, _ = run_loop(index, start_step=8)
    assert observed == Observed() and result.records == [] and result.evaluation is None


# --- Divergence -----------------------------------------------------------------------------------------------------


def test_divergence_rolls_back_naming_the_steps(index):
    with pytest.raises(RollbackError, match="non-finite gradient 3 times in a row from step 1"):
        run_loop(index, **{"optimizer.learning_rate": 1e30})


def test_no_checkpoint_is_made_of_weights_that_diverged(index):
    """Though no line is due before it, nor an alarm."""
    absurd = {"optimizer.learning_rate": 1e30, "training.log_every_steps": 100, "training.num_steps": 200}
    with pytest.raises(RollbackError, match="non-finite gradient 5 times in a row from step 1"):
        run_loop(index, **absurd, **{"checkpoint.every_steps": 3})
    with pytest.raises(RollbackError, match="weights that are not finite at step 1"):
        run_loop(index, **absurd, **{"checkpoint.every_steps": 1})


# --- Evaluation -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return BertForPreTraining(TINY_MODEL)


def straight_metrics(model, index, num_samples):
    """All at once, in one forward."""
    model.eval()
    with torch.no_grad():
        return Sums(forward(model, micro_batch(index.read(np.arange(num_samples)))).values).metrics()


@pytest.mark.parametrize("micro_batch_size", [1, 7, 32, 100, 5000])
def test_evaluation_does_not_depend_on_the_micro_batch(model, index, micro_batch_size):
    training = replace(tiny_config("", "").training, micro_batch_size=micro_batch_size)
    metrics = evaluate(model, index, None, training, World())
    assert metrics == pytest.approx(straight_metrics(model, index, index.num_samples), rel=1e-6)
    for name in ("masked_lm_accuracy", "next_sentence_accuracy"):
        assert metrics[name] == straight_metrics(model, index, index.num_samples)[name]


@pytest.mark.parametrize(("num_steps", "num_samples"), [(1, 32), (3, 96), (25, 800), (26, 828), (1000, 828)])
def test_evaluation_is_of_so_many_global_batches(model, index, num_steps, num_samples):
    metrics = evaluate(model, index, num_steps, tiny_config("", "").training, World())
    assert metrics == pytest.approx(straight_metrics(model, index, num_samples), rel=1e-6)


@pytest.mark.parametrize("was_training", [True, False])
def test_evaluation_leaves_the_model_as_it_was(model, index, was_training):
    model.train(was_training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    metrics = [evaluate(model, index, 1, tiny_config("", "").training, World()) for _ in range(2)]
    assert metrics[0] == metrics[1]  # no dropout
    assert model.training == was_training
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_unigram_loss_by_hand():
    """Frequencies 4/6 and 2/6 after adding one."""
    expected = -(1 * math.log(4 / 6) + 3 * math.log(2 / 6)) / 4
    assert unigram_loss(np.array([3, 1]), np.array([1, 3])) == pytest.approx(expected, rel=1e-12)
    assert unigram_loss(np.zeros(10), np.arange(10)) == pytest.approx(math.log(10), rel=1e-12)


# --- Telemetry ------------------------------------------------------------------------------------------------------


def log_steps(run, scratch, start_step, steps, value=0.0, warn=print):
    telemetry = Telemetry(run, start_step, scratch, warn)
    for step in steps:
        telemetry.log(TRAIN, step, {"training_loss": step + value, "learning_rate": 0.5})
        if step % 4 == 0:
            telemetry.log(EVAL, step, {"lm_example_loss": -step - value})
    return telemetry


def board(run, kind):
    """Scalars of a TensorBoard directory: name to (step, value) pairs."""
    events = EventAccumulator(str(Path(run.path) / SUMMARIES / kind)).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_metrics_go_to_lines_and_to_tensorboard(run, tmp_path):
    log_steps(run, tmp_path, 0, (2, 4)).finish({})
    assert read_metrics(run) == [
        {"kind": "train", "step": 2, "training_loss": 2.0, "learning_rate": 0.5},
        {"kind": "train", "step": 4, "training_loss": 4.0, "learning_rate": 0.5},
        {"kind": "eval", "step": 4, "lm_example_loss": -4.0},
    ]
    assert board(run, TRAIN) == {"training_loss": [(2, 2.0), (4, 4.0)], "learning_rate": [(2, 0.5), (4, 0.5)]}
    assert board(run, EVAL) == {"lm_example_loss": [(4, -4.0)]}


def test_an_installed_tensorflow_is_not_loaded(run, tmp_path):
    """TensorBoard would, half a gigabyte and seconds of it in every worker."""
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow is loaded')")
    code = f"""
from pathlib import Path
from raybert.storage import Directory
from raybert.telemetry import Telemetry
telemetry = Telemetry(Directory({run.uri!r}), 0, Path({str(tmp_path)!r}), print)
telemetry.log("train", 1, {{"training_loss": 2.0}})
telemetry.close()
"""
    path = f"{tmp_path}:{Path(raybert.__file__).parents[1]}"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, check=True)
    assert board(run, TRAIN) == {"training_loss": [(1, 2.0)]}


@pytest.mark.parametrize("start_step", [0, 1, 4, 5, 8, 10])
def test_what_was_logged_after_the_start_is_dropped(run, tmp_path, start_step):
    log_steps(run, tmp_path, 0, (2, 4, 6, 8)).close()
    steps = range(start_step + 1, 11)
    log_steps(run, tmp_path, start_step, steps, value=0.25).finish({})
    expected = [(step, float(step)) for step in (2, 4, 6, 8) if step <= start_step]
    expected += [(step, step + 0.25) for step in steps]
    rows = [row for row in read_metrics(run) if row["kind"] == "train"]
    assert [(row["step"], row["training_loss"]) for row in rows] == expected
    if steps:
        assert board(run, TRAIN)["training_loss"] == expected


def test_a_line_that_was_cut_off_is_dropped(run, tmp_path):
    log_steps(run, tmp_path, 0, (2, 4)).close()
    with (Path(run.path) / METRICS).open("a") as file:
        file.write('{"kind": "train", "step": 5, "trai')
    assert [row["step"] for row in read_metrics(run)] == [2, 4, 4]
    log_steps(run, tmp_path, 4, (6,)).close()
    assert [row["step"] for row in read_metrics(run)] == [2, 4, 4, 6]


@pytest.mark.parametrize(
    "damage", [b"\xcd\x00\xff", b"", b"{}", b"[1]", b"5", b'{"kind": "eval", "step": "x"}', b'{"st']
)
def test_lines_that_cannot_be_read_are_left_out_and_told(run, tmp_path, damage):
    log_steps(run, tmp_path, 0, (2, 6)).close()
    path, told = Path(run.path) / METRICS, []
    first, *rest = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, damage, *rest, b""]))
    log_steps(run, tmp_path, 6, (8,), warn=told.append).close()
    assert [row["step"] for row in read_metrics(run)] == [2, 6, 8, 8]
    (text,) = told
    assert "1 lines cannot be read" in text and "line 2" in text


def test_a_run_without_metrics_has_none(run):
    assert read_metrics(run) == []


def test_the_training_summary_is_model_gardens(run, tmp_path, trained):
    _, result, _ = trained
    log_steps(run, tmp_path, 0, ()).finish(training_summary(7, result.train, result.evaluation))
    summary = json.loads((Path(run.path) / SUMMARIES / SUMMARY).read_text())
    assert summary["total_training_steps"] == 7
    assert summary["train_loss"] == summary["last_train_metrics"] == result.train["training_loss"]
    for name in ("masked_lm_accuracy", "lm_example_loss", "next_sentence_accuracy", "next_sentence_loss"):
        assert summary[name] == result.train[name]
    assert summary["eval_metrics"] == result.evaluation


def test_a_summary_of_masked_lm_only_has_no_next_sentence():
    summary = training_summary(7, {"training_loss": 1.0, "masked_lm_accuracy": 0.5, "lm_example_loss": 1.0}, None)
    assert not any("next_sentence" in name for name in summary) and "eval_metrics" not in summary


def test_a_run_elsewhere_is_read_as_it_is(run, tmp_path):
    log_steps(run, tmp_path, 0, (2,)).close()
    Path(run.path).rename(tmp_path / "elsewhere")
    assert [row["step"] for row in read_metrics(Directory(str(tmp_path / "elsewhere")))] == [2]
