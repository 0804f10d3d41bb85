"""Sources that are mounted on a trained model: the old task stays bit-identical, and the new one is learned."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmx.config.loader import parse_config
from mmx.config.schema import RunConfig, SourceConfig
from mmx.errors import ConfigError
from mmx.inference.pipeline import Pipeline
from mmx.models.checkpoint import load_model, save_model
from mmx.models.model import Model, mount, unmount
from mmx.testing import tiny_model
from mmx.training.loop import train

TEXT_ENCODER = {
    "encoder": "text",
    "options": {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "dropout": 0.0, "max_position_embeddings": 16},
}
IMAGE_ENCODER = SourceConfig(encoder="image", options={"backbone": "test_resnet", "size": 32})
NEW_SOURCE = {"encoder": "mmx.testing:ToyEncoder", "options": {"features": 16}}
ONLY_NEW_SOURCE = {"decoder": {"freeze": True}, "sources": {"freeze": True}, "sources.new": {}}


def old_model() -> Model:
    return tiny_model({"image": IMAGE_ENCODER, "text": SourceConfig(**TEXT_ENCODER)}, dropout=0.0)


def yes_or_no(is_yes: bool) -> str:
    return "yes" if is_yes else "no"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers yes or no to texts."""
    folder = tmp_path_factory.mktemp("old")
    rows = []
    for first in ("up", "down"):
        for second in ("high", "low", "fast", "slow", "far", "near"):
            rows.append({"text": f"{first} {second}", "question": "up?", "answer": yes_or_no(first == "up")})
    (folder / "texts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    document = {
        "init": str(save_model(folder / "new", old_model())),
        "train": [{"path": str(folder / "texts.jsonl")}],
        "training": {
            "max_steps": 60,
            "per_device_batch_size": 12,
            "texts_per_image": 1,
            "learning_rate": 0.005,
            "warmup_steps": 5,
            "label_smoothing": 0.0,
        },
        "output_dir": str(folder / "run"),
    }
    return train(parse_config(document, RunConfig, where="test"), quiet=True)


def mount_config(init: Path, data: Path, output_dir: Path, **training: object) -> RunConfig:
    """Return a run that mounts a source and trains only it."""
    options = {
        "max_steps": 30,
        "per_device_batch_size": 8,
        "texts_per_image": 1,
        "learning_rate": 0.02,
        "warmup_steps": 3,
        "ema_decay": 0.9,
        "label_smoothing": 0.0,
        "param_groups": ONLY_NEW_SOURCE,
        **training,
    }
    document = {
        "init": str(init),
        "mount": {"new": NEW_SOURCE},
        "train": [{"path": str(data)}],
        "training": options,
        "output_dir": str(output_dir),
    }
    return parse_config(document, RunConfig, where="test")


PAIRS = [(a / 4, b / 4) for a in range(-5, 6) for b in range(-5, 6) if a + b]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whether the sum of two numbers is positive."""
    rows = [{"new": [a, b], "question": "up?", "answer": yes_or_no(a + b > 0)} for a, b in PAIRS]
    path = tmp_path_factory.mktemp("data") / "numbers.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


class OldTask(NamedTuple):
    """Logits of texts over two images, and the keys of the images."""

    logits: Tensor
    keys: Tensor


def run_old_task(model: Model) -> OldTask:
    inputs = {"image": model.collate("image", [fractal(60), fractal(200)])}
    tokens = torch.tensor([[[1, 7, 70, 71, 72]], [[1, 7, 80, 81, 82]]])
    with torch.inference_mode():
        memory = model.eval().encode(inputs, 2)
        return OldTask(model.decoder(tokens, memory), memory.keys)


def fractal(quality: int) -> Image.Image:
    return Image.effect_mandelbrot((40, 40), (-2, -1.2, 1, 1.2), quality).convert("RGB")


def test_old_task_stays_bit_identical_and_new_task_is_learned(tmp_path, data, trained):
    texts = ("up near", "down far")
    old_answers = [Pipeline(load_model(trained)).ask({"text": text}, "up?") for text in texts]
    before = run_old_task(load_model(trained))
    mounted = load_model(train(mount_config(trained, data, tmp_path / "run", max_steps=120), quiet=True))
    after = run_old_task(mounted)
    pipeline = Pipeline(mounted)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.keys, after.keys)
    assert set(mounted.sources) == {"image", "text", "new"}
    assert [pipeline.ask({"text": text}, "up?") for text in texts] == old_answers
    weights = mounted.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_model(trained).state_dict().items())
    memory = pipeline.encode(new=[list(pair) for pair in PAIRS])
    correct = 0
    for row, (a, b) in enumerate(PAIRS):
        best = pipeline.rank(memory.select([row]), "up?", ["yes", "no"])[0]
        correct += best.answer == yes_or_no(a + b > 0)
    assert correct >= 0.9 * len(PAIRS), f"{correct} of {len(PAIRS)}"


def test_run_that_mounts_resumes_bit_equal(tmp_path, data):
    init = save_model(tmp_path / "init", old_model())
    whole = train(mount_config(init, data, tmp_path / "whole", max_steps=6), quiet=True)
    config = mount_config(init, data, tmp_path / "resumed", max_steps=6, save_steps=3)
    train(config, quiet=True)
    shutil.rmtree(tmp_path / "resumed/steps/000006")
    resumed = train(config, resume=True, quiet=True)
    one = load_model(whole).state_dict()
    two = load_model(resumed).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_mount_shares_the_old_modules_and_initializes_new_ones():
    model = old_model()
    mounted = mount(model, {"new": SourceConfig(**NEW_SOURCE)})
    assert mounted.decoder is model.decoder
    assert mounted.sources["image"] is model.sources["image"]
    assert mounted.encoder("new").width == 16
    assert mounted.config.sources["new"].options == {"features": 16}
    assert mount(model, {}) is model
    with pytest.raises(ConfigError):
        mount(model, {"image": SourceConfig(**NEW_SOURCE)})


def test_unmount_removes_a_source_and_mount_replaces_it():
    model = old_model()
    without = unmount(model, ["image"])
    assert set(without.sources) == {"text"}
    assert set(without.config.sources) == {"text"}
    assert without.sources["text"] is model.sources["text"]
    assert without.decoder is model.decoder
    assert unmount(model, []) is model
    replaced = mount(without, {"image": SourceConfig(**NEW_SOURCE)})
    assert replaced.encoder("image").width == 16
    assert replaced.sources["text"] is model.sources["text"]
    with pytest.raises(ConfigError) as error:
        unmount(model, ["images"])
    assert error.value.code == "unmount.name"
    assert error.value.details["known"] == ["image", "text"]


def test_run_replaces_the_source_of_its_checkpoint(tmp_path, data):
    init = save_model(tmp_path / "init", old_model())
    config = mount_config(init, data, tmp_path / "run", max_steps=2)
    config = config.model_copy(update={"unmount": ("image",)})
    trained = load_model(train(config, quiet=True))
    assert set(trained.sources) == {"text", "new"}


def test_batches_without_the_new_source_change_nothing(tmp_path, data):
    init = save_model(tmp_path / "init", old_model())
    rows = [*data.read_text().splitlines()[:3], '{"text": "up near", "question": "up?", "answer": "yes"}']
    rows += [f'{{"text": "up {n}", "question": "up?", "answer": "yes"}}' for n in range(20)]
    (tmp_path / "few.jsonl").write_text("\n".join(rows))
    options = {"max_steps": 12, "per_device_batch_size": 2, "warmup_steps": 1}
    best = train(mount_config(init, tmp_path / "few.jsonl", tmp_path / "run", **options), quiet=True)
    weights = load_model(best).state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_model(init).state_dict().items())


MODEL = {"sources": {"a": NEW_SOURCE}}
START_ERRORS = [
    ({"train": [{"path": "scenes"}]}, "neither model nor init"),
    ({"init": "a", "model": MODEL, "train": [{"path": "scenes"}]}, "both model and init"),
    ({"model": MODEL, "mount": {"b": NEW_SOURCE}, "train": [{"path": "x"}]}, "mount needs init"),
    ({"model": MODEL, "unmount": ["a"], "train": [{"path": "x"}]}, "unmount needs init"),
]


@pytest.mark.parametrize(("document", "problem"), START_ERRORS)
def test_run_needs_exactly_one_start(document, problem):
    with pytest.raises(ConfigError, match=problem):
        parse_config(document, RunConfig, where="test")
