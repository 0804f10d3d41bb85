"""Encoders of transformers, tiny and random, from folders as their families publish them: the same numbers as there,
alone as in a batch, each cell in its place, rebuilt without any file, and one sentence for all that is wrong."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from mmx.config.loader import dump_config, parse_config
from mmx.config.schema import ProjectionConfig, SourceConfig
from mmx.encoders.contract import check_features
from mmx.encoders.pretrained import HF_FAMILIES, TOWERS, PretrainedEncoder
from mmx.errors import AudioError, ConfigError, EncoderError, ImageError
from mmx.io.images import load_image
from mmx.models.checkpoint import load_model, save_model, unique_tensors
from mmx.testing import tiny_model
from mmx.testing.conformance import check_encoder

ADDRESS = "mmx.encoders.pretrained:PretrainedEncoder"
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # float32, states of about 1; what is seen is below 2e-6
RATE = 16_000

BLOCKS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
SEES = BLOCKS | {"image_size": 48, "patch_size": 8}
READS = BLOCKS | {"vocab_size": 320, "max_position_embeddings": 20}
SHIFTED = READS | {"max_position_embeddings": 22, "pad_token_id": 1}  # the table's first two rows are the padding's
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 2, "vocab_size": 320}
TWIN = {"vision_config": SEES, "text_config": READS | {"bos_token_id": 0, "eos_token_id": 2}}
BLIP = {"vision_config": SEES, "text_config": TWIN["text_config"] | {"encoder_hidden_size": 32, "sep_token_id": 2}}
PYRAMID = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
RESNET = PYRAMID | {"embedding_size": 8, "layer_type": "basic"}
SWIN = {"image_size": 48, "patch_size": 4, "embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 4]}
SWIN |= {"window_size": 3}
HEARS = BLOCKS | {"conv_dim": [16] * 3, "conv_kernel": [10, 3, 3], "conv_stride": [5, 4, 4], "vocab_size": 32}
HEARS |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 3}
LAYERED = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
WHISPER = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
WHISPER |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 60, "num_mel_bins": 16}
WHISPER |= {"max_source_positions": 50, "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1}

SIDE = {"height": 48, "width": 48}
SQUASHED = {"size": SIDE}
CROPPED = {"size": {"shortest_edge": 48}, "crop_size": SIDE}
BOTH = {"size": {"height": 54, "width": 54}, "crop_size": SIDE}  # as DeiT: squashed, then cropped
UNEVEN = {"size": {"height": 50, "width": 50}}  # pixels that fill no patch of 8 are dropped
SHRUNK = {"size": {"shortest_edge": 96}}
TOKENS = {"bert": "[PAD] [UNK] [CLS] [SEP] [MASK]", "roberta": "<s> <pad> </s> <unk> <mask>", "t5": "<pad> </s> <unk>"}

# what lies in the folder: its class, config, where the encoder is in it; its processor; then of pictures the grid and
# how many tokens stand before it, of texts the kind of tokenizer and its tokens
PICTURES = {
    "vit": ("ViTForImageClassification", SEES, "vit", "ViTImageProcessor", SQUASHED, (6, 6), 1),
    "deit": ("DeiTModel", SEES, "", "DeiTImageProcessor", BOTH, (6, 6), 2),
    "beit": ("BeitModel", SEES | {"use_relative_position_bias": True}, "", "BeitImageProcessor", SQUASHED, (6, 6), 1),
    "dinov2": ("Dinov2Model", SEES | {"image_size": 64}, "", "BitImageProcessor", CROPPED, (6, 6), 1),
    "dinov2-registers": ("Dinov2WithRegistersModel", SEES, "", "BitImageProcessor", CROPPED, (6, 6), 5),
    "dinov3": ("DINOv3ViTModel", SEES | {"num_register_tokens": 4}, "", "DINOv3ViTImageProcessor", SQUASHED, (6, 6), 5),
    "clip": ("CLIPModel", TWIN, "vision_model", "CLIPImageProcessor", CROPPED, (6, 6), 1),
    "clip-vision": ("CLIPVisionModel", SEES, "", "CLIPImageProcessor", CROPPED, (6, 6), 1),
    "siglip": ("SiglipModel", TWIN, "vision_model", "SiglipImageProcessor", SQUASHED, (6, 6), 0),
    "siglip-vision": ("SiglipVisionModel", SEES | {"image_size": 50}, "", "SiglipImageProcessor", UNEVEN, (6, 6), 0),
    "blip": ("BlipForConditionalGeneration", BLIP, "vision_model", "BlipImageProcessor", SQUASHED, (6, 6), 1),
    "blip-vision": ("BlipVisionModel", SEES, "", "BlipImageProcessor", SQUASHED, (6, 6), 1),
    "swin": ("SwinForImageClassification", SWIN, "swin", "ViTImageProcessor", SQUASHED, (3, 3), 0),
    "convnext": ("ConvNextForImageClassification", PYRAMID, "convnext", "ConvNextImageProcessor", SHRUNK, (3, 3), 0),
    "convnextv2": ("ConvNextV2Model", PYRAMID, "", "ConvNextImageProcessor", SHRUNK, (3, 3), 0),
    "resnet": ("ResNetForImageClassification", RESNET, "resnet", "ConvNextImageProcessor", SHRUNK, (3, 3), 0),
}
DISENTANGLED = READS | {"relative_attention": True, "position_biased_input": False, "pos_att_type": "c2p|p2c"}
BUCKETS = DISENTANGLED | {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}
DISTIL = {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 48, "vocab_size": 320, "max_position_embeddings": 20}
ELECTRA = READS | {"embedding_size": 16}
MODERN = READS | {"pad_token_id": 0, "local_attention": 8, "global_attn_every_n_layers": 2}
GATED = T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
TEXTS = {
    "bert": ("BertForMaskedLM", READS, "bert", "BertTokenizer", "words", "bert"),
    "roberta": ("RobertaForMaskedLM", SHIFTED, "roberta", "RobertaTokenizer", "bytes", "roberta"),
    "xlm-roberta": ("XLMRobertaModel", SHIFTED, "", "XLMRobertaTokenizer", "pieces", "roberta"),
    "electra": ("ElectraForPreTraining", ELECTRA, "electra", "ElectraTokenizer", "words", "bert"),
    "mpnet": ("MPNetModel", SHIFTED, "", "MPNetTokenizer", "words", "roberta"),
    "distilbert": ("DistilBertForMaskedLM", DISTIL, "distilbert", "DistilBertTokenizer", "words", "bert"),
    "deberta": ("DebertaModel", DISENTANGLED, "", "DebertaTokenizer", "bytes", "bert"),
    "deberta-v2": ("DebertaV2ForMaskedLM", BUCKETS, "deberta", "DebertaV2Tokenizer", "pieces", "bert"),
    "modernbert": ("ModernBertModel", MODERN, "", "PreTrainedTokenizerFast", "bytes", "bert"),
    "t5": ("T5ForConditionalGeneration", T5, "encoder", "T5Tokenizer", "pieces", "t5"),
    "t5-v1.1": ("T5ForConditionalGeneration", GATED, "encoder", "T5Tokenizer", "pieces", "t5"),
    "t5-encoder": ("T5EncoderModel", T5, "", "T5Tokenizer", "pieces", "t5"),
    "mt5": ("MT5ForConditionalGeneration", T5, "encoder", "T5Tokenizer", "pieces", "t5"),
    "clip-text": ("CLIPModel", TWIN, "text_model", "CLIPTokenizer", "bytes", "roberta"),
}
MEL = {"feature_size": 16, "chunk_length": 1}
MASKED = {"return_attention_mask": True}
SOUNDS = {
    "whisper": ("WhisperForConditionalGeneration", WHISPER, "model.encoder", "WhisperFeatureExtractor", MEL),
    "whisper-model": ("WhisperModel", WHISPER, "encoder", "WhisperFeatureExtractor", MEL),
    "wav2vec2": ("Wav2Vec2ForCTC", HEARS, "wav2vec2", "Wav2Vec2FeatureExtractor", {}),
    "wav2vec2-large": ("Wav2Vec2Model", HEARS | LAYERED, "", "Wav2Vec2FeatureExtractor", MASKED),
    "hubert": ("HubertModel", HEARS, "", "Wav2Vec2FeatureExtractor", {}),
    "hubert-large": ("HubertForCTC", HEARS | LAYERED, "hubert", "Wav2Vec2FeatureExtractor", MASKED),
    "wavlm": ("WavLMModel", HEARS, "", "Wav2Vec2FeatureExtractor", {}),
    "wavlm-large": ("WavLMModel", HEARS | LAYERED, "", "Wav2Vec2FeatureExtractor", MASKED),
}
ALL = {**PICTURES, **TEXTS, **SOUNDS}
PYRAMIDS = ("swin", "convnext", "convnextv2", "resnet")
WORDS = ["a dog", "", "what is the cat doing on the red beach?", "Zwölf 🐈 xyz, " * 8]
CORPUS = ["a dog runs on the beach", "what is the dog doing?", "the cat sits on a mat. It sleeps, quietly!"] * 4


DAILY = "vit clip siglip siglip-vision dinov2-registers blip swin bert roberta deberta deberta-v2 t5"
DAILY += " whisper wav2vec2 wav2vec2-large"


def cases(table):
    """Each family; those beyond what everybody uses in the slow run."""
    return [pytest.param(name, marks=[] if name in DAILY.split() else pytest.mark.slow) for name in table]


@pytest.fixture(autouse=True, scope="module")
def _one_thread_and_no_traces():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these are too small to be shared
    yield
    torch.set_num_threads(threads)
    shutil.rmtree(root(), ignore_errors=True)
    for cached in (root, folder, reference):
        cached.cache_clear()


@cache
def root():
    return Path(mkdtemp(prefix="pretrained-"))


@cache
def folder(name):
    """The folder of a family, with its weights moved off what hides mistakes: norms of one, biases of zero."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind, facts, _, processor, *more = ALL[name]
    config = getattr(transformers, kind).config_class(**facts)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model = getattr(transformers, kind)(config)
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    place = root() / name
    model.save_pretrained(place)
    if name in TEXTS:
        write_tokenizer(place, processor, *more)
    else:
        getattr(transformers, processor)(**more[0]).save_pretrained(place)
    return place


def write_tokenizer(place, kind, style, family):
    """A tokenizer trained on a few sentences, as tokenizer.json and tokenizer_config.json."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    special = TOKENS[family].split()
    facts = {"special_tokens": special, "show_progress": False}
    letters = pre_tokenizers.ByteLevel.alphabet()
    model, cut, trainer = {
        "words": lambda: (
            models.WordPiece(unk_token=special[1]),
            pre_tokenizers.BertPreTokenizer(),
            trainers.WordPieceTrainer(vocab_size=120, **facts),
        ),
        "bytes": lambda: (
            models.BPE(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            trainers.BpeTrainer(vocab_size=300, initial_alphabet=letters, **facts),
        ),
        "pieces": lambda: (
            models.Unigram(),
            pre_tokenizers.Metaspace(),
            trainers.UnigramTrainer(vocab_size=100, unk_token=special[-1], **facts),
        ),
    }[style]()
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = cut
    if style == "words":
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.train_from_iterator(CORPUS, trainer)
    around = {"bert": "[CLS] $A [SEP]", "roberta": "<s> $A </s>", "t5": "$A </s>"}[family]
    marks = [(mark, tokenizer.token_to_id(mark)) for mark in around.split() if mark != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=marks)
    tokenizer.save(str(place / "tokenizer.json"))
    roles = {"bert": "pad unk cls sep mask", "roberta": "bos pad eos unk mask", "t5": "pad eos unk"}[family].split()
    named = {f"{role}_token": mark for role, mark in zip(roles, special, strict=True)}
    length = {} if family == "t5" else {"model_max_length": 20}
    (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **length, **named}))


@cache
def reference(name):
    """The encoder within the very model that was saved, as transformers loads it."""
    import transformers

    kind, _, path, *_ = ALL[name]
    return getattr(transformers, kind).from_pretrained(folder(name)).eval().get_submodule(path)


def load(name, **options):
    tower = {"tower": "text"} if name == "clip-text" else {}
    most = {"max_tokens": 20} if "t5" in name else {}
    return PretrainedEncoder(PretrainedEncoder.Options(name=str(folder(name)), **tower | most | options)).eval()


def encode(encoder, inputs):
    with torch.no_grad():
        features = encoder(encoder.collate([encoder.prepare(raw) for raw in inputs]))
        return check_features(features, encoder, "kit", torch.device("cpu"))


def flat(states):
    """A map [B, C, rows, columns] as slots [B, S, C]."""
    return states.flatten(2).transpose(1, 2) if states.ndim == 4 else states


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def tones():
    dice = torch.Generator().manual_seed(1)
    return [(0.1 * torch.randn(n, generator=dice), RATE) for n in (4000, 9000, 4000, 40, 16_000, 20_000)]


def inputs_of(name):
    return [noise(70, 50), noise(50, 70, 1)] if name in PICTURES else WORDS if name in TEXTS else tones()


@pytest.mark.slow
def test_every_family_is_tested():
    tested = {reference(name).config.model_type for name in ALL}
    assert tested == set(HF_FAMILIES)
    whole = {json.loads((folder(name) / "config.json").read_text())["model_type"] for name in ALL}
    assert set(TOWERS) <= whole
    assert {HF_FAMILIES[reference(name).config.model_type].modality for name in SOUNDS} == {"audio"}


# ---- pictures


@pytest.mark.parametrize("name", cases(PICTURES))
def test_pictures_are_seen_as_in_transformers(name):
    from transformers import AutoImageProcessor

    encoder, processor = load(name), AutoImageProcessor.from_pretrained(folder(name))
    grid, before = PICTURES[name][-2:]
    pictures = [noise(70, 50), noise(50, 70), noise(300, 20), noise(5, 5), Image.new("LA", (64, 64))]
    pixels = [encoder.prepare(picture)["pixels"] for picture in pictures]
    expected = [processor(load_image(picture), return_tensors="pt")["pixel_values"][0] for picture in pictures]
    for own, theirs in zip(pixels, expected, strict=True):
        assert torch.equal(own, theirs), "to the bit: it is the same processor"
    features = encode(encoder, pictures)
    with torch.no_grad():
        states = flat(reference(name)(torch.stack(expected)).last_hidden_state)
    torch.testing.assert_close(features.states, states, **CLOSE)
    assert features.grid == grid
    assert features.states.shape == (5, before + grid[0] * grid[1], encoder.width)
    assert features.mask.all()
    assert (encoder.modality, encoder.dimensions) == ("image", 2)


@pytest.mark.parametrize("name", cases(PICTURES))
def test_a_cell_looks_most_at_its_own_place(name):
    """Where on the picture the energy of a cell's states comes from, by gradient, with random weights."""
    encoder, convolves = load(name), name.startswith(("convnext", "resnet"))
    side = 192 if convolves else encoder.prepare(noise(60, 60))["pixels"].shape[-1]
    pixels = torch.randn(4, 3, side, side, requires_grad=True)
    rows, columns = encoder({"pixels": pixels}).grid
    states = encoder({"pixels": pixels}).states[:, -rows * columns :].unflatten(1, (rows, columns))
    for row, column in [(0, columns - 1), (rows - 1, 0), (rows // 2, columns // 2), (1, 0)]:
        energy = states[:, row, column].square().sum()
        (gradient,) = torch.autograd.grad(energy, pixels, retain_graph=True)
        edge = side // rows
        cells = gradient.square().sum((0, 1))[: edge * rows, : edge * columns]
        cells = cells.unflatten(0, (rows, edge)).unflatten(2, (columns, edge)).sum((1, 3))
        found = divmod(int(cells.argmax()), columns)
        beside = 1 if name == "resnet" else 0  # of six; an untrained one blurs
        assert abs(found[0] - row) <= beside, (found, (row, column))
        assert abs(found[1] - column) <= beside, (found, (row, column))


def test_a_very_long_picture_does_not_fill_the_memory(monkeypatch):
    """Scaled by its short side it would have 48 x 960,000 pixels; its middle is enough, and there it is the same."""
    encoder, seen = load("clip"), []
    processor = encoder._reader.processor
    recorder = lambda image, **how: seen.append(image.size) or processor(image, **how)  # noqa: E731
    monkeypatch.setattr(encoder._reader, "processor", recorder)
    line = Image.new("RGB", (20_000, 1), "red")
    line.paste("blue", (9_000, 0, 11_000, 1))
    assert torch.equal(encoder.prepare(line)["pixels"], encoder.prepare(Image.new("RGB", (50, 50), "blue"))["pixels"])
    tall = noise(40, 1501)
    middle = tall.crop((0, 400, 40, 1101))
    torch.testing.assert_close(encoder.prepare(tall), encoder.prepare(middle), atol=0.05, rtol=0)
    encoder.prepare(noise(640, 40))
    assert seen == [(16, 1), (50, 50), (40, 640), (40, 640), (640, 40)]


@pytest.mark.parametrize("raw", [b"", "missing.png", 3])
def test_what_is_no_picture(raw):
    with pytest.raises(ImageError):
        load("vit").prepare(raw)


# ---- texts


@pytest.mark.parametrize("name", cases(TEXTS))
def test_texts_are_read_as_in_transformers_and_alone_as_in_a_batch(name):
    from transformers import AutoTokenizer

    encoder, tokenizer = load(name), AutoTokenizer.from_pretrained(folder(name))
    expected = [tokenizer(text, truncation=True, max_length=20)["input_ids"] for text in WORDS]
    assert [encoder.prepare(text)["tokens"].tolist() for text in WORDS] == expected
    assert len(expected[-1]) == 20, "cut where the model ends"
    together = encode(encoder, WORDS)
    for row, ids in enumerate(expected):
        with torch.no_grad():
            told = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
            states = reference(name)(**told).last_hidden_state[0]
        alone = encode(encoder, [WORDS[row]])
        assert together.mask[row].tolist() == [True] * len(ids) + [False] * (20 - len(ids))
        torch.testing.assert_close(together.states[row, : len(ids)], states, **CLOSE)
        torch.testing.assert_close(together.states[row, : len(ids)], alone.states[0], **CLOSE)
    assert (encoder.modality, encoder.dimensions, encoder.width) == ("text", 1, 32)


@pytest.mark.parametrize("name", cases(["bert", "roberta", "deberta", "deberta-v2", "t5", "modernbert", "clip-text"]))
def test_what_stands_in_the_padding_is_not_read(name):
    encoder = load(name)
    batch = encoder.collate([encoder.prepare(text) for text in WORDS])
    longer = {key: nn.functional.pad(tensor, (0, 0 if "t5" not in name else 7)) for key, tensor in batch.items()}
    scribbled = {**longer, "tokens": torch.where(longer["mask"], longer["tokens"], 7)}
    with torch.no_grad():
        one, other = encoder(batch), encoder(scribbled)
    torch.testing.assert_close(one.states[batch["mask"]], other.states[scribbled["mask"]], **CLOSE)


def test_a_text_ends_where_the_model_or_the_options_say(tmp_path):
    place = tmp_path / "unlimited"
    shutil.copytree(folder("roberta"), place)
    config = json.loads((place / "tokenizer_config.json").read_text())
    del config["model_max_length"]
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    build = PretrainedEncoder.Options
    assert len(PretrainedEncoder(build(name=str(place))).prepare("dog " * 99)["tokens"]) == 20, (
        "22 less the padding's 2"
    )
    short = PretrainedEncoder(build(name=str(place), max_tokens=7)).prepare("dog " * 99)["tokens"]
    assert short.tolist()[:1] + short.tolist()[-1:] == [0, 2], "cut within its marks"
    assert len(short) == 7
    with pytest.raises(EncoderError, match="max_tokens is 21; expected at most 20, where the model ends."):
        PretrainedEncoder(build(name=str(place), max_tokens=21))
    assert len(load("t5", max_tokens=None).prepare("dog " * 999)["tokens"]) == 512, "T5 has no end of its own"
    assert len(load("t5", max_tokens=600).prepare("dog " * 999)["tokens"]) == 600


def test_a_vocabulary_without_tokenizer_json(tmp_path):
    """As BERT was published first."""
    place = tmp_path / "old"
    shutil.copytree(folder("bert"), place)
    vocabulary = json.loads((place / "tokenizer.json").read_text())["model"]["vocab"]
    (place / "tokenizer.json").unlink()
    (place / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)))
    old, new = PretrainedEncoder(PretrainedEncoder.Options(name=str(place))), load("bert")
    for text in WORDS:
        assert torch.equal(old.prepare(text)["tokens"], new.prepare(text)["tokens"])
    (place / "vocab.txt").unlink()
    with pytest.raises(EncoderError, match="has no Tokenizer that can be read .*; expected .*tokenizer.json"):
        PretrainedEncoder(PretrainedEncoder.Options(name=str(place)))


def test_a_rebuilt_text_encoder_waits_for_its_tokenizer(tmp_path):
    encoder = load("roberta")
    again = PretrainedEncoder(encoder.options)
    with pytest.raises(EncoderError, match=r"no tokenizer; load its checkpoint, or call load_files\(folder\)."):
        again.prepare("a dog")
    with pytest.raises(EncoderError, match="has no tokenizer that can be read"):
        again.load_files(tmp_path)
    again.save_files(tmp_path)
    assert list(tmp_path.iterdir()) == []
    encoder.save_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    again.load_files(tmp_path)
    for text in WORDS:
        assert torch.equal(again.prepare(text)["tokens"], encoder.prepare(text)["tokens"])


# ---- sounds


@pytest.mark.parametrize("name", cases(SOUNDS))
def test_sounds_are_heard_as_in_transformers_and_alone_as_in_a_batch(name):
    from transformers import AutoFeatureExtractor

    encoder, extractor = load(name), AutoFeatureExtractor.from_pretrained(folder(name))
    together = encode(encoder, tones())
    for row, (samples, rate) in enumerate(tones()):
        long_enough = samples if "whisper" in name else nn.functional.pad(samples, (0, max(0, 60 - len(samples))))
        read = extractor(long_enough.numpy(), sampling_rate=rate, return_tensors="pt")
        read = read["input_features" if "whisper" in name else "input_values"]
        prepared = encoder.prepare((samples, rate))
        assert torch.equal(prepared["spectrum" if "whisper" in name else "samples"], read[0]), "the same extractor"
        with torch.no_grad():
            states = reference(name)(read).last_hidden_state[0]
        alone = encode(encoder, [(samples, rate)])
        slots = len(states)
        assert together.mask[row].tolist() == [True] * slots + [False] * (together.mask.shape[1] - slots)
        torch.testing.assert_close(together.states[row, :slots], states, **CLOSE)
        torch.testing.assert_close(together.states[row, :slots], alone.states[0], **CLOSE)
    assert (encoder.modality, encoder.dimensions, encoder.width) == ("audio", 1, 32)


def test_whisper_hears_its_whole_window_and_no_more():
    encoder = load("whisper")
    short, whole, longer = (encode(encoder, [(tones()[5][0][:n], RATE)]) for n in (4000, 16_000, 20_000))
    assert short.mask.all(), "the silence after a sound as well"
    assert short.states.shape == (1, 50, 32)
    assert torch.equal(whole.states, longer.states), "cut where the window ends"


def test_norms_over_time_are_why_lengths_run_apart():
    """The plain way, one padded batch, gives other states; of models that norm each frame it gives the same."""
    samples = [tones()[0], tones()[1]]
    for name, differ in [("wav2vec2", True), ("wav2vec2-large", False)]:
        encoder = load(name)
        batch = encoder.collate([encoder.prepare(sound) for sound in samples])
        with torch.no_grad():
            plain = reference(name)(batch["samples"], attention_mask=batch["mask"].long()).last_hidden_state[0]
        alone = encode(encoder, samples[:1]).states[0]
        assert ((plain[: len(alone)] - alone).abs().max() > 1e-2) == differ


def test_a_sound_of_any_source(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    samples, rate = tones()[0]
    soundfile.write(tmp_path / "a.wav", samples.numpy(), rate, subtype="FLOAT")
    encoder = load("wav2vec2")
    expected = encoder.prepare((samples, rate))["samples"]
    assert torch.equal(encoder.prepare(tmp_path / "a.wav")["samples"], expected)
    assert torch.equal(encoder.prepare((tmp_path / "a.wav").read_bytes())["samples"], expected)
    with pytest.raises(AudioError, match="there is no such file"):
        encoder.prepare(str(tmp_path / "b.wav"))


def test_training_throws_no_dice_of_numpy_and_hears_short_sounds():
    """SpecAugment, which the published configs switch on, is off; dropout stays."""
    encoder = load("wav2vec2").train()
    before = np.random.get_state()[1].copy()
    batch = encoder.collate([encoder.prepare((torch.ones(80), RATE))])
    assert torch.isfinite(encoder(batch).states).all()
    assert (np.random.get_state()[1] == before).all()
    assert not [key for key in encoder.state_dict() if "masked_spec_embed" in key]


# ---- all of them


@pytest.mark.parametrize("name", cases(ALL))
def test_options_and_tensors_rebuild_it_without_any_file(name, tmp_path):
    encoder = load(name)
    inputs = inputs_of(name)
    expected = encode(encoder, inputs)
    assert encoder.options.name is None, "a path of this computer goes nowhere"
    read = yaml.safe_load(dump_config(encoder.options))
    options = parse_config(read, PretrainedEncoder.Options, where="options")
    assert options == encoder.options
    encoder.save_files(tmp_path)
    kept = folder(name).rename(tmp_path / "elsewhere")
    try:
        torch.manual_seed(99)
        again = PretrainedEncoder(options).eval()
    finally:
        kept.rename(folder(name))
    assert unique_tensors(again.state_dict()).keys() == unique_tensors(encoder.state_dict()).keys()
    again.load_files(tmp_path)
    again.load_state_dict(encoder.state_dict(), strict=True)
    found = encode(again, inputs)
    torch.testing.assert_close(found.states, expected.states, atol=1e-6, rtol=1e-6)  # memory may lie differently
    assert torch.equal(found.mask, expected.mask)
    assert found.grid == expected.grid
    assert again.options == options
    assert all(module.training for module in PretrainedEncoder(options).modules())


@pytest.mark.parametrize("name", cases(name for name in ALL if name not in PYRAMIDS))
def test_a_layer_is_the_state_after_so_many_blocks(name):
    whole, inputs = load(name), inputs_of(name)[:2]
    batch = whole.collate([whole.prepare(raw) for raw in inputs])
    if "samples" in batch:  # one length, so that transformers needs no mask
        batch = {key: tensor[:1] for key, tensor in batch.items()}
        batch = {key: tensor[:, : int(batch["mask"].sum())] for key, tensor in batch.items()}
    names = {"pixels": "pixel_values", "tokens": "input_ids", "mask": "attention_mask"}
    names |= {"samples": "input_values", "spectrum": "input_features"}
    told = {names[key]: tensor.long() if key == "mask" else tensor for key, tensor in batch.items()}
    if "input_values" in told:
        told.pop("attention_mask")
    with torch.no_grad():
        hidden = reference(name)(**told, output_hidden_states=True).hidden_states
    weights = sum(parameter.numel() for parameter in whole.parameters())
    for layer, blocks in [(1, 1), (-2, 2)]:
        encoder = load(name, layer=layer)
        with torch.no_grad():
            features = encoder(batch)
        torch.testing.assert_close(features.states[features.mask], hidden[blocks][features.mask], **CLOSE)
        assert encoder.options.layer == blocks
        assert sum(parameter.numel() for parameter in encoder.parameters()) < weights, "what is above is cut off"
        again = PretrainedEncoder(encoder.options)
        again.load_state_dict(encoder.state_dict())


@pytest.mark.parametrize("name", cases(PYRAMIDS))
def test_a_layer_of_a_pyramid_is_a_stage(name):
    seen = []
    stage = {"swin": "encoder.layers.1.blocks"}.get(name, "encoder.stages.1")
    hook = reference(name).get_submodule(stage).register_forward_hook(lambda *given: seen.append(given[2]))
    if name == "swin":  # blocks are a list that is never called itself
        hook.remove()
        hook = reference(name).get_submodule(f"{stage}.0").register_forward_hook(lambda *given: seen.append(given[2]))
    encoder = load(name, layer=2)
    pixels = encoder.prepare(noise(60, 60))["pixels"][None]
    try:
        with torch.no_grad():
            features = encoder({"pixels": pixels})
            reference(name)(pixels)
    finally:
        hook.remove()
    states = flat(seen[0][0] if isinstance(seen[0], tuple) else seen[0])
    torch.testing.assert_close(features.states, states, **CLOSE)
    assert features.grid == ((6, 6) if name == "swin" else (12, 12))
    assert encoder.width == states.shape[-1]


def test_the_last_layer_has_not_passed_the_last_norm():
    for name, norm in [("vit", "layernorm"), ("siglip", "post_layernorm"), ("whisper", "layer_norm"),
                       ("t5", "final_layer_norm"), ("wav2vec2-large", "encoder.layer_norm")]:  # fmt: skip
        inputs = inputs_of(name)[:1]
        raw, whole = encode(load(name, layer=-1), inputs).states, encode(load(name), inputs).states
        with torch.no_grad():
            normed = reference(name).get_submodule(norm)(raw)
        torch.testing.assert_close(normed, whole, **CLOSE)
        assert not torch.allclose(raw, whole, atol=0.1)


def test_nothing_is_kept_that_hands_nothing_over():
    unwanted = ("pooler", "head", "classifier", "decoder", "text_model", "visual_projection", "logit_scale", "adapter")
    for name in ("vit", "bert", "clip", "siglip", "blip", "whisper", "wav2vec2", "t5"):
        encoder = load(name)
        assert not [key for key in encoder.state_dict() if any(part in key.split(".") for part in unwanted)]
        batch = encoder.collate([encoder.prepare(raw) for raw in inputs_of(name)[:2]])
        encoder(batch).states.square().sum().backward()
        assert not [key for key, own in encoder.named_parameters() if own.requires_grad and own.grad is None]
    assert not load("dinov2-registers").model.embeddings.mask_token.requires_grad


def test_half_precision_weights_become_float32(tmp_path):
    place = tmp_path / "half"
    shutil.copytree(folder("vit"), place)
    tensors = load_file(place / "model.safetensors")
    save_file({key: tensor.half() for key, tensor in tensors.items()}, place / "model.safetensors", {"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    encoder = PretrainedEncoder(PretrainedEncoder.Options(name=str(place))).eval()
    assert {tensor.dtype for tensor in encoder.state_dict().values()} == {torch.float32}
    expected = encode(load("vit"), [noise(50, 50)]).states
    assert (encode(encoder, [noise(50, 50)]).states - expected).abs().max() < 5e-3, "what float16 rounds away"


def test_weights_in_several_files(tmp_path):
    """As large models are published."""
    import transformers

    transformers.ViTModel.from_pretrained(folder("vit")).save_pretrained(tmp_path, max_shard_size="20KB")
    shutil.copy(folder("vit") / "preprocessor_config.json", tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    encoder = PretrainedEncoder(PretrainedEncoder.Options(name=str(tmp_path))).eval()
    assert torch.equal(encode(encoder, [noise(50, 50)]).states, encode(load("vit"), [noise(50, 50)]).states)


def test_deberta_is_kept_out_of_half_precision():
    """Its attention fills masked scores with the least float32, which bfloat16 cannot hold."""
    encoder = load("deberta")
    exact = encode(encoder, WORDS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode(encoder, WORDS).states, exact.states)


def test_accepts():
    accepted = {name: [path for path in ("a/B.JPG", "a.FLAC", "a.txt", "a") if load(name).accepts(path)]
                for name in ("vit", "bert", "whisper")}  # fmt: skip
    assert accepted == {"vit": ["a/B.JPG"], "bert": [], "whisper": ["a.FLAC"]}


def test_loading_is_quiet_and_leaves_the_library_as_it_was(capfd):
    from transformers.utils import logging

    folder("clip")
    level = logging.get_verbosity()
    try:
        logging.set_verbosity_info()
        load("clip")
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(level)
    said = capfd.readouterr()
    assert said.out + said.err == ""


@pytest.mark.parametrize("name", ["clip", "t5", "wav2vec2"])
def test_a_checkpoint_of_ours_holds_it_whole(name, tmp_path):
    options = {"name": str(folder(name))} | ({"max_tokens": 20} if name == "t5" else {})
    source = SourceConfig(encoder=ADDRESS, options=options, projection=ProjectionConfig(positions="sinusoidal"))
    model = tiny_model({"given": source})
    save_model(tmp_path / "ours", model)
    kept = folder(name).rename(tmp_path / "elsewhere")
    try:
        again = load_model(tmp_path / "ours")
    finally:
        kept.rename(folder(name))
    raw = inputs_of(name)[:2]
    expected, found = (encode(one.encoder("given"), raw) for one in (model, again))
    torch.testing.assert_close(found.states, expected.states, atol=1e-6, rtol=1e-6)
    assert torch.equal(found.mask, expected.mask)
    assert found.grid == expected.grid


def test_conformance():
    """What the kit asks besides; of every family, and all of it, in the slow run."""
    only = ["options", "worker", "alone", "order", "deterministic", "gradients", "saved", "grid", "bfloat16"]
    check_encoder(ADDRESS, options={"name": str(folder("clip"))}, only=only)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_conformance_of_every_family(name):
    check_encoder(ADDRESS, options={"name": str(folder(name))} | ({"tower": "text"} if name == "clip-text" else {}))


# ---- what is wrong


def torn(place):
    file = place / "model.safetensors"
    file.write_bytes(file.read_bytes()[:9000])


def without_a_tensor(place):
    tensors = load_file(place / "model.safetensors")
    del tensors[next(key for key in tensors if ".layer.1." in key)]
    save_file(tensors, place / "model.safetensors", {"format": "pt"})


def changed(file, **facts):
    def change(place):
        read = json.loads((place / file).read_text())
        (place / file).write_text(json.dumps(read | facts))

    return change


def moved(old, new):
    return lambda place: (place / old).rename(place / new)


def lost(file):
    return lambda place: (place / file).unlink()


def written(file, text):
    return lambda place: (place / file).write_text(text)


CONFIG, WEIGHTS, PROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
FREE = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 48}, "do_center_crop": False}
SAVED = "expected what save_pretrained writes; save or download it again."
DAMAGES = {  # what is done to a ViT's folder: what is said
    "no config": (lost(CONFIG), f"has no config.json; {SAVED}"),
    "no weights": (lost(WEIGHTS), f"has no model.safetensors; {SAVED}"),
    "only a pickle": (
        moved(WEIGHTS, "pytorch_model.bin"),
        f"has no model.safetensors; pickles (*.bin) may run code and are not read; {SAVED}",
    ),
    "half downloaded": (
        torn,
        "has no weights that can be read (SafetensorError); expected whole safetensors; download it again",
    ),
    "empty weights": (written(WEIGHTS, ""), "has no weights that can be read"),
    "a tensor lost": (without_a_tensor, "lacks 1 tensors of its vit encoder, such as layers.1."),
    "more layers than weights": (changed(CONFIG, num_hidden_layers=5), "of its vit encoder, such as layers.3."),
    "another width": (changed(CONFIG, hidden_size=64), "tensors of its vit encoder, such as embeddings."),
    "no JSON": (written(CONFIG, "{"), "has no config that can be read (OSError); expected a whole config.json"),
    "a list": (written(CONFIG, "[]"), "has no config that can be read (AttributeError)"),
    "no type": (changed(CONFIG, model_type=None), "has model_type None; expected one of beit, bert, "),
    "another type": (changed(CONFIG, model_type="gpt2"), "has model_type 'gpt2'; expected one of beit, bert, "),
    "a wrong type of value": (changed(CONFIG, hidden_size="wide"), "has no vit architecture that can be read"),
    "no processor": (lost(PROCESSOR), "has no ImageProcessor that can be read (OSError); expected preprocessor_con"),
    "another size": (
        changed(PROCESSOR, size={"height": 32, "width": 32}),
        "gives pictures of [3, 32, 32]; expected 48, as its model;",
    ),
    "any size": (changed(PROCESSOR, **FREE), "gives pictures of [3, 48, 64] and [3, 64, 48]; expected one size;"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_told_in_a_sentence(damage, tmp_path):
    place = tmp_path / "it"
    shutil.copytree(folder("vit"), place)
    damaged, said = DAMAGES[damage]
    damaged(place)
    with pytest.raises(EncoderError) as caught:
        PretrainedEncoder(PretrainedEncoder.Options(name=str(place)))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


OLD = {"add_cross_attention": False, "chunk_size_feed_forward": 0, "id2label": {"0": "LABEL_0"}, "is_decoder": False}
OLD |= {
    "max_length": 20,
    "num_beams": 1,
    "pruned_heads": {},
    "return_dict": True,
    "torch_dtype": "float32",
    "top_k": 50,
}


def test_older_forms_of_the_same_files(tmp_path):
    """Facts of generation in every config, names of extractors for pictures, a size as one number, weight norm's first
    names, a processor within a processor."""
    clip, ears, whole = (tmp_path / name for name in ("clip", "wav2vec2", "vit"))
    for place in (clip, ears, whole):
        shutil.copytree(folder(place.name), place)
    read = json.loads((clip / CONFIG).read_text())
    towers = {tower: read[tower] | OLD for tower in ("vision_config", "text_config")}
    changed(CONFIG, **towers, **OLD, vision_config_dict=None, text_config_dict=None)(clip)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    sizes = {"size": 48, "crop_size": 48, "do_center_crop": True, "resample": 3, "image_mean": mean, "image_std": std}
    (clip / PROCESSOR).write_text(json.dumps({"feature_extractor_type": "CLIPFeatureExtractor", **sizes}))
    tensors = load_file(ears / WEIGHTS)
    norm = "parametrizations.weight.original"
    older = {key.replace(f"{norm}0", "weight_g").replace(f"{norm}1", "weight_v"): t for key, t in tensors.items()}
    assert older.keys() != tensors.keys()
    save_file(older, ears / WEIGHTS, {"format": "pt"})
    (ears / PROCESSOR).write_text(json.dumps({"do_normalize": True, "feature_size": 1, "sampling_rate": RATE}))
    inner = json.loads((whole / PROCESSOR).read_text())
    (whole / PROCESSOR).unlink()
    (whole / "processor_config.json").write_text(json.dumps({"image_processor": inner, "processor_class": "Any"}))
    for place in (clip, ears, whole):
        encoder, inputs = PretrainedEncoder(PretrainedEncoder.Options(name=str(place))).eval(), inputs_of(place.name)
        assert torch.equal(encode(encoder, inputs).states, encode(load(place.name), inputs).states)


OUT_OF_REACH = (
    "is no folder here and could not be fetched (no such name, no network, or HF_HUB_OFFLINE=1 is set); check the name,"
)
STRANGE = {"image_processor_type": "AutoModel"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "the encoder has no name; give a folder, or a public name like"),
        ({"name": "no/such-model"}, f"'no/such-model' {OUT_OF_REACH} or give the folder of a downloaded model."),
        ({"name": "/no/such/folder"}, f"'/no/such/folder' {OUT_OF_REACH}"),
        ({"name": "~nobody/x\0?"}, OUT_OF_REACH),
        ({"name": "vit", "layer": 4}, "vit has no layer 4; give 1 to 3, or -1 for the last."),
        ({"name": "vit", "layer": 0}, "vit has no layer 0; give 1 to 3"),
        ({"name": "vit", "layer": -4}, "vit has no layer -4; give 1 to 3"),
        ({"name": "swin", "layer": 4}, "swin has no layer 4; give 1 to 3"),
        ({"name": "vit", "tower": "text"}, "has no text encoder of use here; expected tower image."),
        ({"name": "siglip", "tower": "text"}, "has no text encoder of use here; expected tower image."),
        ({"architecture": {"model_type": "gpt2"}}, "'options' has model_type 'gpt2'; expected one of"),
        ({"architecture": SEES | {"model_type": "vit"}}, "transformers has no ImageProcessor None"),
        ({"architecture": SEES | {"model_type": "vit"}, "preprocessing": STRANGE}, "no ImageProcessor 'AutoModel'"),
        (
            {"architecture": READS | {"model_type": "bert", "hidden_size": 31}},
            "'options' has no architecture that can be read (ValueError); expected one that fits",
        ),
    ],
)
def test_options_that_lead_nowhere(options, said):
    if options.get("name") in ALL:
        options = options | {"name": str(folder(options["name"]))}
    with pytest.raises(EncoderError) as caught:
        PretrainedEncoder(PretrainedEncoder.Options(**options))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_option_gets_the_nearest_name():
    with pytest.raises(ConfigError, match="nmae.*did you mean 'name'"):
        parse_config({"nmae": "x"}, PretrainedEncoder.Options, where="model.sources.image.options")


def test_code_in_a_folder_is_never_run(tmp_path):
    """Nor is anything asked about it: the folder's names of code, kernels and files are not followed."""
    place = tmp_path / "it"
    shutil.copytree(folder("vit"), place)
    (place / "evil.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\nclass Evil: pass\n")
    code = {"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoImageProcessor": "evil.Evil"}}
    changed(CONFIG, **code, attn_implementation="evil/kernel", transformers_weights="../evil.bin")(place)
    changed(PROCESSOR, **code, image_processor_type="Evil")(place)
    encoder = PretrainedEncoder(PretrainedEncoder.Options(name=str(place))).eval()
    assert torch.equal(encode(encoder, [noise(50, 50)]).states, encode(load("vit"), [noise(50, 50)]).states)
    assert not (tmp_path / "was-run").exists()
    assert "evil" not in encoder.options.model_dump_json().lower()


@pytest.mark.slow
def test_a_public_name_that_was_downloaded_before(tmp_path):
    """From the library's cache, without network; the name is kept as a note."""
    commit = "0123456789" * 4
    place = tmp_path / "hub/models--someone--something"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(commit)
    shutil.copytree(folder("bert"), place / "snapshots" / commit)
    code = f"""
from {ADDRESS.split(":")[0]} import PretrainedEncoder as E
e = E(E.Options(name="someone/something"))
print(e.options.name, e.prepare("a dog")["tokens"].tolist(), E(e.options).width)
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == f"someone/something {load('bert').prepare('a dog')['tokens'].tolist()} 32", (
        done.stderr
    )
