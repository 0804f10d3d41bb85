"""Relevance: attention weighted by what it was good for. A spotlight may fall on what the word did not need.

Alphabet: B memories, K streams, T text positions, W words, L looking layers, H heads, S slots, D head width,
V vocabulary. Masks: True = may be attended.

Source: Chefer et al. 2021, "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
Transformers", section 3.1, equation 5: A * dy/dA, here with y = log p(word), summed over the text positions.

The weights A are never made. A layer reads O = A V, hence dy/dA = dy/dO V^T and dy/dV = A^T dy/dO, and for every slot s

    sum over t of A[t, s] * dy/dA[t, s]  =  sum over d of V[s, d] * dy/dV[s, d],

so the gradient with respect to the memory's values is all that is needed, whatever kernel the decoder uses.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mmx.errors import MmxError
from mmx.memory import Memory
from mmx.models.decoder import TextDecoder
from mmx.nn.relative_position import Recorder


def relevance(
    decoder: TextDecoder,
    memory: Memory,
    tokens: Tensor,
    targets: Tensor,
    word_ids: Tensor | None = None,
    mask: Tensor | None = None,
    visibility: Tensor | None = None,
    recorder: Recorder | None = None,
) -> Tensor:
    """How much each slot spoke for (positive) or against each word, by layer and head: [B, K, W, L, H, S], in nats.

    tokens: int [B, K, T]; targets: int [B, K, T], the token that follows each position, negative where none is asked
    about; words: int [B, K, T], the number of the word that each target is a piece of, negative for none (default:
    each target is a word, in order); mask, visibility and recorder as for the decoder, which should be in eval mode.
    W is the largest number + 1; a word that a stream lacks gets zeros, as does a slot that may not be attended.

    One pass forward and, for each word of each stream, one backward over all B at once. No parameter gets a gradient.
    Raises MmxError where targets or words do not fit the tokens.
    """
    for name, given in (("targets", targets), ("words", word_ids)):
        if given is not None and given.shape != tokens.shape:
            raise MmxError(f"{name} are {list(given.shape)}; expected [B, K, T] = {list(tokens.shape)}, as the tokens.")
    # What `encode` gives was made in inference mode; autograd keeps only copies made outside of it.
    with torch.inference_mode(False), torch.enable_grad():
        word_ids = _one_each(targets) if word_ids is None else word_ids.masked_fill(targets < 0, -1)
        held = _with_values_to_derive_by(memory, len(decoder.config.cross_attention_layers))
        states = decoder.hidden_states(tokens.clone(), held, mask, recorder=recorder, visibility=visibility)
        asked = word_ids >= 0
        logprobs = _logprobs(decoder.logits(states[asked]), targets[asked])
        return _by_word(held.values, logprobs, word_ids, asked)


def relevance_maps(parts: Tensor) -> Tensor:
    """One map for each word, [..., L, H, S] -> [..., S], not negative: in every layer the heads are summed and what
    then speaks for the word is kept; the layers are summed."""
    return parts.sum(-2).clamp(min=0).sum(-2)


def _one_each(targets: Tensor) -> Tensor:
    """int [B, K, T]: 0, 1, 2, ... at the targets of each stream, -1 elsewhere."""
    exists = targets >= 0
    return (exists.long().cumsum(-1) - 1).masked_fill(~exists, -1)


def _with_values_to_derive_by(memory: Memory, layers: int) -> Memory:
    """A memory of copies in which each of `layers` looking layers has values of its own, also where it shares them."""
    values = memory.values.detach().expand(layers, -1, -1, -1, -1).clone().requires_grad_()
    keys = memory.keys.detach().clone().expand(layers, -1, -1, -1, -1)
    shown = None if memory.stream_mask is None else memory.stream_mask.clone()
    return replace(memory, keys=keys, values=values, mask=memory.mask.clone(), stream_mask=shown)


def _logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log p of targets [n] under logits [n, V], in float32 at least."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    return logits.log_softmax(-1, dtype=precise).gather(-1, targets.clone()[:, None])[:, 0]


def _by_word(values: Tensor, logprobs: Tensor, words: Tensor, asked: Tensor) -> Tensor:
    """[B, K, W, L, H, S]; logprobs [n] are those of the places where `asked` [B, K, T] is True, in order."""
    streams, numbers = asked.nonzero()[:, 1], words[asked]
    count = int(numbers.max()) + 1 if len(numbers) else 0
    layers, batch, heads, slots, _ = values.shape
    parts = values.new_zeros(batch, asked.shape[1], count, layers, heads, slots)
    for stream in range(asked.shape[1]):
        for number in range(count):
            chosen = (streams == stream) & (numbers == number)
            if chosen.any():
                parts[:, stream, number] = _part(values, logprobs[chosen].sum())
    return parts


def _part(values: Tensor, score: Tensor) -> Tensor:
    """Values times the gradient of a score by them, summed over D: [B, L, H, S]."""
    if not values.numel():  # there was nothing to see, and no layer read it
        return values.new_zeros(values.shape[:-1]).transpose(0, 1)
    (gradient,) = torch.autograd.grad(score, values, retain_graph=True)
    return (gradient * values.detach()).sum(-1).transpose(0, 1)
