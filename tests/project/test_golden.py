"""Outputs of the bundled model and losses of a short training run, compared with stored values.

`golden.json` was recorded before the code was renamed and restructured. Texts and tokens must be equal; numbers may
differ as much as kernels of other processors do.
"""

import json
from pathlib import Path

import pytest

import mmx
from mmx.config.schema import RunConfig
from mmx.training.loop import train

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))
IMAGES = {name: str(ROOT / "demos" / "images" / name) for name in GOLDEN["greedy"]}
IMAGE = IMAGES["four-shapes.png"]

QUESTIONS = ["how many triangles are there?", "what color is the cross?", "is the cross left of the star?"]
BOXES = [(0.08, 0.45, 0.3, 0.7), (0.0, 0.0, 0.5, 0.5)]
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 50, "num_return_sequences": 2, "seed": 3}
PENALTIES = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 6}

TRAINING = {
    "model": {
        "sources": {
            "image": {
                "encoder": "image",
                "options": {
                    "backbone": "resnet18",
                    "size": 48,
                    "stage": 2,
                    "mean": [0.8, 0.8, 0.8],
                    "std": [0.25, 0.25, 0.25],
                    "interpolation": "bilinear",
                },
                "projection": {"dropout": 0.1},
            }
        },
        "decoder": {
            "num_layers": 2,
            "hidden_size": 64,
            "num_heads": 4,
            "max_position_embeddings": 48,
            "dropout": 0.1,
        },
        "vocab_size": 600,
    },
    "training": {
        "mixed_precision": "no",
        "max_steps": 20,
        "per_device_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "texts_per_image": 3,
        "learning_rate": 3e-3,
        "warmup_steps": 5,
        "label_smoothing": 0.1,
        "modality_dropout": 0.1,
        "ema_decay": 0.9,
        "logging_steps": 1,
        "eval_steps": 100,
        "save_steps": 100,
        "param_groups": {"sources.image.encoder": {"lr_scale": 0.5}},
    },
    "generation": {"max_new_tokens": 6},
}
AUGMENTATION = {"min_crop_scale": 0.6, "horizontal_flip": True, "color_jitter": 0.2, "random_erasing": 0.2}
QUESTION_DATA = {
    "path": "scenes",
    "num_examples": 100,
    "seed": 4,
    "tasks": ["ask"],
    "question_types": ["color", "size", "pointed"],
    "sampling_weight": 0.5,
}


@pytest.fixture(scope="module")
def model():
    return mmx.load()


@pytest.fixture(scope="module")
def memory(model):
    """All images, encoded as one batch."""
    return model.encode(image=list(IMAGES.values()))


def texts_and_scores(model, memory, questions, boxes=(), **options):
    """Each stream's texts as [text, score] by image: {image: [K][n]}."""
    rows = [questions] * len(IMAGES)
    box_rows = [boxes] * len(IMAGES) if boxes else ()
    generated = model.generate_batch(memory, rows, model.generation_config(options), box_rows)
    found = {}
    for name, streams in zip(IMAGES, generated, strict=True):
        found[name] = [[[text.text, text.score] for text in stream] for stream in streams]
    return found


def assert_equal_texts(found, expected):
    """Equal texts, close scores; both as {image: list of [text, score]}."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert [text for text, _ in found[name]] == [text for text, _ in expected[name]], name
        assert [score for _, score in found[name]] == pytest.approx([score for _, score in expected[name]], abs=1e-3)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("greedy", {"num_beams": 1}),
        ("beams", {"num_beams": 5, "num_return_sequences": 3}),
        ("sample", {"num_beams": 1, **SAMPLING}),
        ("guided", {"num_beams": 1, "guidance_scale": 1.5}),
        ("penalties", {"num_beams": 1, **PENALTIES}),
    ],
)
def test_captions(model, memory, key, options):
    found = texts_and_scores(model, memory, [None], **options)
    assert_equal_texts({name: streams[0] for name, streams in found.items()}, GOLDEN[key])


def test_tokens_of_a_greedy_caption(model, memory):
    options = model.generation_config({"num_beams": 1})
    generated = model.generate_batch(memory, [[None]] * len(IMAGES), options)
    for name, streams in zip(IMAGES, generated, strict=True):
        tokens = streams[0][0].tokens
        expected = GOLDEN["tokens"][name]
        assert [piece for piece, _ in tokens] == [piece for piece, _ in expected], name
        assert [logprob for _, logprob in tokens] == pytest.approx([logprob for _, logprob in expected], abs=1e-3)


@pytest.mark.parametrize(("key", "options"), [("answers", {"num_beams": 1}), ("answers_beams", {})])
def test_answers(model, memory, key, options):
    found = texts_and_scores(model, memory, QUESTIONS, **options)
    assert_equal_texts({name: [stream[0] for stream in streams] for name, streams in found.items()}, GOLDEN[key])


def test_answers_about_boxes(model, memory):
    found = texts_and_scores(model, memory, ["what is this?", None], BOXES)
    assert_equal_texts({name: [stream[0] for stream in streams] for name, streams in found.items()}, GOLDEN["boxes"])


def test_ranking(model):
    ranked = model.rank(IMAGE, QUESTIONS[1], ["red", "green", "black", "blue"])
    expected = GOLDEN["ranking"]
    assert [found.answer for found in ranked] == [answer for answer, *_ in expected]
    assert [found.probability for found in ranked] == pytest.approx([p for _, p, _ in expected], abs=1e-3)
    assert [found.logprob for found in ranked] == pytest.approx([p for *_, p in expected], abs=1e-3)
    captions = model.rank(IMAGE, None, ["two shapes", "a large red circle"])
    expected = GOLDEN["ranking_captions"]
    assert [found.answer for found in captions] == [answer for answer, _ in expected]
    assert [found.logprob for found in captions] == pytest.approx([p for _, p in expected], abs=1e-3)


def test_streamed_text(model):
    assert list(model.stream(IMAGE)) == GOLDEN["stream"]


@pytest.mark.parametrize("method", ["attention", "both"])
def test_maps(model, method):
    look = model.look(IMAGE, QUESTIONS[1], method=method)
    assert look.map(0).flatten().tolist() == pytest.approx(GOLDEN[f"map_{method}"], abs=1e-3)
    assert [look.words[0].logprob, look.words[0].gain] == pytest.approx(GOLDEN["gain"], abs=1e-3)


def training_records(config, folder):
    """The lines of metrics.jsonl that have a training loss."""
    train(RunConfig.model_validate({**config, "output_dir": str(folder)}), quiet=True)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [record for record in records if "loss" in record]


def test_losses_of_twenty_steps(tmp_path):
    data = [{"path": "scenes", "num_examples": 400, "seed": 1, "augmentation": AUGMENTATION}, QUESTION_DATA]
    records = training_records({**TRAINING, "train": data}, tmp_path / "run")
    assert [record["loss"] for record in records] == pytest.approx(GOLDEN["losses"], rel=1e-2)
    assert [record["learning_rate"] for record in records] == pytest.approx(GOLDEN["learning_rates"], rel=1e-6)


def test_losses_with_a_reward(tmp_path):
    """Self-critical sequence training: the sampled captions decide, so the first loss is the exact one."""
    data = [{"path": "scenes", "num_examples": 60, "seed": 1, "tasks": ["caption"], "reward": "cider"}, QUESTION_DATA]
    training = {**TRAINING["training"], "max_steps": 6, "gradient_accumulation_steps": 1}
    records = training_records({**TRAINING, "train": data, "training": training}, tmp_path / "run")
    assert len(records) == 6
    assert records[0]["loss"] == pytest.approx(GOLDEN["losses_scst"][0], rel=1e-2)
