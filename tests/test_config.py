"""Laws of configuration: values combine, text and Config are the same thing, and every refusal names the way out."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest

from raybert import cli, model_garden
from raybert.checks import check_config
from raybert.cli import main, parse_train
from raybert.config import (
    CheckpointConfig,
    ClusterConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    GuardConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from raybert.config_file import (
    FIELDS,
    SECTIONS,
    SHIPPED_DIR,
    config_from_yaml,
    config_to_yaml,
    load_settings,
    nearest_name,
    shipped_names,
)
from raybert.errors import UserError

pytestmark = pytest.mark.filterwarnings("error")
ROOT = Path(__file__).parents[1]
INPUT = ["--data.input_files", "data/*.tfrecord"]


def config_of(*argv: str) -> Config:
    return parse_train(list(argv)).config


def value_of(config: Config, name: str) -> object:
    value: object = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def refusal(argv: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        parse_train(argv)
    return str(caught.value)


@pytest.fixture
def yaml_file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "my.yaml"
        path.write_text(text)
        return str(path)

    return write


# Names and values


def test_fields_are_those_of_the_dataclasses() -> None:
    assert [field.name for field in fields(Config)] == list(dict.fromkeys(name.split(".")[0] for name in FIELDS))
    for name, section in SECTIONS.items():
        assert [f"{name}.{field.name}" for field in fields(section)] == [n for n in FIELDS if n.startswith(f"{name}.")]


def test_defaults_then_yaml_then_flags(yaml_file: Callable[[str], str]) -> None:
    path = yaml_file("training: {num_steps: 5, seed: 6}\noptimizer.end_lr: 1e-5\nmodel:\nrun_dir: here/../there")
    config = config_of("--training.seed=7", "--config", path)
    assert config == Config(
        run_dir="here/../there",
        training=TrainingConfig(num_steps=5, seed=7),
        optimizer=OptimizerConfig(end_lr=1e-5),
    )
    assert config_of() == Config()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("training.num_steps", "12", 12),
        ("training.use_next_sentence_label", "false", False),
        ("training.precision", "bf16", "bf16"),
        ("optimizer.learning_rate", "1", 1.0),
        ("optimizer.learning_rate", "1e-4", 1e-4),
        ("optimizer.end_lr", "-1e-4", -1e-4),
        ("cluster.price_per_worker_hour", "4", 4.0),
        ("cluster.price_per_worker_hour", "null", None),
        ("data.vocab_file", "null", None),
        ("data.vocab_file", "vocab.txt", "vocab.txt"),
        ("data.input_files", "a,b=c", "a,b=c"),
        ("data.input_files", "", ""),
        ("run_dir", "12", "12"),
        ("evaluation.num_steps", "3", 3),
        ("cluster.num_workers", "2", 2),
        ("cluster.num_workers", "1,4", "1,4"),
        ("checkpoint.every_steps", "12", 12),
        ("checkpoint.every_steps", "auto", "auto"),
        ("training.micro_batch_tokens", "8192", 8192),
        ("training.micro_batch_tokens", "auto", "auto"),
    ],
)
def test_flag_text_becomes_the_type_of_its_field(name: str, text: str, value: object) -> None:
    for argv in ([f"--{name}={text}"], [f"--{name}", text]):
        got = value_of(config_of(*argv), name)
        assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(run_dir="12", bert_config_file="null"),
        Config(run_dir="a: b # 'c' \"d\"\n é", data=DataConfig(vocab_file="true", input_files="~")),
        Config(cluster=ClusterConfig(num_workers="2")),
        Config(cluster=ClusterConfig(num_workers="1,4", resize_check_s=0.1 + 0.2, start_timeout_s=5e-324)),
        Config(evaluation=EvaluationConfig(num_steps=3), training=TrainingConfig(seed=2**63)),
        Config(optimizer=OptimizerConfig(learning_rate=1e-7, end_lr=1e22)),
    ],
)
def test_yaml_of_a_config_is_that_config(config: Config, yaml_file: Callable[[str], str]) -> None:
    assert config_from_yaml(config_to_yaml(config)) == config
    assert config_of("--config", yaml_file(config_to_yaml(config))) == config
    assert type(config_from_yaml(config_to_yaml(config)).cluster.num_workers) is type(config.cluster.num_workers)


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_configuration_holds_what_differs_from_the_defaults(name: str) -> None:
    config = config_of("--config", name)
    assert config == config_of("--config", str(SHIPPED_DIR / f"{name}.yaml"))
    check_config(config if name == "sample" else replace(config, data=replace(config.data, input_files="x")))
    for setting in load_settings(name):
        assert setting.value != value_of(Config(), setting.name), setting
    assert config.run_dir == f"runs/{name}"
    comments = (SHIPPED_DIR / f"{name}.yaml").read_text().splitlines()[:2]
    assert all(line.startswith("# ") for line in comments)


def test_shipped_phases_are_one_learning_rate_line() -> None:
    for size in ("base", "large"):
        first, second = (config_of("--config", f"{size}-phase{phase}") for phase in (1, 2))
        total = first.training.num_steps + second.training.num_steps
        peak, middle = first.optimizer.learning_rate, first.optimizer.end_lr
        assert (total, peak, second.optimizer.end_lr) == (1_000_000, 1e-4, 0.0)
        assert middle == second.optimizer.learning_rate == pytest.approx(peak * second.training.num_steps / total)
        assert second.training.init_checkpoint == first.run_dir
        assert first.model == second.model


# Refusals: place and remedy


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--training.lerning_rate", "3"],
            "command line: unknown setting --training.lerning_rate; did you mean --optimizer.learning_rate?",
        ),
        (["--training.num_step=3"], "did you mean --training.num_steps?"),
        (["--learningrate=3"], "did you mean --learning_rate?"),
        (["--evaluaton.num_steps=3"], "did you mean --evaluation.num_steps?"),
        (["--train_batchsize=3"], "did you mean --train_batch_size?"),
        (["--zzz", "3"], "command line: unknown setting --zzz; 'train --help' lists every setting."),
        (["--confg", "3"], "did you mean --config?"),
        (["--data", "x.yaml"], "command line: unknown setting --data"),
        (["--optimizer.lear", "1"], "unknown setting --optimizer.lear"),
        (["--training.num_steps", "abc"], "command line: training.num_steps must be int, got 'abc'."),
        (["--training.num_steps", "null"], "training.num_steps must be int, got 'null'."),
        (["--training.num_steps", "1.5"], "training.num_steps must be int, got '1.5'."),
        (["--training.precision", "fp8"], "training.precision must be one of fp32, bf16, fp16, got 'fp8'."),
        (["--cluster.use_gpu", "1"], "cluster.use_gpu must be true or false, got '1'."),
        (["--checkpoint.every_steps", "often"], "checkpoint.every_steps must be int or auto, got 'often'."),
        (["--training.micro_batch_tokens", "many"], "training.micro_batch_tokens must be int or auto, got 'many'."),
        (["--evaluation.num_steps", "x"], "evaluation.num_steps must be int or null, got 'x'."),
        (["--training.seed"], "command line: --training.seed needs a value (int); write --training.seed=VALUE."),
        (["--cluster.use_gpu", "--training.seed=1"], "--cluster.use_gpu needs a value (true or false)"),
        (["3"], "command line: '3' belongs to no flag; write --name VALUE or --name=VALUE."),
        (["--verbose=1"], "--verbose takes no value, got '1'; write --verbose."),
        (
            ["--config", "nothing"],
            "cannot read the configuration nothing: No such file or directory; "
            f"give the path of a YAML file or one of {', '.join(shipped_names())}.",
        ),
        (["--config", "tiny", "--config", "small"], "command line: --config was given more than once; keep one"),
    ],
)
def test_command_line_refusal_names_place_and_remedy(argv: list[str], message: str) -> None:
    assert message in refusal(argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "training:\n  lerning_rate: 3",
            "my.yaml, line 2: unknown setting training.lerning_rate; did you mean optimizer.learning_rate?",
        ),
        ("learning_rate: 3", "my.yaml, line 1: unknown setting learning_rate; did you mean optimizer.learning_rate?"),
        ("trainig: {seed: 3}", "line 1: unknown setting trainig; did you mean training?"),
        ("training:\n  num_steps: abc", "my.yaml, line 2: training.num_steps must be int, got 'abc'."),
        ("training: {num_steps: true}", "training.num_steps must be int, got True."),
        ("training: {num_steps: null}", "training.num_steps must be int, got None."),
        ("training: {num_steps: 10.0}", "training.num_steps must be int, got 10.0."),
        ("optimizer: {end_lr: yes}", "optimizer.end_lr must be float, got True."),
        ("run_dir: 12", "run_dir must be str, got 12."),
        ("cluster: {num_workers: [1, 4]}", "cluster.num_workers must be int or str, got [1, 4]."),
        ("training: 5", "line 1: the section training must be lines of 'name: value', got '5'."),
        ("- 5", "line 1: a configuration must be lines of 'name: value'"),
        ("training:\n  seed: 1\n  seed: 2", "line 3: training.seed was set before ("),
        ("training: {seed: 1}\ntraining: {seed: 2}", "line 2: training.seed was set before ("),
        ("a: [", "my.yaml: not valid YAML"),
        ("run_dir: !!python/object/apply:os.getcwd []", "my.yaml: not valid YAML"),
    ],
)
def test_yaml_refusal_names_place_and_remedy(yaml_file: Callable[[str], str], text: str, message: str) -> None:
    assert message in refusal(["--config", yaml_file(text)])


@pytest.mark.parametrize("name", FIELDS)
def test_every_name_is_its_own_nearest(name: str) -> None:
    assert nearest_name(name, FIELDS) == name
    assert nearest_name(name[:-2] + name[-1], FIELDS) == name


# Model Garden's flags


@pytest.mark.parametrize(
    ("argv", "settings"),
    [
        (["--input_files=a,b"], {"data.input_files": "a,b"}),
        (["-model_dir", "there"], {"run_dir": "there"}),
        (["-md=there"], {"run_dir": "there"}),
        (["--bert_config_file", "c.json"], {"bert_config_file": "c.json"}),
        (["--max_seq_length=64"], {"data.max_seq_length": 64}),
        (["--max_predictions_per_seq=9"], {"data.max_predictions_per_seq": 9}),
        (["--train_batch_size", "64"], {"training.global_batch_size": 64}),
        (["--steps_per_loop=7"], {"training.log_every_steps": 7}),
        (["--learning_rate=5e-5"], {"optimizer.learning_rate": 5e-5}),
        (["--warmup_steps=10000.0"], {"optimizer.warmup_steps": 10000}),
        (["--end_lr=1e-6"], {"optimizer.end_lr": 1e-6}),
        (["--optimizer_type=lamb"], {"optimizer.type": "lamb"}),
        (["--nouse_next_sentence_label"], {"training.use_next_sentence_label": False}),
        (["--use_next_sentence_label=False"], {"training.use_next_sentence_label": False}),
        (["--use_next_sentence_label"], {"training.use_next_sentence_label": True}),
        (["--init_checkpoint=c"], {"training.init_checkpoint": "c"}),
        (["--scale_loss"], {}),
        (["--dtype=fp16"], {"training.precision": "fp16"}),
        (["--train_batch_size=8", "--train_batch_size=16"], {"training.global_batch_size": 16}),
        (
            ["--num_steps_per_epoch=50", "--num_train_epochs=4"],
            {"training.num_steps": 200, "checkpoint.every_steps": 50, "evaluation.every_steps": 50},
        ),
        (
            ["--num_steps_per_epoch=50"],
            {"training.num_steps": 150, "checkpoint.every_steps": 50, "evaluation.every_steps": 50},
        ),
        (
            ["--num_train_epochs=2"],
            {"training.num_steps": 2000, "checkpoint.every_steps": 1000, "evaluation.every_steps": 1000},
        ),
    ],
)
def test_model_garden_flag_sets_ours(argv: list[str], settings: dict[str, object]) -> None:
    ours = [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in settings.items()]
    assert config_of(*argv) == config_of(*ours)
    assert config_of("--config", "tiny", *argv) == config_of("--config", "tiny", *ours)


def test_model_garden_table_names_our_fields() -> None:
    assert {ours for settings in model_garden.FLAGS.values() for ours in settings} <= set(FIELDS)
    assert not set(model_garden.FLAGS) & set(model_garden.REFUSED)
    named = {name for reason in model_garden.REFUSED.values() for name in re.findall(r"--(\w+\.\w+) ", reason + " ")}
    assert named - {"section.field"} <= set(FIELDS)


def test_scale_loss_is_what_raybert_does_and_it_says_so() -> None:
    assert "what raybert always does" in parse_train(["--scale_loss=true"]).notes[0]
    assert parse_train([]).notes == []
    assert "leave it out" in refusal(["--noscale_loss"])


@pytest.mark.parametrize("flag", model_garden.REFUSED)
def test_model_garden_flag_without_meaning_is_refused_with_its_reason(flag: str) -> None:
    for argv in ([f"--{flag}=1"], [f"-{flag}", "1"], [f"--no{flag}"]):
        assert refusal(argv) == (
            f"command line: Model Garden's --{flag} has no meaning here: {model_garden.REFUSED[flag]}."
        )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--train_batch_size=8", "--training.global_batch_size=8"],
            "--train_batch_size and --training.global_batch_size are two values for one setting",
        ),
        (
            ["--num_train_epochs=1", "--training.num_steps=8"],
            "--num_train_epochs and --training.num_steps are two values",
        ),
        (
            ["--num_steps_per_epoch=1", "--checkpoint.every_steps=8"],
            "--num_steps_per_epoch and --checkpoint.every_steps are two values",
        ),
        (["--num_steps_per_epoch=x"], "--num_steps_per_epoch must be a whole number, got 'x'"),
        (["--warmup_steps=1.5"], "--warmup_steps must be a whole number, got '1.5'"),
        (["--warmup_steps=inf"], "--warmup_steps must be a whole number, got 'inf'"),
        (
            ["--train_batch_size=x"],
            "command line, --train_batch_size: training.global_batch_size must be int, got 'x'.",
        ),
        (["--dtype=fp8"], "command line, --dtype: training.precision must be one of fp32, bf16, fp16, got 'fp8'."),
        (["--use_next_sentence_label", "false"], "'false' belongs to no flag; write --name VALUE or --name=VALUE."),
        (["--nouse_next_sentence_label=true"], "takes no value, got 'true'; write --use_next_sentence_label=true."),
        (["--train_batch_size"], "--train_batch_size needs a value; write --train_batch_size=VALUE."),
    ],
)
def test_model_garden_refusal_names_the_flag(argv: list[str], message: str) -> None:
    assert message in refusal(argv)


# Checks


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Config(), "data.input_files must not be empty; --config sample"),
        (Config(run_dir=" "), "run_dir must not be empty; runs/first"),
        (Config(data=DataConfig(input_files=" ,")), "data.input_files must not be empty"),
        (
            Config(training=TrainingConfig(num_steps=0)),
            "training.num_steps must be at least 1; training.num_steps=0; raise it",
        ),
        (Config(training=TrainingConfig(micro_batch_size=0)), "training.micro_batch_size=0"),
        (
            Config(training=TrainingConfig(float8=True)),
            "training.float8 is for what is bf16 otherwise, got training.precision=fp32; precision to bf16",
        ),
        (
            Config(training=TrainingConfig(float8=True, precision="bf16"), model=ModelConfig(intermediate_size=3080)),
            "training.float8 needs multiples of 16, got model.intermediate_size=3080; change it",
        ),
        (Config(training=TrainingConfig(micro_batch_tokens=-1)), "training.micro_batch_tokens must be at least 0"),
        (Config(training=TrainingConfig(global_batch_size=0)), "training.global_batch_size=0"),
        (Config(training=TrainingConfig(log_every_steps=0)), "training.log_every_steps=0"),
        (Config(training=TrainingConfig(seed=-1)), "training.seed must be at least 0; training.seed=-1"),
        (
            Config(checkpoint=CheckpointConfig(every_steps=0)),
            "checkpoint.every_steps must be at least 1; every_steps=0",
        ),
        (Config(checkpoint=CheckpointConfig(keep=-1)), "checkpoint.keep must be at least 0; checkpoint.keep=-1"),
        (Config(evaluation=EvaluationConfig(every_steps=-1)), "evaluation.every_steps=-1"),
        (Config(guard=GuardConfig(max_non_finite=0)), "guard.max_non_finite=0"),
        (Config(guard=GuardConfig(spike_sigma=-1.0)), "guard.spike_sigma=-1.0"),
        (Config(guard=GuardConfig(max_rollbacks=-1)), "guard.max_rollbacks=-1"),
        (Config(evaluation=EvaluationConfig(num_steps=0)), "evaluation.num_steps=0"),
        (Config(data=DataConfig(input_files="x", window_size=0)), "data.window_size=0"),
        (Config(data=DataConfig(input_files="x", max_seq_length=0)), "data.max_seq_length=0"),
        (Config(cluster=ClusterConfig(cpus_per_worker=0)), "cluster.cpus_per_worker=0"),
        (
            Config(cluster=ClusterConfig(resize_check_s=0.0)),
            "cluster.resize_check_s must be a positive number of seconds",
        ),
        (Config(cluster=ClusterConfig(collective_timeout_s=float("nan"))), "cluster.collective_timeout_s=nan"),
        (Config(cluster=ClusterConfig(start_timeout_s=float("inf"))), "cluster.start_timeout_s=inf"),
        (Config(cluster=ClusterConfig(price_per_worker_hour=-1.0)), "cluster.price_per_worker_hour must be 0 or more"),
        (
            Config(data=DataConfig(input_files="x", masking="dynamic")),
            "data.masking=dynamic needs data.vocab_file; [MASK]; static",
        ),
        (Config(data=DataConfig(input_files="x", masked_lm_prob=15.0)), "masked_lm_prob=15.0; as 0.15"),
        (
            Config(data=DataConfig(input_files="x", max_ngram_size=3)),
            "data.max_ngram_size=3; data.do_whole_word_mask is false; to 1",
        ),
        (Config(data=DataConfig(input_files="x", max_ngram_size=0)), "data.max_ngram_size=0"),
        (
            Config(data=DataConfig(input_files="x", max_seq_length=8)),
            "max_predictions_per_seq=20; max_seq_length=8; set both",
        ),
        (
            Config(data=DataConfig(input_files="x", max_seq_length=513)),
            "max_seq_length=513; max_position_embeddings=512; raise",
        ),
        (
            Config(cluster=ClusterConfig(num_workers="x")),
            "cluster.num_workers must be a number or 'min,max', got 'x'; '1,4'",
        ),
        (Config(cluster=ClusterConfig(num_workers="1,2,3")), "got '1,2,3'"),
        (Config(cluster=ClusterConfig(num_workers="1,")), "got '1,'"),
        (Config(cluster=ClusterConfig(num_workers=-1)), "got -1"),
        (Config(cluster=ClusterConfig(num_workers="")), "got ''"),
        (Config(cluster=ClusterConfig(num_workers="4,1")), "min <= max; min=4 and max=1; write '1,4'"),
        (
            Config(cluster=ClusterConfig(num_workers=0), checkpoint=CheckpointConfig(snapshot_every_steps=5)),
            "snapshot_every_steps=5 and cluster.num_workers=0; set it to 0",
        ),
        (Config(cluster=ClusterConfig(num_workers="0,3")), "may be 0 only alone; got '0,3'; write '1,3'"),
        (
            Config(cluster=ClusterConfig(num_workers=257)),
            "global_batch_size=256; cluster.num_workers=257; lower the number of workers",
        ),
    ],
)
def test_check_names_rule_values_and_remedy(config: Config, words: str) -> None:
    data = config.data if config.data.input_files or "input_files" in words else DataConfig(input_files="x")
    with pytest.raises(UserError) as caught:
        check_config(replace(config, data=data))
    assert [part for part in words.split("; ") if part not in str(caught.value)] == []


@pytest.mark.parametrize("num_workers", [0, 1, 256, "0", "2", "1,4", "3,3", "1, 256"])
def test_any_world_size_up_to_the_batch_size_is_allowed(num_workers: int | str) -> None:
    check_config(Config(data=DataConfig(input_files="x"), cluster=ClusterConfig(num_workers=num_workers)))


def test_position_table_is_compared_once_the_model_is_known() -> None:
    config = Config(data=DataConfig(input_files="x", max_seq_length=1024), bert_config_file="c.json")
    check_config(config)
    check_config(replace(config, bert_config_file=None, model=ModelConfig(max_position_embeddings=1024)))


# The program


def raybert(*argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(ROOT / "run.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60, check=False)


def test_help_lists_the_commands_and_imports_neither_torch_nor_ray() -> None:
    program = "import sys; from raybert.cli import main; code = main(sys.argv[1:]); print(code, *sys.modules)"
    for argv in (["--help"], ["train", "--help"]):
        shown = subprocess.run(
            [sys.executable, "-W", "error", "-c", program, *argv], capture_output=True, text=True, cwd=ROOT, check=True
        )
        code, *modules = shown.stdout.splitlines()[-1].split()
        assert code == "0"
        assert not {"torch", "ray", "numpy", "raybert.launch", "raybert.bench"} & set(modules)
    assert all(re.search(rf"^  {name} +\w", raybert("--help").stdout, re.MULTILINE) for name in cli.COMMANDS)


def test_train_help_shows_every_field_with_its_docstring() -> None:
    shown = " ".join(raybert("train", "--help").stdout.split())
    for name in FIELDS:
        assert f"--{name} " in shown
    module = importlib.import_module("raybert.config")
    docstrings = re.findall(r'^    .*\n    """(.*)"""$', Path(str(module.__file__)).read_text(), re.MULTILINE)
    assert len(docstrings) == len(FIELDS)
    for docstring in docstrings:
        assert docstring.rstrip(".") in shown
    assert "Model Garden" in shown and "base-phase1" in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--training.num_steps", "abc"], "command line: training.num_steps must be int, got 'abc'."),
        (["train"], "data.input_files must not be empty"),
        (["trian"], "command line: unknown command 'trian'; did you mean train?"),
        (["--train_batch_size=3"], "unknown command '--train_batch_size=3'; begin with one of train, prepare"),
    ],
)
def test_user_error_is_one_message_and_exit_code_1(argv: list[str], message: str) -> None:
    done = raybert(*argv)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("raybert: error: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_paths_and_places_stay_as_written(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("data: {input_files: ../a/*.tfrecord}\ntraining: {num_steps: 0}")
    assert config_of("--config", str(tmp_path / "my.yaml")).data.input_files == "../a/*.tfrecord"
    (tmp_path / "my.yaml").write_text("training:\n  num_steps: x")
    done = raybert("train", "--config", "my.yaml", cwd=tmp_path)
    assert done.stderr == "raybert: error: my.yaml, line 2: training.num_steps must be int, got 'x'.\n"


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (UserError("too small"), 1, "raybert: error: too small\n"),
        (KeyboardInterrupt(), 130, "raybert: interrupted\n"),
        (ValueError("a defect"), os.EX_SOFTWARE, "Traceback"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: list[str]) -> int:
        assert argv == ["--x"]
        raise error

    monkeypatch.setitem(cli.COMMANDS, "fail", ("", fail))
    assert main(["fail", "--x"]) == code
    assert capsys.readouterr().err.startswith(shown)
