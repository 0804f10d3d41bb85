"""From a published checkpoint to a model of ours: its family is found, its tables followed, nothing left over."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mmx.config.schema import GenerationConfig
from mmx.encoders.pretrained.hf_models import load_tensors
from mmx.errors import CheckpointError
from mmx.hub.conversion import ConversionSpec
from mmx.hub.hf_checkpoint import HFCheckpoint, conversion_errors, open_hf_checkpoint
from mmx.hub.weight_mapping import convert
from mmx.models.checkpoint import load_strict
from mmx.models.model import Model

FAMILIES = {  # as config.json tells them: model_type, and the decoder's or the first architecture where it decides
    "vision-encoder-decoder gpt2": "vit_gpt2",
    "vision-encoder-decoder trocr": "trocr",
    "blip BlipForConditionalGeneration": "blip",
    "blip BlipForQuestionAnswering": "blip_vqa",
    "marian": "marian",
    "whisper": "whisper",
}


def load_hf_model(
    name: str, revision: str | None = None, pickles: bool = False, device: str | torch.device = "cpu"
) -> tuple[Model, GenerationConfig, dict[str, Any]]:
    """The model of a published checkpoint (a folder or a public name), how it chooses words, and where it is from.

    Raises CheckpointError for an unknown family, a missing or extra tensor, a damaged file or a pickle.
    """
    published = open_hf_checkpoint(name, revision, pickles)
    family, plan_for = family_of(published)
    with conversion_errors(published, family):
        plan = plan_for(published)
    _check_tokens(published, plan)
    model = Model(plan.config, plan.tokenizer)
    load_strict(model, _tensors(published, plan, model), repr(name))
    origin = {"imported_from": name, "family": family, "revision": revision}
    return model.to(device).eval(), plan.generation, origin


def family_of(published: HFCheckpoint) -> tuple[str, Callable[[HFCheckpoint], ConversionSpec]]:
    """The family's name and its plan. Raises CheckpointError for one that is not known, with those that are."""
    config = published.config
    decoder = config.get("decoder")
    told = [config.get("model_type"), decoder.get("model_type") if isinstance(decoder, dict) else None]
    architectures = [str(a) for a in config.get("architectures") or []]
    for named in (f"{told[0]} {told[1]}", *(f"{told[0]} {a}" for a in architectures), str(told[0])):
        if named in FAMILIES:
            return named, import_module(f"mmx.hub.{FAMILIES[named]}").plan
    given = " ".join(str(part) for part in (*told, *architectures) if part) or "no model_type"
    raise CheckpointError(
        f"{published.name!r} is {given}, a family that mmx does not read; expected one of {', '.join(FAMILIES)}."
    )


def _check_tokens(published: HFCheckpoint, plan: ConversionSpec) -> None:
    """Raise CheckpointError for a special token without a row in the decoder: speaking would find it out too late."""
    decoder, chosen = plan.config.decoder, plan.generation
    size = decoder.padded_vocab_size or len(plan.tokenizer)
    told = {f"the mark {name}": ids for name, ids in plan.config.special_tokens.items()}
    told |= {name: getattr(chosen, name) for name in ("suppress_tokens", "begin_suppress_tokens")}
    told["forced_eos_token_id"] = () if chosen.forced_eos_token_id is None else (chosen.forced_eos_token_id,)
    for name, ids in told.items():
        if wrong := [token for token in ids if not 0 <= token < size]:
            raise CheckpointError(
                f"{published.name!r} has token {wrong[0]} for {name}; expected 0 to {size - 1}, as its vocabulary goes."
            )


def _tensors(published: HFCheckpoint, plan: ConversionSpec, model: Model) -> dict[str, Tensor]:
    """All of our tensors: those that the tables make, and those that pretrained encoders load by their own names."""
    theirs = dict(published.tensors)
    ours: dict[str, Tensor] = {}
    for source, prefix in plan.encoders.items():
        own = {name.removeprefix(prefix): theirs.pop(name) for name in list(theirs) if name.startswith(prefix)}
        architecture = plan.config.sources[source].options["architecture"]
        loaded = load_tensors(published.name, architecture, own)
        ours |= {f"sources.{source}.encoder.model.{name}": tensor for name, tensor in loaded.items()}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    made = ours | convert(plan.weights, plan.dropped, theirs, shapes, repr(published.name))
    for name, tensor in made.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{published.name!r} holds values that are not finite, in {name}; download it again.")
    return made
