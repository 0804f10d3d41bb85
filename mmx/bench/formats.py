"""What tables, archives and data sets cost: reading all images of each, compared with a folder of the same files."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from mmx.bench.hf_references import BenchSetting
from mmx.bench.images import write_images
from mmx.bench.timing import BenchResult, Quantity, alternate, compare
from mmx.config.schema import DataConfig
from mmx.data.formats import read_examples
from mmx.io.images import load_image

NUM_IMAGES = {"micro": 4, "tiny": 200, "base": 1000}


def formats(setting: BenchSetting) -> Iterator[BenchResult]:
    """From a data set to decoded images. Formats whose extra is not installed are left out."""
    count = NUM_IMAGES[setting.size]
    with TemporaryDirectory(prefix="mmx-bench-") as name:
        folder = Path(name) / "folder"
        folder.mkdir()
        paths = write_images(folder, count)
        for path in paths:
            Path(path).with_suffix(".txt").write_text("a scene")
        data_sets = {"folder": str(folder), **_write_others(Path(name), paths)}
        functions = {form: lambda path=path: _decode_all(path) for form, path in data_sets.items()}
        runs = alternate(functions, setting.repeats, setting.device)
    quantity_of = {form: Quantity(f"formats, {form}", "per second", lambda seconds: count / seconds) for form in runs}
    note = f"{count} JPEG files; the reference is a folder of the files with texts next to them"
    for form in data_sets:
        if form != "folder":
            same = runs[form].output == runs["folder"].output
            yield compare(quantity_of[form], runs[form], runs["folder"], same, note)


def _decode_all(path: str) -> int:
    """Return the number of pixels of all images."""
    pixels = 0
    for example in read_examples(DataConfig(path=path), sources=("image",)):
        width, height = load_image(example.sources["image"]).size  # type: ignore[arg-type]
        pixels += width * height
    return pixels


def _write_others(folder: Path, paths: Sequence[str]) -> dict[str, str]:
    """Write the same images in the other formats, and return their paths."""
    written = {"csv": str(folder / "list.csv"), "tar": str(folder / "images.tar")}
    rows = [f"folder/{Path(path).name},a scene" for path in paths]
    Path(written["csv"]).write_text("\n".join(["image,caption", *rows]))
    with tarfile.open(written["tar"], "w") as archive:
        for path in paths:
            archive.add(path, Path(path).name)
            info = tarfile.TarInfo(f"{Path(path).stem}.txt")
            info.size = len(b"a scene")
            archive.addfile(info, BytesIO(b"a scene"))
    if find_spec("datasets") is not None and find_spec("pyarrow") is not None:
        written |= _write_data_sets(folder, paths)
    return written


def _write_data_sets(folder: Path, paths: Sequence[str]) -> dict[str, str]:
    """Write a parquet file and a folder of Hugging Face datasets."""
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    images = [{"bytes": Path(path).read_bytes(), "path": None} for path in paths]
    data = {"image": images, "caption": ["a scene"] * len(paths)}
    data_set = datasets.Dataset.from_dict(data, features=features)
    data_set.to_parquet(str(folder / "images.parquet"))
    data_set.save_to_disk(str(folder / "saved"))
    return {"parquet": str(folder / "images.parquet"), "hf": str(folder / "saved")}
