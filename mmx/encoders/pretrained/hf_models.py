"""Where pretrained encoders come from: families of transformers, their files, and the dicts they are rebuilt from.

What is loaded resolves to plain dicts, its architecture and its preprocessing, from which the encoder is built again
without any file of its origin. Weights are read from safetensors only; code that comes with them is never run.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from mmx.config.schema import FrozenModel
from mmx.errors import EncoderError


@dataclass(frozen=True)
class Family:
    """How a model type of transformers becomes an encoder.

    `model`: class and, after a dot, where in it the encoder is; `norm`: its last, which a `layer` leaves out; `idle`: a
    part that no state passes; `prefix`: of its weights in a whole, if transformers cannot tell; `exact`: float32 only.
    """

    modality: Literal["image", "text", "audio"]
    model: str
    norm: str = ""
    idle: str = ""
    prefix: str = ""
    exact: bool = False


HF_FAMILIES = {
    "vit": Family("image", "ViTModel", "layernorm"),
    "deit": Family("image", "DeiTModel", "layernorm"),
    "beit": Family("image", "BeitModel", "layernorm"),
    "dinov2": Family("image", "Dinov2Model", "layernorm"),
    "dinov2_with_registers": Family("image", "Dinov2WithRegistersModel", "layernorm"),
    "dinov3_vit": Family("image", "DINOv3ViTModel", "norm"),
    "clip_vision_model": Family("image", "CLIPVisionModel", idle="post_layernorm"),
    "siglip_vision_model": Family("image", "SiglipVisionModel", "post_layernorm"),
    "blip_vision_model": Family("image", "BlipVisionModel", "post_layernorm", prefix="vision_model."),
    "swin": Family("image", "SwinModel", "layernorm"),
    "convnext": Family("image", "ConvNextModel", idle="layernorm"),
    "convnextv2": Family("image", "ConvNextV2Model", idle="layernorm"),
    "resnet": Family("image", "ResNetModel"),
    "bert": Family("text", "BertModel"),
    "roberta": Family("text", "RobertaModel"),
    "xlm-roberta": Family("text", "XLMRobertaModel"),
    "electra": Family("text", "ElectraModel"),
    "mpnet": Family("text", "MPNetModel"),
    "distilbert": Family("text", "DistilBertModel"),
    "deberta": Family("text", "DebertaModel", exact=True),
    "deberta-v2": Family("text", "DebertaV2Model"),
    "modernbert": Family("text", "ModernBertModel", "final_norm"),
    "t5": Family("text", "T5EncoderModel", "encoder.final_layer_norm"),
    "mt5": Family("text", "MT5EncoderModel", "encoder.final_layer_norm"),
    "clip_text_model": Family("text", "CLIPTextModel", "final_layer_norm"),
    "whisper": Family("audio", "WhisperModel.encoder", "layer_norm"),
    "wav2vec2": Family("audio", "Wav2Vec2Model", "encoder.layer_norm"),
    "hubert": Family("audio", "HubertModel", "encoder.layer_norm"),
    "wavlm": Family("audio", "WavLMModel", "encoder.layer_norm"),
}
TOWERS = {  # model types that hold encoders beside each other: which of them reads what
    "clip": {"image": "vision_config", "text": "text_config"},
    "siglip": {"image": "vision_config"},  # its texts were padded, and the padding attended
    "blip": {"image": "vision_config"},
}
# Decided here where an architecture has the fact: no part that hands nothing over, and no SpecAugment, which throws
# numpy's dice and fails on short sounds. What else training does (dropout, layer drop) is the model's own.
DECIDED: dict[str, Any] = {"decoder_layers": 0, "vision_use_head": False, "add_adapter": False}
DECIDED |= {"apply_spec_augment": False, "mask_time_prob": 0.0, "mask_feature_prob": 0.0}
# Not the encoder's: about labels, files and outputs, the names of code, and what follows from other facts.
_NOT_KEPT = """architectures auto_map id2label label2id dtype torch_dtype attn_implementation experts_implementation
    return_dict output_attentions output_hidden_states torchscript quantization_config transformers_weights name_or_path
    per_layer_config stage_names out_features out_indices problem_type task_specific_params processor_class"""
DROPPED = frozenset(_NOT_KEPT.split())
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TOKENIZER = "tokenizer.json"
SPARE = ("pooler.", "embeddings.position_ids")  # may lie beside an encoder's tensors: they hand nothing over


class PretrainedOptions(FrozenModel):
    """`name`: a folder with config.json and model.safetensors, or a public name; `tower`: which encoder of two.

    `layer`: the states after so many blocks (of a pyramid: stages), before the last norm; what is above is cut off.
    -1 is after the last, -2 after the one before; by default the whole encoder with its last norm. `max_tokens`:
    where texts are cut, by default where the model ends. The other two are filled in on loading: with an
    `architecture` nothing is loaded, and `name` is only a note.
    """

    name: str | None = None
    revision: str | None = None
    tower: Literal["image", "text"] | None = None
    layer: int | None = None
    max_tokens: PositiveInt | None = None
    architecture: dict[str, Any] | None = None
    preprocessing: dict[str, Any] | None = None


def load_hf_encoder(options: PretrainedOptions) -> tuple[PretrainedOptions, Any, Any]:
    """Options with all that was found filled in, the encoder, and its tokenizer."""
    import transformers

    if not (name := options.name or ""):
        raise EncoderError("the encoder has no name; give a folder, or a public name like facebook/dinov2-small.")
    folder = Path(os.path.expanduser(name))
    there = str(folder) if folder.is_dir() else name
    place: dict[str, Any] = {"pretrained_model_name_or_path": there, "revision": options.revision}
    _fetch(name, folder, place)
    with suppress_hf_output():
        with hf_errors(name, "config", "a whole config.json"):
            whole = _config(_clean(transformers.PreTrainedConfig.get_config_dict(**place)[0]), name)
        architecture, layer = _resolve(whole, options)
        encoder = build_hf_encoder(architecture, layer, name, place)
        modality = HF_FAMILIES[architecture["model_type"]].modality
        kind = {"image": "ImageProcessor", "text": "Tokenizer", "audio": "FeatureExtractor"}[modality]
        expected = f"preprocessor_config.json, for texts {TOKENIZER} (others: pip install sentencepiece protobuf)"
        with hf_errors(name, kind, expected):
            processor = getattr(transformers, f"Auto{kind}").from_pretrained(
                **place, config=whole, trust_remote_code=False
            )
            tokenizer, most = getattr(processor, "backend_tokenizer", None), getattr(processor, "model_max_length", 0)
            facts = {"max_tokens": most if most < 10**6 else None} if tokenizer else _config_dict(processor)
            if tokenizer and not any(_has(place, file) for file in processor.vocab_files_names.values()):
                raise FileNotFoundError  # transformers would go on with an empty vocabulary
    found = {"layer": layer, "architecture": architecture, "preprocessing": facts}
    found |= {"name": None, "revision": None} if folder.is_dir() else {}  # a path says nothing elsewhere
    return options.model_copy(update=found), encoder, tokenizer


def describe_encoder(name: str, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The options of an encoder that is part of a published model: from its part of config.json, and the processor
    that lies in the folder."""
    import transformers

    with suppress_hf_output():
        whole = _config(_clean(config), name)
        architecture, _ = _resolve(whole, PretrainedOptions(name=name))
        kind = {"image": "ImageProcessor", "audio": "FeatureExtractor"}[
            HF_FAMILIES[architecture["model_type"]].modality
        ]
        with hf_errors(name, kind, "preprocessor_config.json"):
            processor = getattr(transformers, f"Auto{kind}").from_pretrained(str(folder), trust_remote_code=False)
    return {"architecture": architecture, "preprocessing": _config_dict(processor)}


def load_tensors(name: str, architecture: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors of one encoder, under the names that its module has here. None may lack or be left over."""
    _, _, path = HF_FAMILIES[architecture["model_type"]].model.partition(".")
    with suppress_hf_output():
        whole = {f"{path}.{own}" if path else own: tensor for own, tensor in tensors.items()}
        source = {"pretrained_model_name_or_path": None, "state_dict": whole}
        return dict(build_hf_encoder(architecture, None, name, source).state_dict())


def _has(place: dict[str, Any], file: str) -> bool:
    from transformers.utils import cached_file

    with suppress(Exception):
        return cached_file(place["pretrained_model_name_or_path"], file, revision=place["revision"]) is not None
    return False


def _fetch(name: str, folder: Path, place: dict[str, Any]) -> None:
    """See that config and weights are there, or download them: safetensors only, as a pickle may run code."""
    config = _has(place, "config.json")
    weights = config and any(_has(place, file) for file in WEIGHTS)
    if not config and not folder.is_dir():
        given = "is no folder here and could not be fetched (no such name, no network, or HF_HUB_OFFLINE=1 is set)"
        raise EncoderError(f"{name!r} {given}; check the name, or give the folder of a downloaded model.")
    if not config or not weights:
        beside = "; pickles (*.bin) may run code and are not read" if any(folder.glob("*.bin")) else ""
        given = f"has no {WEIGHTS[0] if config else 'config.json'}{beside}"
        raise EncoderError(f"{name!r} {given}; expected what save_pretrained writes; save or download it again.")


def _resolve(whole: Any, options: PretrainedOptions) -> tuple[dict[str, Any], int | None]:
    """The architecture of the encoder alone, up to the layer; and the layer, counted from the start."""
    towers = TOWERS.get(whole.model_type) or {HF_FAMILIES[whole.model_type].modality: ""}
    tower: str = options.tower or next(iter(towers))
    if tower not in towers:
        raise EncoderError(f"{options.name!r} has no {tower} encoder of use here; expected tower {', '.join(towers)}.")
    config = getattr(whole, towers[tower]) if towers[tower] else whole
    facts = _config_dict(config, use_diff=False)
    facts |= {fact: value for fact, value in DECIDED.items() if fact in facts}
    if (layer := options.layer) is None:
        return facts, None
    blocks = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    most = len(facts["depths"]) if "depths" in facts else facts[blocks]
    chosen = layer if layer >= 0 else most + 1 + layer
    if not 1 <= chosen <= most:
        raise EncoderError(f"{facts['model_type']} has no layer {layer}; give 1 to {most}, or -1 for the last.")
    lists = ("depths", "hidden_sizes", "num_heads", "layer_types")
    cut = {fact: facts[fact][:chosen] for fact in lists if isinstance(facts.get(fact), list)}
    return facts | cut | {fact: chosen for fact in ("num_stages", blocks) if fact in facts}, chosen


def build_hf_encoder(
    architecture: dict[str, Any], layer: int | None, name: str, source: dict[str, Any] | None = None
) -> Any:
    """The encoder of an architecture, with the float32 weights of a source, or random ones; without the parts whose
    output is not handed over. No weight may be lacking: transformers would draw it at random."""
    config = _config(architecture, name)
    family = HF_FAMILIES[config.model_type]
    made, _, path = family.model.partition(".")
    kind, pooling = class_of(made, "Model"), "add_pooling_layer"
    arguments: dict[str, Any] = {pooling: False} if pooling in signature(kind).parameters else {}
    ends = architecture.get("do_stable_layer_norm", True)  # else wav2vec2 has its norm before the blocks
    last = family.norm if layer is not None and ends else ""
    unused = tuple(part for part in (family.idle, last) if part)
    if source:
        arguments |= {"key_mapping": {f"^{family.prefix}": ""}} if family.prefix else {}
        arguments |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        arguments |= {"dtype": torch.float32, **source}
    with hf_errors(name, "weights" if source else "architecture", "whole safetensors" if source else "one that fits"):
        model, report = kind.from_pretrained(config=config, **arguments) if source else (kind(config, **arguments), {})
    lacking = {*report.get("missing_keys", ()), *(key for key, *_ in report.get("mismatched_keys", ()))}
    if own := sorted(key for key in lacking if key.startswith(path) and not key.startswith(unused)):
        given = f"{name!r} lacks {len(own)} tensors of its {config.model_type} encoder, such as {own[0]}"
        raise EncoderError(f"{given}; expected all of them; download it again.")
    extra = sorted(key for key in report.get("unexpected_keys", ()) if not key.startswith(SPARE))
    if extra and source and "state_dict" in source:
        given = f"{name!r} holds {extra[0]}, which a {config.model_type} encoder does not have"
        raise EncoderError(f"{given}; is its config.json its own?")
    encoder = model.get_submodule(path)
    for part in unused:
        encoder.set_submodule(part, nn.Identity())
    for module in encoder.modules():
        if is_parametrized(module, "weight"):  # by weight norm: neither it nor its hook can be sent to a data worker
            remove_parametrizations(module, "weight")._load_state_dict_pre_hooks.clear()
    for own, parameter in encoder.named_parameters():
        if own.endswith("mask_token"):  # was for pretraining
            parameter.requires_grad_(False)
    return encoder.train()


def _config(facts: dict[str, Any], name: str) -> Any:
    """The facts as a config of transformers."""
    from transformers import AutoConfig

    known = HF_FAMILIES.keys() | TOWERS
    if facts.get("model_type") not in known:
        given = f"{name!r} has model_type {facts.get('model_type')!r}"
        raise EncoderError(f"{given}; expected one of {', '.join(sorted(known))}.")
    with hf_errors(name, f"{facts['model_type']} architecture", "one that transformers can build"):
        return AutoConfig.for_model(**facts)


def class_of(name: Any, ending: str) -> Any:
    """A class of transformers, of the kind that its name ends in."""
    import transformers

    found = getattr(transformers, name, None) if str(name).removesuffix("Pil").endswith(ending) else None
    if not isinstance(found, type):
        raise EncoderError(f"transformers has no {ending} {name!r}; install the version that the encoder came with.")
    return found


def _config_dict(thing: Any, **how: bool) -> dict[str, Any]:
    return _clean(json.loads(thing.to_json_string(**how)))


def _clean(facts: dict[str, Any]) -> dict[str, Any]:
    unwanted = DROPPED | ({"hidden_size", "num_layers"} if "depths" in facts else set())
    kept = {key: value for key, value in facts.items() if key not in unwanted and not key.startswith("_")}
    return {key: _clean(value) if isinstance(value, dict) else value for key, value in kept.items()}


@contextmanager
def hf_errors(name: str, what: str, expected: str) -> Iterator[None]:
    """Whatever goes wrong while one thing is read becomes a sentence that names it."""
    try:
        yield
    except (EncoderError, MemoryError):
        raise
    except Exception as error:  # transformers raises what it likes
        given = f"{name!r} has no {what} that can be read ({type(error).__name__})"
        raise EncoderError(f"{given}; expected {expected}; download it again, or look with --traceback.") from error


@contextmanager
def suppress_hf_output() -> Iterator[None]:
    """Without what transformers tells while it loads and saves; what is lacking, we tell ourselves."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.ERROR)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
