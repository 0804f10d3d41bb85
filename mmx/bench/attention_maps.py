"""Cost of attention maps: decoding with maps compared with decoding alone, both with mmx."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from mmx.bench.decoding import NUM_TOKENS, decode, ms_per_token
from mmx.bench.hf_references import BenchSetting, ModelPair, build_pair
from mmx.bench.timing import BenchResult, alternate, compare
from mmx.config.schema import GenerationConfig
from mmx.interpret.look import MapMethod
from mmx.interpret.teacher_forced import TargetText, look_at_text, source_views
from mmx.memory import Memory

METHODS: tuple[MapMethod, ...] = ("attention", "weighted", "relevance")


def attention_maps(setting: BenchSetting) -> Iterator[BenchResult]:
    """ViT-GPT2, greedy, twenty tokens of an encoded image; the same with the maps of every word."""
    pair = build_pair("vit-gpt2", setting).for_inference()
    memory = pair.encode(pair.pixels(1))
    options = GenerationConfig(max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS)
    functions: dict[str, Callable[[], str]] = {"decoding": partial(_decode_text, pair, memory, options)}
    for method in METHODS:
        functions[method] = partial(_decode_with_maps, pair, memory, options, method)
    runs = alternate(functions, setting.repeats, setting.device)
    note = "column mmx: decoding alone; column reference: decoding with maps; their ratio is the cost of maps"
    for method in METHODS:
        quantity = ms_per_token(f"attention maps ({method})")
        yield compare(quantity, runs["decoding"], runs[method], runs[method].output == runs["decoding"].output, note)


def _decode_text(pair: ModelPair, memory: Memory, options: GenerationConfig) -> str:
    return pair.model.tokenizer.decode(decode(pair, memory, options).texts[0])


def _decode_with_maps(pair: ModelPair, memory: Memory, options: GenerationConfig, method: MapMethod) -> str:
    generated = decode(pair, memory, options).texts[0]
    target = TargetText([pair.bos], generated)
    return look_at_text(pair.model, memory, target, source_views(pair.model, memory, {}), method).text
