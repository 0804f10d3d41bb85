"""Looking inside: what was looked at, how surely, what it was worth, and what moved what. Plots stand beside it."""

from mmx.inspection.attention import attention_maps, looked, weighted
from mmx.inspection.flow import gradient_flow
from mmx.inspection.information import information_gain
from mmx.inspection.leakage import leakage
from mmx.inspection.look import Look
from mmx.inspection.recorder import Recorder
from mmx.inspection.relevance import relevance
from mmx.inspection.spotlight import entropy, relative_entropy

__all__ = [
    "Look",
    "Recorder",
    "attention_maps",
    "entropy",
    "gradient_flow",
    "information_gain",
    "leakage",
    "looked",
    "relative_entropy",
    "relevance",
    "weighted",
]
