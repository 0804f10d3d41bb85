"""Conversion of published cross-attending models to our configuration and weights, one module per family.

All families use the same decoder: every difference between them is a field of its configuration.
"""

from mmx.hub.load import FAMILIES, load_hf_model

__all__ = ["FAMILIES", "load_hf_model"]
