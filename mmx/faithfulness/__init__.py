"""Is the map true? Measured on generated scenes, whose boxes are known: where it points, and what hiding that costs."""

from mmx.faithfulness.hiding import HidingReport, hiding
from mmx.faithfulness.pointing import PointingReport, Way, pointing

__all__ = ["HidingReport", "PointingReport", "Way", "hiding", "pointing"]
