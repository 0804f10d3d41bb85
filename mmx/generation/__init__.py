"""Text generation: a decoding step returns logits, logits processors change them, a search or sampler picks tokens.

Generation uses the interface `DecodeStep`, not a model.
"""

from mmx.generation.decode_step import CachedDecodeStep, DecodeStep, PromptBatch
from mmx.generation.generate import generate, stream
from mmx.generation.outputs import GenerationOutput
from mmx.generation.ranking import score_texts

__all__ = ["CachedDecodeStep", "DecodeStep", "GenerationOutput", "PromptBatch", "generate", "score_texts", "stream"]
