"""mmx: any encoder, one decoder. Keys and values meet in a Memory; captions and answers come out.

    import mmx
    model = mmx.load()
    memory = model.encode(image="dog.jpg")
    model.ask(memory, ["what animal is this?", "what is it doing?"])

The names below are resolved when they are first used: `import mmx` imports no torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_ADDRESSES = {
    "load": "mmx.inference.pipeline",
    "Pipeline": "mmx.inference.pipeline",
    "Model": "mmx.models.model",
    "Memory": "mmx.memory",
    "cat": "mmx.memory",
    "Encoder": "mmx.encoders.base",
    "Features": "mmx.nn.features",
    "MmxError": "mmx.errors",
    "load_image": "mmx.io.images",
    "load_audio": "mmx.io.audio",
    "train": "mmx.training.loop",
    "evaluate": "mmx.evaluation.evaluate",
}

__all__ = ["__version__", *_ADDRESSES]


def __getattr__(name: str) -> Any:
    if name not in _ADDRESSES:
        raise AttributeError(f"mmx has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_ADDRESSES[name]), name)


def __dir__() -> list[str]:
    return __all__
