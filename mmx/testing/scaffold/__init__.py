"""The beginning of somebody's own encoder: a whole package, from files in `template/` with a few names filled in."""

import re
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory

from mmx.errors import EncoderError

TEMPLATE = Path(__file__).parent / "template"
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
PLACES = {  # template -> where it goes
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "encoder.py": "src/{module}/__init__.py",
    "test_encoder.py": "tests/test_{module}.py",
}


def write_encoder_package(name: str, folder: Path) -> Path:
    """Write the package `mmx-NAME` into a new or empty folder, all of it or nothing, and return the folder.

    Raises EncoderError for a name that is none or is taken, and for a folder in use.
    """
    from mmx.encoders.registry import entries

    if not NAME.fullmatch(name):
        raise EncoderError(
            f"{name!r} is no name for an encoder; use small letters, digits and dashes, as in bird-song."
        )
    if taken := next((entry for entry in entries() if entry.name == name), None):
        raise EncoderError(f"the encoder name {name!r} is taken by {taken.package} ({taken.address}); choose another.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise EncoderError(f"{str(folder)!r} already exists; give a new or empty folder with --out.")
    names = {"name": name, "module": f"mmx_{name.replace('-', '_')}", "class_": _camel(name)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as workshop:
        finished = Path(workshop) / folder.name
        for template, place in PLACES.items():
            file = finished / place.format(**names)
            file.parent.mkdir(parents=True, exist_ok=True)
            text = (TEMPLATE / f"{template}.template").read_text(encoding="utf-8")
            file.write_text(Template(text).substitute(names), encoding="utf-8")
        if folder.exists():
            folder.rmdir()  # empty, as seen above; a rename onto a folder is not possible everywhere
        finished.rename(folder)
    return folder


def _camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("-")) + "Encoder"
