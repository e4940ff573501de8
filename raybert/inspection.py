"""`inspect`: what is in TFRecord files of samples, and what in them would break or spoil training.

Shape letters: N samples, L sequence length, P predictions of each.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from raybert.census import Census, empty_census, take_census
from raybert.compression import decompressed_chunks
from raybert.errors import UserError
from raybert.example import Arrays, InvalidSampleError, Schema, bad_records, decode, sizes_of
from raybert.jit import Ints
from raybert.masking import unmasked
from raybert.splitmix import mixed
from raybert.storage import File, chunks, containing, find_files, open_input
from raybert.tfrecord import Records, walk
from raybert.view import counted
from raybert.wordpiece import CLS, CONTINUATION, MASK, SEP, Vocabulary, read_vocabulary

FINE, BROKEN = 0, 1  # exit codes
MAX_BAD_SHOWN = 10
MAX_KEPT = 1 << 22  # fingerprints; of more samples a part is looked at
EXTREMES = 3  # longest, and shortest, that are shown
SHOWN_CHARS = 700
FEW = 1000  # samples


@dataclass(frozen=True, order=True)
class Shown:
    """A sample that is shown.

    Args:
        num_tokens: real ones.
        file, record: where it is.
        text: with its masks, and the answers beside them.
    """

    num_tokens: int
    file: str
    record: int
    text: str


@dataclass
class Found:
    """What has been found so far.

    Args:
        census: of the good samples.
        bad: damaged places, in words.
        num_bad: of them.
        ill_formed: samples that do not read [CLS] A [SEP] B [SEP].
        without_prediction: samples with nothing to predict.
        samples, texts: fingerprints, of samples with and without their masks.
        first, longest, shortest: samples to show.
    """

    census: Census
    bad: list[str] = field(default_factory=list)
    num_bad: int = 0
    ill_formed: int = 0
    without_prediction: int = 0
    samples: Fingerprints = field(default_factory=lambda: Fingerprints())
    texts: Fingerprints = field(default_factory=lambda: Fingerprints())
    first: list[Shown] = field(default_factory=list)
    longest: list[Shown] = field(default_factory=list)
    shortest: list[Shown] = field(default_factory=list)


class Fingerprints:
    """Numbers of 64 bits that stand for things; of many things, those whose number is small."""

    def __init__(self) -> None:
        self._kept: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)
        self._limit = np.uint64((1 << 64) - 1)

    def add(self, rows: Sequence[npt.NDArray[Any]]) -> None:
        """Add N things, each of which is a row of every matrix."""
        number = np.zeros(len(rows[0]), np.uint64)
        for matrix in rows:
            factors = mixed(np.arange(1, matrix.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
            number = mixed(number + (matrix.astype(np.uint64) * factors).sum(axis=1, dtype=np.uint64))
        self._kept = np.concatenate([self._kept, number[number <= self._limit]])
        while len(self._kept) > MAX_KEPT:
            self._limit >>= np.uint64(1)
            self._kept = self._kept[self._kept <= self._limit]

    @property
    def repeated(self) -> float:
        """Share of the things that are another one again."""
        return 1 - len(np.unique(self._kept)) / len(self._kept) if len(self._kept) else 0.0


def main(argv: list[str]) -> int:
    """Inspect files and print the report; 0 if they can be trained on, 1 if not.

    Raises:
        UserError: files or vocabulary are not there, cannot be read, or hold no sample.
    """
    options = _parser().parse_args(argv)
    files = find_files(",".join(options.files), "inspect")
    vocabulary = read_vocabulary(options.vocab or _vocabulary_beside(files))
    console = Console(stderr=True)
    progress = track(files, "inspecting", console=console, disable=options.json or not console.is_terminal)
    try:
        schema = infer_schema(files, len(vocabulary.tokens))
        found = inspect_files(progress, schema, vocabulary, options.samples)
    except OSError as error:
        raise UserError(f"Cannot read the files: {error}; check the paths and the credentials.") from error
    if options.plot:
        _write_plot(options.plot, found.census)
    report = make_report(files, schema, found)
    print(json.dumps(report, indent=1) if options.json else "\n".join(lines(report)))
    return BROKEN if report["errors"] else FINE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python run.py inspect",
        description="What is in TFRecord files of BERT samples: counts, padding, masks, next sentence labels, "
        "duplicates, and samples as text; and what in them would break or spoil training.",
        epilog="Exit code: 0 if the files can be trained on, 1 if not.",
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="paths or globs; local, s3:// or gs://")
    add("--vocab", metavar="FILE", help="the vocabulary; default: vocab.txt beside the first file")
    add("--samples", type=int, default=3, metavar="N", help="samples to show; default: 3")
    add("--plot", metavar="PNG", help="draw histograms of lengths and masks")
    add("--json", action="store_true", help="print the report as JSON")
    return parser


def _vocabulary_beside(files: Sequence[File]) -> str:
    folder, _ = containing(files[0].path)
    if not folder.exists("vocab.txt"):
        raise UserError(f"There is no vocab.txt beside {files[0].path}; name the vocabulary by --vocab.")
    return (folder / "vocab.txt").uri


# --- Reading ----------------------------------------------------------------------------------------------------------


def _pieces(file: File) -> Iterator[Records]:
    with open_input(file.path) as source:
        yield from walk(decompressed_chunks(chunks(source)))


def infer_schema(files: Sequence[File], vocab_size: int, type_vocab_size: int = 2) -> Schema:
    """L and P as the first sample has them.

    Raises:
        UserError: there is none.
    """
    for records in itertools.chain.from_iterable(map(_pieces, files)):
        for i in np.flatnonzero(records.is_intact).tolist():
            try:
                length, places = sizes_of(records.payload(i))
            except InvalidSampleError:
                continue
            return Schema(length, places, vocab_size, type_vocab_size)
    names = ", ".join(file.path for file in files[:3])
    raise UserError(f"{len(files)} files ({names}) hold no BERT sample; give TFRecord files of `run.py prepare`.")


def inspect_files(files: Iterable[File], schema: Schema, vocabulary: Vocabulary, num_shown: int) -> Found:
    """Read files once, in bounded memory."""
    found = Found(empty_census(schema))
    for file in files:
        for records in _pieces(file):
            arrays, is_good = decode(records.buffer, records.offsets, records.lengths, schema)
            for bad in bad_records(records, is_good, schema):
                found.num_bad += 1
                if len(found.bad) < MAX_BAD_SHOWN:
                    found.bad.append(f"{file.path}: {bad}")
            good = np.flatnonzero(is_good & records.is_intact)
            _add(found, {name: values[good] for name, values in arrays.items()}, vocabulary, schema)
            _show(found, arrays, good, vocabulary, file.path, records.first_record, num_shown)
    return found


def _add(found: Found, features: Arrays, vocabulary: Vocabulary, schema: Schema) -> None:
    tokens, segments = unmasked(features), features["segment_ids"]
    found.census += take_census(features, schema, vocabulary)
    found.without_prediction += int((features["masked_lm_weights"] == 0).all(axis=1).sum())
    found.ill_formed += int((~_is_well_formed(tokens, features, vocabulary)).sum())
    found.texts.add([tokens, segments])
    found.samples.add([features["input_ids"], features["masked_lm_positions"], features["masked_lm_ids"], segments])


def _is_well_formed(tokens: npt.NDArray[Any], features: Arrays, vocabulary: Vocabulary) -> npt.NDArray[np.bool_]:
    """[N] whether a sample reads [CLS] A [SEP] B [SEP], and no mask or padding stands in between."""
    lengths = features["input_mask"].sum(axis=1, dtype=np.int64)
    is_real = np.arange(tokens.shape[1]) < lengths[:, None]
    cls, sep = vocabulary.ids[CLS], vocabulary.ids[SEP]
    ends = tokens[np.arange(len(tokens)), np.maximum(lengths - 1, 0)]
    well: npt.NDArray[np.bool_] = (tokens[:, 0] == cls) & (ends == sep) & (lengths > 0)
    well &= (features["input_mask"] == is_real).all(axis=1) & ((tokens == sep).sum(axis=1) == 2)
    return well


# --- Samples to show --------------------------------------------------------------------------------------------------


def _show(
    found: Found, arrays: Arrays, good: Ints, vocabulary: Vocabulary, path: str, first_record: int, num_shown: int
) -> None:
    """Keep the first samples, the longest and the shortest."""
    if not len(good):
        return
    lengths = arrays["input_mask"][good].sum(axis=1, dtype=np.int64)
    order = np.argsort(lengths, kind="stable")

    def shown(k: int) -> Shown:
        i = int(good[k])
        sample = {name: values[i] for name, values in arrays.items()}
        return Shown(int(lengths[k]), path, first_record + i, rendered(sample, vocabulary))

    found.first += [shown(k) for k in range(min(len(good), num_shown - len(found.first)))]
    shortest, longest = order[:EXTREMES], np.argsort(-lengths, kind="stable")[:EXTREMES]
    found.shortest = heapq.nsmallest(
        EXTREMES, [*found.shortest, *map(shown, shortest)], key=lambda each: each.num_tokens
    )
    found.longest = heapq.nlargest(EXTREMES, [*found.longest, *map(shown, longest)], key=lambda each: each.num_tokens)


def rendered(sample: Arrays, vocabulary: Vocabulary) -> str:
    """A sample as text; a masked place as [what stands there=what is to be predicted]."""
    answers = {
        int(place): int(label)
        for place, label, weight in zip(
            sample["masked_lm_positions"], sample["masked_lm_ids"], sample["masked_lm_weights"], strict=True
        )
        if weight
    }
    words: list[str] = []
    for place, token in enumerate(sample["input_ids"][: int(sample["input_mask"].sum())].tolist()):
        text = vocabulary.tokens[token]
        if place in answers:
            words.append(f"[{text.strip('[]') if text == MASK else text}={vocabulary.tokens[answers[place]]}]")
        elif text.startswith(CONTINUATION) and words and not words[-1].endswith("]"):
            words[-1] += text.removeprefix(CONTINUATION)
        else:
            words.append(text)
    label = "random next" if sample["next_sentence_labels"] else "next"
    return f"({label}) {' '.join(words)}"


# --- The report -------------------------------------------------------------------------------------------------------


def make_report(files: Sequence[File], schema: Schema, found: Found) -> dict[str, Any]:
    """Everything, for a person and for JSON."""
    summary = found.census.summary()
    return {
        "files": len(files),
        "bytes": sum(file.size_bytes for file in files),
        "max_seq_length": schema.max_seq_length,
        "max_predictions_per_seq": schema.max_predictions_per_seq,
        "vocab_size": schema.vocab_size,
        **summary,
        "duplicate_samples": round(found.samples.repeated, 6),
        "duplicate_texts": round(found.texts.repeated, 6),
        "errors": list(_errors(found)),
        "warnings": list(_warnings(found, summary)),
        "longest": [vars(shown) for shown in found.longest],
        "shortest": [vars(shown) for shown in found.shortest],
        "first": [vars(shown) for shown in found.first],
        "lengths": _counts(found.census.lengths),
        "predictions": _counts(found.census.predictions),
    }


def _counts(values: Ints) -> dict[str, int]:
    return {str(number): int(values[number]) for number in np.flatnonzero(values)}


def _errors(found: Found) -> Iterator[str]:
    """What training refuses."""
    if found.num_bad:
        yield f"{found.num_bad} bad records, which training refuses:"
        yield from found.bad
        if found.num_bad > len(found.bad):
            yield "... and more"
    if not found.census.num_samples:
        yield "no good sample at all"


def _warnings(found: Found, summary: dict[str, Any]) -> Iterator[str]:
    """What would spoil training."""
    num_samples, share = found.census.num_samples, {name: f"{value:.1%}" for name, value in summary.items()}
    rules = (
        (found.ill_formed, f"{found.ill_formed:,} samples do not read [CLS] A [SEP] B [SEP]: is it their vocabulary?"),
        (found.without_prediction, f"{found.without_prediction:,} samples have no masked place to learn from"),
        (
            not 0.05 <= summary["masked"] <= 0.25,
            f"{share['masked']} of the tokens are to be predicted, where BERT has 15 %",
        ),
        (
            not 0.7 <= summary["masked_as_mask"] <= 0.9,
            f"{share['masked_as_mask']} of the masked places hold {MASK}, where BERT has 80 %: is it their vocabulary?",
        ),
        (
            not 0.3 <= summary["random_next"] <= 0.75,
            f"{share['random_next']} of the next sentences are random, so the label is guessed without reading; if it "
            "is no label at all, train with --training.use_next_sentence_label false",
        ),
        (summary["padding"] > 0.5, f"{share['padding']} of the positions are padding: make shorter samples"),
        (
            summary["unknown"] > 0.02,
            f"{share['unknown']} of the tokens are [UNK]: is it their vocabulary and case?",
        ),
        (found.samples.repeated > 0.01, f"{found.samples.repeated:.1%} of the samples are another one, masks and all"),
        (num_samples < FEW, f"{num_samples:,} samples are few to learn from"),
    )
    yield from (text for applies, text in rules if applies and num_samples)


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report, line by line."""
    yield (
        f"{report['samples']:,} samples in {counted(report['files'], 'file')} ({report['bytes'] / 1e6:,.1f} MB): "
        f"max_seq_length {report['max_seq_length']}, max_predictions_per_seq {report['max_predictions_per_seq']}"
    )
    yield (
        f"Tokens: {report['tokens']:,}, {report['tokens_per_sample']:.1f} a sample; {report['padding']:.1%} padding, "
        f"{report['full_sequences']:.1%} of the samples full; {report['unknown']:.2%} [UNK]"
    )
    yield (
        f"Masked: {report['masked_per_sample']:.1f} a sample, {report['masked']:.1%} of the tokens; of these "
        f"{report['masked_as_mask']:.1%} {MASK}, {report['masked_as_other']:.1%} another token, "
        f"{report['masked_as_itself']:.1%} the same"
    )
    yield f"Next sentences: {report['random_next']:.1%} random (label 1)"
    yield (
        f"Duplicates: {report['duplicate_samples']:.2%} of the samples; {report['duplicate_texts']:.2%} but for their "
        "masks"
    )
    for name in ("shortest", "longest", "first"):
        yield f"{name.capitalize()}:"
        for shown in report[name]:
            text = shown["text"]
            yield f"  {shown['file']}, record {shown['record']}, {shown['num_tokens']} tokens"
            yield f"    {text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + ' ...'}"
    yield from (f"WARNING: {warning}" for warning in report["warnings"])
    yield from (f"ERROR: {error}" for error in report["errors"])


def _write_plot(uri: str, census: Census) -> None:
    """Histograms of lengths and of predictions, as a PNG.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.ticker import MaxNLocator

    from raybert.canvas import LIGHT, new_figure, place, png  # which takes a moment that others need not wait

    figure = new_figure(860, 270, "Samples")
    parts = (("tokens", census.lengths), ("masked places", census.predictions))
    for left, (name, counts) in zip((50, 490), parts, strict=True):
        axes = place(figure, left, 36, 360, 190)
        axes.bar(np.arange(len(counts)), counts, width=1, color=LIGHT["train"])
        axes.set(ylabel="samples", xlabel=name, xlim=(-0.5, len(counts) - 0.5), yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    folder, name = containing(uri)
    try:
        folder.write(name, png(figure))
    except OSError as error:
        raise UserError(f"Cannot write {uri}: {error}; choose another --plot.") from error
