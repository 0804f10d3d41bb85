"""Windows of long audio: every sample once, none longer than the encoder reads, cuts in pauses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.io.audio_windows import WINDOW_TOLERANCE, split_audio

RATE = 1000


def noise(seconds):
    return torch.rand(int(seconds * RATE), generator=torch.Generator().manual_seed(1)) - 0.5


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 200_000), max_seconds=st.sampled_from([1.0, 10.0, 30.0]))
def test_windows_have_every_sample_once(length, max_seconds):
    samples = noise(length / RATE)[:length]
    windows = split_audio(samples, RATE, max_seconds)
    assert torch.equal(torch.cat([window.samples for window in windows]), samples)
    assert [window.start for window in windows[1:]] == [window.end for window in windows[:-1]]
    for window in windows:
        seconds = len(window.samples) / RATE
        assert window.end - window.start == pytest.approx(seconds)
        assert seconds <= max_seconds + (WINDOW_TOLERANCE if window is windows[-1] else 0)
        if len(windows) > 1:
            assert seconds >= max_seconds / 31
        if window is not windows[-1]:
            assert seconds >= max_seconds * 5 / 6 - 0.01


def test_cuts_are_in_pauses():
    samples = noise(70)
    for pause in (27.3, 54.9):
        samples[int(pause * RATE) : int((pause + 0.2) * RATE)] = 0
    cuts = [window.end for window in split_audio(samples, RATE, 30.0)][:-1]
    assert 27.3 < cuts[0] < 27.5
    assert 54.9 < cuts[1] < 55.1


def test_padding_of_compressed_audio_is_no_window():
    assert len(split_audio(noise(30.05), RATE, 30.0)) == 1
    assert len(split_audio(noise(30.2), RATE, 30.0)) == 2


@pytest.mark.parametrize(("level", "expected"), [(0.0, True), (9e-5, True), (1e-3, False)])
def test_silence_is_below_80_decibels(level, expected):
    samples = torch.zeros(RATE)
    samples[RATE // 2] = -level
    assert split_audio(samples, RATE, 30.0)[0].is_silent == expected
