"""Encoders of transformers for tests: tiny and random, saved as their families publish them."""

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from PIL import Image

from mmx.encoders.contract import check_features
from mmx.encoders.pretrained import PretrainedEncoder

ADDRESS = "mmx.encoders.pretrained:PretrainedEncoder"
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # float32, states of about 1; measured: below 2e-6
SAMPLING_RATE = 16_000

BLOCKS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
VISION = BLOCKS | {"image_size": 48, "patch_size": 8}
TEXT = BLOCKS | {"vocab_size": 320, "max_position_embeddings": 20}
ROBERTA = TEXT | {"max_position_embeddings": 22, "pad_token_id": 1}  # the first two positions are reserved for padding
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 2, "vocab_size": 320}
TWO_TOWERS = {"vision_config": VISION, "text_config": TEXT | {"bos_token_id": 0, "eos_token_id": 2}}
BLIP_TEXT = TWO_TOWERS["text_config"] | {"encoder_hidden_size": 32, "sep_token_id": 2}
BLIP = {"vision_config": VISION, "text_config": BLIP_TEXT}
PYRAMID = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
RESNET = PYRAMID | {"embedding_size": 8, "layer_type": "basic"}
SWIN = {"image_size": 48, "patch_size": 4, "embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 4]}
SWIN |= {"window_size": 3}
WAV2VEC2 = BLOCKS | {"conv_dim": [16] * 3, "conv_kernel": [10, 3, 3], "conv_stride": [5, 4, 4], "vocab_size": 32}
WAV2VEC2 |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 3}
LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
WHISPER = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
WHISPER |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 60, "num_mel_bins": 16}
WHISPER |= {"max_source_positions": 50, "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1}

SIDE = {"height": 48, "width": 48}
RESIZED = {"size": SIDE}
CROPPED = {"size": {"shortest_edge": 48}, "crop_size": SIDE}
RESIZED_AND_CROPPED = {"size": {"height": 54, "width": 54}, "crop_size": SIDE}  # DeiT
INCOMPLETE = {"size": {"height": 50, "width": 50}}  # incomplete patches of 8 are dropped
SHORT_EDGE = {"size": {"shortest_edge": 96}}
TOKENS = {"bert": "[PAD] [UNK] [CLS] [SEP] [MASK]", "roberta": "<s> <pad> </s> <unk> <mask>", "t5": "<pad> </s> <unk>"}

# Model class, config, submodule of the encoder, processor; of images also its options, grid and number of prefix
# tokens; of texts the kind of tokenizer and its special tokens; of audio the options of the extractor.
IMAGE_FAMILIES = {
    "vit": ("ViTForImageClassification", VISION, "vit", "ViTImageProcessor", RESIZED, (6, 6), 1),
    "deit": ("DeiTModel", VISION, "", "DeiTImageProcessor", RESIZED_AND_CROPPED, (6, 6), 2),
    "beit": ("BeitModel", VISION | {"use_relative_position_bias": True}, "", "BeitImageProcessor", RESIZED, (6, 6), 1),
    "dinov2": ("Dinov2Model", VISION | {"image_size": 64}, "", "BitImageProcessor", CROPPED, (6, 6), 1),
    "dinov2-registers": ("Dinov2WithRegistersModel", VISION, "", "BitImageProcessor", CROPPED, (6, 6), 5),
    "dinov3": (
        "DINOv3ViTModel",
        VISION | {"num_register_tokens": 4},
        "",
        "DINOv3ViTImageProcessor",
        RESIZED,
        (6, 6),
        5,
    ),
    "clip": ("CLIPModel", TWO_TOWERS, "vision_model", "CLIPImageProcessor", CROPPED, (6, 6), 1),
    "clip-vision": ("CLIPVisionModel", VISION, "", "CLIPImageProcessor", CROPPED, (6, 6), 1),
    "siglip": ("SiglipModel", TWO_TOWERS, "vision_model", "SiglipImageProcessor", RESIZED, (6, 6), 0),
    "siglip-vision": (
        "SiglipVisionModel",
        VISION | {"image_size": 50},
        "",
        "SiglipImageProcessor",
        INCOMPLETE,
        (6, 6),
        0,
    ),
    "blip": ("BlipForConditionalGeneration", BLIP, "vision_model", "BlipImageProcessor", RESIZED, (6, 6), 1),
    "blip-vision": ("BlipVisionModel", VISION, "", "BlipImageProcessor", RESIZED, (6, 6), 1),
    "swin": ("SwinForImageClassification", SWIN, "swin", "ViTImageProcessor", RESIZED, (3, 3), 0),
    "convnext": (
        "ConvNextForImageClassification",
        PYRAMID,
        "convnext",
        "ConvNextImageProcessor",
        SHORT_EDGE,
        (3, 3),
        0,
    ),
    "convnextv2": ("ConvNextV2Model", PYRAMID, "", "ConvNextImageProcessor", SHORT_EDGE, (3, 3), 0),
    "resnet": ("ResNetForImageClassification", RESNET, "resnet", "ConvNextImageProcessor", SHORT_EDGE, (3, 3), 0),
}
DEBERTA = TEXT | {"relative_attention": True, "position_biased_input": False, "pos_att_type": "c2p|p2c"}
DEBERTA_V2 = DEBERTA | {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}
DISTIL = {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 48, "vocab_size": 320, "max_position_embeddings": 20}
ELECTRA = TEXT | {"embedding_size": 16}
MODERNBERT = TEXT | {"pad_token_id": 0, "local_attention": 8, "global_attn_every_n_layers": 2}
T5_GATED = T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
TEXT_FAMILIES = {
    "bert": ("BertForMaskedLM", TEXT, "bert", "BertTokenizer", "wordpiece", "bert"),
    "roberta": ("RobertaForMaskedLM", ROBERTA, "roberta", "RobertaTokenizer", "bpe", "roberta"),
    "xlm-roberta": ("XLMRobertaModel", ROBERTA, "", "XLMRobertaTokenizer", "unigram", "roberta"),
    "electra": ("ElectraForPreTraining", ELECTRA, "electra", "ElectraTokenizer", "wordpiece", "bert"),
    "mpnet": ("MPNetModel", ROBERTA, "", "MPNetTokenizer", "wordpiece", "roberta"),
    "distilbert": ("DistilBertForMaskedLM", DISTIL, "distilbert", "DistilBertTokenizer", "wordpiece", "bert"),
    "deberta": ("DebertaModel", DEBERTA, "", "DebertaTokenizer", "bpe", "bert"),
    "deberta-v2": ("DebertaV2ForMaskedLM", DEBERTA_V2, "deberta", "DebertaV2Tokenizer", "unigram", "bert"),
    "modernbert": ("ModernBertModel", MODERNBERT, "", "PreTrainedTokenizerFast", "bpe", "bert"),
    "t5": ("T5ForConditionalGeneration", T5, "encoder", "T5Tokenizer", "unigram", "t5"),
    "t5-v1.1": ("T5ForConditionalGeneration", T5_GATED, "encoder", "T5Tokenizer", "unigram", "t5"),
    "t5-encoder": ("T5EncoderModel", T5, "", "T5Tokenizer", "unigram", "t5"),
    "mt5": ("MT5ForConditionalGeneration", T5, "encoder", "T5Tokenizer", "unigram", "t5"),
    "clip-text": ("CLIPModel", TWO_TOWERS, "text_model", "CLIPTokenizer", "bpe", "roberta"),
}
MEL_BANDS = {"feature_size": 16, "chunk_length": 1}
WITH_MASK = {"return_attention_mask": True}
AUDIO_FAMILIES = {
    "whisper": ("WhisperForConditionalGeneration", WHISPER, "model.encoder", "WhisperFeatureExtractor", MEL_BANDS),
    "whisper-model": ("WhisperModel", WHISPER, "encoder", "WhisperFeatureExtractor", MEL_BANDS),
    "wav2vec2": ("Wav2Vec2ForCTC", WAV2VEC2, "wav2vec2", "Wav2Vec2FeatureExtractor", {}),
    "wav2vec2-large": ("Wav2Vec2Model", WAV2VEC2 | LAYER_NORM, "", "Wav2Vec2FeatureExtractor", WITH_MASK),
    "hubert": ("HubertModel", WAV2VEC2, "", "Wav2Vec2FeatureExtractor", {}),
    "hubert-large": ("HubertForCTC", WAV2VEC2 | LAYER_NORM, "hubert", "Wav2Vec2FeatureExtractor", WITH_MASK),
    "wavlm": ("WavLMModel", WAV2VEC2, "", "Wav2Vec2FeatureExtractor", {}),
    "wavlm-large": ("WavLMModel", WAV2VEC2 | LAYER_NORM, "", "Wav2Vec2FeatureExtractor", WITH_MASK),
}
ALL = {**IMAGE_FAMILIES, **TEXT_FAMILIES, **AUDIO_FAMILIES}
PYRAMIDS = ("swin", "convnext", "convnextv2", "resnet")
SENTENCES = ["a dog", "", "what is the dog doing?", "Zö 🐈, "]
CORPUS = ["a dog runs on the beach", "what is the dog doing?", "the cat sits on a mat. It sleeps, quietly!"] * 4


DEFAULT_RUN = "vit clip siglip dinov2-registers swin bert roberta deberta t5 whisper wav2vec2 wav2vec2-large"


def params(table):
    """Parameters for each family, of which those outside the default run are marked as families."""
    return [pytest.param(name, marks=[] if name in DEFAULT_RUN.split() else pytest.mark.families) for name in table]


@cache
def root():
    return Path(mkdtemp(prefix="pretrained-"))


@cache
def folder(name):
    """The folder of a family. Noise is added to the weights: norms of one and biases of zero would hide errors."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model_class, fields, _, processor, *options = ALL[name]
    config = getattr(transformers, model_class).config_class(**fields)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model = getattr(transformers, model_class)(config)
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    path = root() / name
    model.save_pretrained(path)
    if name in TEXT_FAMILIES:
        save_tokenizer(path, processor, *options)
    else:
        getattr(transformers, processor)(**options[0]).save_pretrained(path)
    return path


def save_tokenizer(path, tokenizer_class, algorithm, family):
    """A tokenizer trained on a few sentences, as tokenizer.json and tokenizer_config.json."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    special = TOKENS[family].split()
    options = {"special_tokens": special, "show_progress": False}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model, pre_tokenizer, trainer = {
        "wordpiece": lambda: (
            models.WordPiece(unk_token=special[1]),
            pre_tokenizers.BertPreTokenizer(),
            trainers.WordPieceTrainer(vocab_size=120, **options),
        ),
        "bpe": lambda: (
            models.BPE(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, **options),
        ),
        "unigram": lambda: (
            models.Unigram(),
            pre_tokenizers.Metaspace(),
            trainers.UnigramTrainer(vocab_size=100, unk_token=special[-1], **options),
        ),
    }[algorithm]()
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if algorithm == "wordpiece":
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.train_from_iterator(CORPUS, trainer)
    template = {"bert": "[CLS] $A [SEP]", "roberta": "<s> $A </s>", "t5": "$A </s>"}[family]
    added = [(token, tokenizer.token_to_id(token)) for token in template.split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=added)
    tokenizer.save(str(path / "tokenizer.json"))
    roles = {"bert": "pad unk cls sep mask", "roberta": "bos pad eos unk mask", "t5": "pad eos unk"}[family].split()
    named = {f"{role}_token": token for role, token in zip(roles, special, strict=True)}
    length = {} if family == "t5" else {"model_max_length": 20}
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class, **length, **named}))


@cache
def hf_encoder(name):
    """The encoder of the saved model, as transformers loads it."""
    import transformers

    model_class, _, path, *_ = ALL[name]
    return getattr(transformers, model_class).from_pretrained(folder(name)).eval().get_submodule(path)


def load(name, **options):
    tower = {"tower": "text"} if name == "clip-text" else {}
    max_length = {"max_length": 20} if "t5" in name else {}
    return PretrainedEncoder(PretrainedEncoder.Options(name=str(folder(name)), **tower | max_length | options)).eval()


def encode(encoder, inputs):
    with torch.no_grad():
        features = encoder(encoder.collate([encoder.prepare(raw) for raw in inputs]))
        return check_features(features, encoder, "kit", torch.device("cpu"))


def as_slots(states):
    """A feature map [B, C, rows, columns] as slots [B, S, C]."""
    return states.flatten(2).transpose(1, 2) if states.ndim == 4 else states


def random_image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def audio_samples():
    generator = torch.Generator().manual_seed(1)
    return [(0.1 * torch.randn(n, generator=generator), SAMPLING_RATE) for n in (4000, 9000, 4000, 40, 16_000, 15_000)]


def raw_inputs(name):
    if name in IMAGE_FAMILIES:
        return [random_image(70, 50), random_image(50, 70, 1)]
    return SENTENCES if name in TEXT_FAMILIES else audio_samples()


def clean_up():
    """Remove all folders and cached models."""
    shutil.rmtree(root(), ignore_errors=True)
    for cached in (root, folder, hf_encoder):
        cached.cache_clear()
