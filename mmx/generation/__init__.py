"""Decoding: a step gives scores, rules change them, a chooser picks, stopping ends. Knows steps, not models."""

from mmx.generation.decode_step import DecoderStep, DecodeStep
from mmx.generation.generate import GenerationOutput, generate, stream
from mmx.generation.ranking import score_texts

__all__ = ["DecoderStep", "GenerationOutput", "DecodeStep", "generate", "score_texts", "stream"]
