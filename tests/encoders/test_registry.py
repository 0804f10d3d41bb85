"""Names to encoders: built-ins, addresses, and packages of strangers, of which any may be broken in any way."""

import subprocess
import sys

import pytest

from mmx.encoders.image import ImageEncoder
from mmx.encoders.registry import BUILT_IN, describe, entries, resolve
from mmx.encoders.text import TextEncoder
from mmx.errors import EncoderError
from mmx.testing import ToyEncoder, tiny_model

GOOD = """
from mmx.testing import ToyEncoder
class Ear(ToyEncoder):
    modality = "audio"
"""
BARE = "from mmx.encoders.base import Encoder\nclass Ear(Encoder): "
BROKEN = {  # what the module holds: what is said of it
    "import nowhere_to_be_found": "cannot be imported: ModuleNotFoundError: No module named 'nowhere_to_be_found'",
    "def f(:": "cannot be imported: SyntaxError",
    "raise SystemExit(3)": "cannot be imported: SystemExit: 3",
    "raise RuntimeError('two\\nlines')": "cannot be imported: RuntimeError: two lines",
    "1 / 0": "cannot be imported: ZeroDivisionError",
    "pass": "cannot be imported: AttributeError",
    "Ear = 3": "no subclass of mmx.Encoder",
    "class Ear: modality = 'audio'": "no subclass of mmx.Encoder",
    BARE + "pass": "states no modality",
    BARE + "modality = 7": "states no modality",
    BARE + "modality = 'audio'": "defines no prepare and no forward",
    GOOD + "    forward = __import__('mmx').encoders.base.Encoder.forward": "defines no forward",
    GOOD + "    Options = dict": "has Options that are no pydantic model",
    GOOD + "    Options = None": "has Options that are no pydantic model",
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package on the path as an installer would: its module, and the dist-info that claims names for it."""
    monkeypatch.delenv("MMX_PLUGINS", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    modules = []

    def put(package, source, names, points=None):
        (tmp_path / f"{package}.py").write_text(source)
        modules.append(package)
        info = tmp_path / f"{package}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        lines = points or "\n".join(f"{name} = {package}:Ear" for name in names)
        (info / "entry_points.txt").write_text(f"[mmx.encoders]\n{lines}\n")

    yield put
    for module in modules:
        sys.modules.pop(module, None)


def all_described():
    on_offer = entries()
    return [describe(entry, on_offer) for entry in on_offer]


def described():
    return {(found.entry.name, found.entry.package): found for found in all_described()}


def test_built_ins_come_through_the_same_door():
    assert resolve("image") is ImageEncoder
    assert resolve("text") is TextEncoder
    assert set(BUILT_IN) == {"image", "pretrained", "text"}
    found = described()
    assert found["image", "mmx"].modality == "image"
    assert found["image", "mmx"].options["stage"] is None
    assert found["text", "mmx"].options["hidden_size"] == 256
    assert found["text", "mmx"].problem is None


def test_an_address_typed_directly():
    assert resolve("mmx.testing:ToyEncoder") is ToyEncoder
    assert tiny_model({"x": "mmx.testing:ToyEncoder"}).encoder("x").width == 8


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("no.such:Thing", "ModuleNotFoundError"),
        ("mmx.testing:Nothing", "AttributeError"),
        ("mmx.testing:", "AttributeError"),
        (":Ear", "ValueError"),
        ("mmx.testing:toy_tokenizer", "no subclass"),
        ("mmx.encoders.base:Encoder", "states no modality"),
    ],
)
def test_an_address_that_leads_nowhere(address, said):
    with pytest.raises(EncoderError, match=said) as caught:
        resolve(address)
    assert repr(address) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_slip_of_the_finger_gets_the_nearest_name():
    with pytest.raises(EncoderError, match="there is no encoder 'imge'; did you mean 'image'?"):
        resolve("imge")
    with pytest.raises(EncoderError, match="there is no encoder 'qqqq'; known: .*image.*text"):
        resolve("qqqq")


def test_a_good_plugin_is_found_described_and_mounted(install):
    install("earpack", GOOD, ["ear"])
    assert "earpack" not in sys.modules
    assert ("ear", "earpack:Ear", "earpack", "1.2") in [(e.name, e.address, e.package, e.version) for e in entries()]
    assert "earpack" not in sys.modules, "listing imports nothing"
    model = tiny_model({"sound": "ear"})
    assert type(model.encoder("sound")).__name__ == "Ear"
    found = described()["ear", "earpack"]
    assert (found.modality, found.options, found.problem) == ("audio", {"features": 8}, None)


def test_options_that_must_be_given_are_shown_as_such(install):
    install(
        "needy",
        GOOD + "    class Options(ToyEncoder.Options):\n        path: str\n        more: list = []\n",
        ["needy"],
    )
    assert described()["needy", "needy"].options == {"features": 8, "path": "(required)", "more": []}


def test_a_class_inside_a_class(install):
    install("nested", GOOD + "class Box:\n    Inner = Ear\n", [], points="inner = nested:Box.Inner")
    assert resolve("inner").modality == "audio"


@pytest.mark.parametrize("source", BROKEN, ids=list(BROKEN.values()))
def test_a_broken_plugin_is_listed_with_its_reason_and_stops_nothing(install, source):
    install("wreck", source, ["wreck"])
    install("earpack", GOOD, ["ear"])
    with pytest.raises(EncoderError) as caught:
        resolve("wreck")
    assert str(caught.value).startswith("encoder 'wreck' (wreck 1.2) ")
    assert BROKEN[source] in str(caught.value)
    assert "\n" not in str(caught.value)
    found = described()
    assert found["wreck", "wreck"].problem == str(caught.value)
    assert [found[name].problem for name in [("image", "mmx"), ("text", "mmx"), ("ear", "earpack")]] == [None] * 3
    assert resolve("ear").modality == "audio"


def test_an_interrupt_is_not_swallowed(install):
    install("rude", "raise KeyboardInterrupt", ["rude"])
    for ask in (lambda: resolve("rude"), all_described):
        with pytest.raises(KeyboardInterrupt):
            ask()


def test_a_built_in_wins_and_the_clash_is_named(install):
    install("impostor", GOOD, ["image"])
    assert resolve("image") is ImageEncoder
    found = described()
    assert found["image", "mmx"].problem is None
    problem = found["image", "impostor"].problem
    assert "'image' is claimed by mmx (mmx.encoders.image:ImageEncoder), impostor (impostor:Ear)" in problem


def test_two_packages_with_one_name_are_both_named(install):
    install("earpack", GOOD, ["ear"])
    install("otology", GOOD, ["ear", "drum"])
    with pytest.raises(EncoderError, match=r"'ear' is claimed by earpack \(earpack:Ear\), otology \(otology:Ear\)"):
        resolve("ear")
    found = described()
    assert found["ear", "earpack"].problem == found["ear", "otology"].problem
    assert "type the address" in found["ear", "earpack"].problem
    assert resolve("drum").modality == "audio"
    assert resolve("otology:Ear").modality == "audio"


@pytest.mark.parametrize(
    ("allowed", "names"),
    [(None, {"ear", "wreck"}), ("", set()), ("ear", {"ear"}), (" ear , wreck", {"ear", "wreck"}), ("else", set())],
)
def test_the_allow_list(install, monkeypatch, allowed, names):
    install("earpack", GOOD, ["ear"])
    install("wreck", "1 / 0", ["wreck"])
    if allowed is not None:
        monkeypatch.setenv("MMX_PLUGINS", allowed)
    offered = {entry.name for entry in entries() if entry.package in ("earpack", "wreck")}
    assert offered == names
    assert {"image", "text"} <= {entry.name for entry in entries()}
    assert (("wreck", "wreck") in described()) == ("wreck" in names)
    if "ear" not in names:
        with pytest.raises(EncoderError, match="there is no encoder 'ear'"):
            resolve("ear")


def test_a_package_whose_own_papers_are_damaged_stops_nothing(install, tmp_path):
    install("earpack", GOOD, ["ear"])
    (tmp_path / "torn-0.dist-info").mkdir()
    (tmp_path / "torn-0.dist-info" / "entry_points.txt").write_text("[mmx.encoders]\ntorn = torn:Ear\n")
    install("garbled", GOOD, [], points="this is no entry point")
    assert resolve("ear").modality == "audio"
    assert resolve("image") is ImageEncoder
    assert described()["ear", "earpack"].problem is None


@pytest.mark.slow
def test_importing_the_registry_imports_no_encoder():
    code = (
        "import sys, mmx.encoders.registry as r; r.entries(); print({'timm', 'mmx.encoders.image'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "set()\n"
