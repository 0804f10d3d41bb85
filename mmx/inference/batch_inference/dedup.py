"""Deduplication: inputs with the same bytes are encoded once, whatever their names."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Mapping

from mmx.errors import MmxError
from mmx.inference.generator import TextGenerator
from mmx.inference.outputs import GeneratedText, ModelInput
from mmx.io.files import StoredBytes
from mmx.models.source import Encoders, find_source

CACHE_SIZE = 8192  # results kept: about 25 MB with the scores of their tokens
MAX_HASHED_BYTES = 256 * 2**20  # larger files are not compared


class ResultCache:
    """Results by the key of their input. The most recently added `max_size` keys are kept."""

    def __init__(self, max_size: int = CACHE_SIZE) -> None:
        self.max_size = max_size
        self.results: OrderedDict[Hashable, GeneratedText | None] = OrderedDict()  # None: added, no result yet

    def add(self, key: Hashable | None) -> bool:
        """Add a key; return whether it is new. `None`, an input without a key, always is."""
        if key is None:
            return True
        if key in self.results:
            self.results.move_to_end(key)
            return False
        self._put(key, None)
        return True

    def store(self, key: Hashable | None, result: GeneratedText | MmxError) -> None:
        """Keep a result. Errors are not kept, because they name one file and its duplicates have other names."""
        if key is not None and isinstance(result, GeneratedText):
            self._put(key, result)

    def get(self, key: Hashable | None) -> GeneratedText | None:
        """Return the result of a key, or None."""
        return self.results.get(key)

    def _put(self, key: Hashable, result: GeneratedText | None) -> None:
        self.results[key] = result
        while len(self.results) > self.max_size:
            self.results.popitem(last=False)


def content_key(generator: TextGenerator, image: ModelInput | MmxError) -> Hashable | None:
    """Return a key that inputs of the same bytes share; None for an input without bytes, such as an opened image.

    The suffix of a file name is part of the key, because an encoder may depend on it.
    """
    encoders = generator.model.encoders
    parts: list[tuple[str, Hashable]] = []
    for name, raw in _by_source(encoders, image).items():
        content = _content(encoders, name, raw)
        if content is None:
            return None
        parts.append((name, content))
    return tuple(parts) or None


def content_keys(generator: TextGenerator, images: Iterable[ModelInput]) -> dict[Hashable, Hashable]:
    """Return `identity_key` of each input -> the key that inputs of the same bytes share.

    Only files of equal size are read for it.
    """
    distinct = {identity_key(image): image for image in images}
    sizes = {identity: _sizes(image) for identity, image in distinct.items()}
    count_by_size = Counter(sizes.values())
    keys: dict[Hashable, Hashable] = {}
    for identity, image in distinct.items():
        size = sizes[identity]
        content = None
        if size is not None and count_by_size[size] > 1:
            content = content_key(generator, image)
        keys[identity] = identity if content is None else content
    return keys


def identity_key(image: object) -> Hashable:
    """Return a key that mentions of one input share: equal paths, texts or bytes, or the same object."""
    if isinstance(image, Mapping):
        return tuple((name, identity_key(raw)) for name, raw in image.items())
    if isinstance(image, os.PathLike):
        return os.fspath(image)
    if isinstance(image, str | bytes | StoredBytes):
        return image
    return id(image)


def _by_source(encoders: Encoders, image: object) -> Mapping[str, object]:
    if isinstance(image, Mapping):
        return image
    if isinstance(image, os.PathLike):
        image = os.fspath(image)
    if not isinstance(image, str | bytes):
        return {}
    try:
        return {find_source(encoders, image): image}
    except MmxError:
        return {}


def _content(encoders: Encoders, source: str, raw: object) -> Hashable | None:
    """A digest of the bytes of one input; a text is its own key."""
    if isinstance(raw, bytes):
        return "", hashlib.blake2b(raw, digest_size=16).digest()
    if source in encoders and encoders[source].modality == "text":
        return raw if isinstance(raw, str) else None
    if not isinstance(raw, str | os.PathLike) or _size(raw) is None:
        return None
    try:
        with open(raw, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    except OSError:
        return None
    return os.path.splitext(os.fsdecode(raw))[1].lower(), digest


def _sizes(image: object) -> Hashable | None:
    """The file sizes of an input; None if it is not a file."""
    if not isinstance(image, Mapping):
        return _size(image)
    sizes: list[tuple[str, Hashable]] = []
    for name, raw in image.items():
        if isinstance(raw, str | bytes | os.PathLike):
            size = _size(raw)
            sizes.append((name, identity_key(raw) if size is None else size))
    return tuple(sizes)


def _size(raw: object) -> int | None:
    """Bytes of an input that is bytes or a regular file of at most MAX_HASHED_BYTES."""
    if isinstance(raw, bytes):
        return len(raw)
    if not isinstance(raw, str | os.PathLike):
        return None
    try:
        status = os.stat(raw)
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_HASHED_BYTES else None
