"""Checkpoints of TensorFlow were written by the real code under the TensorFlow of its time; see data/README.md."""

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from helpers import DATA, TINY_MODEL, VOCAB_FILE, tiny_config, write_samples
from safetensors.torch import load_file, save_file

from raybert.batch import pack
from raybert.cli import main
from raybert.errors import UserError
from raybert.launch import run as launch
from raybert.manifest import OPTIMIZER, newest_checkpoint
from raybert.model import BertForPreTraining
from raybert.pretrained import save_pretrained, transformers_config
from raybert.storage import Directory
from raybert.tensorflow_checkpoint import find_prefix, read_checkpoint
from raybert.weights import open_model

TENSORFLOW = DATA / "tensorflow"
TRAINED = ("google-training", "garden-2.1.0", "garden-2.2.0", "garden-2.3.0")
ALL = ("google-released", *TRAINED)
LOG_PROBABILITIES = ("garden-2.1.0", "garden-2.2.0")  # are these models' output
LINEAR = LOG_PROBABILITIES
CONVERT_ALL = """
import contextlib, io, json, sys
import raybert.worker
from raybert.cli import main
assert "tensorflow" not in sys.modules, "workers would start seconds later"
results = []
for argv in json.loads(sys.stdin.read()):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["convert", *argv])
    results.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(results))
"""


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """What a few commands have made and said, by name; in one process of its own, since TensorFlow takes its time."""
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("needs TensorFlow: pip install 'raybert[tensorflow]'")
    made = tmp_path_factory.mktemp("converted")
    commands = {name: [TENSORFLOW / name, made / name] for name in ALL}
    commands["weights alone"] = [TENSORFLOW / "garden-2.3.0", made / "weights", "--to", "transformers"]
    encoder = TENSORFLOW / "garden-2.1.0" / "pretrained" / "bert_model.ckpt-1"
    commands["encoder"] = [encoder, made / "encoder"]
    commands["drop"] = [TENSORFLOW / "garden-2.1.0", made / "drop", "--linear_transform", "drop"]
    commands["keep"] = [TENSORFLOW / "garden-2.1.0", made / "keep", "--linear_transform", "keep"]
    google = TENSORFLOW / "google-released" / "bert_model.ckpt"
    vocab_file = made / "vocab.txt"
    vocab_file.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    commands["erf"] = [f"{google}.index", made / "erf", "--hidden_act", "gelu", "--vocab", vocab_file]
    for name, changes in WRONG.items():
        changed = made / f"{name}.json"
        changed.write_text(json.dumps(json.loads((TENSORFLOW / ALL[0] / "bert_config.json").read_text()) | changes))
        source = TENSORFLOW / "garden-2.3.0" if name == "heads" else google
        commands[name] = [source, made / f"not-{name}", "--bert_config_file", changed]
    torn = shutil.copytree(TENSORFLOW / "google-released", made / "torn-source")
    data = torn / "bert_model.ckpt.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:10000])
    commands["torn"] = [torn, made / "not-torn"]
    argvs = [[str(word) for word in argv] for argv in commands.values()]
    done = subprocess.run(
        [sys.executable, "-c", CONVERT_ALL], input=json.dumps(argvs), capture_output=True, text=True, check=True
    )
    results = dict(zip(commands, json.loads(done.stdout), strict=True))
    return {name: (Path(commands[name][1]), *result) for name, result in results.items()}


WRONG = {
    "heads": {"num_attention_heads": 4},
    "vocabulary": {"vocab_size": 41},
    "positions": {"max_position_embeddings": 512},
    "fewer layers": {"num_hidden_layers": 1},
    "more layers": {"num_hidden_layers": 3},
}
REFUSALS = {
    "heads": "2 attention heads and .* says 4; give the configuration of the checkpoint",
    "vocabulary": r"bert.embeddings.word_embeddings.weight is \(40, 16\) in .*, and \(41, 16\).*correct vocab_size",
    "positions": "max_position_embeddings there is 20; correct max_position_embeddings",
    "fewer layers": "1 layers.*has bert.encoder.layer.1.* beyond it; give the configuration",
    "more layers": "3 layers.*lacks bert.encoder.layer.2.*; give the configuration",
    "torn": "bert_model.ckpt cannot be read .*; fetch it again",
}


def masked(values_BL, positions_BP):
    """[B, P, ...] of the masked places."""
    return torch.stack([values[places.long()] for values, places in zip(values_BL, positions_BP, strict=True)])


@torch.no_grad()
def our_logits(model, inputs):
    is_real = inputs["input_mask"].numpy() == 1
    tokens, order, places = pack(inputs["input_ids"].numpy(), inputs["segment_ids"].numpy(), is_real)
    wanted = masked(torch.from_numpy(places), inputs["masked_lm_positions"])
    projection, nsp_logits = model(tokens, wanted.flatten())
    return projection.logits().unflatten(0, wanted.shape), nsp_logits[torch.from_numpy(order).argsort()]


@torch.no_grad()
def their_logits(directory, inputs):
    twin, info = transformers.BertForPreTraining.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values())
    masks = {"attention_mask": inputs["input_mask"], "token_type_ids": inputs["segment_ids"]}
    output = twin.eval()(inputs["input_ids"], **masks)
    return masked(output.prediction_logits, inputs["masked_lm_positions"]), output.seq_relationship_logits


@pytest.mark.parametrize("name", ALL)
def test_logits_are_those_of_tensorflow(converted, name):
    directory, code, said, _ = converted[name]
    assert code == 0
    expected = load_file(TENSORFLOW / name / "expected.safetensors")
    wanted = expected["prediction_logits"], expected["seq_relationship_logits"]
    for logits in (our_logits(open_model(str(directory)).model, expected), their_logits(directory, expected)):
        if name in LOG_PROBABILITIES:
            logits = tuple(each.log_softmax(dim=-1) for each in logits)
        torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=0)
    assert ("no activation there (Model Garden v2.1, v2.2): its bias is shifted by" in said) == (name in LINEAR)


@pytest.mark.parametrize("name", TRAINED)
def test_moments_and_step_are_those_of_tensorflow(converted, name):
    directory, _, said, _ = converted[name]
    moments, weights = load_file(directory / OPTIMIZER), load_file(directory / "model.safetensors")
    assert sorted(moments) == sorted(f"{kind}.{w}" for kind in ("exp_avg", "exp_avg_sq", "step") for w in weights)
    assert {moments[f"step.{weight}"].item() for weight in weights} == {3.0}
    assert all(moments[f"exp_avg.{weight}"].shape == tensor.shape for weight, tensor in weights.items())
    expected = load_file(TENSORFLOW / name / "expected.safetensors")
    checked = [key for key in expected if key.startswith("exp_avg")]
    assert len(checked) == 3 and all(torch.equal(moments[key], expected[key]) for key in checked)
    assert json.loads((directory / "state.json").read_text())["step"] == 3
    assert "step 3" in said and "moments kept, for --training.init_optimizer true" in said


def test_transformers_gets_the_weights_alone(converted):
    directory, _, said, _ = converted["weights alone"]
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]
    assert "moments left out (--to raybert keeps them)" in said


def test_an_encoder_has_no_heads_and_says_so(converted):
    directory, code, said, _ = converted["encoder"]
    assert code == 0 and "left out, since the source has none: the masked LM head, the next sentence head" in said
    assert "BertModel:" in said and json.loads((directory / "config.json").read_text())["architectures"] == [
        "BertModel"
    ]
    whole = load_file(converted["garden-2.1.0"][0] / "model.safetensors")
    part = load_file(directory / "model.safetensors")
    assert sorted(part) == sorted(name for name in whole if name.startswith("bert."))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in part.items())
    _, info = transformers.BertModel.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values())
    with pytest.raises(UserError, match="has no masked LM head, only an encoder"):
        open_model(str(directory))


def test_a_head_without_activation_is_left_out_or_kept_as_one_wishes(converted):
    dropped, _, said, _ = converted["drop"]
    assert "left out: the masked LM head" in said and "BertForNextSentencePrediction" in said
    assert not any("predictions" in name for name in load_file(dropped / "model.safetensors"))
    kept, shifted = (load_file(converted[name][0] / "model.safetensors") for name in ("keep", "garden-2.1.0"))
    differing = [name for name, tensor in kept.items() if not torch.equal(tensor, shifted[name])]
    assert differing == ["cls.predictions.transform.dense.bias"]
    assert "until it is trained on" in converted["keep"][2]


def test_the_activation_and_the_vocabulary_are_as_given(converted):
    directory, _, said, _ = converted["erf"]
    config = json.loads((directory / "config.json").read_text())
    assert config["hidden_act"] == "gelu" and "tanh form" not in said and "no vocabulary" not in said
    assert (directory / "vocab.txt").is_file() and (directory / "tokenizer_config.json").is_file()
    assert json.loads((converted[ALL[0]][0] / "config.json").read_text())["hidden_act"] == "gelu_new"


@pytest.mark.parametrize("name", REFUSALS)
def test_a_checkpoint_of_another_model_is_refused(converted, name):
    directory, code, _, error = converted[name]
    assert code == 1 and not directory.exists()
    with pytest.raises(UserError, match=REFUSALS[name]):
        raise UserError(error)


def test_without_tensorflow_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match=r"cannot be imported.*pip install 'raybert\[tensorflow\]'"):
        read_checkpoint(str(TENSORFLOW / "google-released" / "bert_model.ckpt"))


def test_a_tensorflow_checkpoint_is_found_by_any_of_its_names(tmp_path):
    folder = TENSORFLOW / "garden-2.1.0"
    names = ("", "ctl_step_3.ckpt-1", "ctl_step_3.ckpt-1.index", "ctl_step_3.ckpt-1.data-00000-of-00001")
    assert {find_prefix(f"{folder}/{name}") for name in names} == {f"{folder}/ctl_step_3.ckpt-1"}
    assert find_prefix(str(folder / "pretrained")) == f"{folder}/pretrained/bert_model.ckpt-1"
    assert find_prefix(str(tmp_path / "nothing")) is None and find_prefix(str(tmp_path)) is None
    for name in ("a.ckpt", "b.ckpt"):
        (tmp_path / f"{name}.index").touch()
    with pytest.raises(UserError, match=r"holds 2 TensorFlow checkpoints: a.ckpt, b.ckpt; name one"):
        find_prefix(str(tmp_path))


# --- transformers and raybert -----------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    """A directory of transformers with both heads, and the weights in it."""
    torch.manual_seed(0)
    model = BertForPreTraining(TINY_MODEL)
    (tmp_path / "tiny").mkdir()
    save_pretrained(tmp_path / "tiny", model.state_dict(), TINY_MODEL)
    return tmp_path / "tiny", model.state_dict()


def convert(*words):
    return main(["convert", *map(str, words)])


def test_there_and_back_is_bitwise(tiny, tmp_path, capsys):
    source, weights = tiny
    assert convert(source, tmp_path / "ours") == 0
    assert convert(tmp_path / "ours", tmp_path / "theirs", "--to", "transformers") == 0
    assert "note: no vocabulary" in capsys.readouterr().out
    for name in ("ours", "theirs"):
        found = load_file(tmp_path / name / "model.safetensors")
        assert sorted(found) == sorted(weights) and all(torch.equal(found[key], weights[key]) for key in found)
        assert (tmp_path / name / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("kind", "left_out", "architecture"),
    [
        ("BertModel", "the masked LM head, the next sentence head", "BertModel"),
        ("BertForMaskedLM", "the next sentence head, the pooler", "BertForMaskedLM"),
        ("BertForNextSentencePrediction", "the masked LM head", "BertForNextSentencePrediction"),
        ("BertForSequenceClassification", "the masked LM head, the next sentence head", "BertModel"),
    ],
)
def test_what_a_model_of_transformers_lacks_is_said(tmp_path, capsys, kind, left_out, architecture):
    config = transformers.BertConfig(**transformers_config(TINY_MODEL))
    twin = getattr(transformers, kind)(config).half()
    twin.save_pretrained(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "made") == 0
    said = capsys.readouterr().out
    assert f"left out, since the source has none: {left_out}\n" in said and f"{architecture}:" in said
    assert ("not used: classifier.bias, classifier.weight" in said) == ("Classification" in kind)
    again, info = getattr(transformers, architecture).from_pretrained(tmp_path / "made", output_loading_info=True)
    assert not any(info.values()) and again.dtype == torch.float32
    theirs = twin.state_dict()
    assert all(torch.equal(t, theirs[n].float()) for n, t in again.state_dict().items() if n in theirs)


def test_old_names_become_new_ones(tiny, tmp_path):
    source, weights = tiny
    pairs = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {}
    for name, tensor in weights.items():
        for new, was in pairs.items():
            name = name.replace(new, was)
        old[name] = tensor
    save_file(old, source / "model.safetensors")
    assert convert(source, tmp_path / "made") == 0
    assert sorted(load_file(tmp_path / "made" / "model.safetensors")) == sorted(weights)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tiny}", "{tiny}"], "DESTINATION .* is not empty; name a new directory"),
        (["{here}/nothing", "{here}/made"], "holds neither a config.json nor a run"),
        (["{tiny}", "{here}/made", "--hidden_act", "relu"], "--hidden_act is for TensorFlow's checkpoints"),
        (["{tiny}", "{here}/made", "--vocab", "{vocab}"], "must not have more tokens than vocab_size"),
        (["{lone}", "{here}/made"], "There is no bert_config.json beside .*; name it by --bert_config_file"),
    ],
)
def test_a_mistake_is_named(tiny, tmp_path, capsys, words, message):
    (tmp_path / "lone").mkdir()
    (tmp_path / "lone" / "model.ckpt-5.index").touch()
    places = {"tiny": tiny[0], "here": tmp_path, "vocab": VOCAB_FILE, "lone": tmp_path / "lone"}
    assert convert(*(word.format(**places) for word in words)) == 1
    error = capsys.readouterr().err
    with pytest.raises(UserError, match=message):
        raise UserError(error)
    assert not (tmp_path / "made").exists()


def test_a_head_that_is_there_in_part_is_damage(tiny, tmp_path, capsys):
    source, weights = tiny
    save_file({name: t for name, t in weights.items() if name != "cls.predictions.bias"}, source / "model.safetensors")
    assert convert(source, tmp_path / "made") == 1
    assert "lacks cls.predictions.bias" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    write_samples(folder / "train.tfrecord", 300, seed=1)
    config = tiny_config(folder / "run", folder / "train.tfrecord", **{"training.num_steps": 2})
    assert launch(config) == 0
    return folder / "run", config


def newest(run_dir):
    return Path(newest_checkpoint(Directory(str(run_dir)), print).directory.path)


def test_a_run_is_a_directory_of_transformers(trained, tmp_path, capsys):
    run_dir, _ = trained
    assert convert(run_dir, tmp_path / "made") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"raybert, {newest(run_dir)}, step 2\n") and "moments left out" in said
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["config.json", "model.safetensors"]
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "made" / name).read_bytes() == (newest(run_dir) / name).read_bytes()


@pytest.mark.parametrize("use_next_sentence", [True, False])
def test_what_is_converted_begins_a_run_with_its_moments(trained, tmp_path, use_next_sentence):
    run_dir, config = trained
    convert(run_dir, tmp_path / "made", "--to", "raybert")
    made = load_file(tmp_path / "made" / OPTIMIZER)
    assert made.keys() == load_file(newest(run_dir) / OPTIMIZER).keys()
    first = replace(
        config.training,
        num_steps=1,
        init_checkpoint=str(tmp_path / "made"),
        init_optimizer=True,
        use_next_sentence_label=use_next_sentence,
    )
    assert launch(replace(config, run_dir=str(tmp_path / "next"), training=first)) == 0
    moments = load_file(newest(tmp_path / "next") / OPTIMIZER)
    assert {tensor.item() for key, tensor in moments.items() if key.startswith("step.")} == {3.0}
    assert any("seq_relationship" in key for key in moments) == use_next_sentence
    table = "exp_avg_sq.bert.embeddings.word_embeddings.weight"
    assert (moments[table] >= made[table] * 0.999 * (1 - 1e-6)).all()  # Adam adds a square to it


def test_moments_that_are_not_there_are_missed_before_the_run(trained, tiny, tmp_path):
    _, config = trained
    for source, message in ((tiny[0], "has no optimizer.safetensors"), (None, "and that is not set")):
        path = None if source is None else str(source)
        training = replace(config.training, init_checkpoint=path, init_optimizer=True)
        with pytest.raises(UserError, match=message):
            launch(replace(config, run_dir=str(tmp_path / "next"), training=training))


@pytest.mark.parametrize("name", TRAINED[-1:])
def test_a_run_of_model_garden_goes_on(converted, tmp_path, name):
    directory, *_ = converted[name]
    vocab_size = json.loads((directory / "config.json").read_text())["vocab_size"]
    data = write_samples(tmp_path / "data.tfrecord", 64, seed=0, seq_length=12, predictions=3, vocab_size=vocab_size)
    settings = {
        "data.max_seq_length": 12,
        "data.max_predictions_per_seq": 3,
        "training.num_steps": 1,
        "training.init_checkpoint": str(directory),
        "training.init_optimizer": True,
        "bert_config_file": str(directory / "config.json"),
    }
    assert launch(tiny_config(tmp_path / "run", data, **settings)) == 0
    moments = load_file(newest(tmp_path / "run") / OPTIMIZER)
    assert {tensor.item() for key, tensor in moments.items() if key.startswith("step.")} == {4.0}
