"""Preprocessing and forward passes of pretrained encoders by modality.

Axes: B rows, S slots, F feature size, T audio samples.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from PIL import Image
from torch import Tensor, nn

from mmx.encoders.base import Features, check_text_length
from mmx.encoders.pretrained.architecture import PretrainedOptions, class_of, hf_errors
from mmx.encoders.pretrained.hf_models import TOKENIZER
from mmx.errors import AudioError, EncoderError, convert_errors
from mmx.io import audio, images
from mmx.io.audio_windows import WINDOW_TOLERANCE

WHOLE_INPUT = (0.0, 0.0, 1.0, 1.0)
MAX_ASPECT_RATIO = 16  # long side / short side; a longer image is cropped before its short side is resized
DEFAULT_MAX_LENGTH = 512  # tokens of a text, where neither model nor tokenizer has a maximum


class InputAdapter(Protocol):
    """Preprocessing and forward pass of one modality.

    width: F. suffixes: of the files it reads. `max_audio_seconds`, `sampling_rate`, `labels`, `window`, `save_files`,
    `load_files`: as in `Encoder`.
    """

    dimensions: int
    suffixes: frozenset[str]
    width: int
    max_audio_seconds: float | None = None
    sampling_rate: int = 16_000

    def prepare(self, raw: object) -> dict[str, Tensor]:
        """Convert one raw input to tensors."""
        ...

    def features(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Features:
        """Encode a batch with the model."""
        ...

    def labels(self, raw: object) -> list[str]:
        """Return the names of the slots."""
        return []

    def window(self, raw: object) -> tuple[float, float, float, float]:
        """Return the region of the input that the grid covers."""
        return WHOLE_INPUT

    def save_files(self, folder: Path) -> None:
        """Write files that are neither options nor tensors."""
        return

    def load_files(self, folder: Path) -> None:
        """Read the files of `save_files`."""
        return


def create_adapter(modality: str, options: PretrainedOptions, model: nn.Module, tokenizer: object) -> InputAdapter:
    """Return the adapter of a modality: "image", "text" or "audio"."""
    if modality == "image":
        return _ImageAdapter(options, model)
    if modality == "text":
        return _TextAdapter(options, model, tokenizer)
    return _AudioAdapter(options, model)


class _ImageAdapter(InputAdapter):
    """Pixels from the model's own image processor. The cells of the image are the last slots."""

    dimensions = 2
    suffixes = images.SUFFIXES

    def __init__(self, options: PretrainedOptions, model: nn.Module) -> None:
        self.preprocessing = options.preprocessing or {}
        self.config = cast(Any, model).config
        processor_class = class_of(self.preprocessing.get("image_processor_type"), "ImageProcessor")
        self.processor = processor_class.from_dict(self.preprocessing)
        self.width = self._measure_width(model)

    def prepare(self, raw: object) -> dict[str, Tensor]:
        """Image to {"pixels": [3, H, W]}, and "window" [4] if a part of the image is left out."""
        image = images.load_image(cast(Any, raw))
        shortest_edge = self._shortest_edge
        window = {"window": torch.tensor(self._window(image.size))} if shortest_edge else {}
        # ConvNeXT crops images below 384 pixels without a field that says so.
        if shortest_edge and (self.preprocessing.get("do_center_crop") or shortest_edge < 384):
            image = _limit_aspect_ratio(image)
        return {"pixels": self.processor(image, return_tensors="pt")["pixel_values"][0], **window}

    def window(self, raw: object) -> tuple[float, float, float, float]:
        return self._window(images.load_image(cast(Any, raw)).size)

    def _window(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        shortest_edge = self._shortest_edge
        if not shortest_edge:
            return WHOLE_INPUT
        if not self.preprocessing.get("do_center_crop"):
            return images.center_square(size)
        crop = self.preprocessing.get("crop_size") or {}
        scale = shortest_edge / min(size)
        x = _margin(size[0] * scale, crop.get("width", shortest_edge))
        y = _margin(size[1] * scale, crop.get("height", shortest_edge))
        return (x, y, 1 - x, 1 - y)

    def features(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Features:
        """Encode {"pixels": [B, 3, H, W]}."""
        pixels = batch["pixels"]
        states = model(pixel_values=pixels).last_hidden_state
        if states.ndim == 4:  # a feature map [B, F, rows, columns]
            grid = (states.shape[2], states.shape[3])
            states = states.flatten(2).transpose(1, 2)
        else:
            grid = self._grid(pixels.shape[2], pixels.shape[3])
        mask = states.new_ones(states.shape[:2], dtype=torch.bool)
        return Features(states, mask, grid, batch.get("window"))

    @property
    def _shortest_edge(self) -> int | None:
        """Side that the short side of an image is resized to, if only one is given."""
        edge: int | None = self.preprocessing.get("size", {}).get("shortest_edge")
        return edge

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (rows, columns) of the patches of an image."""
        num_stages = len(getattr(self.config, "depths", [1]))
        patch = self.config.patch_size
        patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
        merge = 2 ** (num_stages - 1)  # a pyramid halves the resolution between stages
        round_ = (
            math.ceil if num_stages > 1 else math.floor
        )  # a pyramid pads incomplete patches, a plain ViT drops them
        return round_(height / (patch_height * merge)), round_(width / (patch_width * merge))

    def _measure_width(self, model: nn.Module) -> int:
        """Return F, measured on one image. Images of different shapes must be resized to the same shape."""
        first = self.prepare(Image.new("RGB", (64, 48)))["pixels"]
        second = self.prepare(Image.new("RGB", (48, 64)))["pixels"]
        given = f"the image processor returns images of {list(first.shape)}"
        if first.shape != second.shape:
            raise EncoderError(
                f"{given} and {list(second.shape)}; expected one size; set do_center_crop to true.",
                code="encoder.image_sizes",
                given=[list(first.shape), list(second.shape)],
            )
        expected = getattr(self.config, "image_size", "another size")

        def describe(error: BaseException) -> str:
            return f"{given}; expected {expected}, as its model; correct preprocessor_config.json."

        model.eval()
        try:
            with (
                torch.no_grad(),
                torch.random.fork_rng(devices=[]),
                convert_errors(EncoderError, describe, code="encoder.image_size", expected=expected),
            ):
                return int(self.features(model, {"pixels": first[None]}).states.shape[-1])
        finally:
            model.train()


class _TextAdapter(InputAdapter):
    """Tokens of the model's own tokenizer, which a rebuilt encoder reads with `load_files`."""

    dimensions = 1
    suffixes = frozenset[str]()

    def __init__(self, options: PretrainedOptions, model: nn.Module, tokenizer: object) -> None:
        self.config = cast(Any, model).config
        self.width = int(self.config.hidden_size)
        self.max_length = _max_length(options, model)
        self.tokenizer: Any = None
        if tokenizer is not None:
            self._set_tokenizer(tokenizer)

    def prepare(self, raw: object) -> dict[str, Tensor]:
        """Text to {"tokens": [S], "mask": [S]}. Raises MmxError (text.too_long) for more than `max_length` tokens."""
        if self.tokenizer is None:
            raise EncoderError(
                "the text encoder has no tokenizer; load its checkpoint, or call load_files(folder).",
                code="encoder.no_tokenizer",
            )
        token_ids = self.tokenizer.encode(str(raw)).ids
        check_text_length(len(token_ids), self.max_length)
        if not token_ids:  # a source has at least one slot
            token_ids = [self.config.pad_token_id or 0]
        return {"tokens": torch.tensor(token_ids), "mask": torch.ones(len(token_ids), dtype=torch.bool)}

    def labels(self, raw: object) -> list[str]:
        token_ids = self.prepare(raw)["tokens"].tolist()
        return [self.tokenizer.decode([token], skip_special_tokens=False) for token in token_ids]

    def features(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Features:
        """Encode {"tokens": [B, S], "mask": [B, S]}."""
        mask = batch["mask"]
        states = model(input_ids=batch["tokens"], attention_mask=mask.long()).last_hidden_state
        return Features(states, mask)

    def save_files(self, folder: Path) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save(str(folder / TOKENIZER))

    def load_files(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        with hf_errors(str(folder), "tokenizer", f"a whole {TOKENIZER}"):
            self._set_tokenizer(Tokenizer.from_file(str(folder / TOKENIZER)))

    def _set_tokenizer(self, tokenizer: Any) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer


class _AudioAdapter(InputAdapter):
    """Spectrograms of Whisper, which have one length, or samples of wav2vec2 and its relatives, of any length."""

    dimensions = 1
    suffixes = audio.SUFFIXES

    def __init__(self, options: PretrainedOptions, model: nn.Module) -> None:
        self.config = cast(Any, model).config
        self.width = int(self.config.hidden_size)
        preprocessing = options.preprocessing or {}
        extractor_class = class_of(preprocessing.get("feature_extractor_type"), "FeatureExtractor")
        self.extractor = extractor_class.from_dict(preprocessing)
        self.sampling_rate = self.extractor.sampling_rate
        kernels = getattr(self.config, "conv_kernel", [])
        strides = getattr(self.config, "conv_stride", [])
        self.convolutions = list(zip(kernels, strides))
        self.min_samples = 1  # number of samples for one frame
        for kernel, stride in reversed(self.convolutions):
            self.min_samples = (self.min_samples - 1) * stride + kernel
        if not self.convolutions:
            self.max_audio_seconds = self.extractor.n_samples / self.sampling_rate

    def prepare(self, raw: object) -> dict[str, Tensor]:
        """Audio to {"samples": [T], "mask": [T]}, or of Whisper to {"spectrum": [mel, frames]}.

        Raises AudioError (audio.too_long) for audio that is longer than the window of Whisper.
        """
        samples = audio.load_audio(cast(Any, raw), self.sampling_rate)
        self._check_window(len(samples) / self.sampling_rate)
        samples = nn.functional.pad(samples, (0, max(0, self.min_samples - len(samples))))
        extracted = self.extractor(samples.numpy(), sampling_rate=self.sampling_rate, return_tensors="pt")
        if not self.convolutions:
            return {"spectrum": extracted["input_features"][0]}
        return {"samples": extracted["input_values"][0], "mask": torch.ones(len(samples), dtype=torch.bool)}

    def _check_window(self, seconds: float) -> None:
        """The feature extractor would drop what is after the window."""
        window = self.max_audio_seconds
        if window is not None and seconds > window + WINDOW_TOLERANCE:
            raise AudioError(
                f"the audio is {seconds:.1f} seconds long, and one memory holds up to {window:g}; cut it into pieces, "
                "or transcribe it with caption, which reads it in windows.",
                code="audio.too_long",
                seconds=round(seconds, 3),
                maximum=window,
            )

    def features(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Features:
        """Encode a batch.

        All slots of Whisper's window may be attended, as in its own decoder, which was trained with the silence. Models
        whose convolutions normalize over time give other states with padding, and no mask prevents that. They encode
        the rows of each length separately, which is slower but independent of the batch.
        """
        if not self.convolutions:
            states = model(batch["spectrum"]).last_hidden_state
            return Features(states, states.new_ones(states.shape[:2], dtype=torch.bool))
        samples = batch["samples"]
        mask = batch["mask"]
        lengths = mask.sum(1)
        num_frames = lengths
        for kernel, stride in self.convolutions:
            num_frames = (num_frames - kernel) // stride + 1
        if self.config.feat_extract_norm == "layer":
            states = model(samples, attention_mask=mask.long()).last_hidden_state
        else:
            states = _encode_by_length(model, samples, lengths.tolist())
        frame_indices = torch.arange(states.shape[1], device=mask.device)
        return Features(states, frame_indices < num_frames[:, None])


def _limit_aspect_ratio(image: Image.Image) -> Image.Image:
    """Crop the middle of a very long image: with its short side resized, it would not fit into memory."""
    width, height = image.size
    cropped_width = min(width, MAX_ASPECT_RATIO * height)
    cropped_height = min(height, MAX_ASPECT_RATIO * width)
    left = (width - cropped_width) // 2
    top = (height - cropped_height) // 2
    right = (width + cropped_width) // 2
    bottom = (height + cropped_height) // 2
    return image.crop((left, top, right, bottom))


def _margin(length: float, crop: float) -> float:
    """Fraction of a side that a center crop removes at each end."""
    return max(0.0, (1 - crop / length) / 2)


def _max_length(options: PretrainedOptions, model: nn.Module) -> int:
    """Maximum number of tokens of a text. Raises EncoderError for an option above the limit of the model."""
    model_limit = _num_positions(model)
    if options.max_length is not None:
        if model_limit and options.max_length > model_limit:
            raise EncoderError(
                f"max_length is {options.max_length}; expected at most {model_limit}, the limit of the model.",
                code="encoder.max_length",
                given=options.max_length,
                expected=model_limit,
            )
        return options.max_length
    tokenizer_limit = (options.preprocessing or {}).get("max_length")
    limits = [limit for limit in (model_limit, tokenizer_limit) if limit]
    return min(limits, default=DEFAULT_MAX_LENGTH)


def _num_positions(model: nn.Module) -> int | None:
    """Number of positions of a text encoder, or None if it is not limited."""
    config = cast(Any, model).config
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if not limit:
        return None
    embedding = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding_idx = getattr(embedding, "padding_idx", None)
    # RoBERTa and its relatives reserve the first rows, up to that of the padding.
    return limit if padding_idx is None else limit - (padding_idx + 1)


def _encode_by_length(model: nn.Module, samples: Tensor, lengths: list[int]) -> Tensor:
    """Encode samples [B, T] to states [B, S, F], the rows of each length together and without padding."""
    states_by_row: dict[int, Tensor] = {}
    for length in sorted(set(lengths)):
        rows = [row for row, row_length in enumerate(lengths) if row_length == length]
        states = model(samples[rows, :length]).last_hidden_state
        states_by_row.update(zip(rows, states))
    ordered = [states_by_row[row] for row in range(len(lengths))]
    return nn.utils.rnn.pad_sequence(ordered, batch_first=True)
