"""The tokenizer: any text round-trips, special tokens cannot be typed, transformers reads the same file."""

import json
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
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
    caption_prompt,
    normalize_whitespace,
    question_prompt,
)
from mmx.text.tokenizer import Tokenizer

CORPUS = ["a red dog on the green grass", "the dog is red", "what is on the grass?", "two dogs, one cat"] * 20
BYTES = Tokenizer.train([], 0)
TRAINED = Tokenizer.train(CORPUS, 320)
BOTH = pytest.mark.parametrize("tokenizer", [BYTES, TRAINED], ids=["bytes", "trained"])
properties = settings(max_examples=50, deadline=None)
UNUSUAL = [
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


def normalized(tokenizer, text):
    return tokenizer.backend.normalizer.normalize_str(text)


@BOTH
@properties
@given(text=st.text(max_size=60) | st.sampled_from(UNUSUAL))
def test_any_text_round_trips_normalized(tokenizer, text):
    tokens = tokenizer.encode(text)
    expected = normalized(tokenizer, text)
    raw = tokenizer.backend.decode(tokens, skip_special_tokens=True)
    # A space is put before the first word, so that it has the same tokens as elsewhere.
    assert raw in (expected, " " + expected)
    assert tokenizer.decode(tokens) == normalize_whitespace(expected)
    assert all(0 <= token < len(tokenizer) for token in tokens)


@properties
@given(text=st.text(st.characters(max_codepoint=0x24F), max_size=40))
@example("ＤＯＧ ﬁre ½")
def test_case_and_compatibility_forms_are_folded(text):
    assert normalized(TRAINED, text) == unicodedata.normalize("NFKC", text).lower()
    assert TRAINED.encode(text) == TRAINED.encode(unicodedata.normalize("NFKC", text))


@BOTH
@properties
@given(text=st.lists(st.sampled_from([m.text for m in SPECIAL_TOKENS]) | st.text(max_size=5), max_size=5).map("".join))
def test_typed_special_tokens_are_plain_text(tokenizer, text):
    assert not set(tokenizer.encode(text)) & {i for ids in tokenizer.special_tokens.values() for i in ids}
    assert tokenizer.decode(tokenizer.encode(text)) == normalize_whitespace(normalized(tokenizer, text))


@BOTH
def test_special_tokens_have_ids_of_their_own_and_decode_to_nothing(tokenizer):
    ids = [token_id for token in SPECIAL_TOKENS for token_id in tokenizer.special_tokens[token]]
    assert sorted(ids) == list(range(6))
    assert [[tokenizer.pad_token_id], [tokenizer.eos_token_id]] == [
        tokenizer.special_tokens[token] for token in (PAD, EOS)
    ]
    assert tokenizer.decode([*ids, *tokenizer.encode("a dog"), *ids]) == "a dog"


def test_a_prompt_is_special_tokens_by_id_and_text_by_its_tokens():
    tokens = TRAINED.encode_prompt(question_prompt("is <eos> a token?"))
    assert tokens[:2] == [*TRAINED.special_tokens[BOS], *TRAINED.special_tokens[QUESTION]]
    assert tokens[2:-1] == TRAINED.encode("is <eos> a token?")
    assert TRAINED.eos_token_id not in tokens


def test_an_unknown_special_token_in_a_prompt_is_a_key_error():
    with pytest.raises(KeyError):
        BYTES.encode_prompt((SpecialToken("<dance>"),))


def test_training_finds_words_and_respects_vocab_size():
    assert len(BYTES) == 262
    assert 262 < len(TRAINED) <= 320
    assert TRAINED.encode("the dog") == TRAINED.encode("THE DOG")
    assert len(TRAINED.encode("the dog")) == 2
    assert len(BYTES.encode("the dog")) == 8


def test_the_same_texts_give_the_same_tokenizer():
    assert Tokenizer.train(CORPUS, 320).to_json() == TRAINED.to_json()


@BOTH
def test_a_saved_tokenizer_loads_equal(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(tokenizer.to_json())
    loaded = Tokenizer.from_json(text)
    assert loaded.special_tokens == tokenizer.special_tokens
    assert len(loaded) == len(tokenizer)
    for sample in [*UNUSUAL, *CORPUS]:
        assert loaded.encode(sample) == tokenizer.encode(sample)


@BOTH
def test_transformers_reads_the_file_and_gives_the_same_ids(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert len(reference) == len(tokenizer)
    for sample in [text for text in [*UNUSUAL, *CORPUS] if "<" not in text]:
        assert reference(sample, add_special_tokens=False)["input_ids"] == tokenizer.encode(sample)
        assert normalize_whitespace(reference.decode(tokenizer.encode(sample))) == tokenizer.decode(
            tokenizer.encode(sample)
        )


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"version": "1.0"}', TRAINED.to_json()[:-20], "\x00", '{"model": {"type": "X"}}'],
)
def test_other_files_are_refused_by_name(text):
    with pytest.raises(CheckpointError) as error:
        Tokenizer.from_json(text, "here.json")
    assert error.value.code == "tokenizer.file"
    assert error.value.details == {"path": "here.json"}


def test_a_tokenizer_without_a_special_token_is_refused():
    content = json.loads(BYTES.to_json())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<answer>"]
    del content["model"]["vocab"]["<answer>"]
    text = json.dumps(content)
    with pytest.raises(CheckpointError) as error:
        Tokenizer.from_json(text)
    assert error.value.code == "tokenizer.special_token"
    assert error.value.details == {"token": "<answer>"}
    captions_only = Tokenizer.from_json(text, special_tokens={"caption": [5, 6]})
    assert captions_only.encode_prompt(caption_prompt()) == [*BYTES.special_tokens[BOS], 5, 6]
    with pytest.raises(MmxError) as error:
        captions_only.encode_prompt(question_prompt("why?"))
    assert error.value.code == "tokenizer.task"


@BOTH
def test_words_have_the_positions_of_their_tokens(tokenizer):
    for text in ("two dogs run, it's snow-white!", "caf\u00e9\u00e9 \u65e5\u672c skateboarder", "  a  b ", ""):
        tokens = tokenizer.encode(text)
        words = tokenizer.words(tokens)
        assert [word for word, _ in words] == text.split()
        positions = [position for word in words for position in word.positions]
        assert positions == sorted(set(positions))
        others = set(range(len(tokens))) - set(positions)
        assert all(not tokenizer.decode([tokens[position]]) for position in others), "spaces"
        for word in words:
            assert tokenizer.decode([tokens[position] for position in word.positions]) == word.text


def test_special_tokens_belong_to_no_word_and_a_token_over_two_words_to_both():
    vocabulary = {token.text: token_id for token_id, token in enumerate(SPECIAL_TOKENS)}
    vocabulary |= {"\u0120a": 6, "\u0120of\u0120the": 7, "\u0120dog": 8}
    backend = Backend(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS[0].text))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([token.text for token in SPECIAL_TOKENS])
    assert Tokenizer(backend).words([6, 7, 8, 2]) == [("a", [0]), ("of", [1]), ("the", [1]), ("dog", [2])]


def test_an_incomplete_character_is_refused():
    with pytest.raises(MmxError) as error:
        TRAINED.encode("caf\udce9?")
    assert error.value.code == "tokenizer.encoding"
    assert "\n" not in str(error.value)


def test_repr_is_one_short_line():
    assert repr(BYTES) == "Tokenizer(262 tokens, special tokens: pad, bos, eos, caption, question, answer)"
