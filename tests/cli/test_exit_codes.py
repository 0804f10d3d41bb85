"""Exit codes as docs/commands.md promises them, and how many lines of stderr say why."""

import contextlib
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
from cli_cases import draw, write_jsonl
from toy_runs import number_config, write_numbers

from mmx.cli import app as cli
from mmx.config.loader import dump_config

IMAGES = [f"images/{number}.png" for number in range(4)]


@pytest.fixture(scope="module")
def template(tmp_path_factory, model) -> Path:
    """Readable and unreadable images, lists, data sets, configurations, a checkpoint."""
    folder = tmp_path_factory.mktemp("template")
    with contextlib.chdir(folder):
        write_inputs()
    (folder / "model").symlink_to(model)
    return folder


@pytest.fixture
def workplace(template, tmp_path, monkeypatch) -> Path:
    """A copy of the template as the working directory."""
    folder = shutil.copytree(template, tmp_path / "workplace", symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def write_inputs() -> None:
    for number, name in enumerate(IMAGES):
        draw(Path(name), number)
    Path("mixed").mkdir()
    shutil.copy(IMAGES[0], "mixed/good.png")
    Path("mixed/damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    Path("unread").mkdir()
    shutil.copy(IMAGES[0], "unread/good.png")
    Path("unread/photo.cr2").write_bytes(b"cr2")
    Path("empty").mkdir()
    write_archives()
    write_lists()
    write_data_sets()
    write_runs()


def write_archives() -> None:
    for name, members in {"good.tar": IMAGES, "mixed.tar": ["mixed/good.png", "mixed/damaged.png"]}.items():
        with tarfile.open(name, "w") as archive:
            for member in members:
                archive.add(member)


def write_lists() -> None:
    """Lists for caption and ask."""
    good = [{"image": name, "question": "what?"} for name in IMAGES]
    write_jsonl(Path("good.jsonl"), *good)
    write_jsonl(Path("missing.jsonl"), *good, {"image": "gone.png", "question": "what?"})
    write_jsonl(
        Path("two-missing.jsonl"), *good, {"image": "a.png", "question": "a"}, {"image": "b.png", "question": "b"}
    )
    write_jsonl(Path("without-source.jsonl"), *good, {"image_path": IMAGES[0], "question": "what?"})
    lines = Path("good.jsonl").read_bytes()
    Path("latin-1.jsonl").write_bytes(lines + '{"image": "é.png", "question": "é?"}\n'.encode("latin-1"))
    Path("torn.jsonl").write_bytes(lines + b'{"image": ')


def write_data_sets() -> None:
    """Data sets for eval and train."""
    rows = [{"image": IMAGES[number % 4], "caption": f"number {number}"} for number in range(4)]
    write_jsonl(Path("captions.jsonl"), *rows)
    copies = [str(draw(Path(f"many/{number}.png"), number)) for number in range(11)]
    write_jsonl(
        Path("one-damaged.jsonl"), *({"image": name, "caption": "a dot"} for name in [*copies, "mixed/damaged.png"])
    )
    write_jsonl(
        Path("half-damaged.jsonl"), *rows, {"image": "gone.png", "caption": "x"}, {"image": "x.png", "caption": "x"}
    )
    write_jsonl(Path("no-source.jsonl"), *rows, {"image_path": "x", "caption": "x"})
    images = [{"id": number, "file_name": name} for number, name in enumerate(IMAGES)]
    annotations = [{"image_id": str(number), "caption": "a dot"} for number in range(4)]
    orphan = {"image_id": 77, "caption": "lost"}
    for name, texts in {"coco.json": annotations, "orphan.json": [*annotations, orphan], "lost.json": [orphan]}.items():
        Path(name).write_text(json.dumps({"images": images, "annotations": texts}))
    Path("latin-1.json").write_bytes('{"images": [], "annotations": "é"}'.encode("latin-1"))


def write_runs() -> None:
    """Configurations of one step."""
    for name, damaged in {"numbers": None, "not-finite": 0}.items():
        data = write_numbers(Path(), count=3, damaged=damaged, name=f"{name}.jsonl")
        config = number_config(data, Path(f"runs/{name}"), max_steps=1, warmup_steps=0)
        Path(f"{name}.yaml").write_text(dump_config(config))
    for data in (
        "captions.jsonl",
        "half-damaged.jsonl",
        "orphan.json",
        "no-source.jsonl",
        "nowhere.jsonl",
        "lost.json",
    ):
        Path(f"train-{data}.yaml").write_text(
            f"init: model\ntrain: [{{path: {data}}}]\ntraining: {{max_steps: 1, warmup_steps: 0}}\n"
            f"output_dir: runs/{data}\n"
        )
    Path("unknown-key.yaml").write_text("init: model\ntrain: [{path: captions.jsonl, mun_examples: 3}]\n")
    Path("torn.yaml").write_text("init: [model\n")
    Path("latin-1.yaml").write_bytes("init: modèle\n".encode("latin-1"))


DONE = [
    "--version",
    "--help",
    "caption --help",
    "caption images/0.png",
    "caption images good.tar good.jsonl --json",
    "caption images --out rows.jsonl",
    "caption images --out -",
    "caption images --shard 0/2",
    "ask images/0.png what? where?",
    "ask images/0.png what? --box 0,0,0.5,0.5",
    "ask --data good.jsonl --out rows.jsonl",
    "look images/0.png --out map.json",
    "eval model --data captions.jsonl",
    "eval model --data coco.json --out-dir results",
    "eval model --data scenes num_examples=2 --information",
    "train numbers.yaml --quiet",
    "train train-captions.jsonl.yaml training.max_steps=2 --quiet",
    "scenes new -n 2",
    "encoders check text --only finite",
    "new-encoder birdsong",
]


@pytest.mark.parametrize("words", DONE)
def test_0_if_everything_was_done(mmx, workplace, words) -> None:
    before = set(os.listdir())
    ran = mmx(*with_model(words))
    written = [line for line in ran.errors if line.endswith(" was written.")]
    assert (ran.code, ran.errors) == (0, written)
    named = {name.split("/")[0] for name in words.split()}
    unasked = set(os.listdir()) - before - named - {"rows.jsonl.run.json", "runs", "mmx-birdsong"}
    assert unasked == set()


NOT_READ = {
    "caption gone.png": 1,
    "caption mixed/damaged.png images/0.png": 1,
    "caption mixed": 1,
    "caption unread": 1,
    "caption mixed.tar": 1,
    "caption missing.jsonl": 1,
    "caption two-missing.jsonl images": 2,
    "caption without-source.jsonl": 1,
    "caption latin-1.jsonl": 1,
    "caption torn.jsonl": 1,
    "caption mixed --out rows.jsonl": 1,
    "ask gone.png what? where?": 1,
    "ask --data missing.jsonl": 1,
    "ask --data two-missing.jsonl": 2,
    "eval model --data one-damaged.jsonl": 1,
    "eval model --data orphan.json": 1,
    "look gone.png": 1,
    "look mixed/damaged.png": 1,
}


@pytest.mark.parametrize("words", NOT_READ)
def test_1_if_some_inputs_could_not_be_read(mmx, workplace, words) -> None:
    ran = mmx(*with_model(words))
    assert (ran.code, len(ran.errors)) == (1, NOT_READ[words]), ran


def test_error_rows_of_an_earlier_run_count_again(mmx, workplace) -> None:
    words = with_model("caption mixed --out rows.jsonl")
    assert [mmx(*words).code for _ in range(2)] == [1, 1]
    draw(Path("mixed/damaged.png"), 7)
    assert mmx(*words, "--retry-errors").code == 0
    assert mmx(*words).code == 0


REFUSED = {
    "capton images": None,
    "caption": None,
    "caption images --num-beams none": None,
    "caption images --overwrite": "option.needs_out",
    "caption images --shard 3/2": "option.shard",
    "caption images/0.png --out images/0.png": "output.is_input",
    "caption empty": "input.nothing_found",
    "caption images --model nowhere": "hub.not_found",
    "ask images/0.png": "ask.no_question",
    "ask --data nowhere.jsonl": "data.missing",
    "ask --data latin-1.jsonl": "data.not_utf8",
    "ask --data torn.jsonl": "data.not_json",
    "ask --data without-source.jsonl": "data.unknown_source",
    "look images/0.png --method magic": "option.method",
    "eval nowhere --data scenes": None,
    "eval model": None,
    "eval model --data nowhere.jsonl": "data.missing",
    "eval model --data no-source.jsonl": "data.unknown_source",
    "eval model --data half-damaged.jsonl": "evaluation.too_many_skipped",
    "eval model --data lost.json": "data.not_joined",
    "eval model --data latin-1.json": "data.not_utf8",
    "eval model --data captions.jsonl tasks=[ask]": "data.nothing_selected",
    "eval model --data captions.jsonl paht=x": "config.unknown_key",
    "train": None,
    "train nowhere.yaml": None,
    "train unknown-key.yaml": "config.unknown_key",
    "train torn.yaml": None,
    "train latin-1.yaml": None,
    "train not-finite.yaml": "training.encoder_not_finite",
    "train numbers.yaml --resume": None,
    "train train-no-source.jsonl.yaml": "data.unknown_source",
    "train train-nowhere.jsonl.yaml": "data.missing",
    "train train-lost.json.yaml": "data.not_joined",
    "import nowhere out": "hub.not_found",
    "scenes images": "data.folder_in_use",
    "scenes new -n 0": None,
    "encoders check nowhere": "encoder.unknown",
    "new-encoder image": None,
    "bench nothing": None,
    "study nothing": "study.unknown",
}


@pytest.mark.parametrize("words", REFUSED)
def test_2_for_wrong_usage_or_configuration(mmx, workplace, words) -> None:
    ran = mmx(*with_model(words))
    assert (ran.code, ran.out, len(ran.errors)) == (2, "", 1), ran
    assert ran.err.startswith("mmx: ")
    if REFUSED[words] is not None:
        assert ran.error.code == REFUSED[words]


@pytest.mark.parametrize(("data", "code", "lines"), [("orphan.json", 0, 1), ("half-damaged.jsonl", 2, 1)])
def test_training_names_what_it_skips_and_is_refused_beyond_its_limit(mmx, workplace, data, code, lines) -> None:
    ran = mmx("train", f"train-{data}.yaml", "--quiet")
    assert (ran.code, len(ran.errors)) == (code, lines)
    assert ran.errors[-1].startswith("mmx: ") == (code == 2)


@pytest.mark.parametrize("command", ["caption", "ask", "evaluate"])
def test_130_if_interrupted(workplace, monkeypatch, capsys, command) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[f"mmx.cli.{command}"], "load_pipeline", interrupted)
    words = {
        "caption": "caption images",
        "ask": "ask images/0.png what?",
        "evaluate": "eval model --data captions.jsonl",
    }
    monkeypatch.setattr(sys, "argv", ["mmx", *words[command].split()])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert (exit_info.value.code, *capsys.readouterr()) == (130, "", "")


def with_model(words: str) -> list[str]:
    """Add the checkpoint to commands that take --model."""
    split = words.split()
    uses_default = split[0] in ("caption", "ask", "look") and "--model" not in split and "--help" not in split
    return [*split, "--model", "model"] if uses_default and len(split) > 1 else split
