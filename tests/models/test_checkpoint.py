"""The checkpoint folder: loads identical, refuses what is damaged or of another format, is replaced atomically."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmx.config.schema import GenerationConfig, SourceConfig
from mmx.encoders.base import Features
from mmx.errors import CheckpointError, EncoderError, MmxError
from mmx.io.atomic import folder_or_backup
from mmx.models import checkpoint
from mmx.models.checkpoint import (
    FORMAT_VERSION,
    is_checkpoint,
    load_generation,
    load_model,
    load_provenance,
    save_model,
    write_folder,
)
from mmx.testing import ToyEncoder, tiny_model

FILES = {"config.yaml", "model.safetensors", "tokenizer.json", "provenance.json", "generation.yaml"}


class TiedEncoder(ToyEncoder):
    """One layer under two names, and a buffer that is a view of a larger one."""

    def __init__(self, options):
        super().__init__(options)
        self.again = self.linear
        self.register_buffer("piece", torch.arange(100.0)[10:13])

    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states + self.again(batch["numbers"][..., None]) + self.piece.sum(), features.mask)


class UnbuildableEncoder(ToyEncoder):
    def __init__(self, options):
        raise ZeroDivisionError


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_layers=1)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("saved") / "model", model)


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


def logits(model):
    tokens = torch.arange(12).reshape(2, 1, 6)
    with torch.no_grad():
        return model({"numbers": model.collate("numbers", [[1.0, 2.0, 3.0], [-4.0]])}, tokens)


def refused(folder, code, **details):
    """Load a folder and check code and details of its error."""
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert error.value.code == code
    assert {name: error.value.details[name] for name in details} == details
    assert "\n" not in str(error.value)
    return error.value


def is_alone(folder):
    """Whether there is nothing but the folder in its parent."""
    return sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def edit_provenance(folder, **changes):
    path = folder / "provenance.json"
    record = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))


# -- saving and loading -----------------------------------------------------------------------------------------------


def test_a_loaded_model_is_identical(model, saved):
    loaded = load_model(saved)
    assert not loaded.training
    assert loaded.config == model.config
    assert torch.equal(logits(loaded), logits(model))
    assert {path.name for path in saved.iterdir()} == FILES
    assert load_generation(saved) == GenerationConfig()


def test_a_model_in_training_is_saved_and_stays_in_training(tmp_path):
    model = tiny_model(num_layers=1).train()
    loaded = load_model(save_model(tmp_path / "m", model))
    assert model.training
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_float16_has_half_the_bytes(model, saved, tmp_path):
    half = save_model(tmp_path / "half", model, dtype=torch.float16)
    assert (half / "model.safetensors").stat().st_size < 0.6 * (saved / "model.safetensors").stat().st_size
    loaded = load_model(half)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    # float16 has 11 bits: each weight changes by at most 1/2048 of itself, and the logits here are of order 0.1.
    torch.testing.assert_close(logits(loaded), logits(model), atol=2e-3, rtol=0)


def test_provenance_and_generation_options_are_saved(model, tmp_path):
    generation = GenerationConfig(num_beams=3, max_new_tokens=7)
    folder = save_model(tmp_path / "deep" / "er" / "m", model, {"max_steps": 3, "data": ["a"]}, generation)
    provenance = load_provenance(folder)
    assert provenance.items() >= {"max_steps": 3, "data": ["a"], "format_version": FORMAT_VERSION}.items()
    assert load_generation(folder) == generation
    (folder / "generation.yaml").unlink()
    assert load_generation(folder) == GenerationConfig()


def test_damaged_or_missing_provenance_is_refused(copy):
    (copy / "provenance.json").write_text("[1")
    refused(copy, "checkpoint.damaged", path=str(copy / "provenance.json"))
    (copy / "provenance.json").unlink()
    refused(copy, "checkpoint.missing_file", path=str(copy / "provenance.json"))


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    model = tiny_model({"numbers": f"{__name__}:TiedEncoder"}, num_layers=1)
    folder = save_model(tmp_path / "m", model)
    names = load_file(folder / "model.safetensors").keys()
    assert "sources.numbers.encoder.linear.weight" in names
    assert not [name for name in names if ".again." in name]
    loaded = load_model(folder)
    assert loaded.encoder("numbers").again is loaded.encoder("numbers").linear
    assert loaded.encoder("numbers").piece.tolist() == [10.0, 11.0, 12.0]
    assert torch.equal(logits(loaded), logits(model))


def test_tied_embeddings_are_one_tensor(saved):
    shape = [len(load_model(saved).tokenizer), 32]
    assert sum(list(tensor.shape) == shape for tensor in load_file(saved / "model.safetensors").values()) == 1


def test_a_loaded_backbone_downloads_nothing(tmp_path):
    source = SourceConfig(encoder="image", options={"backbone": "test_resnet", "size": 32, "mean": [0.1, 0.2, 0.3]})
    folder = save_model(tmp_path / "m", tiny_model({"image": source}, num_layers=1))
    assert "pretrained: false" in (folder / "config.yaml").read_text()
    options = load_model(folder).encoder("image").options
    assert (options.size, options.mean, options.pretrained) == (32, (0.1, 0.2, 0.3), False)


# -- formats ----------------------------------------------------------------------------------------------------------


def test_a_folder_of_an_older_version_is_refused_in_one_sentence(copy):
    edit_provenance(copy, format_version=None)
    (copy / "config.yaml").write_text("decoder: {width: 32, layers: 1}\nreader: null\n")
    error = refused(copy, "checkpoint.old_format", path=str(copy), format_version=1, expected=FORMAT_VERSION)
    for words in (str(copy), "format 1", "train it again", "mmx 0.1"):
        assert words in str(error)
    with pytest.raises(CheckpointError) as caught:
        load_generation(copy)
    assert caught.value.code == "checkpoint.old_format"


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, "x"])
def test_a_folder_of_a_newer_version_is_refused(copy, version):
    edit_provenance(copy, format_version=version)
    error = refused(copy, "checkpoint.new_format", format_version=version)
    assert "newer version of mmx" in str(error)


def test_an_older_checkpoint_is_replaced(copy, model):
    edit_provenance(copy, format_version=None)
    assert torch.equal(logits(load_model(save_model(copy, model))), logits(model))


# -- strict loading ---------------------------------------------------------------------------------------------------


def test_each_missing_tensor_is_named(copy):
    tensors = load_file(copy / "model.safetensors")
    for name in tensors:
        others = {other: tensor for other, tensor in tensors.items() if other != name}
        save_file(others, copy / "model.safetensors")
        refused(copy, "checkpoint.tensor_names", missing=[name], unexpected=[])


def test_each_tensor_of_another_shape_is_named(copy):
    tensors = load_file(copy / "model.safetensors")
    for name, tensor in tensors.items():
        save_file({**tensors, name: torch.zeros(3, *tensor.shape)}, copy / "model.safetensors")
        refused(copy, "checkpoint.tensor_shape", tensor=name, expected=list(tensor.shape))


def test_unexpected_and_many_missing_tensors_are_named(copy):
    tensors = load_file(copy / "model.safetensors")
    save_file({**tensors, "decoder.other": torch.zeros(1)}, copy / "model.safetensors")
    refused(copy, "checkpoint.tensor_names", missing=[], unexpected=["decoder.other"])
    save_file({"decoder.other": torch.zeros(1)}, copy / "model.safetensors")
    error = refused(copy, "checkpoint.tensor_names", missing=sorted(tensors), unexpected=["decoder.other"])
    assert f"and {len(tensors) - 3} more" in str(error), "the sentence names the first three"


def test_integers_in_place_of_weights_are_refused(copy):
    tensors = load_file(copy / "model.safetensors")
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name].to(torch.int64)}, copy / "model.safetensors")
    refused(copy, "checkpoint.tensor_shape", tensor=name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(copy, value):
    tensors = load_file(copy / "model.safetensors")
    name = sorted(tensors)[3]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, copy / "model.safetensors")
    refused(copy, "checkpoint.not_finite", tensor=name)


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), None), (1e9, torch.float16)])
def test_values_that_are_not_finite_are_not_saved(tmp_path, value, dtype):
    valid = tiny_model(num_layers=1)
    folder = save_model(tmp_path / "m", valid)
    invalid = tiny_model(num_layers=1)
    nn.init.constant_(next(invalid.parameters()), value)
    with pytest.raises(CheckpointError) as error:
        save_model(folder, invalid, dtype=dtype)
    assert error.value.code == "checkpoint.not_finite"
    assert is_alone(folder)
    assert torch.equal(logits(load_model(folder)), logits(valid))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.yaml"])
def test_missing_and_truncated_files_are_named(copy, name):
    content = (copy / name).read_bytes()
    for length in (0, len(content) // 10, len(content) // 3, len(content) - 3):
        (copy / name).write_bytes(content[:length])
        with pytest.raises(MmxError, match=name):
            load_model(copy)
    (copy / name).unlink()
    assert name in str(refused(copy, "checkpoint.missing" if name == "config.yaml" else "checkpoint.missing_file"))


def test_a_flipped_byte_in_the_weights_is_refused(copy):
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(bytes(content))
    refused(copy, "checkpoint.sha256", path=str(weights))


def test_other_folders_are_refused(tmp_path, saved):
    refused(tmp_path / "nowhere", "checkpoint.missing", path=str(tmp_path / "nowhere"))
    refused(tmp_path, "checkpoint.missing")
    refused(saved / "model.safetensors", "checkpoint.missing")
    (tmp_path / "config.json").write_text("{}")
    assert "mmx import" in str(refused(tmp_path, "checkpoint.published_model"))


def test_is_checkpoint(saved, tmp_path):
    assert is_checkpoint("bundled") and is_checkpoint(saved)
    assert not is_checkpoint(tmp_path) and not is_checkpoint(tmp_path / "nowhere")


def test_an_encoder_that_cannot_be_built_is_named(copy):
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("mmx.testing:ToyEncoder", f"{__name__}:UnbuildableEncoder"))
    with pytest.raises(EncoderError, match="UnbuildableEncoder of model.sources.numbers .*ZeroDivision") as error:
        load_model(copy)
    assert error.value.code == "encoder.build"


def test_weights_of_another_configuration_are_refused(copy):
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("features: 8", "features: 9"))
    error = refused(copy, "checkpoint.tensor_shape")
    assert str(error.details["tensor"]).startswith("sources.numbers.")


# -- random damage ----------------------------------------------------------------------------------------------------


def damage(folder, rng):
    """Damage one of the three files in one of four ways."""
    name = rng.choice(["config.yaml", "model.safetensors", "tokenizer.json"])
    content = bytearray((folder / name).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little") if name == "model.safetensors" else len(content)
    method = rng.choice(["flip", "flip", "truncate", "swap", "delete"])
    if method == "flip":
        for _ in range(rng.choice([1, 3])):
            content[rng.randrange(header)] = rng.randrange(256)
    elif method == "truncate":
        del content[rng.randrange(len(content)) :]
    elif method == "delete":
        start = rng.randrange(header)
        del content[start : start + rng.randrange(1, 40)]
    else:
        words = sorted(set(bytes(content[:header]).replace(b'"', b" ").replace(b":", b" ").split()))
        one = rng.choice(words)
        other = rng.choice(words)
        content = bytearray(bytes(content).replace(one, b"\0").replace(other, one).replace(b"\0", other))
    (folder / name).write_bytes(content)


def load_damaged(saved, folder, seeds):
    """Count the damaged folders that were refused by an MmxError; all others hold exactly the tensors of their file."""
    outcomes = {"refused": 0, "loaded": 0}
    for seed in seeds:
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        damage(folder, random.Random(seed))
        try:
            model = load_model(folder)
        except MmxError:
            outcomes["refused"] += 1
            continue
        tensors = load_file(folder / "model.safetensors")
        own = model.state_dict()
        assert tensors.keys() == own.keys(), seed
        assert all(torch.equal(own[name], tensors[name].to(own[name].dtype)) for name in tensors), seed
        outcomes["loaded"] += 1
    return outcomes


def test_damaged_folders_are_refused_or_load_all_tensors(saved, tmp_path):
    outcomes = load_damaged(saved, tmp_path / "m", range(60))
    assert outcomes["refused"] >= 30, outcomes


@pytest.mark.slow
def test_three_thousand_damaged_folders(saved, tmp_path):
    outcomes = load_damaged(saved, tmp_path / "m", range(1000, 4000))
    assert outcomes["refused"] >= 1500, outcomes


# -- pickles ----------------------------------------------------------------------------------------------------------


class MakesFolder:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize(
    "name", ["model.pt", "pytorch_model.bin", "weights.pkl", "model.npy", "model.tar", "model.safetensors"]
)
def test_a_pickle_is_never_loaded(copy, tmp_path, name):
    made = tmp_path / "made"
    pickled = pickle.dumps(MakesFolder(made))
    if name == "model.pt":
        torch.save({"weights": MakesFolder(made)}, copy / name)
    elif name == "model.tar":
        with tarfile.open(copy / name, "w") as archive:
            member = tarfile.TarInfo("data.pkl")
            member.size = len(pickled)
            archive.addfile(member, BytesIO(pickled))
    else:
        (copy / name).write_bytes(pickled)
    if name == "model.safetensors":
        refused(copy, "checkpoint.damaged")
    else:
        load_model(copy)
        (copy / "model.safetensors").unlink()
        refused(copy, "checkpoint.missing_file")
        shutil.copy(copy / name, copy / "model.safetensors")
        refused(copy, "checkpoint.damaged")
    assert not made.exists()
    pickle.loads(pickled)
    assert made.exists(), "the pickle works"


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json"])
def test_a_pickle_or_a_yaml_call_in_other_files_is_never_loaded(copy, tmp_path, name):
    made = tmp_path / "made"
    for content in (pickle.dumps(MakesFolder(made)), f"!!python/object/apply:os.mkdir ['{made}']".encode()):
        (copy / name).write_bytes(content)
        with pytest.raises(MmxError):
            load_model(copy)
    assert not made.exists()


def test_a_configuration_cannot_name_a_weight_file(copy, tmp_path):
    made = tmp_path / "made"
    torch.save(MakesFolder(made), copy / "evil.pt")
    config = (copy / "config.yaml").read_text()
    image = f"image\n    options: {{backbone: test_resnet, arguments: {{checkpoint_path: {copy / 'evil.pt'}}}}}"
    config = config.replace("mmx.testing:ToyEncoder", image).replace("    options:\n      features: 8\n", "")
    (copy / "config.yaml").write_text(config)
    with pytest.raises(MmxError, match="arguments cannot hold checkpoint_path"):
        load_model(copy)
    assert not made.exists()


# -- replacement (the mechanism itself: tests/io/test_atomic.py) ------------------------------------------------------


def disk_full(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["save_file", "os.fsync", "os.rename", "Path.write_text"])
def test_a_full_disk_is_one_sentence_and_changes_nothing(model, tmp_path, monkeypatch, where):
    folder = save_model(tmp_path / "m", model)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    place, _, name = where.rpartition(".")
    monkeypatch.setattr({"os": os, "Path": Path, "": checkpoint}[place], name, disk_full)
    with pytest.raises(CheckpointError, match="no space is left on the disk") as error:
        save_model(folder, model)
    monkeypatch.undo()
    assert error.value.code == "checkpoint.write"
    assert error.value.details == {"path": str(folder)}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert is_alone(folder)


@pytest.mark.slow
def test_a_file_system_that_is_really_full(model, tmp_path):
    size = sum(tensor.nbytes for tensor in model.state_dict().values()) * 3 // 2
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount")
    try:
        folder = save_model(disk / "m", model)
        with pytest.raises(CheckpointError, match="no space is left on the disk"):
            save_model(folder, model)
        assert is_alone(folder)
        assert torch.equal(logits(load_model(folder)), logits(model))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_backup_is_loaded_after_a_kill_between_two_renames(model, tmp_path):
    folder = save_model(tmp_path / "m", model)
    folder.rename(tmp_path / ".m.old")
    assert is_checkpoint(folder)
    assert torch.equal(logits(load_model(folder)), logits(model))
    save_model(folder, model)
    assert is_alone(folder)


def test_only_checkpoints_and_empty_folders_are_replaced(model, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    assert save_model(photos, model) == photos
    (photos / "model.safetensors").unlink()
    for path in (photos, photos / "config.yaml"):
        with pytest.raises(CheckpointError) as error:
            save_model(path, model)
        assert error.value.code == "checkpoint.not_replaceable"
        assert error.value.details == {"path": str(path)}
    assert {path.name for path in photos.iterdir()} == FILES - {"model.safetensors"}


def test_a_published_model_is_not_replaced(model, copy):
    (copy / "config.json").write_text("{}")
    with pytest.raises(CheckpointError) as error:
        save_model(copy, model)
    assert error.value.code == "checkpoint.not_replaceable"


def test_a_link_is_followed(model, tmp_path, monkeypatch):
    folder = save_model(tmp_path / "steps" / "7", model)
    (tmp_path / "best").symlink_to("steps/7")
    save_model(tmp_path / "best", model, {"max_steps": 8})
    assert (tmp_path / "best").is_symlink()
    assert load_provenance(folder).items() >= {"max_steps": 8}.items()
    monkeypatch.chdir(tmp_path)
    assert save_model("best", model) == Path("best")


def test_a_path_below_a_file_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError) as error:
        save_model(tmp_path / "file" / "m", model)
    assert error.value.code == "checkpoint.write"


def test_errors_of_the_writer_pass_unchanged(tmp_path):
    def fail(folder):
        raise RuntimeError("x")

    with pytest.raises(RuntimeError, match="x"):
        write_folder(tmp_path / "m", fail)
    assert list(tmp_path.iterdir()) == []


def save_forever(folder, model):
    while True:
        save_model(folder, model)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_killed_at_random_moments_the_model_always_loads(model, tmp_path):
    folder = save_model(tmp_path / "m", model)
    rng = random.Random(0)
    expected = logits(model)
    inodes = set()
    for _ in range(10):
        process = get_context("fork").Process(target=save_forever, args=(folder, model))
        process.start()
        time.sleep(rng.uniform(0.02, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was still saving"
        inodes.add(folder_or_backup(folder).stat().st_ino)
        assert torch.equal(logits(load_model(folder)), expected)
    assert len(inodes) > 1, "some saves were completed"
    save_model(folder, model)
    assert is_alone(folder)
