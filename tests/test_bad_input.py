"""Bad input: whatever a user can get wrong ends in one message that names the place and the remedy, and in exit code 1.

All goes through the command line; nothing here trains a step before it is refused.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import DATA, SAMPLE_FILE, tiny_config, write_samples
from nodes import own_dashboard
from ray.cluster_utils import Cluster

from raybert.chronicle import SKIPPED
from raybert.cli import main
from raybert.config_file import config_to_yaml
from raybert.feed import MIN_BLOCK_ROWS
from raybert.preflight import check_window

ROOT = Path(__file__).parents[1]
GOOGLE = "--data.max_seq_length=128 --data.max_predictions_per_seq=20 --model.vocab_size=30522"
GOOGLE += " --model.max_position_embeddings=128 --data.input_files="
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"token{number}" for number in range(92))]
BERT_CONFIG = {
    "vocab_size": 97,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_act": "gelu",
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
}


def flags_of(text, places):
    """Flags, and flag values with blanks written as ~; {name} is a place."""
    return [flag.replace("~", " ") for flag in text.format(**places).split()]


def check_refusal(code, stderr, fragments):
    assert code == 1, stderr
    assert stderr.startswith("raybert: error:")
    assert stderr.count("error:") == 1
    assert "Traceback" not in stderr
    for fragment in fragments:
        assert fragment in stderr


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Files by name, most of them wrong in one way, and a finished run."""
    here = tmp_path_factory.mktemp("bad")
    write_samples(here / "a.tfrecord", 128, seed=1)
    write_samples(here / "other.tfrecord", 128, seed=2)
    whole = SAMPLE_FILE.read_bytes()
    (here / "flipped.tfrecord").write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    (here / "cut.tfrecord").write_bytes(whole[:-100])
    write_vocabulary(here / "long.txt", [*TOKENS, "one more"])
    write_vocabulary(here / "moved.txt", ["[CLS]", *(token for token in TOKENS if token != "[CLS]")])
    write_vocabulary(here / "no-mask.txt", [token for token in TOKENS if token != "[MASK]"])
    (here / "latin.txt").write_bytes("Stra\xdfe".encode("latin-1"))
    (here / "not.json").write_text('{"vocab_size": 97,\n oops}')
    (here / "key.json").write_text(json.dumps({k: v for k, v in BERT_CONFIG.items() if k != "vocab_size"}))
    (here / "heads.json").write_text(json.dumps(BERT_CONFIG | {"num_attention_heads": 3}))
    (here / "long.json").write_text(json.dumps(BERT_CONFIG | {"max_position_embeddings": 8}))
    (here / "bad.yaml").write_text("training:\n  num_steps: [3\n")
    (here / "pickle").mkdir()
    (here / "pickle" / "config.json").write_text(json.dumps(BERT_CONFIG | {"num_hidden_layers": 2}))
    (here / "pickle" / "pytorch_model.bin").write_bytes(b"")
    (here / "empty").mkdir()
    (here / "tiny.yaml").write_text(config_to_yaml(tiny_config(here / "run", here / "a.tfrecord")))
    assert main(["train", "--config", str(here / "tiny.yaml")]) == 0
    return {"here": here, "damaged": DATA / "damaged"}


def write_vocabulary(path, tokens):
    path.write_text("\n".join(tokens) + "\n")


@pytest.fixture
def refused(places, tmp_path, capsys):
    """Gives the command line more flags, and checks that it refuses and leaves no checkpoint; gives what it says."""

    def check(flags, fragments):
        capsys.readouterr()
        base = ["train", "--config", str(places["here"] / "tiny.yaml"), "--run_dir", str(tmp_path / "run")]
        code = main([*base, *flags_of(flags, places | {"tmp": tmp_path})])
        said = capsys.readouterr().err
        check_refusal(code, said, [fragment.format(**places) for fragment in fragments])
        assert not (tmp_path / "run" / "checkpoints").exists()
        return said

    return check


FILES = {
    "missing": (
        "--data.input_files={here}/no.tfrecord",
        ["data.input_files", "{here}/no.tfrecord", "correct the path"],
    ),
    "empty glob": ("--data.input_files={here}/*.records", ["data.input_files", "{here}/*.records", "or the glob"]),
    "one of two missing": ("--data.input_files={here}/a.tfrecord,no", ["'no' matches no file", "working directory"]),
    "a directory": ("--data.input_files={here}", ["data.input_files", "'{here}' matches no file"]),
    "no path": ("--data.input_files=,", ["data.input_files must not be empty", "--config sample"]),
    "cannot be read": (
        "--data.input_files=/proc/self/mem",
        ["data.input_files", "/proc/self/mem", "correct its permissions"],
    ),
    "not a TFRecord": (
        GOOGLE + "{damaged}/not_tfrecord.txt.tfrecord",
        ["not_tfrecord.txt.tfrecord: record 0 at byte 0"],
    ),
    "no record": (GOOGLE + "{damaged}/empty.tfrecord", ["no sample in 1 files", "empty.tfrecord", "hold samples"]),
    "no proto": (GOOGLE + "{damaged}/garbage_proto.tfrecord", ["garbage_proto.tfrecord: record "]),
    "no feature": (GOOGLE + "{damaged}/missing_feature.tfrecord", ["missing_feature.tfrecord: record "]),
    "position": (GOOGLE + "{damaged}/position_ge_seq.tfrecord", ["position_ge_seq.tfrecord: record "]),
    "token id": (GOOGLE + "{damaged}/token_id_ge_vocab.tfrecord", ["token_id_ge_vocab.tfrecord: record "]),
    "length": (GOOGLE + "{damaged}/wrong_length_one.tfrecord", ["wrong_length_one.tfrecord: record "]),
    "type": (GOOGLE + "{damaged}/wrong_type.tfrecord", ["wrong_type.tfrecord: record "]),
    "flipped bit": (GOOGLE + "{here}/flipped.tfrecord", ["flipped.tfrecord: record 6 at byte "]),
    "cut": (GOOGLE + "{here}/cut.tfrecord", ["cut.tfrecord: record 117 at byte "]),
    "max_seq_length": ("--data.max_seq_length=12", ["a.tfrecord: record 0 at byte 0: found", "expected"]),
    "max_predictions": ("--data.max_predictions_per_seq=5", ["a.tfrecord: record 0 at byte 0: found", "expected"]),
    "vocab_size": ("--model.vocab_size=50", ["a.tfrecord: record 0", "expected"]),
    "held-out missing": ("--evaluation.input_files=no.tfrecord", ["evaluation.input_files: 'no.tfrecord' matches no"]),
    "held-out damaged": (
        "--evaluation.input_files={here}/cut.tfrecord",
        ["evaluation.input_files: bad records", "cut"],
    ),
}
BAD_RECORD_REMEDY = ["found", "expected", "correct the settings they are compared with", "--data.on_bad_record skip"]


@pytest.mark.parametrize("case", FILES)
def test_bad_files_are_refused(refused, case):
    flags, fragments = FILES[case]
    refused(flags, fragments + (BAD_RECORD_REMEDY if ": record " in fragments[0] else []))


SETTINGS = {
    "warmup": ("--optimizer.warmup_steps=8", ["warmup_steps=8 and num_steps=8", "lower warmup_steps"]),
    "batch": (
        "--training.global_batch_size=2 --cluster.num_workers=3",
        ["global_batch_size=2", "raise the batch size"],
    ),
    "micro-batch": ("--training.micro_batch_size=0", ["training.micro_batch_size must be at least 1", "raise it"]),
    "workers": ("--cluster.num_workers=4,2", ["min <= max", "write '2,4'"]),
    "precision": ("--training.precision=fp61", ["command line", "training.precision", "fp32, bf16, fp16"]),
    "unknown key": ("--training.num_stepz=3", ["command line", "did you mean --training.num_steps?"]),
    "bad YAML": ("--config={here}/bad.yaml", ["--config was given more than once"]),
    "positions": ("--data.max_seq_length=17", ["model.max_position_embeddings", "raise model.max_position_embeddings"]),
    "positions of the file": ("--bert_config_file={here}/long.json", ["max_position_embeddings=8", "shorter samples"]),
    "no JSON": ("--bert_config_file={here}/not.json", ["bert_config_file: {here}/not.json, line 2", "correct it"]),
    "key of JSON": ("--bert_config_file={here}/key.json", ["bert_config_file: ", "must say vocab_size; add"]),
    "heads of JSON": (
        "--bert_config_file={here}/heads.json",
        ["heads.json: num_attention_heads must divide", "change"],
    ),
    "no bert_config": (
        "--bert_config_file={here}/no.json",
        ["bert_config_file: ", "{here}/no.json", "correct the path"],
    ),
    "heads": ("--model.num_attention_heads=3", ["num_attention_heads must divide hidden_size", "change one of them"]),
    "no vocabulary": ("--data.vocab_file={here}/no.txt", ["data.vocab_file: ", "{here}/no.txt", "correct the path"]),
    "long vocabulary": ("--data.vocab_file={here}/long.txt", ["data.vocab_file: ", "98 tokens", "set vocab_size=98"]),
    "no [MASK]": ("--data.vocab_file={here}/no-mask.txt", ["data.vocab_file: ", "[MASK]", "WordPiece vocabulary"]),
    "encoding": ("--data.vocab_file={here}/latin.txt", ["data.vocab_file: ", "must be UTF-8", "convert it"]),
    "[CLS] elsewhere": (
        "--data.vocab_file={here}/moved.txt",
        [
            "data.vocab_file: [CLS] is token 0",
            "a.tfrecord begin with token",
            "vocabulary that the files were made with",
        ],
    ),
    "run_dir below a file": (
        "--run_dir={here}/not.json/run",
        ["run_dir: ", "{here}/not.json/run", "writable directory"],
    ),
    "no weights": ("--training.init_checkpoint={here}/no", ["training.init_checkpoint: '{here}/no'", "run directory"]),
    "no run": ("--training.init_checkpoint={here}/empty", ["training.init_checkpoint: ", "neither", "run directory"]),
    "other shape": (
        "--training.init_checkpoint={here}/run --model.hidden_size=32",
        ["training.init_checkpoint: ", "same shape", "(97, 16) and (97, 32)", "set the model's sizes"],
    ),
    "pickle": ("--training.init_checkpoint={here}/pickle", ["training.init_checkpoint: ", "only a pickle", "convert"]),
    "Model Garden's GPUs": (
        "--num_gpus=4",
        ["command line", "--num_gpus has no meaning here", "--cluster.use_gpu true"],
    ),
    "Model Garden's all-reduce": ("--all_reduce_alg=nccl", ["--all_reduce_alg has no meaning here", "leave it out"]),
    "scheme": ("--run_dir=ftp://host/run", ["ftp://", "give a local path, s3://"]),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_bad_settings_are_refused(refused, case):
    refused(*SETTINGS[case])


@pytest.mark.parametrize("secret", ["s3://AKIA5:hunter2@bucket/x", "s3://bucket/x?secret_key=hunter2"])
@pytest.mark.parametrize(
    "option",
    ["run_dir", "data.input_files", "data.vocab_file", "evaluation.input_files", "training.init_checkpoint"],
)
def test_credentials_in_a_path_are_refused_and_not_repeated(refused, option, secret):
    assert "hunter2" not in refused(f"--{option}={secret}", ["must not hold credentials; set them in the environment"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_gpus_that_are_not_there_are_refused_before_anything_starts(refused, num_workers):
    flags = f"--cluster.use_gpu=true --cluster.num_workers={num_workers}"
    refused(flags, ["cluster.use_gpu is true", "no GPU on this machine", "set cluster.use_gpu to false"])


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["--config", "{here}/bad.yaml"], ["{here}/bad.yaml: not valid YAML", "line 2", "mend this"]),
        (["--config", "{here}/no.yaml"], ["cannot read the configuration {here}/no.yaml", "or one of", "sample"]),
        (["--config", "smaple"], ["cannot read the configuration smaple", "sample"]),
        ([], ["data.input_files must not be empty", "--config sample"]),
    ],
)
def test_bad_configurations_are_refused(places, capsys, argv, fragments):
    code = main(["train", *(word.format(**places) for word in argv)])
    check_refusal(code, capsys.readouterr().err, [fragment.format(**places) for fragment in fragments])


def test_misspelt_command_is_refused(capsys):
    check_refusal(main(["trian"]), capsys.readouterr().err, ["unknown command 'trian'", "did you mean train?"])


@pytest.mark.parametrize(
    ("num_workers", "window_size", "is_warned"),
    [
        (1, 128, False),
        (8, 128, False),
        (9, 9 * MIN_BLOCK_ROWS - 1, True),
        ("1,64", 32768, True),
        ("1,64", 64 * MIN_BLOCK_ROWS, False),
    ],
)
def test_a_window_too_small_for_many_workers_is_warned_of(tmp_path, num_workers, window_size, is_warned):
    settings = {"cluster.num_workers": num_workers, "data.window_size": window_size}
    warnings = []
    check_window(tiny_config(tmp_path, "none", **settings), warnings.append)
    assert len(warnings) == is_warned
    assert all(f"data.window_size={window_size} " in text and "begin a new run with" in text for text in warnings)


OTHERS = {
    "model": ("--model.hidden_size=32", ["model.hidden_size: 16 there, 32 now"]),
    "seed": ("--training.seed=1", ["training.seed: 12345 there, 1 now"]),
    "batch size": ("--training.global_batch_size=64", ["training.global_batch_size: 32 there, 64 now"]),
    "optimizer": ("--optimizer.type=lamb", ["optimizer.type: 'adamw' there, 'lamb' now"]),
    "two": ("--training.seed=1 --data.window_size=64", ["training.seed: ", "data.window_size: 128 there, 64 now"]),
    "data": ("--data.input_files={here}/other.tfrecord --training.num_steps=9", ["data: '", "' there, '", "' now"]),
}


@pytest.mark.parametrize("case", OTHERS)
def test_run_of_another_configuration_is_refused_and_untouched(places, capsys, case):
    flags, fragments = OTHERS[case]
    run = places["here"] / "run"
    before = contents(run)
    capsys.readouterr()
    code = main(["train", "--config", str(places["here"] / "tiny.yaml"), *flags_of(flags, places)])
    remedy = ["run_dir: ", str(run), "Give its values back, or begin another run with another run_dir"]
    check_refusal(code, capsys.readouterr().err, fragments + remedy)
    assert contents(run) == before


def contents(run):
    """What a run consists of; indices of other files may come."""
    files = (path for path in run.rglob("*") if path.is_file() and path.parent.name != "index")
    return {str(path): path.read_bytes() for path in files}


def test_skipping_bad_records_lists_them(places, tmp_path, capsys):
    flags = GOOGLE + "{here}/flipped.tfrecord,{damaged}/wrong_type.tfrecord --data.on_bad_record=skip"
    flags += " --training.num_steps=1"
    base = ["train", "--config", str(places["here"] / "tiny.yaml"), "--run_dir", str(tmp_path / "run")]
    assert main([*base, *flags_of(flags, places)]) == 0
    said = capsys.readouterr().out
    listed = json.loads((tmp_path / "run" / SKIPPED).read_bytes())["data.input_files"]
    assert [len(records) for records in listed.values()] == [1, 1]
    assert any("record 6 at byte" in record for records in listed.values() for record in records)
    assert f"2 bad records in 2 files are left out; {SKIPPED} in the run directory lists them" in said


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_trains_on_a_cpu(places, tmp_path, precision):
    base = ["train", "--config", str(places["here"] / "tiny.yaml"), "--run_dir", str(tmp_path / "run")]
    assert main([*base, "--training.precision", precision]) == 0


# What is answered by another process: storage and Ray


def start(argv, **environment):
    """The command in a process of its own."""
    names = ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH")
    known = {name: os.environ[name] for name in names if name in os.environ}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, str(ROOT / "run.py"), "train", *argv]
    return subprocess.Popen(command, env=known | environment, **pipes)


def closed_port():
    """A port that nobody listens at."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def check_all(runs):
    """Check refusals of processes that run side by side."""
    answers = [process.communicate(timeout=100)[1] for process, _ in runs]
    for (process, fragments), stderr in zip(runs, answers, strict=True):
        check_refusal(process.returncode, stderr, fragments)


def test_storage_that_does_not_answer_is_refused_soon(places, tmp_path):
    place = f"s3://bucket/x?endpoint_override=127.0.0.1:{closed_port()}&scheme=http&region=us-east-1"
    options = ("run_dir", "data.input_files", "data.vocab_file", "training.init_checkpoint")
    base = ["--config", str(places["here"] / "tiny.yaml"), "--run_dir", str(tmp_path / "run")]
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_EC2_METADATA_DISABLED": "true"}
    started_at_s = time.monotonic()
    runs = [(start([*base, f"--{option}", place], **keys), [f"{option}: ", place, "check the"]) for option in options]
    check_all(runs)
    assert time.monotonic() - started_at_s < 60


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of one node with two CPUs that never grows."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0, **own_dashboard()})
    yield cluster
    cluster.shutdown()


def test_cluster_that_does_not_answer_or_suffice_is_refused(places, tmp_path, cluster):
    base = ["--config", str(places["here"] / "tiny.yaml"), "--run_dir", str(tmp_path / "run")]
    nobody = f"127.0.0.1:{closed_port()}"
    cases = [
        (nobody, "--cluster.num_workers=1", [f"RAY_ADDRESS is '{nobody}'", "`ray start --head`"]),
        (
            cluster.address,
            "--cluster.num_workers=3",
            ["needs at least 3 workers", "2 CPUs", "lower cluster.num_workers"],
        ),
        (cluster.address, "--cluster.num_workers=2", ["takes every CPU", "2 CPUs", "lower cluster.num_workers"]),
        (cluster.address, "--cluster.num_workers=1 --cluster.use_gpu=true", ["1 GPU", "0 GPUs", "or add nodes"]),
        (
            "http://127.0.0.1:8265",
            "--cluster.num_workers=1",
            ["which is the dashboard", "ray job submit", "10.0.0.5:6379"],
        ),
        ("ray://127.0.0.1:10001", "--cluster.num_workers=1", ["which is Ray Client", "ray job submit"]),
    ]
    runs = [(start([*base, *flags.split()], RAY_ADDRESS=address), said) for address, flags, said in cases]
    closed = {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}  # a home without a token
    flags = [*base, "--cluster.num_workers=1"]
    runs.append((start(flags, RAY_ADDRESS=cluster.address, **closed), ["asks for a token", "~/.ray/auth_token"]))
    check_all(runs)
