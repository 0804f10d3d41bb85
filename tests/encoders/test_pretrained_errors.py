"""Damaged folders and invalid options of the pretrained encoder, older file formats, and code in a folder."""

import json
import shutil

import hf_cases
import pytest
import torch
from hf_cases import ALL, SAMPLING_RATE, TEXT, VISION, encode, folder, load, random_image, raw_inputs
from safetensors.torch import load_file, save_file

from mmx.config.loader import parse_config
from mmx.encoders.pretrained import PretrainedEncoder
from mmx.errors import ConfigError, EncoderError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PROCESSOR = "preprocessor_config.json"


@pytest.fixture(autouse=True, scope="module")
def _clean_up():
    yield
    hf_cases.clean_up()


@pytest.fixture
def copy(tmp_path):
    """A copy of the folder of a ViT."""
    return shutil.copytree(folder("vit"), tmp_path / "copy")


def change_json(file, **fields):
    def change(path):
        content = json.loads((path / file).read_text())
        (path / file).write_text(json.dumps(content | fields))

    return change


def write(file, text):
    return lambda path: (path / file).write_text(text)


def remove(file):
    return lambda path: (path / file).unlink()


def rename(old, new):
    return lambda path: (path / old).rename(path / new)


def truncate_weights(path):
    file = path / WEIGHTS
    file.write_bytes(file.read_bytes()[:9000])


def remove_tensor(path):
    tensors = load_file(path / WEIGHTS)
    del tensors[next(key for key in tensors if ".layer.1." in key)]
    save_file(tensors, path / WEIGHTS, {"format": "pt"})


WITHOUT_CROP = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 48},
    "do_center_crop": False,
}
DAMAGES = {  # name: change of the folder, error code, what the message contains
    "no config": (remove(CONFIG), "encoder.file_missing", "config.json"),
    "no weights": (remove(WEIGHTS), "encoder.file_missing", "model.safetensors"),
    "only a pickle": (rename(WEIGHTS, "pytorch_model.bin"), "encoder.file_missing", "pickles (*.bin) may run code"),
    "truncated weights": (truncate_weights, "encoder.unreadable", "weights"),
    "empty weights": (write(WEIGHTS, ""), "encoder.unreadable", "weights"),
    "missing tensor": (remove_tensor, "encoder.missing_tensors", "layers.1."),
    "more layers": (change_json(CONFIG, num_hidden_layers=5), "encoder.missing_tensors", "layers.3."),
    "another hidden size": (change_json(CONFIG, hidden_size=64), "encoder.missing_tensors", "embeddings."),
    "no JSON": (write(CONFIG, "{"), "encoder.unreadable", "config"),
    "JSON list": (write(CONFIG, "[]"), "encoder.unreadable", "config"),
    "no model type": (change_json(CONFIG, model_type=None), "encoder.model_type", "beit, bert, "),
    "another model type": (change_json(CONFIG, model_type="gpt2"), "encoder.model_type", "'gpt2'"),
    "wrong type": (change_json(CONFIG, hidden_size="wide"), "encoder.unreadable", "vit architecture"),
    "no processor": (remove(PROCESSOR), "encoder.unreadable", "ImageProcessor"),
    "another size": (change_json(PROCESSOR, size={"height": 32, "width": 32}), "encoder.image_size", "[3, 32, 32]"),
    "any size": (change_json(PROCESSOR, **WITHOUT_CROP), "encoder.image_sizes", "[3, 48, 64] and [3, 64, 48]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_an_error(copy, damage):
    change, code, contained = DAMAGES[damage]
    change(copy)
    with pytest.raises(EncoderError) as caught:
        PretrainedEncoder(PretrainedEncoder.Options(name=str(copy)))
    assert caught.value.code == code
    assert contained in str(caught.value)
    assert "\n" not in str(caught.value)


UNKNOWN_CLASS = {"image_processor_type": "AutoModel"}
VIT = VISION | {"model_type": "vit"}
INVALID_OPTIONS = [  # options, error code, details
    ({}, "encoder.name_missing", {}),
    ({"name": "no/such-model"}, "encoder.not_found", {"name": "no/such-model"}),
    ({"name": "/no/such/folder"}, "encoder.not_found", {"name": "/no/such/folder"}),
    ({"name": "~nobody/x\0?"}, "encoder.not_found", {}),
    ({"name": "vit", "layer": 4}, "encoder.layer", {"given": 4, "num_layers": 3}),
    ({"name": "vit", "layer": 0}, "encoder.layer", {"given": 0, "num_layers": 3}),
    ({"name": "vit", "layer": -4}, "encoder.layer", {"given": -4, "num_layers": 3}),
    ({"name": "swin", "layer": 4}, "encoder.layer", {"given": 4, "num_layers": 3}),
    ({"name": "vit", "tower": "text"}, "encoder.tower", {"given": "text", "expected": ["image"]}),
    ({"name": "siglip", "tower": "text"}, "encoder.tower", {"given": "text", "expected": ["image"]}),
    ({"architecture": {"model_type": "gpt2"}}, "encoder.model_type", {"given": "gpt2"}),
    ({"architecture": VIT}, "encoder.unknown_class", {"name": None, "expected": "ImageProcessor"}),
    ({"architecture": VIT, "preprocessing": UNKNOWN_CLASS}, "encoder.unknown_class", {"name": "AutoModel"}),
    (
        {"architecture": TEXT | {"model_type": "bert", "hidden_size": 31}},
        "encoder.unreadable",
        {"name": "options", "what": "architecture"},
    ),
]


@pytest.mark.parametrize(("options", "code", "details"), INVALID_OPTIONS)
def test_invalid_options_are_an_error(options, code, details):
    if options.get("name") in ALL:
        options = options | {"name": str(folder(options["name"]))}
    with pytest.raises(EncoderError) as caught:
        PretrainedEncoder(PretrainedEncoder.Options(**options))
    assert caught.value.code == code
    assert {key: caught.value.details[key] for key in details} == details
    assert "\n" not in str(caught.value)


def test_unknown_option_suggests_the_nearest():
    with pytest.raises(ConfigError, match="nmae.*did you mean 'name'"):
        parse_config({"nmae": "x"}, PretrainedEncoder.Options, where="model.sources.image.options")


def assert_same_states(path, name):
    encoder = PretrainedEncoder(PretrainedEncoder.Options(name=str(path))).eval()
    inputs = raw_inputs(name)
    assert torch.equal(encode(encoder, inputs).states, encode(load(name), inputs).states)


def test_older_config_with_generation_fields_and_older_image_processor(tmp_path):
    old_fields = {
        "add_cross_attention": False,
        "chunk_size_feed_forward": 0,
        "id2label": {"0": "LABEL_0"},
        "is_decoder": False,
        "max_length": 20,
        "num_beams": 1,
        "pruned_heads": {},
        "return_dict": True,
        "torch_dtype": "float32",
        "top_k": 50,
    }
    clip = shutil.copytree(folder("clip"), tmp_path / "clip")
    config = json.loads((clip / CONFIG).read_text())
    towers = {tower: config[tower] | old_fields for tower in ("vision_config", "text_config")}
    change_json(CONFIG, **towers, **old_fields, vision_config_dict=None, text_config_dict=None)(clip)
    processor = {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": 48,
        "crop_size": 48,
        "do_center_crop": True,
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (clip / PROCESSOR).write_text(json.dumps(processor))
    assert_same_states(clip, "clip")


def test_older_names_of_weight_norm(tmp_path):
    wav2vec2 = shutil.copytree(folder("wav2vec2"), tmp_path / "wav2vec2")
    tensors = load_file(wav2vec2 / WEIGHTS)
    older = {}
    for key, tensor in tensors.items():
        key = key.replace("parametrizations.weight.original0", "weight_g")
        older[key.replace("parametrizations.weight.original1", "weight_v")] = tensor
    assert older.keys() != tensors.keys()
    save_file(older, wav2vec2 / WEIGHTS, {"format": "pt"})
    processor = {"do_normalize": True, "feature_size": 1, "sampling_rate": SAMPLING_RATE}
    (wav2vec2 / PROCESSOR).write_text(json.dumps(processor))
    assert_same_states(wav2vec2, "wav2vec2")


def test_image_processor_within_a_processor_config(copy):
    processor = json.loads((copy / PROCESSOR).read_text())
    (copy / PROCESSOR).unlink()
    content = {"image_processor": processor, "processor_class": "Any"}
    (copy / "processor_config.json").write_text(json.dumps(content))
    assert_same_states(copy, "vit")


def test_code_in_a_folder_is_never_run(copy, tmp_path):
    """Names of code, kernels and files in the configs are ignored."""
    created = tmp_path / "created"
    (copy / "evil.py").write_text(f"open({str(created)!r}, 'w')\nclass Evil: pass\n")
    code = {"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoImageProcessor": "evil.Evil"}}
    change_json(CONFIG, **code, attn_implementation="evil/kernel", transformers_weights="../evil.bin")(copy)
    change_json(PROCESSOR, **code, image_processor_type="Evil")(copy)
    encoder = PretrainedEncoder(PretrainedEncoder.Options(name=str(copy))).eval()
    inputs = [random_image(50, 50)]
    assert torch.equal(encode(encoder, inputs).states, encode(load("vit"), inputs).states)
    assert not created.exists()
    assert "evil" not in encoder.options.model_dump_json().lower()


def test_files_are_downloaded_into_the_cache_of_the_environment(monkeypatch, tmp_path):
    """A name that is in this cache, as huggingface_hub lays it out, is found; without the variable it is not."""
    commit = "0" * 40
    repository = tmp_path / "models--anna--vit"
    shutil.copytree(folder("vit"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    options = PretrainedEncoder.Options(name="anna/vit")
    with pytest.raises(EncoderError) as caught:
        PretrainedEncoder(options)
    assert caught.value.code == "encoder.not_found"
    monkeypatch.setenv("MMX_CACHE", str(tmp_path))
    images = [random_image(70, 50)]
    found = encode(PretrainedEncoder(options).eval(), images)
    assert torch.equal(found.states, encode(load("vit"), images).states)
