"""The image files that a JSON document names: where they are, and the records about the same file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path, PureWindowsPath

from mmx.data.examples import Example, TextTask, join_tasks
from mmx.data.json_fields import absolute_path

IMAGE_FOLDERS = ("images", "Images", "Flicker8k_Dataset", ".")


def join_equal_images(
    examples: Iterable[Example], join: Callable[[Iterable[TextTask]], tuple[TextTask, ...]] = join_tasks
) -> list[Example]:
    """Make one example of all records of one image file, in the order in which the images first appear."""
    joined: dict[str, Example] = {}
    for example in examples:
        image = absolute_path(str(example.sources["image"]))
        if image in joined:
            first = joined[image]
            example = replace(first, tasks=join((*first.tasks, *example.tasks)))
        joined[image] = example
    return list(joined.values())


def find_image(base: Path, name: Path) -> str:
    """Return the path of an image in one of the usual folders next to its list, or in the first if it is in none."""
    for spelling in dict.fromkeys((name, Path(PureWindowsPath(name).as_posix()))):
        for folder in IMAGE_FOLDERS:
            if (base / folder / spelling).exists():
                return str(base / folder / spelling)
    return str(base / IMAGE_FOLDERS[0] / name)


def find_vqa_image(base: Path, subtype: str | None, image: int | str) -> str:
    """VQAv2 names images by number: val2014/COCO_val2014_000000000042.jpg. An id may also be the name of a file."""
    by_id = find_image(base, Path(str(image)))
    if isinstance(image, str) or Path(by_id).is_file():
        return by_id
    name = f"COCO_{subtype}_{image:012d}.jpg" if subtype else f"{image:012d}.jpg"
    return find_image(base, Path(subtype or "") / name)
