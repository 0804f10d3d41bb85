"""What words to avoid and to include cost: beam search of the bundled model with and without them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np

from mmx.bench.hf_references import BenchSetting
from mmx.bench.timing import BenchResult, Quantity, alternate, compare
from mmx.inference.pipeline import load

NUM_IMAGES = 8
NUM_TOKENS = 16
NUM_BEAMS = 4
LENGTH = {"num_beams": NUM_BEAMS, "max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS}
AVOID = {"avoid": ["appears", "seems"]}
INCLUDE = {"include": ["cat", "orange|white"]}
VARIANTS: dict[str, dict[str, list[str]]] = {"none": {}, "avoid": AVOID, "include": INCLUDE, "both": AVOID | INCLUDE}


def constraints(setting: BenchSetting) -> Iterator[BenchResult]:
    """The bundled model: one batch under beams; the reference is the same without words."""
    pipeline = load(None, setting.device, setting.dtype)
    memory = pipeline.encode(image=[np.full((64, 64, 3), 30 * index, np.uint8) for index in range(NUM_IMAGES)])

    def run(words: Mapping[str, list[str]]) -> list[str]:
        config = pipeline.generation_config({**LENGTH, **words})
        rows = pipeline.generate_batch(memory, [[None]] * NUM_IMAGES, config)
        return [row[0][0].text for row in rows]

    functions = {name: partial(run, words) for name, words in VARIANTS.items()}
    runs = alternate(functions, setting.repeats, setting.device)
    note = f"{NUM_IMAGES} images, {NUM_BEAMS} beams, {NUM_TOKENS} tokens; the reference is mmx without words"
    for name in ("avoid", "include", "both"):
        quantity = Quantity(f"constraints, {name}", "ms", lambda seconds: 1000 * seconds)
        yield compare(quantity, runs[name], runs["none"], note=note)
