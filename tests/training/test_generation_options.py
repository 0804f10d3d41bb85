"""The generation options that a run takes over from its initial checkpoint."""

from whisper_cases import MULTILINGUAL, build, save

import mmx
from mmx.config.schema import DataConfig, GenerationConfig, RunConfig
from mmx.models.checkpoint import save_model
from mmx.training.model_setup import resolve_generation


def test_a_trained_speech_model_generates_with_the_language_of_its_prompt(tmp_path):
    """Training never sees the prompt of another language."""
    (tmp_path / "published").mkdir()
    published = mmx.load(save(tmp_path / "published", build(), **MULTILINGUAL))
    assert published.generation.language is None
    folder = save_model(tmp_path / "imported", published.model, None, published.generation)
    run = RunConfig(init=str(folder), train=(DataConfig(path="list.jsonl"),))
    resolved = resolve_generation(run).generation
    assert resolved == published.generation.model_copy(update={"language": "en"})
    given = run.model_copy(update={"generation": GenerationConfig(language="de")})
    assert resolve_generation(given).generation.language == "de"


def test_other_models_have_no_language():
    run = RunConfig(init="bundled", train=(DataConfig(path="list.jsonl"),))
    assert resolve_generation(run).generation == mmx.load().generation
