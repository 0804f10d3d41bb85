"""The built-in pretrained encoder: a vision, text or audio encoder of transformers, from a folder or a public name.

Alphabet: B rows, S slots, F feature width, T samples.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mmx.encoders.base import Encoder, Features
from mmx.encoders.pretrained.hf_models import (
    HF_FAMILIES,
    TOKENIZER,
    TOWERS,
    PretrainedOptions,
    build_hf_encoder,
    class_of,
    hf_errors,
    load_hf_encoder,
)
from mmx.errors import EncoderError
from mmx.io import audio, images

__all__ = ["HF_FAMILIES", "TOWERS", "PretrainedEncoder"]

MOST_STRETCHED = 16  # long side / short side that a picture keeps before its short side is scaled and the rest cropped


class PretrainedEncoder(Encoder):
    """Picture, text or sound -> the states of a pretrained encoder; which of the three, the instance says."""

    modality = "image, text or audio"

    class Options(PretrainedOptions):
        """What is loaded, and how much of it; see PretrainedOptions."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        if options.architecture is None:
            self.options, self.model, tokenizer = load_hf_encoder(options)
        else:
            self.model, tokenizer = (
                build_hf_encoder(options.architecture, options.layer, options.name or "options"),
                None,
            )
        self.modality = HF_FAMILIES[self.model.config.model_type].modality
        reader: Any = {"image": _Pictures, "text": _Texts, "audio": _Sounds}[self.modality]
        self._reader = reader(self.options, self.model, tokenizer)
        self.dimensions, self.width = self._reader.dimensions, self._reader.width

    def prepare(self, raw: Any) -> dict[str, Tensor]:
        """A picture -> {"pixels": [3, H, W]}; a text -> {"tokens": [S], "mask": [S]}; a sound (see `load_audio`) ->
        {"samples": [T], "mask": [T]}, of Whisper {"spectrum": [mel, frames]}."""
        return self._reader.prepare(raw)

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """A batch -> Features; those of pictures have a grid, and what stands for the whole picture comes first."""
        device, exact = next(self.model.parameters()).device.type, HF_FAMILIES[self.model.config.model_type].exact
        with torch.autocast(device, enabled=False) if exact else nullcontext():
            return self._reader.features(self.model, batch)

    def accepts(self, path: str) -> bool:
        """Whether the file name is a picture's, or a sound's; no file is a text."""
        return Path(path).suffix.lower() in self._reader.suffixes

    def labels(self, raw: Any) -> list[str]:
        """The tokens of a text; the slots of pictures and sounds have no names."""
        return self._reader.labels(raw) if isinstance(self._reader, _Texts) else []

    def window(self, raw: Any) -> tuple[float, float, float, float]:
        """All of a picture, or what the image processor leaves of it."""
        whole = (0.0, 0.0, 1.0, 1.0)
        return self._reader.window(images.load_image(raw).size) if isinstance(self._reader, _Pictures) else whole

    def save_files(self, folder: Path) -> None:
        """Write the tokenizer of a text encoder."""
        if isinstance(self._reader, _Texts) and self._reader.tokenizer is not None:
            self._reader.tokenizer.save(str(folder / TOKENIZER))

    def load_files(self, folder: Path) -> None:
        """Read the tokenizer of a text encoder."""
        from tokenizers import Tokenizer

        if isinstance(self._reader, _Texts):
            with hf_errors(str(folder), "tokenizer", f"a whole {TOKENIZER}"):
                self._reader = _Texts(self.options, self.model, Tokenizer.from_file(str(folder / TOKENIZER)))


class _Pictures:
    """Pixels as the family's own image processor makes them; the cells of what the model sees are the last slots."""

    dimensions, suffixes = 2, images.SUFFIXES

    def __init__(self, options: Any, model: Any, tokenizer: None) -> None:
        self.facts, self.config = options.preprocessing or {}, model.config
        self.processor = class_of(self.facts.get("image_processor_type"), "ImageProcessor").from_dict(self.facts)
        self.width = self._probe(model)

    def prepare(self, raw: Any) -> dict[str, Tensor]:
        picture = images.load_image(raw)
        side = self.facts.get("size", {}).get("shortest_edge")
        if side and (self.facts.get("do_center_crop") or side < 384):  # ConvNeXT crops below 384 without saying so
            width, height = picture.size  # but a line of pixels, scaled by its short side, would fill all memory
            w, h = min(width, MOST_STRETCHED * height), min(height, MOST_STRETCHED * width)
            picture = picture.crop(((width - w) // 2, (height - h) // 2, (width + w) // 2, (height + h) // 2))
        return {"pixels": self.processor(picture, return_tensors="pt")["pixel_values"][0]}

    def window(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Of a picture of (width, height): scaled by its short side, it is cropped to what the model reads."""
        side, crop = self.facts.get("size", {}).get("shortest_edge"), self.facts.get("crop_size") or {}
        if not (side and self.facts.get("do_center_crop")):
            return images.center_square(size) if side else (0.0, 0.0, 1.0, 1.0)
        width, height = (n * side / min(size) for n in size)
        x, y = (max(0.0, (1 - crop.get(k, side) / n) / 2) for k, n in (("width", width), ("height", height)))
        return (x, y, 1 - x, 1 - y)

    def features(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Features:
        pixels = batch["pixels"]
        states = model(pixel_values=pixels).last_hidden_state
        if states.ndim == 4:
            rows, columns = states.shape[2:]
            states = states.flatten(2).transpose(1, 2)
        else:
            stages, patch = len(getattr(self.config, "depths", [1])), self.config.patch_size
            sides = (patch, patch) if isinstance(patch, int) else patch
            rounded = math.ceil if stages > 1 else math.floor  # a pyramid pads what is left over, a plain one drops it
            rows, columns = (rounded(n / (p * 2 ** (stages - 1))) for n, p in zip(pixels.shape[2:], sides))
        return Features(states, states.new_ones(states.shape[:2], dtype=torch.bool), (rows, columns))

    def _probe(self, model: Any) -> int:
        """F, by looking; at two pictures of different shapes, which must come out as one."""
        first, second = (self.prepare(Image.new("RGB", size))["pixels"] for size in ((64, 48), (48, 64)))
        given = f"the image processor gives pictures of {list(first.shape)}"
        if first.shape != second.shape:
            raise EncoderError(f"{given} and {list(second.shape)}; expected one size; set do_center_crop to true.")
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                return self.features(model.eval(), {"pixels": first[None]}).states.shape[-1]
        except (RuntimeError, ValueError) as error:
            size = getattr(self.config, "image_size", "another size")
            raise EncoderError(f"{given}; expected {size}, as its model; mend preprocessor_config.json.") from error
        finally:
            model.train()


class _Texts:
    """Tokens of the model's own tokenizer."""

    dimensions, suffixes = 1, frozenset[str]()

    def __init__(self, options: Any, model: Any, tokenizer: Any) -> None:
        self.config, self.width = model.config, model.config.hidden_size
        table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
        kept = getattr(table, "padding_idx", None)  # a table of positions may keep its first rows for the padding
        end = getattr(self.config, "max_position_embeddings", None)
        end = end and end - (0 if kept is None else kept + 1)
        if end and options.max_tokens and options.max_tokens > end:
            raise EncoderError(f"max_tokens is {options.max_tokens}; expected at most {end}, where the model ends.")
        limits = [limit for limit in (end, (options.preprocessing or {}).get("max_tokens")) if limit]
        self.tokenizer, self.most = tokenizer, options.max_tokens or min(limits, default=512)
        if tokenizer is not None:
            tokenizer.enable_truncation(self.most)
            tokenizer.no_padding()

    def prepare(self, raw: Any) -> dict[str, Tensor]:
        if self.tokenizer is None:
            raise EncoderError("the text encoder has no tokenizer; load its checkpoint, or call load_files(folder).")
        ids = self.tokenizer.encode(str(raw)).ids or [self.config.pad_token_id or 0]  # no text is empty
        return {"tokens": torch.tensor(ids), "mask": torch.ones(len(ids), dtype=torch.bool)}

    def labels(self, raw: Any) -> list[str]:
        ids = self.prepare(raw)["tokens"].tolist()
        return [self.tokenizer.decode([token], skip_special_tokens=False) for token in ids]

    def features(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Features:
        mask = batch["mask"]
        return Features(model(input_ids=batch["tokens"], attention_mask=mask.long()).last_hidden_state, mask)


class _Sounds:
    """Whisper's window of one length, or wav2vec2's samples of any."""

    dimensions, suffixes = 1, audio.SUFFIXES

    def __init__(self, options: Any, model: Any, tokenizer: None) -> None:
        self.config, self.width = model.config, model.config.hidden_size
        facts = options.preprocessing or {}
        self.extractor = class_of(facts.get("feature_extractor_type"), "FeatureExtractor").from_dict(facts)
        self.rate = self.extractor.sampling_rate
        self.convolutions = list(zip(getattr(self.config, "conv_kernel", []), getattr(self.config, "conv_stride", [])))
        self.least = 1  # samples, so that there is one frame
        for kernel, stride in reversed(self.convolutions):
            self.least = (self.least - 1) * stride + kernel

    def prepare(self, raw: Any) -> dict[str, Tensor]:
        samples = audio.load_audio(raw, self.rate)
        samples = nn.functional.pad(samples, (0, max(0, self.least - len(samples))))
        read = self.extractor(samples.numpy(), sampling_rate=self.rate, return_tensors="pt")
        if not self.convolutions:
            return {"spectrum": read["input_features"][0]}
        return {"samples": read["input_values"][0], "mask": torch.ones(len(samples), dtype=torch.bool)}

    def features(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Features:
        """All of Whisper's window may be attended, as its own decoder does: it was trained to hear the silence too.

        Where convolutions norm over time, padding would change every state and no mask hides it. There rows of one
        length are run together and others apart: slower, and alone as in a batch.
        """
        if not self.convolutions:
            states = model(batch["spectrum"]).last_hidden_state
            return Features(states, states.new_ones(states.shape[:2], dtype=torch.bool))
        samples, mask = batch["samples"], batch["mask"]
        frames = lengths = mask.sum(1)
        for kernel, stride in self.convolutions:
            frames = (frames - kernel) // stride + 1
        if self.config.feat_extract_norm == "layer":
            states = model(samples, attention_mask=mask.long()).last_hidden_state
        else:
            states = _by_length(model, samples, lengths.tolist())
        return Features(states, torch.arange(states.shape[1], device=mask.device) < frames[:, None])


def _by_length(model: nn.Module, samples: Tensor, lengths: list[int]) -> Tensor:
    """[B, T] -> [B, S, F], the rows of each length together, without their padding."""
    pieces: dict[int, Tensor] = {}
    for length in sorted(set(lengths)):
        rows = [row for row, own in enumerate(lengths) if own == length]
        pieces.update(zip(rows, model(samples[rows, :length]).last_hidden_state))
    return nn.utils.rnn.pad_sequence([pieces[row] for row in range(len(lengths))], batch_first=True)
