"""`bench`: measure decoding, feed, step, checkpoints, what Ray costs, what grows with ranks; with all settings."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from raybert.checks import check_config
from raybert.config import Config
from raybert.config_file import build_config, load_settings
from raybert.errors import UserError
from raybert.figure import Figure, machine

FEED_BATCH, FEED_SAMPLES = 256, 2_000_000
NEVER = 1 << 30  # steps


def main(argv: list[str]) -> int:
    """Measure one part or all, print tables and, on request, write every figure as JSON."""
    options = _parser().parse_args(argv)
    console, before, figures = Console(highlight=False), machine(), []
    for name in ALL if options.part == "all" else [options.part]:
        console.print(f"Measuring {name} ...")
        found = PARTS[name](options)
        _print(name, found, console)
        figures += found
    if options.json is not None:
        content = {"before": before, "after": machine(), "figures": [asdict(figure) for figure in figures]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python run.py bench",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Sides that are compared take turns, and each figure is a median over rounds: believe ratios, and rates "
        "only of a machine that is otherwise idle.",
    )
    parser.add_argument("part", nargs="?", choices=[*PARTS, "all"], default="all", help="all: but scale")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure, run and setting")
    parser.add_argument("--rounds", type=int, default=5, help="of every measurement")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a round of step, for each side")
    parser.add_argument("--files", default="raybert://sample/train-*.tfrecord", help="TFRecords of samples")
    parser.add_argument("--seq", type=int, default=128, help="tokens in each sample, as in the files")
    parser.add_argument("--predictions", type=int, default=20, help="masked positions in each sample, as in the files")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model; heads are 64 wide")
    parser.add_argument("--layers", type=int, default=4, help="of the model")
    parser.add_argument("--batch", type=int, help=f"global batch (default: 32; of feed and scale {FEED_BATCH})")
    parser.add_argument("--micro-batch", type=int, default=16, help="samples of a forward and backward")
    parser.add_argument("--micro-batch-tokens", type=_tokens, default=0, help="of ours; 0: any number, or auto")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of forward and backward")
    parser.add_argument("--float8", action="store_true", help="products of our layers, where precision is bf16")
    parser.add_argument("--compile", action="store_true", help="the layers of both sides")
    parser.add_argument("--activation-checkpointing", action="store_true", help="of ours")
    parser.add_argument("--dropout", type=float, default=0.1, help="of hidden states and attention")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--allocator", choices=["raybert", "system"], default="raybert", help="settings for step")
    parser.add_argument("--workers", type=int, default=2, help="of feed")
    parser.add_argument("--samples", type=int, default=FEED_SAMPLES, help="of a round of feed")
    parser.add_argument("--ranks", type=_integers, default="1,2,4,8,16,32,64", help="stub ranks of scale")
    parser.add_argument("--processes", type=_integers, default="1,2,4", help="of scale that start through Ray Train")
    parser.add_argument("--windows", type=int, default=16, help="of a round of scale's feed")
    parser.add_argument("--shards", type=_integers, default="10,100,1000", help="files that scale indexes")
    parser.add_argument("--steps", type=int, default=60, help="of a round of ray, for each side")
    return parser


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _tokens(text: str) -> int | Literal["auto"]:
    return "auto" if text == "auto" else int(text)


def config_of(options: argparse.Namespace) -> Config:
    """The sample configuration with what the options say, without evaluation and checkpoints on the way."""
    base = build_config(load_settings("sample"))
    model = replace(
        base.model,
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 64),
        intermediate_size=4 * options.hidden,
        hidden_dropout_prob=options.dropout,
        attention_probs_dropout_prob=options.dropout,
    )
    training = replace(
        base.training,
        num_steps=NEVER,
        global_batch_size=options.batch or base.training.global_batch_size,
        micro_batch_size=options.micro_batch,
        micro_batch_tokens=options.micro_batch_tokens,
        precision=options.precision,
        float8=options.float8,
        compile=options.compile,
        activation_checkpointing=options.activation_checkpointing,
    )
    data = replace(
        base.data,
        input_files=options.files,
        vocab_file=None,
        max_seq_length=options.seq,
        max_predictions_per_seq=options.predictions,
    )
    evaluation = replace(base.evaluation, input_files="", every_steps=0)
    cluster = replace(base.cluster, num_workers=1, cpus_per_worker=options.threads)
    checkpoint = replace(base.checkpoint, every_steps=NEVER)
    config = replace(
        base, data=data, model=model, training=training, checkpoint=checkpoint, evaluation=evaluation, cluster=cluster
    )
    check_config(config)
    return config


def _decode(options: argparse.Namespace) -> list[Figure]:
    from raybert import bench_decode

    return bench_decode.measure(config_of(options), options.rounds)


def _step(options: argparse.Namespace) -> list[Figure]:
    from raybert import bench_step

    arguments = ("--rounds", str(options.rounds), "--seconds", str(options.seconds))
    return bench_step.run_alone(config_of(options), options.allocator, *arguments)


def _feed(options: argparse.Namespace) -> list[Figure]:
    from raybert import bench_ray

    config = config_of(options)
    training = replace(config.training, global_batch_size=options.batch or FEED_BATCH)
    cluster = replace(config.cluster, num_workers=options.workers, cpus_per_worker=1)
    config = replace(config, training=training, cluster=cluster)
    return bench_ray.measure_feed(config, options.rounds, options.samples)


def _ray(options: argparse.Namespace) -> list[Figure]:
    from raybert import bench_ray

    if options.steps < 20:
        raise UserError(f"--steps must be at least 20, of which the first 10 do not count, got {options.steps}.")
    config = config_of(options)
    training = replace(config.training, num_steps=options.steps, log_every_steps=10)
    optimizer = replace(config.optimizer, warmup_steps=min(config.optimizer.warmup_steps, options.steps - 1))
    use_gpu = bench_ray.has_gpu()
    config = replace(config, training=training, optimizer=optimizer, cluster=replace(config.cluster, use_gpu=use_gpu))
    return bench_ray.measure_ray(config, options.rounds, num_skipped=max(10, options.steps // 60 * 10))


def _scale(options: argparse.Namespace) -> list[Figure]:
    from raybert import bench_scale

    config = config_of(options)
    config = replace(config, training=replace(config.training, global_batch_size=options.batch or FEED_BATCH))
    sizes = (options.ranks, options.processes, options.shards)
    return bench_scale.measure(config, *sizes, options.rounds, options.windows)


def _checkpoint(options: argparse.Namespace) -> list[Figure]:
    from raybert import bench_checkpoint

    return bench_checkpoint.measure(config_of(options), options.rounds)


PARTS: dict[str, Callable[[argparse.Namespace], list[Figure]]] = {
    "decode": _decode,
    "feed": _feed,
    "step": _step,
    "checkpoint": _checkpoint,
    "ray": _ray,
    "scale": _scale,
}
ALL = [name for name in PARTS if name != "scale"]  # it takes longer than the others together


def _print(part: str, figures: Sequence[Figure], console: Console) -> None:
    """A table of a part's figures, and under it the settings of each side."""
    table = Table(title=part, title_justify="left")
    for column in ("", "median", "lowest", "highest", "runs"):
        table.add_column(column, justify="right" if column else "left")
    for figure in figures:
        numbers = [_number(value) for value in (figure.value, min(figure.runs), max(figure.runs))]
        table.add_row(f"{figure.name}, {figure.unit}", *numbers, str(len(figure.runs)))
    console.print(table)
    sides = {figure.name: figure.settings for figure in figures if figure.unit.endswith("/s")}
    for name, settings in sides.items():
        console.print(
            f"[bold]{name}[/]: " + ", ".join(f"{key} {value}" for key, value in settings.items()), style="dim"
        )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
