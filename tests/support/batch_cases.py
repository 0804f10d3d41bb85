"""A fast speaker for tests of bulk work: what it says about a file is what the file holds; it counts what it does."""

import io
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from mmx.config.loader import parse_config
from mmx.config.schema import GenerationConfig
from mmx.errors import ImageError, MmxError
from mmx.inference.batch_inference import GeneratedText, Question, answers, captions

NO_MEMORY = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."


class Rows(list):
    """A memory: the prepared rows themselves."""

    @property
    def batch(self):
        return len(self)

    def select(self, rows):
        return Rows(self[row] for row in rows)


class FakeSpeaker:
    """Stands in for Pipeline. room: how many texts fit into its memory; device: the kind that it pretends to be on."""

    def __init__(self, room=10**9, device="cpu", seconds=0.0, out_of_memory=lambda: RuntimeError(NO_MEMORY)):
        image = SimpleNamespace(modality="image", accepts=lambda path: path.endswith((".jpg", ".png")))
        text = SimpleNamespace(modality="text", accepts=lambda path: False)
        self.encoders = {"image": image, "text": text}
        self.model = SimpleNamespace(
            device=torch.device(device), encoders=self.encoders, encoder=self.encoders.__getitem__
        )
        self.room, self.seconds, self.out_of_memory = room, seconds, out_of_memory
        self.prepared, self.encoded, self.said = 0, [], []

    def accepts(self, path):
        return any(encoder.accepts(path) for encoder in self.encoders.values())

    def options(self, changes):
        changed = {name: value for name, value in changes.items() if value is not None}
        return parse_config({"max_new_tokens": 4, **changed}, GenerationConfig, where="generation options")

    def prepare(self, image):
        self.prepared += 1
        raw = next(iter(image.values())) if isinstance(image, dict) else image
        try:
            text = raw.decode() if isinstance(raw, bytes) else raw if "text" in image else Path(raw).read_text()
        except OSError:
            text = "bad"
        if text.startswith("bad"):
            raise ImageError(f"{str(raw)[:80]!r}: no picture.", kind="format", source=str(raw)[:80])
        return {"image": text}

    def encode_prepared(self, rows):
        self.encoded.append(len(rows))
        return Rows(row["image"] for row in rows)

    def prompt_tokens(self, question):
        if question is not None and len(question) > 60:
            raise MmxError("the question is too long.")
        return list(range(len(question or "")))

    def say(self, memory, questions, options, boxes=()):
        streams = sum(map(len, questions))
        if streams > self.room or any("huge" in text for text in memory):
            raise self.out_of_memory()
        self.said.append((len(memory), max(map(len, questions))))
        time.sleep(self.seconds * streams)
        named = zip(memory, questions, strict=True)
        return [[[GeneratedText(text if q is None else f"{text} {q}", -0.5, ())] for q in row] for text, row in named]

    def captions(self, images, batch_size=16, **options):
        return captions(self, images, batch_size, self.options(options))

    def answers(self, asked, batch_size=16, **options):
        return answers(self, [Question(*item) for item in asked], batch_size, self.options(options))


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
