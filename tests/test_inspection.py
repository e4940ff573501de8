"""`inspect`: figures that are counted by hand, samples as text, and what is warned of."""

import json

import numpy as np
import pytest
from helpers import DATA, MORE_DATA, SAMPLE_FILE, VOCAB_FILE, VOCABULARY, build_index
from records import large_damaged

from raybert import cli, inspection
from raybert.example import Schema, encode
from raybert.inspection import Fingerprints, rendered
from raybert.tfrecord import write_tfrecord
from raybert.wordpiece import CLS, MASK, SEP, UNK, Tokenizer

CLS_ID, SEP_ID, MASK_ID, UNK_ID = (VOCABULARY.ids[token] for token in (CLS, SEP, MASK, UNK))
TOKENIZER = Tokenizer(VOCABULARY, True)


def report(capsys, *paths, vocab=VOCAB_FILE, code=0):
    """What --json says of files."""
    capsys.readouterr()
    assert cli.main(["inspect", *map(str, paths), "--vocab", str(vocab), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def sample(a, b, masks, *, label=0, length=24, places=5):
    """A sample of two texts; masks are place to the token that stands there instead."""
    tokens = [CLS_ID, *TOKENIZER.encode([a]).ids, SEP_ID]
    num_a = len(tokens)
    tokens += [*TOKENIZER.encode([b]).ids, SEP_ID]
    arrays = Schema(length, places, len(VOCABULARY.tokens), 2).empty(1)
    arrays["input_ids"][0, : len(tokens)] = tokens
    arrays["input_mask"][0, : len(tokens)] = 1
    arrays["segment_ids"][0, num_a : len(tokens)] = 1
    arrays["next_sentence_labels"][0] = label
    for k, (place, token) in enumerate(sorted(masks.items())):
        arrays["masked_lm_positions"][0, k], arrays["masked_lm_ids"][0, k] = place, tokens[place]
        arrays["masked_lm_weights"][0, k] = 1
        arrays["input_ids"][0, place] = VOCABULARY.ids[token]
    return arrays


def written(path, *samples):
    write_tfrecord(path, (payload for arrays in samples for payload in encode(arrays)))
    return path


@pytest.fixture
def three(tmp_path):
    """Three samples, the last one the first but for its masks."""
    return written(
        tmp_path / "three.tfrecord",
        sample("the cat sat", "it was unaffable", {1: MASK, 2: "dog", 5: "it"}),
        sample("yes", "no \u4e16x\u16a0", {3: MASK}, label=1),
        sample("the cat sat", "it was unaffable", {7: MASK}),
    )


def test_figures_are_counted(three, capsys):
    found = report(capsys, three)
    lengths = [11, 7, 11]
    assert [shown["num_tokens"] for shown in found["first"]] == lengths
    expected = {
        "samples": 3,
        "tokens": sum(lengths),
        "padding": 1 - sum(lengths) / 72,
        "masked": 5 / sum(lengths),
        "masked_as_mask": 3 / 5,
        "masked_as_other": 1 / 5,
        "masked_as_itself": 1 / 5,
        "random_next": 1 / 3,
        "unknown": 1 / sum(lengths),
        "duplicate_samples": 0,
        "duplicate_texts": 1 / 3,
        "max_seq_length": 24,
        "max_predictions_per_seq": 5,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    assert found["lengths"] == {"7": 1, "11": 2} and found["predictions"] == {"1": 2, "3": 1}
    assert [shown["num_tokens"] for shown in found["shortest"]] == [7, 11, 11]
    assert [shown["num_tokens"] for shown in found["longest"]] == [11, 11, 7]
    assert [shown["record"] for shown in found["longest"]] == [0, 2, 1]


def test_an_unknown_token_behind_a_mask_is_counted_once(tmp_path, capsys):
    path = written(tmp_path / "one.tfrecord", sample("\u16a0 \u16a0 a", "b", {1: MASK, 3: UNK}))
    assert report(capsys, path)["unknown"] == pytest.approx(2 / 7, abs=1e-6)


def test_a_sample_is_shown_with_masks_and_answers():
    def shown(arrays):
        return rendered({name: values[0] for name, values in arrays.items()}, VOCABULARY)

    one = sample("the cat sat", "it was unaffable", {1: MASK, 2: "dog", 5: "it"})
    assert shown(one) == "(next) [CLS] [MASK=the] [dog=cat] sat [SEP] [it=it] was unaffable [SEP]"
    other = sample("a", "unaffable", {4: MASK}, label=1)
    assert shown(other) == "(random next) [CLS] a [SEP] una [MASK=##ffa] ##ble [SEP]"


def test_files_of_googles_script(capsys):
    """What its manifest says: 18.1 % padding, 15.6 masked a sample, 54.2 % random, 58 % full."""
    found = report(capsys, SAMPLE_FILE)
    assert (found["samples"], found["errors"]) == (118, [])
    assert found["padding"] == pytest.approx(0.181, abs=0.0005)
    assert found["masked_per_sample"] == pytest.approx(15.6, abs=0.05)
    assert found["random_next"] == pytest.approx(0.542, abs=0.0005)
    assert found["full_sequences"] == pytest.approx(0.58, abs=0.005)
    assert found["warnings"] == ["118 samples are few to learn from"]
    compressed = report(capsys, DATA / "tf_examples.tfrecord.gz")
    of_files = {"bytes", "first", "longest", "shortest"}
    assert all(compressed[name] == value for name, value in found.items() if name not in of_files)


@pytest.mark.skipif(not MORE_DATA.exists(), reason="needs the collection beside the repository")
def test_larger_files_of_googles_script(capsys):
    found = report(capsys, MORE_DATA / "real128" / "*.tfrecord")
    assert found["samples"] == 10_080 and not found["errors"] and not found["warnings"]
    assert found["padding"] == pytest.approx(0.131, abs=0.002)


def test_a_person_reads_the_same(three, capsys):
    assert cli.main(["inspect", str(three), "--vocab", str(VOCAB_FILE), "--samples", "1"]) == 0
    output = capsys.readouterr().out
    assert "3 samples in 1 file " in output and "3.45% [UNK]" in output
    assert "Next sentences: 33.3% random (label 1)" in output
    assert output.count("(next) [CLS] [MASK=the] [dog=cat] sat") == 3  # among the longest, the shortest and the first
    assert "WARNING: 3 samples are few to learn from" in output


def test_the_vocabulary_beside_the_files_is_found(three, capsys):
    assert cli.main(["inspect", str(three)]) == 1
    assert f"There is no vocab.txt beside {three}" in capsys.readouterr().err
    (three.parent / "vocab.txt").write_bytes(VOCAB_FILE.read_bytes())
    assert cli.main(["inspect", str(three)]) == 0


MANY = 1200
ODD = {
    "duplicates": (lambda k: sample("the cat", "sat", {1: MASK}, label=k % 2), "of the samples are another one"),
    "labels": (lambda k: sample("the cat", f"sat {k}", {1: MASK}), "0.0% of the next sentences are random"),
    "unknown": (lambda k: sample(f"\u16a0 {k}", "sat", {3: MASK}, label=k % 2), "of the tokens are [UNK]"),
    "masks": (
        lambda k: sample("the cat", f"sat {k}", {1: "the"}, label=k % 2),
        "0.0% of the masked places hold [MASK]",
    ),
    "share": (lambda k: sample("a", f"{k}", {1: MASK, 3: MASK}, label=k % 2), "of the tokens are to be predicted"),
    "padding": (lambda k: sample("a", f"{k}", {1: MASK}, label=k % 2), "of the positions are padding"),
    "nothing": (lambda k: sample("the cat", f"sat {k}", {}, label=k % 2), f"{MANY:,} samples have no masked place"),
    "[SEP]": (
        lambda k: {**sample("the cat", f"sat {k}", {1: MASK}), "input_ids": np.full((1, 24), 7)},
        f"{MANY:,} samples do not read [CLS] A [SEP] B [SEP]",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_would_spoil_training_is_warned_of(tmp_path, capsys, name):
    make, expected = ODD[name]
    found = report(capsys, written(tmp_path / "odd.tfrecord", *map(make, range(MANY))))
    assert any(expected in warning for warning in found["warnings"]), found["warnings"]


def test_good_data_is_not_warned_of(tmp_path, capsys):
    output = tmp_path / "out"
    words = [
        "--input",
        str(DATA / "genesis.txt"),
        "--vocab",
        str(VOCAB_FILE),
        "--output",
        str(output),
        "--workers",
        "0",
    ]
    assert cli.main(["prepare", *words]) == 0
    found = report(capsys, output / "samples-*", vocab=output / "vocab.txt")
    assert found["warnings"] == found["errors"] == []
    made = json.loads((output / "dataset.json").read_text())
    assert {name: found[name] for name in made["samples"]} == made["samples"]


REFUSED = {
    "flip_payload.tfrecord": "found a payload of",
    "trunc_payload.tfrecord": "found the end of the file",
    "token_id_ge_vocab.tfrecord": "expected 0 <= input_ids < vocab_size 30522",
    "wrong_type.tfrecord": "expected int64_list",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_training_refuses_is_an_error(tmp_path, capsys, name):
    path = tmp_path / name
    path.write_bytes(large_damaged().get(name) or (DATA / "damaged" / name).read_bytes())
    found = report(capsys, path, code=1)
    assert "bad records, which training refuses" in found["errors"][0]
    assert REFUSED[name] in found["errors"][1] and str(path) in found["errors"][1]


def test_a_vocabulary_that_is_too_small_is_an_error(tmp_path, capsys):
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCABULARY.tokens[:20_000]))
    found = report(capsys, SAMPLE_FILE, vocab=tmp_path / "vocab.txt", code=1)
    assert any("vocab_size 20000" in error for error in found["errors"])


def test_files_without_a_sample_are_refused(tmp_path, capsys):
    for name, content in (("empty", b""), ("text", b"no TFRecord at all"), ("zeros", bytes(32))):
        (tmp_path / name).write_bytes(content)
        assert cli.main(["inspect", str(tmp_path / name), "--vocab", str(VOCAB_FILE)]) == 1
        assert "hold no BERT sample" in capsys.readouterr().err


def test_fingerprints_of_many_are_of_a_part(monkeypatch):
    """The share is then an estimate, within a few standard errors."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 1000, (50_000, 8))
    rows[25_000:30_000] = rows[:5_000]  # a tenth is there again
    whole = Fingerprints()
    whole.add([rows[:, :5], rows[:, 5:]])
    assert whole.repeated == pytest.approx(0.1, abs=1e-4)
    monkeypatch.setattr(inspection, "MAX_KEPT", 5000)
    part = Fingerprints()
    for some in np.array_split(rows, 13):
        part.add([some[:, :5], some[:, 5:]])
    assert len(part._kept) <= 5000 and part.repeated == pytest.approx(0.1, abs=0.03)


def test_a_plot(three, tmp_path):
    from PIL import Image

    assert cli.main(["inspect", str(three), "--vocab", str(VOCAB_FILE), "--plot", str(tmp_path / "plot.png")]) == 0
    with Image.open(tmp_path / "plot.png") as image:
        image.load()
        assert image.format == "PNG" and image.width > 1000
        colors = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
    assert len(colors) > 10


def test_the_index_counts_the_same(three, tmp_path):
    index = build_index(three, Schema(24, 5, len(VOCABULARY.tokens), 2), tmp_path / "index")
    assert index.num_samples == 3 and index.num_random_next == 1
