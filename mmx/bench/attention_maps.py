"""What it costs to look at where the words came from, beside saying them alone: both columns are ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from mmx.bench.decoding import TOKENS, timed_generation
from mmx.bench.hf_references import BenchSetting, ModelPair, build_pair
from mmx.bench.timing import BenchResult, alternate, compare
from mmx.config.schema import GenerationConfig
from mmx.interpret.look import Look, MapMethod
from mmx.interpret.teacher_forced import TargetText, look_at_text, source_views
from mmx.memory import Memory

METHODS: tuple[MapMethod, ...] = ("attention", "weighted", "relevance")


def attention_maps(setting: BenchSetting) -> Iterator[BenchResult]:
    """ViT-GPT2, twenty tokens said one by one, the picture encoded before; and the same with every word's maps."""
    pair = build_pair("vit-gpt2", setting).for_inference()
    memory, options = pair.encode(pair.pixels(1)), GenerationConfig(max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    contenders: dict[str, Callable[[], Any]] = {"alone": lambda: timed_generation(pair, memory, options)[0]}
    for by in METHODS:
        contenders[by] = partial(_with_maps, pair, memory, options, by)
    runs = alternate(contenders, setting.repeats, setting.device)
    text = pair.model.tokenizer.decode(runs["alone"].first[0])
    for by in METHODS:
        same = runs[by].first.text == text
        yield compare(
            f"looking ({by}), beside not", "ms a token", lambda s: 1000 * s / TOKENS, runs["alone"], runs[by], same,
            "the first column says the text alone, the second looks as well: the ratio is what looking costs",
        )  # fmt: skip


def _with_maps(pair: ModelPair, memory: Memory, options: GenerationConfig, method: MapMethod) -> Look:
    said = timed_generation(pair, memory, options)[0][0]
    views = source_views(pair.model, memory, {})
    return look_at_text(pair.model, memory, TargetText([pair.begin], said), views, method)
