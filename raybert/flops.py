"""Floating point operations of training, and how many a device can do: what model FLOPs utilization (MFU) divides.

MFU is as in PaLM (Chowdhery et al. 2022, appendix B): operations that the model needs, over what the devices could have
done in the same time. Counted are the matrix products of a forward and a backward pass, a multiply-add as two, over
real tokens, and behind the last attention over those that a loss looks at; what is recomputed, and work on padding, is
not. Embedding lookups, softmax, LayerNorm, dropout and the optimizer are left out, as there. Products in fp8 count as
those in bf16, whose peak is half as high.

Letters: B samples, T real tokens, M masked tokens, D hidden, F feed-forward, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from raybert.config import ModelConfig


def training_flops(
    model: ModelConfig, use_next_sentence: bool, lengths: npt.NDArray[np.integer], num_masked: int
) -> int:
    """Operations of one forward and backward pass.

    Args:
        model: sizes.
        use_next_sentence: whether pooler and next sentence head are trained.
        lengths: [B] real tokens of each sample; a sample without any costs nothing.
        num_masked: masked tokens of non-zero weight, M.
    """
    width = model.hidden_size
    num_tokens, num_samples = int(lengths.sum()), int(np.count_nonzero(lengths))
    num_pairs = int(np.square(lengths.astype(np.int64)).sum())  # of a query and a key that it may see
    num_wanted = num_masked + (num_samples if use_next_sentence else 0)  # behind the last layer's attention
    inputs = 2 * num_tokens * 3 * width * width  # queries, keys, values
    attention = 2 * 2 * num_pairs * width  # scores, and the weighted sum of values
    outputs = 2 * (width * width + 2 * width * model.intermediate_size)  # of a token
    num_outputs = (model.num_hidden_layers - 1) * num_tokens + num_wanted
    masked_lm = 2 * num_masked * (width * width + width * model.vocab_size)
    next_sentence = 2 * num_samples * (width * width + 2 * width) if use_next_sentence else 0
    # Backward is two products of the same size for each one: the gradients of its two factors.
    layers = model.num_hidden_layers * (inputs + attention) + num_outputs * outputs
    return 3 * (layers + masked_lm + next_sentence)


PRECISIONS = ("bf16", "fp16", "fp32")
PEAK_TFLOPS: dict[str, tuple[float | None, float, float]] = {
    # By torch's name of the device without the maker: dense, from NVIDIA's data sheets. 16 bit is that of tensor cores
    # with fp32 accumulation; fp32 is that of CUDA cores, since torch leaves TF32 off. Volta and Turing have no bf16.
    "H200": (989.4, 989.4, 66.9),
    "H100 80GB HBM3": (989.4, 989.4, 66.9),
    "H100 PCIe": (756.0, 756.0, 51.2),
    "A100-SXM4-40GB": (312.0, 312.0, 19.5),
    "A100-SXM4-80GB": (312.0, 312.0, 19.5),
    "A100-PCIE-40GB": (312.0, 312.0, 19.5),
    "A100 80GB PCIe": (312.0, 312.0, 19.5),
    "L40S": (362.0, 362.0, 91.6),
    "L4": (121.0, 121.0, 30.3),
    "A10G": (70.0, 70.0, 31.5),
    "T4": (None, 65.0, 8.1),
    "V100-SXM2-16GB": (None, 125.0, 15.7),
    "V100-SXM2-32GB": (None, 125.0, 15.7),
    "V100-PCIE-16GB": (None, 112.0, 14.0),
    "V100-PCIE-32GB": (None, 112.0, 14.0),
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Operations a second that a device can do at most; None if that is not known.

    A name must be known whole: variants and slices (MIG) of a device have other peaks.

    Args:
        device_name: torch.cuda.get_device_name's.
        precision: bf16, fp16 or fp32.
    """
    name = device_name.removeprefix("NVIDIA ").removeprefix("Tesla ")
    peak = dict(zip(PRECISIONS, PEAK_TFLOPS.get(name, ()), strict=False)).get(precision)
    return None if peak is None else peak * 1e12
