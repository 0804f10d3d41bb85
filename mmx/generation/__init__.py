"""Decoding: a step gives scores, rules change them, a chooser picks, stopping ends. Knows steps, not models."""

from mmx.generation.generate import Generated, generate, stream
from mmx.generation.rank import rank_texts
from mmx.generation.step import DecoderStep, Step

__all__ = ["DecoderStep", "Generated", "Step", "generate", "rank_texts", "stream"]
