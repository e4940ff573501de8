"""The command line: subcommands, flags over YAML over defaults, and errors as one message.

Each subcommand imports its module only when it runs, so that --help and refusals come at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import jsonargparse

from raybert import model_garden
from raybert.checks import check_config
from raybert.config import Config
from raybert.config_file import (
    FIELDS,
    SECTIONS,
    SHIPPED_DIR,
    Setting,
    build_config,
    describe_type,
    load_settings,
    nearest_name,
    shipped_names,
    unknown_name_error,
)
from raybert.errors import UserError

PLACE = "command line"


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return its exit code: 1 for a UserError, 70 for a defect, 130 after Ctrl-C."""
    try:
        return _dispatch(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"raybert: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("raybert: interrupted", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        return os.EX_SOFTWARE


def train(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(_train_parser().format_help(), end="")
        return 0
    arguments = parse_train(argv)
    for note in arguments.notes:
        print(f"raybert: {note}", file=sys.stderr)
    check_config(arguments.config)
    from raybert.launch import run

    return run(arguments.config, arguments.verbose)


def _ahead_of_train(command: str, module: str, description: str) -> Callable[[list[str]], int]:
    """A command of a module that is imported when it is called; it takes the flags of train, and --json."""

    def run(argv: list[str]) -> int:
        if {"-h", "--help"} & set(argv):
            usage = f"usage: python run.py {command} [--json] [--config FILE] [-v] [--section.field VALUE ...]"
            print(f"{usage}\n\n{description}\n\nThe flags are those of train.")
            return 0
        arguments = parse_train([word for word in argv if word != "--json"])
        code: int = importlib.import_module(module).main(arguments.config, "--json" in argv, arguments.verbose)
        return code

    return run


def _main_of(module: str) -> Callable[[list[str]], int]:
    """`main(argv)` of a module that is imported when it is called."""

    def run(argv: list[str]) -> int:
        code: int = importlib.import_module(module).main(argv)
        return code

    return run


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "train": ("Pretrain BERT, or continue the run found in run_dir.", train),
    "prepare": ("Make TFRecord shards to train on from a folder of text.", _main_of("raybert.prepare")),
    "vocab": ("Learn a WordPiece vocabulary from text.", _main_of("raybert.vocab")),
    "inspect": (
        "Say what is in TFRecord files of samples, and what would spoil training.",
        _main_of("raybert.inspection"),
    ),
    "doctor": (
        "Before a long run: look at all that it needs, and say go or what to mend first.",
        _ahead_of_train(
            "doctor",
            "raybert.doctor",
            "Before a long run: look at configuration, files, storage, cluster, network, data, and a few steps of the\n"
            'real model, and say "go" (exit code 0) or what to mend first (1).',
        ),
    ),
    "tune-batch": (
        "Find the fastest micro-batch for this configuration, and print its flags.",
        _ahead_of_train(
            "tune-batch",
            "raybert.tuning",
            "Try bounds of a forward and backward (training.micro_batch_size, training.micro_batch_tokens) on real\n"
            "batches, for up to two minutes or so, and print the flags of the fastest.",
        ),
    ),
    "evaluate": (
        "Loss, accuracy and perplexity of a checkpoint on held-out samples.",
        _main_of("raybert.scores"),
    ),
    "fill": ("Guess what stands at each [MASK] of a sentence.", _main_of("raybert.cloze")),
    "convert": (
        "Convert a checkpoint of TensorFlow, raybert or transformers; what comes out opens in the latter two.",
        _main_of("raybert.convert"),
    ),
    "verify": ("Prove from a run directory that every sample was trained on exactly once.", _main_of("raybert.verify")),
    "report": ("Make one HTML page of a run: curves, workers over time, goodput.", _main_of("raybert.report")),
    "bench": ("Measure decoding, the feed, the training step, what Ray costs, or all.", _main_of("raybert.bench")),
    "notice": ("Beside a spot node: wait for the cloud's notice, and drain the node.", _main_of("raybert.agent")),
}


def _dispatch(argv: list[str]) -> int:
    command, *rest = argv or ["train", "--config", str(SHIPPED_DIR / "sample.yaml")]
    if command in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if command not in COMMANDS:
        nearest = nearest_name(command, COMMANDS)
        remedy = f"did you mean {nearest}?" if nearest else f"begin with one of {', '.join(COMMANDS)}."
        raise UserError(f"{PLACE}: unknown command {command!r}; {remedy}")
    return COMMANDS[command][1](rest)


def _usage() -> str:
    commands = "\n".join(f"  {name:<10} {summary}" for name, (summary, _) in COMMANDS.items())
    return (
        "usage: python run.py COMMAND ...     (installed: raybert COMMAND ...)\n\n"
        f"commands:\n{commands}\n\n"
        "Without arguments: train on the bundled sample. 'COMMAND --help' explains a command."
    )


@dataclass(frozen=True)
class TrainArguments:
    """What a command line of `train` says; `notes` are for the user to read."""

    config: Config
    verbose: bool
    notes: list[str]


def parse_train(argv: list[str]) -> TrainArguments:
    """Defaults < the YAML file of --config < flags."""
    flags = list(_read_flags(argv))
    if [name for name, _ in flags].count("config") > 1:
        raise UserError(f"{PLACE}: --config was given more than once; keep one, and give the rest as flags.")
    texts = {name: text for name, text in flags if text is not None}  # of a flag given twice the last counts
    config_file = texts.pop("config", None)
    theirs, notes = model_garden.translate({name: text for name, text in texts.items() if name not in FIELDS})
    ours = {name: text for name, text in texts.items() if name in FIELDS}
    _check_one_dialect(ours, theirs)
    settings = [] if config_file is None else load_settings(config_file)
    settings += [Setting(name, _value(name, text), PLACE) for name, text in ours.items()]
    settings += [Setting(name, _value(name, text), f"{PLACE}, --{flag}") for name, (flag, text) in theirs.items()]
    return TrainArguments(build_config(settings), ("verbose", None) in flags, notes)


def _read_flags(argv: list[str]) -> Iterator[tuple[str, str | None]]:
    """Full name and text of each flag, ours and Model Garden's; no text for -v."""
    words = list(argv)
    while words:
        word = words.pop(0)
        if not _is_flag(word):
            raise UserError(f"{PLACE}: {word!r} belongs to no flag; write --name VALUE or --name=VALUE.")
        given, equals, after = word.lstrip("-").partition("=")
        text = after if equals else None
        name = _full_name(given)
        if name == "verbose" and text is None:
            yield name, None
        elif name == "verbose":
            raise UserError(f"{PLACE}: --verbose takes no value, got {text!r}; write --verbose.")
        elif name in model_garden.SWITCHES:
            yield name, model_garden.switch_text(given, text)
        else:
            yield name, _flag_value(name, words) if text is None else text


def _is_flag(word: str) -> bool:
    """A dash and a letter: -1e-4 is a value."""
    return word.startswith("-") and word.lstrip("-")[:1].isalpha()


def _full_name(given: str) -> str:
    name = "verbose" if given == "v" else given
    if name in FIELDS or name in ("verbose", "config"):
        return name
    flag = model_garden.flag_name(name)
    if flag is None:
        raise unknown_name_error(name, PLACE, [*FIELDS, *model_garden.FLAGS, "config", "verbose"], dashes="--")
    return flag


def _flag_value(name: str, words: list[str]) -> str:
    if words and not _is_flag(words[0]):
        return words.pop(0)
    kind = f" ({describe_type(FIELDS[name])})" if name in FIELDS else ""
    raise UserError(f"{PLACE}: --{name} needs a value{kind}; write --{name}=VALUE.")


def _check_one_dialect(ours: dict[str, str], theirs: dict[str, tuple[str, str]]) -> None:
    for name, (flag, _) in theirs.items():
        if name in ours:
            raise UserError(f"{PLACE}: --{flag} and --{name} are two values for one setting, {name}; keep one of them.")


def _value(name: str, text: str) -> object:
    """The text as the field's type; text that cannot be is returned as it is, for `build_config` to refuse."""
    value: object = text
    for key in reversed(name.split(".")):
        value = {key: value}
    try:
        return _train_parser().parse_object(value, defaults=False)[name]
    except argparse.ArgumentError:
        return text


@cache
def _train_parser() -> jsonargparse.ArgumentParser:
    """Help and types of every field, from the dataclasses and their docstrings."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        usage="python run.py train [--config FILE] [-v] [--section.field VALUE ...]",
        description="Pretrain BERT, or continue the run found in run_dir. Defaults < --config < flags.",
        epilog="TensorFlow Model Garden's flags for BERT pretraining (--input_files, --train_batch_size, ...) are "
        "understood too; raybert/model_garden.py is their table.",
        exit_on_error=False,
        add_help=False,
    )
    run = parser.add_argument_group("run")
    names = ", ".join(shipped_names())
    run.add_argument("--config", metavar="FILE", help=f"a YAML file, or a shipped configuration: {names}")
    run.add_argument("-v", "--verbose", action="store_true", help="log what Ray and raybert do")
    run.add_class_arguments(Config, as_group=False, skip=set(SECTIONS))
    for name, section in SECTIONS.items():
        group = parser.add_argument_group(f"{name}: {(section.__doc__ or '').rstrip('.')}")
        group.add_class_arguments(section, name, as_group=False)
    return parser
