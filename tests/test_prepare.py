"""`prepare`: the same bytes whatever the workers and the interruptions, in bounded memory, and readable by all."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from helpers import DATA, VOCAB_FILE, VOCABULARY, build_index
from nodes import cluster, descendants, end_all, is_alive
from outages import faulty_store, small_disk
from runs import last_weights
from tfrecord.reader import tfrecord_loader
from transformers import BertForPreTraining, BertTokenizer

from raybert import cli, retry
from raybert.dataset import DATASET, MIN_DOCUMENTS, WORK, Settings, begin, make_plan, shard_tasks, tokenize_piece
from raybert.deck import read_parts
from raybert.errors import UserError
from raybert.example import Schema
from raybert.index import INDEX
from raybert.storage import Directory, find_files
from raybert.wordpiece import CLS, SEP

RUN = Path(__file__).parents[1] / "run.py"
TEXT = DATA / "genesis.txt"
SCHEMA = Schema(128, 20, len(VOCABULARY.tokens), 2)


def arguments(output, *more, text=TEXT):
    return ["prepare", "--input", str(text), "--vocab", str(VOCAB_FILE), "--output", str(output), *map(str, more)]


def prepared(output, *more, text=TEXT):
    """A dataset made in this process; what its dataset.json says."""
    assert cli.main([*arguments(output, *more, text=text), "--workers", "0"]) == 0
    return json.loads((output / DATASET).read_text())


def contents(output):
    """Every file's content, but that of the index, which holds when the shards were written."""
    return {path.name: path.read_bytes() if path.is_file() else len([*path.iterdir()]) for path in output.iterdir()}


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """Some files of many short documents, 4 MB in all: several pieces and parts at a shard of 1 MB."""
    folder, rng = tmp_path_factory.mktemp("books"), np.random.default_rng(1)
    sentences = TEXT.read_text().replace("\n\n", "\n").strip().split("\n")
    for number in range(3):
        documents = ("\n".join(rng.choice(sentences, 40)).strip() for _ in range(250))
        (folder / f"book-{number}.txt").write_text("\n\n".join(documents) + "\n")
    return folder / "book-*.txt"


@pytest.fixture(scope="module")
def of_books(books, tmp_path_factory):
    """The dataset of the books, made in one process without interruption."""
    output = tmp_path_factory.mktemp("dataset") / "books"
    prepared(output, "--shard_mb", 1, "--dupe_factor", 2, text=books)
    return output


# --- What is made -----------------------------------------------------------------------------------------------------


def test_what_is_made_is_what_training_reads(tmp_path):
    made = prepared(tmp_path / "out", "--dupe_factor", 3)
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        DATASET,
        INDEX,
        *(f"samples-0000{number}-of-00003.tfrecord" for number in range(3)),
        "vocab.txt",
    ]
    index = build_index(tmp_path / "out" / "samples-*", SCHEMA, tmp_path / "index")
    assert not any(shard.bad for shard in index.shards)
    assert index.num_samples == made["samples"]["samples"] == sum(shard["samples"] for shard in made["shards"]) > 700
    assert index.num_random_next == round(made["samples"]["random_next"] * index.num_samples)
    features = index.read(np.arange(index.num_samples))
    assert features["input_mask"].sum() == made["samples"]["tokens"]
    assert (features["input_ids"][:, 0] == VOCABULARY.ids[CLS]).all()
    assert ((features["input_ids"] == VOCABULARY.ids[SEP]).sum(axis=1) == 2).all()
    for shard in made["shards"]:
        content = (tmp_path / "out" / shard["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == VOCAB_FILE.read_bytes()


def test_a_peer_reads_what_is_made(tmp_path):
    prepared(tmp_path / "out", "--dupe_factor", 1)
    (path,) = (tmp_path / "out").glob("samples-*")
    types = {"input_ids": "int", "masked_lm_weights": "float", "next_sentence_labels": "int"}
    ours = build_index(path, SCHEMA, tmp_path / "index").read(np.arange(200))
    theirs = list(tfrecord_loader(str(path), None, types))[:200]
    for name in types:
        assert (np.stack([sample[name] for sample in theirs]) == ours[name].reshape(200, -1)).all()


TENSORFLOW = """
import sys
import tensorflow as tf
features = {name: tf.io.FixedLenFeature([128], tf.int64) for name in ("input_ids", "input_mask", "segment_ids")}
features |= {name: tf.io.FixedLenFeature([20], tf.int64) for name in ("masked_lm_positions", "masked_lm_ids")}
features |= {"masked_lm_weights": tf.io.FixedLenFeature([20], tf.float32)}
features |= {"next_sentence_labels": tf.io.FixedLenFeature([1], tf.int64)}
for compression, path in zip(("", "GZIP"), sys.argv[1:]):
    records = list(tf.data.TFRecordDataset(path, compression))
    parsed = tf.io.parse_example(tf.stack(records), features)
    print(len(records), *(int(tf.reduce_sum(tf.cast(parsed[name], tf.int64))) for name in sorted(features)))
"""


@pytest.mark.skipif(find_spec("tensorflow") is None, reason="needs TensorFlow (the extra tensorflow)")
def test_tensorflow_reads_what_is_made(tmp_path):
    """As Model Garden's input pipeline does, plain and gzip."""
    for name, more in (("plain", ()), ("packed", ("--gzip_compress",))):
        prepared(tmp_path / name, "--dupe_factor", 1, *more)
    paths = [next((tmp_path / name).glob("samples-*")) for name in ("plain", "packed")]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", TENSORFLOW, *map(str, paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    index = build_index(paths[0], SCHEMA, tmp_path / "index")
    ours = index.read(np.arange(index.num_samples))
    expected = " ".join(map(str, (index.num_samples, *(int(ours[name].sum(dtype=np.int64)) for name in sorted(ours)))))
    assert done.stdout.splitlines() == [expected, expected], done.stderr


def test_gzip_holds_the_same_samples(tmp_path):
    plain = prepared(tmp_path / "plain", "--dupe_factor", 1)
    packed = prepared(tmp_path / "packed", "--dupe_factor", 1, "--gzip_compress")
    assert packed["samples"] == plain["samples"] and packed["shards"][0]["name"].endswith(".tfrecord.gz")
    indices = [
        build_index(tmp_path / name / "samples-*", SCHEMA, tmp_path / f"{name}.index") for name in ("plain", "packed")
    ]
    assert indices[0].digest == indices[1].digest
    assert packed["shards"][0]["bytes"] < plain["shards"][0]["bytes"] / 2


@pytest.mark.parametrize(
    ("flag", "value"),
    [("random_seed", 7), ("do_whole_word_mask", "true"), ("parity", "google"), ("short_seq_prob", 0.5)],
)
def test_a_setting_changes_what_is_made(tmp_path, flag, value):
    prepared(tmp_path / "one", "--dupe_factor", 1)
    other = prepared(tmp_path / "other", "--dupe_factor", 1, f"--{flag}", value)
    assert str(other["plan"]["settings"][flag]).lower() == str(value)
    one, other = (contents(tmp_path / name)["samples-00000-of-00001.tfrecord"] for name in ("one", "other"))
    assert one != other


def test_every_copy_is_made_anew(tmp_path):
    """Other pairs and masks: hardly a sample is there twice."""
    prepared(tmp_path / "out", "--dupe_factor", 4)
    index = build_index(tmp_path / "out" / "samples-*", SCHEMA, tmp_path / "index")
    features = index.read(np.arange(index.num_samples))
    assert len(np.unique(features["input_ids"], axis=0)) > 0.99 * index.num_samples


def test_every_document_is_dealt_once_and_from_everywhere(books, tmp_path):
    settings = Settings(shard_mb=1)
    plan = make_plan(str(tmp_path), settings, VOCABULARY, find_files(str(books), "--input"))
    begin(plan, VOCABULARY)
    dealt = [tokenize_piece(plan, number) for number in range(len(plan.pieces))]
    assert len(plan.pieces) > 3 and plan.num_parts > 3
    parts = [read_parts(plan.work, dealt, [part]) for part in range(plan.num_parts)]
    numbers = np.concatenate([part.numbers for part in parts])
    assert len(numbers) == len(np.unique(numbers)) == sum(piece.num_documents for piece in dealt) == 750
    assert sum(len(part.tokens) for part in parts) == sum(piece.num_tokens for piece in dealt)
    for part in parts:
        by_piece = np.bincount(part.numbers >> 32, minlength=len(dealt))
        shares = by_piece / [piece.num_documents for piece in dealt]
        assert abs(shares - 1 / plan.num_parts).max() < 0.02


def test_few_documents_share_a_shard(tmp_path, books):
    """However small shards are to be, random nexts come from among MIN_DOCUMENTS documents or more."""
    texts = ["\n".join(["In the beginning God created the heaven and the earth."] * 4000)] * (MIN_DOCUMENTS + 9)
    path = tmp_path / "few.txt"
    path.write_text("\n\n".join(texts))
    plan = make_plan(str(tmp_path / "out"), Settings(shard_mb=1), VOCABULARY, find_files(str(path), "--input"))
    begin(plan, VOCABULARY)
    dealt = [tokenize_piece(plan, number) for number in range(len(plan.pieces))]
    assert plan.num_parts > 3
    tasks = shard_tasks(dealt, 2)
    assert [(task.copy, list(task.parts)) for task in tasks] == [
        (copy, list(range(plan.num_parts))) for copy in range(2)
    ]


# --- Workers and interruptions ----------------------------------------------------------------------------------------


@pytest.fixture
def environment():
    known = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return known | {"PYTHONPATH": str(RUN.parent)}


@pytest.fixture
def start(environment):
    """Starts the command; all that it has started is ended at the end."""
    processes = []

    def started(*words):
        command = [sys.executable, str(RUN), *words]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield started
    for process in processes:
        end_all(process)
        process.stdout.close()


def test_the_workers_change_nothing(books, of_books, tmp_path, start):
    """Processes make the bytes that one makes."""
    process = start(*arguments(tmp_path / "out", "--shard_mb", 1, "--dupe_factor", 2, "--workers", 3, text=books))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert contents(tmp_path / "out") == contents(of_books)


def test_a_node_dies_and_nothing_changes(books, of_books, tmp_path, start, environment):
    """Ray Data makes them too, on a cluster that loses a node."""
    output = tmp_path / "out"
    with cluster(2) as nodes:
        environment["RAY_ADDRESS"] = nodes.address
        process = start(*arguments(output, "--shard_mb", 1, "--dupe_factor", 2, text=books))
        while not list(output.glob(f"{WORK}/piece-*.json")):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        nodes.remove_node(nodes.list_all_nodes()[-1], allow_graceful=False)
        printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    assert contents(output) == contents(of_books)


@pytest.mark.parametrize("number", [0, 2])
def test_a_killed_prepare_leaves_no_process(books, tmp_path, start, number):
    """Neither the command's death nor that of one of its processes leaves the others behind."""
    output = tmp_path / "out"
    words = arguments(output, "--shard_mb", 1, "--dupe_factor", 2, "--workers", 2, text=books)
    process = start(*words)
    while not list(output.glob(f"{WORK}/piece-*.json")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    pids = [process.pid, *descendants(process.pid)]
    os.kill(pids[number], signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    if number:
        assert process.returncode == 1 and "a process was killed; run the same command again" in printed, printed
    deadline_s = time.monotonic() + 30
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    process = start(*words)  # it continues
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_prepare_goes_on_and_ends_with_the_same_bytes(books, of_books, tmp_path, start, num_workers):
    """Killed at ever later moments; what is visible then is whole."""
    output, expected, kills = tmp_path / "out", contents(of_books), 0
    words = arguments(output, "--shard_mb", 1, "--dupe_factor", 2, "--workers", num_workers, text=books)
    seen = set()
    for more in (1, 2, 1, 3, 6, 3, 4, 2, 1000):
        process = start(*words)
        known = count(output)
        while process.poll() is None and count(output) < known + more:
            time.sleep(0.002)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        visible = {name: content for name, content in contents_of_files(output).items() if not name.startswith(".")}
        assert DATASET not in visible
        assert all(expected[name] == content for name, content in visible.items())
        seen.add(len(visible))
    assert process.returncode == 0, process.stdout.read()
    assert kills == 8 and len(seen) > 3  # also between shards
    assert contents(output) == expected


def count(output):
    """Files in the output directory and in its work folder, those aside and the index: how far it is."""
    folders = (output, output / WORK)
    return sum(not path.name.startswith(".") and path.is_file() for folder in folders for path in folder.glob("*"))


def contents_of_files(output):
    return {path.name: path.read_bytes() for path in output.glob("*") if path.is_file()}


def test_what_is_complete_is_not_made_again(tmp_path, capsys):
    prepared(tmp_path / "out", "--dupe_factor", 1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert cli.main(arguments(tmp_path / "out", "--dupe_factor", 1)) == 0
    assert "samples in 1 shard, of 30 documents" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_input_and_output_in_a_bucket(tmp_path):
    prepared(tmp_path / "out", "--dupe_factor", 2)
    with faulty_store() as (_, bucket):
        text = Directory(f"{bucket}/text")
        text.write("genesis.txt", TEXT.read_bytes())
        out = Directory(f"{bucket}/made")
        words = ["--input", (text / "*.txt").uri, "--vocab", str(VOCAB_FILE), "--output", out.uri]
        assert cli.main(["prepare", *words, "--dupe_factor", "2", "--workers", "0"]) == 0
        names = [f"samples-0000{number}-of-00002.tfrecord" for number in range(2)]
        assert out.names() == [DATASET, INDEX, *names, "vocab.txt"]
        assert len((out / INDEX).names()) == 2
        assert all(out.read(name) == (tmp_path / "out" / name).read_bytes() for name in names)


BOUNDED = """
import resource, sys
from raybert import cli, cluster, tasks
text, vocab, warm, output, limit_mb = sys.argv[1:]
words = ["--vocab", vocab, "--dupe_factor", "1", "--shard_mb", "1", "--workers", "0"]
cli.main(["prepare", "--input", text + ".small", "--output", warm, *words])  # code and tables are there then
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
used = int(status["VmData"].split()[0]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + (int(limit_mb) << 20),) * 2)
sys.exit(cli.main(["prepare", "--input", text, "--output", output, *words]))
"""


def test_memory_is_bounded_by_the_shard(tmp_path, environment):
    """48 MB of text in 32 MB of memory beyond what a first small run took."""
    sentences, rng = TEXT.read_text().replace("\n\n", "\n").strip().split("\n"), np.random.default_rng(1)
    small = "\n\n".join("\n".join(rng.choice(sentences, 40)).strip() for _ in range(400))
    (tmp_path / "text.small").write_text(small)
    with (tmp_path / "text").open("w") as file:
        while file.tell() < 48 << 20:
            file.write(small + "\n\n")
    command = [sys.executable, "-c", BOUNDED, tmp_path / "text", VOCAB_FILE, tmp_path / "warm", tmp_path / "out", "32"]
    done = subprocess.run(command, env=environment | {"MALLOC_ARENA_MAX": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "out" / DATASET).read_text())["corpus"]["bytes"] > 48 << 20


# --- What is refused --------------------------------------------------------------------------------------------------


def refusal(capsys, words):
    """The message of a command that is refused."""
    capsys.readouterr()
    assert cli.main(words) == 1
    message = capsys.readouterr().err
    assert message.startswith("raybert: error: ") and "Traceback" not in message
    return message


TEXTS = {
    "empty": (b"", "The input holds no text"),
    "blank": (b"\n \n\n\t\n", "The input holds no text"),
    "control characters": (b"\x01\n\n\x02\n", "The input holds no text"),
    "one document": (b"One.\nTwo.\nThree.\n", "The input holds one document, and next sentence prediction"),
    "latin1": (b"One.\n\nTw\xf6.\n", "line 3, byte 8: 0xf6 is not UTF-8"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_bad_input_leaves_nothing_behind(tmp_path, capsys, name):
    content, expected = TEXTS[name]
    (tmp_path / "text.txt").write_bytes(content)
    words = [*arguments(tmp_path / "out", text=tmp_path / "text.txt"), "--workers", "0"]
    assert expected in refusal(capsys, words)
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "text.txt").write_bytes(TEXT.read_bytes())  # mended
    assert cli.main(words) == 0


def test_bad_input_leaves_nothing_behind_in_other_processes(books, tmp_path, start):
    """Found by a task while others are at work."""
    (tmp_path / "text.txt").write_bytes(TEXT.read_bytes() + b"\xff")
    words = arguments(tmp_path / "out", "--shard_mb", 1, "--workers", 2, text=f"{tmp_path / 'text.txt'},{books}")
    process = start(*words)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1 and "byte 110348: 0xff is not UTF-8" in output and "Traceback" not in output, output
    assert not list((tmp_path / "out").iterdir())


def test_pieces_without_a_plan_are_not_taken(tmp_path):
    """A task may write one after the folder was given up."""
    prepared(tmp_path / "expected", "--dupe_factor", 1)
    stale = Directory(str(tmp_path / "out" / WORK))
    stale.write("piece-00000.json", b"of other text")
    prepared(tmp_path / "out", "--dupe_factor", 1)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_node_that_does_not_see_a_directory_is_named(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(TEXT.read_bytes())
    plan = make_plan(str(tmp_path / "out"), Settings(), VOCABULARY, find_files(str(text), "--input"))
    with pytest.raises(UserError, match=r"out is not there on node .*; give an --output that every node sees"):
        tokenize_piece(plan, 0)
    begin(plan, VOCABULARY)
    text.unlink()
    with pytest.raises(
        UserError, match=r"text.txt is not there on node .*; restore it, or put it where every node sees it"
    ):
        tokenize_piece(plan, 0)


def test_one_document_is_enough_for_googles_script(tmp_path):
    (tmp_path / "text.txt").write_text("One two three four five.\n" * 100)
    made = prepared(tmp_path / "out", "--parity", "google", text=tmp_path / "text.txt")
    assert made["samples"]["random_next"] > 0.3


def test_a_word_that_is_too_long_is_unknown(tmp_path):
    (tmp_path / "text.txt").write_text(f"the {'a' * 201} end\n\nthe {'a' * 200} end\n")
    made = prepared(tmp_path / "out", text=tmp_path / "text.txt")
    assert made["corpus"]["unknown"] == 1 and made["corpus"]["tokens"] > 60


SETTINGS = {
    "max_seq_length": ("4", "max_seq_length must be at least 5, got 4"),
    "max_predictions_per_seq": ("128", "max_predictions_per_seq must be 1 or more and below max_seq_length, got 128"),
    "masked_lm_prob": ("15", "masked_lm_prob must be above 0 and below 1, got 15.0"),
    "short_seq_prob": ("-1", "short_seq_prob must be 0 to 1, got -1.0"),
    "dupe_factor": ("0", "dupe_factor must be 1 or more, got 0"),
    "max_ngram_size": ("3", "add --do_whole_word_mask"),
    "random_seed": ("-1", "random_seed must be 0 or more"),
    "shard_mb": ("0", "shard_mb must be 1 or more, got 0"),
    "vocab": ("nowhere.txt", "There is no file 'nowhere.txt'"),
    "input": ("nowhere/*.txt", "'nowhere/*.txt' matches no file"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_makes_no_sense_is_refused(tmp_path, capsys, name):
    value, expected = SETTINGS[name]
    assert expected in refusal(capsys, arguments(tmp_path / "out", f"--{name}", value))
    assert not (tmp_path / "out").exists()


def test_a_directory_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert f"{tmp_path} is not empty: it holds notes.txt" in refusal(capsys, arguments(tmp_path))
    assert contents_of_files(tmp_path) == {"notes.txt": b"mine"}


def test_another_plan_is_refused_by_what_differs(tmp_path, capsys):
    prepared(tmp_path / "out", "--dupe_factor", 1)
    message = refusal(capsys, arguments(tmp_path / "out", "--dupe_factor", 2))
    assert "holds a dataset with settings.dupe_factor 1, and now it is 2" in message


def test_a_prepare_that_was_begun_with_other_input_is_refused(books, tmp_path, capsys, start):
    text, output = tmp_path / "text.txt", tmp_path / "out"
    text.write_bytes(b"".join(path.read_bytes() for path in sorted(books.parent.iterdir())) * 3)
    words = [*arguments(output, "--shard_mb", 1, text=text), "--workers", "0"]
    process = start(*words)
    while not list(output.glob(f"{WORK}/piece-*.json")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    end_all(process)
    text.write_bytes(TEXT.read_bytes())
    assert re.search(r"holds a prepare that was begun with files .*, and now it is", refusal(capsys, words))


@pytest.mark.parametrize("moment", ["tokenising", "making shards"])
def test_a_full_disk_is_named_and_the_same_command_goes_on(tmp_path, capsys, monkeypatch, moment):
    monkeypatch.setattr(retry, "BLIP_S", 0.5)
    with small_disk(tmp_path / "disk", "4m") as disk:
        words = [*arguments(disk / "out", "--dupe_factor", 5), "--workers", "0"]
        if moment == "tokenising":
            (disk / "out").mkdir()
            (disk / "rest").write_bytes(bytes((4 << 20) - (1 << 19)))  # room for the vocabulary, not for the tokens
        else:
            (disk / "rest").write_bytes(bytes(3 << 20))
        message = refusal(capsys, words)
        assert "No space left on device" in message and "the same command again: it continues" in message
        left = [path.name for path in (disk / "out").rglob("*") if path.is_file()]
        assert not [name for name in left if name.startswith(".")] and DATASET not in left
        (disk / "rest").unlink()
        assert cli.main(words) == 0
        prepared(tmp_path / "out", "--dupe_factor", 5)
        assert contents(disk / "out") == contents(tmp_path / "out")


def test_odd_text_is_warned_of(tmp_path, capsys):
    (tmp_path / "greek.txt").write_text("ᚠᚢᚦ " * 300 + "\n\n" + "the end " * 300)
    prepared(tmp_path / "out", text=tmp_path / "greek.txt")
    output = capsys.readouterr().out
    assert re.search(r"WARNING: \d+\.\d% of the tokens are \[UNK\]", output)
    assert "WARNING: a sentence has 450 tokens on average, of 128 in a sample" in output


# --- And then ---------------------------------------------------------------------------------------------------------


def train(tmp_path, run, *more):
    """The third of three commands, on what the first two have made; its exit code."""
    data = ["--data.input_files", str(tmp_path / "out" / "samples-*"), "--data.vocab_file", str(tmp_path / "vocab.txt")]
    data += ["--data.max_seq_length=64", "--data.max_predictions_per_seq=10", "--model.vocab_size=1500"]
    model = [f"--model.{name}" for name in ("hidden_size=32", "num_hidden_layers=2", "num_attention_heads=2")]
    steps = ["--training.num_steps=6", "--training.global_batch_size=16", "--cluster.num_workers=0"]
    return cli.main(
        ["train", f"--run_dir={tmp_path / run}", *data, *model, "--model.intermediate_size=64", *steps, *more]
    )


def test_from_a_text_to_a_checkpoint_in_three_commands(tmp_path, capsys):
    """Tokenizer and weights open with transformers; masks of a run may be dynamic, and are then part of what it is."""
    vocab = tmp_path / "vocab.txt"
    assert cli.main(["vocab", "--input", str(TEXT), "--output", str(vocab), "--size", "1500"]) == 0
    words = ["--input", str(TEXT), "--vocab", str(vocab), "--output", str(tmp_path / "out"), "--dupe_factor", "2"]
    assert cli.main(["prepare", *words, "--max_seq_length", "64", "--max_predictions_per_seq", "10"]) == 0
    for masking in ("static", "dynamic"):
        assert train(tmp_path, masking, f"--data.masking={masking}") == 0
        assert cli.main(["verify", str(tmp_path / masking)]) == 0
    assert (last_weights(tmp_path / "static") != last_weights(tmp_path / "dynamic")).any()
    capsys.readouterr()
    assert train(tmp_path, "dynamic", "--data.masking=static") == 1
    assert "data.masking: 'dynamic' there, 'static' now" in capsys.readouterr().err
    (checkpoint,) = (tmp_path / "dynamic" / "checkpoints").iterdir()
    tokenizer = BertTokenizer.from_pretrained(checkpoint)
    model = BertForPreTraining.from_pretrained(checkpoint)
    tokens = tokenizer(["In the beginning [MASK] created the heaven."], return_tensors="pt")
    assert model(**tokens).prediction_logits.shape == (1, tokens["input_ids"].shape[1], 1500)
