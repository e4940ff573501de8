import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from raybert.config import ModelConfig, OptimizerConfig
from raybert.errors import UserError
from raybert.model import BertForPreTraining
from raybert.optim import (
    Lamb,
    build_optimizer,
    check_optimizer_config,
    gradient_norm,
    learning_rate,
    parameter_groups,
    update,
)

CONFIG = OptimizerConfig(learning_rate=2e-3, warmup_steps=10)
TINY = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=8,
)


@pytest.mark.parametrize("end_lr", [0.0, 5e-4])
@pytest.mark.parametrize(
    ("warmup_steps", "num_steps"), [(0, 1), (0, 7), (1, 7), (2, 7), (6, 7), (10, 1000), (999, 1000)]
)
def test_learning_rate_rises_and_falls_in_straight_lines_without_a_jump(warmup_steps, num_steps, end_lr):
    config = replace(CONFIG, warmup_steps=warmup_steps, end_lr=end_lr)
    rates = [learning_rate(step, config, num_steps) for step in range(num_steps + 1)]
    peak_step = max(warmup_steps - 1, 0)
    assert rates[peak_step] == config.learning_rate == max(rates)
    assert rates[num_steps] == end_lr
    assert min(rates[:num_steps]) > 0
    up, down = np.diff(rates[: peak_step + 1]), np.diff(rates[peak_step:])
    np.testing.assert_allclose(up, config.learning_rate / max(warmup_steps, 1), rtol=1e-9)
    np.testing.assert_allclose(down, (end_lr - config.learning_rate) / (num_steps - peak_step), rtol=1e-9)


def test_learning_rate_at_known_steps():
    assert [learning_rate(step, CONFIG, 109) for step in (0, 4, 9, 59, 109)] == pytest.approx(
        [2e-4, 1e-3, 2e-3, 1e-3, 0.0]
    )


@pytest.mark.parametrize(
    ("changes", "num_steps", "message"),
    [
        ({"warmup_steps": 100}, 100, "warmup_steps=100 and num_steps=100; lower warmup_steps"),
        ({"warmup_steps": -1}, 100, "raise warmup_steps"),
        ({}, 0, "num_steps must be at least 1"),
        ({"learning_rate": 0.0}, 100, "learning_rate must be positive, got 0.0"),
        ({"learning_rate": math.nan}, 100, "learning_rate"),
        ({"learning_rate": math.inf}, 100, "learning_rate"),
        ({"end_lr": -1e-5}, 100, "end_lr must be at least 0"),
        ({"weight_decay": -0.1}, 100, "weight_decay"),
        ({"beta_1": 1.0}, 100, r"beta_1 must be in \[0, 1\), got 1.0"),
        ({"beta_2": -0.5}, 100, "beta_2"),
        ({"epsilon": 0.0}, 100, "epsilon"),
        ({"max_grad_norm": -1.0}, 100, "max_grad_norm"),
        ({"type": "sgd"}, 100, "one of adamw, lamb, got 'sgd'"),
    ],
)
def test_what_could_not_train_is_refused(changes, num_steps, message):
    check_optimizer_config(CONFIG, 100)
    with pytest.raises(UserError, match=message):
        check_optimizer_config(replace(CONFIG, **changes), num_steps)


@pytest.mark.parametrize("use_next_sentence", [True, False])
def test_biases_and_layer_norms_are_not_decayed(use_next_sentence):
    model = BertForPreTraining(TINY, use_next_sentence)
    decayed, undecayed = parameter_groups(model, 0.01)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.01, 0.0)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = [name for name in trained if name.endswith("bias") or "LayerNorm" in name]
    assert {"cls.predictions.bias", "cls.predictions.transform.LayerNorm.weight"} <= set(expected)
    ids = {id(parameter) for parameter in undecayed["params"]}
    assert [name for name, parameter in trained.items() if id(parameter) in ids] == expected
    assert len(decayed["params"]) + len(undecayed["params"]) == len(trained)


def small_problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"kernel": (4, 3), "bias": (3,), "zeros": (2, 2)}
    params = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    params["zeros"].data.zero_()
    grads = [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(12)]
    return params, grads


def run(optimizer, params, grads, first=0):
    for step, gradients in enumerate(grads, start=first):
        for name, parameter in params.items():
            parameter.grad = gradients[name].clone()
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (step + 1)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in params.items()}


def groups_of(params, weight_decay):
    return parameter_groups(nn.ParameterDict(params), weight_decay)


def lamb_by_the_paper(weights, gradients, vector, weight_decay, beta_1=0.9, beta_2=0.999, eps=1e-6):
    """You et al. 2020, algorithm 2, one tensor, moments written as sums over all gradients so far."""
    w = weights.astype(np.float64)
    for t in range(1, len(gradients) + 1):
        past = np.stack(gradients[:t]).astype(np.float64)
        age = np.arange(t)[::-1].reshape(-1, *[1] * w.ndim)
        m_hat = (past * beta_1**age).sum(0) / (beta_1**age).sum()  # bias correction is division by the sum of weights
        v_hat = (past**2 * beta_2**age).sum(0) / (beta_2**age).sum()
        u = m_hat / (np.sqrt(v_hat) + eps) + (0 if vector else weight_decay) * w
        norm_w, norm_u = np.sqrt((w**2).sum()), np.sqrt((u**2).sum())
        ratio = 1.0 if vector or norm_w == 0 or norm_u == 0 else norm_w / norm_u
        w = w - 0.05 / t * ratio * u
    return w


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_lamb_follows_the_paper(weight_decay):
    params, grads = small_problem()
    start = {name: parameter.detach().numpy().copy() for name, parameter in params.items()}
    result = run(Lamb(groups_of(params, weight_decay), lr=1.0), params, grads)
    for name in params:
        expected = lamb_by_the_paper(start[name], [g[name].numpy() for g in grads], name == "bias", weight_decay)
        np.testing.assert_allclose(result[name].numpy(), expected, rtol=2e-5, atol=1e-6, err_msg=name)


def test_lamb_without_a_gradient_moves_nothing_and_divides_by_no_norm():
    params, grads = small_problem()
    zero = [{name: torch.zeros_like(gradient) for name, gradient in grads[0].items()}]
    before = {name: parameter.detach().clone() for name, parameter in params.items()}
    after = run(Lamb(groups_of(params, 0.0), lr=1.0), params, zero)
    assert all(torch.equal(before[name], after[name]) for name in params)


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_resumed_optimizer_is_bitwise_the_uninterrupted_one(kind):
    config = replace(CONFIG, type=kind)
    params, grads = small_problem()
    expected = run(build_optimizer(nn.ParameterDict(params), config), params, grads)
    for cut in range(len(grads)):
        params, grads = small_problem()
        interrupted = build_optimizer(nn.ParameterDict(params), config)
        weights = run(interrupted, params, grads[:cut])
        copies = {name: nn.Parameter(weight) for name, weight in weights.items()}
        resumed = build_optimizer(nn.ParameterDict(copies), config)
        resumed.load_state_dict(interrupted.state_dict())
        result = run(resumed, copies, grads[cut:], first=cut)
        assert all(torch.equal(result[name], expected[name]) for name in expected), cut


def test_adamw_decays_before_the_adam_step_and_only_kernels():
    params, grads = small_problem()
    w, bias = params["kernel"].detach().clone(), params["bias"].detach().clone()
    optimizer = build_optimizer(nn.ParameterDict(params), CONFIG)
    result = run(optimizer, params, grads[:1])
    direction = {name: g / (g.abs() + CONFIG.epsilon) for name, g in grads[0].items()}  # the first step's m / sqrt(v)
    torch.testing.assert_close(result["kernel"], w * (1 - 0.05 * 0.01) - 0.05 * direction["kernel"])
    torch.testing.assert_close(result["bias"], bias - 0.05 * direction["bias"])


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
@pytest.mark.parametrize(("max_norm", "factor"), [(1.0, 0.2), (2.5, 0.5), (5.1, 1.0), (0.0, 1.0)])
def test_gradients_are_clipped_by_their_common_norm(max_norm, factor, kind):
    """The update is that of gradients times a factor; with an epsilon that is not small their size matters."""
    config = replace(CONFIG, type=kind, epsilon=0.5)
    results = []
    for norm, scale in ((max_norm, 1.0), (0.0, factor)):
        parameters = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2, 1)), nn.Parameter(torch.ones(3))]
        optimizer = build_optimizer(nn.ParameterList(parameters), config)
        for _ in range(3):
            parameters[0].grad, parameters[1].grad = torch.tensor([3.0]) * scale, torch.tensor([[4.0], [0.0]]) * scale
            found = gradient_norm(optimizer)
            assert found.item() == pytest.approx(5.0 * scale)
            assert not update(optimizer, found, norm)
        assert parameters[2].grad is None and torch.equal(parameters[2], torch.ones(3))
        results.append(torch.cat([parameter.detach().ravel() for parameter in parameters]))
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)
    assert (results[0][:2] != 1).all()


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_a_norm_that_is_not_finite_makes_no_update(kind):
    parameter = nn.Parameter(torch.ones(2, 1))
    optimizer = build_optimizer(nn.ParameterList([parameter]), replace(CONFIG, type=kind))
    parameter.grad = torch.tensor([[1.0], [math.inf]])
    assert gradient_norm(optimizer).item() == math.inf
    assert update(optimizer, gradient_norm(optimizer), 1.0)
    assert torch.equal(parameter, torch.ones(2, 1))
