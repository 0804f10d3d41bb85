"""The `log-mel` encoder for mmx: sounds, as a small transformer hears them.

Alphabet: B sounds, T frames, M mel bands, S slots (four frames each), F feature width. Masks: True = exists.
"""

import math

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mmx import Encoder, Features, load_audio
from mmx.config.schema import FrozenModel
from mmx.io.audio import SUFFIXES


class LogMelEncoder(Encoder):
    """A sound -> one slot for every four frames of its spectrogram (40 ms with the defaults)."""

    modality = "audio"

    class Options(FrozenModel):
        """`rate`: samples a second; `window` and `hop`: samples; `mels`: bands; `seconds`: longer sounds are cut."""

        rate: PositiveInt = 8_000
        window: PositiveInt = 256
        hop: PositiveInt = 80
        mels: PositiveInt = 40
        seconds: float = Field(10.0, gt=0)
        width: PositiveInt = 128
        layers: PositiveInt = 2
        heads: PositiveInt = 4

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.width = options.width
        self.register_buffer("bands", mel_bands(options.rate, options.window, options.mels), persistent=False)
        self.narrow = nn.ModuleList(
            nn.Conv1d(source, options.width, 5, stride=2, padding=2) for source in (options.mels, options.width)
        )
        block = nn.TransformerEncoderLayer(
            options.width, options.heads, 4 * options.width, 0.1, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, options.layers, nn.LayerNorm(options.width), False)

    def prepare(self, raw):
        """A path, bytes or (samples, rate) -> {"mel": float [T, M], "mask": bool [T]}."""
        options = self.options
        sound = load_audio(raw, options.rate)[: round(options.seconds * options.rate)]
        sound = nn.functional.pad(sound, (0, max(0, options.window - len(sound))))
        spectrum = torch.stft(
            sound, options.window, options.hop, window=torch.hann_window(options.window), return_complex=True
        )
        mel = (self.bands.cpu() @ spectrum.abs().square()).clamp(min=1e-6).log10().T
        return {"mel": (mel + 3) / 3, "mask": torch.ones(len(mel), dtype=torch.bool)}

    def forward(self, batch):
        """{"mel": [B, T, M], "mask": [B, T]} -> Features: states [B, S, F], mask [B, S]."""
        x, mask = batch["mel"].transpose(1, 2), batch["mask"]
        for convolution in self.narrow:
            # Padding is made silent before each convolution, whose window reaches into it.
            x = convolution(x * mask[:, None]).relu()
            mask = mask[:, ::2]
        x = x.transpose(1, 2)
        return Features(self.blocks(x + waves(x.shape[1], self.width, x.device), src_key_padding_mask=~mask), mask)

    def accepts(self, path):
        """Whether the file name is a sound's."""
        return any(path.lower().endswith(suffix) for suffix in SUFFIXES)


def mel_bands(rate: int, window: int, count: int) -> Tensor:
    """Triangles [M, window/2 + 1] evenly spaced in mel, where mel = 2595 log10(1 + f/700) (O'Shaughnessy 1987)."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, count + 2) / 2595) - 1)
    hertz = torch.linspace(0, rate / 2, window // 2 + 1)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return torch.minimum((hertz - low) / (middle - low), (high - hertz) / (high - middle)).clamp(min=0)


def waves(length: int, width: int, device: torch.device) -> Tensor:
    """Positions [S, F] (Vaswani et al. 2017, section 3.5)."""
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000) / width))
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)[:, :width]
