"""Matrix products of the encoder's layers in fp8, by torchao.

The factors of a product are rounded to 8 bits, each tensor by a scale that is found anew; what comes out, and all
between the products, stays in bf16 (Micikevicius et al. 2022, "FP8 formats for deep learning"). Rounding takes time,
least where layers are compiled; torchao measured that modules of at most 1,024 outputs and 4,096 inputs do not gain.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import nn

from raybert.errors import UserError
from raybert.model import Encoder

CAPABILITY = (8, 9)  # of the first GPUs that multiply fp8


def check_device(device: torch.device) -> None:
    """Refuses a device that does not multiply fp8.

    Raises:
        UserError: naming it.
    """
    is_gpu = device.type == "cuda"
    if not is_gpu or torch.cuda.get_device_capability(device) < CAPABILITY:
        name = torch.cuda.get_device_name(device) if is_gpu else "a CPU"
        raise UserError(
            f"training.float8 needs GPUs of Ada, Hopper or later, got {name}; set training.float8 to false."
        )


def use_float8(encoder: Encoder, emulate: bool = False) -> None:
    """Let the layers' linear modules multiply in fp8. Parameters stay, and their names.

    Left out are those behind the last attention: few tokens get there, and not always the multiple of 16 that fp8
    needs, while the tokens of a micro-batch on a GPU are one.

    Args:
        encoder: changed in place.
        emulate: round as fp8 does and multiply in fp32, on any device.

    Raises:
        UserError: torchao is not installed.
    """
    try:
        torchao: Any = importlib.import_module("torchao.float8")
    except ModuleNotFoundError:
        raise UserError(
            "training.float8 needs torchao, which is not installed; pip install torchao, or set training.float8 to "
            "false."
        ) from None
    torchao.convert_to_float8_training(
        encoder,
        module_filter_fn=partial(_gets_all_tokens, f"layer.{len(encoder.layer) - 1}."),
        config=torchao.Float8LinearConfig(emulate=emulate),
    )


def _gets_all_tokens(last: str, module: nn.Module, name: str) -> bool:
    return not name.startswith(last) or ".self." in name
