"""Notebooks: clean and short on disk; and each of them runs as it stands, draws what it names, and keeps its claims."""

import re
import shutil
import time
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parent.parent.parent
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_CELLS, MOST_LINES, MOST_BYTES = 6, 14, 150_000
PATIENCE = 600  # seconds a cell: a busy machine is no failure; how long each book took is printed
FIGURE = re.compile(r"figures/[\w.-]+\.png")

every = pytest.mark.parametrize("path", BOOKS, ids=[path.stem for path in BOOKS])


def read(path):
    return nbformat.read(path, as_version=4)


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def figures(book):
    """Figures named in the code, as places beneath notebooks/."""
    return sorted({name for cell in code(book) for name in FIGURE.findall(cell.source)})


def test_there_are_notebooks_in_one_row():
    numbers = [int(path.stem[:2]) for path in BOOKS]
    assert numbers == list(range(1, len(BOOKS) + 1)) and len(numbers) >= 4


@every
def test_it_is_clean(path):
    book = read(path)
    nbformat.validate(book)
    assert (book.nbformat, book.nbformat_minor) == (4, 5)
    assert book.metadata.kernelspec.name == "python3"
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code(book))
    ids = [cell.id for cell in book.cells]
    assert len(set(ids)) == len(ids)
    assert [n for n, _ in enumerate(ids) if not re.fullmatch(r"[\w-]{2,32}", ids[n])] == []


@every
def test_it_begins_with_a_title_and_its_claim(path):
    first = read(path).cells[0]
    title, _, claim = first.source.partition("\n")
    assert first.cell_type == "markdown"
    assert re.match(r"# \S", title)
    assert len(claim.split()) >= 8 and "." in claim


@every
def test_it_is_short_and_asserts(path):
    cells = code(read(path))
    assert 3 <= len(cells) <= MOST_CELLS
    lines = [sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in cells]
    assert max(lines) <= MOST_LINES, f"lines of the code cells: {lines}"
    assert any(line.lstrip().startswith("assert ") for cell in cells for line in cell.source.splitlines())
    assert all(len(line) <= 120 for cell in cells for line in cell.source.splitlines())


@every
def test_it_needs_no_network_and_names_no_place_of_one_machine(path):
    source = "\n".join(cell.source for cell in read(path).cells)
    assert not re.search(r"https?://|/home/|/tmp/|/root/|pip install|^!|^%", source, re.M)


@every
def test_its_figures_lie_beside_it_and_are_light(path):
    named = figures(read(path))
    assert 1 <= len(named) <= 2
    for name in named:
        place = path.parent / name
        assert place.name[:2] == path.stem[:2]
        assert 1000 < place.stat().st_size < MOST_BYTES, f"{name} has {place.stat().st_size} bytes"
        assert place.read_bytes().startswith(b"\x89PNG")


def test_every_figure_is_named_by_a_notebook():
    named = {name for path in BOOKS for name in figures(read(path))}
    assert named == {f"figures/{place.name}" for place in (ROOT / "notebooks" / "figures").iterdir()}


@pytest.mark.notebooks
@every
def test_it_runs_offline_in_time_and_draws_its_figures(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "notebooks"
    (folder / "figures").mkdir(parents=True)
    shutil.copytree(ROOT / "demos" / "pictures", tmp_path / "demos" / "pictures")
    book, began = read(path), time.monotonic()
    where = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(book, timeout=PATIENCE, kernel_name="python3", resources=where).execute()
    print(f"{path.stem}: {time.monotonic() - began:.0f} s")
    drawn = sorted(f"figures/{place.name}" for place in (folder / "figures").iterdir())
    assert drawn == figures(read(path))
    assert any("image/png" in output.get("data", {}) for cell in code(book) for output in cell.outputs), "none is shown"
