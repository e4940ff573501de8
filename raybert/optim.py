"""AdamW and LAMB without decay on biases and LayerNorms, gradient clipping, and the learning rate as a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from raybert.config import OptimizerConfig
from raybert.errors import UserError


def check_optimizer_config(config: OptimizerConfig, num_steps: int) -> None:
    """Refuses an optimizer that could not train for num_steps steps.

    Raises:
        UserError: naming the rule, the value and the remedy.
    """
    inf = float("inf")
    if num_steps < 1:
        raise UserError(f"num_steps must be at least 1, got {num_steps}; raise num_steps.")
    if config.type not in _OPTIMIZERS:
        raise UserError(f"optimizer.type must be one of {', '.join(_OPTIMIZERS)}, got {config.type!r}; choose one.")
    if not 0 <= config.warmup_steps < num_steps:
        raise UserError(
            f"warmup_steps must be at least 0 and below num_steps, got warmup_steps={config.warmup_steps} and "
            f"num_steps={num_steps}; {'lower' if config.warmup_steps > 0 else 'raise'} warmup_steps."
        )
    if not 0 < config.learning_rate < inf:
        raise UserError(f"learning_rate must be positive, got {config.learning_rate}; 1e-4 is BERT's.")
    for name in ("beta_1", "beta_2"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{name} must be in [0, 1), got {getattr(config, name)}; 0.9 and 0.999 are BERT's.")
    if not 0 < config.epsilon < inf:
        raise UserError(f"epsilon must be positive, got {config.epsilon}; 1e-6 is BERT's.")
    for name in ("end_lr", "weight_decay", "max_grad_norm"):
        if not 0 <= getattr(config, name) < inf:
            raise UserError(f"{name} must be at least 0, got {getattr(config, name)}; 0 turns it off.")


def learning_rate(step: int, config: OptimizerConfig, num_steps: int) -> float:
    """The learning rate of the update made in `step` (from 0), linear up and then linear down, without a jump.

    Step s of the warm-up has learning_rate * (s + 1) / warmup_steps: the first update already moves, and the last step
    of the warm-up has the peak. From there (from step 0 without a warm-up) the line falls to end_lr at step num_steps,
    the first that is not run: with end_lr 0 the last update moves too. As PolynomialDecay of power 1 in
    google-research/bert, but re-based at the peak instead of at step 0.
    """
    peak, end = config.learning_rate, config.end_lr
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    peak_step = max(config.warmup_steps - 1, 0)
    remaining = max(num_steps - step, 0) / (num_steps - peak_step)
    return end + (peak - end) * remaining


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of the trained parameters: kernels and tables, with decay, then biases and LayerNorms, without.

    The latter are exactly the vectors (the masked LM head's LayerNorm and its bias [V] among them).
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over `parameter_groups`; set `lr` of both groups before every step.

    The model must already be on its device.
    """
    return _OPTIMIZERS[config.type](parameter_groups(model, config.weight_decay), config)


def _build_adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    # The fused kernel is the fastest on CPUs too (2 to 3 times foreach), and was bitwise the same with 1 and 2 threads.
    betas = (config.beta_1, config.beta_2)
    return torch.optim.AdamW(groups, config.learning_rate, betas=betas, eps=config.epsilon, fused=True)


def _build_lamb(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    return Lamb(groups, config.learning_rate, betas=(config.beta_1, config.beta_2), eps=config.epsilon)


_OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimizerConfig], torch.optim.Optimizer]] = {
    "adamw": _build_adamw,
    "lamb": _build_lamb,
}


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, algorithm 2, phi(z) = z), in the version of TensorFlow Addons that Model Garden uses.

    The Adam direction with bias correction plus weight_decay * w, scaled to the norm of w for each kernel or table.
    Vectors (biases, LayerNorms) are not scaled, as Model Garden excludes from adaptation what it excludes from decay;
    nor is a tensor whose norm, or whose update's norm, is 0. State names are those of AdamW.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]] | Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient; a closure is not supported."""
        assert closure is None
        for group in self.param_groups:
            params: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
            if params:
                updates = self._directions(params, group)
                torch._foreach_mul_(updates, _trust_ratios(params, updates))
                torch._foreach_add_(params, updates, alpha=-group["lr"])

    def _directions(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Moves the moments on and returns the unscaled updates."""
        beta_1, beta_2 = group["betas"]
        states = [self._state_of(parameter) for parameter in params]
        grads = [parameter.grad for parameter in params if parameter.grad is not None]
        means, squares = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        torch._foreach_add_([state["step"] for state in states], 1)
        steps = [state["step"].item() for state in states]
        torch._foreach_lerp_(means, grads, 1 - beta_1)
        torch._foreach_mul_(squares, beta_2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta_2)
        roots = torch._foreach_div(squares, [1 - beta_2**step for step in steps])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(means, [1 - beta_1**step for step in steps])
        torch._foreach_div_(updates, roots)
        torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        return list(updates)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)  # stays on the host, as AdamW's: reading it does not wait for the device
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def _trust_ratios(params: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
    """||w|| / ||update|| for each tensor, as 0-d tensors; 1 for vectors and where either norm is 0."""
    norms, update_norms = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(updates))
    ratios = torch.where((norms > 0) & (update_norms > 0), norms / update_norms, 1.0)
    return [ratio if param.ndim > 1 else torch.ones_like(ratio) for ratio, param in zip(ratios, params, strict=True)]


def update(optimizer: torch.optim.Optimizer, grad_norm: Tensor, max_norm: float) -> Tensor:
    """One update by gradients scaled down so that their common 2-norm is at most max_norm; 0 only measures.

    None is made, of weights, moments and their count alike, where the norm is not finite. AdamW does not wait for the
    device to know; LAMB does.

    Args:
        optimizer: from `build_optimizer`.
        grad_norm: 0-d, of all gradients.
        max_norm: of the gradients that the optimizer sees.

    Returns:
        0-d bool on the device, whether the update was skipped.
    """
    is_skipped = ~torch.isfinite(grad_norm)
    # As torch's clip_grad_norm_ has it, but one over it.
    divisor = ((grad_norm + 1e-6) / max_norm).clamp(min=1.0) if max_norm else torch.ones_like(grad_norm)
    if isinstance(optimizer, Lamb):
        if not is_skipped:
            torch._foreach_div_(_gradients(optimizer), divisor)
            optimizer.step()
        return is_skipped
    fused: Any = optimizer  # GradScaler's way into the kernel, which then reads the gradients once
    fused.grad_scale, fused.found_inf = divisor.float(), is_skipped.float()
    fused.step()
    return is_skipped


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    params = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [parameter.grad for parameter in params if parameter.grad is not None]


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """The common 2-norm of all gradients, 0-d, on the device; does not wait for it."""
    return nn.utils.get_total_norm(_gradients(optimizer))
