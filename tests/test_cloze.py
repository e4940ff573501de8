import json

import pytest
import torch
import transformers
from helpers import TINY_MODEL

from raybert.cli import main
from raybert.model import BertForPreTraining
from raybert.pretrained import save_pretrained

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on a mat . , dog run ##ning quick ##ly he she was is it in paris"
TEXTS = [
    "The cat [MASK] on the mat.",
    "[MASK] quickly, [MASK] was running in [MASK]",
    "He was in Paris [MASK] ||| It is a [MASK] .",
    "[MASK]",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A directory with a model and a vocabulary that is smaller than its table."""
    folder = tmp_path_factory.mktemp("cloze")
    torch.manual_seed(0)
    model = BertForPreTraining(TINY_MODEL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    (folder / "words.txt").write_text("".join(f"{word}\n" for word in WORDS.split()))
    (folder / "model").mkdir()
    save_pretrained(folder / "model", model.state_dict(), TINY_MODEL, folder / "words.txt")
    return folder / "model"


def filled(capsys, *words):
    assert main(["fill", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_guesses_are_those_of_transformers(checkpoint, capsys):
    found = filled(capsys, checkpoint, *TEXTS, "--top_k", "3")
    assert [len(each["masks"]) for each in found] == [1, 3, 2, 1]
    tokenizer = transformers.BertTokenizerFast.from_pretrained(checkpoint)
    twin = transformers.BertForPreTraining.from_pretrained(checkpoint).eval()
    for each in found:
        pair = [part.strip() for part in each["text"].split("|||")]
        inputs = tokenizer(*pair, return_tensors="pt")
        with torch.no_grad():
            output = twin(**inputs)
        rows = output.prediction_logits[0][inputs["input_ids"][0] == tokenizer.mask_token_id].softmax(dim=-1)
        for guesses, row in zip(each["masks"], rows, strict=True):
            best = row.topk(3)
            assert [guess["probability"] for guess in guesses] == pytest.approx(best.values.tolist(), abs=1e-5)
            known = [tokenizer.convert_ids_to_tokens(i) if i < 25 else f"[{i}]" for i in best.indices.tolist()]
            assert [guess["token"] for guess in guesses] == known
        follows = output.seq_relationship_logits.softmax(dim=-1)[0, 0].item() if len(pair) == 2 else None
        assert each["next_sentence_probability"] == (follows if follows is None else pytest.approx(follows, abs=1e-5))


def test_many_sentences_are_filled_in_order(checkpoint, capsys):
    found = filled(capsys, checkpoint, *(TEXTS * 20))
    assert [each["text"] for each in found] == TEXTS * 20
    probabilities = [[guess["probability"] for mask in each["masks"] for guess in mask] for each in found]
    for number, each in enumerate(probabilities):
        assert each == pytest.approx(probabilities[number % len(TEXTS)], abs=1e-6)


def test_a_person_reads_sentences_and_guesses(checkpoint, capsys):
    assert main(["fill", str(checkpoint), *TEXTS[1:3], "--top_k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[1], lines[4]] == [TEXTS[1], "  [MASK] 1", "  [MASK] 2"]
    assert lines[-1].endswith("that the second sentence follows the first") and len(lines) == 10 + 7 + 1


def test_a_cased_model_reads_cased_text(checkpoint, tmp_path, capsys):
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    says = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(says | {"do_lower_case": False}))
    lower, upper = (filled(capsys, folder, "The cat [MASK]")[0]["masks"] for folder in (checkpoint, tmp_path))
    assert lower != upper  # The is [UNK]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{model}", "The cat sat."], "There is no [MASK] in 'The cat sat.'; put one"),
        (["{model}", "the cat [MASK] " * 5], "has 17 tokens, and the model takes 16; shorten it"),
        (["{model}", "a ||| [MASK] ||| b"], "A pair has one '|||', got 2"),
        (["{model}", "[MASK]", "--top_k", "0"], "--top_k must be at least 1, got 0"),
        (["{bare}", "[MASK]"], "has no vocab.txt; name the vocabulary"),
        (["{model}", "[MASK]", "--vocab", "{long}"], "has 99 tokens, and the model in"),
        (["{model}/nothing", "[MASK]"], "holds neither a config.json nor a run"),
    ],
)
def test_a_mistake_is_named(checkpoint, tmp_path, capsys, words, message):
    for path in checkpoint.iterdir():
        if path.name != "vocab.txt":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    long = tmp_path / "long.txt"
    long.write_text("".join(f"{word}\n" for word in [*WORDS.split(), *(f"w{n}" for n in range(74))]))
    places = {"model": checkpoint, "bare": tmp_path, "long": long}
    assert main(["fill", *(word.format(**places) for word in words)]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
