"""Loading and rebuilding of pretrained encoders of transformers.

A loaded encoder is described by two plain dicts, its architecture and its preprocessing, from which it can be rebuilt
without any file of its origin. Weights are read from safetensors only, and code that comes with them is never run.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from mmx.config.environment import cache_folder
from mmx.encoders.pretrained.architecture import (
    JsonObject,
    PretrainedOptions,
    build_config,
    class_of,
    clean_fields,
    config_dict,
    hf_errors,
    resolve_architecture,
)
from mmx.encoders.pretrained.families import HF_FAMILIES, HFFamily
from mmx.errors import EncoderError

IGNORED_TENSORS = ("pooler.", "embeddings.position_ids")  # may be in the file, but do not affect the states
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TOKENIZER = "tokenizer.json"
PROCESSORS = {"image": "ImageProcessor", "text": "Tokenizer", "audio": "FeatureExtractor"}
UNLIMITED = 10**6  # transformers stores a huge number where a tokenizer has no maximum length


class LoadedEncoder(NamedTuple):
    """A loaded encoder: options that rebuild it, the module, and the `tokenizers.Tokenizer` of a text encoder."""

    options: PretrainedOptions
    model: nn.Module
    tokenizer: object | None


class WeightSource(NamedTuple):
    """Where transformers reads weights from: a folder or name, or a state dict."""

    path: str | None
    revision: str | None = None
    state_dict: dict[str, Tensor] | None = None

    def arguments(self) -> JsonObject:
        """Keyword arguments of `from_pretrained`."""
        if self.state_dict is not None:
            return {"pretrained_model_name_or_path": None, "state_dict": self.state_dict}
        return {"pretrained_model_name_or_path": self.path, "revision": self.revision, "cache_dir": cache_folder()}

    def has_file(self, file: str) -> bool:
        """Return whether the folder or Hub repository has a file. It is downloaded if needed."""
        from transformers.utils.hub import cached_file

        path = self.path or ""
        with suppress(Exception):
            return cached_file(path, file, revision=self.revision, cache_dir=cache_folder()) is not None
        return False


def load_hf_encoder(options: PretrainedOptions) -> LoadedEncoder:
    """Load the encoder that the options name, and resolve its architecture and preprocessing.

    Raises EncoderError for a name that cannot be found, an unsupported model type, and damaged or incomplete files.
    """
    import transformers

    name = options.name or ""
    if not name:
        raise EncoderError(
            "the encoder has no name; give a folder, or a public name like facebook/dinov2-small.",
            code="encoder.name_missing",
        )
    folder = Path(os.path.expanduser(name))
    source = WeightSource(str(folder) if folder.is_dir() else name, options.revision)
    _check_files(name, folder, source)
    with suppress_hf_output():
        with hf_errors(name, "config", "a whole config.json"):
            fields = transformers.PreTrainedConfig.get_config_dict(**source.arguments())[0]
            config = build_config(clean_fields(fields), name)
        architecture, layer = resolve_architecture(config, options)
        model = build_hf_encoder(architecture, layer, name, source)
        modality = HF_FAMILIES[architecture["model_type"]].modality
        tokenizer, preprocessing = _load_processor(name, modality, source, config)
    changes: JsonObject = {"layer": layer, "architecture": architecture, "preprocessing": preprocessing}
    if folder.is_dir():  # a local path means nothing on another computer
        changes |= {"name": None, "revision": None}
    return LoadedEncoder(options.model_copy(update=changes), model, tokenizer)


def describe_encoder(name: str, folder: Path, config: JsonObject) -> JsonObject:
    """Return the options of an encoder that is part of a larger Hugging Face model.

    Args:
        name: name of the model, for errors.
        folder: its folder, with the processor.
        config: the encoder's part of config.json, with its model_type.
    """
    import transformers

    with suppress_hf_output():
        architecture, _ = resolve_architecture(build_config(clean_fields(config), name), PretrainedOptions(name=name))
        kind = PROCESSORS[HF_FAMILIES[architecture["model_type"]].modality]
        with hf_errors(name, kind, "preprocessor_config.json"):
            auto_class = getattr(transformers, f"Auto{kind}")
            processor = auto_class.from_pretrained(str(folder), trust_remote_code=False)
    return {"architecture": architecture, "preprocessing": config_dict(processor)}


def load_tensors(name: str, architecture: JsonObject, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the tensors of one encoder from their names in a file to their names in the module built here.

    Raises EncoderError if a tensor is missing or unexpected.
    """
    _, _, path = HF_FAMILIES[architecture["model_type"]].model_class.partition(".")
    prefix = f"{path}." if path else ""
    state_dict = {f"{prefix}{tensor_name}": tensor for tensor_name, tensor in tensors.items()}
    with suppress_hf_output():
        encoder = build_hf_encoder(architecture, None, name, WeightSource(None, state_dict=state_dict))
    return dict(encoder.state_dict())


def build_hf_encoder(
    architecture: JsonObject, layer: int | None, name: str, source: WeightSource | None = None
) -> nn.Module:
    """Build the encoder of an architecture in float32, without modules that do not affect its states.

    Args:
        layer: the layer whose states are used, as in PretrainedOptions.
        name: what errors call it.
        source: its weights; random if None.

    Raises EncoderError if the source lacks a tensor (transformers would initialize it randomly).
    """
    config = build_config(architecture, name)
    family = HF_FAMILIES[config.model_type]
    unused = _unused_modules(family, architecture, layer)
    model, loading_info = _instantiate(family, config, name, source)
    _, _, path = family.model_class.partition(".")
    _check_tensors(name, config.model_type, loading_info, path, unused, source)
    encoder: nn.Module = model.get_submodule(path)
    for module_name in unused:
        encoder.set_submodule(module_name, nn.Identity())
    for module in encoder.modules():
        if is_parametrized(module, "weight"):  # weight norm, which cannot be pickled for a data worker
            remove_parametrizations(module, "weight")._load_state_dict_pre_hooks.clear()
    for parameter_name, parameter in encoder.named_parameters():
        if parameter_name.endswith("mask_token"):  # used in pretraining only
            parameter.requires_grad_(False)
    return encoder.train()


@contextmanager
def suppress_hf_output() -> Iterator[None]:
    """Suppress progress bars and warnings of transformers while it loads and saves."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    has_progress_bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_progress_bar:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _check_files(name: str, folder: Path, source: WeightSource) -> None:
    """Download config and weights if needed; raise EncoderError if one does not exist."""
    has_config = source.has_file("config.json")
    has_weights = has_config and any(source.has_file(file) for file in WEIGHTS)
    if not has_config and not folder.is_dir():
        raise EncoderError(
            f"{name!r} is no folder here and could not be downloaded (no such name, no network, or HF_HUB_OFFLINE=1 "
            "is set); check the name, or give the folder of a downloaded model.",
            code="encoder.not_found",
            name=name,
        )
    if not has_config or not has_weights:
        missing = WEIGHTS[0] if has_config else "config.json"
        pickles = "; pickles (*.bin) may run code and are not read" if any(folder.glob("*.bin")) else ""
        raise EncoderError(
            f"{name!r} has no {missing}{pickles}; expected what save_pretrained writes; save or download it again.",
            code="encoder.file_missing",
            name=name,
            file=missing,
        )


def _load_processor(name: str, modality: str, source: WeightSource, config: Any) -> tuple[Any, JsonObject]:
    """Load the image processor, tokenizer or feature extractor.

    Returns the `tokenizers.Tokenizer` of a text encoder (otherwise None) and the preprocessing as a dict.
    """
    import transformers

    kind = PROCESSORS[modality]
    expected = f"preprocessor_config.json, for texts {TOKENIZER} (others: pip install sentencepiece protobuf)"
    with hf_errors(name, kind, expected):
        auto_class = getattr(transformers, f"Auto{kind}")
        processor = auto_class.from_pretrained(**source.arguments(), config=config, trust_remote_code=False)
        if modality != "text":
            return None, config_dict(processor)
        if missing_tokenizer_files(processor, source.has_file):
            raise FileNotFoundError  # transformers would continue with an empty vocabulary, or without merges
        max_length = processor.model_max_length
        return processor.backend_tokenizer, {"max_length": max_length if max_length < UNLIMITED else None}


def missing_tokenizer_files(tokenizer: Any, has_file: Callable[[str], bool]) -> list[str]:
    """Return the files that a tokenizer of transformers was made without: vocabulary and merges, or tokenizer.json."""
    if has_file(TOKENIZER):
        return []
    names = tokenizer.vocab_files_names
    needed = [names[kind] for kind in ("vocab_file", "merges_file") if kind in names]
    return [file for file in needed if not has_file(file)]


def _unused_modules(family: HFFamily, architecture: JsonObject, layer: int | None) -> tuple[str, ...]:
    """Names of modules that do not affect the states that are used."""
    # Without do_stable_layer_norm, wav2vec2 has its norm before the layers.
    has_final_norm = architecture.get("do_stable_layer_norm", True)
    final_norm = family.final_norm if layer is not None and has_final_norm else ""
    return tuple(name for name in (family.unused_module, final_norm) if name)


def _instantiate(
    family: HFFamily, config: Any, name: str, source: WeightSource | None
) -> tuple[nn.Module, Mapping[str, Any]]:
    """Return the model and, if it was loaded from a source, the loading info of transformers."""
    model_class = class_of(family.model_class.partition(".")[0], "Model")
    arguments: JsonObject = {}
    if "add_pooling_layer" in signature(model_class).parameters:
        arguments["add_pooling_layer"] = False
    if source is None:
        with hf_errors(name, "architecture", "one that fits"):
            return model_class(config, **arguments), {}
    if family.weight_prefix:
        arguments["key_mapping"] = {f"^{family.weight_prefix}": ""}
    with hf_errors(name, "weights", "whole safetensors"):
        model, loading_info = model_class.from_pretrained(
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            **arguments,
            **source.arguments(),
        )
    return model, loading_info


def _check_tensors(
    name: str,
    model_type: str,
    loading_info: Mapping[str, Any],
    path: str,
    unused: tuple[str, ...],
    source: WeightSource | None,
) -> None:
    """Raise EncoderError for tensors that were missing, misshapen or (of a state dict) not used."""
    missing = set(loading_info.get("missing_keys", ()))
    missing |= {key for key, *_ in loading_info.get("mismatched_keys", ())}
    needed = sorted(key for key in missing if key.startswith(path) and not key.startswith(unused))
    if needed:
        raise EncoderError(
            f"{name!r} lacks {len(needed)} tensors of its {model_type} encoder, such as {needed[0]}; expected all of "
            "them; download it again.",
            code="encoder.missing_tensors",
            name=name,
            tensors=needed,
        )
    unexpected = sorted(key for key in loading_info.get("unexpected_keys", ()) if not key.startswith(IGNORED_TENSORS))
    if unexpected and source is not None and source.state_dict is not None:
        raise EncoderError(
            f"{name!r} holds {unexpected[0]}, which a {model_type} encoder does not have; is its config.json its own?",
            code="encoder.unexpected_tensors",
            name=name,
            tensors=unexpected,
        )
