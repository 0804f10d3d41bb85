"""Looking inside: what was asked of the memory, and what the spotlight fell on. Numbers; plots stand beside them."""

from mmx.inspection.attention import attention_maps, entropy
from mmx.inspection.recorder import Recorder

__all__ = ["Recorder", "attention_maps", "entropy"]
