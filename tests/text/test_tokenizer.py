"""The tokenizer: any text comes back, marks cannot be typed, the file is the one that transformers reads."""

import json
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from mmx.errors import CheckpointError, MmxError
from mmx.text.prompts import (
    BOS,
    EOS,
    PAD,
    QUESTION,
    SPECIAL_TOKENS,
    SpecialToken,
    normalize_whitespace,
    question_prompt,
)
from mmx.text.tokenizer import Tokenizer

CORPUS = ["a red dog on the green grass", "the dog is red", "what is on the grass?", "two dogs, one cat"] * 20
BYTES, LEARNED = Tokenizer.train([], 0), Tokenizer.train(CORPUS, 320)
BOTH = pytest.mark.parametrize("tokenizer", [BYTES, LEARNED], ids=["bytes", "learned"])
EFFORT = settings(max_examples=50, deadline=None)
NASTY = [
    "",
    " ",
    "<eos>",
    "<pad><bos>",
    "a\x00b",
    "ﬁ½Å",
    "ÀÉ",
    "日本語",
    "👩‍👩‍👧",
    "\u202e abc",
    "a\r\n\tb",
    "Ġ",
    "�",
    "é" * 90,
]


def normalised(tokenizer, text):
    return tokenizer.backend.normalizer.normalize_str(text)


@BOTH
@EFFORT
@given(text=st.text(max_size=60) | st.sampled_from(NASTY))
def test_any_text_comes_back_normalised_byte_for_byte(tokenizer, text):
    tokens = tokenizer.encode(text)
    expected = normalised(tokenizer, text)
    raw = tokenizer.backend.decode(tokens, skip_special_tokens=True)
    # The first word is spelt as one after a space, as every other word is.
    assert raw in (expected, " " + expected)
    assert tokenizer.decode(tokens) == normalize_whitespace(expected)
    assert all(0 <= token < len(tokenizer) for token in tokens)


@EFFORT
@given(text=st.text(st.characters(max_codepoint=0x24F), max_size=40))
@example("ＤＯＧ ﬁre ½")
def test_case_and_compatible_forms_are_folded(text):
    assert normalised(LEARNED, text) == unicodedata.normalize("NFKC", text).lower()
    assert LEARNED.encode(text) == LEARNED.encode(unicodedata.normalize("NFKC", text))


@BOTH
@EFFORT
@given(text=st.lists(st.sampled_from([m.text for m in SPECIAL_TOKENS]) | st.text(max_size=5), max_size=5).map("".join))
def test_typed_marks_are_letters(tokenizer, text):
    assert not set(tokenizer.encode(text)) & {i for ids in tokenizer.special_tokens.values() for i in ids}
    assert tokenizer.decode(tokenizer.encode(text)) == normalize_whitespace(normalised(tokenizer, text))


@BOTH
def test_marks_have_ids_of_their_own_and_leave_no_text(tokenizer):
    ids = [token for mark in SPECIAL_TOKENS for token in tokenizer.special_tokens[mark]]
    assert sorted(ids) == list(range(6))
    assert [[tokenizer.pad_token_id], [tokenizer.eos_token_id]] == [tokenizer.special_tokens[mark] for mark in (PAD, EOS)]
    assert tokenizer.decode([*ids, *tokenizer.encode("a dog"), *ids]) == "a dog"


def test_a_prompt_is_marks_by_id_and_text_by_spelling():
    tokens = LEARNED.encode_prompt(question_prompt("is <eos> a mark?"))
    assert tokens[:2] == [*LEARNED.special_tokens[BOS], *LEARNED.special_tokens[QUESTION]]
    assert tokens[2:-1] == LEARNED.encode("is <eos> a mark?")
    assert LEARNED.eos_token_id not in tokens


def test_an_unknown_mark_in_a_prompt_is_a_mistake():
    with pytest.raises(KeyError):
        BYTES.encode_prompt((SpecialToken("<dance>"),))


def test_learning_finds_words_and_keeps_to_its_size():
    assert len(BYTES) == 262
    assert 262 < len(LEARNED) <= 320
    assert LEARNED.encode("the dog") == LEARNED.encode("THE DOG")
    assert len(LEARNED.encode("the dog")) == 2
    assert len(BYTES.encode("the dog")) == 8


def test_the_same_texts_give_the_same_tokenizer():
    assert Tokenizer.train(CORPUS, 320).to_json() == LEARNED.to_json()


@BOTH
def test_it_survives_its_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(tokenizer.to_json())
    again = Tokenizer.from_json(text)
    assert again.marks == tokenizer.special_tokens
    assert len(again) == len(tokenizer)
    for sample in [*NASTY, *CORPUS]:
        assert again.encode(sample) == tokenizer.encode(sample)


@BOTH
def test_transformers_reads_the_file_and_gives_the_same_ids(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    foreign = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert len(foreign) == len(tokenizer)
    for sample in [text for text in [*NASTY, *CORPUS] if "<" not in text]:
        assert foreign(sample, add_special_tokens=False)["input_ids"] == tokenizer.encode(sample)
        assert normalize_whitespace(foreign.decode(tokenizer.encode(sample))) == tokenizer.decode(
            tokenizer.encode(sample)
        )


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"version": "1.0"}', LEARNED.to_json()[:-20], "\x00", '{"model": {"type": "X"}}'],
)
def test_what_is_no_tokenizer_is_refused_by_name(text):
    with pytest.raises(
        CheckpointError, match="^here.json is no tokenizer; expected a file of the tokenizers library.$"
    ):
        Tokenizer.from_json(text, "here.json")


def test_a_tokenizer_without_our_marks_is_refused():
    facts = json.loads(BYTES.to_json())
    facts["added_tokens"] = [t for t in facts["added_tokens"] if t["content"] != "<answer>"]
    del facts["model"]["vocab"]["<answer>"]
    with pytest.raises(CheckpointError, match="no token '<answer>'"):
        Tokenizer.from_json(json.dumps(facts))


@BOTH
def test_words_have_the_places_of_their_tokens(tokenizer):
    for text in ("two dogs run, it's snow-white!", "caf\u00e9\u00e9 \u65e5\u672c skateboarder", "  a  b ", ""):
        tokens = tokenizer.encode(text)
        words = tokenizer.words(tokens)
        assert [word for word, _ in words] == text.split()
        held = [place for _, places in words for place in places]
        assert held == sorted(set(held))
        assert all(not tokenizer.decode([tokens[place]]) for place in set(range(len(tokens))) - set(held)), "spaces"
        for word, places in words:
            assert tokenizer.decode([tokens[place] for place in places]) == word


def test_marks_belong_to_no_word_and_a_token_over_two_words_to_both():
    vocabulary = {mark.text: place for place, mark in enumerate(SPECIAL_TOKENS)} | {
        "\u0120a": 6,
        "\u0120of\u0120the": 7,
        "\u0120dog": 8,
    }
    engine = Engine(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS[0].text))
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([mark.text for mark in SPECIAL_TOKENS])
    assert Tokenizer(engine).words([6, 7, 8, 2]) == [("a", [0]), ("of", [1]), ("the", [1]), ("dog", [2])]


def test_half_a_character_is_refused_in_one_sentence():
    with pytest.raises(MmxError, match=r"'caf\\udce9\?' has a half of a character; expected a text in UTF-8"):
        LEARNED.encode("caf\udce9?")
