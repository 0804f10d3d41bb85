"""The bundled model: small, whole, and saying today what it said when it was put there."""

import json
from pathlib import Path

import pytest

import mmx
from mmx.config.schema import DataConfig
from mmx.data.scene_examples import SceneExamples
from mmx.evaluation.evaluate import evaluate
from mmx.inference.pipeline import BUNDLED
from mmx.models.checkpoint import load_provenance

PICTURES = Path(__file__).parents[2] / "demos" / "pictures"


@pytest.fixture(scope="module")
def model():
    return mmx.load()


def test_it_weighs_at_most_25_megabytes():
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*")) <= 25_000_000


def test_it_says_what_it_said(model):
    """Golden outputs: the same words, and log-probabilities within what kernels of other machines may differ by."""
    golden = json.loads((BUNDLED / "golden.json").read_text(encoding="utf-8"))
    assert len(golden) >= 5
    for name, expected in golden.items():
        memory = model.encode(image=str(PICTURES / name))
        said = model.generate_batch(memory, [[None]], model.generation)[0][0][0]
        assert said.text == expected["caption"]
        assert said.score == pytest.approx(expected["score"], abs=1e-3)
        assert model.ask(memory, list(expected["answers"])) == list(expected["answers"].values())


def test_unseen_scenes_are_answered(model):
    """A floor well under the measured figure, on a few scenes: a broken preprocessing or tokenizer falls through it."""
    scenes = SceneExamples(DataConfig(path="scenes", num_examples=40, seed=987, tasks=("ask",)))
    metrics = evaluate(model, scenes).metrics
    assert metrics["questions"] > 300
    assert metrics["exact match"] >= FLOOR


def test_its_card_states_where_it_comes_from():
    card = (BUNDLED / "README.md").read_text(encoding="utf-8")
    for fact in ("Data", "Terms", "Steps", "Wall time", "Machine", "CIDEr", "easy-VQA", "Limits"):
        assert fact in card
    assert load_provenance(BUNDLED)["steps"] > 0


FLOOR = 0.8
