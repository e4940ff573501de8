"""Command line options that say how text is read, as `prepare` and `vocab` have them."""

from __future__ import annotations

import argparse
from dataclasses import fields

from raybert.corpus import Reading


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add --input and the fields of `Reading`."""
    add = parser.add_argument
    add(
        "--input", "--input_file", nargs="+", required=True, metavar="GLOB",
        help="text files, JSON lines (.jsonl), Parquet; plain, gzip or zlib; local, s3:// or gs://; commas too",
    )  # fmt: skip
    add(
        "--lines", choices=("sentences", "paragraphs", "wrapped"),
        help="what a line of text is: a sentence; a paragraph, whose sentences are found; or wrapped: paragraphs over "
        "many lines, a blank line between them, each file a document; default: sentences, and in rows paragraphs",
    )  # fmt: skip
    add("--text_column", default="text", metavar="NAME", help="of JSON lines and Parquet; default: text")
    add("--language", default="en", metavar="CODE", help="of the text, for finding sentences; default: en")


def reading_of(options: argparse.Namespace) -> Reading:
    """What the options say."""
    return Reading(**{field.name: getattr(options, field.name) for field in fields(Reading)})


def boolean(text: str) -> bool:
    """true or false, as Google's flags take them.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"true or false is expected, got {text!r}")
    return values[text.lower()]
