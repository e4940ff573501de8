import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from raybert.batch import pack
from raybert.config import ModelConfig
from raybert.errors import UserError
from raybert.model import BertForPreTraining
from raybert.pretrained import (
    LoadReport,
    check_vocabulary,
    is_uncased,
    load_pretrained,
    read_bert_config,
    read_vocabulary,
    save_pretrained,
    transformers_config,
)

TINY = ModelConfig(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    hidden_act="gelu_new",
    max_position_embeddings=16,
)
UNCASED = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]", "hello", "wor", "##ld", "embed", ","]
REAL_VOCABULARY = Path(__file__).parents[1].parent / "shared" / "data" / "vocab.txt"
HEADS = {
    "cls.predictions.bias",
    "cls.predictions.transform.dense.weight",
    "cls.predictions.transform.dense.bias",
    "cls.predictions.transform.LayerNorm.weight",
    "cls.predictions.transform.LayerNorm.bias",
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
}


def tiny_model(seed=0, use_next_sentence=True, config=TINY) -> BertForPreTraining:
    torch.manual_seed(seed)
    model = BertForPreTraining(config, use_next_sentence).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write_vocabulary(path: Path, tokens) -> Path:
    path.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return path


@torch.no_grad()
def logits_of_both(model, twin):
    input_ids = torch.randint(0, TINY.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    input_mask = torch.ones_like(input_ids)
    segment_ids = torch.zeros_like(input_ids)
    segment_ids[:, 5:] = 1
    tokens, *_ = pack(input_ids.numpy(), segment_ids.numpy(), input_mask.numpy() == 1)
    projection, nsp_logits = model(tokens, torch.arange(18))
    theirs = twin(input_ids, attention_mask=input_mask, token_type_ids=segment_ids)
    return (projection.logits(), nsp_logits), (theirs.prediction_logits.flatten(0, 1), theirs.seq_relationship_logits)


@pytest.mark.parametrize("use_next_sentence", [True, False])
def test_transformers_opens_what_we_save(tmp_path, use_next_sentence):
    model = tiny_model(use_next_sentence=use_next_sentence)
    save_pretrained(tmp_path, model.state_dict(), TINY)
    twin, info = transformers.BertForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    twin.eval()
    model.use_next_sentence = True
    ours, theirs = logits_of_both(model, twin)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert twin.config.architectures == ["BertForPreTraining"]
    assert twin.dtype == torch.float32
    assert twin.config.layer_norm_eps == 1e-12
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers 4 asks for it


def test_for_a_plain_encoder_only_the_heads_are_unexpected(tmp_path):
    save_pretrained(tmp_path, tiny_model().state_dict(), TINY)
    _, info = transformers.BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == HEADS
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is transformers.BertModel


def test_round_trip_is_bitwise(tmp_path):
    model, other = tiny_model(0), tiny_model(1)
    save_pretrained(tmp_path, model.state_dict(), TINY)
    report = load_pretrained(other, tmp_path)
    assert (sorted(report.loaded), report.missing, report.unexpected) == (sorted(model.state_dict()), [], [])
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert read_bert_config(tmp_path / "config.json") == TINY


def saved_by_transformers(directory: Path, kind: str, **options):
    torch.manual_seed(5)
    twin = getattr(transformers, kind)(transformers.BertConfig(**transformers_config(TINY))).eval()
    twin.save_pretrained(directory, **options)
    return twin


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_starts_from_pretraining_weights_of_transformers(tmp_path, options):
    twin = saved_by_transformers(tmp_path, "BertForPreTraining", **options)
    assert (tmp_path / "model.safetensors").exists() == (not options)
    model = tiny_model(1)
    report = load_pretrained(model, tmp_path)
    assert (report.missing, report.unexpected) == ([], [])
    ours, theirs = logits_of_both(model, twin)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_starts_from_an_encoder_without_the_prefix(tmp_path):
    twin = saved_by_transformers(tmp_path, "BertModel")
    assert "embeddings.word_embeddings.weight" in load_file(tmp_path / "model.safetensors")
    model, before = tiny_model(1), tiny_model(1).state_dict()
    report = load_pretrained(model, tmp_path)
    assert set(report.missing) == HEADS
    assert report.unexpected == []
    assert all(torch.equal(tensor, model.state_dict()[f"bert.{name}"]) for name, tensor in twin.state_dict().items())
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in HEADS)


def test_starts_from_masked_lm_and_from_classification(tmp_path):
    saved_by_transformers(tmp_path / "mlm", "BertForMaskedLM")
    report = load_pretrained(tiny_model(), tmp_path / "mlm")
    assert [name.split(".")[1] for name in report.missing] == [
        "pooler",
        "pooler",
        "seq_relationship",
        "seq_relationship",
    ]
    saved_by_transformers(tmp_path / "classifier", "BertForSequenceClassification")
    report = load_pretrained(tiny_model(), tmp_path / "classifier")
    assert report.unexpected == ["classifier.bias", "classifier.weight"]
    assert set(report.missing) == HEADS


def test_report_is_one_line():
    assert str(LoadReport(["a", "b"], [], [])) == "loaded 2 of 2 tensors"
    report = LoadReport(["a"], [f"m{i}" for i in range(8)], ["x"])
    assert str(report) == "loaded 1 of 9 tensors; newly initialised: m0, m1, m2, m3, m4, m5 and 2 more; not used: x"


def test_old_names_and_tied_copies_and_half_precision_are_understood(tmp_path):
    model = tiny_model()
    old = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        old[name] = tensor.half()
    old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"].clone()
    old["cls.predictions.decoder.bias"] = old.pop("cls.predictions.bias")
    old["bert.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(old, tmp_path / "model.safetensors")
    other = tiny_model(1)
    report = load_pretrained(other, tmp_path)
    assert (report.missing, report.unexpected) == ([], [])
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor.half().float()), name


def test_weights_of_another_model_are_refused(tmp_path):
    save_pretrained(tmp_path, tiny_model().state_dict(), TINY)
    wider = tiny_model(config=replace(TINY, vocab_size=41))
    with pytest.raises(UserError, match=r"word_embeddings.*\(40, 32\) and \(41, 32\); set the model's sizes"):
        load_pretrained(wider, tmp_path)
    with pytest.raises(UserError, match=r"num_attention_heads .*got 2 for the model and 4 in .*; set"):
        load_pretrained(tiny_model(config=replace(TINY, num_attention_heads=2)), tmp_path)
    with pytest.raises(UserError, match=r"hidden_act .*got gelu for the model and gelu_new"):
        load_pretrained(tiny_model(config=replace(TINY, hidden_act="gelu")), tmp_path)
    load_pretrained(tiny_model(config=replace(TINY, hidden_act="gelu_pytorch_tanh")), tmp_path)


def test_a_failed_load_leaves_the_model_as_it_was(tmp_path):
    weights = tiny_model(1).state_dict() | {"cls.seq_relationship.bias": torch.zeros(3)}
    save_file(weights, tmp_path / "model.safetensors")
    model = tiny_model()
    with pytest.raises(UserError, match=r"\(3,\) and \(2,\)"):
        load_pretrained(model, tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in tiny_model().state_dict().items())


def test_what_is_no_set_of_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"must have model.safetensors"):
        load_pretrained(tiny_model(), tmp_path / "absent")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pickle.*convert"):
        load_pretrained(tiny_model(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00nothing")
    with pytest.raises(UserError, match=r"model.safetensors cannot be read"):
        load_pretrained(tiny_model(), tmp_path)
    save_file({"roberta.embeddings.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"no tensor of a BERT encoder, only roberta.embeddings.weight"):
        load_pretrained(tiny_model(), tmp_path)
    save_file(tiny_model().state_dict() | {"cls.predictions.decoder.weight": torch.zeros(40, 32)}, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"decoder.weight must equal the word embeddings"):
        load_pretrained(tiny_model(), tmp_path)


def google_config() -> dict:
    """bert_config.json of the uncased base model."""
    return {
        "attention_probs_dropout_prob": 0.1,
        "directionality": "bidi",
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 512,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pooler_type": "first_token_transform",
        "type_vocab_size": 2,
        "vocab_size": 30522,
    }


def test_reads_configurations_of_google_and_of_transformers(tmp_path):
    path = tmp_path / "bert_config.json"
    path.write_text(json.dumps(google_config()))
    assert read_bert_config(path) == ModelConfig()
    path.write_text(json.dumps({key: value for key, value in google_config().items() if "prob" not in key}))
    assert read_bert_config(path) == ModelConfig()
    path.write_text(json.dumps(google_config() | {"hidden_dropout_prob": 0}))
    assert read_bert_config(path) == ModelConfig(hidden_dropout_prob=0.0)
    transformers.BertConfig(**transformers_config(TINY)).save_pretrained(tmp_path)
    assert read_bert_config(tmp_path / "config.json") == TINY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "roberta"}, "model_type in .* must be 'bert', as in BERT, got 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"embedding_size": 128}, "embedding_size in .* must be 768, as in BERT, got 128"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"hidden_size": "768"}, "hidden_size in .* must be of type int, got '768'"),
        ({"hidden_size": True}, "hidden_size in .* must be of type int, got True"),
        ({"vocab_size": 30522.0}, "vocab_size"),
        ({"num_attention_heads": 7}, "bert_config.json: num_attention_heads must divide hidden_size"),
        ({"hidden_act": "gelo"}, "bert_config.json: hidden_act must be one of"),
    ],
)
def test_another_architecture_is_refused(tmp_path, changes, message):
    path = tmp_path / "bert_config.json"
    path.write_text(json.dumps(google_config() | changes))
    with pytest.raises(UserError, match=message):
        read_bert_config(path)


@pytest.mark.parametrize(
    "absent", ["vocab_size", "hidden_size", "hidden_act", "type_vocab_size", "max_position_embeddings"]
)
def test_an_absent_size_is_named(tmp_path, absent):
    path = tmp_path / "bert_config.json"
    path.write_text(json.dumps({key: value for key, value in google_config().items() if key != absent}))
    with pytest.raises(UserError, match=f"must say {absent}; add"):
        read_bert_config(path)


def test_what_is_no_configuration_is_refused_by_file_and_line(tmp_path):
    path = tmp_path / "bert_config.json"
    with pytest.raises(UserError, match=r"bert_config.json cannot be read \(No such file"):
        read_bert_config(path)
    path.write_text('{\n  "hidden_size": 768,\n  "vocab_size" 5\n}')
    with pytest.raises(UserError, match=r"bert_config.json, line 3: not JSON"):
        read_bert_config(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="must be a JSON object, got list"):
        read_bert_config(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="must be UTF-8 text, but byte 0"):
        read_bert_config(path)


@pytest.mark.parametrize("tokenizer_class", [transformers.BertTokenizerFast, transformers.AutoTokenizer])
def test_transformers_tokenizes_with_our_vocabulary(tmp_path, tokenizer_class):
    vocab_file = write_vocabulary(tmp_path / "my-vocabulary.txt", UNCASED)
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    save_pretrained(directory, tiny_model().state_dict(), TINY, vocab_file)
    tokenizer = tokenizer_class.from_pretrained(directory)
    assert len(tokenizer) == len(UNCASED)
    assert tokenizer.get_vocab() == {token: index for index, token in enumerate(UNCASED)}
    assert tokenizer("Héllo, WORLD [MASK] xyz", "embed")["input_ids"] == [2, 6, 10, 7, 8, 4, 1, 3, 9, 3]
    assert tokenizer("hello", "embed")["token_type_ids"] == [0, 0, 0, 1, 1]
    assert tokenizer.model_max_length == TINY.max_position_embeddings


def test_a_cased_vocabulary_is_not_lower_cased(tmp_path):
    vocab_file = write_vocabulary(tmp_path / "v", [*UNCASED, "Hello"])
    save_pretrained(tmp_path, tiny_model().state_dict(), TINY, vocab_file)
    tokenizer = transformers.BertTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.tokenize("Hello hello WORLD") == ["Hello", "hello", "[UNK]"]
    assert is_uncased(UNCASED)
    assert not is_uncased([*UNCASED, "Hello"])
    assert not is_uncased([*UNCASED, "##X"])


@pytest.mark.skipif(not REAL_VOCABULARY.exists(), reason="needs BERT's own vocabulary beside the repository")
def test_transformers_tokenizes_with_the_vocabulary_of_bert(tmp_path):
    save_pretrained(tmp_path, tiny_model().state_dict(), TINY, REAL_VOCABULARY)
    tokenizer = transformers.BertTokenizerFast.from_pretrained(tmp_path)
    assert len(tokenizer) == len(read_vocabulary(REAL_VOCABULARY)) == 30522
    assert tokenizer.tokenize("Pretraining BERT") == ["pre", "##train", "##ing", "bert"]
    assert tokenizer("Hello world!")["input_ids"] == [101, 7592, 2088, 999, 102]
    check_vocabulary(REAL_VOCABULARY, ModelConfig())


def test_a_vocabulary_of_another_model_is_refused(tmp_path):
    vocab_file = write_vocabulary(tmp_path / "v", UNCASED)
    check_vocabulary(vocab_file, TINY)
    with pytest.raises(UserError, match="got 11 tokens and vocab_size=10; set vocab_size=11"):
        check_vocabulary(vocab_file, replace(TINY, vocab_size=10))
    with pytest.raises(UserError, match=r"must contain \[CLS\], \[SEP\]"):
        check_vocabulary(write_vocabulary(vocab_file, ["[PAD]", "[UNK]", "[MASK]", "a"]), TINY)
