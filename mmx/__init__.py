"""mmx: multimodal prompting. Encoders expose keys and values; one text decoder cross-attends to any of them.

    import mmx

    model = mmx.load()
    memory = model.encode(image="dog.jpg")
    model.ask(memory, ["what animal is this?", "what is it doing?"])

The names below are imported when they are first used: `import mmx` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmx.encoders.base import Encoder as Encoder
    from mmx.errors import MmxError as MmxError
    from mmx.evaluation.evaluate import EvaluationOptions as EvaluationOptions
    from mmx.evaluation.evaluate import evaluate as evaluate
    from mmx.inference.options import DecodingOptions as DecodingOptions
    from mmx.inference.options import GenerationOptions as GenerationOptions
    from mmx.inference.outputs import GeneratedText as GeneratedText
    from mmx.inference.outputs import Question as Question
    from mmx.inference.outputs import RankedAnswer as RankedAnswer
    from mmx.inference.pipeline import Pipeline as Pipeline
    from mmx.inference.pipeline import load as load
    from mmx.interpret.look import Look as Look
    from mmx.io.audio import load_audio as load_audio
    from mmx.io.images import load_image as load_image
    from mmx.memory import Memory as Memory
    from mmx.memory import cat as cat
    from mmx.models.model import Model as Model
    from mmx.nn.features import Features as Features
    from mmx.training.loop import train as train

__version__ = "0.2.0"

_MODULES = {
    "load": "mmx.inference.pipeline",
    "Pipeline": "mmx.inference.pipeline",
    "GeneratedText": "mmx.inference.outputs",
    "Question": "mmx.inference.outputs",
    "RankedAnswer": "mmx.inference.outputs",
    "DecodingOptions": "mmx.inference.options",
    "GenerationOptions": "mmx.inference.options",
    "Look": "mmx.interpret.look",
    "Memory": "mmx.memory",
    "cat": "mmx.memory",
    "Model": "mmx.models.model",
    "Encoder": "mmx.encoders.base",
    "Features": "mmx.nn.features",
    "MmxError": "mmx.errors",
    "load_image": "mmx.io.images",
    "load_audio": "mmx.io.audio",
    "train": "mmx.training.loop",
    "evaluate": "mmx.evaluation.evaluate",
    "EvaluationOptions": "mmx.evaluation.evaluate",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'mmx' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
