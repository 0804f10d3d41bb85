"""Reading data sets in published formats: one reader a format, which returns a list of examples.

Formats: `manifest` (JSONL), `csv` (also TSV), `parquet`, `karpathy` (dataset_*.json), `coco` (captions JSON), `vqa`
(VQAv2 questions + annotations), `folder` (HF ImageFolder: metadata.jsonl), `sidecar` (a text file next to each image),
`webdataset` (tar archives), `hf` (Hugging Face datasets) and `scenes` (generated). Readers do not open images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from mmx.config.schema import DataConfig
from mmx.data.derived_questions import derive_questions
from mmx.data.examples import Example, check_sources
from mmx.data.hf_datasets import is_dataset_name, is_saved_dataset, read_dataset
from mmx.data.json_data_sets import load_document, read_coco, read_karpathy, read_vqa
from mmx.data.manifest import METADATA_FILES, read_folder, read_manifest, read_record_list
from mmx.data.parquet import is_parquet
from mmx.data.record_files import read_records
from mmx.data.scene_examples import SceneExamples
from mmx.data.selection import select_tasks
from mmx.data.sidecar_folder import has_sidecars, read_sidecars
from mmx.data.skipped import ReportSkipped, SkippedRecords, warn_skipped
from mmx.data.tables import is_table
from mmx.data.webdataset import complete_samples, find_archives, read_webdataset
from mmx.errors import DataError
from mmx.io.images import SUFFIXES as IMAGE_SUFFIXES
from mmx.io.tar import is_tar

SPLIT_FORMATS = frozenset({"karpathy", "hf"})
COLUMN_FORMATS = frozenset({"manifest", "csv", "parquet", "folder", "webdataset", "hf"})


def read_examples(
    config: DataConfig,
    base: Path = Path(),
    sources: Collection[str] | None = None,
    on_skipped: ReportSkipped = warn_skipped,
) -> Sequence[Example]:
    """Return the examples of one data set: its `fraction`, then at most `max_examples`.

    Args:
        base: folder that a relative path starts from.
        sources: names of the model's sources, see `read_manifest`; None if they are unknown.
        on_skipped: called with a sentence about records that are not used, such as annotations without an image: their
            number, and the first of them. By default it is a Python warning.

    Raises:
        DataError: the data is missing, damaged (the message names file and line), has an example without an input for
            any of the sources, or nothing is selected.
    """
    if config.path == "scenes" or config.format == "scenes":
        _refuse_split(config, "scenes")
        if config.derive_questions:
            raise DataError(
                "scenes have their own questions; leave derive_questions out.", code="data.derive_questions"
            )
        return SceneExamples(config)
    path = _data_path(config, base)
    name = detect_format(path) if config.format == "auto" else config.format
    if name not in SPLIT_FORMATS:
        _refuse_split(config, name)
    if config.columns and name not in COLUMN_FORMATS:
        raise _columns_not_used(config, name)
    skipped = SkippedRecords()
    examples = [example for example in READERS[name](path, config, sources, skipped) if example.tasks]
    for sentence in skipped.sentences():
        on_skipped(sentence)
    if sources is not None:
        for example in examples:
            check_sources(example, sources)
    selected = _select_examples(examples, config)
    if not examples:
        raise _no_texts(path, name)
    if not selected:
        raise _nothing_selected(path, config)
    return selected


def _data_path(config: DataConfig, base: Path) -> Path:
    """Return the path of a data set that exists, or the name of one of Hugging Face datasets. Raises DataError."""
    if is_dataset_name(config.path):
        return Path(config.path)
    path = (base / config.path).expanduser()
    if not path.exists():
        raise DataError(
            f"there is no data at {path}; expected a file or folder, set its path in the configuration.",
            code="data.missing",
            path=str(path),
        )
    return path


def detect_format(path: Path) -> str:
    """Return the format of a file or folder, detected from its name and its first keys. Raises DataError."""
    if is_dataset_name(str(path)):
        return "hf"
    if path.is_dir():
        return _detect_folder_format(path)
    if path.suffix.lower() == ".jsonl":
        return "manifest"
    if is_table(path.name):
        return "csv"
    if is_parquet(path.name):
        return "parquet"
    if is_tar(path.name):
        return "webdataset"
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise DataError(
            f"{path} is an image; expected a data set of one of the formats {', '.join(READERS)}; for one image type "
            "mmx caption.",
            code="data.format",
            path=str(path),
        )
    document = load_document(path)
    if "images" in document and "annotations" in document:
        return "coco"
    if "questions" in document:
        return "vqa"
    if "images" in document:
        return "karpathy"
    raise DataError(
        f"{path} has an unknown format; expected one of {', '.join(READERS)}.", code="data.format", path=str(path)
    )


def _detect_folder_format(path: Path) -> str:
    """Return `folder`, which refuses a folder without metadata, unless there is something else that can be read."""
    if any((path / name).is_file() for name in METADATA_FILES):
        return "folder"
    if is_saved_dataset(path):
        return "hf"
    if find_archives(path):
        return "webdataset"
    return "sidecar" if has_sidecars(path) else "folder"


def _select_examples(examples: Sequence[Example], config: DataConfig) -> list[Example]:
    start, stop = (round(edge * len(examples)) for edge in config.fraction)
    examples = examples[start:stop]
    if config.derive_questions:
        # Cut first: "yes" and "no" are balanced over the examples that remain.
        examples = derive_questions(examples[: config.max_examples], config.seed, config.wordings, config.unanswerable)
    selected = [select_tasks(example, config) for example in examples]
    return [example for example in selected if example.tasks][: config.max_examples]


def _no_texts(path: Path, name: str) -> DataError:
    """The error for data in which no example has a caption or a question, whatever is selected."""
    if name == "coco":
        return DataError(
            f"no image of {path} has an annotation; compare the ids of its images with image_id of its annotations.",
            code="data.not_joined",
            path=str(path),
        )
    return DataError(
        f"{path} holds no captions and no questions; expected texts.", code="data.no_texts", path=str(path)
    )


def _nothing_selected(path: Path, config: DataConfig) -> DataError:
    types = f" of types {', '.join(config.question_types)}" if config.question_types else ""
    return DataError(
        f"{path} holds no examples for the tasks {', '.join(config.tasks)}{types} in its fraction "
        f"{list(config.fraction)}; change tasks, question_types or fraction.",
        code="data.nothing_selected",
        path=str(path),
        tasks=config.tasks,
        question_types=config.question_types,
    )


def _refuse_split(config: DataConfig, format_name: str) -> None:
    """Refuse a split that the format does not have; ignoring it would train on the data of an evaluation."""
    if config.split is not None:
        raise DataError(
            f"{config.path} was given with split {config.split!r}, and {format_name} data has no splits; leave split "
            "out, or select a part of the data by fraction, such as fraction: [0.9, 1.0].",
            code="data.no_splits",
            format=format_name,
            split=config.split,
        )


def _columns_not_used(config: DataConfig, format_name: str) -> DataError:
    formats = ", ".join(sorted(COLUMN_FORMATS))
    return DataError(
        f"{config.path} was given with columns, and {format_name} data has fields of fixed names; leave columns out "
        f"(they are read with {formats}).",
        code="data.no_columns",
        format=format_name,
    )


# ---- readers ---------------------------------------------------------------------------------------------------


def read_list(
    path: Path, config: DataConfig, sources: Collection[str] | None, skipped: SkippedRecords
) -> list[Example]:
    """Read a table. Paths of images are relative to its folder."""
    return read_record_list(read_records(path), path.parent, sources, config.columns)


def read_archives(
    path: Path, config: DataConfig, sources: Collection[str] | None, skipped: SkippedRecords
) -> list[Example]:
    """Read tar archives of samples. Those without an input or a text are reported as skipped."""
    records = complete_samples(read_webdataset(path), skipped)
    return read_record_list(records, path.parent, sources, config.columns)


def read_sidecar_folder(
    path: Path, config: DataConfig, sources: Collection[str] | None, skipped: SkippedRecords
) -> list[Example]:
    """Read a folder of images with a text file next to each."""
    return read_record_list(read_sidecars(path, skipped), path, sources, {})


def read_hf(path: Path, config: DataConfig, sources: Collection[str] | None, skipped: SkippedRecords) -> list[Example]:
    """Read a map-style data set of Hugging Face datasets."""
    return read_record_list(read_dataset(str(path), config.split), Path(), sources, config.columns)


Reader = Callable[[Path, DataConfig, Collection[str] | None, SkippedRecords], list[Example]]
READERS: dict[str, Reader] = {
    "manifest": lambda path, config, sources, skipped: read_manifest(path, config, sources),
    "csv": read_list,
    "parquet": read_list,
    "karpathy": read_karpathy,
    "coco": read_coco,
    "vqa": read_vqa,
    "folder": lambda path, config, sources, skipped: read_folder(path, config, sources),
    "sidecar": read_sidecar_folder,
    "webdataset": read_archives,
    "hf": read_hf,
}
