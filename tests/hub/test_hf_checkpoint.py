"""Published folders as people have them: whole, in parts, pickled, half downloaded, of families nobody knows."""

import json
import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from parity_cases import publish_vit_gpt2, load_error
from safetensors.torch import load_file, save_file

from mmx.errors import CheckpointError, ConfigError, MmxError
from mmx.hub import FAMILIES, load_hf_model
from mmx.inference.pipeline import Pipeline, load
from mmx.models.checkpoint import load_model, save_model

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return publish_vit_gpt2(tmp_path_factory.mktemp("published") / "whole")


@pytest.fixture
def copy(published, tmp_path):
    return Path(shutil.copytree(published, tmp_path / "copy"))


def change(folder, **facts):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def test_a_folder_speaks_at_once_and_as_a_checkpoint_of_ours(published, tmp_path, picture):
    direct = load(published)
    model, generation, origin = load_hf_model(str(published))
    folder = save_model(tmp_path / "ours", model, origin, generation)
    again = load(folder)
    assert direct.caption(picture) == again.caption(picture) != ""
    assert (again.generation, again.model.config) == (direct.generation, direct.model.config)
    assert json.loads((folder / "provenance.json").read_text())["family"] == "vision-encoder-decoder gpt2"
    for name, tensor in model.state_dict().items():
        assert torch.equal(load_model(folder).state_dict()[name], tensor), name


@pytest.fixture(scope="module")
def picture():
    from mmx.data.scenes import generate_scene
    from mmx.data.scenes import render_scene as paint

    return paint(generate_scene(0, 3))


def test_what_it_was_not_made_for_is_one_sentence(published, picture):
    with pytest.raises(MmxError, match="was made to caption, not to answer questions"):
        load(published).ask(picture, "what is this?")


def test_weights_in_parts_are_read(copy, published):
    tensors = load_file(copy / WEIGHTS)
    names = sorted(tensors)
    half = len(names) // 2
    parts = {"a.safetensors": names[:half], "b.safetensors": names[half:]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, copy / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (copy / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (copy / WEIGHTS).unlink()
    ours, whole = (load_hf_model(str(f))[0].state_dict() for f in (copy, published))
    assert all(torch.equal(ours[name], tensor) for name, tensor in whole.items())
    (copy / "b.safetensors").unlink()
    assert "b.safetensors is missing" in load_error(copy)


def test_weights_of_half_precision_become_float32(copy):
    save_file({name: tensor.half() for name, tensor in load_file(copy / WEIGHTS).items()}, copy / WEIGHTS)
    assert {tensor.dtype for tensor in load_hf_model(str(copy))[0].state_dict().values()} == {torch.float32}


def test_a_family_nobody_knows_is_refused_with_those_that_are_known(copy):
    change(copy, model_type="mllama", architectures=["MllamaForConditionalGeneration"], decoder=None)
    sentence = load_error(copy)
    assert "mllama" in sentence and all(family in sentence for family in FAMILIES)
    change(copy, model_type=None, architectures=None)
    assert "no model_type" in load_error(copy)


@pytest.mark.parametrize(
    "name", ["decoder.transformer.h.1.crossattention.c_attn.weight", "encoder.layernorm.bias"], ids=["ours", "encoder"]
)
def test_a_tensor_that_lacks_is_named(copy, name):
    tensors = load_file(copy / WEIGHTS)
    del tensors[name]
    save_file(tensors, copy / WEIGHTS)
    assert name.removeprefix("encoder.") in load_error(copy)


@pytest.mark.parametrize("name", ["decoder.transformer.h.0.adapter.weight", "encoder.extra.weight", "stray"])
def test_a_tensor_left_over_is_named(copy, name):
    save_file({**load_file(copy / WEIGHTS), name: torch.ones(2)}, copy / WEIGHTS)
    assert name.removeprefix("encoder.") in load_error(copy)


def test_a_tensor_of_another_shape_is_named(copy):
    tensors = load_file(copy / WEIGHTS)
    name = "decoder.transformer.h.0.mlp.c_fc.weight"
    save_file({**tensors, name: tensors[name][:, :-4].contiguous()}, copy / WEIGHTS)
    assert name in load_error(copy)


@pytest.mark.parametrize(
    "file, named",
    [
        ("config.json", "config.json"),
        (WEIGHTS, WEIGHTS),
        ("tokenizer.json", "has no tokenizer that can be read"),
        ("preprocessor_config.json", "preprocessor_config.json"),
    ],
)
def test_a_file_that_is_missing_or_half_downloaded_is_one_sentence(copy, file, named):
    whole = (copy / file).read_bytes()
    (copy / file).write_bytes(whole[: len(whole) // 2])
    assert named in (half := load_error(copy)) and "download it again" in half
    (copy / file).unlink()
    assert named in (missing := load_error(copy)) and "download" in missing


def test_a_folder_without_a_config_and_a_name_without_a_network(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in load_error(tmp_path / "empty")
    sentence = load_error("nobody/has-this-model")
    assert "is no folder here and could not be downloaded" in sentence and "no network" in sentence
    with pytest.raises(CheckpointError, match="expected a checkpoint folder"):
        load(tmp_path / "empty")


def test_facts_that_change_the_arithmetic_are_refused(copy):
    decoder = json.loads((copy / "config.json").read_text())["decoder"]
    change(copy, decoder={**decoder, "scale_attn_by_inverse_layer_idx": True})
    assert "scale_attn_by_inverse_layer_idx" in load_error(copy)
    change(copy, decoder={**decoder, "activation_function": "sinc"})
    assert "'sinc'" in load_error(copy)
    change(copy, decoder={key: value for key, value in decoder.items() if key != "n_embd"})
    assert "n_embd" in load_error(copy)
    change(copy, decoder={**decoder, "n_layer": 3})
    assert "h.2" in load_error(copy)


# ---- pickles ---------------------------------------------------------------------------------------------------


class Trap:
    """Run when it is unpickled without care."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def pickled(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def test_a_pickle_is_refused_and_read_when_it_is_allowed(copy, published):
    pickled(copy)
    sentence = load_error(copy)
    assert "pickle, which may run code" in sentence and "--allow-pickle" in sentence
    ours, whole = load_hf_model(str(copy), pickles=True)[0], load_hf_model(str(published))[0]
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())


@pytest.mark.parametrize("make", ["trap", "zip", "list", "junk"])
def test_a_pickle_that_holds_more_than_tensors_runs_nothing(copy, tmp_path, make):
    pickled(copy)
    canary, place = tmp_path / "canary", copy / "pytorch_model.bin"
    if make == "trap":
        place.write_bytes(pickle.dumps({"a": Trap(canary)}))
    elif make == "zip":
        torch.save({"a": Trap(canary)}, place)
    elif make == "list":
        torch.save([torch.ones(2)], place)
    else:
        place.write_bytes(place.read_bytes()[:1000])
    sentence = load_error(copy, pickles=True)
    assert "pytorch_model.bin" in sentence
    assert not canary.exists()


def test_a_pipeline_of_a_published_model_has_its_own_way_of_choosing_words(copy):
    (copy / "generation_config.json").write_text(
        json.dumps({"num_beams": 4, "max_length": 17, "no_repeat_ngram_size": 3, "early_stopping": True})
    )
    asked = load(copy)
    chosen = asked.generation
    assert isinstance(asked, Pipeline)
    assert (chosen.num_beams, chosen.max_new_tokens, chosen.no_repeat_ngram_size) == (4, 16, 3)
    assert chosen.early_stopping
    with pytest.raises(ConfigError):
        asked.generation_config({"num_beans": 2})


# ---- what a folder says of words, and of code ------------------------------------------------------------------


@pytest.mark.parametrize(
    "facts, named",
    [
        ({"suppress_tokens": [99999]}, "token 99999 for suppress_tokens"),
        ({"bad_words_ids": [[99999]]}, "token 99999"),
        ({"forced_eos_token_id": 99999}, "token 99999 for forced_eos_token_id"),
        ({"decoder_start_token_id": -1}, "token -1 for the mark bos"),
        ({"eos_token_id": []}, "config.json"),
        ({"eos_token_id": [0, 82]}, "several eos_token_id"),
        ({"forced_bos_token_id": 3}, "forced_bos_token_id"),
        ({"bad_words_ids": [[3, 4]]}, "bad_words_ids of several tokens"),
        ({"num_beams": 1000000}, "generation config"),
    ],
)
def test_words_that_cannot_be_chosen_so_are_refused_at_once(copy, facts, named):
    (copy / "generation_config.json").write_text(json.dumps(facts))
    assert named in load_error(copy)


def test_beams_that_are_drawn_by_lot_become_plain_beams(copy):
    (copy / "generation_config.json").write_text(json.dumps({"num_beams": 3, "do_sample": True}))
    chosen = load_hf_model(str(copy))[1]
    assert (chosen.num_beams, chosen.do_sample) == (3, False)


@pytest.mark.parametrize("name", ["decoder.transformer.h.0.mlp.c_fc.weight", "encoder.layernorm.bias"])
def test_values_that_are_not_finite_are_named(copy, name):
    tensors = load_file(copy / WEIGHTS)
    tensors[name][0] = float("nan")
    save_file(tensors, copy / WEIGHTS)
    assert "not finite" in load_error(copy)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_never_run(copy, tmp_path, file, capsys):
    canary = tmp_path / "canary"
    (copy / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Evil: pass\n")
    path = copy / file
    facts = json.loads(path.read_text())
    facts |= {"auto_map": {"AutoImageProcessor": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}}
    facts |= {"image_processor_type": "Evil"} if "image_processor_type" in facts else {"tokenizer_class": "Evil"}
    path.write_text(json.dumps(facts))
    with suppress(MmxError):
        load_hf_model(str(copy))
    assert not canary.exists()
    assert "custom code" not in capsys.readouterr().out


def test_a_published_folder_is_never_written_over(copy):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    model, generation, origin = load_hf_model(str(copy))
    with pytest.raises(CheckpointError, match="exists and is no checkpoint"):
        save_model(copy, model, origin, generation)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    with pytest.raises(CheckpointError, match="convert it first: mmx import"):
        load_model(copy)


def test_a_model_that_speaks_is_not_laid_out_again(tmp_path):
    from mmx.testing import tiny_model

    asked = load(save_model(tmp_path / "wide", tiny_model(width=256)))
    with pytest.raises(MmxError, match="load the model again"):
        asked.model.prepare_for_inference("int8")
