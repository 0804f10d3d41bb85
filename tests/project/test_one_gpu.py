"""The bundled model's road on one GPU, with a few pictures and on the CPU: packed, trained, distilled, loaded."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mmx
from mmx.data.scenes import generate_scene, render_scene
from mmx.models.checkpoint import load_provenance

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "demos" / "one-gpu"
SIZE = 64


def run(*words):
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Six photographs with captions, four pictures with questions."""
    place = tmp_path_factory.mktemp("data")
    flickr, easy = place / "flickr8k", place / "easy_vqa"
    for folder in (flickr / "images", easy / "images"):
        folder.mkdir(parents=True)
    images = []
    for number in range(6):
        render_scene(generate_scene(5, number), 192).save(flickr / "images" / f"{number}.jpg")
        said = ["a black dog runs to the left", "a dog runs through the grass", "the black dog is in the grass"]
        sentences = [{"raw": text} for text in said]
        images.append({"filename": f"{number}.jpg", "filepath": "images", "split": "train", "sentences": sentences})
    (flickr / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    lines = []
    for number in range(10):
        render_scene(generate_scene(6, number), 64).save(easy / "images" / f"{number}.png")
        lines.append({"image": f"images/{number}.png", "question": "is there a circle?", "answer": "no"})
    (easy / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(FOLDER / "pack.py", place, place / "pack", 4)
    return place / "pack"


def test_texts_are_packed_with_their_mirror_image(packed):
    texts = np.load(packed / "texts.npz")
    tokenizer = mmx.load().model.tokenizer
    assert texts["counts"].tolist() == [6, 9]
    first, captions, questions = texts["pictures"][0].tolist()
    assert (first, captions) == (0, 3) and questions >= 2, "what color is the dog? what is it doing? where is this?"
    row, mirrored, start, length = (texts[name][0] for name in ("rows", "mirrored", "starts", "lengths"))
    assert tokenizer.decode(row[start:length].tolist()) == "a black dog runs to the left"
    assert tokenizer.decode(mirrored[start:length].tolist()) == "a black dog runs to the right"
    assert row[length - 1] == tokenizer.eos_token_id and (row[length:] == tokenizer.pad_token_id).all()


def test_a_student_of_two_teachers_becomes_a_checkpoint(packed, tmp_path):
    small = {"max_steps": 2, "batch": [4, 2, 2], "size": SIZE, "warmup_steps": 0.5}
    plan = [
        {"name": "first", "seed": 1, **small},
        {"name": "second", "backbone": "resnet10t", "seed": 2, **small},
        {"name": "student", "start": "first", "teachers": ["first", "second"], **small},
    ]
    (tmp_path / "phases.json").write_text(json.dumps(plan))
    told = run(FOLDER / "train.py", packed, tmp_path / "phases.json", tmp_path / "runs", "cpu")
    assert [line.split(":")[0] for line in told.splitlines()] == ["first", "second", "student"]
    facts = load_provenance(tmp_path / "runs" / "student")
    assert facts["steps"] == 2 and facts["pictures seen"] == 16 and facts["phase"]["teachers"] == ["first", "second"]
    model = mmx.load(tmp_path / "runs" / "student")
    assert model.encode(image=render_scene(generate_scene(5, 0), SIZE)).slots == 16
