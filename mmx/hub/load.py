"""Loading of published models of transformers as models of mmx, by the converter of their family."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmx.config.schema import GenerationConfig
from mmx.encoders.pretrained.hf_models import load_tensors
from mmx.errors import CheckpointError
from mmx.hub.conversion import ConversionSpec
from mmx.hub.hf_checkpoint import HFCheckpoint, conversion_errors, open_hf_checkpoint
from mmx.hub.hf_config import check_tokenizer
from mmx.hub.weight_mapping import convert
from mmx.models.checkpoint import load_strict
from mmx.models.model import Model

# Fields of config.json (model_type, and that of the decoder or the architecture where it matters) to the converter.
FAMILIES = {
    "vision-encoder-decoder gpt2": "vit_gpt2",
    "vision-encoder-decoder trocr": "trocr",
    "blip BlipForConditionalGeneration": "blip",
    "blip BlipForQuestionAnswering": "blip_vqa",
    "marian": "marian",
    "whisper": "whisper",
}
Converter = Callable[[HFCheckpoint], ConversionSpec]


class HFModel(NamedTuple):
    """A converted model, its generation settings, and its provenance."""

    model: Model
    generation: GenerationConfig
    provenance: dict[str, str | None]


def load_hf_model(
    name: str,
    revision: str | None = None,
    allow_pickled_weights: bool = False,
    device: str | torch.device = "cpu",
) -> HFModel:
    """Load a published model in evaluation mode.

    Args:
        name: a folder or public name.
        revision: branch or commit of a public name.
        allow_pickled_weights: read *.bin files too, tensors only.

    Raises CheckpointError for an unsupported family, a missing or unexpected tensor, a damaged file or a pickle.
    """
    checkpoint = open_hf_checkpoint(name, revision, allow_pickled_weights)
    return convert_hf_model(checkpoint, revision, device)


def convert_hf_model(
    checkpoint: HFCheckpoint, revision: str | None = None, device: str | torch.device = "cpu"
) -> HFModel:
    """Convert a published model that was opened; see `load_hf_model`."""
    family, convert_family = find_converter(checkpoint)
    with conversion_errors(checkpoint, family):
        spec = convert_family(checkpoint)
    _check_special_tokens(checkpoint, spec)
    check_tokenizer(checkpoint, spec.tokenizer, spec.config.decoder.padded_vocab_size or len(spec.tokenizer))
    model = Model(spec.config, spec.tokenizer)
    load_strict(model, _convert_tensors(checkpoint, spec, model), repr(checkpoint.name))
    provenance = {"imported_from": checkpoint.name, "family": family, "revision": revision}
    return HFModel(model.to(device).eval(), spec.generation, provenance)


def find_converter(checkpoint: HFCheckpoint) -> tuple[str, Converter]:
    """Return the name of the family and its converter. Raises CheckpointError for an unsupported family."""
    config = checkpoint.config
    decoder = config.get("decoder")
    model_type = config.get("model_type")
    decoder_type = decoder.get("model_type") if isinstance(decoder, dict) else None
    architectures = [str(architecture) for architecture in config.get("architectures") or []]
    candidates = [f"{model_type} {decoder_type}"]
    candidates += [f"{model_type} {architecture}" for architecture in architectures]
    candidates.append(str(model_type))
    for family in candidates:
        if family in FAMILIES:
            return family, import_module(f"mmx.hub.{FAMILIES[family]}").conversion
    given = " ".join(str(field) for field in (model_type, decoder_type, *architectures) if field) or "no model_type"
    raise CheckpointError(
        f"{checkpoint.name!r} is {given}, a family that mmx does not support; expected one of {', '.join(FAMILIES)}.",
        code="hub.family",
        name=checkpoint.name,
        given=given,
        expected=list(FAMILIES),
    )


def _check_special_tokens(checkpoint: HFCheckpoint, spec: ConversionSpec) -> None:
    """Raise CheckpointError for a token id outside the vocabulary, which would otherwise fail in generation."""
    vocab_size = spec.config.decoder.padded_vocab_size or len(spec.tokenizer)
    generation = spec.generation
    ids_by_use = {f"the special token {name}": ids for name, ids in spec.config.special_tokens.items()}
    ids_by_use["suppress_tokens"] = generation.suppress_tokens
    ids_by_use["begin_suppress_tokens"] = generation.begin_suppress_tokens
    if generation.forced_eos_token_id is not None:
        ids_by_use["forced_eos_token_id"] = (generation.forced_eos_token_id,)
    if spec.config.speech is not None:
        ids_by_use["lang_to_id"] = tuple(spec.config.speech.language_token_ids.values())
        ids_by_use["task_to_id"] = tuple(spec.config.speech.task_token_ids.values())
    for use, ids in ids_by_use.items():
        for token in ids:
            if not 0 <= token < vocab_size:
                raise CheckpointError(
                    f"{checkpoint.name!r} has token {token} for {use}; expected 0 to {vocab_size - 1}, the size of its "
                    "vocabulary.",
                    code="hub.token_id",
                    name=checkpoint.name,
                    given=token,
                    use=use,
                    vocab_size=vocab_size,
                )


def _convert_tensors(checkpoint: HFCheckpoint, spec: ConversionSpec, model: Model) -> dict[str, Tensor]:
    """Return all tensors of the model: those of the mappings, and those that pretrained encoders convert themselves."""
    remaining = dict(checkpoint.tensors)
    converted: dict[str, Tensor] = {}
    for source, prefix in spec.encoders.items():
        names = [name for name in remaining if name.startswith(prefix)]
        encoder_tensors = {name.removeprefix(prefix): remaining.pop(name) for name in names}
        architecture: Any = spec.config.sources[source].options["architecture"]
        for name, tensor in load_tensors(checkpoint.name, architecture, encoder_tensors).items():
            converted[f"sources.{source}.encoder.model.{name}"] = tensor
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    converted |= convert(spec.weights, spec.dropped, remaining, shapes, checkpoint.name)
    for name, tensor in converted.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{checkpoint.name!r} holds values that are not finite, in {name}; download it again.",
                code="hub.not_finite",
                name=checkpoint.name,
                tensor=name,
            )
    return converted
