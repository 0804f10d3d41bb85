"""The image cache: images are decoded once, and training with it is unchanged where sizes agree."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from toy_runs import RecordingTrainer, state_bytes

from mmx.config.schema import DataConfig, RunConfig, SourceConfig, TrainingConfig
from mmx.data import image_cache
from mmx.data.batching import TrainingDataset
from mmx.data.examples import Example, TextTask
from mmx.data.formats import read_examples
from mmx.data.image_cache import CachedImages
from mmx.errors import DataError, ImageError, TrainingError
from mmx.testing import tiny_model


def image_examples(folder: Path, count: int = 3) -> list[Example]:
    """Return examples of images of different sizes, and one without an image at the end."""
    examples = []
    for i in range(count):
        path = folder / f"{i}.png"
        Image.effect_noise((20 + 8 * i, 30), 90).convert("RGB").save(path)
        examples.append(Example(str(i), {"image": str(path), "text": "x"}, (TextTask(("a",)),)))
    return [*examples, Example("none", {"text": "y"}, (TextTask(("b",)),))]


def test_images_are_decoded_once_and_resized(tmp_path, monkeypatch):
    examples = image_examples(tmp_path)
    cached = CachedImages(examples, ["image"], 16)
    first = cached[:]

    def fail(source: object) -> Image.Image:
        raise AssertionError("decoded again")

    monkeypatch.setattr(image_cache, "load_image", fail)
    second = [cached[i] for i in range(len(cached))]
    assert [example.id for example in second] == ["0", "1", "2", "none"]
    for example, one, other in zip(examples[:3], first, second, strict=False):
        expected = Image.open(example.sources["image"]).resize((16, 16), Image.Resampling.BILINEAR)
        assert one.sources["image"].tobytes() == other.sources["image"].tobytes() == expected.tobytes()
        assert other.sources["text"] == "x"
        assert other.tasks == example.tasks
    assert second[3].sources == {"text": "y"}
    assert cached.pixels["image"].dtype == torch.uint8
    assert cached.pixels["image"].is_shared()


def test_unreadable_image_is_an_error_each_time(tmp_path):
    examples = image_examples(tmp_path)
    (tmp_path / "1.png").write_bytes(b"nothing")
    cached = CachedImages(examples, ["image"], 16)
    for _ in range(2):
        with pytest.raises(ImageError):
            cached[1]
    assert cached[2].id == "2"
    with pytest.raises(IndexError):
        cached[4]


def test_scenes_at_their_own_size_are_unchanged():
    examples = read_examples(DataConfig(path="scenes", num_examples=4, seed=1))
    cached = CachedImages(examples, ["image"], 128)
    for _ in range(2):
        for one, other in zip(examples, cached, strict=True):
            assert one.sources["image"].tobytes() == other.sources["image"].tobytes()
            assert (one.id, one.tasks) == (other.id, other.tasks)


def scene_config(output_dir: Path, cache_size: int | None, num_workers: int = 0) -> RunConfig:
    encoder = {"backbone": "resnet10t", "size": 32, "stage": 1}
    augmentation = {"min_crop_scale": 0.5, "horizontal_flip": True, "color_jitter": 0.3}
    data = {"path": "scenes", "num_examples": 5, "augmentation": augmentation, "image_cache_size": cache_size}
    document = {
        "model": {
            "sources": {"image": {"encoder": "image", "options": encoder}},
            "decoder": {"hidden_size": 32, "num_layers": 1, "num_heads": 4},
            "vocab_size": 300,
        },
        "train": [data],
        "training": {
            "max_steps": 4,
            "per_device_batch_size": 3,
            "texts_per_image": 2,
            "num_workers": num_workers,
        },
        "output_dir": str(output_dir),
    }
    return RunConfig.model_validate(document)


def recorded_run(config: RunConfig, resume: bool = False) -> Sequence[object]:
    trainer = RecordingTrainer(config, resume)
    trainer.run()
    return trainer.recorded


def test_training_with_a_cache_is_bit_equal_also_with_workers_and_resumed(tmp_path):
    """Scenes have 128 pixels a side, so the cache changes nothing."""
    expected = recorded_run(scene_config(tmp_path / "plain", None))
    assert recorded_run(scene_config(tmp_path / "cached", 128)) == expected
    assert recorded_run(scene_config(tmp_path / "workers", 128, num_workers=2)) == expected
    stopped = RecordingTrainer(scene_config(tmp_path / "resumed", 128))
    stopped.stop_in = 2
    with pytest.raises(TrainingError):
        stopped.run()
    assert stopped.recorded + recorded_run(scene_config(tmp_path / "resumed", 128), resume=True) == expected
    assert state_bytes(tmp_path / "resumed") == state_bytes(tmp_path / "plain")


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_cache_of_squashed_images_is_refused_for_another_fit(tmp_path, fit):
    source = SourceConfig(encoder="image", options={"backbone": "test_resnet", "size": 32, "fit": fit})
    config = DataConfig(path="unused", image_cache_size=32)
    sets = [(config, image_examples(tmp_path))]
    with pytest.raises(DataError) as error:
        TrainingDataset(tiny_model({"image": source}), sets, TrainingConfig(max_steps=1))
    assert error.value.code == "data.cache_fit"
