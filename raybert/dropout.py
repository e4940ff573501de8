"""Dropout: elements are zeroed by chance, the others scaled up (Srivastava et al. 2014, section 10).

On a CPU drawing the random numbers is what it costs, so there they come from a counter, 16 bits an element, in compiled
code: the generator is SplitMix64, seeded from torch's, so `torch.manual_seed` decides.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybert.jit import compiled
from raybert.splitmix import STEP, mixed

LANES = 4  # elements that one draw of 64 bits is for
_mixed = compiled(mixed)
_BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


class Dropout(nn.Module):
    """Dropout while training.

    Args:
        p: chance that an element is zeroed, to 1/65,536 on a CPU.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x

    def extra_repr(self) -> str:
        return f"p={self.p}"


def dropout(x: Tensor, p: float) -> Tensor:
    """x with elements zeroed by chance `p`, the others times 1 / (1 - p)."""
    if p == 0:
        return x
    return x * keep_mask(x.shape, p, x.dtype) if x.device.type == "cpu" else F.dropout(x, p)


def keep_mask(shape: torch.Size, p: float, dtype: torch.dtype) -> Tensor:
    """Factors of dropout on the CPU: 0 by chance `p`, else 1 / (1 - p)."""
    num_elements = shape.numel()
    mask = torch.empty(-(-num_elements // LANES) * LANES, dtype=dtype)
    (kept,) = torch.tensor([1 / (1 - p)], dtype=dtype).view(_BITS[dtype]).numpy()
    (seed,) = torch.empty(1, dtype=torch.int64).random_().numpy()
    _fill(mask.view(_BITS[dtype]).numpy(), np.uint64(seed), np.uint16(round(p * 65536)), kept)
    return mask[:num_elements].view(shape)


@compiled
def _fill(mask: np.ndarray, seed: np.uint64, threshold: np.uint16, kept: np.integer) -> None:
    """Put `kept` into a mask, 0 by chance `threshold` / 65,536."""
    dropped = kept - kept
    for draw in range(len(mask) // 4):
        z = _mixed(seed + np.uint64(draw) * STEP)
        for lane in range(4):
            bits = np.uint16(z >> np.uint64(16 * lane))
            mask[4 * draw + lane] = kept if bits >= threshold else dropped
