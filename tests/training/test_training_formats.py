"""Training from archives, tables and data sets equals training from the files, also with data workers and resumed."""

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from toy_runs import RecordingTrainer

from mmx.config.schema import RunConfig
from mmx.errors import TrainingError

COUNT = 7


def pictures() -> list[bytes]:
    contents = []
    for number in range(COUNT):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 30 + number), (30 * number, 0, 255 - 30 * number)).save(buffer, "PNG")
        contents.append(buffer.getvalue())
    return contents


def write_csv(folder: Path) -> str:
    rows = ["image,caption"]
    for number, content in enumerate(pictures()):
        (folder / f"{number}.png").write_bytes(content)
        rows.append(f"{number}.png,picture {number}")
    (folder / "list.csv").write_text("\n".join(rows))
    return str(folder / "list.csv")


def write_tar(folder: Path) -> str:
    with tarfile.open(folder / "list.tar", "w") as archive:
        for number, content in enumerate(pictures()):
            for suffix, data in (("png", content), ("txt", f"picture {number}".encode())):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return str(folder / "list.tar")


def write_parquet(folder: Path) -> str:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra parquet is not installed")
    images = [{"bytes": content, "path": None} for content in pictures()]
    captions = [f"picture {number}" for number in range(COUNT)]
    parquet.write_table(pyarrow.table({"image": images, "caption": captions}), folder / "list.parquet")
    return str(folder / "list.parquet")


def write_saved(folder: Path) -> str:
    datasets = pytest.importorskip("datasets", reason="the extra datasets is not installed")
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {
        "image": [{"bytes": content, "path": None} for content in pictures()],
        "caption": [f"picture {number}" for number in range(COUNT)],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


WRITERS = {"tar": write_tar, "parquet": write_parquet, "hf": write_saved}


def config(path: str, output_dir: Path, num_workers: int = 0) -> RunConfig:
    encoder = {"backbone": "resnet10t", "size": 32, "stage": 1, "fit": "pad"}
    document = {
        "model": {
            "sources": {"image": {"encoder": "image", "options": encoder}},
            "decoder": {"hidden_size": 32, "num_layers": 1, "num_heads": 4},
            "vocab_size": 270,
        },
        "train": [{"path": path}],
        "training": {"max_steps": 4, "per_device_batch_size": 3, "num_workers": num_workers},
        "output_dir": str(output_dir),
    }
    return RunConfig.model_validate(document)


def losses(trainer: RecordingTrainer) -> list[tuple[int, float]]:
    return [(step.step, step.loss) for step in trainer.recorded]


def run(configuration: RunConfig, resume: bool = False) -> list[tuple[int, float]]:
    trainer = RecordingTrainer(configuration, resume)
    trainer.run()
    return losses(trainer)


@pytest.mark.parametrize("form", WRITERS)
def test_training_is_that_of_the_files(tmp_path: Path, form: str) -> None:
    expected = run(config(write_csv(tmp_path), tmp_path / "files"))
    path = WRITERS[form](tmp_path)
    assert run(config(path, tmp_path / "workers", num_workers=2)) == expected
    stopped = RecordingTrainer(config(path, tmp_path / "resumed"))
    stopped.stop_in = 2
    with pytest.raises(TrainingError):
        stopped.run()
    assert losses(stopped) + run(config(path, tmp_path / "resumed"), resume=True) == expected
