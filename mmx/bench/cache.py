"""What caching saves: one text over one image, decoded with and without each cache.

Axes: S slots, F feature size, T tokens of the text; one memory, one stream.

A decoder has two caches. That of self-attention (`KVCache`) grows by one position per token; that of cross-attention is
static, and is the `Memory`. Three methods generate the same tokens: `cached` uses both; `uncached` processes the whole
text again at every token; `recomputed` projects the keys and values of the memory from the features again at every
token. All use the modules of the decoder, so that they differ only in what is cached; the fast path, which only
`cached` could use, is measured by the workload `greedy`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mmx.bench.decoding import ms_per_token
from mmx.bench.hf_references import BenchSetting, build_pair
from mmx.bench.timing import BenchResult, TimedRuns, alternate, compare
from mmx.encoders.contract import encode
from mmx.errors import MmxError
from mmx.generation.decode_step import CachedDecodeStep, DecodeStep, UncachedDecodeStep
from mmx.memory import Memory
from mmx.models.decoder import TextDecoder
from mmx.models.model import Model
from mmx.models.projection import KeyValueProjection
from mmx.models.source import Source
from mmx.nn.features import Features
from mmx.text.prompts import BOS

METHODS = ("cached", "uncached", "recomputed")
LENGTHS = {"micro": (4, 16), "base": (8, 16, 32)}  # numbers of tokens of a text; else DEFAULT_LENGTHS
DEFAULT_LENGTHS = (8, 16, 32, 64)
REFERENCES = {"uncached": "vs. no KV cache", "recomputed": "vs. no memory"}


@dataclass(frozen=True)
class DecodingCost:
    """Cost of one token of a text of `length` tokens, averaged over the text.

    Attributes:
        method: one of METHODS.
        length: number of tokens of the text.
        milliseconds: median over the timed runs.
        cached_bytes: bytes kept between two tokens, at the end of the text.
        computed_bytes: bytes of keys and values computed per token.
        same: whether the text equals that of `cached`.
    """

    method: str
    length: int
    milliseconds: float
    cached_bytes: int
    computed_bytes: int
    same: bool


class DecodedText(NamedTuple):
    """Tokens of a text, and the bytes of the KV cache at its end (0 without one)."""

    tokens: list[int]
    kv_cache_bytes: int


class RecomputingDecodeStep(CachedDecodeStep):
    """Slow reference of CachedDecodeStep that projects the memory for every token and drops it again.

    Args:
        decoder: the text decoder.
        project: returns the memory of all rows; therefore rows cannot be selected.
        batch: number of rows.
        capacity: number of tokens that can be generated after the prompts.
    """

    def __init__(self, decoder: TextDecoder, project: Callable[[], Memory], batch: int, capacity: int) -> None:
        super().__init__(decoder, decoder.empty_memory(batch), capacity, fast=False)
        self.project = project
        self._empty = self.memory

    def prefill(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """See DecodeStep.prefill."""
        return self._with_memory(partial(super().prefill, tokens, mask))

    def __call__(self, tokens: Tensor) -> Tensor:
        """See DecodeStep."""
        return self._with_memory(partial(super().__call__, tokens))

    def select(self, rows: Tensor) -> None:
        """Raise MmxError (code `bench.select`)."""
        raise MmxError(
            "RecomputingDecodeStep projects all rows and cannot select some; use CachedDecodeStep.", code="bench.select"
        )

    def _with_memory(self, compute_logits: Callable[[], Tensor]) -> Tensor:
        self.memory = self.project()
        logits = compute_logits()
        self.memory = self._empty
        return logits


def cache(setting: BenchSetting) -> Iterator[BenchResult]:
    """ViT-GPT2, one image, greedy: both caches compared with no KV cache, and with no memory."""
    pair = build_pair("vit-gpt2", setting).for_inference()
    features = features_of(pair.model, "image", {"pixels": pair.pixels(1)})
    for length in LENGTHS.get(setting.size, DEFAULT_LENGTHS):
        runs = _timed_methods(pair.model, "image", features, length, setting.repeats)
        costs = _costs(runs, length, features, _project(pair.model, "image", features).nbytes)
        cached = costs["cached"]
        for method, name in REFERENCES.items():
            quantity = ms_per_token(f"cache, {length} tokens, {name}", length)
            note = _describe_bytes(cached, costs[method], setting)
            yield compare(quantity, runs["cached"], runs[method], costs[method].same, note)


def decoding_costs(
    model: Model, source: str, features: Features, lengths: Sequence[int], repeats: int = 5
) -> list[DecodingCost]:
    """Return the cost of a token with each of the three methods, for texts of each of `lengths` tokens.

    Args:
        model: in eval mode.
        source: name of the source that `features` come from.
        features: of one input, see `features_of`.
        lengths: numbers of tokens.
        repeats: number of timed runs of each method.

    Raises:
        MmxError: code `bench.lengths`, for lengths that the decoder cannot process; `bench.batch_size`, for features
            of several inputs; `bench.question_encoder`, for a model with a question encoder.
    """
    _check(model, features, lengths)
    memory_bytes = _project(model, source, features).nbytes
    costs: list[DecodingCost] = []
    for length in lengths:
        runs = _timed_methods(model, source, features, length, repeats)
        costs += _costs(runs, length, features, memory_bytes).values()
    return costs


def features_of(model: Model, source: str, inputs: Mapping[str, Tensor]) -> Features:
    """Return the features [B, S, F] of collated inputs, in the dtype of the source's projection."""
    weight = _projection(model, source).key.weight
    with torch.no_grad():
        features = encode(model.encoder(source), source, inputs, weight.device)
        return features._replace(states=features.states.to(weight.dtype))


def _check(model: Model, features: Features, lengths: Sequence[int]) -> None:
    longest = model.config.decoder.max_position_embeddings
    if not lengths or not all(1 <= length <= longest for length in lengths):
        raise MmxError(
            f"lengths {list(lengths)} cannot be measured; give numbers of tokens from 1 to {longest}.",
            code="bench.lengths",
            given=list(lengths),
            expected=longest,
        )
    if len(features.states) != 1:
        count = len(features.states)
        raise MmxError(
            f"the features are those of {count} inputs; give those of one.", code="bench.batch_size", given=count
        )
    if model.question_encoder is not None:
        raise MmxError(
            "the question encoder of the model attends to the source, not its decoder; give a model without one.",
            code="bench.question_encoder",
        )


def _timed_methods(
    model: Model, source: str, features: Features, length: int, repeats: int
) -> dict[str, TimedRuns[DecodedText]]:
    """Time the three methods in turn."""
    decoder = model.decoder
    project = partial(_project, model, source, features)
    memory = project()
    steps: dict[str, Callable[[], DecodeStep]] = {
        "cached": lambda: CachedDecodeStep(decoder, memory, length - 1, fast=False),
        "uncached": lambda: UncachedDecodeStep(decoder, memory),
        "recomputed": lambda: RecomputingDecodeStep(decoder, project, 1, length - 1),
    }
    bos = torch.full((1, 1, 1), model.tokenizer.special_tokens[BOS][0], device=model.device)
    functions = {method: partial(_decode, step, bos, length) for method, step in steps.items()}
    return alternate(functions, repeats, str(model.device))


def _decode(new_step: Callable[[], DecodeStep], prompt: Tensor, length: int) -> DecodedText:
    """Generate `length` tokens greedily; end-of-sequence is a token like others."""
    with torch.inference_mode():
        step = new_step()
        tokens = [step.prefill(prompt, torch.ones_like(prompt, dtype=torch.bool)).argmax(-1)]
        while len(tokens) < length:
            tokens.append(step(tokens[-1]).argmax(-1))
        kv_cache_bytes = step.cache.nbytes if isinstance(step, CachedDecodeStep) else 0
        return DecodedText(torch.cat(tokens).tolist(), kv_cache_bytes)


def _costs(
    runs: Mapping[str, TimedRuns[DecodedText]], length: int, features: Features, memory_bytes: int
) -> dict[str, DecodingCost]:
    text, kv_cache_bytes = runs["cached"].output
    position_bytes = kv_cache_bytes // length  # positions: the beginning-of-sequence token and all tokens but the last
    cached_bytes = {
        "cached": kv_cache_bytes + memory_bytes,
        "uncached": memory_bytes,
        "recomputed": runs["recomputed"].output.kv_cache_bytes + features.states.nbytes,
    }
    # Without a KV cache, token n computes n positions: (length + 1) / 2 on average.
    computed_bytes = {
        "cached": position_bytes,
        "uncached": position_bytes * (length + 1) // 2,
        "recomputed": position_bytes + memory_bytes,
    }
    costs = {}
    for method in METHODS:
        milliseconds = ms_per_token(method, length).measure(runs[method].seconds).median
        same = runs[method].output.tokens == text
        costs[method] = DecodingCost(method, length, milliseconds, cached_bytes[method], computed_bytes[method], same)
    return costs


def _project(model: Model, source: str, features: Features) -> Memory:
    """Return the memory of the features, in the dtype of the decoder."""
    with torch.inference_mode():
        memory: Memory = _projection(model, source)(features)
        return memory.to(dtype=model.decoder.embedding.weight.dtype)


def _projection(model: Model, source: str) -> KeyValueProjection:
    model.encoder(source)  # raises MmxError for an unknown source
    found = model.sources[source]
    assert isinstance(found, Source)
    return found.projection


def _describe_bytes(cached: DecodingCost, other: DecodingCost, setting: BenchSetting) -> str:
    dtype = "" if setting.dtype == "float32" else f"; the decoder in {setting.dtype}, tokens may differ"
    kept = f"{cached.cached_bytes / 1e6:.3f} MB, reference {other.cached_bytes / 1e6:.3f} MB"
    computed = f"{cached.computed_bytes / 1e6:.3f} MB, reference {other.computed_bytes / 1e6:.3f} MB"
    return f"both columns are mmx; cached {kept}; keys and values computed per token {computed}{dtype}"
