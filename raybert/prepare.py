"""`prepare`: from a folder of text to TFRecord shards that `train` reads.

First every piece of the input is tokenised and its documents are dealt (see `deck`), then every shard is made
(see `dataset`). Both are tasks that do not know of each other, run by Ray Data on a cluster or by processes of this
machine, with the same result.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from raybert.dataset import (
    DATASET,
    VOCABULARY,
    Plan,
    Settings,
    begin,
    check_documents,
    discard,
    finish,
    make_plan,
    make_shard,
    shard_tasks,
    tokenize_piece,
)
from raybert.errors import UserError
from raybert.options import add_reading, boolean, reading_of
from raybert.processes import Run, in_processes
from raybert.storage import Directory, absolute, find_files
from raybert.view import counted
from raybert.wordpiece import Vocabulary, read_vocabulary

SMALL_BYTES = 4 << 20  # input that is made before other processes have started
MAX_UNKNOWN = 0.02  # share of [UNK] above which vocabulary and text hardly belong together
MAX_LONG = 0.5  # sentences of so many sequences, on average, are hardly sentences
T = TypeVar("T")


def main(argv: list[str]) -> int:
    """Prepare a dataset, or go on with one that was begun; 0 once it is complete.

    Raises:
        UserError: the input, a setting or the output directory is not as it must be, or storage fails.
    """
    options = _parser().parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    output = absolute(options.output)
    try:
        made = _prepare(options, output, console)
    except (MemoryError, BrokenProcessPool) as error:
        raise UserError(
            f"A shard of {options.shard_mb} MB of text needs more memory than there is, or a process was killed; run "
            "the same command again with fewer --workers: it continues. Or begin anew with a lower --shard_mb."
        ) from error
    except OSError as error:
        raise UserError(
            f"Cannot go on with {output}: {error}; free space or mend the storage, and run the same command again: it "
            "continues."
        ) from error
    console.print("\n".join(_report(output, made)))
    return 0


def _prepare(options: argparse.Namespace, output: str, console: Console) -> dict[str, Any]:
    settings = _settings(options)
    settings.check()
    vocabulary = read_vocabulary(options.vocab)
    files = find_files(",".join(options.input), "--input")
    plan = make_plan(output, settings, vocabulary, files)
    Directory(output).check_writable("--output")
    made = begin(plan, vocabulary)
    if made is not None:
        return made
    num_bytes = sum(file.size_bytes for file in files)
    try:
        with _runner(options.workers, num_bytes, options.verbose) as run:
            return _make(plan, vocabulary, run, console)
    except UserError:  # bad input; no task writes any more
        discard(plan)
        raise


def _make(plan: Plan, vocabulary: Vocabulary, run: Run, console: Console) -> dict[str, Any]:
    """Both stages, and the end."""
    numbers = range(len(plan.pieces))
    found = _tracked(console, "tokenising pieces of the input", run(tokenize_piece, (plan,), numbers), numbers)
    dealt = sorted(found, key=lambda piece: piece.number)
    check_documents(dealt, plan.settings)
    tasks = shard_tasks(dealt, plan.settings.dupe_factor)
    shards = list(_tracked(console, "making shards", run(make_shard, (plan, dealt), tasks), tasks))
    return finish(plan, vocabulary, dealt, sorted(shards, key=lambda shard: shard.name))


def _tracked(console: Console, text: str, items: Iterator[T], tasks: Sequence[Any]) -> Iterator[T]:
    """Give the items on, counted in a progress bar on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    if not console.is_terminal:
        console.print(f"{text}: {len(tasks)}")
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield from progress.track(items, total=len(tasks), description=text)


@contextmanager
def _runner(num_workers: int | None, num_bytes: int, verbose: bool) -> Iterator[Run]:
    """What runs the tasks: gives function(*shared, item) for each item, in any order."""
    if num_workers is None and os.environ.get("RAY_ADDRESS"):
        from raybert.tasks import on_ray  # imports Ray and torch, seconds long

        with on_ray(verbose) as run:
            yield run
        return
    if num_workers is None:
        num_workers = 1 if num_bytes < SMALL_BYTES else os.cpu_count() or 1
    if num_workers <= 1:
        yield lambda function, shared, items: (function(*shared, item) for item in items)
        return
    with in_processes(num_workers) as run:
        yield run


# --- What the user says -----------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python run.py prepare",
        allow_abbrev=False,
        description="Make TFRecord shards of masked sentence pairs from text, as google-research/bert's "
        "create_pretraining_data.py does, on one machine or on the cluster of RAY_ADDRESS. Killed, the same command "
        "goes on. Text files are in Google's format, a sentence a line and a blank line between documents, or, by "
        "--lines, of paragraphs; of JSON lines and Parquet each row is a document.",
        epilog=f"{DATASET}, written last, says what was made. The vocabulary is copied beside it.",
    )
    add = parser.add_argument
    add_reading(parser)
    add("--vocab", "--vocab_file", required=True, metavar="FILE", help="WordPiece vocabulary, a token a line")
    add("--output", required=True, metavar="DIR", help="a new directory; local, s3:// or gs://")
    for setting in fields(Settings):
        if setting.name in HELP:
            _add_setting(add, setting.name, setting.default)
    add("--gzip_compress", action="store_true", help="write .tfrecord.gz")
    add(
        "--workers",
        type=int,
        metavar="N",
        help="processes of this machine; default: the cluster of RAY_ADDRESS, or as many as there are CPUs",
    )
    add("-v", "--verbose", action="store_true", help="log what Ray does")
    return parser


HELP = {
    "do_lower_case": "lower case without accents, for an uncased vocabulary",
    "max_seq_length": "tokens of a sample",
    "max_predictions_per_seq": "masked tokens of a sample, at most",
    "masked_lm_prob": "share of tokens that is masked",
    "short_seq_prob": "share of documents that are made into shorter samples",
    "dupe_factor": "copies of the corpus, each paired and masked anew",
    "do_whole_word_mask": "mask whole words",
    "max_ngram_size": "mask runs of up to so many whole words",
    "random_seed": "of everything random",
    "parity": "google: random tokens are any of the vocabulary, [PAD] and [unused0] too, and a document may be its own "
    "random next, as in Google's script",
    "shard_mb": "MB of text of a shard; a task needs about ten times as much memory",
}


def _add_setting(add: Callable[..., Any], name: str, default: Any) -> None:
    text = HELP[name] + ("" if default is None else f"; default: {default}")
    if isinstance(default, bool):
        add(f"--{name}", type=boolean, nargs="?", const=True, default=default, metavar="BOOL", help=text)
    elif name == "parity":
        add(f"--{name}", default=default, choices=("none", "google"), help=text)
    else:
        add(f"--{name}", type=type(default), default=default, metavar=type(default).__name__.upper(), help=text)


def _settings(options: argparse.Namespace) -> Settings:
    given = vars(options)
    own = {each.name: given[each.name] for each in fields(Settings) if each.name in HELP}
    return Settings(reading=reading_of(options), compression="gzip" if options.gzip_compress else "", **own)


# --- What the user reads ----------------------------------------------------------------------------------------------


def _report(output: str, made: dict[str, Any]) -> Iterable[str]:
    """What was made, what is odd about it, and how to train on it."""
    corpus, samples, settings = made["corpus"], made["samples"], made["plan"]["settings"]
    num_shards, num_documents = counted(len(made["shards"]), "shard"), counted(corpus["documents"], "document")
    yield (
        f"{output}: {samples['samples']:,} samples in {num_shards}, of {num_documents} ({corpus['sentences']:,} "
        f"sentences, {corpus['tokens']:,} tokens)"
    )
    yield (
        f"  {samples['padding']:.1%} padding, {samples['masked_per_sample']:.1f} masked a sample, "
        f"{samples['random_next']:.1%} random nexts, {samples['unknown']:.2%} [UNK]"
    )
    yield from (f"WARNING: {warning}" for warning in warnings(made))
    size, seq, places = made["vocabulary"]["size"], settings["max_seq_length"], settings["max_predictions_per_seq"]
    yield "Train on it:"
    yield (
        f"  python run.py train --config small --data.input_files='{Directory(output).uri}/samples-*' "
        f"--data.vocab_file={output}/{VOCABULARY} --data.max_seq_length={seq} --data.max_predictions_per_seq={places} "
        f"--model.vocab_size={size}"
    )


def warnings(made: dict[str, Any]) -> Iterator[str]:
    """What of a dataset.json would disappoint who trains on it."""
    corpus, samples, settings = made["corpus"], made["samples"], made["plan"]["settings"]
    if samples["unknown"] > MAX_UNKNOWN:
        yield (
            f"{samples['unknown']:.1%} of the tokens are [UNK]; is the vocabulary of this language, and do_lower_case "
            f"{settings['do_lower_case']} right for it?"
        )
    per_sentence = corpus["tokens"] / corpus["sentences"]
    if per_sentence > MAX_LONG * settings["max_seq_length"]:
        yield (
            f"a sentence has {per_sentence:.0f} tokens on average, of {settings['max_seq_length']} in a sample: are "
            "the lines paragraphs? What does not fit is cut off; split them by --lines paragraphs."
        )
    if corpus["empty"]:
        yield f"{corpus['empty']:,} documents are empty, and left out."
    if corpus["cut"]:
        yield f"documents of more than 16 MB were cut, {corpus['cut']:,} times."
