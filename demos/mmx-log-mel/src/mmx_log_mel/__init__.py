"""The `log-mel` encoder for mmx: a log-mel spectrogram and a small transformer.

Axes: B inputs, T frames, M mel bands, S slots (four frames each), F feature size. Masks are bool, True = exists.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mmx import Encoder, Features, load_audio
from mmx.config.schema import FrozenModel
from mmx.io.audio import SUFFIXES


class LogMelEncoder(Encoder):
    """Audio to one slot for every four frames of its spectrogram (40 ms with the default options)."""

    modality = "audio"
    contract_version = 1

    class Options(FrozenModel):
        """Options of the spectrogram and the transformer.

        sampling_rate: samples per second.
        n_fft, hop_length: window and stride of the spectrogram in samples.
        n_mels: number of mel bands.
        max_seconds: longer audio is truncated.
        """

        sampling_rate: PositiveInt = 8_000
        n_fft: PositiveInt = 256
        hop_length: PositiveInt = 80
        n_mels: PositiveInt = 40
        max_seconds: float = Field(10.0, gt=0)
        hidden_size: PositiveInt = 128
        num_layers: PositiveInt = 2
        num_heads: PositiveInt = 4

    options: Options
    mel_filters: Tensor

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.width = options.hidden_size
        filters = mel_filter_bank(options.sampling_rate, options.n_fft, options.n_mels)
        self.register_buffer("mel_filters", filters, persistent=False)
        self.convolutions = nn.ModuleList()
        for in_channels in (options.n_mels, options.hidden_size):
            self.convolutions.append(nn.Conv1d(in_channels, options.hidden_size, 5, stride=2, padding=2))
        layer = nn.TransformerEncoderLayer(
            options.hidden_size,
            options.num_heads,
            dim_feedforward=4 * options.hidden_size,
            dropout=0.1,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        final_norm = nn.LayerNorm(options.hidden_size)
        self.transformer = nn.TransformerEncoder(layer, options.num_layers, final_norm, enable_nested_tensor=False)

    def prepare(self, raw: object) -> dict[str, Tensor]:
        """Convert audio (anything that `load_audio` reads) to {"mel": float [T, M], "mask": bool [T]}."""
        options = self.options
        samples = load_audio(cast(Any, raw), options.sampling_rate)
        samples = samples[: round(options.max_seconds * options.sampling_rate)]
        samples = nn.functional.pad(samples, (0, max(0, options.n_fft - len(samples))))
        window = torch.hann_window(options.n_fft)
        spectrum = torch.stft(samples, options.n_fft, options.hop_length, window=window, return_complex=True)
        power = self.mel_filters.cpu() @ spectrum.abs().square()
        log_mel = power.clamp(min=1e-6).log10().T
        mel = (log_mel + 3) / 3  # about -1..1
        return {"mel": mel, "mask": torch.ones(len(mel), dtype=torch.bool)}

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """Encode {"mel": [B, T, M], "mask": [B, T]} to states [B, S, F] and mask [B, S]."""
        x = batch["mel"].transpose(1, 2)
        mask = batch["mask"]
        for convolution in self.convolutions:
            x = x * mask[:, None]  # the convolution reads across the end of an input into its padding
            x = convolution(x).relu()
            mask = mask[:, ::2]
        x = x.transpose(1, 2)
        x = x + sinusoidal_positions(x.shape[1], self.width, x.device)
        return Features(self.transformer(x, src_key_padding_mask=~mask), mask)

    def accepts(self, path: str) -> bool:
        """Return whether the file name has the suffix of an audio file."""
        return Path(path).suffix.lower() in SUFFIXES


def mel_filter_bank(sampling_rate: int, n_fft: int, n_mels: int) -> Tensor:
    """Return triangular filters [M, n_fft/2 + 1], equally spaced in mel.

    mel = 2595 log10(1 + f/700) (O'Shaughnessy 1987).
    """
    max_mel = 2595 * math.log10(1 + sampling_rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, max_mel, n_mels + 2) / 2595) - 1)
    frequencies = torch.linspace(0, sampling_rate / 2, n_fft // 2 + 1)
    low = edges[:-2, None]
    center = edges[1:-1, None]
    high = edges[2:, None]
    rising = (frequencies - low) / (center - low)
    falling = (high - frequencies) / (high - center)
    return torch.minimum(rising, falling).clamp(min=0)


def sinusoidal_positions(length: int, hidden_size: int, device: torch.device) -> Tensor:
    """Return position embeddings [S, F] (Vaswani et al. 2017, section 3.5)."""
    rates = torch.exp(torch.arange(0, hidden_size, 2, device=device) * (-math.log(10_000) / hidden_size))
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)[:, :hidden_size]
