import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from helpers import TINY_MODEL, TINY_SCHEMA, VOCAB_FILE, build_index, tiny_config, write_samples

from raybert.cli import main
from raybert.config import TrainingConfig
from raybert.evaluate import evaluate
from raybert.index import INDEX
from raybert.launch import run as launch
from raybert.model import BertForPreTraining
from raybert.pretrained import save_pretrained
from raybert.scores import BANDS, bands_of, score
from raybert.weights import open_model
from raybert.world import World


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps that has evaluated itself, and its held-out file."""
    folder = tmp_path_factory.mktemp("trained")
    write_samples(folder / "train.tfrecord", 300, seed=1)
    held_out = write_samples(folder / "held-out.tfrecord", 70, seed=2)
    settings = {"training.num_steps": 4, "evaluation.input_files": str(held_out), "optimizer.learning_rate": 0.01}
    assert launch(tiny_config(folder / "run", folder / "train.tfrecord", **settings)) == 0
    return folder / "run", held_out


@pytest.fixture
def of_transformers(tmp_path):
    """A directory of transformers with both heads."""
    torch.manual_seed(3)
    model = BertForPreTraining(TINY_MODEL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    save_pretrained(tmp_path, model.state_dict(), TINY_MODEL)
    return tmp_path


def scores(capsys, *words):
    assert main(["evaluate", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("part", ["", "checkpoints/{name}"], ids=["run", "checkpoint"])
def test_the_figures_are_those_of_the_run(trained, capsys, part):
    run_dir, held_out = trained
    (name,) = (path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith("step-00000004"))
    found = scores(capsys, run_dir / part.format(name=name), "--input_files", held_out, "--micro_batch_size", "8")
    *_, logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert logged.pop("kind") == "eval"
    assert {key: found[key] for key in logged} == pytest.approx(logged, rel=1e-12)
    assert found["samples"] == 70 and found["frequency_of"] == "the training data"
    assert found["masked_lm_perplexity"] == pytest.approx(np.exp(found["lm_example_loss"]))


def test_bands_add_up(trained, capsys):
    found = scores(capsys, trained[0], "--input_files", trained[1])
    loss = sum(band["weight"] * band["loss"] for band in found["bands"] if band["weight"])
    correct = sum(band["weight"] * band["accuracy"] for band in found["bands"] if band["weight"])
    assert sum(band["weight"] for band in found["bands"]) == found["masked_tokens"]
    assert loss / found["masked_tokens"] == pytest.approx(found["lm_example_loss"], rel=1e-12)
    assert correct / found["masked_tokens"] == pytest.approx(found["masked_lm_accuracy"], rel=1e-12)


def test_a_token_is_in_the_band_of_its_share():
    counts = np.array([10_000, 9_999, 1_000, 999, 100, 10, 9, 1, 0])
    counts = np.append(counts, 1_000_000 - counts.sum())
    assert bands_of(counts).tolist() == [0, 1, 1, 2, 2, 3, 4, 4, 5, 0]
    assert len(BANDS) == 6 and bands_of(np.zeros(3, np.int64)).tolist() == [5, 5, 5]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sums_are_those_of_the_evaluation_in_training(index, precision):
    torch.manual_seed(0)
    model = BertForPreTraining(TINY_MODEL).eval()
    training = TrainingConfig(micro_batch_size=32, precision=precision)
    found = score(model, index, training, World(), bands_of(index.label_counts))
    assert found.sums.metrics() == pytest.approx(evaluate(model, index, None, training, World()), rel=1e-12)


def test_the_figures_are_those_of_transformers(of_transformers, index, capsys):
    paths = [shard.file.path for shard in index.shards]
    found = scores(capsys, of_transformers, "--input_files", *paths)
    twin = transformers.BertForPreTraining.from_pretrained(of_transformers).eval()
    features = index.read(np.arange(index.num_samples))
    inputs = {name: torch.from_numpy(values).long() for name, values in features.items()}
    with torch.no_grad():
        output = twin(inputs["input_ids"], attention_mask=inputs["input_mask"], token_type_ids=inputs["segment_ids"])
    rows, places = features["masked_lm_weights"].nonzero()
    logits = output.prediction_logits[rows, inputs["masked_lm_positions"][rows, places]]
    labels, nexts = inputs["masked_lm_ids"][rows, places], inputs["next_sentence_labels"].flatten()
    expected = {
        "lm_example_loss": torch.nn.functional.cross_entropy(logits, labels).item(),
        "masked_lm_accuracy": (logits.argmax(1) == labels).double().mean().item(),
        "next_sentence_loss": torch.nn.functional.cross_entropy(output.seq_relationship_logits, nexts).item(),
        "next_sentence_accuracy": (output.seq_relationship_logits.argmax(1) == nexts).double().mean().item(),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert found["frequency_of"] == "the evaluated files" and "unigram_mlm_loss" not in found


def test_a_person_reads_the_same(trained, capsys):
    assert main(["evaluate", str(trained[0]), "--input_files", str(trained[1])]) == 0
    text = capsys.readouterr().out
    for part in (
        "step 4",
        "70 samples in 1 file,",
        "Masked LM      loss",
        "Next sentence  loss",
        "guessing",
        "of the tokens",
    ):
        assert part in text


def test_without_its_index_a_run_is_measured_by_the_files(trained, tmp_path, capsys):
    shutil.copytree(trained[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / INDEX)
    assert scores(capsys, tmp_path / "run", "--input_files", trained[1])["frequency_of"] == "the evaluated files"


def test_masked_lm_alone_has_no_next_sentence(trained, tmp_path, capsys):
    shutil.copytree(next((trained[0] / "checkpoints").glob("step-00000004*")), tmp_path / "copy")
    state = json.loads((tmp_path / "copy" / "state.json").read_text())
    state["identity"]["training.use_next_sentence_label"] = False
    (tmp_path / "copy" / "state.json").write_text(json.dumps(state))
    twin = transformers.BertForMaskedLM.from_pretrained(tmp_path / "copy")
    twin.save_pretrained(tmp_path / "masked")
    whole = scores(capsys, trained[0], "--input_files", trained[1])
    for name in ("copy", "masked"):
        found = scores(capsys, tmp_path / name, "--input_files", trained[1])
        assert "next_sentence_loss" not in found
        assert found["loss"] == found["lm_example_loss"] == pytest.approx(whole["lm_example_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "--input_files", "{here}/nothing*"], "--input_files: .* matches no file"),
        (["{here}", "--input_files", "{held_out}"], "holds neither a config.json nor a run"),
        (["{encoder}", "--input_files", "{held_out}"], "has no masked LM head, only an encoder"),
        (["{run}", "--input_files", "{long}"], "samples have 24 tokens, .* max_position_embeddings=16"),
        (["{run}", "--input_files", "{other}"], "bad records:(.|\n)*vocab_size 97"),
        (["{run}", "--input_files", "{text}"], "hold no BERT sample"),
        (["{run}", "--input_files", "{held_out}", "--micro_batch_size", "0"], "--micro_batch_size must be at least 1"),
    ],
)
def test_a_mistake_is_named(trained, tmp_path, capsys, words, message):
    config = transformers.AutoConfig.from_pretrained(next((trained[0] / "checkpoints").glob("step-*")))
    transformers.BertModel(config).save_pretrained(tmp_path / "encoder")
    capsys.readouterr()
    places = {
        "run": trained[0],
        "held_out": trained[1],
        "here": tmp_path,
        "encoder": tmp_path / "encoder",
        "long": write_samples(tmp_path / "long.tfrecord", 5, seed=0, seq_length=24),
        "other": write_samples(tmp_path / "other.tfrecord", 50, seed=0, vocab_size=500),
        "text": VOCAB_FILE,
    }
    assert main(["evaluate", *(word.format(**places) for word in words)]) == 1
    assert_says(capsys, message)


def assert_says(capsys, message):
    error = capsys.readouterr().err
    assert "Traceback" not in error
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)


def test_samples_of_another_vocabulary_are_refused(of_transformers, tmp_path_factory, capsys):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
    (of_transformers / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens))
    folder = tmp_path_factory.mktemp("other")
    write_samples(folder / "held-out.tfrecord", 9, seed=0)
    assert build_index(folder / "held-out.tfrecord", TINY_SCHEMA, folder / "index").num_samples == 9
    assert main(["evaluate", str(of_transformers), "--input_files", str(folder / "held-out.tfrecord")]) == 1
    assert_says(capsys, r"\[CLS\] is token 2 in .*vocab.txt, but samples")


def test_what_is_opened_is_for_evaluation(of_transformers):
    assert not open_model(str(of_transformers)).model.training
