"""The bundled model: its size, its recorded outputs, its accuracy on generated scenes, and its model card."""

import json
from pathlib import Path

import pytest

import mmx
from mmx.config.schema import DataConfig
from mmx.data.scene_examples import SceneExamples
from mmx.evaluation.evaluate import evaluate
from mmx.models.checkpoint import BUNDLED, FORMAT_VERSION, load_provenance

IMAGES = Path(__file__).parents[2] / "demos" / "images"
MIN_EXACT_MATCH = 0.8  # well under the measured figure: wrong preprocessing or a wrong tokenizer is worse than this


@pytest.fixture(scope="module")
def pipeline():
    return mmx.load()


def test_it_has_at_most_25_megabytes():
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*")) <= 25_000_000


def test_outputs_equal_the_recorded_ones(pipeline):
    """The same texts; log-probabilities within what kernels of other processors differ by."""
    recorded = json.loads((BUNDLED / "golden.json").read_text(encoding="utf-8"))
    assert len(recorded) >= 5
    for name, expected in recorded.items():
        memory = pipeline.encode(image=str(IMAGES / name))
        (caption,) = pipeline.generate(memory)
        assert caption.text == expected["caption"]
        assert caption.score == pytest.approx(expected["score"], abs=1e-3)
        assert pipeline.ask(memory, list(expected["answers"])) == list(expected["answers"].values())


def test_questions_about_new_scenes_are_answered(pipeline):
    scenes = SceneExamples(DataConfig(path="scenes", num_examples=40, seed=987, tasks=("ask",)))
    metrics = evaluate(pipeline, scenes).metrics
    assert metrics["questions"] > 300
    assert metrics["exact match"] >= MIN_EXACT_MATCH


def test_its_card_and_provenance_state_its_origin():
    card = (BUNDLED / "README.md").read_text(encoding="utf-8")
    for fact in ("Data", "Terms", "Steps", "Wall time", "Machine", "CIDEr", "easy-VQA", "Limits"):
        assert fact in card
    provenance = load_provenance(BUNDLED)
    assert provenance["steps"] > 0
    assert provenance["format_version"] == FORMAT_VERSION
