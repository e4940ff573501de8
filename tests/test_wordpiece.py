"""Tokens are those of google-research/bert's FullTokenizer, and transformers agrees."""

import json
import unicodedata

import pytest
from helpers import DATA, MORE_DATA, VOCAB_FILE, VOCABULARY
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertTokenizer
from transformers.models.bert.tokenization_bert_legacy import BasicTokenizer, WordpieceTokenizer

from raybert.errors import UserError
from raybert.wordpiece import MAX_WORDS_KEPT, SPECIAL_TOKENS, Tokenizer, read_vocabulary, split_words

GOOGLE = [json.loads(line) for line in (DATA / "wordpiece.jsonl").read_text().splitlines()]
PIECES = WordpieceTokenizer(VOCABULARY.ids, "[UNK]", max_input_chars_per_word=200)


def encoded(sentences, lowercase):
    """Each sentence's ids."""
    tokens = Tokenizer(VOCABULARY, lowercase).encode(sentences)
    ids, found = tokens.ids.tolist(), []
    for length in tokens.lengths.tolist():
        found.append(ids[:length])
        ids = ids[length:]
    assert not ids
    return found


@pytest.mark.parametrize("case", ["uncased", "cased"])
def test_tokens_are_those_of_googles_script(case):
    assert encoded([row["text"] for row in GOOGLE], case == "uncased") == [row[case] for row in GOOGLE]


@given(st.text(st.characters(exclude_categories=["Cs", "Co", "Cn"])), st.booleans())
def test_words_are_those_of_transformers_slow_tokenizer(text, lowercase):
    """But for composed forms, which it makes first, and characters that Unicode leaves open, which it drops."""
    text = unicodedata.normalize("NFC", text)
    peer = BasicTokenizer(lowercase, strip_accents=None if lowercase else False)
    assert split_words(text, lowercase) == peer.tokenize(text)


@given(st.lists(st.text("abcdefgxyz'ß中ü", min_size=1, max_size=210)))
def test_pieces_are_those_of_transformers_slow_tokenizer(words):
    (found,) = encoded([" ".join(words)], False)
    expected = [piece for word in split_words(" ".join(words), False) for piece in PIECES.tokenize(word)]
    assert [VOCABULARY.tokens[token] for token in found] == expected


@pytest.mark.parametrize("lowercase", [True, False])
def test_transformers_fast_tokenizer_agrees_on_text(lowercase):
    peer = BertTokenizer.from_pretrained(VOCAB_FILE.parent, do_lower_case=lowercase)
    lines = (DATA / "genesis.txt").read_text().splitlines()
    assert encoded(lines, lowercase) == peer(lines, add_special_tokens=False)["input_ids"]


@pytest.mark.skipif(not MORE_DATA.exists(), reason="needs the collection beside the repository")
@pytest.mark.parametrize("name", ["austen", "kjv"])
def test_transformers_fast_tokenizer_agrees_on_books(name):
    peer = BertTokenizer.from_pretrained(VOCAB_FILE.parent)
    lines = (MORE_DATA / "corpus" / f"{name}.txt").read_text().splitlines()[::10]
    assert encoded(lines, True) == peer(lines, add_special_tokens=False)["input_ids"]


def test_ids_do_not_depend_on_what_was_met_before():
    """Also once what is kept was forgotten."""
    sentences, tokenizer = [row["text"] for row in GOOGLE], Tokenizer(VOCABULARY, True)
    first = tokenizer.encode(sentences).ids.tolist()
    tokenizer.encode([" ".join(f"w{number}" for number in range(MAX_WORDS_KEPT + 1))])
    assert len(tokenizer._numbers) > MAX_WORDS_KEPT
    assert tokenizer.encode(sentences[::-1]).lengths.tolist()[::-1] == tokenizer.encode(sentences).lengths.tolist()
    assert tokenizer.encode(sentences).ids.tolist() == first


def test_a_special_token_in_a_text_is_text():
    (found,) = encoded(["[MASK] [SEP]"], True)
    assert not set(found) & {VOCABULARY.ids[token] for token in SPECIAL_TOKENS}


def test_special_and_continuing_tokens():
    special = [token for token, is_special in zip(VOCABULARY.tokens, VOCABULARY.is_special, strict=True) if is_special]
    assert len(special) == 999 and set(SPECIAL_TOKENS) < set(special)  # 994 unused ones
    assert all(token.startswith("[") for token in special)
    assert VOCABULARY.continues_word.sum() == sum(token.startswith("##") for token in VOCABULARY.tokens) > 5000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[PAD]\n[UNK]\n[CLS]\nthe\n", "[SEP], [MASK] are not among its 4 tokens"),
        (b"the\n[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n", "[PAD] must be the first line, not line 2"),
        (b"[PAD]\n\xff\n", "byte 6 is not UTF-8"),
        (b"", "are not among its"),
    ],
)
def test_a_vocabulary_that_cannot_serve_is_refused(tmp_path, content, message):
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_vocabulary(str(path))
    assert message in str(caught.value) and str(path) in str(caught.value)
