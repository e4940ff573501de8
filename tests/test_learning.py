"""The recipe of docs/LEARNING.md: its commands run, what they train learns, as transformers would, and can be used."""

import importlib.util
import json
import re
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import pytest
from helpers import DATA

from raybert.launch import BASELINES
from raybert.storage import Directory
from raybert.telemetry import EVAL, read_metrics

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "LEARNING.md"
TEXT = DATA / "genesis.txt"
SMALLER = {
    "model.vocab_size": 1000,
    "model.hidden_size": 64,
    "model.num_hidden_layers": 2,
    "model.intermediate_size": 256,
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup_steps": 20,
    "training.num_steps": 200,
    "evaluation.every_steps": 0,
    "cluster.num_workers": 0,
}
REPLACED = {
    "python run.py": f"{sys.executable} {ROOT / 'run.py'}",
    "corpus/*.txt": str(TEXT),
    "NR % 20": "NR % 10",  # of 30 chapters
    "--size 8000": f"--size {SMALLER['model.vocab_size']}",
    "--max_predictions_per_seq 10": "--max_predictions_per_seq 10 --workers 0",
    "--config laptop": "--config laptop " + " ".join(f"--{name}={value}" for name, value in SMALLER.items()),
}


def commands():
    """What the guide says to type from text to a verified run, on Genesis and smaller."""
    for command in re.findall(r"^    ((?:mkdir|awk|python run\.py) .*)$", GUIDE.read_text(), re.MULTILINE):
        for theirs, smaller in REPLACED.items():
            command = command.replace(theirs, smaller)
        yield command


def script(name):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the commands were run."""
    path = tmp_path_factory.mktemp("recipe")
    for command in commands():
        subprocess.run(command, shell=True, cwd=path, check=True)
    return path


@pytest.fixture(scope="module")
def checkpoint(place):
    (path,) = (place / "runs" / "laptop" / "checkpoints").iterdir()
    return path


def test_the_guide_is_text_vocabulary_samples_training_and_proof():
    words = [command.removeprefix(REPLACED["python run.py"]).split()[0] for command in commands()]
    assert words == ["mkdir", "awk", "vocab", "prepare", "prepare", "train", "verify"]


def test_the_recipe_learns_what_frequencies_do_not_say(place):
    """Of chapters that are held out."""
    run = Directory(str(place / "runs" / "laptop"))
    (held_out,) = (row for row in read_metrics(run) if row["kind"] == EVAL)
    assert held_out["lm_example_loss"] < json.loads(run.read(BASELINES))["unigram_mlm_loss"] - 0.1


def test_no_document_is_in_both_parts(place):
    train, held_out = ((place / "text" / f"{part}.txt").read_text().split("\n\n") for part in ("train", "held-out"))
    whole = TEXT.read_text().strip().split("\n\n")
    assert sorted(filter(None, (*train, *held_out))) == sorted(document.strip() for document in whole)
    assert len(list(filter(None, held_out))) == len(whole) // 10


def test_transformers_learns_the_same_from_the_same_batches(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    script("reference").main(["--config", "runs/laptop/config.yaml", "--num_steps", "20", "--every_steps", "20"])
    before, after = map(json.loads, capsys.readouterr().out.splitlines())
    assert (before["step"], after["step"]) == (0, 20)
    assert before["raybert"] == pytest.approx(before["transformers"], abs=2e-4)
    assert after["raybert"] == pytest.approx(after["transformers"], abs=2e-3)
    assert after["raybert"]["lm_example_loss"] < before["raybert"]["lm_example_loss"] - 0.1


def test_the_checkpoint_is_fine_tuned_beside_random_weights(checkpoint, tmp_path, capsys):
    sentences = list(filter(None, TEXT.read_text().splitlines()))[:90]
    lines = (f"{n}\t{rating}\t{text}" for n, (text, rating) in enumerate(zip(sentences, cycle((1.5, 0, -0.2)))))
    rated = tmp_path / "rated.txt"
    rated.write_text("\n".join(lines))
    finetune = script("finetune")
    known, others = finetune.split(finetune.read(rated), 20)
    assert (len(known), len(others)) == (20, 40) and not set(known) & set(others)
    assert set(known + others) == {(text, 1) for text in sentences[::3]} | {(text, 0) for text in sentences[2::3]}
    finetune.main([str(checkpoint), str(rated), "--seeds", "2", "--epochs", "1", "--num_held_out", "20"])
    said = capsys.readouterr().out
    assert said.startswith("40 sentences to train on, 20 held out; the majority of them 0.")
    for start in ("pretrained", "random"):
        assert re.search(rf"^{start}: 0\.\d+, standard deviation 0\.\d+ over 2 seeds$", said, re.MULTILINE)
