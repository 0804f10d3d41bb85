"""The scaffold of a new encoder: a complete package, from the files in `template/` with a few names filled in."""

import re
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory

from mmx.encoders.base import CONTRACT_VERSION
from mmx.encoders.registry import entries
from mmx.errors import EncoderError

TEMPLATE = Path(__file__).parent / "template"
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
TARGETS = {  # template to its path in the package
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "encoder.py": "src/{module}/__init__.py",
    "py.typed": "src/{module}/py.typed",
    "test_encoder.py": "tests/test_{module}.py",
}


def write_encoder_package(name: str, folder: Path) -> Path:
    """Write the package `mmx-NAME` to a new or empty folder, completely or not at all, and return the folder.

    Raises EncoderError for an invalid or taken name, and for a folder that is not empty.
    """
    _check_name(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise EncoderError(
            f"{str(folder)!r} already exists; give a new or empty folder with --out.",
            code="encoder.folder_exists",
            path=str(folder),
        )
    names = {
        "name": name,
        "module": f"mmx_{name.replace('-', '_')}",
        "class_": _class_name(name),
        "contract_version": str(CONTRACT_VERSION),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        package = Path(temporary) / folder.name
        for template, target in TARGETS.items():
            text = (TEMPLATE / f"{template}.template").read_text(encoding="utf-8")
            file = package / target.format(**names)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(Template(text).substitute(names), encoding="utf-8")
        if folder.exists():
            folder.rmdir()  # empty; not every system can rename to an existing folder
        package.rename(folder)
    return folder


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise EncoderError(
            f"{name!r} is not a valid encoder name; use lower-case letters, digits and dashes, as in bird-song.",
            code="encoder.name",
            given=name,
        )
    for entry in entries():
        if entry.name == name:
            raise EncoderError(
                f"the encoder name {name!r} is taken by {entry.package} ({entry.address}); choose another.",
                code="encoder.name_conflict",
                encoder=name,
                package=entry.package,
            )


def _class_name(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("-")) + "Encoder"
