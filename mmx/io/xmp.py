"""XMP sidecars: the description of an image (`dc:description`, language x-default) in a small XML file next to it.

Follows the XMP specification, ISO 16684-1. An existing file is changed at one place only, in its bytes: all other
fields, comments, prefixes and the packet wrapper stay exactly as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from xml.parsers.expat import ExpatError, ParserCreate
from xml.sax.saxutils import escape

from mmx.errors import DataError

MAX_BYTES = 2**24  # far more than any sidecar has

_DC = "http://purl.org/dc/elements/1.1/"
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_XML = "http://www.w3.org/XML/1998/namespace"
_ROOT = f"{_RDF} RDF"
_NODE = f"{_RDF} Description"
_DESCRIPTION = f"{_DC} description"
_LANGUAGE = f"{_XML} lang"

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0 has no such characters
_DECLARATION = re.compile(rb"<!\s*(DOCTYPE|ENTITY)")  # XMP has none; entities may expand without limit
_TAG = re.compile(rb"""<[^"'>]*(?:"[^"]*"[^"'>]*|'[^']*'[^"'>]*)*>""")

_EMPTY_FILE = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="{_RDF}">
  <rdf:Description rdf:about="" xmlns:dc="{_DC}">
   <dc:description><rdf:Alt><rdf:li xml:lang="x-default"></rdf:li></rdf:Alt></dc:description>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
""".encode()


def has_only_xml_characters(text: str) -> bool:
    """Return whether a text can be stored in XML at all: without NUL, most control characters, lone surrogates."""
    return _NOT_XML.search(text) is None


def read_description(content: bytes) -> str | None:
    """Return the description in an XMP file; None if it has none. Raises DataError."""
    item = _parse(content).default_item
    return None if item is None else "".join(item.text)


def set_description(content: bytes | None, text: str) -> bytes:
    """Return an XMP file with this description, all else as it was. None stands for a new file. Raises DataError."""
    data = _EMPTY_FILE if content is None else content
    found = _parse(data)
    value = escape(text).encode()
    if found.default_item is not None:
        return _replace_content(data, found.default_item, value)
    item = b'<rdf:li xmlns:rdf="%s" xml:lang="x-default">%s</rdf:li>' % (_RDF.encode(), value)
    if found.alternatives is not None:
        return _insert_first(data, found.alternatives, item)
    alternatives = b'<rdf:Alt xmlns:rdf="%s">%s</rdf:Alt>' % (_RDF.encode(), item)
    if found.description is not None:
        return _replace_content(data, found.description, alternatives)
    description = b'<dc:description xmlns:dc="%s">%s</dc:description>' % (_DC.encode(), alternatives)
    if found.node is not None:
        return _insert_first(data, found.node, description)
    if found.root is None:
        raise _error("not_xmp", "it has no rdf:RDF element; expected an XMP file")
    node = b'<rdf:Description xmlns:rdf="%s" rdf:about="">%s</rdf:Description>' % (_RDF.encode(), description)
    return _insert_first(data, found.root, node)


@dataclass
class _Element:
    """An element by the byte offsets of its two tags, and the text in it."""

    start: int
    end: int = 0
    text: list[str] = field(default_factory=list)


@dataclass
class _Found:
    """The elements on the way to a description: the first of each kind."""

    root: _Element | None = None
    node: _Element | None = None
    description: _Element | None = None
    alternatives: _Element | None = None
    default_item: _Element | None = None


class _Reader:
    """Finds the elements while the file is parsed. `path` and `open` are the names and elements that are open."""

    def __init__(self) -> None:
        self.found = _Found()
        self.path: list[str] = []
        self.open: list[_Element] = []
        self.parser = ParserCreate(encoding="utf-8", namespace_separator=" ")
        self.parser.StartElementHandler = self.start
        self.parser.EndElementHandler = self.end
        self.parser.CharacterDataHandler = self.characters

    def start(self, name: str, attributes: dict[str, str]) -> None:
        element = _Element(self.parser.CurrentByteIndex)
        self.path.append(name)
        self.open.append(element)
        found = self.found
        parents = self.path[-5:-1]
        if name == _ROOT and found.root is None:
            found.root = element
        elif name == _NODE and parents[-1:] == [_ROOT] and found.node is None:
            found.node = element
        elif name == _DESCRIPTION and parents[-2:] == [_ROOT, _NODE] and found.description is None:
            found.description = element
        elif parents[-3:] == [_ROOT, _NODE, _DESCRIPTION] and name == f"{_RDF} Alt" and found.alternatives is None:
            found.alternatives = element
        elif parents == [_ROOT, _NODE, _DESCRIPTION, f"{_RDF} Alt"] and found.default_item is None:
            is_default = attributes.get(_LANGUAGE, "").lower() == "x-default"
            found.default_item = element if is_default else None

    def end(self, name: str) -> None:
        self.path.pop()
        self.open.pop().end = self.parser.CurrentByteIndex

    def characters(self, text: str) -> None:
        if self.open and self.open[-1] is self.found.default_item:
            self.open[-1].text.append(text)


def _parse(data: bytes) -> _Found:
    """Find the elements in an XMP file. Raises DataError."""
    if len(data) > MAX_BYTES:
        raise _error("too_large", f"over {MAX_BYTES // 2**20} MB; expected an XMP file")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        raise _error("not_utf8", "it is not UTF-8; expected an XMP file in UTF-8") from None
    if _DECLARATION.search(data):
        raise _error("document_type", "it declares a document type or entities; expected an XMP file without them")
    reader = _Reader()
    try:
        reader.parser.Parse(data, True)
    except ExpatError as error:
        raise _error("damaged", f"damaged XML in line {error.lineno}; expected a complete XMP file") from None
    return reader.found


def _tag_end(data: bytes, start: int) -> int:
    match = _TAG.match(data, start)
    if match is None:
        raise _error("damaged", "a tag has no end; expected a complete XMP file")
    return match.end()


def _insert_first(data: bytes, element: _Element, child: bytes) -> bytes:
    """Return the file with a child at the start of an element."""
    end = _tag_end(data, element.start)
    if data[:end].endswith(b"/>"):
        return _open_empty_tag(data, element.start, end, child)
    return data[:end] + child + data[end:]


def _replace_content(data: bytes, element: _Element, content: bytes) -> bytes:
    end = _tag_end(data, element.start)
    if data[:end].endswith(b"/>"):
        return _open_empty_tag(data, element.start, end, content)
    return data[:end] + content + data[element.end :]


def _open_empty_tag(data: bytes, start: int, end: int, content: bytes) -> bytes:
    """Return the file with content in an element that was written as one tag, such as <rdf:li/>."""
    name = re.split(rb"[\s/>]", data[start + 1 : end], maxsplit=1)[0]
    return data[: end - 2] + b">" + content + b"</" + name + b">" + data[end:]


def _error(reason: str, problem: str) -> DataError:
    """The caller adds the name of the file, which begins the sentence."""
    return DataError(f"{problem}; correct or delete the file.", code=f"xmp.{reason}")
