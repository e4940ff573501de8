import math
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from raybert.batch import pack
from raybert.config import ModelConfig
from raybert.errors import UserError
from raybert.loss import mlm_sums
from raybert.model import ACTIVATIONS, BertForPreTraining, check_model_config
from raybert.pretrained import transformers_config

TINY = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=16,
)
MASKED_POSITIONS = torch.tensor([1, 3, 12, 22])  # of B = 2, L = 12


def tiny_model(seed: int = 0, use_next_sentence: bool = True, **changes) -> BertForPreTraining:
    torch.manual_seed(seed)
    return BertForPreTraining(replace(TINY, **changes), use_next_sentence)


def batch(num_real=(12, 12), length=12):
    """Of the longest sample first, as our model takes them."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(0, TINY.vocab_size, (len(num_real), length), generator=generator)
    segment_ids = torch.randint(0, 2, (len(num_real), length), generator=generator)
    input_mask = (torch.arange(length) < torch.tensor(num_real)[:, None]).long()
    return input_ids, input_mask, segment_ids


def packed(input_ids, input_mask, segment_ids):
    """The real tokens of a batch."""
    return pack(input_ids.numpy(), segment_ids.numpy(), input_mask.numpy().astype(bool))[0]


def places(input_mask, masked_positions=MASKED_POSITIONS):
    """Which of the real tokens stand at flat positions."""
    return input_mask.flatten().cumsum(0)[masked_positions] - 1


def randomized(model: BertForPreTraining) -> BertForPreTraining:
    """With biases and LayerNorms away from 0 and 1, so that a mix-up shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def transformers_twin(model: BertForPreTraining) -> transformers.BertForPreTraining:
    twin = transformers.BertForPreTraining(transformers.BertConfig(**transformers_config(model.config))).eval()
    names = twin.load_state_dict(model.state_dict(), strict=False)
    assert set(names.missing_keys) == {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert names.unexpected_keys == []
    return twin


@pytest.mark.parametrize("num_real", [(12, 12), (12, 5), (7, 1)])
@pytest.mark.parametrize("hidden_act", sorted(ACTIVATIONS))
@torch.no_grad()
def test_logits_equal_those_of_transformers(hidden_act, num_real):
    model = randomized(tiny_model(hidden_act=hidden_act)).eval()
    input_ids, input_mask, segment_ids = batch(num_real)
    masked = MASKED_POSITIONS[input_mask.flatten()[MASKED_POSITIONS] == 1]
    projection, nsp_logits = model(packed(input_ids, input_mask, segment_ids), places(input_mask, masked))
    theirs = transformers_twin(model)(input_ids, attention_mask=input_mask, token_type_ids=segment_ids)
    torch.testing.assert_close(nsp_logits, theirs.seq_relationship_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(projection.logits(), theirs.prediction_logits.flatten(0, 1)[masked], atol=1e-5, rtol=0)


def test_state_dict_has_the_names_that_transformers_stores(tmp_path):
    model = tiny_model()
    transformers_twin(model).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in stored.items()
    }


@pytest.mark.parametrize("bucket", [5, 64])
def test_what_fills_up_a_bucket_changes_nothing(bucket):
    """Neither logits nor gradients; the next sentence logits of what fills up come last."""
    model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    input_ids, input_mask, segment_ids = batch((9, 4))
    arrays = input_ids.numpy(), segment_ids.numpy(), input_mask.numpy().astype(bool)
    results = []
    for tokens in (pack(*arrays)[0], pack(*arrays, bucket)[0]):
        projection, nsp_logits = model(tokens, torch.tensor([0, 8, 9, 12]))
        mlm_logits = projection.logits()
        (mlm_logits.square().sum() + nsp_logits[:2].square().sum()).backward()
        results.append([mlm_logits, nsp_logits[:2], *(parameter.grad for parameter in model.parameters())])
        model.zero_grad()
    assert len(tokens.input_ids) == -(-13 // bucket) * bucket
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("use_next_sentence", [True, False])
def test_without_masked_tokens_every_trained_parameter_gets_a_gradient(use_next_sentence, autocast):
    model = tiny_model(use_next_sentence=use_next_sentence)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        projection, nsp_logits = model(packed(*batch()), torch.zeros(0, dtype=torch.int64))
        loss, *_ = mlm_sums(projection, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    (loss if nsp_logits is None else loss + nsp_logits.float().sum()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert model.cls.predictions.bias.grad.count_nonzero() == 0


def test_without_next_sentence_the_state_dict_is_the_same_and_the_head_is_not_trained():
    with_nsp, without_nsp = tiny_model(), tiny_model(use_next_sentence=False)
    assert with_nsp.state_dict().keys() == without_nsp.state_dict().keys()
    assert without_nsp(packed(*batch()), MASKED_POSITIONS)[1] is None
    assert [name for name, parameter in without_nsp.named_parameters() if not parameter.requires_grad] == [
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
    ]


def test_word_embeddings_learn_from_both_ends():
    model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    input_ids, input_mask, segment_ids = batch()
    projection, _ = model(packed(input_ids, input_mask, segment_ids), MASKED_POSITIONS)
    mlm_sums(projection, torch.tensor([1, 2, 3, 4]), torch.ones(4))[0].backward()
    gradient = model.bert.embeddings.word_embeddings.weight.grad
    absent = sorted(set(range(TINY.vocab_size)) - set(input_ids.flatten().tolist()))
    assert absent
    assert (gradient[absent].abs().sum(dim=1) > 0).all()  # through the output alone


@pytest.mark.parametrize("kind", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_is_on_in_training_only(kind):
    model = tiny_model(**{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, kind: 0.1})
    torch.manual_seed(0)
    for is_training in (True, False):
        model.train(is_training)
        one, other = (model(packed(*batch()), MASKED_POSITIONS)[0].logits() for _ in range(2))
        assert torch.equal(one, other) != is_training


def test_initial_weights_are_a_truncated_normal():
    model = tiny_model(vocab_size=5000)
    kernels = torch.cat([parameter.detach().flatten() for parameter in model.parameters() if parameter.ndim > 1])
    assert kernels.abs().max() <= 0.04
    # A normal cut at two standard deviations has a standard deviation of sqrt(1 - 4 pdf(2) / (2 cdf(2) - 1)).
    pdf, cdf = math.exp(-2) / math.sqrt(2 * math.pi), (1 + math.erf(2 / math.sqrt(2))) / 2
    assert kernels.std().item() == pytest.approx(0.02 * math.sqrt(1 - 4 * pdf / (2 * cdf - 1)), rel=0.01)
    assert kernels.mean().item() == pytest.approx(0, abs=2e-4)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (1 if name.endswith("LayerNorm.weight") else 0)).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.0176, rel=0.25), name


def test_the_seed_decides_the_initial_weights():
    one, same, other = tiny_model(0).state_dict(), tiny_model(0).state_dict(), tiny_model(1).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["bert.pooler.dense.weight"], other["bert.pooler.dense.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads=5 and hidden_size=32"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be at least 1, got -1"),
        ({"type_vocab_size": 0}, "type_vocab_size"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob must be in \[0, 1\), got 1.0"),
        ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob"),
        ({"attention_probs_dropout_prob": math.nan}, "attention_probs_dropout_prob"),
        ({"initializer_range": 0.0}, "initializer_range"),
        ({"hidden_act": "gelo"}, "gelu, gelu_new.*got 'gelo'"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check_model_config(replace(TINY, **changes))
    with pytest.raises(UserError, match=message):
        BertForPreTraining(replace(TINY, **changes))
