"""What a run starts from: the model with its tokenizer, the generation options, and checks of the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmx.config.schema import GenerationConfig, RunConfig
from mmx.data.batching import DataSets
from mmx.data.examples import TextTask
from mmx.errors import ConfigError, MmxError, suggest
from mmx.hub.language_model import build_from_language_model
from mmx.inference.speech import prompt_language
from mmx.models.checkpoint import TOKENIZER, load_generation, load_model, load_model_config
from mmx.models.model import Model, mount, unmount
from mmx.text.prompts import normalize_question
from mmx.text.tokenizer import Tokenizer

MAX_TOKENIZER_EXAMPLES = 20_000


def load_initial_model(config: RunConfig) -> Model | None:
    """Return the checkpoint of `init` with the sources of `mount`, or None if the run builds a new model."""
    if config.init is None:
        return None
    return mount(unmount(load_model(config.init), config.unmount), config.mount)


def source_names(config: RunConfig, initial: Model | None) -> list[str]:
    """Return the names of the sources of a run's model, before a new model is built."""
    if initial is not None:
        return list(initial.encoders)
    return [] if config.model is None else list(config.model.sources)


def build_model(config: RunConfig, sets: DataSets, saved_state: Path | None = None) -> Model:
    """Build the new model of a run.

    It is a model around the pretrained language model of the decoder, or one whose tokenizer is trained on the
    training texts.

    Args:
        saved_state: the state that a resumed run continues from. Its tokenizer is kept even if the data has changed,
            and no language model is read.
    """
    assert config.model is not None, "init is loaded by load_initial_model"
    if config.model.decoder.pretrained is not None:
        return load_model(saved_state) if saved_state else build_from_language_model(config.model)
    if saved_state is not None:
        text = (saved_state / TOKENIZER).read_text(encoding="utf-8")
        return Model(config.model, Tokenizer.from_json(text, str(saved_state), config.model.special_tokens))
    options = config.model.tokenizer
    texts = _training_texts(sets)
    return Model(
        config.model, Tokenizer.train(texts, config.model.vocab_size, lowercase=options.lowercase, nfkc=options.nfkc)
    )


def resolve_generation(config: RunConfig) -> RunConfig:
    """Return the configuration with generation options: its own, or those of the checkpoint of `init`.

    A speech recognition model is trained with the language of its prompt, so that language is not detected afterwards.
    """
    if config.generation is not None:
        return config
    if config.init is None:
        return config.model_copy(update={"generation": GenerationConfig()})
    inherited = load_generation(config.init)
    if inherited.language is None:
        language = prompt_language(load_model_config(config.init))
        inherited = inherited.model_copy(update={"language": language})
    return config.model_copy(update={"generation": inherited})


def check_best_metric(config: RunConfig) -> None:
    """Raise ConfigError if `metric_for_best_model` names no validation set.

    The metrics of a validation set are known after the first validation only, and are checked then.
    """
    metric = config.training.metric_for_best_model
    name = metric.partition(".")[0]
    if metric != "loss" and name not in config.validation:
        known = ["loss", *config.validation]
        raise ConfigError(
            f"training.metric_for_best_model is {metric!r}; expected 'loss' or VALIDATION_SET.METRIC; "
            f"{suggest(name, known)}",
            code="training.best_metric",
            given=metric,
            known=known,
        )


def _training_texts(sets: DataSets) -> Iterator[str]:
    """Yield the texts of the first MAX_TOKENIZER_EXAMPLES examples of each data set."""
    for _, examples in sets:
        for index in range(min(len(examples), MAX_TOKENIZER_EXAMPLES)):
            try:
                tasks = examples[index].tasks
            except MmxError:
                continue
            for task in tasks:
                yield from _texts_of(task)


def _texts_of(task: TextTask) -> Iterator[str]:
    yield from task.targets
    if task.question is not None:
        yield normalize_question(task.question)
