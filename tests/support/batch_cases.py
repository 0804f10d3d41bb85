"""A fast text generator for tests of batch inference: its text about a file is its content; calls are counted."""

import io
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from mmx.config.loader import parse_config
from mmx.config.schema import GenerationConfig
from mmx.errors import ImageError, MmxError
from mmx.inference.batch_inference.answers import answer_questions
from mmx.inference.batch_inference.captions import caption_images
from mmx.inference.generator import TextGenerator
from mmx.inference.inputs import InputWindow
from mmx.inference.outputs import GeneratedText, Question
from mmx.inference.prompts import TextStart

NO_MEMORY = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."


class FakeMemory(list):
    """A memory: the prepared inputs themselves."""

    @property
    def batch_size(self):
        return len(self)

    def select(self, rows):
        return FakeMemory(self[row] for row in rows)


class FakeGenerator:
    """Stands in for Pipeline.

    room: how many streams fit into its memory; device: the device type it reports; seconds: time for each stream.
    """

    folder = None

    def __init__(self, room=10**9, device="cpu", seconds=0.0, out_of_memory=lambda: RuntimeError(NO_MEMORY)):
        image = SimpleNamespace(modality="image", accepts=lambda path: path.endswith((".jpg", ".png")))
        text = SimpleNamespace(modality="text", accepts=lambda path: False)
        self.encoders = {"image": image, "text": text}
        self.model = SimpleNamespace(
            device=torch.device(device),
            encoders=self.encoders,
            encoder=self.encoders.__getitem__,
            config=SimpleNamespace(speech=None),
        )
        self.room = room
        self.seconds = seconds
        self.out_of_memory = out_of_memory
        self.prepared = 0
        self.encoded = []  # rows of each call
        self.decoded = []  # (rows, streams) of each call

    def accepts(self, path):
        return any(encoder.accepts(path) for encoder in self.encoders.values())

    def generation_config(self, overrides):
        changed = {name: value for name, value in overrides.items() if value is not None}
        return parse_config({"max_new_tokens": 4, **changed}, GenerationConfig, where="generation options")

    def prepare(self, image):
        self.prepared += 1
        raw = next(iter(image.values())) if isinstance(image, dict) else image
        try:
            text = raw.decode() if isinstance(raw, bytes) else raw if "text" in image else Path(raw).read_text()
        except OSError:
            text = "bad"
        if text.startswith("bad"):
            name = str(raw)[:80]
            raise ImageError(f"{name!r}: not an image.", code="image.format", source=name)
        return {"image": text}

    prepare_or_error = TextGenerator.prepare_or_error
    prepare_windows_or_error = TextGenerator.prepare_windows_or_error

    def prepare_windows(self, image):
        return [InputWindow(self.prepare(image))]

    def encode_prepared(self, rows):
        self.encoded.append(len(rows))
        return FakeMemory(row["image"] for row in rows)

    def prompt_tokens(self, question):
        if question is not None and len(question) > 60:
            raise MmxError("the question is too long.", code="question.too_long")
        return list(range(len(question or "")))

    def start_tokens(self, start, prompt_length):
        return TextStart(start, list(range(len(start))))

    def generate_batch(self, memory, questions, options, boxes=(), starts=()):
        streams = sum(map(len, questions))
        if streams > self.room or any("huge" in text for text in memory):
            raise self.out_of_memory()
        self.decoded.append((len(memory), max(map(len, questions))))
        time.sleep(self.seconds * streams)
        results = []
        for text, row in zip(memory, questions, strict=True):
            results.append([[GeneratedText(text if q is None else f"{text} {q}", -0.5, ())] for q in row])
        return results

    def captions(self, images, batch_size=16, starts=None, **options):
        return caption_images(self, images, batch_size, self.generation_config(options), starts)

    def answers(self, questions, batch_size=16, **options):
        items = [item if isinstance(item, Question) else Question(*item) for item in questions]
        return answer_questions(self, items, batch_size, self.generation_config(options))


def write_texts(folder, contents):
    """A file of each text, a.jpg to be, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return [str(folder / name) for name in contents]


def as_file(data):
    """Bytes and their size, as tarfile wants them."""
    return io.BytesIO(data), len(data)
