"""A language model as the decoder: its facts, its weights, its tokenizer, and beside them cross-attention that is new.

This is how a text model learns to look (Alayrac et al. 2022, "Flamingo", section 2.2): what it knows stays frozen, and
gates that start shut let in what it sees; at the start it says what it would say without looking.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmx.config.loader import parse_config
from mmx.config.schema import DecoderConfig, ModelConfig
from mmx.errors import CheckpointError, ConfigError
from mmx.hub import gpt2, llama
from mmx.hub.hf_checkpoint import HFCheckpoint, conversion_errors, open_hf_checkpoint
from mmx.hub.hf_config import first_token_id, read_tokenizer
from mmx.hub.vit_gpt2 import has_own_head
from mmx.hub.weight_mapping import WeightMapping, convert
from mmx.models.decoder import TextDecoder
from mmx.models.model import Model
from mmx.text.tokenizer import Tokenizer

HEAD = "lm_head.weight"
CONVERTERS = {"gpt2": ("transformer.", "wte.weight"), "llama": ("model.", "embed_tokens.weight")}
CONVERTERS["qwen2"] = CONVERTERS[
    "llama"
]  # by model_type: before the names of the stack, unless it was saved bare; its table
OURS = ("cross_attention_every_n_layers", "gate", "dropout")  # facts that a language model has not, or need not keep
QUESTION, ANSWER = " Question:", " Answer:"  # the marks of mmx.text.prompts, as a model of plain text knows them


def build_from_language_model(config: ModelConfig) -> Model:
    """The model of a configuration whose decoder names a language model (`init_from`), with its weights in it.

    The configuration of what is built names it no longer: a checkpoint of it rebuilds itself.
    """
    decoder, tensors, tokenizer = read_language_model(str(config.decoder.pretrained), config.decoder)
    marks = {mark.text.strip("<>"): tuple(tokens) for mark, tokens in tokenizer.marks.items()}
    facts = {"decoder": decoder, "vocab_size": decoder.padded_vocab_size, "special_tokens": marks}
    model = Model(config.model_copy(update=facts), tokenizer)
    lacking, extra = model.load_state_dict(tensors, strict=False)
    unread = [name for name in lacking if name.startswith("decoder.") and not is_new(name)]
    if unread or extra:  # the tables are ours: no file of anyone could bring this about
        raise CheckpointError(f"{config.decoder.pretrained!r} gives no {(unread or extra)[0]}; tell the maintainers.")
    return model


def is_new(name: str) -> bool:
    """Whether a tensor of the decoder is one that the language model could not have had."""
    return ".cross_attention" in name or ".cross_residual" in name


def read_language_model(
    name: str, ours: DecoderConfig | None = None, revision: str | None = None, pickles: bool = False
) -> tuple[DecoderConfig, dict[str, Tensor], Tokenizer]:
    """The decoder of a folder or public name, its tensors by our names (from "decoder." on) in float32, its tokenizer.

    ours: `cross_every`, `gate` and `dropout` are taken from it, all else from the language model. Captions follow the
    opening token at once; questions and answers are announced in plain words. Raises ConfigError for a decoder whose
    gate is open at the start, CheckpointError for a family that is not known, or files that are damaged.
    """
    ours = ours or DecoderConfig(gate="tanh", dropout=0.0)
    if ours.gate != "tanh":
        raise ConfigError(
            f"model.decoder.gate is {ours.gate!r} with init_from, which needs 'tanh': shut at the start, it lets a "
            "language model speak as it did; set model.decoder.gate=tanh."
        )
    published = open_hf_checkpoint(name, revision, pickles)
    kind = published.config.get("model_type")
    if kind not in CONVERTERS:
        raise CheckpointError(
            f"{name!r} has model_type {kind!r}; expected a language model of {', '.join(CONVERTERS)}."
        )
    with conversion_errors(published, str(kind)):
        facts, rules, dropped = _maps(published, str(kind))
        kept = {fact: getattr(ours, fact) for fact in OURS}
        config = parse_config({**facts.model_dump(), **kept}, DecoderConfig, where="model.decoder")
        tokenizer = _tokenizer(published)
    with torch.device("meta"):  # for its shapes alone
        decoder = TextDecoder(config, len(tokenizer))
    shapes = {f"decoder.{own}": tensor.shape for own, tensor in decoder.state_dict().items()}
    return config, convert(rules, dropped, published.tensors, shapes, repr(name)), tokenizer


def _maps(published: HFCheckpoint, kind: str) -> tuple[DecoderConfig, list[WeightMapping], tuple[str, ...]]:
    """The config map, the weight map, and patterns of what is dropped."""
    config, (prefix, table) = published.config, CONVERTERS[kind]
    prefix = prefix if any(name.startswith(prefix) for name in published.tensors) else ""
    own = has_own_head(published, HEAD, f"{prefix}{table}")
    if not own and HEAD not in published.tensors and not config.get("tie_word_embeddings", kind == "gpt2"):
        raise CheckpointError(f"{published.name!r} lacks {HEAD}, and is not tied; download it again.")
    head, tied_head = (HEAD, ()) if own else (None, (HEAD,))
    if kind == "gpt2":
        facts = gpt2.decoder_config(published, config, tied=not own)
        buffers = rf"{prefix}h\.\d+\.{gpt2.BUFFERS}"
        return facts, gpt2.decoder_weights(prefix, facts.num_layers, head), (*tied_head, buffers)
    facts = llama.decoder_config(published, config, tied=not own)
    buffers = rf"{prefix}layers\.\d+\.{llama.BUFFERS}"
    return facts, llama.decoder_weights(config, prefix, facts.num_layers, head), (*tied_head, buffers)


def _tokenizer(published: HFCheckpoint) -> Tokenizer:
    """The model's own, with plain words where mmx has marks."""
    marks = _special(published.config)
    plain = read_tokenizer(published, marks)
    words: Mapping[str, list[int]] = {
        "caption": [],
        "question": plain.encode(QUESTION),
        "answer": plain.encode(ANSWER),
    }
    return Tokenizer(plain.engine, {**marks, **words})


def _special(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """What opens, ends and fills up a text. What has no opening is opened by the end of the text before; what has no
    filler is filled up by ends, which nobody looks at."""
    end = first_token_id(config["eos_token_id"])
    opening, filler = config.get("bos_token_id"), config.get("pad_token_id")
    return {
        "pad": [filler if isinstance(filler, int) and filler >= 0 else end],
        "bos": [end if opening is None else first_token_id(opening)],
        "eos": [end],
    }
