"""Looking inside: what was looked at, how surely, what it was worth, and what moved what. Plots stand beside it."""

from mmx.interpret.attention_maps import attention_for_tokens, attention_maps, value_weighted_attention
from mmx.interpret.attention_stats import entropy, relative_entropy
from mmx.interpret.gradient_flow import gradient_flow
from mmx.interpret.information import information_gain
from mmx.interpret.leakage import leakage
from mmx.interpret.look import Look
from mmx.interpret.recorder import QueryRecorder
from mmx.interpret.relevance import relevance

__all__ = [
    "Look",
    "QueryRecorder",
    "attention_maps",
    "entropy",
    "gradient_flow",
    "information_gain",
    "leakage",
    "attention_for_tokens",
    "relative_entropy",
    "relevance",
    "value_weighted_attention",
]
