"""Training in fp8, which torchao emulates on CPUs, is near training in bf16, and nothing but the products changes."""

import sys
from dataclasses import replace

import pytest
import torch
from helpers import TINY_MODEL, take_step

from raybert.checkpoint import Writer, host_copy, restore
from raybert.config import OptimizerConfig, TrainingConfig
from raybert.errors import UserError
from raybert.feed import Layout, local_batches
from raybert.float8 import use_float8
from raybert.history import begin_attempt
from raybert.manifest import open_checkpoint
from raybert.order import SampleOrder
from raybert.step import create_state
from raybert.world import World

MODEL = replace(TINY_MODEL, num_hidden_layers=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
TRAINING = TrainingConfig(num_steps=20, global_batch_size=32, micro_batch_size=8, precision="bf16")
OPTIMIZER = OptimizerConfig(learning_rate=1e-2)


def make_state(is_float8, training=TRAINING):
    state = create_state(MODEL, training, OPTIMIZER, World())
    if is_float8:
        use_float8(state.model.bert.encoder, emulate=True)
    return state


def trained(state, index, num_steps, training=TRAINING):
    """The losses of steps."""
    order = SampleOrder(index.page_sizes, seed=3, global_batch_size=32, window_steps=4)
    batches = local_batches(Layout(order, 1, state.step, state.step + num_steps), index)
    results = [take_step(state, batch, training, OPTIMIZER, World()) for batch in batches]
    assert not any(result.skipped for result in results)
    return torch.tensor([result.sums.metrics()["loss"] for result in results])


def weights(state):
    return torch.cat([parameter.detach().ravel() for parameter in state.model.parameters()])


def test_losses_are_near_those_of_bf16(index):
    bf16, fp8 = make_state(False), make_state(True)
    torch.testing.assert_close(trained(fp8, index, 20), trained(bf16, index, 20), rtol=1e-2, atol=0)
    distance = torch.dist(weights(fp8), weights(bf16)) / torch.dist(weights(bf16), weights(make_state(False)))
    assert 0 < distance < 0.3


def test_only_products_of_all_tokens_are_in_fp8():
    """All of the layers but those behind the last attention; the embeddings and heads stay."""
    modules = make_state(True).model.named_modules()
    parts = ("attention.self.query", "attention.self.key", "attention.self.value")
    rest = ("attention.output.dense", "intermediate.dense", "output.dense")
    assert sorted(name for name, module in modules if type(module).__name__ == "Float8Linear") == sorted(
        f"bert.encoder.layer.{layer}.{part}" for layer in range(3) for part in (parts if layer == 2 else parts + rest)
    )


def test_checkpoints_know_nothing_of_it(index, run):
    """One of a run in fp8 goes on in fp8, bitwise, and has the names and types of one in bf16."""
    state = make_state(True)
    names = {name: (tensor.shape, tensor.dtype) for name, tensor in make_state(False).model.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in state.model.state_dict().items()} == names
    trained(state, index, 3)
    begin_attempt(run, 1, 0, None)
    name = Writer(run, 1, MODEL, None, {}, keep=0).write(host_copy(state), None, [])
    resumed = make_state(True)
    restore(open_checkpoint(run, name), resumed)
    assert torch.equal(trained(resumed, index, 3), trained(state, index, 3))
    assert torch.equal(weights(resumed), weights(state))


def test_activation_checkpointing_changes_nothing(index):
    found = []
    for recomputes in (False, True):
        training = replace(TRAINING, activation_checkpointing=recomputes)
        state = make_state(True, training)
        trained(state, index, 2, training)
        found.append(weights(state))
    assert torch.equal(*found)


def test_a_device_without_fp8_is_refused():
    rule = "training.float8 needs GPUs of Ada, Hopper or later, got a CPU; set training.float8 to false"
    with pytest.raises(UserError, match=rule):
        create_state(MODEL, replace(TRAINING, float8=True), OPTIMIZER, World())


def test_without_torchao_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match="needs torchao, which is not installed; pip install torchao"):
        make_state(True)
