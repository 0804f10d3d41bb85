"""The schema: frozen, unknown keys refused, contradictions refused, derived sizes."""

from typing import Annotated

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

import mmx.config.schema
from mmx.config.loader import dump_config, load_config, parse_config
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
from mmx.errors import ConfigError

SOURCES = {"image": SourceConfig(encoder="image")}
REQUIRED = {
    "encoder": "image",
    "sources": SOURCES,
    "path": "x",
    "model": {"sources": SOURCES},
    "train": [{"path": "x"}],
    "teachers": ["x"],
}
CLASSES = [
    value
    for value in vars(mmx.config.schema).values()
    if isinstance(value, type) and issubclass(value, FrozenModel) and value is not FrozenModel
]


@pytest.mark.parametrize("schema", CLASSES, ids=lambda schema: schema.__name__)
def test_every_class_is_frozen_documented_and_refuses_unknown_keys(schema):
    assert issubclass(schema, BaseModel)
    assert schema.__doc__
    values = {name: value for name, value in REQUIRED.items() if name in schema.model_fields}
    config = schema(**values)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, next(iter(schema.model_fields)), 1)
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        schema(**values, wdith=3)


@pytest.mark.parametrize("schema", CLASSES, ids=lambda schema: schema.__name__)
def test_every_default_is_within_its_bounds(schema):
    for field in schema.model_fields.values():
        if not field.is_required() and not field.validate_default:  # a default that is validated is derived
            bounds = TypeAdapter(Annotated[field.annotation, "within", *field.metadata])
            assert bounds.validate_python(field.default) == field.default


# -- derived sizes ----------------------------------------------------------------------------------------------------


def test_sizes_are_derived_where_they_are_not_given():
    config = BaseTransformerConfig(hidden_size=48, num_heads=4)
    assert (config.head_dim, config.num_kv_heads, config.intermediate_size) == (12, 4, 192)
    config = BaseTransformerConfig(hidden_size=50, num_heads=4, head_dim=8, num_kv_heads=2, intermediate_size=7)
    assert (config.head_dim, config.num_kv_heads, config.intermediate_size) == (8, 2, 7)
    config = BaseTransformerConfig(hidden_size=48, head_dim=None, num_kv_heads=None, intermediate_size=None)
    assert (config.head_dim, config.num_kv_heads, config.intermediate_size) == (12, 4, 192)


def test_derived_sizes_are_written_and_read_back(tmp_path):
    path = tmp_path / "decoder.yaml"
    for text in ("hidden_size: 48\n", "hidden_size: 48\nhead_dim: null\n"):
        path.write_text(text)
        config = load_config(path, DecoderConfig)
        assert config.head_dim == 12
        path.write_text(dump_config(config))
        assert load_config(path, DecoderConfig) == config


@pytest.mark.parametrize(
    ("values", "code", "key"),
    [
        ({"hidden_size": "big"}, "config.type", "hidden_size"),
        ({"hidden_size": 0}, "config.value", "hidden_size"),
        ({"num_heads": 0}, "config.value", "num_heads"),
        ({"num_heads": "many"}, "config.type", "num_heads"),
        ({"head_dim": "big"}, "config.type", "head_dim"),
        ({"head_dim": 0}, "config.value", "head_dim"),
        ({"num_kv_heads": -1}, "config.value", "num_kv_heads"),
        ({"intermediate_size": 1.5}, "config.type", "intermediate_size"),
        ({"hidden_size": 10}, "config.contradiction", "head_dim"),
        ({"num_kv_heads": 3}, "config.contradiction", None),
        ({"head_dim": 5, "positions": "rope"}, "config.contradiction", None),
    ],
)
def test_a_wrong_size_is_one_problem(values, code, key):
    """A size that is derived from a refused one is not refused, too."""
    with pytest.raises(ConfigError) as error:
        parse_config(values, DecoderConfig, where="decoder")
    assert (error.value.code, error.value.details["key"]) == (code, key)


# -- contradictions ---------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_the_last_of_every_n_layers_has_cross_attention(num_layers, n):
    values = {"num_layers": num_layers, "cross_attention_every_n_layers": n}
    if n > num_layers:
        with pytest.raises(ValidationError, match="no layer would have cross-attention"):
            DecoderConfig(**values)
        return
    expected = tuple(index for index in range(num_layers) if (index + 1) % n == 0)
    assert DecoderConfig(**values).cross_attention_layers == expected


# (schema, values, keys that the message names)
REFUSED = [
    (BaseTransformerConfig, {"hidden_size": 10, "num_heads": 4}, ["hidden_size", "num_heads", "head_dim"]),
    (BaseTransformerConfig, {"hidden_size": 12, "num_heads": 4, "positions": "rope"}, ["head_dim 3"]),
    (BaseTransformerConfig, {"head_dim": 5, "positions": "rope"}, ["head_dim 5"]),
    (BaseTransformerConfig, {"num_heads": 4, "num_kv_heads": 3}, ["num_heads 4", "num_kv_heads 3"]),
    (BaseTransformerConfig, {"dropout": 1.0}, ["less than 1"]),
    (BaseTransformerConfig, {"hidden_size": 0}, ["greater than 0"]),
    (BaseTransformerConfig, {"norm": "batch"}, ["'layer' or 'rms'"]),
    (ModelConfig, {"sources": {}}, ["at least 1 item"]),
    (ModelConfig, {"sources": SOURCES, "question_input": "text"}, ["question_input is 'text'", "prompt, image"]),
    (ModelConfig, {"sources": SOURCES, "question_encoder": {}}, ["question_input: question_encoder"]),
    (ModelConfig, {"sources": {"question_encoder": SOURCES["image"]}}, ["cannot be named question_encoder"]),
    (
        ModelConfig,
        {"sources": SOURCES, "tie_key_value": "all", "decoder": {"num_kv_heads": 2}},
        ["tie_key_value: all", "num_kv_heads"],
    ),
    (
        ModelConfig,
        {"sources": SOURCES, "tie_key_value": "all", "decoder": {"bias": False}},
        ["tie_key_value: all", "bias: false", "image"],
    ),
    (DataConfig, {"path": "x", "fraction": (0.5, 0.5)}, ["fraction is [0.5, 0.5]", "[0, 0.9]"]),
    (DataConfig, {"path": "x", "fraction": (0.5, 1.5)}, ["fraction is"]),
    (DataConfig, {"path": "x", "sampling_weight": 0}, ["greater than 0"]),
    (DataConfig, {"path": "x", "reward": "cider", "tasks": ["ask"]}, ["reward", "tasks"]),
    (DataConfig, {"path": "x", "reward": "cider", "derive_questions": True}, ["reward", "derive_questions"]),
    (GenerationConfig, {"do_sample": True, "num_beams": 2}, ["do_sample", "num_beams"]),
    (GenerationConfig, {"num_return_sequences": 3}, ["num_return_sequences 3", "do_sample"]),
    (GenerationConfig, {"num_return_sequences": 3, "num_beams": 2}, ["num_return_sequences 3", "num_beams"]),
    (GenerationConfig, {"min_new_tokens": 3, "max_new_tokens": 2}, ["min_new_tokens 3", "max_new_tokens 2"]),
    (GenerationConfig, {"stop_strings": ("",)}, ["stop_strings"]),
    (GenerationConfig, {"top_p": 0}, ["greater than 0"]),
    (GenerationConfig, {"temperature": 0}, ["0.000001"]),
    (GenerationConfig, {"temperature": 1e300}, ["1000000"]),
    (GenerationConfig, {"length_penalty": -1000}, ["-10"]),
    (GenerationConfig, {"length_penalty": 1000}, ["10"]),
    (GenerationConfig, {"repetition_penalty": 1e-320}, ["0.000001"]),
    *[(GenerationConfig, {"temperature": float(number)}, ["finite"]) for number in ("inf", "nan")],
    *[(GenerationConfig, {"length_penalty": float(number)}, ["finite"]) for number in ("inf", "-inf", "nan")],
    *[(GenerationConfig, {"repetition_penalty": float(number)}, ["finite"]) for number in ("inf", "nan")],
    (GenerationConfig, {"seed": -1}, ["0"]),
    (GenerationConfig, {"seed": 2**70}, [str(2**63)]),
    (GenerationConfig, {"max_new_tokens": 2**70}, ["1000000"]),
    (GenerationConfig, {"num_return_sequences": 2**70, "do_sample": True}, ["10000"]),
    (TrainingConfig, {"learning_rate": -1}, ["greater than 0"]),
    (TrainingConfig, {"ema_decay": 1.0}, ["less than 1"]),
    (RunConfig, {"model": {"sources": SOURCES}, "train": []}, ["at least 1 item"]),
    (RunConfig, {"train": [{"path": "x"}]}, ["neither model nor init"]),
    (RunConfig, {"model": {"sources": SOURCES}, "init": "x", "train": [{"path": "x"}]}, ["both model and init"]),
    (
        RunConfig,
        {"model": {"sources": SOURCES}, "mount": SOURCES, "train": [{"path": "x"}]},
        ["mount needs init", "model.sources"],
    ),
]


@pytest.mark.parametrize(("schema", "values", "named"), REFUSED)
def test_contradictions_are_refused(schema, values, named):
    with pytest.raises(ValidationError) as error:
        schema(**values)
    (problem,) = error.value.errors()
    assert all(words in problem["msg"] for words in named), problem["msg"]


ACCEPTED = [
    (BaseTransformerConfig, {"hidden_size": 10, "num_heads": 4, "head_dim": 4, "positions": "rope"}),
    (ModelConfig, {"sources": SOURCES, "question_input": "image"}),
    (ModelConfig, {"sources": SOURCES, "tie_key_value": "layers"}),
    (GenerationConfig, {"num_return_sequences": 3, "num_beams": 3}),
    (GenerationConfig, {"num_return_sequences": 3, "do_sample": True}),
    (GenerationConfig, {"temperature": 1e6, "length_penalty": -10.0, "seed": 2**63 - 1}),
    (DataConfig, {"path": "x", "fraction": (0.9, 1.0)}),
]


@pytest.mark.parametrize(("schema", "values"), ACCEPTED)
def test_values_that_only_look_like_a_contradiction_are_accepted(schema, values):
    config = schema(**values)
    assert {name: getattr(config, name) for name in values} == values
    assert schema.model_validate_json(config.model_dump_json()) == config
