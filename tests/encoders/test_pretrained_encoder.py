"""Encoders of transformers: the same states as there, independence of the batch, order of the grid, rebuilding."""

import json
import os
import shutil
import subprocess
import sys

import hf_cases
import numpy as np
import pytest
import torch
import yaml
from hf_cases import (
    ADDRESS,
    ALL,
    AUDIO_FAMILIES,
    CLOSE,
    IMAGE_FAMILIES,
    PYRAMIDS,
    SAMPLING_RATE,
    SENTENCES,
    TEXT_FAMILIES,
    as_slots,
    audio_samples,
    encode,
    folder,
    hf_encoder,
    load,
    params,
    random_image,
    raw_inputs,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from mmx.config.loader import dump_config, parse_config
from mmx.config.schema import ProjectionConfig, SourceConfig
from mmx.encoders.pretrained import HF_FAMILIES, TOWERS, PretrainedEncoder
from mmx.errors import AudioError, EncoderError, ImageError, MmxError
from mmx.io.images import load_image
from mmx.models.checkpoint import load_model, save_model, unique_tensors
from mmx.testing import tiny_model
from mmx.testing.conformance import check_encoder

INPUT_NAMES = {  # our tensors to the arguments of transformers
    "pixels": "pixel_values",
    "tokens": "input_ids",
    "mask": "attention_mask",
    "samples": "input_values",
    "spectrum": "input_features",
}


@pytest.fixture(autouse=True, scope="module")
def _single_thread_and_cleanup():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small are slower with several threads
    yield
    torch.set_num_threads(threads)
    hf_cases.clean_up()


@pytest.mark.families
def test_every_family_is_tested():
    assert {hf_encoder(name).config.model_type for name in ALL} == set(HF_FAMILIES)
    whole = {json.loads((folder(name) / "config.json").read_text())["model_type"] for name in ALL}
    assert set(TOWERS) <= whole
    assert {HF_FAMILIES[hf_encoder(name).config.model_type].modality for name in AUDIO_FAMILIES} == {"audio"}


# ---- images


@pytest.mark.parametrize("name", params(IMAGE_FAMILIES))
def test_image_states_equal_those_of_transformers(name):
    from transformers import AutoImageProcessor

    encoder = load(name)
    processor = AutoImageProcessor.from_pretrained(folder(name))
    grid, num_prefix = IMAGE_FAMILIES[name][-2:]
    images = [random_image(*size) for size in ((70, 50), (50, 70), (300, 20), (5, 5))]
    images.append(Image.new("LA", (64, 64)))
    expected = []
    for image in images:
        pixels = processor(load_image(image), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(encoder.prepare(image)["pixels"], pixels), "exactly: it is the same processor"
        expected.append(pixels)
    features = encode(encoder, images)
    with torch.no_grad():
        states = as_slots(hf_encoder(name)(torch.stack(expected)).last_hidden_state)
    torch.testing.assert_close(features.states, states, **CLOSE)
    assert features.grid == grid
    assert features.states.shape == (5, num_prefix + grid[0] * grid[1], encoder.width)
    assert features.mask.all()
    assert (encoder.modality, encoder.dimensions) == ("image", 2)


@pytest.mark.parametrize("name", params(IMAGE_FAMILIES))
def test_cell_depends_most_on_its_own_patch(name):
    """Measured by the gradient of a cell's energy, with random weights."""
    encoder = load(name)
    is_convolutional = name.startswith(("convnext", "resnet"))
    side = 192 if is_convolutional else encoder.prepare(random_image(60, 60))["pixels"].shape[-1]
    pixels = torch.randn(4, 3, side, side, requires_grad=True)
    features = encoder({"pixels": pixels})
    rows, columns = features.grid
    states = features.states[:, -rows * columns :].unflatten(1, (rows, columns))
    patch = side // rows
    tolerance = 1 if name == "resnet" else 0  # of six cells; untrained convolutions see further
    for row, column in [(0, columns - 1), (rows - 1, 0), (rows // 2, columns // 2), (1, 0)]:
        energy = states[:, row, column].square().sum()
        (gradient,) = torch.autograd.grad(energy, pixels, retain_graph=True)
        influence = gradient.square().sum((0, 1))[: patch * rows, : patch * columns]
        influence = influence.unflatten(0, (rows, patch)).unflatten(2, (columns, patch)).sum((1, 3))
        found = divmod(int(influence.argmax()), columns)
        assert abs(found[0] - row) <= tolerance, (found, (row, column))
        assert abs(found[1] - column) <= tolerance, (found, (row, column))


def test_very_long_image_is_cropped_before_resizing(monkeypatch):
    """Resized by its short side, a line of pixels would have 48 x 960,000 pixels. Its middle has the same result."""
    encoder = load("clip")
    processor = encoder.adapter.processor
    sizes = []

    def record(image, **arguments):
        sizes.append(image.size)
        return processor(image, **arguments)

    monkeypatch.setattr(encoder.adapter, "processor", record)
    line = Image.new("RGB", (20_000, 1), "red")
    line.paste("blue", (9_000, 0, 11_000, 1))
    assert torch.equal(encoder.prepare(line)["pixels"], encoder.prepare(Image.new("RGB", (50, 50), "blue"))["pixels"])
    tall = random_image(40, 1501)
    middle = tall.crop((0, 400, 40, 1101))
    torch.testing.assert_close(encoder.prepare(tall), encoder.prepare(middle), atol=0.05, rtol=0)
    encoder.prepare(random_image(640, 40))
    assert sizes == [(16, 1), (50, 50), (40, 640), (40, 640), (640, 40)]


@pytest.mark.parametrize("raw", [b"", "missing.png", 3])
def test_invalid_image_is_an_error(raw):
    with pytest.raises(ImageError):
        load("vit").prepare(raw)


# ---- texts


@pytest.mark.parametrize("name", params(TEXT_FAMILIES))
def test_text_states_equal_those_of_transformers_alone_and_in_a_batch(name):
    from transformers import AutoTokenizer

    encoder = load(name)
    tokenizer = AutoTokenizer.from_pretrained(folder(name))
    expected = [tokenizer(text)["input_ids"] for text in SENTENCES]
    assert [encoder.prepare(text)["tokens"].tolist() for text in SENTENCES] == expected
    batched = encode(encoder, SENTENCES)
    for row, ids in enumerate(expected):
        mask = torch.ones(1, len(ids), dtype=torch.long)
        with torch.no_grad():
            states = hf_encoder(name)(input_ids=torch.tensor([ids]), attention_mask=mask).last_hidden_state[0]
        alone = encode(encoder, [SENTENCES[row]])
        assert batched.mask[row].tolist() == [True] * len(ids) + [False] * (batched.mask.shape[1] - len(ids))
        torch.testing.assert_close(batched.states[row, : len(ids)], states, **CLOSE)
        torch.testing.assert_close(batched.states[row, : len(ids)], alone.states[0], **CLOSE)
    assert (encoder.modality, encoder.dimensions, encoder.width) == ("text", 1, 32)


@pytest.mark.parametrize("name", params(["bert", "roberta", "deberta", "deberta-v2", "t5", "modernbert", "clip-text"]))
def test_tokens_in_padding_do_not_change_states(name):
    encoder = load(name)
    batch = encoder.collate([encoder.prepare(text) for text in SENTENCES])
    extra = 7 if "t5" in name else 0  # T5 has no limit, so that the padding can be longer
    longer = {key: nn.functional.pad(tensor, (0, extra)) for key, tensor in batch.items()}
    changed = {**longer, "tokens": torch.where(longer["mask"], longer["tokens"], 7)}
    with torch.no_grad():
        expected = encoder(batch).states[batch["mask"]]
        found = encoder(changed).states[changed["mask"]]
    torch.testing.assert_close(expected, found, **CLOSE)


def length_limit(encoder):
    """The number of tokens that a refused text may have, by its error."""
    with pytest.raises(MmxError) as caught:
        encoder.prepare("dog " * 999)
    assert caught.value.code == "text.too_long"
    assert caught.value.details["length"] >= 999
    return caught.value.details["maximum"]


def test_texts_longer_than_the_model_or_max_length_are_refused(tmp_path):
    unlimited = tmp_path / "unlimited"
    shutil.copytree(folder("roberta"), unlimited)
    config = json.loads((unlimited / "tokenizer_config.json").read_text())
    del config["model_max_length"]
    (unlimited / "tokenizer_config.json").write_text(json.dumps(config))

    def limit(**options):
        encoder = PretrainedEncoder(PretrainedEncoder.Options(name=str(unlimited), **options))
        return length_limit(encoder)

    assert limit() == 20, "22 positions, of which 2 are reserved for padding"
    assert limit(max_length=7) == 7
    with pytest.raises(EncoderError) as caught:
        limit(max_length=21)
    assert caught.value.code == "encoder.max_length"
    assert (caught.value.details["given"], caught.value.details["expected"]) == (21, 20)
    assert length_limit(load("t5", max_length=None)) == 512, "T5 has no limit"
    assert length_limit(load("t5", max_length=600)) == 600


def test_vocabulary_without_tokenizer_json(tmp_path):
    """The first file format of BERT."""
    old = tmp_path / "old"
    shutil.copytree(folder("bert"), old)
    vocab = json.loads((old / "tokenizer.json").read_text())["model"]["vocab"]
    (old / "tokenizer.json").unlink()
    (old / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.get)))
    options = PretrainedEncoder.Options(name=str(old))
    encoder = PretrainedEncoder(options)
    for text in SENTENCES:
        assert torch.equal(encoder.prepare(text)["tokens"], load("bert").prepare(text)["tokens"])
    (old / "vocab.txt").unlink()
    with pytest.raises(EncoderError) as caught:
        PretrainedEncoder(options)
    assert (caught.value.code, caught.value.details["what"]) == ("encoder.unreadable", "Tokenizer")


def test_rebuilt_text_encoder_needs_its_tokenizer(tmp_path):
    encoder = load("roberta")
    rebuilt = PretrainedEncoder(encoder.options)
    with pytest.raises(EncoderError) as caught:
        rebuilt.prepare("a dog")
    assert caught.value.code == "encoder.no_tokenizer"
    with pytest.raises(EncoderError) as caught:
        rebuilt.load_files(tmp_path)
    assert (caught.value.code, caught.value.details["what"]) == ("encoder.unreadable", "tokenizer")
    rebuilt.save_files(tmp_path)
    assert list(tmp_path.iterdir()) == []
    encoder.save_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    rebuilt.load_files(tmp_path)
    for text in SENTENCES:
        assert torch.equal(rebuilt.prepare(text)["tokens"], encoder.prepare(text)["tokens"])


# ---- audio


@pytest.mark.parametrize("name", params(AUDIO_FAMILIES))
def test_audio_states_equal_those_of_transformers_alone_and_in_a_batch(name):
    from transformers import AutoFeatureExtractor

    encoder = load(name)
    extractor = AutoFeatureExtractor.from_pretrained(folder(name))
    is_whisper = "whisper" in name
    batched = encode(encoder, audio_samples())
    for row, (samples, rate) in enumerate(audio_samples()):
        padded = samples if is_whisper else nn.functional.pad(samples, (0, max(0, 60 - len(samples))))
        extracted = extractor(padded.numpy(), sampling_rate=rate, return_tensors="pt")
        inputs = extracted["input_features" if is_whisper else "input_values"]
        prepared = encoder.prepare((samples, rate))["spectrum" if is_whisper else "samples"]
        assert torch.equal(prepared, inputs[0]), "exactly: it is the same extractor"
        with torch.no_grad():
            states = hf_encoder(name)(inputs).last_hidden_state[0]
        alone = encode(encoder, [(samples, rate)])
        slots = len(states)
        assert batched.mask[row].tolist() == [True] * slots + [False] * (batched.mask.shape[1] - slots)
        torch.testing.assert_close(batched.states[row, :slots], states, **CLOSE)
        torch.testing.assert_close(batched.states[row, :slots], alone.states[0], **CLOSE)
    assert (encoder.modality, encoder.dimensions, encoder.width) == ("audio", 1, 32)


def test_whisper_encodes_its_whole_window():
    encoder = load("whisper")
    samples = 0.1 * torch.randn(80_000, generator=torch.Generator().manual_seed(1))
    short, whole, padded = (encode(encoder, [(samples[:n], SAMPLING_RATE)]) for n in (4000, 16_000, 16_800))
    assert short.mask.all(), "silence after the audio may be attended"
    assert short.states.shape == (1, 50, 32)
    assert torch.equal(whole.states, padded.states), "the padding of a compressed file"
    with pytest.raises(AudioError) as caught:
        encoder.prepare((samples, SAMPLING_RATE))
    assert caught.value.code == "audio.too_long"
    assert caught.value.details == {"seconds": 5.0, "maximum": 1.0}


@pytest.mark.parametrize(("name", "differs"), [("wav2vec2", True), ("wav2vec2-large", False)])
def test_norms_over_time_need_separate_lengths(name, differs):
    """One padded batch changes the states of models that normalize over time, and no others."""
    inputs = audio_samples()[:2]
    encoder = load(name)
    batch = encoder.collate([encoder.prepare(raw) for raw in inputs])
    with torch.no_grad():
        padded = hf_encoder(name)(batch["samples"], attention_mask=batch["mask"].long()).last_hidden_state[0]
    alone = encode(encoder, inputs[:1]).states[0]
    assert ((padded[: len(alone)] - alone).abs().max() > 1e-2) == differs


def test_audio_from_path_bytes_and_samples(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    samples, rate = audio_samples()[0]
    path = tmp_path / "a.wav"
    soundfile.write(path, samples.numpy(), rate, subtype="FLOAT")
    encoder = load("wav2vec2")
    expected = encoder.prepare((samples, rate))["samples"]
    assert torch.equal(encoder.prepare(path)["samples"], expected)
    assert torch.equal(encoder.prepare(path.read_bytes())["samples"], expected)
    with pytest.raises(AudioError):
        encoder.prepare(str(tmp_path / "missing.wav"))


def test_training_uses_no_spec_augment():
    """The published configs enable it; it draws numpy's random numbers and fails on short audio. Dropout stays."""
    encoder = load("wav2vec2").train()
    before = np.random.get_state()[1].copy()
    batch = encoder.collate([encoder.prepare((torch.ones(80), SAMPLING_RATE))])
    assert torch.isfinite(encoder(batch).states).all()
    assert (np.random.get_state()[1] == before).all()
    assert not [key for key in encoder.state_dict() if "masked_spec_embed" in key]


# ---- all modalities


@pytest.mark.parametrize("name", params(ALL))
def test_encoder_is_rebuilt_from_options_and_tensors_without_files(name, tmp_path):
    encoder = load(name)
    inputs = raw_inputs(name)
    expected = encode(encoder, inputs)
    assert encoder.options.name is None, "a local path means nothing on another computer"
    options = parse_config(yaml.safe_load(dump_config(encoder.options)), PretrainedEncoder.Options, where="options")
    assert options == encoder.options
    encoder.save_files(tmp_path)
    hidden = folder(name).rename(tmp_path / "hidden")
    try:
        torch.manual_seed(99)
        rebuilt = PretrainedEncoder(options)
    finally:
        hidden.rename(folder(name))
    assert all(module.training for module in rebuilt.modules())
    rebuilt.eval()
    assert unique_tensors(rebuilt.state_dict()).keys() == unique_tensors(encoder.state_dict()).keys()
    rebuilt.load_files(tmp_path)
    rebuilt.load_state_dict(encoder.state_dict(), strict=True)
    found = encode(rebuilt, inputs)
    torch.testing.assert_close(found.states, expected.states, atol=1e-6, rtol=1e-6)  # memory alignment may differ
    assert torch.equal(found.mask, expected.mask)
    assert found.grid == expected.grid
    assert rebuilt.options == options


@pytest.mark.parametrize("name", params(name for name in ALL if name not in PYRAMIDS))
def test_layer_selects_a_hidden_state(name):
    whole = load(name)
    batch = whole.collate([whole.prepare(raw) for raw in raw_inputs(name)[:2]])
    if "samples" in batch:  # one row without padding, so that transformers needs no mask
        length = int(batch["mask"][0].sum())
        batch = {key: tensor[:1, :length] for key, tensor in batch.items()}
    inputs = {}
    for key, tensor in batch.items():
        if key != "window":  # where the image is cropped, not an input of the model
            inputs[INPUT_NAMES[key]] = tensor.long() if key == "mask" else tensor
    if "samples" in batch:
        del inputs["attention_mask"]
    with torch.no_grad():
        hidden_states = hf_encoder(name)(**inputs, output_hidden_states=True).hidden_states
    num_weights = sum(parameter.numel() for parameter in whole.parameters())
    for layer, num_layers in [(1, 1), (-2, 2)]:
        encoder = load(name, layer=layer)
        with torch.no_grad():
            features = encoder(batch)
        expected = hidden_states[num_layers][features.mask]
        torch.testing.assert_close(features.states[features.mask], expected, **CLOSE)
        assert encoder.options.layer == num_layers
        assert sum(parameter.numel() for parameter in encoder.parameters()) < num_weights
        rebuilt = PretrainedEncoder(encoder.options)
        rebuilt.load_state_dict(encoder.state_dict())


@pytest.mark.parametrize("name", params(PYRAMIDS))
def test_layer_of_a_pyramid_selects_a_stage(name):
    outputs = []
    stage = "encoder.layers.1.blocks.0" if name == "swin" else "encoder.stages.1"
    hook = hf_encoder(name).get_submodule(stage).register_forward_hook(lambda *call: outputs.append(call[2]))
    encoder = load(name, layer=2)
    pixels = encoder.prepare(random_image(60, 60))["pixels"][None]
    with hook, torch.no_grad():
        features = encoder({"pixels": pixels})
        hf_encoder(name)(pixels)
    states = as_slots(outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0])
    torch.testing.assert_close(features.states, states, **CLOSE)
    assert features.grid == ((6, 6) if name == "swin" else (12, 12))
    assert encoder.width == states.shape[-1]


FINAL_NORMS = {
    "vit": "layernorm",
    "siglip": "post_layernorm",
    "whisper": "layer_norm",
    "t5": "final_layer_norm",
    "wav2vec2-large": "encoder.layer_norm",
}


@pytest.mark.parametrize("name", FINAL_NORMS)
def test_last_layer_is_before_the_final_norm(name):
    inputs = raw_inputs(name)[:1]
    last_layer = encode(load(name, layer=-1), inputs).states
    whole = encode(load(name), inputs).states
    with torch.no_grad():
        normalized = hf_encoder(name).get_submodule(FINAL_NORMS[name])(last_layer)
    torch.testing.assert_close(normalized, whole, **CLOSE)
    assert not torch.allclose(last_layer, whole, atol=0.1)


@pytest.mark.parametrize("name", ["vit", "bert", "clip", "siglip", "blip", "whisper", "wav2vec2", "t5"])
def test_unused_modules_are_removed(name):
    """No module is left that does not affect the states, so every trainable parameter gets a gradient."""
    unused = {"pooler", "head", "classifier", "decoder", "text_model", "visual_projection", "logit_scale", "adapter"}
    encoder = load(name)
    assert not [key for key in encoder.state_dict() if unused & set(key.split("."))]
    batch = encoder.collate([encoder.prepare(raw) for raw in raw_inputs(name)[:2]])
    encoder(batch).states.square().sum().backward()
    trainable = {key: parameter for key, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert not [key for key, parameter in trainable.items() if parameter.grad is None]


def test_mask_token_is_frozen():
    assert not load("dinov2-registers").model.embeddings.mask_token.requires_grad


def test_half_precision_weights_become_float32(tmp_path):
    half = tmp_path / "half"
    shutil.copytree(folder("vit"), half)
    tensors = load_file(half / "model.safetensors")
    save_file({key: tensor.half() for key, tensor in tensors.items()}, half / "model.safetensors", {"format": "pt"})
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    encoder = PretrainedEncoder(PretrainedEncoder.Options(name=str(half))).eval()
    assert {tensor.dtype for tensor in encoder.state_dict().values()} == {torch.float32}
    expected = encode(load("vit"), [random_image(50, 50)]).states
    found = encode(encoder, [random_image(50, 50)]).states
    assert (found - expected).abs().max() < 5e-3, "the rounding of float16"


def test_sharded_weights(tmp_path):
    import transformers

    transformers.ViTModel.from_pretrained(folder("vit")).save_pretrained(tmp_path, max_shard_size="20KB")
    shutil.copy(folder("vit") / "preprocessor_config.json", tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    encoder = PretrainedEncoder(PretrainedEncoder.Options(name=str(tmp_path))).eval()
    inputs = [random_image(50, 50)]
    assert torch.equal(encode(encoder, inputs).states, encode(load("vit"), inputs).states)


def test_deberta_computes_in_float32_under_autocast():
    """It fills masked scores with the lowest float32, which bfloat16 cannot represent."""
    encoder = load("deberta")
    expected = encode(encoder, SENTENCES)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode(encoder, SENTENCES).states, expected.states)


def test_accepts():
    paths = ("a/B.JPG", "a.FLAC", "a.txt", "a")
    for name, accepted in {"vit": ["a/B.JPG"], "bert": [], "whisper": ["a.FLAC"]}.items():
        encoder = load(name)
        assert [path for path in paths if encoder.accepts(path)] == accepted


def test_loading_prints_nothing_and_restores_verbosity(capfd):
    from transformers.utils import logging

    folder("clip")
    verbosity = logging.get_verbosity()
    try:
        logging.set_verbosity_info()
        load("clip")
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(verbosity)
    output = capfd.readouterr()
    assert output.out + output.err == ""


@pytest.mark.parametrize("name", ["clip", "t5", "wav2vec2"])
def test_checkpoint_contains_the_whole_encoder(name, tmp_path):
    options = {"name": str(folder(name))} | ({"max_length": 20} if name == "t5" else {})
    source = SourceConfig(encoder=ADDRESS, options=options, projection=ProjectionConfig(positions="sinusoidal"))
    model = tiny_model({"source": source})
    save_model(tmp_path / "checkpoint", model)
    hidden = folder(name).rename(tmp_path / "hidden")
    try:
        loaded = load_model(tmp_path / "checkpoint")
    finally:
        hidden.rename(folder(name))
    inputs = raw_inputs(name)[:2]
    expected = encode(model.encoder("source"), inputs)
    found = encode(loaded.encoder("source"), inputs)
    torch.testing.assert_close(found.states, expected.states, atol=1e-6, rtol=1e-6)
    assert torch.equal(found.mask, expected.mask)
    assert found.grid == expected.grid


def test_conformance():
    """The checks that the tests above do not cover."""
    checks = ["options", "data_worker", "order", "deterministic", "gradients", "save_load", "grid", "bfloat16"]
    check_encoder(ADDRESS, options={"name": str(folder("clip"))}, only=checks)


@pytest.mark.families
@pytest.mark.parametrize("name", ALL)
def test_conformance_of_every_family(name):
    options = {"name": str(folder(name))} | ({"tower": "text"} if name == "clip-text" else {})
    reads_text = name == "clip-text" or name in TEXT_FAMILIES
    samples = ["a dog", "what is it?", "two cats"] if reads_text else None  # these models read up to 20 tokens
    check_encoder(ADDRESS, samples=samples, options=options)


@pytest.mark.slow
def test_downloaded_public_name(tmp_path):
    """It is read from the cache of the library without network; the name is kept as a note."""
    commit = "0123456789" * 4
    cache = tmp_path / "hub/models--someone--something"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text(commit)
    shutil.copytree(folder("bert"), cache / "snapshots" / commit)
    code = """
from mmx.encoders.pretrained import PretrainedEncoder as E
e = E(E.Options(name="someone/something"))
print(e.options.name, e.prepare("a dog")["tokens"].tolist(), E(e.options).width)
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    tokens = load("bert").prepare("a dog")["tokens"].tolist()
    assert run.stdout.strip() == f"someone/something {tokens} 32", run.stderr
