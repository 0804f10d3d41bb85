"""What a cache is worth: one text over one picture, with what is held taken away.

Alphabet: S slots, F feature width, T tokens of the text, n positions read so far; one memory, one stream.

Two caches meet in a decoder. That of self-attention grows by one position a token (`KeyValueCache`); that of
cross-attention is static, and is the `Memory`. Three ways say the same words: `cached` holds both, `uncached` reads the
whole text again at every token, `anew` projects the cross keys and values from the features again at every token. All
go through the decoder's modules, so that nothing differs but what is held; the decoder's own fast path
(`generation.unrolled`), which only the first could take, is measured by `greedy`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmx.bench.hf_references import BenchSetting, build_pair
from mmx.bench.timing import BenchResult, Spread, TimedRuns, alternate, compare
from mmx.encoders.contract import encode
from mmx.errors import MmxError
from mmx.generation.decode_step import CachedDecodeStep, DecodeStep, UncachedDecodeStep
from mmx.memory import Memory
from mmx.models.decoder import TextDecoder
from mmx.models.model import Model
from mmx.models.source import Source
from mmx.nn.features import Features
from mmx.text.prompts import BOS

METHODS = ("cached", "uncached", "anew")
LENGTHS = {"micro": (4, 16), "base": (8, 16, 32)}  # tokens of a text; else
USUAL = (8, 16, 32, 64)
BESIDE = {"uncached": "beside no cache", "anew": "beside looking anew"}


@dataclass(frozen=True)
class DecodingCost:
    """What a token of a text of `length` tokens costs in one way, on the average over the text.

    milliseconds: the median over the counted runs; held: bytes that stand from one token to the next, at the end of the
    text; recomputed: bytes of keys and values that are computed for a token; same: whether the text is that of the
    cached way.
    """

    method: str
    length: int
    milliseconds: float
    held: int
    recomputed: int
    same: bool


class RecomputingDecodeStep(CachedDecodeStep):
    """The slow twin of a CachedDecodeStep over a static memory: projects it for every token, and drops it again.

    For measuring. `project`: gives the memory of all rows, so no row can leave (`keep`).
    """

    def __init__(self, decoder: TextDecoder, project: Callable[[], Memory], batch: int, capacity: int) -> None:
        super().__init__(decoder, decoder.empty_memory(batch), capacity, fast=False)
        self.project, self.nothing = project, self.memory

    def prefill(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """See Step.prefill."""
        return self._looking(partial(super().prefill, tokens, mask))

    def __call__(self, tokens: Tensor) -> Tensor:
        """See Step."""
        return self._looking(partial(super().__call__, tokens))

    def select(self, rows: Tensor) -> None:
        """See Step; raises MmxError."""
        raise MmxError("LookingAnewStep was asked to keep some rows, but projects all; use CachedDecodeStep.")

    def _looking(self, ask: Callable[[], Tensor]) -> Tensor:
        self.memory = self.project()
        logits = ask()
        self.memory = self.nothing
        return logits


def cache(setting: BenchSetting) -> Iterator[BenchResult]:
    """ViT-GPT2, one picture, greedy: both caches beside none for the text, and beside none for the picture."""
    pair = build_pair("vit-gpt2", setting).for_inference()
    features = features_of(pair.model, "image", {"pixels": pair.pixels(1)})
    for length in LENGTHS.get(setting.size, USUAL):
        runs = _runs(pair.model, "image", features, length, setting.repeats)
        costs = {
            cost.method: cost for cost in _costs(runs, length, features, _memory_bytes(pair.model, "image", features))
        }
        for way, beside in BESIDE.items():
            yield compare(
                f"cache, {length} tokens, {beside}",
                "ms a token",
                partial(_milliseconds, tokens=length),
                runs["cached"],
                runs[way],
                costs[way].same,
                _told(costs["cached"], costs[way], setting),
            )


def decoding_costs(
    model: Model, source: str, features: Features, lengths: Sequence[int], repeats: int = 5
) -> list[DecodingCost]:
    """The costs of a token in each of the three ways, for texts of each of `lengths` tokens, over the features of one
    input of a source (`features_of`). `repeats`: counted runs of each. For inference: the model in eval mode.

    Raises MmxError for lengths the decoder cannot read, for several inputs, and for a model whose reader does the
    looking.
    """
    _check(model, features, lengths)
    memory_bytes, costs = _memory_bytes(model, source, features), []
    for length in lengths:
        costs += _costs(_runs(model, source, features, length, repeats), length, features, memory_bytes)
    return costs


def features_of(model: Model, source: str, inputs: Mapping[str, Tensor]) -> Features:
    """What a source's encoder makes of collated inputs, in the type that its projection reads: [B, S, F]."""
    projection = _source(model, source).projection
    with torch.no_grad():
        features = encode(model.encoder(source), source, inputs, projection.key.weight.device)
        return features._replace(states=features.states.to(projection.key.weight.dtype))


def _check(model: Model, features: Features, lengths: Sequence[int]) -> None:
    most = model.config.decoder.max_position_embeddings
    if not lengths or not all(1 <= length <= most for length in lengths):
        raise MmxError(f"lengths {list(lengths)} cannot be measured; give numbers of tokens from 1 to {most}.")
    if len(features.states) != 1:
        raise MmxError(f"the features are of {len(features.states)} inputs; give those of one.")
    if model.question_encoder is not None:
        raise MmxError("the model's reader looks at the source, not its decoder; give a model without a reader.")


def _runs(model: Model, source: str, features: Features, length: int, repeats: int) -> dict[str, TimedRuns]:
    """The three ways in turn; `first` is the text and the bytes of the self-attention cache in the end."""
    decoder, project = model.decoder, partial(_memory, model, source, features)
    memory = project()
    steps: dict[str, Callable[[], DecodeStep]] = {
        "cached": lambda: CachedDecodeStep(decoder, memory, length - 1, fast=False),
        "uncached": lambda: UncachedDecodeStep(decoder, memory),
        "anew": lambda: RecomputingDecodeStep(decoder, project, 1, length - 1),
    }
    begin, device = model.tokenizer.special_tokens[BOS][0], model.device
    contenders = {way: partial(_said, step, begin, length, device) for way, step in steps.items()}
    return alternate(contenders, repeats, str(device))


def _memory(model: Model, source: str, features: Features) -> Memory:
    """The projection of the features, in the decoder's type."""
    with torch.inference_mode():
        return _source(model, source).projection(features).to(dtype=model.decoder.embedding.weight.dtype)


def _memory_bytes(model: Model, source: str, features: Features) -> int:
    return _memory(model, source, features).nbytes


def _said(new_step: Callable[[], DecodeStep], begin: int, length: int, device: torch.device) -> tuple[list[int], int]:
    """The greedy text of `length` tokens (an end is a token like others), and the bytes of the cache it left."""
    with torch.inference_mode():
        step = new_step()
        prompt = torch.full((1, 1, 1), begin, device=device)
        said = [step.prefill(prompt, torch.ones_like(prompt, dtype=torch.bool)).argmax(-1)]
        while len(said) < length:
            said.append(step(said[-1]).argmax(-1))
        held = getattr(step, "cache", None)
        return torch.cat(said).tolist(), 0 if held is None else held.nbytes


def _costs(runs: Mapping[str, TimedRuns], length: int, features: Features, memory_bytes: int) -> list[DecodingCost]:
    text, cache_bytes = runs["cached"].first
    position_bytes = cache_bytes // length  # `length` positions are read: the begin and all tokens but the last
    held = {
        "cached": cache_bytes + memory_bytes,
        "uncached": memory_bytes,
        "anew": runs["anew"].first[1] + features.states.nbytes,
    }
    # Without a cache token n costs n positions: (length + 1) / 2 on the average.
    recomputed = {
        "cached": position_bytes,
        "uncached": position_bytes * (length + 1) // 2,
        "anew": position_bytes + memory_bytes,
    }
    return [
        DecodingCost(way, length, _median(runs[way], length), held[way], recomputed[way], runs[way].first[0] == text)
        for way in METHODS
    ]


def _median(runs: TimedRuns, tokens: int) -> float:
    return Spread.of([_milliseconds(seconds, tokens) for seconds in runs.seconds]).median


def _milliseconds(seconds: float, tokens: int) -> float:
    return 1000 * seconds / tokens


def _source(model: Model, source: str) -> Any:
    model.encoder(source)  # or a sentence that names the sources
    found = model.sources[source]
    assert isinstance(found, Source)
    return found


def _told(ours: DecodingCost, other: DecodingCost, setting: BenchSetting) -> str:
    """The bytes beside the times."""
    dtype = "" if setting.dtype == "float32" else f"; the decoder in {setting.dtype}, tokens may differ"
    held = f"held {ours.held / 1e6:.3f} MB, other way {other.held / 1e6:.3f} MB"
    made = f"{ours.recomputed / 1e6:.3f} MB, other way {other.recomputed / 1e6:.3f} MB"
    return f"no transformers here, ours in both columns; {held}; keys and values computed a token {made}{dtype}"
