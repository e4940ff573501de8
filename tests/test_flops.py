"""The operations that are counted are those that the model does, and only those of real tokens."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import TINY_MODEL
from ranks import run_ranks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from raybert.batch import pack
from raybert.config import ModelConfig, TrainingConfig
from raybert.flops import PEAK_TFLOPS, peak_flops, training_flops
from raybert.loop import Meter
from raybert.loss import Sums
from raybert.model import BertForPreTraining
from raybert.step import StepResult

WIDE = ModelConfig(
    vocab_size=211,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=80,
    max_position_embeddings=40,
)


def measured_flops(model, use_next_sentence, num_samples, seq_length, num_masked):
    """What torch counts in a forward and backward of the real model, every sample full."""
    bert = BertForPreTraining(model, use_next_sentence)
    ids = np.ones((num_samples, seq_length), np.int32)
    tokens, *_ = pack(ids, ids * 0, ids == 1)
    # The plain kernel: those that compute scores again in backward count it, which the model does not need.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        projection, nsp_logits = bert(tokens, torch.arange(num_masked))
        (projection.logits().sum() + (nsp_logits.sum() if use_next_sentence else 0)).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("use_next_sentence", [True, False])
@pytest.mark.parametrize(
    ("model", "num_samples", "seq_length", "num_masked"),
    [(TINY_MODEL, 1, 16, 4), (TINY_MODEL, 5, 7, 1), (WIDE, 3, 40, 11), (WIDE, 2, 1, 2)],
)
def test_what_is_counted_is_what_the_model_does(model, use_next_sentence, num_samples, seq_length, num_masked):
    counted = training_flops(model, use_next_sentence, np.full(num_samples, seq_length), num_masked)
    assert counted == measured_flops(model, use_next_sentence, num_samples, seq_length, num_masked)


def test_padding_is_not_counted():
    """Samples cost what they cost alone, whatever they are padded to; one without tokens costs nothing."""
    lengths = [3, 16, 9, 1]
    alone = sum(training_flops(TINY_MODEL, True, np.array([length]), 2) for length in lengths)
    assert training_flops(TINY_MODEL, True, np.array([*lengths, 0, 0], np.uint16), 8) == alone


def test_large_counts_do_not_wrap():
    """Lengths of a narrow type; sums beyond 2**31 of them; a product beyond 2**63 is still exact."""
    lengths = np.full(70_000, 512, np.uint16)
    assert training_flops(ModelConfig(), True, lengths, 76 * 70_000) == 70_000 * training_flops(
        ModelConfig(), True, np.array([512]), 76
    )
    huge = replace(ModelConfig(), hidden_size=2**20, intermediate_size=2**22)
    assert training_flops(huge, True, lengths, 0) > 2**63


def test_a_parameter_costs_six_operations_a_token():
    """Kaplan et al. 2020, section 2.1, for BERT-base's encoder at a length where attention is small."""
    encoder = 12 * (4 * 768**2 + 2 * 768 * 3072)
    head = 768**2 + 768 * 30522
    flops = training_flops(ModelConfig(), False, np.array([128]), num_masked=128) - 6 * head * 128
    assert flops == pytest.approx(6 * encoder * 128, rel=0.03) and flops > 6 * encoder * 128


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "fp16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("A100-SXM4-40GB", "bf16", 312),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("Tesla T4", "fp16", 65),
        ("Tesla T4", "bf16", None),
        ("Tesla V100-SXM2-16GB", "fp32", 15.7),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA H100", "bf16", None),
        ("NVIDIA GeForce RTX 4090", "bf16", None),
        ("CPU", "fp32", None),
        ("", "fp32", None),
    ],
)
def test_the_peak_of_a_device(name, precision, tflops):
    assert peak_flops(name, precision) == (None if tflops is None else tflops * 1e12)


def test_every_known_peak_is_of_dense_units():
    """Sixteen bit at least twice as fast as fp32, and not the doubled figure of sparse products."""
    for bf16, fp16, fp32 in PEAK_TFLOPS.values():
        assert bf16 in (None, fp16) and 2 <= fp16 / fp32 <= 17 and fp16 < 1000


def metrics_of(world, peaks):
    """Of ranks whose devices have these peaks, which take 1,000 s for twice 5,000 operations each; drained twice."""
    meter = Meter.start(world, TrainingConfig(global_batch_size=4))
    assert math.isnan(meter.peak_flops)  # a CPU's
    meter.peak_flops = peaks[world.rank]
    result = StepResult(Sums(torch.ones(6, dtype=torch.float64)), torch.ones(()), torch.tensor(False), 10, 5000)
    drained = []
    for _ in range(2):
        meter.add(result, 0.0, 0.0)
        meter.add(result, 0.0, 0.0)
        meter.started_at_s -= 1000
        drained.append(meter.drain(result)[0])
    return drained


def test_mfu_is_of_all_ranks_devices():
    """Which may differ; where one is unknown there is no MFU, rather than 0 or that of the others."""
    tables = [[1e6], [1e6, 3e6], [1e6, math.nan], [math.nan]]
    for peaks, drained in zip(tables, run_ranks([(len(p), metrics_of, (p,)) for p in tables]), strict=True):
        for metrics in drained:  # the second as the first: draining starts over
            assert metrics["flops_per_s"] == pytest.approx(10 * len(peaks), rel=1e-3)
            assert metrics["tokens_per_s"] == pytest.approx(0.02 * len(peaks), rel=1e-3)
            if math.isfinite(sum(peaks)):
                assert metrics["mfu"] == pytest.approx(10 * len(peaks) / sum(peaks), rel=1e-3)
            else:
                assert "mfu" not in metrics
