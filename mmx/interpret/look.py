"""Look: a text with the attention and relevance of its words, as numbers, heatmaps and files.

Axes: W words, L cross-attention layers, H heads, S slots; R rows and C columns of a source's grid.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mmx.errors import MmxError, suggest
from mmx.interpret.attention_stats import attention_sink_mass, entropy, is_uniform, normalized_entropy
from mmx.interpret.grid import segment_cells
from mmx.interpret.relevance import relevance_maps
from mmx.interpret.render import render_word_maps
from mmx.interpret.word_maps import EPSILON, SourceView, WordInformation, WordMaps, source_shares
from mmx.io.atomic import atomic_write

MapMethod = Literal["weighted", "attention", "relevance", "both"]
METHOD_DESCRIPTIONS: Mapping[MapMethod, str] = {
    "attention": "attention weights",
    "weighted": "attention weighted by the norm of the values",
    "relevance": "attention weighted by its gradient",
    "both": "mean of value-weighted and gradient-weighted attention",
}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".json", ".safetensors")  # file formats of `Look.save`
DECIMALS = 5  # of the numbers in JSON files


@dataclass(frozen=True)
class Look:
    """A text and the attention of its words to the slots of a memory.

    Args:
        text: the text.
        question: the question that it answers, or None.
        words: W words with their log-probability and information gain.
        attention: [W, L, H, S], attention weights, averaged over the tokens of a word.
        weighted: [W, L, H, S], the same weighted by the norm of the values.
        relevance: [W, L, H, S], attention weighted by its gradient; None if `method` does not need it.
        method: what `map`, `maps`, `heatmap` and files show: "attention" is the softmax itself, "weighted" and
            "relevance" as above, "both" the mean of the last two, which is the most faithful on synthetic scenes.
        visible: bool [W, S], the slots visible to each word.
        views: the sources of the slots.
        gates: the value of each layer's gate, None where a layer has none.
    """

    text: str
    question: str | None
    words: tuple[WordInformation, ...]
    attention: Tensor
    weighted: Tensor
    relevance: Tensor | None
    method: MapMethod
    visible: Tensor
    views: tuple[SourceView, ...]
    gates: tuple[float | None, ...]

    def __repr__(self) -> str:
        slots = self.attention.shape[-1]
        return f"Look({self.text!r}, words={len(self.words)}, slots={slots}, method={self.method!r})"

    def map(self, word: int | str, layer: int | None = None, head: int | None = None) -> Tensor:
        """The map of one word, [S]; see `maps`."""
        return self.maps(layer, head)[self.index(word)]

    def maps(self, layer: int | None = None, head: int | None = None) -> Tensor:
        """The maps of all words, [W, S], averaged over all layers and heads or those given. Each row sums to one.

        A row is all zero if no slot is visible, or no slot contributes to the word. Raises MmxError for an unknown
        layer or head.
        """
        layers = _index_slice("layer", layer, self.attention.shape[1])
        heads = _index_slice("head", head, self.attention.shape[2])
        parts = []
        if self.method in ("relevance", "both") and self.relevance is not None:
            parts.append(relevance_maps(self.relevance[:, layers, heads]))
        if self.method != "relevance":
            attention = self.attention if self.method == "attention" else self.weighted
            parts.append(attention[:, layers, heads].sum((1, 2)))
        normalized = torch.stack([part / part.sum(-1, keepdim=True).clamp(min=EPSILON) for part in parts])
        nonzero = normalized.any(-1).sum(0).clamp(min=1)  # a part that is all zero does not enter the mean
        return normalized.sum(0) / nonzero[:, None]

    def entropies(self) -> Tensor:
        """Normalized entropy of the attention of each word over its visible slots, [W, L, H], in 0..1."""
        return normalized_entropy(self.attention, self.visible[:, None, None])

    def shares(self, layer: int | None = None, head: int | None = None) -> dict[str, Tensor]:
        """The fraction of each word's map that is on each source, [W] by source name."""
        return source_shares(self.maps(layer, head), self.views)

    def heatmap(
        self,
        word: int | str,
        height: int,
        width: int,
        layer: int | None = None,
        head: int | None = None,
        source: str | None = None,
    ) -> Tensor:
        """The map of a word over the input of a source, [height, width]; by default the first source with a grid.

        Raises MmxError if there is no such source.
        """
        return self._grid_view(source).heatmap(self.map(word, layer, head), height, width)

    def index(self, word: int | str) -> int:
        """The index of a word, the first one if there are several; see `indices`."""
        return self.indices(word)[0]

    def indices(self, word: int | str) -> list[int]:
        """All indices of a word, ignoring punctuation around it. Raises MmxError for an unknown word."""
        words = [_strip_punctuation(item.text) for item in self.words]
        found: list[int] = []
        hint = f"the text has {len(words)} words."
        if isinstance(word, str):
            found = [index for index, text in enumerate(words) if text == _strip_punctuation(word)]
            hint = suggest(word, list(dict.fromkeys(words))) if words else hint
        elif not isinstance(word, bool) and -len(words) <= word < len(words):
            found = [word % len(words)]
        if not found:
            raise MmxError(f"the text {self.text!r} has no word {word!r}; {hint}", code="look.word", word=word)
        return found

    def word_maps(self, layer: int | None = None, head: int | None = None) -> WordMaps:
        """The maps of all words with everything needed to draw them."""
        selected = [_describe_selection("layer", layer), _describe_selection("head", head)]
        return WordMaps(
            title=self.text if self.question is None else f"{self.question}  {self.text}",
            description=f"{METHOD_DESCRIPTIONS[self.method]}; {', '.join(selected)}",
            words=self.words,
            maps=self.maps(layer, head),
            views=self.views,
        )

    def render(
        self, words: int | str | Sequence[int | str] | None = None, layer: int | None = None, head: int | None = None
    ) -> Image.Image:
        """Draw the maps of all words or those given. Raises MmxError for an image that would be too large."""
        return render_word_maps(self.word_maps(layer, head), self._word_indices(words))

    def to_dict(self) -> dict[str, object]:
        """All numbers as plain values for JSON, by word and by layer and head."""
        sources = {}
        for view in self.views:
            slots = view.segment.stop - view.segment.start
            sources[view.source_name] = {"slots": slots, "grid": view.segment.grid, "labels": list(view.labels)}
        return {
            "text": self.text,
            "question": self.question,
            "method": self.method,
            "words": self._word_dicts(),
            "sink_mass": _rounded(attention_sink_mass(self.attention)) if self.words else [],
            "gates": None if None in self.gates else [_rounded(gate) for gate in self.gates],
            "sources": sources,
        }

    def save(
        self,
        path: str | Path,
        words: int | str | Sequence[int | str] | None = None,
        layer: int | None = None,
        head: int | None = None,
    ) -> Path:
        """Write an image, the numbers, or the arrays to a file, atomically.

        Args:
            path: ends in .png, .jpg or .webp for an image; .json for the numbers of `to_dict`; .safetensors for the
                arrays attention, weighted, relevance [W, L, H, S] and visible [W, S].
            words: the words in the image, all by default.
            layer: the layer in the image, the mean over all by default.
            head: the head in the image, the mean over all by default.

        Raises:
            MmxError: an unknown word, layer, head or suffix, or a path that cannot be written.
        """
        path = check_suffix(path)
        self._word_indices(words)
        self.maps(layer, head)
        suffix = path.suffix.lower()
        writer: Callable[[Path], object]
        if suffix == ".json":
            writer = self._write_json
        elif suffix == ".safetensors":
            writer = self._write_arrays
        else:
            writer = self.render(words, layer, head).save
        try:
            with atomic_write(path) as temporary:
                writer(temporary)
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            reason = getattr(error, "strerror", None) or error
            raise MmxError(
                f"{path} cannot be written: {reason}; choose another name.", code="look.write", path=str(path)
            ) from error
        return path

    def _word_dicts(self) -> list[dict[str, object]]:
        maps = self.maps()
        shares = self.shares()
        bits = entropy(self.attention)
        normalized = self.entropies()
        uniform = is_uniform(self.attention, self.visible[:, None, None])
        words: list[dict[str, object]] = []
        for index, word in enumerate(self.words):
            row = {
                "word": word.text,
                "logprob": _rounded(word.logprob),
                "information_gain": _rounded(word.gain),
                "shares": {name: _rounded(share[index]) for name, share in shares.items()},
                "entropy": _rounded(bits[index]),
                "normalized_entropy": _rounded(normalized[index]),
                "uniform": uniform[index].tolist(),
                "maps": {view.source_name: _rounded(_source_map(maps[index], view)) for view in self.views},
            }
            words.append(row)
        return words

    def _write_json(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), ensure_ascii=False) + "\n", "utf-8")

    def _write_arrays(self, path: Path) -> None:
        tensors = {"attention": self.attention, "weighted": self.weighted, "visible": self.visible}
        if self.relevance is not None:
            tensors["relevance"] = self.relevance
        words = json.dumps([word.text for word in self.words])
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path), metadata={"words": words})

    def _grid_view(self, source: str | None) -> SourceView:
        """The first view with a grid and this source name (None: any)."""
        candidates = [view for view in self.views if view.segment.grid]
        for view in candidates:
            if source in (None, view.source_name):
                return view
        known = [view.source_name for view in candidates]
        given = "no source" if source is None else f"source {source!r} is not one"
        raise MmxError(
            f"{given} with a grid; expected one of: {', '.join(known) or 'none'}.",
            code="look.no_grid",
            source=source,
            known=known,
        )

    def _word_indices(self, words: int | str | Sequence[int | str] | None) -> list[int]:
        """The indices of the given words without duplicates, in the order given; None gives all."""
        if words is None:
            return list(range(len(self.words)))
        given = [words] if isinstance(words, str | int) else words
        return list(dict.fromkeys(index for word in given for index in self.indices(word)))


def check_suffix(path: str | Path) -> Path:
    """The path, if `Look.save` knows its suffix. Raises MmxError."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise MmxError(
            f"{str(path)!r} ends in none of {', '.join(SUFFIXES)}; give a name that does.",
            code="look.suffix",
            path=str(path),
            expected=SUFFIXES,
        )
    return path


def _index_slice(name: str, index: int | None, count: int) -> slice:
    if index is None:
        return slice(None)
    if not 0 <= index < count:
        raise MmxError(
            f"{name} {index} does not exist; the model has {name}s 0 to {count - 1}.",
            code=f"look.{name}",
            given=index,
            count=count,
        )
    return slice(index, index + 1)


def _describe_selection(name: str, index: int | None) -> str:
    return f"all {name}s" if index is None else f"{name} {index}"


def _strip_punctuation(word: str) -> str:
    """A word without punctuation around it, unless it is nothing but punctuation."""
    punctuation = "".join({char for char in word if unicodedata.category(char)[0] == "P"})
    return word.strip(punctuation) or word


def _source_map(weights: Tensor, view: SourceView) -> Tensor:
    return segment_cells(weights, view.segment) if view.segment.grid else view.slots(weights)


def _rounded(value: object) -> object:
    """Round a number, a tensor or nested lists of numbers to DECIMALS."""
    if isinstance(value, Tensor):
        return _rounded(value.tolist())
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(float(value), DECIMALS)  # type: ignore[arg-type]
