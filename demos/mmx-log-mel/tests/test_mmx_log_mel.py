"""The contract of mmx, and what a spectrogram must show."""

import math

import pytest
import torch
from mmx_log_mel import LogMelEncoder, mel_bands
from mmx_log_mel.beeps import RATE, beeps

from mmx.testing import encoder_checks


@pytest.mark.parametrize("check", encoder_checks(LogMelEncoder))
def test_contract(check):
    check()


@pytest.mark.parametrize("hertz", [250.0, 1000.0, 3000.0])
def test_a_tone_is_loudest_in_the_band_around_it(hertz):
    options = LogMelEncoder.Options()
    time = torch.arange(RATE) / RATE
    mel = LogMelEncoder(options).prepare((torch.sin(2 * math.pi * hertz * time), RATE))["mel"]
    bands = mel_bands(options.rate, options.window, options.mels)
    loudest = bands[int(mel.mean(0).argmax())].nonzero() * RATE / options.window
    assert loudest.min() - RATE / options.window <= hertz <= loudest.max() + RATE / options.window


def test_beeps_are_a_pure_function_of_seed_and_index():
    assert beeps(3, 7) == beeps(3, 7)
    counts = [beeps(0, index)[1]["count"] for index in range(60)]
    assert {*counts} == {"1", "2", "3", "4"}
