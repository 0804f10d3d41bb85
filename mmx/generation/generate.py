"""Text generation from prompts: greedy, sampled, or by beam search.

Axes: B memories, K prompts of each, n texts of each prompt, N streams, t generated tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mmx.config.schema import GenerationConfig
from mmx.generation.beam_search import beam_search
from mmx.generation.decode_step import DecodeStep, PromptBatch
from mmx.generation.logits_processors import LogitsProcessor, StoppingCriterion, build_logits_processors
from mmx.generation.outputs import GenerationOutput
from mmx.generation.sampling import Sampler


def generate(
    step: DecodeStep,
    prompts: PromptBatch,
    options: GenerationConfig,
    eos: int,
    logits_processors: Sequence[LogitsProcessor] = (),
    stopping_criteria: Sequence[StoppingCriterion] = (),
) -> list[list[list[GenerationOutput]]]:
    """Continue the prompts; return the texts as [B][K][n], best score first.

    Args:
        step: decoding step, such as `CachedDecodeStep`.
        prompts: prompts [B, K, T].
        options: generation options.
        eos: end-of-sequence token.
        logits_processors: applied before those of sampling, called as transformers' LogitsProcessor.
        stopping_criteria: called as transformers' StoppingCriteria; a text ends as soon as one of them is true.
    """
    processors = build_logits_processors(options, eos, logits_processors)
    if options.num_beams > 1:
        outputs = beam_search(step, prompts, options, eos, processors, stopping_criteria)
    else:
        sampler = Sampler(step, prompts, options, eos, processors, stopping_criteria)
        for _ in sampler:
            pass
        outputs = sampler.outputs()
    batch, streams, _ = prompts.tokens.shape
    return [outputs[row * streams : (row + 1) * streams] for row in range(batch)]


def stream(
    step: DecodeStep,
    prompts: PromptBatch,
    options: GenerationConfig,
    eos: int,
    logits_processors: Sequence[LogitsProcessor] = (),
    stopping_criteria: Sequence[StoppingCriterion] = (),
) -> Iterator[list[int]]:
    """Yield one token of each of the N streams at a time, `eos` for those that have ended; the arguments of `generate`.

    Beam search cannot be streamed: `options.num_beams` is ignored.
    """
    processors = build_logits_processors(options, eos, logits_processors)
    yield from Sampler(step, prompts, options, eos, processors, stopping_criteria)
