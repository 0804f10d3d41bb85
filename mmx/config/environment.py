"""Environment variables that give defaults. Explicit options win; an empty variable counts as not set."""

from __future__ import annotations

import os
from pathlib import Path

MODEL_VARIABLE = "MMX_MODEL"  # default of --model
DEVICE_VARIABLE = "MMX_DEVICE"  # default of --device
CACHE_VARIABLE = "MMX_CACHE"


def cache_folder() -> Path | None:
    """Return the folder in which downloads are kept, `MMX_CACHE`; None: the default of huggingface_hub."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given).expanduser() if given else None
