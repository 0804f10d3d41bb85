"""The time to read pictures from tables, archives and data sets, compared with the folder of the same pictures."""

import io
import statistics
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from mmx.config.schema import DataConfig
from mmx.data.formats import read_examples
from mmx.io.images import load_image

NUM_PICTURES = 1000
SIZE = (320, 240)
ROUNDS = 5
LIMIT = 1.05


def write_folder(folder: Path) -> list[bytes]:
    """Write pictures with sidecar texts, and return their bytes."""
    folder.mkdir()
    contents = []
    for number in range(NUM_PICTURES):
        buffer = io.BytesIO()
        noise = Image.effect_noise((40, 30), 60).resize(SIZE, Image.Resampling.BICUBIC)
        noise.convert("RGB").save(buffer, "JPEG", quality=90)
        contents.append(buffer.getvalue())
        (folder / f"{number:04}.jpg").write_bytes(contents[-1])
        (folder / f"{number:04}.txt").write_text(f"picture {number}")
    return contents


def write_others(folder: Path, contents: list[bytes]) -> dict[str, Path]:
    """Write the same pictures in each of the other formats."""
    datasets = pytest.importorskip("datasets", reason="the extra datasets is not installed")
    datasets.disable_progress_bars()
    captions = [f"picture {number}" for number in range(NUM_PICTURES)]
    with tarfile.open(folder / "a.tar", "w") as archive:
        for number, content in enumerate(contents):
            for suffix, data in (("jpg", content), ("txt", captions[number].encode())):
                info = tarfile.TarInfo(f"{number:04}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {"image": [{"bytes": content, "path": None} for content in contents], "caption": captions}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(str(folder / "saved"))
    dataset.to_parquet(str(folder / "a.parquet"))
    lines = [f"folder/{number:04}.jpg,picture {number}" for number in range(NUM_PICTURES)]
    (folder / "a.csv").write_text("\n".join(["image,caption", *lines]))
    names = {"csv": "a.csv", "tar": "a.tar", "parquet": "a.parquet", "hf": "saved"}
    return {form: folder / name for form, name in names.items()}


def read_seconds(path: Path) -> float:
    """Processor time of reading a data set and decoding its pictures."""
    start = time.process_time()
    examples = read_examples(DataConfig(path=str(path)), sources=("image",))
    for example in examples:
        load_image(example.sources["image"])
    assert len(examples) == NUM_PICTURES
    return time.process_time() - start


@pytest.mark.slow
def test_formats_cost_at_most_five_percent_over_a_folder(tmp_path: Path) -> None:
    paths = {"folder": tmp_path / "folder"}
    paths |= write_others(tmp_path, write_folder(paths["folder"]))
    seconds: dict[str, list[float]] = {form: [] for form in paths}
    for _ in range(ROUNDS + 1):  # the first round imports and warms up
        for form, path in paths.items():
            seconds[form].append(read_seconds(path))
    medians = {form: statistics.median(times[1:]) for form, times in seconds.items()}
    ratios = {form: median / medians["folder"] for form, median in medians.items()}
    print({form: f"{medians[form]:.2f} s, {ratio:.3f}" for form, ratio in ratios.items()})
    assert max(ratios.values()) <= LIMIT
