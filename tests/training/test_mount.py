"""A modality that is added later: what the model had stays as it was, to the bit, and the new is learned."""

import pytest
import torch

from mmx.config.loader import parse_config
from mmx.config.schema import RunConfig, SourceConfig
from mmx.errors import ConfigError
from mmx.inference.pipeline import Pipeline
from mmx.models.checkpoint import load_model, save_model
from mmx.models.model import mount
from mmx.testing import tiny_model
from mmx.training.loop import train

WORDS = {
    "encoder": "text",
    "options": {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "dropout": 0.0, "max_position_embeddings": 16},
}
NUMBERS = {"encoder": "mmx.testing:ToyEncoder", "options": {"features": 16}}
FROZEN = {"decoder": {"freeze": True}, "sources": {"freeze": True}, "sources.later": {}}
PICTURE = SourceConfig(encoder="image", options={"backbone": "test_resnet", "size": 32})


def old_model():
    return tiny_model({"image": PICTURE, "text": SourceConfig(**WORDS)}, dropout=0.0)


@pytest.fixture(scope="module")
def experienced(tmp_path_factory):
    """A model that has learned to say yes and no to texts, and whose decoder therefore has something to say."""
    folder = tmp_path_factory.mktemp("old")
    texts = [f"{a} {b}" for a in ("up", "down") for b in ("high", "low", "fast", "slow", "far", "near")]
    rows = [f'{{"text": "{t}", "question": "up?", "answer": "{"yes" if t[0] == "u" else "no"}"}}' for t in texts]
    (folder / "texts.jsonl").write_text("\n".join(rows))
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


def config(init, data, out, **training):
    facts = {
        "max_steps": 30,
        "per_device_batch_size": 8,
        "texts_per_image": 1,
        "learning_rate": 0.02,
        "warmup_steps": 3,
        "ema_decay": 0.9,
        "label_smoothing": 0.0,
    }
    document = {
        "init": str(init),
        "mount": {"later": NUMBERS},
        "train": [{"path": str(data)}],
        "training": {**facts, "param_groups": FROZEN, **training},
        "output_dir": str(out),
    }
    return parse_config(document, RunConfig, where="test")


@pytest.fixture
def data(tmp_path):
    """Is the sum of two numbers above nought?"""
    rows = [
        f'{{"later": [{a / 4}, {b / 4}], "question": "up?", "answer": "{"yes" if a + b > 0 else "no"}"}}'
        for a in range(-5, 6)
        for b in range(-5, 6)
        if a + b
    ]
    path = tmp_path / "numbers.jsonl"
    path.write_text("\n".join(rows))
    return path


def old_task(model):
    """The logits of texts over two pictures, and the features behind them."""
    inputs = {"image": model.collate("image", [_picture(60), _picture(200)])}
    tokens = torch.tensor([[[1, 7, 70, 71, 72]], [[1, 7, 80, 81, 82]]])
    with torch.inference_mode():
        memory = model.eval().encode(inputs, 2)
        return model.decoder(tokens, memory), memory.keys


def _picture(shade):
    from PIL import Image

    return Image.effect_mandelbrot((40, 40), (-2, -1.2, 1, 1.2), shade).convert("RGB")


def test_the_old_task_stays_bit_identical_and_the_new_one_is_learned(tmp_path, data, experienced):
    init = experienced
    asked = ("up near", "down far")
    old_answers = [Pipeline(load_model(init)).ask({"text": text}, "up?") for text in asked]
    assert old_answers == ["yes", "no"]
    before_logits, before_keys = old_task(load_model(init))
    best = train(config(init, data, tmp_path / "run", steps=120), quiet=True)
    grown = load_model(best)
    after_logits, after_keys = old_task(grown)
    assert torch.equal(before_logits, after_logits)
    assert torch.equal(before_keys, after_keys)
    assert set(grown.sources) == {"image", "text", "later"}
    assert [Pipeline(grown).ask({"text": text}, "up?") for text in asked] == old_answers
    old, new = load_model(init).state_dict(), grown.state_dict()
    assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())
    pairs = [(a / 4, b / 4) for a in range(-5, 6) for b in range(-5, 6) if a + b]
    memory = Pipeline(grown).encode(later=[[a, b] for a, b in pairs])
    ranked = [Pipeline(grown).rank(memory.select([row]), "up?", ["yes", "no"])[0] for row in range(len(pairs))]
    right = sum((found.answer == "yes") == (a + b > 0) for found, (a, b) in zip(ranked, pairs, strict=True))
    assert right >= 0.9 * len(pairs), f"{right} of {len(pairs)}"


def test_a_run_that_mounts_can_be_stopped_and_resumed_to_the_bit(tmp_path, data):
    init = save_model(tmp_path / "init", old_model())
    whole = train(config(init, data, tmp_path / "whole", steps=6), quiet=True)
    train(config(init, data, tmp_path / "param_groups", steps=6, save_every=3), quiet=True)
    import shutil

    shutil.rmtree(tmp_path / "parts/steps/000006")
    resumed = train(config(init, data, tmp_path / "param_groups", steps=6, save_every=3), resume=True, quiet=True)
    one, two = (load_model(folder).state_dict() for folder in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_mounting_shares_the_old_parts_and_draws_new_ones():
    model = old_model()
    grown = mount(model, {"later": SourceConfig(**NUMBERS)})
    assert grown.decoder is model.decoder
    assert grown.sources["image"] is model.sources["image"]
    assert grown.encoder("later").width == 16
    assert grown.config.sources["later"].options == {"features": 16}
    assert mount(model, {}) is model
    with pytest.raises(ConfigError, match="mount names image, which the model of init has already; choose another"):
        mount(model, {"image": SourceConfig(**NUMBERS)})


def test_a_batch_without_the_new_source_teaches_nothing_and_stops_nothing(tmp_path, data):
    init = save_model(tmp_path / "init", old_model())
    rows = [*data.read_text().splitlines()[:3], *['{"text": "up near", "question": "up?", "answer": "yes"}'] * 1]
    rows += [f'{{"text": "up {n}", "question": "up?", "answer": "yes"}}' for n in range(20)]
    (tmp_path / "few.jsonl").write_text("\n".join(rows))
    best = train(config(init, tmp_path / "few.jsonl", tmp_path / "run", steps=12, batch_size=2, warmup=1), quiet=True)
    old, new = load_model(init).state_dict(), load_model(best).state_dict()
    assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"train": [{"path": "scenes"}]}, "neither model nor init are given"),
        ({"init": "a", "model": {"sources": {"a": NUMBERS}}, "train": [{"path": "scenes"}]}, "both model and init"),
        (
            {"model": {"sources": {"a": NUMBERS}}, "mount": {"b": NUMBERS}, "train": [{"path": "x"}]},
            "without init, put",
        ),
    ],
)
def test_where_a_run_starts_is_said_once(document, said):
    with pytest.raises(ConfigError, match=said):
        parse_config(document, RunConfig, where="test")
