"""Cross-entropy by parts is that of all logits at once, and never has them all."""

import pytest
import torch
import torch.nn.functional as F
from allocations import peak_bytes

from raybert import projection
from raybert.projection import Projection, cross_entropy_sums

ROWS, WIDTH, VOCAB_SIZE = 5, 8, 40


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(projection, "PART_LOGITS", ROWS * VOCAB_SIZE + VOCAB_SIZE // 2)


def example(num_tokens, dtype=torch.float32, vocab_size=VOCAB_SIZE):
    """Leaves that want gradients, labels of which half are predicted right, and weights of which some are 0."""
    random = torch.Generator().manual_seed(0)
    hidden, table = (torch.randn(n, WIDTH, generator=random, dtype=dtype) for n in (num_tokens, vocab_size))
    bias = torch.randn(vocab_size, generator=random, dtype=dtype)
    leaves = Projection(*(x.requires_grad_() for x in (2 * hidden, table, bias)))
    labels = torch.randint(0, vocab_size, (num_tokens,), generator=random)
    labels[::2] = leaves.logits().argmax(-1)[::2]
    weights = torch.rand(num_tokens, generator=random, dtype=torch.float64) * (torch.arange(num_tokens) % 4 > 0)
    return leaves, labels, weights


def plain_sums(leaves, labels, weights):
    """All logits at once, by autograd."""
    logits = leaves.logits()
    precise = logits if logits.dtype == torch.float64 else logits.float()
    losses, is_right = F.cross_entropy(precise, labels, reduction="none"), logits.argmax(-1) == labels
    return (weights * losses).sum(), (weights * is_right).sum()


def gradients(sums, example, scale=1.0):
    """What backward from the loss, times a scale, leaves."""
    leaves, *_ = example
    return torch.autograd.grad(scale * sums(*example)[0], leaves)


@pytest.mark.parametrize("num_tokens", [0, 1, ROWS - 1, ROWS, ROWS + 1, 4 * ROWS, 4 * ROWS + 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_sums_and_gradients_are_those_of_all_logits_at_once(num_tokens, dtype, tolerance):
    ours, theirs = (sums(*example(num_tokens, dtype)) for sums in (cross_entropy_sums, plain_sums))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
    assert 0 < ours[1] < ours[0] or num_tokens < 2
    pairs = (gradients(sums, example(num_tokens, dtype), scale=0.3) for sums in (cross_entropy_sums, plain_sums))
    for our_grad, their_grad in zip(*pairs, strict=True):
        torch.testing.assert_close(our_grad, their_grad, rtol=tolerance, atol=tolerance)
        assert our_grad.any() == (num_tokens > 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_is_as_precise_as_all_logits_at_once(dtype):
    """Loss, and each gradient against the true one; gradients have the types of their leaves."""

    def lowered(sums):
        def under_autocast(*example):
            with torch.autocast("cpu", dtype):
                return sums(*example)

        return under_autocast

    num_tokens = 6 * ROWS + 1
    true_loss, true = plain_sums(*example(num_tokens))[0], gradients(plain_sums, example(num_tokens))
    ours, theirs = lowered(cross_entropy_sums), lowered(plain_sums)
    torch.testing.assert_close(ours(*example(num_tokens)), theirs(*example(num_tokens)), rtol=1e-6, atol=0)
    assert ours(*example(num_tokens))[0] != true_loss
    errors = [
        [torch.dist(grad, exact) / exact.norm() for grad, exact in zip(found, true, strict=True)]
        for found in (gradients(ours, example(num_tokens)), gradients(theirs, example(num_tokens)))
    ]
    for our_error, their_error in zip(*errors, strict=True):
        assert 0 < our_error < 1.3 * their_error
    assert [grad.dtype for grad in gradients(ours, example(num_tokens))] == [torch.float32] * 3


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**24])
def test_any_scale_of_the_loss_keeps_the_gradients_of_fp16(scale):
    """Those of a global batch of millions of tokens, and those under a loss scale that fp16 could not hold."""
    with torch.autocast("cpu", torch.float16):
        plain, scaled = (gradients(cross_entropy_sums, example(3 * ROWS), by) for by in (1.0, scale))
    for grad, expected in zip(scaled, plain, strict=True):
        torch.testing.assert_close(grad, scale * expected, rtol=1e-6, atol=0)


def test_hidden_states_in_low_precision_get_gradients_in_it():
    (hidden, table, bias), labels, weights = example(ROWS + 1)
    low = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = cross_entropy_sums(Projection(low, table, bias), labels, weights)
    loss.backward()
    assert (low.grad.dtype, table.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_hundred_parts_take_the_memory_of_one(autocast, monkeypatch):
    """Forward and backward; beyond it there are the gradients, and 64 bytes a token."""
    vocab_size, num_rows, num_parts = 3000, 20, 100
    monkeypatch.setattr(projection, "PART_LOGITS", num_rows * vocab_size)

    def peak_of(sums, num_tokens):
        leaves, labels, weights = example(num_tokens, vocab_size=vocab_size)

        def trained():
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss, _ = sums(leaves, labels, weights)
            torch.autograd.grad(loss, leaves)

        return peak_bytes(trained)

    one, many = (peak_of(cross_entropy_sums, num_rows * count) for count in (1, num_parts))
    table_bytes = 4 * vocab_size * (WIDTH + 1)
    assert many <= one + 2 * table_bytes + 64 * num_rows * num_parts
    assert peak_of(plain_sums, num_rows * num_parts) > 15 * many
