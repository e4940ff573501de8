"""A learned vocabulary: the same for the same text, whole words of it where they are frequent, and what is refused."""

import subprocess
import sys

import pytest
from helpers import DATA
from transformers import BertTokenizer

from raybert import cli, vocab
from raybert.wordpiece import SPECIAL_TOKENS, UNK, Tokenizer, read_vocabulary, split_words

TEXT = DATA / "genesis.txt"


def words(output, *more, text=TEXT):
    return ["vocab", "--input", str(text), "--output", str(output), *map(str, more)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    assert cli.main(words(path, "--size", 2000)) == 0
    return path


def test_special_tokens_come_first_and_the_text_is_known(path):
    vocabulary = read_vocabulary(str(path))
    assert vocabulary.tokens[:5] == SPECIAL_TOKENS
    assert len(vocabulary.tokens) == len(set(vocabulary.tokens)) == 2000
    assert {"god", "abraham", "heaven", "##ing", ",", "z", "##z"} <= set(vocabulary.tokens)
    lines = TEXT.read_text().splitlines()
    tokens = Tokenizer(vocabulary, True).encode(lines)
    assert vocabulary.ids[UNK] not in tokens.ids
    assert len(tokens.ids) < 1.1 * sum(len(split_words(line, True)) for line in lines)  # most of them whole words


@pytest.mark.parametrize("threads", ["1", "4"])
def test_another_process_learns_the_same(path, tmp_path, threads):
    """Whatever the order of its hash tables, and on any number of threads."""
    code = f"from raybert import cli; cli.main({words(tmp_path / 'again.txt', '--size', 2000)!r})"
    for _ in range(3):
        environment = {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        subprocess.run([sys.executable, "-c", f"import os; os.environ |= {environment}; {code}"], check=True)
        assert (tmp_path / "again.txt").read_bytes() == path.read_bytes()
        (tmp_path / "again.txt").unlink()


def test_transformers_opens_it(path):
    peer = BertTokenizer.from_pretrained(path.parent)
    lines = TEXT.read_text().splitlines()[:50]
    expected = Tokenizer(read_vocabulary(str(path)), True).encode(lines).ids.tolist()
    assert [token for ids in peer(lines, add_special_tokens=False)["input_ids"] for token in ids] == expected


def test_a_cased_vocabulary_keeps_capitals(tmp_path):
    assert cli.main(words(tmp_path / "cased.txt", "--size", 1000, "--do_lower_case", "false")) == 0
    assert {"God", "And", "the"} <= set(read_vocabulary(str(tmp_path / "cased.txt")).tokens)


def test_rare_characters_are_left_out_alike(tmp_path, monkeypatch):
    """The most frequent ones stay; of those that are equally rare, the first."""
    monkeypatch.setattr(vocab, "MAX_ALPHABET", 3)
    (tmp_path / "text.txt").write_text("aab ab zc aa d\n" * 9 + "zz\n")
    assert cli.main(words(tmp_path / "out.txt", text=tmp_path / "text.txt")) == 0
    tokens = read_vocabulary(str(tmp_path / "out.txt")).tokens[5:]
    assert tokens[:6] == ("a", "b", "z", "##a", "##b", "##z")
    assert not any(char in token for token in tokens for char in "cd")


def test_a_small_text_gives_less_and_says_so(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("one two one two\n")
    assert cli.main(words(tmp_path / "out.txt", text=tmp_path / "text.txt")) == 0
    assert "The text gives no more of the 30,522 that were asked for." in capsys.readouterr().out


def test_what_cannot_be_learned_is_refused(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n\n")
    cases = {
        "holds no text": words(tmp_path / "out.txt", text=tmp_path / "empty.txt"),
        "has no room for": words(tmp_path / "out.txt", "--size", 50),
        "is there already": words(tmp_path / "empty.txt"),
        "matches no file": words(tmp_path / "out.txt", text=tmp_path / "none.txt"),
    }
    for expected, argv in cases.items():
        assert cli.main(argv) == 1
        assert expected in capsys.readouterr().err
        assert not (tmp_path / "out.txt").exists()
