"""Lookup of encoders by name. A name stands for an address `package.module:Class`, imported on first use.

Names come from the table of built-ins and from the entry-point group `mmx.encoders`; an address may be given directly.
The environment variable `MMX_PLUGINS` (names separated by commas; empty for none) restricts the entry points.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, distributions, version
from inspect import isclass
from operator import attrgetter

from pydantic import BaseModel

from mmx.encoders.base import CONTRACT_VERSION, Encoder
from mmx.errors import EncoderError, convert_errors, one_line_error, suggest

GROUP = "mmx.encoders"
BUILT_IN = {
    "image": "mmx.encoders.image:ImageEncoder",
    "pretrained": "mmx.encoders.pretrained:PretrainedEncoder",
    "text": "mmx.encoders.text:TextEncoder",
}


@dataclass(frozen=True)
class EncoderEntry:
    """An encoder's name, its address, and the package that registered it."""

    name: str
    address: str
    package: str
    version: str


@dataclass(frozen=True)
class EncoderDescription:
    """An entry as `mmx encoders` shows it. `problem`: why it cannot be used, or None."""

    entry: EncoderEntry
    modality: str | None = None
    options: dict[str, object] | None = None
    problem: str | None = None


def entries() -> list[EncoderEntry]:
    """Return all names, built-ins first. Nothing is imported."""
    mmx_version = _version("mmx")
    built_in = [EncoderEntry(name, address, "mmx", mmx_version) for name, address in BUILT_IN.items()]
    allowed = _allowed_plugins()
    plugins = []
    for (package, release), points in _entry_points().items():
        for point in points:
            if allowed is None or point.name in allowed:
                plugins.append(EncoderEntry(point.name, point.value, package, release))
    return built_in + sorted(plugins, key=lambda entry: (entry.name, entry.address))


def resolve(name: str) -> type[Encoder]:
    """Return the encoder class of a name or an address. Raises EncoderError with the reason if there is none."""
    if ":" in name:
        return _load(EncoderEntry(name, name, "an address", ""))
    all_entries = entries()
    matches = [entry for entry in all_entries if entry.name == name]
    if not matches:
        known = [entry.name for entry in all_entries]
        raise EncoderError(
            f"there is no encoder {name!r}; {suggest(name, known)}", code="encoder.unknown", encoder=name, known=known
        )
    if matches[0].package != "mmx" and len(matches) > 1:
        raise EncoderError(_conflict(matches), code="encoder.name_conflict", encoder=name)
    return _load(matches[0])


def describe(entry: EncoderEntry, all_entries: Sequence[EncoderEntry]) -> EncoderDescription:
    """Import one of the entries and describe it; a broken one is described by its problem."""
    same_name = [other for other in all_entries if other.name == entry.name]
    is_built_in = entry is same_name[0] and entry.package == "mmx"
    if len(same_name) > 1 and not is_built_in:
        return EncoderDescription(entry, problem=_conflict(same_name))
    try:
        encoder = _load(entry)
    except EncoderError as error:
        return EncoderDescription(entry, problem=str(error))
    options: dict[str, object] = {}
    for key, field in encoder.Options.model_fields.items():
        options[key] = "(required)" if field.is_required() else field.get_default(call_default_factory=True)
    return EncoderDescription(entry, encoder.modality, options)


def check_class(encoder: type[Encoder], origin: str | None = None) -> type[Encoder]:
    """Return the class if it satisfies what can be checked of the contract without an instance.

    Raises EncoderError, whose message begins with `origin` (by default the name of the class).
    """
    name = origin or f"encoder {encoder.__name__}"
    if encoder.contract_version != CONTRACT_VERSION:
        raise EncoderError(
            f"{name} states contract_version {encoder.contract_version!r:.20}, and this version of mmx has "
            f"{CONTRACT_VERSION}; install a release of the encoder, or of mmx, that fits the other.",
            code="encoder.contract_version",
            encoder=encoder.__name__,
            given=encoder.contract_version,
            expected=CONTRACT_VERSION,
        )
    if problem := _class_problem(encoder):
        raise EncoderError(
            f"{name} {problem}; see the contract in mmx.encoders.base.",
            code="encoder.contract",
            encoder=encoder.__name__,
            problem=problem,
        )
    return encoder


def _allowed_plugins() -> set[str] | None:
    """Names in MMX_PLUGINS, or None if it is not set."""
    value = os.environ.get("MMX_PLUGINS")
    return None if value is None else {name.strip() for name in value.split(",")}


def _entry_points() -> dict[tuple[str, str], list[EntryPoint]]:
    """(package, version) to its entry points. Packages are read one by one: a damaged one affects no other."""
    found: dict[tuple[str, str], list[EntryPoint]] = {}
    for package in distributions():
        try:
            points = [point for point in package.entry_points if point.group == GROUP]
            if points:
                found.setdefault((package.name or "?", package.version or "?"), points)
        except Exception:  # unreadable metadata
            continue
    return found


def _load(entry: EncoderEntry) -> type[Encoder]:
    module, _, attribute = entry.address.partition(":")
    origin = f"encoder {entry.name!r} ({entry.package} {entry.version}".rstrip() + ")"

    def describe_import_error(error: BaseException) -> str:
        return f"{origin} cannot be imported: {one_line_error(error)}"

    with convert_errors(EncoderError, describe_import_error, code="encoder.import", passing=(), encoder=entry.name):
        found = attrgetter(attribute)(import_module(module))
    if not (isclass(found) and issubclass(found, Encoder)):
        raise EncoderError(
            f"{origin} is {entry.address}, which is no subclass of mmx.Encoder.",
            code="encoder.not_an_encoder",
            encoder=entry.name,
        )
    return check_class(found, origin)


def _class_problem(encoder: type[Encoder]) -> str | None:
    """Describe what a class lacks of the contract, as far as it can be checked without an instance."""
    if not isinstance(getattr(encoder, "modality", None), str):
        return "states no modality"
    if not (isclass(encoder.Options) and issubclass(encoder.Options, BaseModel)):
        return "has Options that are no pydantic model"
    absent = [name for name in ("prepare", "forward") if getattr(encoder, name) is getattr(Encoder, name)]
    return f"defines no {' and no '.join(absent)}" if absent else None


def _conflict(same_name: list[EncoderEntry]) -> str:
    claimed = ", ".join(f"{entry.package} ({entry.address})" for entry in same_name)
    name = same_name[0].name
    return f"the encoder name {name!r} is claimed by {claimed}; uninstall one, or type the address instead of the name."


def _version(package: str) -> str:
    try:
        return version(package)
    except Exception:  # a checkout that is not installed
        return "(not installed)"
