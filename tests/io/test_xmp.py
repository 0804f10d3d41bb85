"""XMP sidecars: the description is set, and every other byte stays."""

import xml.etree.ElementTree as ET

import pytest

from mmx.errors import DataError
from mmx.io import xmp

RDF_NAMESPACE = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
HEAD = (
    '<?xpacket begin="\ufeff" id="x"?>\r\n<!-- mine --><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    f'<r:RDF xmlns:r="{RDF_NAMESPACE}">'
)
TAIL = "</r:RDF></x:xmpmeta>\n<?xpacket end='w'?>  "
NODE = """<r:Description r:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating = '4' xmp:Label=">a/>">"""


def document(inside):
    return f"{HEAD}{inside}{TAIL}".encode()


def described(inside):
    opened = '<d:description xmlns:d="http://purl.org/dc/elements/1.1/">'
    return f"{NODE}{opened}{inside}</d:description><xmp:Tool>ü</xmp:Tool></r:Description>"


GERMAN = '<r:li xml:lang="de">alt</r:li>'
CASES = {
    "no description": f"{NODE}<xmp:Tool>ü</xmp:Tool></r:Description>",
    "one tag": NODE[:-1] + "/>",
    "no node": "",
    "old text": described(f'<r:Alt><r:li xml:lang="x-default">old &amp; &lt;x&gt;</r:li>{GERMAN}</r:Alt>'),
    "empty item": described(f'<r:Alt>{GERMAN}<r:li xml:lang="x-default"/></r:Alt>'),
    "other language": described(f"<r:Alt>{GERMAN}</r:Alt>"),
    "empty alternatives": described("<r:Alt/>"),
    "plain text": described("old"),
    "second node": NODE + "</r:Description>" + described('<r:Alt><r:li xml:lang="X-Default">old</r:li></r:Alt>'),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("text", ["a cat", 'é <b> & "c" 犬', ""])
def test_only_the_description_changes(name, text):
    before = document(CASES[name])
    after = xmp.set_description(before, text)
    assert xmp.read_description(after) == text
    ET.fromstring(after.strip())
    again = xmp.set_description(after, "other")
    assert xmp.set_description(again, text) == after
    start = next(i for i in range(len(before)) if before[: i + 1] != after[: i + 1])
    for kept in ("<!-- mine -->", "<?xpacket end='w'?>  ", "<r:RDF", "xmp:Rating = '4'"):
        assert (kept in after.decode()) == (kept in before.decode())
    assert after.startswith(before[:start])
    assert ('xml:lang="de">alt<' in after.decode()) == ('xml:lang="de">alt<' in before.decode())
    if "ü" in before.decode():
        tail = before[before.index(b"<xmp:Tool>") :]
        assert after.endswith(tail)


def test_a_new_file_has_the_description_only():
    content = xmp.set_description(None, "a <cat>")
    assert xmp.read_description(content) == "a <cat>"
    items = list(ET.fromstring(content.strip()).iter(f"{{{RDF_NAMESPACE}}}li"))
    assert [item.text for item in items] == ["a <cat>"]


def test_an_old_text_is_read_with_its_entities():
    assert xmp.read_description(document(CASES["old text"])) == "old & <x>"
    assert xmp.read_description(document(CASES["no description"])) is None


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "xmp.damaged"),
        (document(CASES["old text"])[:-30], "xmp.damaged"),
        (b"<html/>", "xmp.not_xmp"),
        ('<?xml version="1.0" encoding="utf-16"?><a/>'.encode("utf-16"), "xmp.not_utf8"),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "xmp.document_type"),
        (b" " * (xmp.MAX_BYTES + 1), "xmp.too_large"),
    ],
)
def test_a_file_that_is_not_xmp_is_refused(content, code):
    with pytest.raises(DataError) as caught:
        xmp.set_description(content, "a")
    assert caught.value.code == code


def test_characters_that_xml_cannot_hold_are_found():
    assert xmp.has_only_xml_characters("é\t\n犬 \U0001f408")
    for character in "\0\x1b\ud800\uffff":
        assert not xmp.has_only_xml_characters(f"a{character}")
