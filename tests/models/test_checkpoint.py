"""The checkpoint folder: it rebuilds itself to the bit, is whole or not there, and believes nothing it should not."""

import ctypes
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
from mmx.models import checkpoint
from mmx.models.checkpoint import load_generation, load_model, load_provenance, save_model, write_folder
from mmx.testing import ToyEncoder, tiny_model

FILES = {"config.yaml", "model.safetensors", "tokenizer.json", "provenance.json", "generation.yaml"}


class TiedEncoder(ToyEncoder):
    """Two layers that are one, and a buffer that looks into a larger one."""

    def __init__(self, options):
        super().__init__(options)
        self.again = self.linear
        self.register_buffer("piece", torch.arange(100.0)[10:13])

    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states + self.again(batch["numbers"][..., None]) + self.piece.sum(), features.mask)


class Stubborn(ToyEncoder):
    """Cannot be built."""

    def __init__(self, options):
        raise ZeroDivisionError


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=1)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("whole") / "model", model)


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


def logits(model):
    tokens = torch.arange(12).reshape(2, 1, 6)
    with torch.no_grad():
        return model({"numbers": model.collate("numbers", [[1.0, 2.0, 3.0], [-4.0]])}, tokens)


def refused(folder, *said):
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert all(words in sentence for words in said), sentence
    return sentence


def alone(folder):
    """Nothing stands beside the folder that was not meant to."""
    return sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


# -- there and back ---------------------------------------------------------------------------------------------------


def test_what_comes_back_is_equal_to_the_bit(model, saved):
    again = load_model(saved)
    assert not again.training
    assert again.config == model.config
    assert torch.equal(logits(again), logits(model))
    assert {path.name for path in saved.iterdir()} == FILES
    assert load_generation(saved) == GenerationConfig()


def test_a_training_model_is_saved_and_stays_in_training(tmp_path):
    model = tiny_model(layers=1).train()
    again = load_model(save_model(tmp_path / "m", model))
    assert model.training
    assert torch.equal(logits(again), logits(model.eval()))


def test_half_the_bytes_within_tolerance(model, saved, tmp_path):
    half = save_model(tmp_path / "half", model, dtype=torch.float16)
    assert (half / "model.safetensors").stat().st_size < 0.6 * (saved / "model.safetensors").stat().st_size
    again = load_model(half)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    # float16 keeps 11 bits: each weight moves by at most 1/2048 of itself, and the logits here are of order 0.1.
    torch.testing.assert_close(logits(again), logits(model), atol=2e-3, rtol=0)


def test_provenance_and_generation_travel(model, tmp_path):
    chosen = GenerationConfig(num_beams=3, max_new_tokens=7)
    folder = save_model(tmp_path / "deep" / "er" / "m", model, {"max_steps": 3, "data": ["a"]}, chosen)
    assert load_provenance(folder).items() >= {"max_steps": 3, "data": ["a"]}.items()
    assert load_generation(folder) == chosen
    (folder / "provenance.json").write_text("[1")
    with pytest.raises(CheckpointError, match=r"provenance.json is damaged"):
        load_provenance(folder)
    (folder / "generation.yaml").unlink()
    assert load_generation(folder) == GenerationConfig()


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    model = tiny_model({"numbers": f"{__name__}:TiedEncoder"}, layers=1)
    folder = save_model(tmp_path / "m", model)
    names = load_file(folder / "model.safetensors").keys()
    assert "sources.numbers.encoder.linear.weight" in names
    assert not [name for name in names if ".again." in name]
    again = load_model(folder)
    assert again.encoder("numbers").again is again.encoder("numbers").linear
    assert again.encoder("numbers").piece.tolist() == [10.0, 11.0, 12.0]
    assert torch.equal(logits(again), logits(model))


def test_tied_embeddings_are_one_tensor(saved):
    shape = [len(load_model(saved).tokenizer), 32]
    assert sum(list(tensor.shape) == shape for tensor in load_file(saved / "model.safetensors").values()) == 1


def test_a_rebuilt_backbone_fetches_nothing(tmp_path):
    source = SourceConfig(encoder="image", options={"backbone": "test_resnet", "size": 32, "mean": [0.1, 0.2, 0.3]})
    folder = save_model(tmp_path / "m", tiny_model({"image": source}, layers=1))
    assert "pretrained: false" in (folder / "config.yaml").read_text()
    options = load_model(folder).encoder("image").options
    assert (options.size, options.mean, options.pretrained) == (32, (0.1, 0.2, 0.3), False)


# -- strictness -------------------------------------------------------------------------------------------------------


def test_each_tensor_is_missed_by_name(copy):
    whole = load_file(copy / "model.safetensors")
    for name in whole:
        save_file({other: tensor for other, tensor in whole.items() if other != name}, copy / "model.safetensors")
        refused(copy, f"it misses {name}.", "does not fit its config.yaml")


def test_each_misshaped_tensor_is_named(copy):
    whole = load_file(copy / "model.safetensors")
    for name, tensor in whole.items():
        save_file({**whole, name: torch.zeros(3, *tensor.shape)}, copy / "model.safetensors")
        refused(
            copy, f"holds {name} as torch.float32 {[3, *tensor.shape]}", f"expects {tensor.dtype} {list(tensor.shape)}"
        )


def test_extra_and_many_missing_tensors_are_named(copy):
    whole = load_file(copy / "model.safetensors")
    save_file({**whole, "decoder.stranger": torch.zeros(1)}, copy / "model.safetensors")
    refused(copy, "it has besides decoder.stranger.")
    save_file({"decoder.stranger": torch.zeros(1)}, copy / "model.safetensors")
    refused(copy, f"and {len(whole) - 3} more; it has besides decoder.stranger.")


def test_whole_numbers_in_place_of_weights(copy):
    whole = load_file(copy / "model.safetensors")
    name = next(iter(whole))
    save_file({**whole, name: whole[name].to(torch.int64)}, copy / "model.safetensors")
    refused(copy, f"holds {name} as torch.int64")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(copy, value):
    whole = load_file(copy / "model.safetensors")
    name = sorted(whole)[3]
    whole[name].view(-1)[-1] = value
    save_file(whole, copy / "model.safetensors")
    refused(copy, f"holds {name} with values that are not finite")


def test_a_model_that_could_not_be_loaded_is_not_saved(tmp_path):
    good, bad = tiny_model(layers=1), tiny_model(layers=1)
    folder = save_model(tmp_path / "m", good)
    weight = next(bad.parameters())
    for value, dtype in ((float("nan"), None), (1e9, torch.float16)):
        nn.init.constant_(weight, value)
        with pytest.raises(CheckpointError, match="holds values that are not finite as torch.float.*nothing was saved"):
            save_model(folder, bad, dtype=dtype)
    assert alone(folder)
    assert torch.equal(logits(load_model(folder)), logits(good))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.yaml"])
def test_missing_and_half_copied_files(copy, name):
    whole = (copy / name).read_bytes()
    for part in (0.0, 0.1, 0.5, 0.99):
        (copy / name).write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(MmxError) as caught:
            load_model(copy)
        assert name in str(caught.value)
    (copy / name).unlink()
    refused(copy, name)


def test_folders_that_are_none(tmp_path, saved):
    refused(tmp_path / "nowhere", "nowhere is no folder; expected a checkpoint folder")
    refused(tmp_path, "has no config.yaml")
    refused(saved / "model.safetensors", "is no folder")


def test_a_config_that_builds_nothing(copy):
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("mmx.testing:ToyEncoder", f"{__name__}:Stubborn"))
    with pytest.raises(EncoderError, match="encoder Stubborn of model.sources.numbers cannot be built .*ZeroDivision"):
        load_model(copy)


def test_weights_of_another_config(copy):
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("features: 8", "features: 9"))
    refused(copy, "sources.numbers.", "its config.yaml expects")


# -- mutations --------------------------------------------------------------------------------------------------------


def mutate(folder, dice):
    """Break one of the three files in one of four ways."""
    name = dice.choice(["config.yaml", "model.safetensors", "tokenizer.json"])
    data = bytearray((folder / name).read_bytes())
    header = 8 + int.from_bytes(data[:8], "little") if name == "model.safetensors" else len(data)
    way = dice.choice(["flip", "flip", "cut", "swap", "random_erasing"])
    if way == "horizontal_flip":
        for _ in range(dice.choice([1, 3])):
            data[dice.randrange(header)] = dice.randrange(256)
    elif way == "cut":
        del data[dice.randrange(len(data)) :]
    elif way == "random_erasing":
        start = dice.randrange(header)
        del data[start : start + dice.randrange(1, 40)]
    else:
        words = sorted(set(bytes(data[:header]).replace(b'"', b" ").replace(b":", b" ").split()))
        one, other = dice.choice(words), dice.choice(words)
        data = bytearray(bytes(data).replace(one, b"\0").replace(other, one).replace(b"\0", other))
    (folder / name).write_bytes(data)


def survive(saved, folder, seeds):
    """Every mutated folder is refused by an MmxError, or loads all that its weight file holds."""
    outcomes = {"refused": 0, "loaded": 0}
    for seed in seeds:
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        mutate(folder, random.Random(seed))
        try:
            model = load_model(folder)
        except MmxError:
            outcomes["refused"] += 1
            continue
        held, own = load_file(folder / "model.safetensors"), model.state_dict()
        assert held.keys() == own.keys(), seed
        assert all(torch.equal(own[name], held[name].to(own[name].dtype)) for name in held), seed
        outcomes["loaded"] += 1
    return outcomes


def test_damaged_folders_are_refused_or_whole(saved, tmp_path):
    outcomes = survive(saved, tmp_path / "m", range(60))
    assert outcomes["refused"] >= 30, outcomes


@pytest.mark.slow
def test_three_thousand_damaged_folders(saved, tmp_path):
    outcomes = survive(saved, tmp_path / "m", range(1000, 4000))
    assert outcomes["refused"] >= 1500, outcomes


# -- pickles ----------------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.mark.parametrize(
    "name", ["model.pt", "pytorch_model.bin", "weights.pkl", "model.npy", "model.tar", "model.safetensors"]
)
def test_a_pickle_is_never_opened(copy, tmp_path, name):
    canary = tmp_path / "canary"
    pickled = pickle.dumps(Bomb(canary))
    if name == "model.pt":
        torch.save({"weights": Bomb(canary)}, copy / name)
    elif name == "model.tar":
        with tarfile.open(copy / name, "w") as archive:
            member = tarfile.TarInfo("data.pkl")
            member.size = len(pickled)
            archive.addfile(member, BytesIO(pickled))
    else:
        (copy / name).write_bytes(pickled)
    if name == "model.safetensors":
        refused(copy, "is damaged or no safetensors file")
    else:
        load_model(copy)
        (copy / "model.safetensors").unlink()
        refused(copy, "model.safetensors is missing; expected the weights as safetensors")
        shutil.copy(copy / name, copy / "model.safetensors")
        refused(copy, "is damaged or no safetensors file")
    assert not canary.exists()
    pickle.loads(pickled)
    assert canary.exists(), "the bomb is a real one"


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json"])
def test_a_pickle_under_another_name_and_a_yaml_that_calls(copy, tmp_path, name):
    canary = tmp_path / "canary"
    for content in (pickle.dumps(Bomb(canary)), f"!!python/object/apply:os.mkdir ['{canary}']".encode()):
        (copy / name).write_bytes(content)
        with pytest.raises(MmxError):
            load_model(copy)
    assert not canary.exists()


def test_a_config_cannot_name_a_weight_file_of_its_own(copy, tmp_path):
    canary = tmp_path / "canary"
    torch.save(Bomb(canary), copy / "evil.pt")
    config = (copy / "config.yaml").read_text()
    image = f"image\n    options: {{backbone: test_resnet, arguments: {{checkpoint_path: {copy / 'evil.pt'}}}}}"
    (copy / "config.yaml").write_text(
        config.replace("mmx.testing:ToyEncoder", image).replace("    options:\n      features: 8\n", "")
    )
    with pytest.raises(MmxError, match="arguments cannot hold checkpoint_path"):
        load_model(copy)
    assert not canary.exists()


# -- whole or not at all ----------------------------------------------------------------------------------------------


def put(text):
    def write(place):
        (place / "model.safetensors").write_text(text)
        (place / "inner").mkdir()
        (place / "inner" / "more.txt").write_text(text)

    return write


def read(folder):
    return {(folder / name).read_text() for name in ("model.safetensors", "inner/more.txt")}


def disk_full(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "m"
    for text in ("old", "new"):
        assert write_folder(folder, put(text)) == folder
        assert read(folder) == {text}
        assert alone(folder)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("x"), KeyboardInterrupt()])
def test_a_failing_writer_leaves_the_old_and_nothing_else(tmp_path, error):
    folder = write_folder(tmp_path / "m", put("old"))

    def fail(place):
        put("new")(place)
        raise error

    with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)):
        write_folder(folder, fail)
    assert read(folder) == {"old"}
    assert alone(folder)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)):
        write_folder(tmp_path / "fresh", fail)
    assert alone(folder)


@pytest.mark.parametrize("where", ["save_file", "os.fsync", "os.rename", "Path.write_text"])
def test_a_full_disk_is_one_sentence(model, tmp_path, monkeypatch, where):
    folder = save_model(tmp_path / "m", model)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    place, _, name = where.rpartition(".")
    monkeypatch.setattr({"os": os, "Path": Path, "": checkpoint}[place], name, disk_full)
    monkeypatch.setattr(checkpoint, "_swap", lambda one, other: False)
    with pytest.raises(CheckpointError) as caught:
        save_model(folder, model)
    monkeypatch.undo()
    assert (
        str(caught.value)
        == f"{folder} could not be written: no space is left on the disk; what stood there is untouched."
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert alone(folder)


@pytest.mark.slow
def test_a_disk_that_is_really_full(model, tmp_path):
    size = sum(tensor.nbytes for tensor in model.state_dict().values()) * 3 // 2
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("only root may mount")
    try:
        folder = save_model(disk / "m", model)
        with pytest.raises(CheckpointError, match="could not be written: no space is left on the disk"):
            save_model(folder, model)
        assert alone(folder)
        assert torch.equal(logits(load_model(folder)), logits(model))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_second_rename_fails(tmp_path, monkeypatch):
    """Where folders cannot change names in one step, the old one comes back."""
    folder = write_folder(tmp_path / "m", put("old"))
    monkeypatch.setattr(checkpoint, "_swap", lambda one, other: False)
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: disk_full() if str(a).endswith(".tmp") else rename(a, b))
    with pytest.raises(CheckpointError, match="what stood there is untouched"):
        write_folder(folder, put("new"))
    assert read(folder) == {"old"}
    assert alone(folder)
    monkeypatch.setattr(os, "rename", rename)
    write_folder(folder, put("new"))
    assert read(folder) == {"new"}
    assert alone(folder)


def test_killed_between_two_renames(model, tmp_path):
    """The older folder, set aside, is loaded until the next save puts a new one in its place."""
    folder = save_model(tmp_path / "m", model)
    folder.rename(tmp_path / ".m.old")
    assert torch.equal(logits(load_model(folder)), logits(model))
    save_model(folder, model)
    assert alone(folder)


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "renameat2"), reason="needs renameat2")
def test_the_name_is_never_without_a_folder(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "m", put("old"))
    monkeypatch.setattr(os, "rename", disk_full)
    write_folder(folder, put("new"))
    assert read(folder) == {"new"}
    assert alone(folder)


def test_only_checkpoints_and_empty_folders_are_replaced(model, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    assert save_model(photos, model) == photos
    (photos / "model.safetensors").unlink()
    for stood in (photos, photos / "config.yaml"):
        with pytest.raises(CheckpointError, match="exists and is no checkpoint; give a new name"):
            save_model(stood, model)
    assert {path.name for path in photos.iterdir()} == FILES - {"model.safetensors"}


def test_a_link_is_followed(model, tmp_path, monkeypatch):
    folder = save_model(tmp_path / "steps" / "7", model)
    (tmp_path / "best").symlink_to("steps/7")
    save_model(tmp_path / "best", model, {"max_steps": 8})
    assert (tmp_path / "best").is_symlink()
    assert load_provenance(folder).items() >= {"max_steps": 8}.items()
    monkeypatch.chdir(tmp_path)
    assert save_model("best", model) == Path("best")


def test_a_place_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_model(tmp_path / "file" / "m", model)


def test_what_a_killed_process_left_is_swept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getppid()):
        (tmp_path / f".m.{pid}.tmp").mkdir()
    write_folder(tmp_path / "m", put("new"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f".m.{os.getppid()}.tmp", "m"])


def save_for_ever(folder, model):
    while True:
        save_model(folder, model)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_killed_at_ten_moments_it_always_loads(model, tmp_path):
    folder, dice = save_model(tmp_path / "m", model), random.Random(0)
    expected, taken = logits(model), set()
    for _ in range(10):
        process = get_context("fork").Process(target=save_for_ever, args=(folder, model))
        process.start()
        time.sleep(dice.uniform(0.02, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was still saving"
        taken.add(folder.stat().st_ino)
        assert torch.equal(logits(load_model(folder)), expected)
    assert len(taken) > 1, "some saves were finished"
    save_model(folder, model)
    assert alone(folder)


def test_a_flipped_byte_in_the_weights_is_not_believed(tmp_path):
    folder = save_model(tmp_path / "model", tiny_model())
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="is not the file that provenance.json tells of"):
        load_model(folder)
