"""Relevance: attention weighted by its gradient.

Axes: B memories, K streams, T text positions, W words, L cross-attention layers, H heads, S slots, D head dimension,
V vocabulary. Masks: True = may be attended.

Source: Chefer et al. 2021, "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
Transformers", section 3.1, equation 5: A * dy/dA, here with y = log p(word), summed over the text positions.

The attention weights A are never computed. A layer computes O = A V, hence dy/dA = dy/dO V^T and dy/dV = A^T dy/dO.
For every slot s

    sum over t of A[t, s] * dy/dA[t, s]  =  sum over d of V[s, d] * dy/dV[s, d],

so the gradient with respect to the values of the memory is sufficient, for every attention kernel.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mmx.interpret.text_batch import TextBatch, check_same_shape
from mmx.memory import Memory
from mmx.models.decoder import TextDecoder
from mmx.nn.cross_attention import Recorder


def relevance(
    decoder: TextDecoder,
    memory: Memory,
    text: TextBatch,
    word_ids: Tensor | None = None,
    recorder: Recorder | None = None,
) -> Tensor:
    """Relevance of each slot for each word, by layer and head: [B, K, W, L, H, S], in nats.

    Positive values raise the log-probability of the word, negative values lower it. One forward pass, and one
    backward pass for each word of each stream, over all B rows at once. No parameter receives a gradient.

    Args:
        decoder: a TextDecoder in eval mode.
        memory: the memory of B rows.
        text: the texts and their targets.
        word_ids: int [B, K, T], the word that each target belongs to, negative for none. By default each target is a
            word. W is the largest index + 1. Words that a stream lacks get zeros, and so do masked slots.
        recorder: passed to the decoder.

    Raises:
        MmxError: word_ids do not have the shape of the tokens.
    """
    if word_ids is not None:
        check_same_shape("word_ids", word_ids, text.tokens)
    # Tensors made in inference mode cannot take part in autograd; copies made outside of it can.
    with torch.inference_mode(False), torch.enable_grad():
        if word_ids is None:
            word_ids = _one_word_per_target(text.targets)
        else:
            word_ids = word_ids.masked_fill(text.targets < 0, -1)
        copy = _with_differentiable_values(memory, len(decoder.config.cross_attention_layers))
        states = decoder.hidden_states(
            text.tokens.clone(), copy, text.mask, recorder=recorder, visibility=text.visibility
        )
        measured = word_ids >= 0
        logprobs = _logprobs(decoder.logits(states[measured]), text.targets[measured])
        return _relevance_by_word(copy.values, logprobs, word_ids)


def relevance_maps(relevance: Tensor) -> Tensor:
    """One non-negative map for each word, [..., L, H, S] -> [..., S].

    Heads are summed within each layer, negative sums are set to zero, and the layers are summed.
    """
    return relevance.sum(-2).clamp(min=0).sum(-2)


def _one_word_per_target(targets: Tensor) -> Tensor:
    """int [B, K, T]: 0, 1, 2, ... at the targets of each stream, -1 elsewhere."""
    exists = targets >= 0
    return (exists.long().cumsum(-1) - 1).masked_fill(~exists, -1)


def _with_differentiable_values(memory: Memory, layers: int) -> Memory:
    """A copy of the memory whose values require a gradient, with one set of values per layer also where L is 1."""
    values = memory.values.detach().expand(layers, -1, -1, -1, -1).clone().requires_grad_()
    keys = memory.keys.detach().clone().expand(layers, -1, -1, -1, -1)
    stream_mask = None if memory.stream_mask is None else memory.stream_mask.clone()
    return replace(memory, keys=keys, values=values, mask=memory.mask.clone(), stream_mask=stream_mask)


def _logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log p of targets [n] under logits [n, V], in float32 or higher precision."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.log_softmax(-1, dtype=dtype).gather(-1, targets.clone()[:, None])[:, 0]


def _relevance_by_word(values: Tensor, logprobs: Tensor, word_ids: Tensor) -> Tensor:
    """[B, K, W, L, H, S]; logprobs [n] belong to the n positions with a non-negative word id, in order."""
    measured = word_ids >= 0
    stream_of = measured.nonzero()[:, 1]
    word_of = word_ids[measured]
    count = int(word_of.max()) + 1 if len(word_of) else 0
    layers, batch, heads, slots, _ = values.shape
    streams = word_ids.shape[1]
    result = values.new_zeros(batch, streams, count, layers, heads, slots)
    for stream in range(streams):
        for word in range(count):
            chosen = (stream_of == stream) & (word_of == word)
            if chosen.any():
                result[:, stream, word] = _values_times_gradient(values, logprobs[chosen].sum())
    return result


def _values_times_gradient(values: Tensor, score: Tensor) -> Tensor:
    """Values [L, B, H, S, D] times the gradient of a score with respect to them, summed over D: [B, L, H, S]."""
    if not values.numel():  # without slots no layer used the values, so autograd has no gradient for them
        return values.new_zeros(values.shape[:-1]).transpose(0, 1)
    (gradient,) = torch.autograd.grad(score, values, retain_graph=True)
    return (gradient * values.detach()).sum(-1).transpose(0, 1)
