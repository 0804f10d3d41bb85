"""From files to words: pictures a second beside transformers, and how long the bundled model takes to begin."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from mmx.bench.hf_references import BenchSetting, ModelPair, build_pair
from mmx.bench.timing import BenchResult, Spread, TimedRuns, alternate, compare
from mmx.data.scenes import generate_scene, render_scene
from mmx.errors import MmxError
from mmx.inference.pipeline import Pipeline, load

COUNT, BATCH, TOKENS = 32, 8, 20
LANDSCAPE = (640, 480)
COLD = """
import sys, mmx
print(mmx.load(None, sys.argv[2], sys.argv[3]).caption(sys.argv[1]))
try:
    lines = open("/proc/self/status").read().splitlines()
    print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
except OSError:
    print(0)
"""


def images(setting: BenchSetting) -> Iterator[BenchResult]:
    """ViT-GPT2, greedy, from JPEG files to texts, in batches."""
    pair = build_pair("vit-gpt2", setting).for_inference()
    with TemporaryDirectory(prefix="mmx-bench-") as folder:
        paths = write_pictures(Path(folder), COUNT)
        runs = alternate(
            {"theirs": lambda: _theirs(pair, paths), "ours": lambda: _ours(pair, paths)},
            setting.repeats,
            setting.device,
        )
    note = f"{COUNT} JPEG files of {LANDSCAPE[0]} x {LANDSCAPE[1]}, batches of {BATCH}, {TOKENS} tokens, one processor"
    note = "; ".join(text for text in (note, setting.description) if text)
    ours, theirs = runs["ours"], runs["theirs"]
    same = ours.first == theirs.first
    yield compare("pictures, from file to text", "a second", lambda s: COUNT / s, ours, theirs, same, note)


def write_pictures(folder: Path, count: int) -> list[str]:
    """Scenes as JPEG files of a camera's proportions."""
    paths = [str(folder / f"{number}.jpg") for number in range(count)]
    for number, path in enumerate(paths):
        render_scene(generate_scene(0, number)).resize(LANDSCAPE).save(path, quality=90)
    return paths


def _theirs(pair: ModelPair, paths: Sequence[str]) -> list[str]:
    """The text of each picture, as transformers' own examples get it, in batches."""
    found: list[str] = []
    for start in range(0, len(paths), BATCH):
        images = [Image.open(path).convert("RGB") for path in paths[start : start + BATCH]]
        pixels = pair.processor(images, return_tensors="pt")["pixel_values"]
        pixels = pixels.to(pair.setting.device, pair.reference.dtype)
        rows = pair.reference.generate(pixels, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        found += pair.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return found


def _ours(pair: ModelPair, paths: Sequence[str]) -> list[str]:
    """The text of each picture; no two tokens are spelled alike, so equal texts are equal tokens."""
    found = []
    pipeline = Pipeline(pair.model, pair.generation)
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "num_beams": 1}
    for _, said in pipeline.captions(paths, BATCH, **options):
        if isinstance(said, MmxError):
            raise said
        found.append(said.text)
    return found


def startup(setting: BenchSetting) -> Iterator[BenchResult]:
    """The bundled model: one caption in a new process, and the next one where it is loaded."""
    with TemporaryDirectory(prefix="mmx-bench-") as folder:
        (path,) = write_pictures(Path(folder), 1)
        cold, held = zip(*(_cold(path, setting) for _ in range(setting.repeats)), strict=True)
        pipeline = load(None, setting.device, setting.dtype)
        warm = alternate({"ours": lambda: pipeline.caption(path)}, setting.repeats, setting.device)["ours"]
    yield compare("start, a new process, one caption", "s", lambda s: s, TimedRuns(list(cold)))
    if all(held):
        yield BenchResult("start, a new process, most memory", "MB", Spread.of(held), note="peak resident, all of it")
    yield compare("start, the next caption", "ms", lambda s: 1000 * s, warm)


def _cold(path: str, setting: BenchSetting) -> tuple[float, float]:
    """Seconds from nothing to a caption, and the most megabytes that process held (0: not told here).

    The process tells its memory itself: what the system reports of children begins with their parent's.
    """
    started = time.perf_counter()
    package = str(Path(__file__).parents[2])  # the same mmx, installed or not
    ran = subprocess.run(
        [sys.executable, "-c", COLD, path, setting.device, setting.dtype],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])},
    )
    seconds = time.perf_counter() - started
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no word"])[-1]
        raise MmxError(f"a new process could not caption a picture ({last}); look with `mmx caption {path}`.")
    return seconds, int(ran.stdout.split()[-1]) * 1024 / 1e6
