from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from raybert.loss import Sums, mlm_sums, nsp_sums, total_loss
from raybert.projection import Projection

NUM_TOKENS, NUM_SAMPLES, VOCAB_SIZE = 23, 11, 17


def example(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    mlm_logits = torch.randn(NUM_TOKENS, VOCAB_SIZE, generator=generator, dtype=dtype) * 3
    nsp_logits = torch.randn(NUM_SAMPLES, 2, generator=generator, dtype=dtype)
    mlm_labels = torch.randint(0, VOCAB_SIZE, (NUM_TOKENS,), generator=generator, dtype=torch.int32)
    nsp_labels = torch.randint(0, 2, (NUM_SAMPLES,), generator=generator, dtype=torch.int32)
    weights = torch.rand(NUM_TOKENS, generator=generator)
    return mlm_logits, mlm_labels, weights, nsp_logits, nsp_labels


def projected(mlm_logits):
    """A projection whose logits these are."""
    dtype = mlm_logits.dtype
    return Projection(mlm_logits, torch.eye(VOCAB_SIZE, dtype=dtype), torch.zeros(VOCAB_SIZE, dtype=dtype))


def sums_of(tokens=slice(None), samples=slice(None)) -> Sums:
    mlm_logits, mlm_labels, weights, nsp_logits, nsp_labels = example()
    return Sums.of(
        mlm_sums(projected(mlm_logits[tokens]), mlm_labels[tokens], weights[tokens]),
        nsp_sums(nsp_logits[samples], nsp_labels[samples]),
    )


def test_sums_are_those_of_a_plain_loop():
    mlm_logits, mlm_labels, weights, nsp_logits, nsp_labels = example()
    loss = weight = correct = 0.0
    for logits, label, w in zip(mlm_logits.double(), mlm_labels.tolist(), weights.tolist(), strict=True):
        loss += w * (logits.exp().sum().log() - logits[label]).item()
        weight += w
        correct += w * (logits.argmax().item() == label)
    sums = mlm_sums(projected(mlm_logits), mlm_labels, weights)
    assert torch.stack(sums).tolist() == pytest.approx([loss, weight, correct])
    assert [part.item() for part in nsp_sums(nsp_logits, nsp_labels)] == pytest.approx(
        [
            F.cross_entropy(nsp_logits, nsp_labels.long(), reduction="sum").item(),
            NUM_SAMPLES,
            (nsp_logits.argmax(1) == nsp_labels).sum().item(),
        ]
    )


@pytest.mark.parametrize(
    ("token_cuts", "sample_cuts"),
    [
        ([0, 23], [0, 11]),
        ([0, 1, 23], [0, 10, 11]),
        ([0, 0, 7, 7, 23], [0, 3, 6, 9, 11]),
        (range(24), [*range(12)] * 2),
    ],
)
def test_any_split_into_parts_gives_the_same_total(token_cuts, sample_cuts):
    sample_cuts = sorted(sample_cuts)  # with repeats: empty parts
    parts = [sums_of(tokens=slice(*cut), samples=slice(0, 0)) for cut in pairwise(token_cuts)]
    parts += [sums_of(tokens=slice(0, 0), samples=slice(*cut)) for cut in pairwise(sample_cuts)]
    total = sum(parts, start=Sums.zero())
    torch.testing.assert_close(total.values, sums_of().values, atol=1e-12, rtol=1e-12)
    assert total.metrics() == pytest.approx(sums_of().metrics(), rel=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shares_of_ranks_and_micro_batches_average_to_the_gradient_of_the_whole(world_size):
    mlm_logits, mlm_labels, weights, nsp_logits, nsp_labels = example()
    mlm_logits, nsp_logits = mlm_logits.requires_grad_(), nsp_logits.requires_grad_()
    token_loss = F.cross_entropy(mlm_logits, mlm_labels.long(), reduction="none")
    expected_loss = (weights * token_loss).sum() / weights.sum() + F.cross_entropy(nsp_logits, nsp_labels.long())
    expected = torch.autograd.grad(expected_loss, [mlm_logits, nsp_logits])
    losses = []
    for rank in range(world_size):
        sums = Sums.of(
            mlm_sums(projected(mlm_logits[rank::world_size]), mlm_labels[rank::world_size], weights[rank::world_size]),
            nsp_sums(nsp_logits[rank::world_size], nsp_labels[rank::world_size]),
        )
        losses.append(total_loss(sums, weights.sum().item(), NUM_SAMPLES, world_size))
    mean = torch.stack(losses).mean()
    assert mean.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    for gradient, want in zip(torch.autograd.grad(mean, [mlm_logits, nsp_logits]), expected, strict=True):
        torch.testing.assert_close(gradient, want)


def test_samples_that_fill_up_a_batch_count_in_no_sum():
    _, _, _, nsp_logits, nsp_labels = example()
    weights = torch.tensor([1] * 8 + [0] * 3, dtype=torch.int32)
    assert torch.equal(
        torch.stack(nsp_sums(nsp_logits, nsp_labels, weights)), torch.stack(nsp_sums(nsp_logits[:8], nsp_labels[:8]))
    )


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropy_is_computed_in_fp32(dtype, autocast):
    mlm_logits, mlm_labels, weights, nsp_logits, nsp_labels = example(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        low = Sums.of(mlm_sums(projected(mlm_logits), mlm_labels, weights), nsp_sums(nsp_logits, nsp_labels))
    mlm_full = mlm_sums(projected(mlm_logits.float()), mlm_labels, weights)
    full = Sums.of(mlm_full, nsp_sums(nsp_logits.float(), nsp_labels))
    torch.testing.assert_close(low.values, full.values, rtol=1e-6, atol=0)


def test_nothing_masked_makes_the_masked_lm_part_zero_and_its_gradient_too():
    mlm_logits = torch.zeros(0, VOCAB_SIZE, requires_grad=True)
    nsp_logits = torch.zeros(2, 2, requires_grad=True)
    labels, weights = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    sums = Sums.of(mlm_sums(projected(mlm_logits), labels, weights), nsp_sums(nsp_logits, torch.tensor([0, 1])))
    loss = total_loss(sums, global_weight_sum=0.0, global_num_samples=2)
    assert loss.item() == pytest.approx(torch.tensor(2.0).log().item())
    loss.backward()
    assert mlm_logits.grad is not None
    assert sums.metrics()["masked_lm_accuracy"] == 0
    assert sums.metrics()["lm_example_loss"] == 0


def test_masked_lm_alone_has_no_next_sentence_metrics():
    mlm_logits, mlm_labels, weights, _, _ = example()
    metrics = Sums.of(mlm_sums(projected(mlm_logits), mlm_labels, weights), None).metrics()
    assert metrics.keys() == {"masked_lm_accuracy", "lm_example_loss", "loss"}
    assert metrics["loss"] == metrics["lm_example_loss"]


def test_metrics_have_the_names_of_model_garden():
    assert sums_of().metrics().keys() == {
        "masked_lm_accuracy",
        "lm_example_loss",
        "next_sentence_accuracy",
        "next_sentence_loss",
        "loss",
    }
