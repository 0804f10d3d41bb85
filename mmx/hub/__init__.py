"""Importers: a public family of cross-attending models -> our configuration and weights. One file each.

The decoder of every family is the one decoder; a fact that two of them do not share is a field of its configuration.
"""

from mmx.hub.load import FAMILIES, load_hf_model

__all__ = ["FAMILIES", "load_hf_model"]
