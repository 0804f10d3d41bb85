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
    question_prompt,
)
from mmx.text.tokenizer import Tokenizer

CORPUS = ["a red dog on the green grass", "the dog is red", "what is on the grass?", "two dogs, one cat"] * 20
BYTES = Tokenizer.train([], 0)
TRAINED = Tokenizer.train(CORPUS, 320)
FOLDED = Tokenizer.train(CORPUS, 320, lowercase=True, nfkc=True)
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


@BOTH
@properties
@given(text=st.text(max_size=60) | st.sampled_from(UNUSUAL))
@example("Zoë Müller sees ½ of a ﬁsh in the U.S.A. ...")
@example("a .22 rifle , it 's here !")
def test_any_text_round_trips_as_written(tokenizer, text):
    tokens = tokenizer.encode(text)
    raw = tokenizer.backend.decode(tokens, skip_special_tokens=True)
    # A space is put before the first word, so that it has the same tokens as elsewhere.
    assert raw in (text, " " + text)
    assert tokenizer.decode(tokens) == text.strip()
    assert all(0 <= token < len(tokenizer) for token in tokens)


@properties
@given(text=st.text(st.characters(max_codepoint=0x24F), max_size=40))
@example("ＤＯＧ ﬁre ½")
def test_case_and_compatibility_forms_are_folded_if_configured(text):
    folded = unicodedata.normalize("NFKC", text).lower()
    assert FOLDED.decode(FOLDED.encode(text)) == folded.strip()
    assert FOLDED.encode(text) == FOLDED.encode(unicodedata.normalize("NFKC", text))
    lowercase = Tokenizer.train([], 0, lowercase=True)
    assert lowercase.decode(lowercase.encode(text)) == text.lower().strip()


@BOTH
@properties
@given(text=st.text(max_size=20) | st.sampled_from(UNUSUAL), data=st.data())
def test_the_first_tokens_of_a_text_are_its_first_characters(tokenizer, text, data):
    tokens = tokenizer.encode(text)
    count = data.draw(st.integers(0, len(tokens)))
    cut = tokenizer.decode(tokens[:count])
    assert text.strip().startswith(cut)
    kept = tokenizer.truncate(tokens, count)
    assert kept == tokens[: len(kept)]
    assert len(kept) > count - 4
    raw = tokenizer.backend.decode(kept)
    assert text.startswith(raw) or (" " + text).startswith(raw), "no incomplete character"


def test_a_written_replacement_character_is_kept():
    tokens = BYTES.encode("a\ufffd")
    assert BYTES.decode(tokens) == "a\ufffd"
    assert [BYTES.decode(tokens[:length]) for length in range(1, 5)] == ["", "a", "a", "a"]
    assert BYTES.truncate(tokens, 4) == tokens[:2]


def test_a_token_that_ends_a_character_and_begins_the_next_one():
    """ "日本" as the tokens (first two bytes), (last byte and first byte), (last two bytes)."""
    pieces = ["\u00e6\u0139", "\u00a5\u00e6", "\u013e\u00ac"]
    vocabulary = {token.text: token_id for token_id, token in enumerate(SPECIAL_TOKENS)}
    vocabulary |= {piece: 6 + number for number, piece in enumerate(pieces)}
    backend = Backend(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS[0].text))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([token.text for token in SPECIAL_TOKENS])
    tokenizer = Tokenizer(backend)
    assert [tokenizer.decode([6, 7, 8][:length]) for length in range(4)] == ["", "", "日", "日本"]
    assert [tokenizer.truncate([6, 7, 8], length) for length in range(4)] == [[], [], [], [6, 7, 8]]


def test_tokens_of_single_bytes_next_to_pieces_of_text():
    """As SentencePiece models have them for characters that they do not know."""
    vocabulary = {token.text: token_id for token_id, token in enumerate(SPECIAL_TOKENS)}
    vocabulary |= {"▁a": 6, "<0xE6>": 7, "<0x97>": 8, "<0xA5>": 9, "é": 10}
    backend = Backend(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS[0].text))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([token.text for token in SPECIAL_TOKENS])
    tokenizer = Tokenizer(backend)
    tokens = [6, 7, 8, 9, 10, 7]
    assert [tokenizer.decode(tokens[:length]) for length in range(7)] == ["", "a", "a", "a", "a日", "a日é", "a日é"]
    assert [len(tokenizer.truncate(tokens, length)) for length in range(7)] == [0, 1, 1, 1, 4, 5, 5]


@BOTH
@properties
@given(text=st.lists(st.sampled_from([m.text for m in SPECIAL_TOKENS]) | st.text(max_size=5), max_size=5).map("".join))
def test_typed_special_tokens_are_plain_text(tokenizer, text):
    assert not set(tokenizer.encode(text)) & {i for ids in tokenizer.special_tokens.values() for i in ids}
    assert tokenizer.decode(tokenizer.encode(text)) == text.strip()


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
    assert FOLDED.encode("the dog") == FOLDED.encode("THE DOG") == TRAINED.encode("the dog")
    assert TRAINED.encode("the dog") != TRAINED.encode("THE DOG")
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
        assert reference.decode(tokenizer.encode(sample)).strip() == tokenizer.decode(tokenizer.encode(sample))


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
