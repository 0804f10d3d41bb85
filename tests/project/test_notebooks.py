"""Notebooks: short, without outputs, and (marker `notebooks`) executed with the figures that they name."""

import re
import shutil
import time
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parent.parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_CELLS, MAX_LINES, MAX_FIGURE_BYTES = 6, 14, 150_000
CELL_TIMEOUT = 600  # seconds, enough for a busy machine
FIGURE = re.compile(r"figures/[\w.-]+\.png")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def figures(notebook):
    """Figures named in the code, as paths relative to notebooks/."""
    return sorted({name for cell in code_cells(notebook) for name in FIGURE.findall(cell.source)})


def test_notebooks_are_numbered():
    numbers = [int(path.stem[:2]) for path in NOTEBOOKS]
    assert numbers == list(range(1, len(NOTEBOOKS) + 1))
    assert len(numbers) >= 4


@every_notebook
def test_the_format_is_valid_and_there_are_no_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(cell.outputs == [] for cell in code_cells(notebook))
    assert all(cell.execution_count is None for cell in code_cells(notebook))
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[\w-]{2,32}", cell_id) for cell_id in ids)


@every_notebook
def test_the_first_cell_has_a_title_and_the_claim(path):
    first = read(path).cells[0]
    title, _, claim = first.source.partition("\n")
    assert first.cell_type == "markdown"
    assert re.match(r"# \S", title)
    assert len(claim.split()) >= 8
    assert "." in claim


@every_notebook
def test_cells_are_short_and_something_is_asserted(path):
    cells = code_cells(read(path))
    assert 3 <= len(cells) <= MAX_CELLS
    lines = [line for cell in cells for line in cell.source.splitlines()]
    assert max(sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in cells) <= MAX_LINES
    assert any(line.lstrip().startswith("assert ") for line in lines)
    assert all(len(line) <= 120 for line in lines)


@every_notebook
def test_there_are_no_network_addresses_and_absolute_paths(path):
    source = "\n".join(cell.source for cell in read(path).cells)
    assert not re.search(r"https?://|/home/|/tmp/|/root/|pip install|^!|^%", source, re.M)


@every_notebook
def test_figures_exist_and_are_small(path):
    names = figures(read(path))
    assert 1 <= len(names) <= 2
    for name in names:
        figure = path.parent / name
        assert figure.name[:2] == path.stem[:2]
        assert 1000 < figure.stat().st_size < MAX_FIGURE_BYTES, name
        assert figure.read_bytes().startswith(b"\x89PNG")


def test_every_figure_belongs_to_a_notebook():
    named = {name for path in NOTEBOOKS for name in figures(read(path))}
    assert named == {f"figures/{figure.name}" for figure in (ROOT / "notebooks" / "figures").iterdir()}


@pytest.mark.notebooks
@every_notebook
def test_a_notebook_runs_offline_and_writes_its_figures(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "notebooks"
    (folder / "figures").mkdir(parents=True)
    shutil.copytree(ROOT / "demos" / "images", tmp_path / "demos" / "images")
    notebook = read(path)
    started = time.monotonic()
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=CELL_TIMEOUT, kernel_name="python3", resources=resources).execute()
    print(f"{path.stem}: {time.monotonic() - started:.0f} s")
    written = sorted(f"figures/{figure.name}" for figure in (folder / "figures").iterdir())
    assert written == figures(read(path))
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "a figure is displayed"
