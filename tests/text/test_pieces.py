"""Pieces of a vocabulary: what each token adds to a text, for bytes, word pieces and sentence pieces."""

import random

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from mmx.generation.word_constraints import Words
from mmx.text.tokenizer import Tokenizer

SPECIAL = {"pad": [0], "bos": [1], "eos": [2]}
WORDS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]


def byte_pairs():
    return Tokenizer.train(["a cat and a dog", "the café"] * 3, 300)


def word_pieces():
    vocab = [*WORDS, "a", "cat", "##s", "dog", "do", "##g", "c", "##at", "orange", "##ade", "or", "##ange"]
    backend = Backend(models.WordPiece({word: index for index, word in enumerate(vocab)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(WORDS)
    return Tokenizer(backend, SPECIAL)


def sentence_pieces():
    pieces = [*WORDS, "▁", "▁a", "▁cat", "s", "▁do", "g", "▁orange", "ade", "<0xC3>", "<0xA9>"]
    backend = Backend(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=3, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.add_special_tokens(WORDS)
    return Tokenizer(backend, SPECIAL)


@pytest.mark.parametrize("make", [byte_pairs, word_pieces, sentence_pieces])
def test_pieces_spell_the_decoded_text(make):
    tokenizer = make()
    pieces = tokenizer.pieces()
    assert len(pieces) == len(tokenizer)
    first = tokenizer.encode("a")
    generator = random.Random(0)
    for _ in range(200):
        tokens = generator.choices(range(4, len(tokenizer)), k=5)
        spelled = b"".join(pieces[token] for token in tokens)
        expected = tokenizer.decode([*first, *tokens, *first])
        start = tokenizer.decode(first)
        text = start + (spelled + pieces[first[-1]]).decode("utf-8", "replace")
        if "\ufffd" not in expected + text:
            assert text == expected


@pytest.mark.parametrize("make", [word_pieces, sentence_pieces])
def test_words_of_other_vocabularies(make):
    tokenizer = make()
    words = Words(tokenizer, ["cat"], ["orange"])
    assert [tokenizer.decode(spelling) for spelling in words.groups[0].spellings] == ["orange"]
    assert words.unmet("the orange, cats") == ()
    assert words.unmet("orangeade and a CAT") == ("cat", "orange")


def test_special_tokens_have_no_piece():
    tokenizer = byte_pairs()
    pieces = tokenizer.pieces()
    assert pieces[tokenizer.eos_token_id] == pieces[tokenizer.pad_token_id] == b""
