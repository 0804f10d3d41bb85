"""Synthetic beeps with questions and answers: `python -m mmx_log_mel.beeps OUT -n 1000`.

A file has one to four beeps, all low or all high, each rising, falling or steady, with short or long gaps between them.
"""

import argparse
import json
import math
import wave
from array import array
from pathlib import Path
from random import Random

SAMPLING_RATE = 8_000
PITCHES = {"low": (200, 380), "high": (900, 1_700)}  # Hz
CONTOURS = {"steady": 1.0, "rising": 2.0, "falling": 0.5}  # final frequency / initial frequency
GAPS = {"short": (0.06, 0.1), "long": (0.25, 0.35)}  # seconds
FADE = 80  # samples of fade-in and fade-out
AMPLITUDE = 32_000  # of 16-bit samples

QUESTIONS = {
    "count": "how many beeps are there?",
    "pitch": "is it high or low?",
    "contour": "is it rising, falling or steady?",
    "gaps": "are the gaps short or long?",
}


def beeps(seed: int, index: int) -> tuple[list[float], dict[str, str]]:
    """Return number `index` of a series: the samples in -1..1, and question type to answer."""
    random = Random(f"beeps-{seed}-{index}")
    count = random.randint(1, 4)
    pitch = random.choice([*PITCHES])
    contour = random.choice([*CONTOURS])
    gap = random.choice([*GAPS])
    samples = _silence(random.uniform(0.05, 0.3))
    for number in range(count):
        if number:
            samples += _silence(random.uniform(*GAPS[gap]))
        samples += _beep(random.uniform(*PITCHES[pitch]), CONTOURS[contour], random.uniform(0.15, 0.25))
    samples += _silence(random.uniform(0.05, 0.3))
    answers = {"count": str(count), "pitch": pitch, "contour": contour}
    if count > 1:
        answers["gaps"] = gap
    return [sample + random.gauss(0, 0.005) for sample in samples], answers


def write_beeps(folder: Path, count: int, seed: int) -> Path:
    """Write `count` WAV files and list.jsonl, which `mmx train` and `mmx ask --data` read."""
    folder.mkdir(parents=True)
    with (folder / "list.jsonl").open("w", encoding="utf-8") as lines:
        for index in range(count):
            samples, answers = beeps(seed, index)
            name = f"{index:05}.wav"
            _write_wav(folder / name, samples)
            for question_type, answer in answers.items():
                question = QUESTIONS[question_type]
                row = {"audio": name, "question": question, "answer": answer, "question_type": question_type}
                lines.write(json.dumps(row) + "\n")
    return folder


def _write_wav(path: Path, samples: list[float]) -> None:
    clipped = (max(-1, min(1, sample)) for sample in samples)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE)
        file.writeframes(array("h", (round(AMPLITUDE * sample) for sample in clipped)).tobytes())


def _silence(seconds: float) -> list[float]:
    return [0.0] * round(seconds * SAMPLING_RATE)


def _beep(frequency: float, growth: float, seconds: float) -> list[float]:
    """Return a tone that glides from `frequency` to `growth` times that, with fade-in and fade-out."""
    length = round(seconds * SAMPLING_RATE)
    phase = 0.0
    samples = []
    for index in range(length):
        phase += 2 * math.pi * frequency * growth ** (index / length) / SAMPLING_RATE
        samples.append(0.6 * math.sin(phase) * min(1.0, index / FADE, (length - index) / FADE))
    return samples


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write beeps with questions and answers.")
    parser.add_argument("out", type=Path)
    parser.add_argument("-n", "--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(write_beeps(arguments.out, arguments.count, arguments.seed))
