"""The configuration: frozen, refusing what it does not know and what contradicts itself."""

from typing import Annotated

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

import mmx.config.schema
from mmx.config.schema import (
    BaseTransformerConfig,
    DataConfig,
    DecoderConfig,
    FrozenModel,
    GenerationConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)

SOURCES = {"image": SourceConfig(encoder="image")}
CLASSES = [
    c
    for c in vars(mmx.config.schema).values()
    if isinstance(c, type) and issubclass(c, FrozenModel) and c is not FrozenModel
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_is_frozen_refuses_strangers_and_says_what_it_is(kind):
    assert issubclass(kind, BaseModel)
    assert kind.__doc__
    assert kind.model_config["frozen"]
    assert kind.model_config["extra"] == "forbid"
    required = {
        "encoder": "image",
        "sources": SOURCES,
        "path": "x",
        "model": {"sources": SOURCES},
        "train": [{"path": "x"}],
    }
    known = {name: value for name, value in required.items() if name in kind.model_fields}
    made = kind(**known)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(made, next(iter(kind.model_fields)), 1)
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        kind(**known, wdith=3)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_default_obeys_its_own_bounds(kind):
    for field in kind.model_fields.values():
        if not field.is_required():
            bounds = TypeAdapter(Annotated[field.annotation, "within", *field.metadata])
            assert bounds.validate_python(field.default) == field.default


def test_derived_numbers():
    config = BaseTransformerConfig(hidden_size=48, num_heads=4)
    assert (config.head_dim, config.intermediate_size) == (12, 192)
    config = BaseTransformerConfig(hidden_size=50, num_heads=4, head_dim=8, intermediate_size=7)
    assert (config.head_dim, config.intermediate_size) == (8, 7)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_the_last_of_every_few_blocks_looks(layers, every):
    if every > layers:
        with pytest.raises(
            ValidationError, match=f"cross_every {every} is more than layers {layers}: no block would look"
        ):
            DecoderConfig(num_layers=layers, cross_attention_every_n_layers=every)
        return
    expected = [block for block in range(layers) if (block + 1) % every == 0]
    assert (
        list(DecoderConfig(num_layers=layers, cross_attention_every_n_layers=every).cross_attention_layers) == expected
    )


REFUSED = [
    (
        BaseTransformerConfig,
        {"hidden_size": 10, "num_heads": 4},
        "width 10 is not a multiple of heads 4; or give head_width",
    ),
    (
        BaseTransformerConfig,
        {"hidden_size": 12, "num_heads": 4, "positions": "rope"},
        "the head width 3 is odd; give an even head_width",
    ),
    (BaseTransformerConfig, {"head_dim": 5, "positions": "rope"}, "the head width 5 is odd"),
    (BaseTransformerConfig, {"dropout": 1.0}, "less than 1"),
    (BaseTransformerConfig, {"hidden_size": 0}, "greater than 0"),
    (BaseTransformerConfig, {"norm": "batch"}, "'layer' or 'rms'"),
    (ModelConfig, {"sources": {}}, "at least 1 item"),
    (
        ModelConfig,
        {"sources": SOURCES, "question_input": "text"},
        r"question_to is 'text'; expected one of prompt, image",
    ),
    (
        DataConfig,
        {"path": "x", "fraction": (0.5, 0.5)},
        r"part is \[0.5, 0.5\]; expected two fractions such as \[0, 0.9\]",
    ),
    (DataConfig, {"path": "x", "fraction": (0.5, 1.5)}, "part is"),
    (DataConfig, {"path": "x", "sampling_weight": 0}, "greater than 0"),
    (GenerationConfig, {"do_sample": True, "num_beams": 2}, "contradict each other; choose sampling or beams"),
    (
        GenerationConfig,
        {"num_return_sequences": 3},
        "num_return_sequences 3 needs do_sample: true or as many num_beams",
    ),
    (GenerationConfig, {"num_return_sequences": 3, "num_beams": 2}, "as many num_beams"),
    (GenerationConfig, {"top_p": 0}, "greater than 0"),
    (GenerationConfig, {"temperature": 0}, "greater than 0"),
    (TrainingConfig, {"learning_rate": -1}, "greater than 0"),
    (TrainingConfig, {"ema_decay": 1.0}, "less than 1"),
    (RunConfig, {"model": {"sources": SOURCES}, "train": []}, "at least 1 item"),
]


@pytest.mark.parametrize(("kind", "facts", "reason"), REFUSED)
def test_contradictions_are_refused_with_their_reason(kind, facts, reason):
    with pytest.raises(ValidationError, match=reason):
        kind(**facts)


ACCEPTED = [
    (BaseTransformerConfig, {"hidden_size": 10, "num_heads": 4, "head_dim": 4, "positions": "rope"}),
    (ModelConfig, {"sources": SOURCES, "question_input": "image"}),
    (GenerationConfig, {"num_return_sequences": 3, "num_beams": 3}),
    (GenerationConfig, {"num_return_sequences": 3, "do_sample": True}),
    (DataConfig, {"path": "x", "fraction": (0.9, 1.0)}),
]


@pytest.mark.parametrize(("kind", "facts"), ACCEPTED)
def test_what_only_looks_like_a_contradiction_is_accepted(kind, facts):
    made = kind(**facts)
    assert {name: getattr(made, name) for name in facts} == facts
    assert kind.model_validate_json(made.model_dump_json()) == made
