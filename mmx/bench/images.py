"""From files to captions: images per second compared with transformers, and the startup time of the bundled model."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from PIL import Image

from mmx.bench.hf_references import BenchSetting, ModelPair, build_pair
from mmx.bench.timing import BenchResult, Measurement, Quantity, TimedRuns, alternate, compare
from mmx.data.scenes import generate_scene, render_scene
from mmx.errors import MmxError
from mmx.inference.pipeline import Pipeline, load

NUM_IMAGES = 32
BATCH_SIZE = 8
NUM_TOKENS = 20
IMAGE_SIZE = (640, 480)
# Prints the caption, then the peak resident memory in kilobytes (0 where there is no /proc). The process reads its own
# memory, because what the system reports of child processes starts at the memory of their parent.
STARTUP_SCRIPT = """
import sys, mmx
print(mmx.load(None, sys.argv[2], sys.argv[3]).caption(sys.argv[1]))
try:
    lines = open("/proc/self/status").read().splitlines()
    print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
except OSError:
    print(0)
"""


class StartupRun(NamedTuple):
    """A process that captioned one image: seconds from its start to its end, peak memory in megabytes (0: unknown)."""

    seconds: float
    peak_mb: float


def images(setting: BenchSetting) -> Iterator[BenchResult]:
    """ViT-GPT2, greedy, from JPEG files to captions, in batches."""
    pair = build_pair("vit-gpt2", setting).for_inference()
    with TemporaryDirectory(prefix="mmx-bench-") as folder:
        paths = write_images(Path(folder), NUM_IMAGES)
        functions: dict[str, Callable[[], list[str]]] = {
            "reference": lambda: _reference_captions(pair, paths),
            "mmx": lambda: _mmx_captions(pair, paths),
        }
        runs = alternate(functions, setting.repeats, setting.device)
    width, height = IMAGE_SIZE
    note = f"{NUM_IMAGES} JPEG files of {width} x {height}, batches of {BATCH_SIZE}, {NUM_TOKENS} tokens, one processor"
    if setting.description:
        note = f"{note}; {setting.description}"
    quantity = Quantity("images, from file to caption", "per second", lambda seconds: NUM_IMAGES / seconds)
    same = runs["mmx"].output == runs["reference"].output
    yield compare(quantity, runs["mmx"], runs["reference"], same, note)


def write_images(folder: Path, count: int) -> list[str]:
    """Write synthetic scenes as JPEG files with the proportions of a camera; return their paths."""
    paths = []
    for index in range(count):
        path = str(folder / f"{index}.jpg")
        render_scene(generate_scene(0, index)).resize(IMAGE_SIZE).save(path, quality=90)
        paths.append(path)
    return paths


def _reference_captions(pair: ModelPair, paths: Sequence[str]) -> list[str]:
    """Caption in batches, as in the examples of transformers."""
    captions: list[str] = []
    for start in range(0, len(paths), BATCH_SIZE):
        batch = [Image.open(path).convert("RGB") for path in paths[start : start + BATCH_SIZE]]
        pixels = pair.processor(batch, return_tensors="pt")["pixel_values"]
        pixels = pixels.to(pair.setting.device, pair.reference.dtype)
        rows = pair.reference.generate(pixels, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False)
        captions += pair.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return captions


def _mmx_captions(pair: ModelPair, paths: Sequence[str]) -> list[str]:
    """Caption in batches. Every token of the tokenizer has its own text, so equal captions are equal tokens."""
    captions = []
    pipeline = Pipeline(pair.model, pair.generation)
    results = pipeline.captions(paths, BATCH_SIZE, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, num_beams=1)
    for _, result in results:
        if isinstance(result, MmxError):
            raise result
        captions.append(result.text)
    return captions


def startup(setting: BenchSetting) -> Iterator[BenchResult]:
    """The bundled model: one caption in a new process, and the next one in a process that has loaded it."""
    with TemporaryDirectory(prefix="mmx-bench-") as folder:
        (path,) = write_images(Path(folder), 1)
        cold = [_startup_run(path, setting) for _ in range(setting.repeats)]
        pipeline = load(None, setting.device, setting.dtype)
        warm = alternate({"mmx": lambda: pipeline.caption(path)}, setting.repeats, setting.device)["mmx"]
    quantity = Quantity("startup, new process, first caption", "s", lambda seconds: seconds)
    yield compare(quantity, TimedRuns([run.seconds for run in cold], None))
    peaks = [run.peak_mb for run in cold]
    if all(peaks):
        yield BenchResult("startup, new process, peak memory", "MB", Measurement.of(peaks), note="resident memory")
    yield compare(Quantity("startup, next caption", "ms", lambda seconds: 1000 * seconds), warm)


def _startup_run(path: str, setting: BenchSetting) -> StartupRun:
    """Caption an image in a new process. Raises MmxError (code `bench.process`) if it fails."""
    start = time.perf_counter()
    package = str(Path(__file__).parents[2])  # the same mmx, whether installed or not
    process = subprocess.run(
        [sys.executable, "-c", STARTUP_SCRIPT, path, setting.device, setting.dtype],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])},
    )
    seconds = time.perf_counter() - start
    if process.returncode:
        lines = process.stderr.strip().splitlines() or ["no message"]
        raise MmxError(
            f"a new process could not caption an image ({lines[-1]}); try `mmx caption {path}`.",
            code="bench.process",
            path=path,
        )
    return StartupRun(seconds, int(process.stdout.split()[-1]) * 1024 / 1e6)
