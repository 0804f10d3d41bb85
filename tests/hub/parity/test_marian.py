"""Marian in mmx against transformers: the same logits in float64, the same tokens, texts cut into the same pieces."""

import json
import random
import sys
import warnings

import pytest
import sentencepiece
import torch
from parity_cases import assert_diverse, assert_logits, change, read, load_error, saved, randomized, generated, until_end
from transformers import MarianConfig, MarianMTModel, MarianTokenizer

from mmx.hub import load_hf_model
from mmx.inference.pipeline import Pipeline
from mmx.models.source import SourceBatch
from mmx.text.prompts import normalize_whitespace
from mmx.text.tokenizer import Tokenizer

END, SHARED = 0, "model.shared.weight"
COPIES = ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"]
WAVES = ["model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"]
ENGLISH = (
    "the a red blue green small large dog cat house tree river sees finds likes near under above and not quickly "
    "slowly what where is it don't"
)
FRENCH = (
    "le la un une rouge bleu vert petit grand chien chat maison arbre rivière voit trouve aime près sous sur et ne "
    "pas vite été où garçon"
)


def sentences(words, count=600, seed=0):
    drawn = random.Random(seed)
    plain = (" ".join(drawn.choices(words.split(), k=drawn.randint(3, 9))) for _ in range(count))
    return [text[0].upper() + text[1:] + drawn.choice(".?!,;") for text in plain]


def train(folder, kind="unigram"):
    """source.spm, target.spm and vocab.json, whose tokens stand in another order than the pieces."""
    names = ["</s>", "<unk>"]
    for side, words in (("source", ENGLISH), ("target", FRENCH)):
        (folder / f"{side}.txt").write_text("\n".join(sentences(words)), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / f"{side}.txt"),
            model_prefix=str(folder / side),
            vocab_size=70,
            model_type=kind,
            minloglevel=2,
        )
        (folder / f"{side}.model").rename(folder / f"{side}.spm")
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{side}.spm"))
        names += sorted(pieces.id_to_piece(i) for i in range(3, len(pieces)))
    names = list(dict.fromkeys([*names, ">>fr<<", ">>es<<", "<pad>"]))
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def theirs(trained):
    """The tokenizer of transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would like sacremoses, and does not use it here
        return MarianTokenizer(*(str(trained / file) for file in ("source.spm", "target.spm", "vocab.json")))


def build(size, seed=0, **facts):
    """A tiny reference, with positions as they are published and a bias on every word."""
    tiny = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40}
    tiny |= {"encoder_attention_heads": 4, "decoder_attention_heads": 2, "max_position_embeddings": 30}
    special = {"pad_token_id": size - 1, "decoder_start_token_id": size - 1, "eos_token_id": END}
    swish = {"activation_function": "swish", "scale_embedding": True}
    reference = MarianMTModel(MarianConfig(**{**tiny, **special, **swish, "vocab_size": size, **facts}))
    reference = reference.eval() if seed is None else randomized(reference, seed)
    with torch.no_grad():
        for part in (reference.model.encoder, reference.model.decoder):
            part.embed_positions.weight.copy_(part.embed_positions.create_weight())
        reference.final_logits_bias.copy_(torch.randn(1, size, generator=torch.Generator().manual_seed(5)) / 2)
    generation = reference.generation_config
    generation.bad_words_ids, generation.forced_eos_token_id = [[size - 1]], END
    generation.num_beams, generation.max_length, generation.no_repeat_ngram_size = 4, 20, 2
    return reference


VARIANTS = {
    "as published": {},
    "relu": {"activation_function": "relu", "scale_embedding": False},
    "odd": {"d_model": 36, "encoder_attention_heads": 2},
}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def pair(request, theirs, tmp_path_factory):
    """(the reference in float64, what mmx made of its folder)."""
    reference = build(len(theirs), **request.param)
    folder = saved(tmp_path_factory.mktemp("published"), reference, theirs)
    return reference.double(), read(folder)


TEXTS = ["The red dog sees a cat.", "Where?", "A large house is near the river, and it is not small."]


def read_alike(theirs, model, count):
    """Texts of unequal length as both take them: (tokens and mask of transformers, our memory)."""
    given = theirs(TEXTS[:count], return_tensors="pt", padding=True)
    inputs = {"tokens": given["input_ids"], "mask": given["attention_mask"].bool()}
    return given, model.encode({"text": SourceBatch(inputs, torch.arange(count))}, count)


@pytest.mark.parametrize("batch", [1, 3])
def test_logits_are_the_same_at_every_position(pair, theirs, batch):
    reference, model = pair
    tokens = torch.randint(0, len(theirs), (batch, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        given, memory = read_alike(theirs, model, batch)
        assert_logits(model, memory, tokens, reference(**given, decoder_input_ids=tokens).logits)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 1}, {"num_beams": 3}, {"num_beams": 4, "early_stopping": True, "renormalize_logits": True}],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_texts_are_the_same(pair, theirs, batch, options):
    reference, model = pair
    pad, options = len(theirs) - 1, {**options, "max_new_tokens": 16, "no_repeat_ngram_size": 2}
    with torch.no_grad():
        given, memory = read_alike(theirs, model, batch)
        published = {"suppress_tokens": [pad], "forced_eos_token_id": END}  # the reference has them from its own file
        found = generated(model, memory, [[[pad]]] * batch, **published, **options)
        expected = until_end(reference.generate(**given, **options), 1, END)
    assert [row[0] for row in found] == expected
    if batch > 1:
        assert_diverse(expected)


def test_a_folder_tells_how_it_translates_and_does_so(trained, theirs, tmp_path):
    """From the text to the text, with the published beams."""
    reference = build(len(theirs))
    model, generation, _ = load_hf_model(saved(tmp_path, reference, theirs))
    pad = len(theirs) - 1
    assert (generation.num_beams, generation.max_new_tokens) == (4, 19)
    assert (generation.suppress_tokens, generation.forced_eos_token_id) == ((pad,), END)
    with torch.no_grad():
        said = reference.generate(**theirs(TEXTS, return_tensors="pt", padding=True))
    expected = [normalize_whitespace(text) for text in theirs.batch_decode(said, skip_special_tokens=True)]
    assert Pipeline(model, generation).caption(TEXTS) == expected
    assert len(set(expected)) == 3


# ---- tokens ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    """The tokenizer that mmx made, after a journey through its own file."""
    model = load_hf_model(saved(tmp_path_factory.mktemp("tokens"), build(len(theirs)), theirs))[0]
    marks = {mark.text.strip("<>"): tokens for mark, tokens in model.tokenizer.special_tokens.items()}
    return Tokenizer.from_json(model.tokenizer.to_json(), special_tokens=marks)


WIDE = ["\ufb01nds\u00a0the \u00bd", "where\uff1f is"]  # a ligature, a hard space, a fraction; a full-width sign
ODD = ["", "   ", "  Where   is\tthe\nhouse? ", "don't été", "x", "ü", "the 中 cat", "a\u00a0b", *WIDE]
CODES = [">>fr<< The tree", ">>fr<<the river", ">>es<<  Where?", ">>fr<<"]


@pytest.mark.parametrize("text", [*ODD, *CODES])
def test_odd_texts_become_the_same_pieces(ours, theirs, text):
    assert ours.encode(text) == theirs(text).input_ids[:-1]


def test_sentences_become_the_same_pieces_and_come_back(ours, theirs):
    for text in sentences(ENGLISH, 300, seed=1):
        tokens = theirs(text).input_ids[:-1]
        assert ours.encode(text) == tokens
        assert ours.engine.decode(tokens) == theirs.decode(tokens) == text
    for text in sentences(FRENCH, 300, seed=2):
        tokens = theirs(text_target=text).input_ids
        assert ours.decode(tokens) == normalize_whitespace(theirs.decode(tokens, skip_special_tokens=True)) == text


@pytest.mark.parametrize("code", [">>fr<<", ">>es<<"])
def test_a_language_code_is_one_token(ours, theirs, code):
    assert ours.encode(f"{code} The tree")[0] == theirs.get_vocab()[code]
    assert ours.encode(f"{code} The tree")[1:] == ours.encode("The tree")


@pytest.mark.parametrize("mark", ["</s>", "<pad>", "<unk>"])
def test_what_a_person_types_is_no_mark(ours, theirs, mark):
    found = ours.encode(f"the dog {mark}")
    assert not {theirs.eos_token_id, theirs.pad_token_id} & set(found)
    assert ours.decode(ours.encode("the dog") + [theirs.eos_token_id, theirs.pad_token_id]) == "the dog"


def test_a_letter_of_the_target_alone_is_better_than_unknown(ours, theirs):
    found = ours.encode("the garçon")
    assert theirs.get_vocab()["ç"] in found
    assert theirs.unk_token_id not in found


# ---- what is load_error -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, theirs):
    return saved(tmp_path, build(len(theirs)), theirs)


@pytest.mark.parametrize("kept", [SHARED, *COPIES])
def test_the_shared_table_may_have_any_of_its_names(folder, theirs, kept):
    whole = change(folder, lambda tensors: tensors)
    table = next(whole[name] for name in [SHARED, *COPIES] if name in whole)
    rest = {name: tensor for name, tensor in whole.items() if name not in [SHARED, *COPIES, *WAVES]}
    change(folder, lambda _: rest | {kept: table.clone()} | {name: torch.ones(30, 32) for name in WAVES})
    state = read(folder).state_dict()
    assert torch.equal(state["decoder.embedding.weight"], table.double())
    assert torch.equal(state["sources.text.encoder.embedding.weight"], table.double())
    assert "decoder.lm_head.weight" not in state


def test_copies_of_the_shared_table_must_be_equal(folder):
    whole = change(folder, lambda tensors: tensors)
    table = next(whole[name] for name in [SHARED, *COPIES] if name in whole)
    copies = {name: table.clone() for name in [SHARED, *COPIES]}
    change(folder, lambda tensors: tensors | copies)
    assert "decoder.lm_head.weight" not in read(folder).state_dict()
    change(folder, lambda tensors: tensors | copies | {COPIES[1]: table + 1})
    assert COPIES[1] in load_error(folder)


@pytest.mark.parametrize(
    "name",
    [
        SHARED,
        "final_logits_bias",
        "model.encoder.layers.1.fc2.bias",
        "model.encoder.layers.0.self_attn.q_proj.weight",
        "model.decoder.layers.2.encoder_attn.k_proj.weight",
        "model.decoder.layers.0.encoder_attn_layer_norm.bias",
    ],
)
def test_a_tensor_that_lacks_is_named(folder, name):
    change(folder, lambda tensors: {key: tensors[key] for key in tensors if key != name})
    assert name in load_error(folder)


@pytest.mark.parametrize(
    "name", [SHARED, "final_logits_bias", "model.encoder.layers.1.fc2.bias", "model.decoder.layers.1.fc1.weight"]
)
def test_a_tensor_of_another_shape_is_named(folder, name):
    change(folder, lambda tensors: tensors | {name: torch.zeros(3, 5)})
    assert name in load_error(folder)


@pytest.mark.parametrize("name", ["model.decoder.layer_norm.weight", "model.encoder.layers.2.fc1.weight"])
def test_a_tensor_too_many_is_named(folder, name):
    change(folder, lambda tensors: tensors | {name: torch.zeros(3)})
    assert name in load_error(folder)


def test_a_vocabulary_of_the_target_alone_is_refused(tmp_path, theirs):
    apart = build(len(theirs), share_encoder_decoder_embeddings=False, tie_word_embeddings=False)
    assert "share_encoder_decoder_embeddings" in load_error(saved(tmp_path, apart, theirs))


def test_files_of_tokens_that_cannot_be_read_are_named(folder, tmp_path):
    whole = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    for broken in ({**whole, "<pad>": 3}, {**whole, "<pad>": len(whole)}, {"a": 0}, {}):
        (tmp_path / "vocab.json").write_text(json.dumps(broken), encoding="utf-8")
        assert "vocab.json" in load_error(folder)
    (tmp_path / "vocab.json").write_text(json.dumps(whole), encoding="utf-8")
    (tmp_path / "source.spm").write_bytes(b"damaged")
    assert "source.spm" in load_error(folder)
    (tmp_path / "source.spm").unlink()
    assert "source.spm" in load_error(folder)


def test_pieces_of_another_kind_are_refused(folder, tmp_path):
    other = tmp_path / "bpe"
    other.mkdir()
    (tmp_path / "source.spm").write_bytes((train(other, "bpe") / "source.spm").read_bytes())
    assert "unigram" in load_error(folder)


def test_without_sentencepiece_one_sentence_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    assert "pip install 'mmx[marian]'" in load_error(folder)


@pytest.mark.slow
def test_logits_are_the_same_at_the_published_size(tmp_path, trained, theirs):
    """As Helsinki-NLP/opus-mt-en-de: six layers of 512, 58101 tokens, 512 positions."""
    names = sorted(theirs.get_vocab(), key=theirs.get_vocab().get)[:-1]
    names += [*(f"piece{i}" for i in range(len(names), 58100)), "<pad>"]
    saved(tmp_path, theirs)
    (tmp_path / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}), encoding="utf-8")
    size = {"d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "max_position_embeddings": 512}
    size |= {"encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}
    size |= {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
    torch.manual_seed(0)
    reference = build(58101, None, **size)
    model = load_hf_model(saved(tmp_path, reference))[0]
    tokens = torch.randint(0, 58101, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        inputs = [model.tokenizer.encode(text) + [END] for text in TEXTS]
        longest = max(map(len, inputs))
        mask = torch.tensor([[place < len(row) for place in range(longest)] for row in inputs])
        given = torch.tensor([row + [58100] * (longest - len(row)) for row in inputs])
        expected = reference(input_ids=given, attention_mask=mask.long(), decoder_input_ids=tokens).logits
        memory = model.encode({"text": SourceBatch({"tokens": given, "mask": mask}, torch.arange(3))}, 3)
        found = model.decoder(tokens[:, None], memory)[:, 0]
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
