"""Small generated data sets: their images, captions and questions, and the scores that any form of them must give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from mmx.boxes import Box
from mmx.data.examples import Example
from mmx.evaluation.aggregate import aggregate_metrics
from mmx.evaluation.report import EvaluatedText

WORDS = (
    "a",
    "the",
    "dog",
    "cat",
    "café",
    "Zoë",
    "犬",
    "runs",
    "on",
    "under",
    "blue",
    "red",
    ",",
    ".",
    "two",
    "U.S.A.",
    "½",
)
SPLITS = ("train", "restval", "val", "test")
QUESTION_TYPES = ("number", "yes/no", None)


@dataclass(frozen=True)
class GeneratedQuestion:
    """A question about an image."""

    text: str
    answers: tuple[str, ...]
    question_type: str | None
    box: Box | None


@dataclass(frozen=True)
class GeneratedImage:
    """An image file with its texts. number: its id in formats that join by id."""

    name: str
    number: int
    split: str
    captions: tuple[str, ...]
    questions: tuple[GeneratedQuestion, ...]


def generate_images(random: Random, folder: Path) -> list[GeneratedImage]:
    """Generate two to six images with empty files in folder/images. Captions may repeat, as those of annotators do."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images = []
    for number in random.sample(range(1, 1000), random.randint(2, 6)):
        name = random.choice([f"{number}.jpg", f"{number}.png", f"photo {number}.JPG", f"été-{number}.webp"])
        (folder / "images" / name).touch()
        captions = [_sentence(random) for _ in range(random.randint(1, 3))]
        if random.random() < 0.2:
            captions.append(captions[0])
        questions = [_question(random, index) for index in range(random.randint(1, 3))]
        images.append(GeneratedImage(name, number, random.choice(SPLITS), tuple(captions), tuple(questions)))
    return images


def _sentence(random: Random) -> str:
    return " ".join(random.choices(WORDS, k=random.randint(1, 7)))


def _question(random: Random, index: int) -> GeneratedQuestion:
    """Return a question that differs from those of other indices; some have no answers, some a box."""
    answers = random.choices(["two", "yes", "no", "a dog", "café", "U.S.A."], k=random.randint(0, 4))
    left = random.randint(0, 5) / 10
    box = (left, 0.0, left + 0.25, 1.0) if random.random() < 0.3 else None
    return GeneratedQuestion(f"question {index} about?", tuple(answers), random.choice(QUESTION_TYPES), box)


# ---- comparison with what was read -------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class ComparedText:
    """A caption (question "") or a question of an image with its references in order, for comparison."""

    image: str
    question: str
    box: str
    question_type: str
    targets: tuple[str, ...]


def generated_texts(images: Sequence[GeneratedImage]) -> list[ComparedText]:
    """Return the texts of generated images; all captions of an image are references of one text."""
    texts = []
    for image in images:
        if image.captions:
            texts.append(_compared(image.name, None, None, None, image.captions))
        for question in image.questions:
            texts.append(_compared(image.name, question.text, question.box, question.question_type, question.answers))
    return sorted(texts)


def read_texts(examples: Sequence[Example]) -> list[ComparedText]:
    """Return the texts of examples in the form of `generated_texts`."""
    texts = []
    for example in examples:
        name = Path(str(example.sources["image"])).name
        for task in example.tasks:
            texts.append(_compared(name, task.question, task.box, task.question_type, task.targets))
    return sorted(texts)


def _compared(
    name: str, question: str | None, box: Box | None, question_type: str | None, targets: Sequence[str]
) -> ComparedText:
    """Targets are sorted and have single spaces: order and white space do not change a score."""
    spaced = sorted(" ".join(target.split()) for target in targets)
    return ComparedText(name, " ".join((question or "").split()), str(box), str(question_type), tuple(spaced))


def scores(texts: Sequence[ComparedText]) -> dict[str, float]:
    """Return the metrics of fixed predictions, which depend on the image and the question only."""
    predictions = []
    for index, text in enumerate(texts):
        fixed = Random(f"{text.image} {text.question}")
        prediction = fixed.choice(["two", "yes", "a dog"]) if text.question else _sentence(fixed)
        question_type = None if text.question_type == "None" else text.question_type
        key = (index, 0)
        predictions.append(
            EvaluatedText(key, text.image, text.question or None, question_type, prediction, 0.0, text.targets)
        )
    return aggregate_metrics(predictions, [])
