"""Beeps whose whole truth is known: `python -m mmx_log_mel.beeps OUT -n 1000` writes sounds, questions and answers.

A sound is one to four beeps, all high or all low, each rising, falling or steady, with short or long gaps between.
"""

import argparse
import json
import math
import wave
from array import array
from pathlib import Path
from random import Random

RATE = 8_000
PITCHES = {"low": (200, 380), "high": (900, 1_700)}
CONTOURS = {"steady": 1.0, "rising": 2.0, "falling": 0.5}
GAPS = {"short": (0.06, 0.1), "long": (0.25, 0.35)}


QUESTIONS = {
    "num_examples": "how many beeps are there?",
    "pitch": "is it high or low?",
    "contour": "is it rising, falling or steady?",
    "gaps": "are the gaps short or long?",
}


def beeps(seed: int, index: int) -> tuple[list[float], dict[str, str]]:
    """Sound number `index` of a series: its samples in -1..1, and the answer to each kind of question about it."""
    rng = Random(f"beeps-{seed}-{index}")
    count, pitch, contour, gap = rng.randint(1, 4), rng.choice([*PITCHES]), rng.choice([*CONTOURS]), rng.choice([*GAPS])
    samples = _silence(rng.uniform(0.05, 0.3))
    for number in range(count):
        samples += _silence(rng.uniform(*GAPS[gap])) if number else []
        samples += _beep(rng.uniform(*PITCHES[pitch]), CONTOURS[contour], rng.uniform(0.15, 0.25))
    samples += _silence(rng.uniform(0.05, 0.3))
    answers = {"num_examples": str(count), "pitch": pitch, "contour": contour} | ({"gaps": gap} if count > 1 else {})
    return [sample + rng.gauss(0, 0.005) for sample in samples], answers


def write_beeps(folder: Path, count: int, seed: int) -> Path:
    """`count` WAV files and list.jsonl, which `mmx train` and `mmx ask --data` read."""
    folder.mkdir(parents=True)
    with (folder / "list.jsonl").open("w", encoding="utf-8") as lines:
        for index in range(count):
            samples, answers = beeps(seed, index)
            name = f"{index:05}.wav"
            with wave.open(str(folder / name), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(RATE)
                file.writeframes(array("h", (round(32_000 * max(-1, min(1, s))) for s in samples)).tobytes())
            for question_type, answer in answers.items():
                row = {"audio": name, "question": QUESTIONS[question_type], "answer": answer}
                row["question_type"] = question_type
                lines.write(json.dumps(row) + "\n")
    return folder


def _silence(seconds: float) -> list[float]:
    return [0.0] * round(seconds * RATE)


def _beep(hertz: float, growth: float, seconds: float) -> list[float]:
    """A tone that glides from `hertz` to `growth` times that, swelling and fading within 10 ms."""
    length, phase, samples = round(seconds * RATE), 0.0, []
    for place in range(length):
        phase += 2 * math.pi * hertz * growth ** (place / length) / RATE
        samples.append(0.6 * math.sin(phase) * min(1.0, place / 80, (length - place) / 80))
    return samples


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write beeps with questions and answers.")
    parser.add_argument("out", type=Path)
    parser.add_argument("-n", "--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print(write_beeps(asked.out, asked.count, asked.seed))
