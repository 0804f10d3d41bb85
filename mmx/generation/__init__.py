"""Decoding: a step gives scores, rules change them, a chooser picks, stopping ends. Knows steps, not models."""

from mmx.generation.decode_step import DecoderStep, Step
from mmx.generation.generate import Generated, generate, stream
from mmx.generation.ranking import rank_texts

__all__ = ["DecoderStep", "Generated", "Step", "generate", "rank_texts", "stream"]
