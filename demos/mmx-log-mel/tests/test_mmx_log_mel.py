"""The log-mel encoder passes the conformance kit, and its spectrogram shows the frequency of a tone."""

import math

import pytest
import torch
from mmx_log_mel import LogMelEncoder, mel_filter_bank
from mmx_log_mel.beeps import SAMPLING_RATE, beeps

from mmx.testing import encoder_checks


@pytest.mark.parametrize("check", encoder_checks(LogMelEncoder))
def test_conformance(check):
    check()


@pytest.mark.parametrize("frequency", [250.0, 1000.0, 3000.0])
def test_tone_has_its_maximum_in_the_band_of_its_frequency(frequency):
    options = LogMelEncoder.Options()
    time = torch.arange(SAMPLING_RATE) / SAMPLING_RATE
    tone = torch.sin(2 * math.pi * frequency * time)
    mel = LogMelEncoder(options).prepare((tone, SAMPLING_RATE))["mel"]
    filters = mel_filter_bank(options.sampling_rate, options.n_fft, options.n_mels)
    resolution = SAMPLING_RATE / options.n_fft
    band = filters[int(mel.mean(0).argmax())].nonzero() * resolution
    assert band.min() - resolution <= frequency <= band.max() + resolution


def test_beeps_depend_only_on_seed_and_index():
    assert beeps(3, 7) == beeps(3, 7)
    counts = {beeps(0, index)[1]["count"] for index in range(60)}
    assert counts == {"1", "2", "3", "4"}
