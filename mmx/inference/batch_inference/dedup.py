"""Inputs of the same bytes, whatever their names: what was said about one is said about the other."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from mmx.errors import MmxError
from mmx.inference.outputs import GeneratedText, TextGenerator
from mmx.models.source import Encoders, find_source

MOST = 8192  # texts that are kept: about 25 MB with the scores of their tokens
LARGEST = 256 * 2**20  # bytes; a larger file is none of a picture or a sound


class ResultCache:
    """Key of an input -> what was said about it; the MOST latest are kept, so that memory does not grow."""

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self.known: OrderedDict[Hashable, GeneratedText | None] = OrderedDict()  # None: met, and not yet spoken of

    def meet(self, key: Hashable | None) -> bool:
        """Whether an input is the first of its key; one without a key always is."""
        if key is None:
            return True
        if key in self.known:
            self.known.move_to_end(key)
            return False
        self._keep(key, None)
        return True

    def remember(self, key: Hashable | None, said: GeneratedText | MmxError) -> None:
        """An error is not kept: it names a file, and its twin has another name."""
        if key is not None and isinstance(said, GeneratedText):
            self._keep(key, said)

    def output(self, key: Hashable | None) -> GeneratedText | None:
        """What was said about the first of its key, if that went well and is not long ago."""
        return self.known.get(key)

    def _keep(self, key: Hashable, said: GeneratedText | None) -> None:
        self.known[key] = said
        while len(self.known) > self.most:
            self.known.popitem(last=False)


def content_key(speaker: TextGenerator, image: Any) -> Hashable | None:
    """What inputs of the same bytes have in common; None for what has no bytes to compare (an open picture, an error).

    The ending of a name is part of it, for an encoder may go by that.
    """
    named = _by_source(speaker.model.encoders, image)
    parts = [(name, _content(speaker.model.encoders, name, raw)) for name, raw in named.items()]
    return None if not parts or any(content is None for _, content in parts) else tuple(parts)


def group_keys(speaker: TextGenerator, images: Iterable[Any]) -> dict[Hashable, Hashable]:
    """`mention` of each input -> what inputs of the same bytes have in common.

    Only files of equal sizes are read for it, for others are no twins.
    """
    distinct = {mention(image): image for image in images}
    sizes = {key: _sizes(image) for key, image in distinct.items()}
    shared = Counter(sizes.values())
    keys: dict[Hashable, Hashable] = {}
    for key, image in distinct.items():
        content = content_key(speaker, image) if sizes[key] is not None and shared[sizes[key]] > 1 else None
        keys[key] = key if content is None else content
    return keys


def mention(image: Any) -> Hashable:
    """What two mentions of one input have in common: equal paths or bytes; an open picture is known by itself."""
    if isinstance(image, Mapping):
        return tuple((name, mention(raw)) for name, raw in image.items())
    if isinstance(image, os.PathLike):
        return os.fspath(image)
    return image if isinstance(image, str | bytes) else id(image)


def _by_source(encoders: Encoders, image: Any) -> Mapping[str, Any]:
    if isinstance(image, Mapping):
        return image
    if not isinstance(image, str | bytes | os.PathLike):
        return {}
    try:
        return {find_source(encoders, os.fspath(image) if isinstance(image, os.PathLike) else image): image}
    except MmxError:
        return {}


def _content(encoders: Encoders, source: str, raw: Any) -> Hashable | None:
    """The bytes of one input in short; a text is itself."""
    if isinstance(raw, bytes):
        return "", _digest(raw)
    if source in encoders and encoders[source].modality == "text":
        return raw if isinstance(raw, str) else None
    if _size(raw) is None:
        return None
    try:
        with open(raw, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    except OSError:
        return None
    return os.path.splitext(os.fsdecode(raw))[1].lower(), digest


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _sizes(image: Any) -> Hashable | None:
    """The sizes of the files of an input; None where one is no file."""
    if isinstance(image, Mapping):
        return tuple((name, raw if _size(raw) is None else _size(raw)) for name, raw in image.items() if _plain(raw))
    return _size(image)


def _plain(raw: Any) -> bool:
    return isinstance(raw, str | bytes | os.PathLike)


def _size(raw: Any) -> int | None:
    """Bytes of a regular file that is not too large to be looked at."""
    if isinstance(raw, bytes):
        return len(raw)
    try:
        status = os.stat(raw) if isinstance(raw, str | os.PathLike) else None
    except (OSError, ValueError):
        return None
    return status.st_size if status and stat.S_ISREG(status.st_mode) and status.st_size <= LARGEST else None
