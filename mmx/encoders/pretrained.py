"""The built-in pretrained encoder: a vision, text or audio encoder of transformers, from a folder or a public name.

What is loaded resolves to plain dicts, its architecture and its preprocessing, from which the encoder is built again
without any file of its origin. Weights are read from safetensors only; code that comes with them is never run.
Alphabet: B rows, S slots, F feature width, T samples.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from mmx import images, sounds
from mmx.config import Frozen
from mmx.encoders.base import Encoder, Features
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


FAMILIES = {
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
MOST_STRETCHED = 16  # long side / short side that a picture keeps before its short side is scaled and the rest cropped


class PretrainedEncoder(Encoder):
    """Picture, text or sound -> the states of a pretrained encoder; which of the three, the instance says."""

    modality = "image, text or audio"

    class Options(Frozen):
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

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        if options.architecture is None:
            self.options, self.model, tokenizer = _load(options)
        else:
            self.model, tokenizer = _encoder(options.architecture, options.layer, options.name or "options"), None
        self.modality = FAMILIES[self.model.config.model_type].modality
        reader: Any = {"image": _Pictures, "text": _Texts, "audio": _Sounds}[self.modality]
        self._reader = reader(self.options, self.model, tokenizer)
        self.dimensions, self.width = self._reader.dimensions, self._reader.width

    def prepare(self, raw: Any) -> dict[str, Tensor]:
        """A picture -> {"pixels": [3, H, W]}; a text -> {"tokens": [S], "mask": [S]}; a sound (see `load_sound`) ->
        {"samples": [T], "mask": [T]}, of Whisper {"spectrum": [mel, frames]}."""
        return self._reader.prepare(raw)

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """A batch -> Features; those of pictures have a grid, and what stands for the whole picture comes first."""
        device, exact = next(self.model.parameters()).device.type, FAMILIES[self.model.config.model_type].exact
        with torch.autocast(device, enabled=False) if exact else nullcontext():
            return self._reader.features(self.model, batch)

    def accepts(self, path: str) -> bool:
        """Whether the file name is a picture's, or a sound's; no file is a text."""
        return Path(path).suffix.lower() in self._reader.suffixes

    def save_files(self, folder: Path) -> None:
        """Write the tokenizer of a text encoder."""
        if isinstance(self._reader, _Texts) and self._reader.tokenizer is not None:
            self._reader.tokenizer.save(str(folder / TOKENIZER))

    def load_files(self, folder: Path) -> None:
        """Read the tokenizer of a text encoder."""
        from tokenizers import Tokenizer

        if isinstance(self._reader, _Texts):
            with _reading(str(folder), "tokenizer", f"a whole {TOKENIZER}"):
                self._reader = _Texts(self.options, self.model, Tokenizer.from_file(str(folder / TOKENIZER)))


class _Pictures:
    """Pixels as the family's own image processor makes them; the cells of what the model sees are the last slots."""

    dimensions, suffixes = 2, images.SUFFIXES

    def __init__(self, options: Any, model: Any, tokenizer: None) -> None:
        self.facts, self.config = options.preprocessing or {}, model.config
        self.processor = _class(self.facts.get("image_processor_type"), "ImageProcessor").from_dict(self.facts)
        self.width = self._probe(model)

    def prepare(self, raw: Any) -> dict[str, Tensor]:
        picture = images.load_image(raw)
        side = self.facts.get("size", {}).get("shortest_edge")
        if side and (self.facts.get("do_center_crop") or side < 384):  # ConvNeXT crops below 384 without saying so
            width, height = picture.size  # but a line of pixels, scaled by its short side, would fill all memory
            w, h = min(width, MOST_STRETCHED * height), min(height, MOST_STRETCHED * width)
            picture = picture.crop(((width - w) // 2, (height - h) // 2, (width + w) // 2, (height + h) // 2))
        return {"pixels": self.processor(picture, return_tensors="pt")["pixel_values"][0]}

    def features(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Features:
        pixels = batch["pixels"]
        states = model(pixel_values=pixels).last_hidden_state
        if states.ndim == 4:
            rows, columns = states.shape[2:]
            states = states.flatten(2).transpose(1, 2)
        else:
            stages, patch = len(getattr(self.config, "depths", [1])), self.config.patch_size
            sides = (patch, patch) if isinstance(patch, int) else patch
            rounded = math.ceil if stages > 1 else math.floor  # a pyramid pads what is left over, a plain one drops it
            rows, columns = (rounded(n / (p * 2 ** (stages - 1))) for n, p in zip(pixels.shape[2:], sides))
        return Features(states, states.new_ones(states.shape[:2], dtype=torch.bool), (rows, columns))

    def _probe(self, model: Any) -> int:
        """F, by looking; at two pictures of different shapes, which must come out as one."""
        first, second = (self.prepare(Image.new("RGB", size))["pixels"] for size in ((64, 48), (48, 64)))
        given = f"the image processor gives pictures of {list(first.shape)}"
        if first.shape != second.shape:
            raise EncoderError(f"{given} and {list(second.shape)}; expected one size; set do_center_crop to true.")
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                return self.features(model.eval(), {"pixels": first[None]}).states.shape[-1]
        except (RuntimeError, ValueError) as error:
            size = getattr(self.config, "image_size", "another size")
            raise EncoderError(f"{given}; expected {size}, as its model; mend preprocessor_config.json.") from error
        finally:
            model.train()


class _Texts:
    """Tokens of the model's own tokenizer."""

    dimensions, suffixes = 1, frozenset[str]()

    def __init__(self, options: Any, model: Any, tokenizer: Any) -> None:
        self.config, self.width = model.config, model.config.hidden_size
        table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
        kept = getattr(table, "padding_idx", None)  # a table of positions may keep its first rows for the padding
        end = getattr(self.config, "max_position_embeddings", None)
        end = end and end - (0 if kept is None else kept + 1)
        if end and options.max_tokens and options.max_tokens > end:
            raise EncoderError(f"max_tokens is {options.max_tokens}; expected at most {end}, where the model ends.")
        limits = [limit for limit in (end, (options.preprocessing or {}).get("max_tokens")) if limit]
        self.tokenizer, self.most = tokenizer, options.max_tokens or min(limits, default=512)
        if tokenizer is not None:
            tokenizer.enable_truncation(self.most)
            tokenizer.no_padding()

    def prepare(self, raw: Any) -> dict[str, Tensor]:
        if self.tokenizer is None:
            raise EncoderError("the text encoder has no tokenizer; load its checkpoint, or call load_files(folder).")
        ids = self.tokenizer.encode(str(raw)).ids or [self.config.pad_token_id or 0]  # no text is empty
        return {"tokens": torch.tensor(ids), "mask": torch.ones(len(ids), dtype=torch.bool)}

    def features(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Features:
        mask = batch["mask"]
        return Features(model(input_ids=batch["tokens"], attention_mask=mask.long()).last_hidden_state, mask)


class _Sounds:
    """Whisper's window of one length, or wav2vec2's samples of any."""

    dimensions, suffixes = 1, sounds.SUFFIXES

    def __init__(self, options: Any, model: Any, tokenizer: None) -> None:
        self.config, self.width = model.config, model.config.hidden_size
        facts = options.preprocessing or {}
        self.extractor = _class(facts.get("feature_extractor_type"), "FeatureExtractor").from_dict(facts)
        self.rate = self.extractor.sampling_rate
        self.convolutions = list(zip(getattr(self.config, "conv_kernel", []), getattr(self.config, "conv_stride", [])))
        self.least = 1  # samples, so that there is one frame
        for kernel, stride in reversed(self.convolutions):
            self.least = (self.least - 1) * stride + kernel

    def prepare(self, raw: Any) -> dict[str, Tensor]:
        samples = sounds.load_sound(raw, self.rate)
        samples = nn.functional.pad(samples, (0, max(0, self.least - len(samples))))
        read = self.extractor(samples.numpy(), sampling_rate=self.rate, return_tensors="pt")
        if not self.convolutions:
            return {"spectrum": read["input_features"][0]}
        return {"samples": read["input_values"][0], "mask": torch.ones(len(samples), dtype=torch.bool)}

    def features(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Features:
        """All of Whisper's window may be attended, as its own decoder does: it was trained to hear the silence too.

        Where convolutions norm over time, padding would change every state and no mask hides it. There rows of one
        length are run together and others apart: slower, and alone as in a batch.
        """
        if not self.convolutions:
            states = model(batch["spectrum"]).last_hidden_state
            return Features(states, states.new_ones(states.shape[:2], dtype=torch.bool))
        samples, mask = batch["samples"], batch["mask"]
        frames = lengths = mask.sum(1)
        for kernel, stride in self.convolutions:
            frames = (frames - kernel) // stride + 1
        if self.config.feat_extract_norm == "layer":
            states = model(samples, attention_mask=mask.long()).last_hidden_state
        else:
            states = _by_length(model, samples, lengths.tolist())
        return Features(states, torch.arange(states.shape[1], device=mask.device) < frames[:, None])


def _by_length(model: nn.Module, samples: Tensor, lengths: list[int]) -> Tensor:
    """[B, T] -> [B, S, F], the rows of each length together, without their padding."""
    pieces: dict[int, Tensor] = {}
    for length in sorted(set(lengths)):
        rows = [row for row, own in enumerate(lengths) if own == length]
        pieces.update(zip(rows, model(samples[rows, :length]).last_hidden_state))
    return nn.utils.rnn.pad_sequence([pieces[row] for row in range(len(lengths))], batch_first=True)


def _load(options: PretrainedEncoder.Options) -> tuple[PretrainedEncoder.Options, Any, Any]:
    """Options with all that was found filled in, the encoder, and its tokenizer."""
    import transformers

    if not (name := options.name or ""):
        raise EncoderError("the encoder has no name; give a folder, or a public name like facebook/dinov2-small.")
    folder = Path(os.path.expanduser(name))
    there = str(folder) if folder.is_dir() else name
    place: dict[str, Any] = {"pretrained_model_name_or_path": there, "revision": options.revision}
    _fetch(name, folder, place)
    with _quiet():
        with _reading(name, "config", "a whole config.json"):
            whole = _config(_clean(transformers.PreTrainedConfig.get_config_dict(**place)[0]), name)
        architecture, layer = _resolve(whole, options)
        encoder = _encoder(architecture, layer, name, place)
        modality = FAMILIES[architecture["model_type"]].modality
        kind = {"image": "ImageProcessor", "text": "Tokenizer", "audio": "FeatureExtractor"}[modality]
        expected = f"preprocessor_config.json, for texts {TOKENIZER} (others: pip install sentencepiece protobuf)"
        with _reading(name, kind, expected):
            processor = getattr(transformers, f"Auto{kind}").from_pretrained(**place, config=whole)
            tokenizer, most = getattr(processor, "backend_tokenizer", None), getattr(processor, "model_max_length", 0)
            facts = {"max_tokens": most if most < 10**6 else None} if tokenizer else _facts(processor)
            if tokenizer and not any(_has(place, file) for file in processor.vocab_files_names.values()):
                raise FileNotFoundError  # transformers would go on with an empty vocabulary
    found = {"layer": layer, "architecture": architecture, "preprocessing": facts}
    found |= {"name": None, "revision": None} if folder.is_dir() else {}  # a path says nothing elsewhere
    return options.model_copy(update=found), encoder, tokenizer


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


def _resolve(whole: Any, options: PretrainedEncoder.Options) -> tuple[dict[str, Any], int | None]:
    """The architecture of the encoder alone, up to the layer; and the layer, counted from the start."""
    towers = TOWERS.get(whole.model_type) or {FAMILIES[whole.model_type].modality: ""}
    tower: str = options.tower or next(iter(towers))
    if tower not in towers:
        raise EncoderError(f"{options.name!r} has no {tower} encoder of use here; expected tower {', '.join(towers)}.")
    config = getattr(whole, towers[tower]) if towers[tower] else whole
    facts = _facts(config, use_diff=False)
    facts |= {fact: value for fact, value in DECIDED.items() if fact in facts}
    if (layer := options.layer) is None:
        return facts, None
    blocks = whole.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    most = len(facts["depths"]) if "depths" in facts else facts[blocks]
    chosen = layer if layer >= 0 else most + 1 + layer
    if not 1 <= chosen <= most:
        raise EncoderError(f"{facts['model_type']} has no layer {layer}; give 1 to {most}, or -1 for the last.")
    lists = ("depths", "hidden_sizes", "num_heads", "layer_types")
    cut = {fact: facts[fact][:chosen] for fact in lists if isinstance(facts.get(fact), list)}
    return facts | cut | {fact: chosen for fact in ("num_stages", blocks) if fact in facts}, chosen


def _encoder(architecture: dict[str, Any], layer: int | None, name: str, source: dict[str, Any] | None = None) -> Any:
    """The encoder of an architecture, with the float32 weights of a source, or random ones; without the parts whose
    output is not handed over. No weight may be lacking: transformers would draw it at random."""
    config = _config(architecture, name)
    family = FAMILIES[config.model_type]
    made, _, path = family.model.partition(".")
    kind, pooling = _class(made, "Model"), "add_pooling_layer"
    arguments: dict[str, Any] = {pooling: False} if pooling in signature(kind).parameters else {}
    ends = architecture.get("do_stable_layer_norm", True)  # else wav2vec2 has its norm before the blocks
    last = family.norm if layer is not None and ends else ""
    unused = tuple(part for part in (family.idle, last) if part)
    if source is None:
        model = kind(config, **arguments)
    else:
        with _reading(name, "weights", "whole safetensors"):
            arguments |= {"key_mapping": {f"^{family.prefix}": ""}} if family.prefix else {}
            arguments |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
            model, report = kind.from_pretrained(config=config, dtype=torch.float32, **source, **arguments)
            lacking = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
        if own := sorted(key for key in lacking if key.startswith(path) and not key.startswith(unused)):
            given = f"{name!r} lacks {len(own)} tensors of its {config.model_type} encoder, such as {own[0]}"
            raise EncoderError(f"{given}; expected all of them; download it again.")
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

    known = FAMILIES.keys() | TOWERS
    if facts.get("model_type") not in known:
        given = f"{name!r} has model_type {facts.get('model_type')!r}"
        raise EncoderError(f"{given}; expected one of {', '.join(sorted(known))}.")
    with _reading(name, f"{facts['model_type']} architecture", "one that transformers can build"):
        return AutoConfig.for_model(**facts)


def _class(name: Any, ending: str) -> Any:
    """A class of transformers, of the kind that its name ends in."""
    import transformers

    found = getattr(transformers, name, None) if str(name).removesuffix("Pil").endswith(ending) else None
    if not isinstance(found, type):
        raise EncoderError(f"transformers has no {ending} {name!r}; install the version that the encoder came with.")
    return found


def _facts(thing: Any, **how: bool) -> dict[str, Any]:
    return _clean(json.loads(thing.to_json_string(**how)))


def _clean(facts: dict[str, Any]) -> dict[str, Any]:
    unwanted = DROPPED | ({"hidden_size", "num_layers"} if "depths" in facts else set())
    kept = {key: value for key, value in facts.items() if key not in unwanted and not key.startswith("_")}
    return {key: _clean(value) if isinstance(value, dict) else value for key, value in kept.items()}


@contextmanager
def _reading(name: str, what: str, expected: str) -> Iterator[None]:
    """Whatever goes wrong while one thing is read becomes a sentence that names it."""
    try:
        yield
    except (EncoderError, MemoryError):
        raise
    except Exception as error:  # transformers raises what it likes
        given = f"{name!r} has no {what} that can be read ({type(error).__name__})"
        raise EncoderError(f"{given}; expected {expected}; download it again, or look with --traceback.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of the weights that a tower leaves over; those that are lacking are told by us."""
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
