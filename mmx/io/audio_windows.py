"""Windows of audio that is longer than an encoder reads: cut at the quietest moment near the end of each window.

T: samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

WINDOW_TOLERANCE = 0.1  # seconds; compressed audio is padded to whole blocks
SEARCHED = 1 / 6  # of a window, at its end: 5 of 30 seconds
MIN_REST = 1 / 30  # of a window that is left after a cut: 1 second
FRAME_SECONDS = 0.02  # for the energy
FRAMES_OF_PAUSE = 5  # over which the energy is averaged: 0.1 seconds, the length of a short pause between words
SILENCE_PEAK = 1e-4  # -80 dB of full scale; the dither of 16 bits is below


@dataclass(frozen=True)
class AudioWindow:
    """A part of some audio. start, end: in seconds; samples: float32 [T]."""

    start: float
    end: float
    samples: Tensor

    @property
    def is_silent(self) -> bool:
        """Whether all samples are below -80 dB of full scale: digital silence, or dither."""
        return float(self.samples.abs().max()) < SILENCE_PEAK


def split_audio(samples: Tensor, rate: int, max_seconds: float) -> list[AudioWindow]:
    """Split samples [T] into consecutive windows of up to `max_seconds`; together they have every sample once.

    A cut is made in the last sixth of a window, at the 0.1 seconds of least energy, so that few words are cut. Audio
    that exceeds one window by at most WINDOW_TOLERANCE is not split.
    """
    starts = [0, *_cuts(samples, rate, max_seconds)]
    ends = [*starts[1:], len(samples)]
    windows = []
    for start, end in zip(starts, ends, strict=True):
        windows.append(AudioWindow(start / rate, end / rate, samples[start:end]))
    return windows


def _cuts(samples: Tensor, rate: int, max_seconds: float) -> Iterator[int]:
    """Yield the samples at which windows begin, apart from the first."""
    longest = int(max_seconds * rate)
    start = 0
    while len(samples) - start > longest + WINDOW_TOLERANCE * rate:
        last = min(start + longest, len(samples) - int(MIN_REST * longest))
        first = start + longest - int(SEARCHED * longest)
        start = first + _quietest(samples[first:last], rate)
        yield start


def _quietest(samples: Tensor, rate: int) -> int:
    """The middle of the quietest pause in some samples; the last one if several are equally quiet."""
    frame = max(1, int(FRAME_SECONDS * rate))
    num_frames = len(samples) // frame
    if num_frames <= FRAMES_OF_PAUSE:
        return len(samples)
    energies = samples[: num_frames * frame].double().square().view(num_frames, frame).mean(1)
    pauses = energies.unfold(0, FRAMES_OF_PAUSE, 1).mean(1)
    is_quietest = pauses == pauses.min()
    last = int(torch.nonzero(is_quietest)[-1])
    return last * frame + FRAMES_OF_PAUSE * frame // 2
