"""The documentation matches the code: generated pages, links, options of commands, and Python examples."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from mmx.cli.app import app
from mmx.config.schema import DataConfig

ROOT = Path(__file__).parents[2]
CARD = ROOT / "mmx" / "models" / "bundled" / "README.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", CARD, *sorted((ROOT / "docs").glob("*.md"))]
WITH_EXAMPLES = ["python.md", "interpretation.md"]
CODE = re.compile(r"[a-z_*]+(\.[a-z0-9_*]+)+")


def reference():
    """The script docs/reference.py as a module."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["configuration.md", "error-codes.md"])
def test_generated_pages_are_up_to_date(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert text == reference().PAGES[page](), "run: python docs/reference.py"


def test_error_codes_are_dotted_lower_case():
    codes = reference().codes_in_source()
    assert len(codes) > 50
    assert [code for code in codes if not CODE.fullmatch(code)] == []


def anchors(path):
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def commands_of(path):
    """Every line `    mmx ...` of a page, as words."""
    lines = re.findall(r"^    (?:.* -m )?(mmx .*)$", path.read_text(encoding="utf-8"), re.M)
    return [shlex.split(line) for line in lines]


def find_command(words):
    """The command that words call, and its remaining words."""
    command = typer.main.get_command(app)
    rest = words[1:]
    while hasattr(command, "commands") and rest and rest[0] in command.commands:
        command = command.commands[rest[0]]
        rest = rest[1:]
    return command, rest


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_have_the_options_shown(path):
    for words in commands_of(path):
        command, rest = find_command(words)
        if words[1:] == ["COMMAND", "--help"]:
            continue
        assert command.name not in (None, "mmx"), words
        known = {option for parameter in command.params for option in parameter.opts}
        used = {word for word in rest if word.startswith("-")}
        assert used <= known | {"--help"}, (words, used - known)


def test_overrides_of_data_exist():
    for path in PAGES:
        for words in commands_of(path):
            if words[1] == "eval":
                keys = {word.partition("=")[0] for word in words[2:] if re.match(r"[a-z_]+=", word)}
                assert keys <= set(DataConfig.model_fields), words


def test_every_command_is_documented():
    documented = {words[1] for words in commands_of(ROOT / "docs" / "commands.md")}
    assert documented == set(typer.main.get_command(app).commands)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_python_examples_run(name, monkeypatch, tmp_path, capsys):
    """The blocks of a page, in order, in one namespace."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demos").symlink_to(ROOT / "demos")
    namespace = {}
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)  # noqa: S102 (our own documentation)
    assert len(capsys.readouterr().out.splitlines()) >= 3


def test_the_model_card_has_front_matter():
    _, front_matter, body = CARD.read_text(encoding="utf-8").split("---\n", 2)
    fields = yaml.safe_load(front_matter)
    assert fields["license"] == "apache-2.0"
    assert fields["language"] == ["en"]
    assert fields["pipeline_tag"] == "image-to-text"
    assert fields["datasets"]
    assert fields["metrics"]
    assert body.lstrip().startswith("# ")


def test_no_placeholder_is_left():
    assert [path.name for path in PAGES if "@@" in path.read_text(encoding="utf-8")] == []
