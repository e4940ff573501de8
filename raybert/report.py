"""`report`: a run as one page, and its charts as pictures beside it; from its directory alone, at any time."""

from __future__ import annotations

import argparse

from raybert.canvas import png
from raybert.charts import draw
from raybert.chronicle import REPORT, read_chronicle
from raybert.errors import UserError
from raybert.page import render
from raybert.storage import Directory, absolute, containing

SUFFIX = ".html"


def main(argv: list[str]) -> int:
    """Write the report of a run and say where it is.

    Raises:
        UserError: there is no such run, or its directory or the output cannot be read or written.
    """
    options = _parser().parse_args(argv)
    run = Directory(absolute(options.run_dir))
    folder, name = containing(options.output) if options.output else (run, REPORT)
    if not name.endswith(SUFFIX):
        raise UserError(f"--output must end in {SUFFIX}, got {options.output!r}; the pictures go beside it.")
    try:
        uri = write_report(run, folder, name)
    except OSError as error:
        raise UserError(
            f"Cannot read {run.uri} or write {name} to {folder.uri}: {error}; check the paths, or choose another "
            "--output."
        ) from error
    print(f"Report: {uri}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python run.py report",
        description="One HTML page of a run, complete or not: curves, workers and what happened to them over time, "
        "goodput, data and settings; and a PNG of each chart beside it. A run makes it at its end, too.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a local directory, s3:// or gs://")
    parser.add_argument("--output", metavar="FILE", help=f"the page, FILE{SUFFIX}; default: {REPORT} in RUN_DIR")
    return parser


def write_report(run: Directory, folder: Directory, name: str = REPORT) -> str:
    """Write the page under its name, and the pictures into a folder called like it; returns the page's URI.

    Raises:
        UserError: it is no run's directory.
        OSError: the storage failed.
    """
    chronicle = read_chronicle(run)
    charts = list(draw(chronicle))
    pictures = folder / name.removesuffix(SUFFIX)
    for chart in charts:
        pictures.write(f"{chart.name}.png", png(chart.figure))
    folder.write(name, render(chronicle, charts).encode())
    return (folder / name).uri
