"""Architectures of pretrained encoders: configurations of transformers as plain dicts."""

import json
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import PositiveInt

from mmx.config.schema import FrozenModel
from mmx.encoders.pretrained.families import HF_FAMILIES, TOWERS
from mmx.errors import EncoderError, MmxError, convert_errors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

JsonObject = dict[str, Any]
HFClass = type[Any]  # a class of transformers

# Fields of an architecture that are set here, where it has them: no module that does not affect the states, and no
# SpecAugment, which draws numpy's random numbers and fails on short audio. Dropout and layer drop stay.
OVERRIDES: JsonObject = {
    "decoder_layers": 0,
    "vision_use_head": False,
    "add_adapter": False,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
}
# Fields that do not describe the encoder: labels, files, outputs, names of code, and values derived from other fields.
_IGNORED_FIELDS = """architectures auto_map id2label label2id dtype torch_dtype attn_implementation
    experts_implementation return_dict output_attentions output_hidden_states torchscript quantization_config
    transformers_weights name_or_path per_layer_config stage_names out_features out_indices problem_type
    task_specific_params processor_class"""
IGNORED_FIELDS = frozenset(_IGNORED_FIELDS.split())
PER_LAYER_FIELDS = ("depths", "hidden_sizes", "num_heads", "layer_types")


class Serializable(Protocol):
    """A configuration or processor of transformers."""

    def to_json_string(self, **arguments: bool) -> str: ...


class PretrainedOptions(FrozenModel):
    """Options of the pretrained encoder.

    name: folder with config.json and model.safetensors, or a name on the Hugging Face Hub.
    revision: branch or commit on the Hub.
    tower: which encoder of a model with two, such as CLIP.
    layer: use the states after this many layers (of a pyramid: stages), before the final norm; the rest is removed.
        -1 is the last layer. Default: the whole encoder with its final norm.
    max_length: maximum number of tokens of a text; default: that of the model. A longer text is refused.
    architecture, preprocessing: set on loading. With an `architecture` nothing is loaded, and `name` is only a note.
    """

    name: str | None = None
    revision: str | None = None
    tower: Literal["image", "text"] | None = None
    layer: int | None = None
    max_length: PositiveInt | None = None
    architecture: JsonObject | None = None
    preprocessing: JsonObject | None = None


def resolve_architecture(config: "PreTrainedConfig", options: PretrainedOptions) -> tuple[JsonObject, int | None]:
    """Return the architecture of the encoder alone, up to the layer, and the layer counted from the start."""
    towers = TOWERS.get(config.model_type) or {HF_FAMILIES[config.model_type].modality: ""}
    tower: str = options.tower or next(iter(towers))
    if tower not in towers:
        raise EncoderError(
            f"{options.name!r} has no {tower} encoder that mmx supports; expected tower {', '.join(towers)}.",
            code="encoder.tower",
            given=tower,
            expected=list(towers),
        )
    encoder_config: Any = getattr(config, towers[tower]) if towers[tower] else config
    fields = config_dict(encoder_config, use_diff=False)
    fields |= {key: value for key, value in OVERRIDES.items() if key in fields}
    if options.layer is None:
        return fields, None
    return _truncate(fields, encoder_config, options.layer)


def build_config(fields: JsonObject, name: str) -> "PreTrainedConfig":
    """Return the fields as a configuration of transformers."""
    from transformers import AutoConfig

    model_type = fields.get("model_type")
    known = HF_FAMILIES.keys() | TOWERS
    if model_type not in known:
        raise EncoderError(
            f"{name!r} has model_type {model_type!r}; expected one of {', '.join(sorted(known))}.",
            code="encoder.model_type",
            name=name,
            given=model_type,
            expected=sorted(known),
        )
    with hf_errors(name, f"{model_type} architecture", "one that transformers can build"):
        return AutoConfig.for_model(**fields)


def config_dict(config: "Serializable", **arguments: bool) -> JsonObject:
    """Return a configuration or processor of transformers as a dict without the ignored fields."""
    return clean_fields(json.loads(config.to_json_string(**arguments)))


def class_of(name: object, suffix: str) -> HFClass:
    """Return the class of transformers with this name, which must end in `suffix`, such as ImageProcessor."""
    import transformers

    found = None
    if str(name).removesuffix("Pil").endswith(suffix):
        found = getattr(transformers, str(name), None)
    if not isinstance(found, type):
        raise EncoderError(
            f"transformers has no {suffix} {name!r}; install the version that the encoder came with.",
            code="encoder.unknown_class",
            name=name,
            expected=suffix,
        )
    return found


def hf_errors(
    name: str,
    what: str,
    expected: str,
    error_class: type[MmxError] = EncoderError,
    code: str = "encoder.unreadable",
) -> AbstractContextManager[None]:
    """Convert exceptions raised while transformers reads `what` of a model to `error_class`."""

    def describe(error: BaseException) -> str:
        given = f"{name!r} has no {what} that can be read ({type(error).__name__})"
        return f"{given}; expected {expected}; download it again, or use --traceback for details."

    return convert_errors(error_class, describe, code=code, name=name, what=what)


def _truncate(fields: JsonObject, config: Any, layer: int) -> tuple[JsonObject, int]:
    """Return the architecture without the layers after `layer`, and the layer counted from the start."""
    depth_key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    num_layers = len(fields["depths"]) if "depths" in fields else fields[depth_key]
    selected = layer if layer >= 0 else num_layers + 1 + layer
    if not 1 <= selected <= num_layers:
        raise EncoderError(
            f"{fields['model_type']} has no layer {layer}; give 1 to {num_layers}, or -1 for the last.",
            code="encoder.layer",
            given=layer,
            num_layers=num_layers,
        )
    truncated = dict(fields)
    for key in PER_LAYER_FIELDS:
        if isinstance(fields.get(key), list):
            truncated[key] = fields[key][:selected]
    for key in ("num_stages", depth_key):
        if key in fields:
            truncated[key] = selected
    return truncated, selected


def clean_fields(fields: JsonObject) -> JsonObject:
    """Return a configuration without the ignored fields, at every level."""
    ignored = IGNORED_FIELDS
    if "depths" in fields:  # of a pyramid these follow from the stages
        ignored = ignored | {"hidden_size", "num_layers"}
    kept = {}
    for key, value in fields.items():
        if key not in ignored and not key.startswith("_"):
            kept[key] = clean_fields(value) if isinstance(value, dict) else value
    return kept
