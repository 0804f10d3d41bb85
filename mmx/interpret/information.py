"""Surprisal and information gain in bits, by token and by word.

Axes: B memories, K streams, T text positions, W words, V vocabulary.

Source: Cover & Thomas 2006, "Elements of Information Theory", section 2.3. The mean of log2 p(text | memory) -
log2 p(text) over texts and memories is their mutual information if p is the true distribution. With the
probabilities of a model it is an estimate that can be too high or too low.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmx.interpret.text_batch import TextBatch
from mmx.memory import Memory
from mmx.models.decoder import TextDecoder
from mmx.nn.cross_attention import Recorder
from mmx.text.tokenizer import Tokenizer


def surprisal(decoder: TextDecoder, memory: Memory, text: TextBatch, recorder: Recorder | None = None) -> Tensor:
    """-log2 p(target | memory, preceding tokens) in bits, [B, K, T]; 0 where the target is negative.

    `recorder` is passed to the decoder. Raises MmxError for a memory of another model.
    """
    measured = text.targets >= 0
    states = decoder.hidden_states(text.tokens, memory, text.mask, recorder=recorder, visibility=text.visibility)
    logits = decoder.logits(states[measured]).float()  # [n, V]; logits of all B*K*T positions can exceed the memory
    bits = F.cross_entropy(logits, text.targets[measured], reduction="none") / math.log(2)
    return bits.new_zeros(text.targets.shape).masked_scatter(measured, bits)


def information_gain(decoder: TextDecoder, memory: Memory, text: TextBatch, baseline: Memory | None = None) -> Tensor:
    """log2 p(target | memory, preceding tokens) - log2 p(target | baseline, preceding tokens) in bits, [B, K, T].

    Negative where the memory makes the target less likely; 0 where the target is negative.

    Args:
        decoder: a TextDecoder.
        memory: the memory with the source in question.
        text: the texts and their targets.
        baseline: the memory without that source. The default is an empty memory. For a model whose questions are read
            by a text source or by the question encoder, pass `pipeline.with_questions` of `model.encode({}, B)`.

    Raises:
        MmxError: a memory of another model.
    """
    without = decoder.empty_memory(memory.batch_size) if baseline is None else baseline
    return surprisal(decoder, without, text) - surprisal(decoder, memory, text)


def word_ids(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    """The index of the word that each of T tokens belongs to, from 0: [0, 0, 1, ...].

    Words are those of `Tokenizer.words`. The end token is a word of its own. A token that decodes to no visible text
    (part of a character, a trailing space) belongs to the preceding word.
    """
    known: dict[int, int] = {}
    for word, (_, positions) in enumerate(tokenizer.words(tokens)):
        known |= dict.fromkeys(positions, word)
    ids: list[int] = []
    for position, token in enumerate(tokens):
        previous = ids[-1] if ids else 0
        if token == tokenizer.eos_token_id:
            ids.append(previous + bool(ids))
        else:
            ids.append(known.get(position, previous))
    return ids


def word_bits(bits: Tensor, word_ids: Sequence[int]) -> Tensor:
    """Sum bits of T tokens over the tokens of each word, [..., T] -> [..., W]; see the function `word_ids`."""
    index = torch.tensor(word_ids, dtype=torch.long, device=bits.device)
    words = bits.new_zeros(*bits.shape[:-1], max(word_ids, default=-1) + 1)
    return words.index_add(-1, index, bits)
