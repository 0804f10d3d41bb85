"""Information: how many bits of a text are saved by looking, token by token and word by word.

Alphabet: B memories, K streams, T text positions, W words. Masks: True = may be attended.

Source: Cover & Thomas 2006, "Elements of Information Theory", section 2.3: the mean over texts and memories of
log2 p(text | memory) - log2 p(text) is their mutual information, where p is the truth. Where p is a model it is an
estimate that may err to either side: each of the two has the model's own distance from the truth in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmx.memory import Memory
from mmx.models.decoder import TextDecoder
from mmx.nn.relative_position import Recorder
from mmx.text.tokenizer import Tokenizer


def surprisal(
    decoder: TextDecoder,
    memory: Memory,
    tokens: Tensor,
    mask: Tensor | None,
    targets: Tensor,
    recorder: Recorder | None = None,
) -> Tensor:
    """-log2 p(target | memory, text so far) in bits, [B, K, T]; 0 where the target is negative: nothing is wanted.

    tokens: int [B, K, T], prompt and text; mask: bool [B, K, T], False where a token is padding; targets: int
    [B, K, T], the token that follows each position; recorder: as for the decoder.
    Raises MmxError for a memory of another model.
    """
    wanted = targets >= 0
    states = decoder.hidden_states(tokens, memory, mask, recorder=recorder)
    logits = decoder.logits(states[wanted]).float()  # [n, V]: B*K*T of them would fill the memory
    nats = torch.nn.functional.cross_entropy(logits, targets[wanted], reduction="none")
    return torch.zeros(targets.shape, dtype=nats.dtype, device=nats.device).masked_scatter(wanted, nats / math.log(2))


def information_gain(
    decoder: TextDecoder, memory: Memory, tokens: Tensor, mask: Tensor, targets: Tensor, blind: Memory | None = None
) -> Tensor:
    """Bits of each target saved by looking, log2 p(target | memory, text so far) - log2 p(target | nothing, text so
    far), [B, K, T]; below 0 where looking misled, 0 where nothing is wanted.

    The arguments as in `surprise`. blind: what is left to look at without the source in question, for a model whose
    questions are read by a text source or a reader (`pipeline.with_questions` over `model.encode({}, B)`); None is
    nothing at all. Raises MmxError for a memory of another model.
    """
    nothing = decoder.empty_memory(memory.batch_size) if blind is None else blind
    without, looking = (surprisal(decoder, seen, tokens, mask, targets) for seen in (nothing, memory))
    return without - looking


def word_ids(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    """The word that each of T tokens belongs to, counted from 0: [0, 0, 1, ...].

    Words are those of `Tokenizer.words`. The end is a word of its own, for to stop has its price too; any other token
    that shows nothing (half a letter, a space at the end) goes with the word before it.
    """
    found = {place: word for word, (_, of) in enumerate(tokenizer.words(tokens)) for place in of}
    places: list[int] = []
    for place, token in enumerate(tokens):
        before = places[-1] if places else 0
        places.append(before + bool(places) if token == tokenizer.eos else found.get(place, before))
    return places


def word_bits(bits: Tensor, places: Sequence[int]) -> Tensor:
    """Bits of T tokens, [..., T], to bits of W words, [..., W]: the pieces of a word are summed, so nothing is lost.

    places: the word of each token, as `word_places` gives them.
    """
    index = torch.tensor(places, dtype=torch.long, device=bits.device)
    words = bits.new_zeros(*bits.shape[:-1], max(places, default=-1) + 1)
    return words.index_add(-1, index, bits)
