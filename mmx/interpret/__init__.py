"""Interpretability: attention maps, relevance, information gain, gradient flow and leakage. Plots are in `plots`."""

from mmx.interpret.attention_maps import attention_for_tokens, attention_maps, value_weighted_attention
from mmx.interpret.attention_stats import entropy, normalized_entropy
from mmx.interpret.gradient_flow import gradient_flow
from mmx.interpret.information import information_gain
from mmx.interpret.leakage import leakage
from mmx.interpret.look import Look
from mmx.interpret.recorder import QueryRecorder
from mmx.interpret.relevance import relevance
from mmx.interpret.text_batch import TextBatch

__all__ = [
    "Look",
    "QueryRecorder",
    "TextBatch",
    "attention_for_tokens",
    "attention_maps",
    "entropy",
    "gradient_flow",
    "information_gain",
    "leakage",
    "normalized_entropy",
    "relevance",
    "value_weighted_attention",
]
