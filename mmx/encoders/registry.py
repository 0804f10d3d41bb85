"""Names to encoders, lazily: a name leads to an address `package.module:Class`, imported only when it is asked for.

Built-ins stand in a table and are loaded exactly as a stranger's: through `resolve`. Strangers come by the
entry-point group `mmx.encoders`, or by an address typed directly. `MMX_PLUGINS` (names, comma separated; empty for
none) limits which entry points are considered.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, distributions, version
from inspect import isclass
from operator import attrgetter

from pydantic import BaseModel

from mmx.encoders.base import Encoder
from mmx.errors import EncoderError, suggest

GROUP = "mmx.encoders"
BUILT_IN = {
    "image": "mmx.encoders.image:ImageEncoder",
    "pretrained": "mmx.encoders.pretrained:PretrainedEncoder",
    "text": "mmx.encoders.text:TextEncoder",
}


@dataclass(frozen=True)
class EncoderEntry:
    """One name on offer: where it leads, and who put it there."""

    name: str
    address: str
    package: str
    version: str


@dataclass(frozen=True)
class EncoderDescription:
    """What `mmx encoders` shows of an entry; `problem` says in a sentence why a broken one cannot be used."""

    entry: EncoderEntry
    modality: str | None = None
    options: dict[str, object] | None = None
    problem: str | None = None


def entries() -> list[EncoderEntry]:
    """Every name on offer, built-ins first; nothing is imported."""
    own = [EncoderEntry(name, address, "mmx", _version("mmx")) for name, address in BUILT_IN.items()]
    allowed = os.environ.get("MMX_PLUGINS")
    names = None if allowed is None else {name.strip() for name in allowed.split(",")}
    theirs = [
        EncoderEntry(point.name, point.value, package, release)
        for (package, release), points in _claims().items()
        for point in points
        if names is None or point.name in names
    ]
    return own + sorted(theirs, key=lambda entry: (entry.name, entry.address))


def _claims() -> dict[tuple[str, str], list[EntryPoint]]:
    """(package, version) -> its entry points. Read one by one, so that a damaged package stops no other."""
    claims: dict[tuple[str, str], list[EntryPoint]] = {}
    for package in distributions():
        try:
            if points := [point for point in package.entry_points if point.group == GROUP]:
                claims.setdefault((package.name or "?", package.version or "?"), points)
        except Exception:  # its papers cannot be read, so it claims nothing
            continue
    return claims


def resolve(name: str) -> type[Encoder]:
    """The encoder class of a name or an address. Raises EncoderError with the reason where there is none."""
    if ":" in name:
        return _load(EncoderEntry(name, name, "an address", ""))
    on_offer = entries()
    matches = [entry for entry in on_offer if entry.name == name]
    if not matches:
        raise EncoderError(f"there is no encoder {name!r}; {suggest(name, [entry.name for entry in on_offer])}")
    if matches[0].package != "mmx" and len(matches) > 1:
        raise EncoderError(_clash(matches))
    return _load(matches[0])


def describe(entry: EncoderEntry, on_offer: Sequence[EncoderEntry]) -> EncoderDescription:
    """Import one of the entries on offer and tell what it is; a broken one is described by its problem."""
    namesakes = [other for other in on_offer if other.name == entry.name]
    if len(namesakes) > 1 and not (entry is namesakes[0] and entry.package == "mmx"):
        return EncoderDescription(entry, problem=_clash(namesakes))
    try:
        encoder = _load(entry)
        options = {
            key: "(required)" if field.is_required() else field.get_default(call_default_factory=True)
            for key, field in encoder.Options.model_fields.items()
        }
        return EncoderDescription(entry, encoder.modality, options)
    except EncoderError as error:
        return EncoderDescription(entry, problem=str(error))


def _load(entry: EncoderEntry) -> type[Encoder]:
    module, _, attribute = entry.address.partition(":")
    origin = f"encoder {entry.name!r} ({entry.package} {entry.version}".rstrip() + ")"
    try:
        found = attrgetter(attribute)(import_module(module))
    except (Exception, SystemExit) as error:  # a stranger's module may do anything while it is imported
        raise EncoderError(f"{origin} cannot be imported: {type(error).__name__}: {_one_line(error)}") from error
    if not (isclass(found) and issubclass(found, Encoder)):
        raise EncoderError(f"{origin} is {entry.address}, which is no subclass of mmx.Encoder.")
    return check_class(found, origin)


def check_class(kind: type[Encoder], origin: str | None = None) -> type[Encoder]:
    """The class, if it keeps what one can tell of the contract without building it. Raises EncoderError."""
    if broken := _broken_promise(kind):
        raise EncoderError(f"{origin or f'encoder {kind.__name__}'} {broken}; see the contract in mmx.encoders.base.")
    return kind


def _broken_promise(encoder: type[Encoder]) -> str | None:
    """What a class lacks of the contract, as far as one can tell without building it."""
    if not isinstance(getattr(encoder, "modality", None), str):
        return "states no modality"
    if not (isclass(encoder.Options) and issubclass(encoder.Options, BaseModel)):
        return "has Options that are no pydantic model"
    absent = [name for name in ("prepare", "forward") if getattr(encoder, name) is getattr(Encoder, name)]
    return f"defines no {' and no '.join(absent)}" if absent else None


def _clash(namesakes: list[EncoderEntry]) -> str:
    claimed = ", ".join(f"{entry.package} ({entry.address})" for entry in namesakes)
    name = namesakes[0].name
    return f"the encoder name {name!r} is claimed by {claimed}; uninstall one, or type the address instead of the name."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _version(package: str) -> str:
    try:
        return version(package)
    except Exception:  # run from a checkout that is not installed
        return "(not installed)"
