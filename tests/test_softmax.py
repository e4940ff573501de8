"""Cross-entropy by rows: torch's own to rounding, in compiled code and anywhere."""

import pytest
import torch
import torch.nn.functional as F

from raybert.softmax import _anywhere, cross_entropy

DTYPES = {torch.float32: 5e-6, torch.bfloat16: 2**-8, torch.float16: 5e-6, torch.float64: 1e-12}
SHAPES = [(0, 7), (1, 1), (3, 15), (3, 16), (2, 17), (40, 1000)]


def plain(logits, labels):
    """By torch, in float64."""
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, labels, reduction="none")
    losses.sum().backward()
    return losses.detach(), logits.argmax(dim=-1) == labels, exact.grad


def drawn(num_rows, num_logits, dtype, scale=5.0):
    generator = torch.Generator().manual_seed(num_rows * num_logits)
    logits = (scale * torch.randn(num_rows, num_logits, generator=generator)).to(dtype)
    labels = torch.randint(num_logits, (num_rows,), generator=generator)
    labels[::2] = logits[::2].argmax(dim=-1)
    return logits, labels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "scale"), [*((shape, 5.0) for shape in SHAPES), *(((20, 300), scale) for scale in (1e-3, 100.0, 1e4))]
)
@pytest.mark.parametrize("function", [cross_entropy, _anywhere])
def test_losses_hits_and_gradients_are_torchs(function, shape, scale, dtype):
    """However near to each other the logits are, or far."""
    logits, labels = drawn(*shape, dtype, scale)
    losses, hits, errors = plain(logits, labels)
    found = function(logits, labels)
    torch.testing.assert_close(found[0].double(), losses, rtol=1e-6, atol=1e-6)
    assert torch.equal(found[1], hits)
    torch.testing.assert_close(found[2].double(), errors, rtol=DTYPES[dtype], atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_logits_the_first_is_predicted(dtype):
    logits = torch.tensor([[1.0, 3, 3, -2], [1, 3, 3, -2], [-1, -1, -1, -1], [-1, -1, -1, -1]], dtype=dtype)
    assert cross_entropy(logits, torch.tensor([1, 2, 0, 3]))[1].tolist() == [True, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 3, 20])
def test_a_row_that_is_not_finite_says_so_everywhere(dtype, value, place):
    """Whatever is done with its gradients, they are not taken for numbers; the other rows stay."""
    logits, labels = drawn(3, 21, dtype)
    expected = plain(logits[[0, 2]], labels[[0, 2]])
    logits[1, place] = value
    losses, _, errors = cross_entropy(logits, labels)
    assert losses[1].isnan() and errors[1].isnan().all()
    torch.testing.assert_close(losses[[0, 2]].double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(errors[[0, 2]].double(), expected[2], rtol=DTYPES[dtype], atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_cannot_be_has_no_probability(dtype):
    logits, labels = drawn(2, 21, dtype)
    labels[:] = 4
    logits[:, 7] = -torch.inf
    losses, _, errors = plain(logits, labels)
    found = cross_entropy(logits, labels)
    torch.testing.assert_close(found[0].double(), losses, rtol=1e-6, atol=1e-6)
    assert (found[2][:, 7].double().abs() < 1e-30).all()
    torch.testing.assert_close(found[2].double(), errors, rtol=DTYPES[dtype], atol=1e-7)
