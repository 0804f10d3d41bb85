"""Marian in mmx against transformers: the same logits in float64, the same tokens, the same tokenization."""

import json
import random
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import sentencepiece
import torch
from parity_cases import (
    PUBLISHED_SIZE_TOLERANCE,
    assert_diverse,
    assert_logits,
    encode_inputs,
    generate_tokens,
    load_double,
    load_error,
    randomized,
    relative_difference,
    rewrite_tensors,
    save_all,
    strip_generated,
    without,
)
from transformers import MarianConfig, MarianMTModel, MarianTokenizer

from mmx.hub import load_hf_model
from mmx.inference.pipeline import Pipeline
from mmx.text.tokenizer import Tokenizer

EOS = 0
SHARED = "model.shared.weight"
COPIES = ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"]
POSITIONS = ["model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"]
ENGLISH = (
    "the a red blue green small large dog cat house tree river sees finds likes near under above and not quickly "
    "slowly what where is it don't"
)
FRENCH = (
    "le la un une rouge bleu vert petit grand chien chat maison arbre rivière voit trouve aime près sous sur et ne "
    "pas vite été où garçon"
)
TEXTS = ["The red dog sees a cat.", "Where?", "A large house is near the river, and it is not small."]


def random_sentences(words, count=600, seed=0):
    generator = random.Random(seed)
    sentences = []
    for _ in range(count):
        text = " ".join(generator.choices(words.split(), k=generator.randint(3, 9)))
        sentences.append(text[0].upper() + text[1:] + generator.choice(".?!,;"))
    return sentences


def train_sentencepiece(folder, model_type="unigram"):
    """Write source.spm, target.spm and vocab.json, whose tokens have another order than the pieces."""
    names = ["</s>", "<unk>"]
    for side, words in (("source", ENGLISH), ("target", FRENCH)):
        (folder / f"{side}.txt").write_text("\n".join(random_sentences(words)), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / f"{side}.txt"),
            model_prefix=str(folder / side),
            vocab_size=70,
            model_type=model_type,
            minloglevel=2,
        )
        (folder / f"{side}.model").rename(folder / f"{side}.spm")
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{side}.spm"))
        names += sorted(pieces.id_to_piece(i) for i in range(3, len(pieces)))
    names = list(dict.fromkeys([*names, ">>fr<<", ">>es<<", "<pad>"]))
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def hf_tokenizer(tmp_path_factory):
    """The tokenizer of transformers."""
    folder = train_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it recommends sacremoses, which is not used here
        return MarianTokenizer(*(str(folder / file) for file in ("source.spm", "target.spm", "vocab.json")))


def build(vocab_size, seed=0, **fields):
    """A tiny reference, with sinusoidal positions as published and a bias for every token."""
    config = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 40,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 2,
        "max_position_embeddings": 30,
        "pad_token_id": vocab_size - 1,
        "decoder_start_token_id": vocab_size - 1,
        "eos_token_id": EOS,
        "activation_function": "swish",
        "scale_embedding": True,
        "vocab_size": vocab_size,
        **fields,
    }
    reference = MarianMTModel(MarianConfig(**config))
    reference = reference.eval() if seed is None else randomized(reference, seed)
    with torch.no_grad():
        for module in (reference.model.encoder, reference.model.decoder):
            module.embed_positions.weight.copy_(module.embed_positions.create_weight())
        bias = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(5)) / 2
        reference.final_logits_bias.copy_(bias)
    generation = reference.generation_config
    generation.bad_words_ids = [[vocab_size - 1]]
    generation.forced_eos_token_id = EOS
    generation.num_beams = 4
    generation.max_length = 20
    generation.no_repeat_ngram_size = 2
    return reference


VARIANTS = {
    "as published": {},
    "relu": {"activation_function": "relu", "scale_embedding": False},
    "odd head size": {"d_model": 36, "encoder_attention_heads": 2},
}
PARAMS = [pytest.param(name, marks=[] if name == "as published" else pytest.mark.slow) for name in VARIANTS]


@pytest.fixture(scope="module", params=PARAMS)
def models(request, hf_tokenizer, tmp_path_factory):
    """(the reference, the model that mmx loads from its folder), in float64."""
    reference = build(len(hf_tokenizer), **VARIANTS[request.param])
    folder = save_all(tmp_path_factory.mktemp("checkpoint"), reference, hf_tokenizer)
    return reference.double(), load_double(folder)


def encode_texts(hf_tokenizer, model, count):
    """Texts of unequal length: (inputs of transformers, our memory)."""
    encoding = hf_tokenizer(TEXTS[:count], return_tensors="pt", padding=True)
    inputs = {"tokens": encoding["input_ids"], "mask": encoding["attention_mask"].bool()}
    return encoding, encode_inputs(model, "text", inputs)


@pytest.mark.parametrize("batch", [1, 3])
def test_logits_equal_at_every_position(models, hf_tokenizer, batch):
    reference, model = models
    tokens = torch.randint(0, len(hf_tokenizer), (batch, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        encoding, memory = encode_texts(hf_tokenizer, model, batch)
        assert_logits(model, memory, tokens, reference(**encoding, decoder_input_ids=tokens).logits)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 1}, {"num_beams": 3}, {"num_beams": 4, "early_stopping": True, "renormalize_logits": True}],
)
def test_generated_tokens_equal(models, hf_tokenizer, options):
    reference, model = models
    pad = len(hf_tokenizer) - 1
    options = {**options, "max_new_tokens": 16, "no_repeat_ngram_size": 2}
    with torch.no_grad():
        encoding, memory = encode_texts(hf_tokenizer, model, 3)
        own_settings = {"suppress_tokens": [pad], "forced_eos_token_id": EOS}  # the reference has them in its config
        generated = generate_tokens(model, memory, [[[pad]]] * 3, **own_settings, **options)
        expected = strip_generated(reference.generate(**encoding, **options), 1, EOS)
    assert [row[0] for row in generated] == expected
    assert_diverse(expected)


def test_pipeline_translates_with_the_published_settings(hf_tokenizer, tmp_path):
    reference = build(len(hf_tokenizer))
    model, generation, _ = load_hf_model(save_all(tmp_path, reference, hf_tokenizer))
    pad = len(hf_tokenizer) - 1
    assert (generation.num_beams, generation.max_new_tokens) == (4, 19)
    assert (generation.suppress_tokens, generation.forced_eos_token_id) == ((pad,), EOS)
    with torch.no_grad():
        tokens = reference.generate(**hf_tokenizer(TEXTS, return_tensors="pt", padding=True))
    expected = [text.strip() for text in hf_tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    captions = Pipeline(model, generation).captions(TEXTS)
    assert [caption.text for _, caption in captions] == expected
    assert len(set(expected)) == 3


# ---- tokens


@pytest.fixture(scope="module")
def tokenizer(hf_tokenizer, tmp_path_factory):
    """The tokenizer that mmx loads, saved and loaded again."""
    folder = save_all(tmp_path_factory.mktemp("tokens"), build(len(hf_tokenizer)), hf_tokenizer)
    loaded = load_hf_model(folder).model.tokenizer
    special_tokens = {token.name: ids for token, ids in loaded.special_tokens.items()}
    return Tokenizer.from_json(loaded.to_json(), special_tokens=special_tokens)


def test_spaces_are_cleaned_up_if_the_tokenizer_says_so(hf_tokenizer, tmp_path):
    folder = save_all(tmp_path, build(len(hf_tokenizer)), hf_tokenizer)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clean_up_tokenization_spaces": True}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = MarianTokenizer.from_pretrained(folder)
    tokenizer = load_hf_model(folder).model.tokenizer
    tokens = hf_tokenizer("The dog . is n't it ?").input_ids
    assert tokenizer.decode(tokens) == reference.decode(tokens, skip_special_tokens=True) == "The dog. isn't it?"
    assert hf_tokenizer.decode(tokens, skip_special_tokens=True) == "The dog . is n't it ?"


COMPATIBILITY = ["\ufb01nds\u00a0the \u00bd", "where\uff1f is"]  # ligature, no-break space, fraction, full-width sign
WHITESPACE = ["", "   ", "  Where   is\tthe\nhouse? ", "a\u00a0b"]
LANGUAGE_CODES = [">>fr<< The tree", ">>fr<<the river", ">>es<<  Where?", ">>fr<<"]


@pytest.mark.parametrize("text", [*WHITESPACE, *COMPATIBILITY, *LANGUAGE_CODES, "don't été", "x", "ü", "the 中 cat"])
def test_unusual_texts_have_the_same_tokens(tokenizer, hf_tokenizer, text):
    assert tokenizer.encode(text) == hf_tokenizer(text).input_ids[:-1]


def test_sentences_have_the_same_tokens_and_decode_to_themselves(tokenizer, hf_tokenizer):
    for text in random_sentences(ENGLISH, 300, seed=1):
        tokens = hf_tokenizer(text).input_ids[:-1]
        assert tokenizer.encode(text) == tokens
        assert tokenizer.backend.decode(tokens) == hf_tokenizer.decode(tokens) == text
    for text in random_sentences(FRENCH, 300, seed=2):
        tokens = hf_tokenizer(text_target=text).input_ids
        decoded = hf_tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert tokenizer.decode(tokens) == decoded == text


@pytest.mark.parametrize("code", [">>fr<<", ">>es<<"])
def test_language_code_is_one_token(tokenizer, hf_tokenizer, code):
    assert tokenizer.encode(f"{code} The tree")[0] == hf_tokenizer.get_vocab()[code]
    assert tokenizer.encode(f"{code} The tree")[1:] == tokenizer.encode("The tree")


@pytest.mark.parametrize("name", ["</s>", "<pad>", "<unk>"])
def test_typed_special_token_is_plain_text(tokenizer, hf_tokenizer, name):
    eos_and_pad = [hf_tokenizer.eos_token_id, hf_tokenizer.pad_token_id]
    assert not set(eos_and_pad) & set(tokenizer.encode(f"the dog {name}"))
    assert tokenizer.decode(tokenizer.encode("the dog") + eos_and_pad) == "the dog"


def test_letter_of_the_target_language_is_not_unknown(tokenizer, hf_tokenizer):
    tokens = tokenizer.encode("the garçon")
    assert hf_tokenizer.get_vocab()["ç"] in tokens
    assert hf_tokenizer.unk_token_id not in tokens


# ---- invalid checkpoints


@pytest.fixture(scope="module")
def whole(tmp_path_factory, hf_tokenizer):
    return save_all(tmp_path_factory.mktemp("whole"), build(len(hf_tokenizer)), hf_tokenizer)


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of a whole folder."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.mark.parametrize("kept", [SHARED, *COPIES])
def test_shared_embedding_may_have_any_of_its_names(folder, kept):
    tensors = rewrite_tensors(folder, dict)
    embedding = next(tensors[name] for name in [SHARED, *COPIES] if name in tensors)
    rest = {name: tensor for name, tensor in tensors.items() if name not in [SHARED, *COPIES, *POSITIONS]}
    positions = {name: torch.ones(30, 32) for name in POSITIONS}
    rewrite_tensors(folder, lambda _: rest | {kept: embedding.clone()} | positions)
    state = load_double(folder).state_dict()
    assert torch.equal(state["decoder.embedding.weight"], embedding.double())
    assert torch.equal(state["sources.text.encoder.embedding.weight"], embedding.double())
    assert "decoder.lm_head.weight" not in state


def test_copies_of_the_shared_embedding_must_be_equal(folder):
    tensors = rewrite_tensors(folder, dict)
    embedding = next(tensors[name] for name in [SHARED, *COPIES] if name in tensors)
    copies = {name: embedding.clone() for name in [SHARED, *COPIES]}
    rewrite_tensors(folder, lambda tensors: tensors | copies)
    assert "decoder.lm_head.weight" not in load_double(folder).state_dict()
    rewrite_tensors(folder, lambda tensors: tensors | copies | {COPIES[1]: embedding + 1})
    error = load_error(folder)
    assert error.code == "hub.shared_embedding"
    assert COPIES[1] in error.details["tensors"]


@pytest.mark.parametrize(
    "name",
    [
        SHARED,
        "final_logits_bias",
        "model.encoder.layers.1.fc2.bias",
        "model.encoder.layers.0.self_attn.q_proj.weight",
        "model.decoder.layers.2.encoder_attn.k_proj.weight",
    ],
)
def test_missing_tensor_is_named(folder, name):
    rewrite_tensors(folder, without(name))
    error = load_error(folder)
    assert error.code == "hub.missing_tensors"
    assert name in error.details["tensors"]


@pytest.mark.parametrize("name", [SHARED, "final_logits_bias", "model.encoder.layers.1.fc2.bias"])
def test_misshapen_tensor_is_named(folder, name):
    rewrite_tensors(folder, lambda tensors: tensors | {name: torch.zeros(3, 5)})
    error = load_error(folder)
    assert (error.code, error.details["tensor"]) == ("hub.tensor_shape", name)


@pytest.mark.parametrize("name", ["model.decoder.layer_norm.weight", "model.encoder.layers.2.fc1.weight"])
def test_unexpected_tensor_is_named(folder, name):
    rewrite_tensors(folder, lambda tensors: tensors | {name: torch.zeros(3)})
    error = load_error(folder)
    assert (error.code, error.details["tensors"]) == ("hub.unexpected_tensors", [name])


def test_separate_vocabularies_are_not_supported(tmp_path, hf_tokenizer):
    separate = build(len(hf_tokenizer), share_encoder_decoder_embeddings=False, tie_word_embeddings=False)
    error = load_error(save_all(tmp_path, separate, hf_tokenizer))
    assert (error.code, error.details["key"]) == ("hub.unsupported_config", "share_encoder_decoder_embeddings")


def test_invalid_token_files_are_named(folder):
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    for invalid in ({**vocab, "<pad>": 3}, {**vocab, "<pad>": len(vocab)}, {"a": 0}, {}):
        (folder / "vocab.json").write_text(json.dumps(invalid), encoding="utf-8")
        assert load_error(folder).code == "hub.vocab"
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "source.spm").write_bytes(b"damaged")
    assert load_error(folder).code == "hub.unreadable"
    (folder / "source.spm").unlink()
    error = load_error(folder)
    assert (error.code, error.details["file"]) == ("hub.file_missing", "source.spm")


def test_only_unigram_models_are_supported(folder, tmp_path):
    bpe = tmp_path / "bpe"
    bpe.mkdir()
    (folder / "source.spm").write_bytes((train_sentencepiece(bpe, "bpe") / "source.spm").read_bytes())
    assert load_error(folder).code == "hub.spm_type"


def test_missing_sentencepiece_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    error = load_error(folder)
    assert error.code == "hub.sentencepiece_missing"
    assert "pip install 'mmx[marian]'" in str(error)


@pytest.mark.slow
def test_logits_equal_at_the_published_size(tmp_path, hf_tokenizer):
    """As Helsinki-NLP/opus-mt-en-de: six layers of size 512, 58101 tokens, 512 positions."""
    names = sorted(hf_tokenizer.get_vocab(), key=hf_tokenizer.get_vocab().get)[:-1]
    names += [*(f"piece{i}" for i in range(len(names), 58100)), "<pad>"]
    save_all(tmp_path, hf_tokenizer)
    (tmp_path / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}), encoding="utf-8")
    torch.manual_seed(0)
    reference = build(
        58101,
        None,
        d_model=512,
        encoder_layers=6,
        decoder_layers=6,
        max_position_embeddings=512,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
    )
    model = load_hf_model(save_all(tmp_path, reference)).model
    tokens = torch.randint(0, 58101, (3, 20), generator=torch.Generator().manual_seed(1))
    rows = [torch.tensor(model.tokenizer.encode(text) + [EOS]) for text in TEXTS]
    inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=58100)
    mask = inputs != 58100
    with torch.no_grad():
        expected = reference(input_ids=inputs, attention_mask=mask.long(), decoder_input_ids=tokens).logits
        memory = encode_inputs(model, "text", {"tokens": inputs, "mask": mask})
        found = model.decoder(tokens[:, None], memory)[:, 0]
    assert relative_difference(found, expected) < PUBLISHED_SIZE_TOLERANCE
