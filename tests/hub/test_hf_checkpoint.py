"""Hugging Face checkpoints: whole, sharded, pickled, damaged, of unsupported families, with code in them."""

import json
import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from parity_cases import byte_tokenizer, load_error, rewrite_tensors, save_vit_gpt2, without
from safetensors.torch import load_file, save_file

from mmx.data.scenes import generate_scene, render_scene
from mmx.errors import CheckpointError, ConfigError, MmxError
from mmx.hub import FAMILIES, load_hf_model
from mmx.inference.pipeline import Pipeline, load
from mmx.models.checkpoint import load_model, save_model
from mmx.testing import tiny_model

WEIGHTS = "model.safetensors"
MLP = "decoder.transformer.h.0.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_vit_gpt2(tmp_path_factory.mktemp("checkpoint") / "whole")


@pytest.fixture
def copy(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture(scope="module")
def image():
    return render_scene(generate_scene(0, 3))


def rewrite_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_checkpoint_captions_directly_and_after_conversion(checkpoint, tmp_path, image):
    direct = load(checkpoint)
    model, generation, provenance = load_hf_model(str(checkpoint))
    folder = save_model(tmp_path / "ours", model, provenance, generation)
    converted = load(folder)
    assert direct.caption(image) == converted.caption(image) != ""
    assert (converted.generation, converted.model.config) == (direct.generation, direct.model.config)
    assert json.loads((folder / "provenance.json").read_text())["family"] == "vision-encoder-decoder gpt2"
    loaded = load_model(folder).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_unsupported_task_is_an_error(checkpoint, image):
    with pytest.raises(MmxError) as caught:
        load(checkpoint).ask(image, "what is this?")
    assert caught.value.code == "tokenizer.task"


def test_sharded_weights_are_read(copy, checkpoint):
    tensors = load_file(copy / WEIGHTS)
    names = sorted(tensors)
    half = len(names) // 2
    shards = {"a.safetensors": names[:half], "b.safetensors": names[half:]}
    weight_map = {}
    for file, shard in shards.items():
        save_file({name: tensors[name] for name in shard}, copy / file)
        weight_map |= dict.fromkeys(shard, file)
    (copy / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (copy / WEIGHTS).unlink()
    sharded = load_hf_model(str(copy)).model.state_dict()
    whole = load_hf_model(str(checkpoint)).model.state_dict()
    assert all(torch.equal(sharded[name], tensor) for name, tensor in whole.items())
    (copy / "b.safetensors").unlink()
    error = load_error(copy)
    assert (error.code, error.details["file"]) == ("hub.file_missing", "b.safetensors")


def test_half_precision_weights_become_float32(copy):
    rewrite_tensors(copy, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    assert {tensor.dtype for tensor in load_hf_model(str(copy)).model.state_dict().values()} == {torch.float32}


def test_unsupported_family_is_an_error_that_lists_the_supported_ones(copy):
    rewrite_config(copy, model_type="mllama", architectures=["MllamaForConditionalGeneration"], decoder=None)
    error = load_error(copy)
    assert error.code == "hub.family"
    assert "mllama" in error.details["given"]
    assert error.details["expected"] == list(FAMILIES)
    rewrite_config(copy, model_type=None, architectures=None)
    assert load_error(copy).details["given"] == "no model_type"


@pytest.mark.parametrize(
    "name",
    ["decoder.transformer.h.1.crossattention.c_attn.weight", "encoder.layernorm.bias"],
    ids=["decoder", "encoder"],
)
def test_missing_tensor_is_named(copy, name):
    rewrite_tensors(copy, without(name))
    error = load_error(copy)
    assert error.code in ("hub.missing_tensors", "encoder.missing_tensors")
    assert name.removeprefix("encoder.") in error.details["tensors"]


@pytest.mark.parametrize("name", ["decoder.transformer.h.0.adapter.weight", "encoder.extra.weight", "other"])
def test_unexpected_tensor_is_named(copy, name):
    rewrite_tensors(copy, lambda tensors: {**tensors, name: torch.ones(2)})
    error = load_error(copy)
    assert error.code in ("hub.unexpected_tensors", "encoder.unexpected_tensors")
    assert error.details["tensors"] == [name.removeprefix("encoder.")]


def test_misshapen_tensor_is_named(copy):
    rewrite_tensors(copy, lambda tensors: {**tensors, MLP: tensors[MLP][:, :-4]})
    error = load_error(copy)
    assert (error.code, error.details["tensor"]) == ("hub.tensor_shape", MLP)


@pytest.mark.parametrize("file", ["config.json", WEIGHTS, "tokenizer.json", "preprocessor_config.json"])
def test_missing_or_damaged_file_is_an_error(copy, file):
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[: len(content) // 2])
    damaged = load_error(copy)
    assert damaged.code in ("hub.damaged", "hub.unreadable", "encoder.unreadable")
    (copy / file).unlink()
    missing = load_error(copy)
    assert missing.code in ("hub.file_missing", "hub.unreadable", "encoder.unreadable")
    for error in (damaged, missing):
        assert file in str(error) or "tokenizer" in str(error)
        assert "download" in str(error)


def smaller_tokenizer(folder):
    byte_tokenizer(60, bos_token="<|endoftext|>", eos_token="<|endoftext|>").save_pretrained(folder)


def larger_tokenizer(folder):
    byte_tokenizer(91, bos_token="<|endoftext|>", eos_token="<|endoftext|>").save_pretrained(folder)


def tokenizer_without_end(folder):
    """Token 0, which ends the texts of the model, is a letter here."""
    tokenizer = byte_tokenizer(90, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = fields["model"]["vocab"]
    vocab["<|endoftext|>"], vocab["A"] = vocab["A"], 0
    fields["added_tokens"][0]["id"] = vocab["<|endoftext|>"]
    (folder / "tokenizer.json").write_text(json.dumps(fields))


TOKENIZERS = {  # details of the error
    smaller_tokenizer: {"size": 60, "expected": 90},
    larger_tokenizer: {"size": 91, "expected": 90},
    tokenizer_without_end: {"given": 0, "use": "bos"},
}


@pytest.mark.parametrize("change", TOKENIZERS)
def test_tokenizer_of_another_model_is_an_error(copy, change):
    change(copy)
    error = load_error(copy)
    assert error.code == "hub.tokenizer"
    assert error.details == {"name": str(copy), **TOKENIZERS[change]}


def test_folder_without_config_and_unknown_name(tmp_path):
    (tmp_path / "empty").mkdir()
    error = load_error(tmp_path / "empty")
    assert (error.code, error.details["file"]) == ("hub.file_missing", "config.json")
    error = load_error("nobody/has-this-model")
    assert (error.code, error.details["name"]) == ("hub.not_found", "nobody/has-this-model")
    with pytest.raises(CheckpointError):
        load(tmp_path / "empty")


def test_unsupported_configuration_is_an_error(copy):
    decoder = json.loads((copy / "config.json").read_text())["decoder"]
    rewrite_config(copy, decoder={**decoder, "scale_attn_by_inverse_layer_idx": True})
    error = load_error(copy)
    assert (error.code, error.details["key"]) == ("hub.unsupported_config", "scale_attn_by_inverse_layer_idx")
    rewrite_config(copy, decoder={**decoder, "activation_function": "sinc"})
    error = load_error(copy)
    assert (error.code, error.details["given"]) == ("hub.activation", "sinc")
    rewrite_config(copy, decoder={key: value for key, value in decoder.items() if key != "n_embd"})
    error = load_error(copy)
    assert error.code == "hub.config"
    assert "n_embd" in str(error)
    rewrite_config(copy, decoder={**decoder, "n_layer": 3})
    error = load_error(copy)
    assert error.code == "hub.missing_tensors"
    assert "h.2" in str(error)


# ---- pickles


class Exploit:
    """Creates a folder when it is unpickled."""

    def __init__(self, created):
        self.created = str(created)

    def __reduce__(self):
        return os.mkdir, (self.created,)


def replace_by_pickle(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def test_pickle_is_read_only_if_allowed(copy, checkpoint):
    replace_by_pickle(copy)
    error = load_error(copy)
    assert (error.code, error.details["file"]) == ("hub.pickle", "pytorch_model.bin")
    assert "--allow-pickle" in str(error)
    pickled = load_hf_model(str(copy), allow_pickled_weights=True).model.state_dict()
    whole = load_hf_model(str(checkpoint)).model.state_dict()
    assert all(torch.equal(pickled[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("content", ["exploit", "exploit in zip", "list", "truncated"])
def test_pickle_of_other_content_runs_nothing(copy, tmp_path, content):
    replace_by_pickle(copy)
    created = tmp_path / "created"
    path = copy / "pytorch_model.bin"
    if content == "exploit":
        path.write_bytes(pickle.dumps({"a": Exploit(created)}))
    elif content == "exploit in zip":
        torch.save({"a": Exploit(created)}, path)
    elif content == "list":
        torch.save([torch.ones(2)], path)
    else:
        path.write_bytes(path.read_bytes()[:1000])
    error = load_error(copy, allow_pickled_weights=True)
    assert (error.code, error.details["path"]) == ("hub.damaged", str(path))
    assert not created.exists()


# ---- generation settings and code in a folder


def test_pipeline_uses_the_published_generation_settings(copy):
    settings = {"num_beams": 4, "max_length": 17, "no_repeat_ngram_size": 3, "early_stopping": True}
    (copy / "generation_config.json").write_text(json.dumps(settings))
    pipeline = load(copy)
    generation = pipeline.generation
    assert isinstance(pipeline, Pipeline)
    assert (generation.num_beams, generation.max_new_tokens, generation.no_repeat_ngram_size) == (4, 16, 3)
    assert generation.early_stopping
    with pytest.raises(ConfigError):
        pipeline.generation_config({"num_beans": 2})


@pytest.mark.parametrize(
    ("fields", "code", "named"),
    [
        ({"suppress_tokens": [99999]}, "hub.token_id", "99999 for suppress_tokens"),
        ({"bad_words_ids": [[99999]]}, "hub.token_id", "99999"),
        ({"forced_eos_token_id": 99999}, "hub.token_id", "99999 for forced_eos_token_id"),
        ({"decoder_start_token_id": -1}, "hub.token_id", "-1 for the special token bos"),
        ({"eos_token_id": []}, "hub.config", "config.json"),
        ({"eos_token_id": [0, 82]}, "hub.unsupported_generation", "several eos_token_id"),
        ({"forced_bos_token_id": 3}, "hub.unsupported_generation", "forced_bos_token_id"),
        ({"bad_words_ids": [[3, 4]]}, "hub.unsupported_generation", "bad_words_ids of several tokens"),
        ({"num_beams": 1000000}, "hub.unreadable", "generation config"),
    ],
)
def test_invalid_generation_settings_are_an_error(copy, fields, code, named):
    (copy / "generation_config.json").write_text(json.dumps(fields))
    error = load_error(copy)
    assert error.code == code
    assert named in str(error)


def test_beam_sampling_becomes_beam_search(copy):
    (copy / "generation_config.json").write_text(json.dumps({"num_beams": 3, "do_sample": True}))
    generation = load_hf_model(str(copy)).generation
    assert (generation.num_beams, generation.do_sample) == (3, False)


@pytest.mark.parametrize("name", [MLP, "encoder.layernorm.bias"])
def test_values_that_are_not_finite_are_named(copy, name):
    def corrupt(tensors):
        tensors[name][0] = float("nan")
        return tensors

    rewrite_tensors(copy, corrupt)
    assert load_error(copy).code == "hub.not_finite"


@pytest.mark.parametrize("file", ["preprocessor_config.json", "tokenizer_config.json"])
def test_code_in_a_folder_is_never_run(copy, tmp_path, file, capsys):
    created = tmp_path / "created"
    (copy / "evil.py").write_text(f"import os\nos.mkdir({str(created)!r})\nclass Evil: pass\n")
    path = copy / file
    fields = json.loads(path.read_text())
    fields |= {"auto_map": {"AutoImageProcessor": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}}
    fields["image_processor_type" if "image_processor_type" in fields else "tokenizer_class"] = "Evil"
    path.write_text(json.dumps(fields))
    with suppress(MmxError):
        load_hf_model(str(copy))
    assert not created.exists()
    assert "custom code" not in capsys.readouterr().out


def test_hf_checkpoint_is_never_overwritten(copy):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    model, generation, provenance = load_hf_model(str(copy))
    with pytest.raises(CheckpointError):
        save_model(copy, model, provenance, generation)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    with pytest.raises(CheckpointError, match="mmx import"):
        load_model(copy)


def test_prepared_model_cannot_be_prepared_again(tmp_path):
    pipeline = load(save_model(tmp_path / "model", tiny_model(hidden_size=256)))
    with pytest.raises(MmxError, match="load the model again"):
        pipeline.model.prepare_for_inference("int8")
