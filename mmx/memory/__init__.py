"""Memory: keys, values and mask of everything that was encoded.

memory       Memory and cat
validation   Segment, and the checks that the parts of a memory fit together
"""

from mmx.memory.memory import Memory, cat
from mmx.memory.validation import Segment

__all__ = ["Memory", "Segment", "cat"]
