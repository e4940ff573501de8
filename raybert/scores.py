"""`evaluate`: how well a checkpoint predicts held-out samples, also by how frequent the token to be predicted is.

The sums are those of the evaluation within training, of the same code: for the same files the figures are the same.

Shape letters: M masked tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, track
from torch import Tensor

from raybert.config import Config, DataConfig, TrainingConfig
from raybert.errors import UserError
from raybert.evaluate import batches, unigram_loss
from raybert.example import Schema
from raybert.index import INDEX, Index, Ints, cached_shard, check_shards, index_shard, read_list
from raybert.inspection import infer_schema
from raybert.loss import Sums, nsp_sums
from raybert.manifest import CHECKPOINTS
from raybert.model import BertForPreTraining
from raybert.preflight import check_tokens
from raybert.projection import cross_entropies
from raybert.scratch import scratch
from raybert.step import autocast
from raybert.storage import Directory, File, find_files
from raybert.view import counted
from raybert.weights import VOCABULARY, Opened, open_model
from raybert.world import World

SHARES = (1e-2, 1e-3, 1e-4, 1e-5, 0.0)  # a band begins at each; in the last but one are tokens rarer than these
BANDS = ("1 in 100 or more", "1 in 1,000", "1 in 10,000", "1 in 100,000", "rarer", "never")
OPTION = "--input_files"


@dataclass(frozen=True)
class Scores:
    """Sums over the evaluated samples.

    Args:
        sums: of both tasks.
        bands: [6, 3] float64: masked LM's loss, weight and correct weight of the tokens in each of BANDS.
    """

    sums: Sums
    bands: Tensor


def main(argv: list[str]) -> int:
    """Evaluate a checkpoint and print the figures.

    Raises:
        UserError: the checkpoint or the files cannot be read, or do not belong together.
    """
    options = _parser().parse_args(argv)
    training = TrainingConfig(micro_batch_size=options.micro_batch_size, precision=options.precision)
    if training.micro_batch_size < 1:
        raise UserError(f"--micro_batch_size must be at least 1, got {training.micro_batch_size}; raise it.")
    world = World(device=device_of(options.device))
    files = find_files(",".join(options.input_files), OPTION)
    opened = open_model(options.checkpoint)
    opened.model.use_next_sentence = not opened.masked_lm_only
    console = Console(stderr=True)
    is_quiet = options.json or not console.is_terminal
    with scratch() as path:
        index = _index(files, opened, Directory(str(path)), console, is_quiet)
        trained_on = trained_counts(opened)
        counts = index.label_counts if trained_on is None else trained_on
        with Progress(console=console, disable=is_quiet) as progress:
            task = progress.add_task("evaluating samples", total=index.num_samples)
            advance = partial(progress.advance, task)
            found = score(opened.model.to(world.device), index, training, world, bands_of(counts), advance)
    report = make_report(opened, index, found, trained_on, world)
    print(json.dumps(report, indent=1) if options.json else "\n".join(lines(report)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="python run.py evaluate CHECKPOINT --input_files GLOB [GLOB ...] [--option VALUE ...]",
        description="Masked LM and next sentence prediction of a checkpoint on held-out samples: loss, accuracy, "
        "perplexity, and the same by how frequent the tokens to be predicted are.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a raybert checkpoint or run, or a directory of transformers")
    add(
        "--input_files", nargs="+", required=True, metavar="GLOB",
        help="TFRecord files of samples; local, s3:// or gs://; commas too",
    )  # fmt: skip
    add("--micro_batch_size", type=int, default=32, metavar="INT", help="samples at once, at most; default: 32")
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the arithmetic; default: fp32")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, a GPU if there is one")
    add("--json", action="store_true", help="print the figures as JSON")
    return parser


def device_of(name: str) -> torch.device:
    """The device of an option.

    Raises:
        UserError: there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; leave it out, or run where there is one.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _index(files: Sequence[File], opened: Opened, cache: Directory, console: Console, is_quiet: bool) -> Index:
    """The index of the files, each of which is read and verified once."""
    config = opened.model.config
    try:
        schema = infer_schema(files, config.vocab_size, config.type_vocab_size)
        if schema.max_seq_length > config.max_position_embeddings:
            raise UserError(
                f"{OPTION}: samples have {schema.max_seq_length} tokens, and the model in {opened.uri} has "
                f"max_position_embeddings={config.max_position_embeddings}; give samples that are short enough."
            )
        tracked = track(files, "reading files", console=console, disable=is_quiet)
        index = Index([index_shard(file, schema, cache) for file in tracked], schema)
    except OSError as error:
        raise UserError(f"{OPTION}: cannot read the files: {error}; check the paths and the credentials.") from error
    check_shards(index.shards, OPTION, "error")
    folder = Directory(opened.uri)
    if folder.exists(VOCABULARY):
        check_tokens(Config(model=config, data=DataConfig(vocab_file=(folder / VOCABULARY).uri)), index)
    return index


def trained_counts(opened: Opened) -> Ints | None:
    """[V] how often each token was a masked label where the run was trained; None if its index is not there."""
    run, separator, _ = opened.uri.rpartition(f"/{CHECKPOINTS}/")
    identity, config = opened.state.get("identity", {}), opened.model.config
    length, places = (identity.get(f"data.{name}") for name in ("max_seq_length", "max_predictions_per_seq"))
    if not separator or length is None or places is None:
        return None
    schema, cache = Schema(length, places, config.vocab_size, config.type_vocab_size), Directory(run) / INDEX
    try:
        shards = [cached_shard(path, schema, cache) for path in read_list(cache)]
    except (OSError, ValueError):
        return None
    counts = [shard.label_counts for shard in shards if shard is not None]
    return np.sum(counts, axis=0) if counts and len(counts) == len(shards) else None


def bands_of(counts: Ints) -> Ints:
    """[V] the band of each token, by its share of the labels."""
    shares = counts / max(1, counts.sum())
    bands: Ints = np.searchsorted(-np.array(SHARES[:-1]), -shares, side="left")
    bands[counts == 0] = len(BANDS) - 1
    return bands


@torch.no_grad()
def score(
    model: BertForPreTraining,
    index: Index,
    training: TrainingConfig,
    world: World,
    bands: Ints,
    advance: Callable[[int], None] = lambda _: None,
) -> Scores:
    """The sums over all samples of an index.

    Args:
        model: on the device of the world.
        index: of the samples.
        training: micro-batch size and precision.
        world: of one rank.
        bands: [V] in which of BANDS each token is.
        advance: told how many samples are done.
    """
    band_of = torch.from_numpy(bands).to(world.device)
    sums = Sums.zero(world.device)
    table = torch.zeros(len(BANDS), 3, dtype=torch.float64, device=world.device)
    for batch in batches(index, 0, index.num_samples, model.config, training, world):
        labels, weights = batch.masked_labels.long(), batch.masked_weights.double()
        with autocast(training, world):
            projection, nsp_logits = model(batch.tokens, batch.masked_places)
            losses, hits = cross_entropies(projection, labels)
        rows = torch.stack([weights * losses.double(), weights, weights * hits.double()], dim=1)
        table.index_add_(0, band_of[labels], rows)
        nexts = batch.next_sentence_labels
        nsp = None if nsp_logits is None else nsp_sums(nsp_logits[: len(nexts)], nexts)
        sums += Sums.of((rows[:, 0].sum(), rows[:, 1].sum(), rows[:, 2].sum()), nsp)
        advance(len(nexts))
    return Scores(sums, table)


# --- The report -------------------------------------------------------------------------------------------------------


def make_report(opened: Opened, index: Index, found: Scores, trained_on: Ints | None, world: World) -> dict[str, Any]:
    """Everything, for a person and for JSON; figures have the names of the metrics in training."""
    metrics = found.sums.metrics()
    random_next = index.num_random_next / index.num_samples
    report = {
        "checkpoint": opened.uri,
        "step": opened.state.get("step"),
        "device": str(world.device),
        "files": len(index.shards),
        "samples": index.num_samples,
        "masked_tokens": int(index.label_counts.sum()),
        **metrics,
        "masked_lm_perplexity": _perplexity(metrics["lm_example_loss"]),
        "majority_next_sentence_accuracy": max(random_next, 1 - random_next),
        "frequency_of": "the training data" if trained_on is not None else "the evaluated files",
        "bands": [_band(name, *row) for name, row in zip(BANDS, found.bands.tolist(), strict=True)],
    }
    if trained_on is not None:
        report["unigram_mlm_loss"] = unigram_loss(trained_on, index.label_counts)
    return report


def _band(name: str, loss: float, weight: float, correct: float) -> dict[str, Any]:
    mean = loss / weight if weight else None
    figures = {"loss": mean, "accuracy": correct / weight if weight else None}
    return {"frequency": name, "weight": weight, **figures, "perplexity": None if mean is None else _perplexity(mean)}


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # what is more is no float


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report, line by line."""
    step = "" if report["step"] is None else f", step {report['step']:,}"
    yield f"{report['checkpoint']}{step}"
    yield (
        f"{report['samples']:,} samples in {counted(report['files'], 'file')}, "
        f"{report['masked_tokens']:,} masked tokens, on {report['device']}"
    )
    guess = (
        f" (guessing by token frequency: loss {report['unigram_mlm_loss']:.4f})" if "unigram_mlm_loss" in report else ""
    )
    yield (
        f"Masked LM      loss {report['lm_example_loss']:.4f}  accuracy {report['masked_lm_accuracy']:.4f}  perplexity "
        f"{report['masked_lm_perplexity']:,.2f}{guess}"
    )
    if "next_sentence_loss" in report:
        yield (
            f"Next sentence  loss {report['next_sentence_loss']:.4f}  accuracy {report['next_sentence_accuracy']:.4f} "
            f"(always guessing the majority: {report['majority_next_sentence_accuracy']:.4f})"
        )
    else:
        yield "Next sentence  was not trained"
    yield f"By the share of the labels in {report['frequency_of']} that a token is:"
    total = sum(band["weight"] for band in report["bands"])
    for band in report["bands"]:
        if band["weight"]:
            yield (
                f"  {band['frequency']:<17} {band['weight'] / total:6.1%} of the tokens  loss {band['loss']:7.4f}  "
                f"accuracy {band['accuracy']:.4f}  perplexity {band['perplexity']:,.2f}"
            )
