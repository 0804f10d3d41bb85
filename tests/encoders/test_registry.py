"""Names to encoders: built-ins, addresses, and third-party packages, any of which may be broken."""

import subprocess
import sys

import pytest

from mmx.encoders.base import CONTRACT_VERSION
from mmx.encoders.image import ImageEncoder
from mmx.encoders.registry import BUILT_IN, describe, entries, resolve
from mmx.encoders.text import TextEncoder
from mmx.errors import EncoderError
from mmx.testing import ToyEncoder, tiny_model

GOOD = """
from mmx.testing import ToyEncoder
class Plugin(ToyEncoder):
    modality = "audio"
"""
BARE = "from mmx.encoders.base import Encoder\nclass Plugin(Encoder): "
BROKEN = {  # code of a module: the problem
    "import nowhere_to_be_found": "cannot be imported: ModuleNotFoundError: No module named 'nowhere_to_be_found'",
    "def f(:": "cannot be imported: SyntaxError",
    "raise SystemExit(3)": "cannot be imported: SystemExit: 3",
    "raise RuntimeError('two\\nlines')": "cannot be imported: RuntimeError: two lines",
    "1 / 0": "cannot be imported: ZeroDivisionError",
    "pass": "cannot be imported: AttributeError",
    "Plugin = 3": "no subclass of mmx.Encoder",
    "class Plugin: modality = 'audio'": "no subclass of mmx.Encoder",
    BARE + "pass": "states no modality",
    BARE + "modality = 7": "states no modality",
    BARE + "modality = 'audio'": "defines no prepare and no forward",
    GOOD + "    forward = __import__('mmx').encoders.base.Encoder.forward": "defines no forward",
    GOOD + "    Options = dict": "has Options that are no pydantic model",
    GOOD + "    Options = None": "has Options that are no pydantic model",
    GOOD + "    contract_version = 2": "states contract_version 2",
    GOOD + "    contract_version = '1'": "states contract_version '1'",
    GOOD + "    contract_version = None": "states contract_version None",
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install packages as pip does: a module, and its metadata with entry points."""
    monkeypatch.delenv("MMX_PLUGINS", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    modules = []

    def install_package(package, source, names, points=None):
        (tmp_path / f"{package}.py").write_text(source)
        modules.append(package)
        info = tmp_path / f"{package}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        lines = points or "\n".join(f"{name} = {package}:Plugin" for name in names)
        (info / "entry_points.txt").write_text(f"[mmx.encoders]\n{lines}\n")

    yield install_package
    for module in modules:
        sys.modules.pop(module, None)


def describe_all():
    """(name, package) to description."""
    all_entries = entries()
    return {(entry.name, entry.package): describe(entry, all_entries) for entry in all_entries}


def test_built_ins_are_resolved_and_described():
    assert resolve("image") is ImageEncoder
    assert resolve("text") is TextEncoder
    assert set(BUILT_IN) == {"image", "pretrained", "text"}
    found = describe_all()
    assert found["image", "mmx"].modality == "image"
    assert found["image", "mmx"].options["stage"] is None
    assert found["text", "mmx"].options["hidden_size"] == 256
    assert found["text", "mmx"].problem is None


def test_address_is_resolved():
    assert resolve("mmx.testing:ToyEncoder") is ToyEncoder
    assert tiny_model({"x": "mmx.testing:ToyEncoder"}).encoder("x").width == 8


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("no.such:Thing", "ModuleNotFoundError"),
        ("mmx.testing:Nothing", "AttributeError"),
        ("mmx.testing:", "AttributeError"),
        (":Plugin", "ValueError"),
        ("mmx.testing:toy_tokenizer", "no subclass"),
        ("mmx.encoders.base:Encoder", "states no modality"),
    ],
)
def test_invalid_address_is_an_error(address, problem):
    with pytest.raises(EncoderError, match=problem) as caught:
        resolve(address)
    assert repr(address) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(EncoderError, match="did you mean 'image'") as caught:
        resolve("imge")
    assert (caught.value.code, caught.value.details["encoder"]) == ("encoder.unknown", "imge")
    with pytest.raises(EncoderError) as caught:
        resolve("qqqq")
    assert {"image", "pretrained", "text"} <= set(caught.value.details["known"])


def test_plugin_is_found_described_and_used(install):
    install("first", GOOD, ["plugin"])
    assert "first" not in sys.modules
    assert ("plugin", "first:Plugin", "first", "1.2") in [(e.name, e.address, e.package, e.version) for e in entries()]
    assert "first" not in sys.modules, "listing imports nothing"
    model = tiny_model({"audio": "plugin"})
    assert type(model.encoder("audio")).__name__ == "Plugin"
    found = describe_all()["plugin", "first"]
    assert (found.modality, found.options, found.problem) == ("audio", {"features": 8}, None)


def test_required_options_are_described(install):
    install(
        "with_required",
        GOOD + "    class Options(ToyEncoder.Options):\n        path: str\n        more: list = []\n",
        ["with_required"],
    )
    assert describe_all()["with_required", "with_required"].options == {"features": 8, "path": "(required)", "more": []}


def test_nested_class_is_resolved(install):
    install("nested", GOOD + "class Box:\n    Inner = Plugin\n", [], points="inner = nested:Box.Inner")
    assert resolve("inner").modality == "audio"


@pytest.mark.parametrize("source", BROKEN, ids=list(BROKEN.values()))
def test_broken_plugin_is_described_and_affects_no_other(install, source):
    install("broken", source, ["broken"])
    install("first", GOOD, ["plugin"])
    with pytest.raises(EncoderError) as caught:
        resolve("broken")
    assert str(caught.value).startswith("encoder 'broken' (broken 1.2) ")
    assert BROKEN[source] in str(caught.value)
    assert "\n" not in str(caught.value)
    found = describe_all()
    assert found["broken", "broken"].problem == str(caught.value)
    assert [found[name].problem for name in [("image", "mmx"), ("text", "mmx"), ("plugin", "first")]] == [None] * 3
    assert resolve("plugin").modality == "audio"


def test_the_contract_version_is_checked(install, monkeypatch):
    install("stating", GOOD + f"    contract_version = {CONTRACT_VERSION}\n", ["stating"])
    install("silent", GOOD, ["silent"])
    assert resolve("stating").contract_version == resolve("silent").contract_version == CONTRACT_VERSION
    monkeypatch.setattr("mmx.encoders.registry.CONTRACT_VERSION", CONTRACT_VERSION + 1)
    with pytest.raises(EncoderError) as caught:
        resolve("stating")
    assert caught.value.code == "encoder.contract_version"
    assert caught.value.details == {"encoder": "Plugin", "given": CONTRACT_VERSION, "expected": CONTRACT_VERSION + 1}
    assert describe_all()["stating", "stating"].problem == str(caught.value)


def test_keyboard_interrupt_is_raised(install):
    install("interrupting", "raise KeyboardInterrupt", ["interrupting"])
    for call in (lambda: resolve("interrupting"), describe_all):
        with pytest.raises(KeyboardInterrupt):
            call()


def test_built_in_has_precedence_over_a_plugin_of_the_same_name(install):
    install("namesake", GOOD, ["image"])
    assert resolve("image") is ImageEncoder
    found = describe_all()
    assert found["image", "mmx"].problem is None
    problem = found["image", "namesake"].problem
    assert "'image' is claimed by mmx (mmx.encoders.image:ImageEncoder), namesake (namesake:Plugin)" in problem


def test_conflict_names_both_packages(install):
    install("first", GOOD, ["plugin"])
    install("second", GOOD, ["plugin", "other"])
    with pytest.raises(EncoderError, match=r"first \(first:Plugin\), second \(second:Plugin\)") as caught:
        resolve("plugin")
    assert (caught.value.code, caught.value.details["encoder"]) == ("encoder.name_conflict", "plugin")
    found = describe_all()
    assert found["plugin", "first"].problem == found["plugin", "second"].problem
    assert "type the address" in found["plugin", "first"].problem
    assert resolve("other").modality == "audio"
    assert resolve("second:Plugin").modality == "audio"


@pytest.mark.parametrize(
    ("allowed", "names"),
    [
        (None, {"plugin", "broken"}),
        ("", set()),
        ("plugin", {"plugin"}),
        (" plugin , broken", {"plugin", "broken"}),
        ("another", set()),
    ],
)
def test_allowed_plugins(install, monkeypatch, allowed, names):
    install("first", GOOD, ["plugin"])
    install("broken", "1 / 0", ["broken"])
    if allowed is not None:
        monkeypatch.setenv("MMX_PLUGINS", allowed)
    offered = {entry.name for entry in entries() if entry.package in ("first", "broken")}
    assert offered == names
    assert {"image", "text"} <= {entry.name for entry in entries()}
    assert (("broken", "broken") in describe_all()) == ("broken" in names)
    if "plugin" not in names:
        with pytest.raises(EncoderError) as caught:
            resolve("plugin")
        assert caught.value.code == "encoder.unknown"


def test_package_with_damaged_metadata_affects_no_other(install, tmp_path):
    install("first", GOOD, ["plugin"])
    (tmp_path / "torn-0.dist-info").mkdir()
    (tmp_path / "torn-0.dist-info" / "entry_points.txt").write_text("[mmx.encoders]\ntorn = torn:Plugin\n")
    install("garbled", GOOD, [], points="this is no entry point")
    assert resolve("plugin").modality == "audio"
    assert resolve("image") is ImageEncoder
    assert describe_all()["plugin", "first"].problem is None


@pytest.mark.slow
def test_importing_the_registry_imports_no_encoder():
    code = (
        "import sys, mmx.encoders.registry as r; r.entries(); print({'timm', 'mmx.encoders.image'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "set()\n"
