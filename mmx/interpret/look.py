"""Look: what was said, and for each word what was looked at, as numbers and over the input itself.

Alphabet: W words, L looking layers, H heads, S slots; rows and columns of a source's grid.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from mmx.errors import MmxError, suggest
from mmx.interpret.attention_stats import attention_sink_mass, entropy, is_uniform, relative_entropy
from mmx.interpret.grid import WHOLE, heatmap, segment_cells
from mmx.interpret.relevance import relevance_maps
from mmx.io.atomic import atomic_write
from mmx.memory import Box, Segment

MapMethod = Literal["weighted", "attention", "relevance", "both"]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".json", ".safetensors")  # of what `Look.save` writes


@dataclass(frozen=True)
class WordInformation:
    """A word that was said: its log-probability in nats, and how many bits of it were saved by looking (beside what the
    text so far tells, and the question, whoever reads it)."""

    text: str
    logprob: float
    gain: float


@dataclass(frozen=True)
class SourceView:
    """Where a source's slots lie: in the memory, and on its input. name: the source, numbered where it comes again;
    picture: what was looked at, where it is one; labels: names of the slots, where they have some; window and
    displacement: see `Encoder.window` and `grid`."""

    segment: Segment
    source_name: str
    picture: Image.Image | None = None
    labels: tuple[str, ...] = ()
    window: Box = WHOLE
    displacement: tuple[float, float] = (0.0, 0.0)

    def part(self, maps: Tensor) -> Tensor:
        """Its slots of maps [..., S]."""
        return maps[..., self.segment.start : self.segment.stop]


@dataclass(frozen=True)
class Look:
    """A text and what it looked at. attention, weighted, relevance: [W, L, H, S]; of attention a word's mean over its
    tokens; relevance only where it was asked for. seen: bool [W, S], what there was to see; gates: the opening of each
    layer's gate, where there is one.

    by: what the maps show. `attention` is the softmax itself; `weighted` weighs each slot by what it hands over;
    `relevance` by what the word gained by it (a gradient); `both` is the mean of the last two, the truest on scenes.
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

    def map(self, word: int | str, layer: int | None = None, head: int | None = None) -> Tensor:
        """Where a word looked, [S], summing to one: the mean over layers and heads, or over those asked for. All zeros
        where there is nothing to show: no slot in view, or none that handed anything over or spoke for the word."""
        return self.maps(layer, head)[self.index(word)]

    def maps(self, layer: int | None = None, head: int | None = None) -> Tensor:
        """The maps of all words, [W, S]. Raises MmxError for a layer or a head that is not there."""
        for name, chosen, count in zip(("layer", "head"), (layer, head), self.attention.shape[1:3]):
            if chosen is not None and not 0 <= chosen < count:
                raise MmxError(f"{name} {chosen} is not there; the model has {name}s 0 to {count - 1}.")
        layers, heads = (slice(None) if n is None else slice(n, n + 1) for n in (layer, head))
        parts = []
        if self.method in ("relevance", "both") and self.relevance is not None:
            parts.append(relevance_maps(self.relevance[:, layers, heads]))
        if self.method != "relevance":
            parts.append(
                (self.attention if self.method == "attention" else self.weighted)[:, layers, heads].sum((1, 2))
            )
        shares = torch.stack([part / part.sum(-1, keepdim=True).clamp(min=1e-12) for part in parts])
        return shares.sum(0) / shares.any(-1).sum(0).clamp(min=1)[:, None]  # where one shows nothing, the other alone

    def entropies(self) -> Tensor:
        """How wide each spotlight was, [W, L, H]: its entropy as a share of the largest there can be over what was in
        view; 0 for one slot, 1 for the plain average."""
        return relative_entropy(self.attention, self.visible[:, None, None])

    def shares(self, layer: int | None = None, head: int | None = None) -> dict[str, Tensor]:
        """The share of each word's map that lies on each source, [W] by its name."""
        maps = self.maps(layer, head)
        return {place.source_name: place.part(maps).sum(-1) for place in self.views}

    def heatmap(
        self,
        word: int | str,
        height: int,
        width: int,
        layer: int | None = None,
        head: int | None = None,
        source: str | None = None,
    ) -> Tensor:
        """A word's map over its picture, [height, width], as it is drawn. Raises MmxError where there is no grid."""
        on_grid = [place for place in self.views if place.segment.grid]
        place = next((place for place in on_grid if source in (None, place.source_name)), None)
        if place is None:
            known = ", ".join(place.source_name for place in on_grid) or "none"
            raise MmxError(f"source {source or 'of any name'} does not lie on a grid; those that do: {known}.")
        cells = segment_cells(self.map(word, layer, head), place.segment)
        return heatmap(cells, height, width, place.displacement, place.window)

    def index(self, word: int | str) -> int:
        """The first place of a word among the words; see `indices`."""
        return self.indices(word)[0]

    def indices(self, word: int | str) -> list[int]:
        """The places of a word among the words, wherever it was said. Raises MmxError for one that was not."""
        said = [_bare(w.text) for w in self.words]
        if isinstance(word, str):
            found = [place for place, text in enumerate(said) if text == _bare(word)]
        else:
            found = [word % len(said)] if not isinstance(word, bool) and -len(said) <= word < len(said) else []
        if not found:
            hint = (
                suggest(word, list(dict.fromkeys(said))) if isinstance(word, str) and said else f"it has {len(said)}."
            )
            raise MmxError(f"the text {self.text!r} has no word {word!r}; {hint}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, for JSON: by word, and by layer and head."""
        maps, shares, seen = self.maps(), self.shares(), self.visible[:, None, None]
        wide, bits = self.entropies(), entropy(self.attention)
        flat = is_uniform(self.attention, seen)
        words = [
            {
                "word": word.text,
                "logprob": _round(word.logprob),
                "bits_saved": _round(word.gain),
                "shares": {name: _round(share[index]) for name, share in shares.items()},
                "entropy": _round(bits[index]),
                "relative_entropy": _round(wide[index]),
                "uniform": flat[index].tolist(),
                "maps": {place.source_name: _round(_shaped(maps[index], place.segment)) for place in self.views},
            }
            for index, word in enumerate(self.words)
        ]
        return {
            "text": self.text,
            "question": self.question,
            "by": self.method,
            "words": words,
            "sink_mass": _round(attention_sink_mass(self.attention)) if self.words else [],
            "gates": None if None in self.gates else [_round(gate) for gate in self.gates],
            "sources": {place.source_name: _told(place) for place in self.views},
        }

    def save(
        self,
        path: str | Path,
        words: int | str | Sequence[int | str] | None = None,
        layer: int | None = None,
        head: int | None = None,
    ) -> Path:
        """Write a picture (.png, .jpg, .webp) of all words or some, of all layers and heads or one; or, of all of them,
        the numbers (.json) or arrays (.safetensors: attention, weighted, relevance [W, L, H, S], seen [W, S]). Whole or
        not at all. Raises MmxError for what is not there, and for a path that cannot be written."""
        from mmx.interpret.render import render_look

        path, chosen = check_suffix(path), self._places_of_words(words)
        self.maps(layer, head)
        writers: dict[str, Any] = {
            ".json": lambda place: place.write_text(json.dumps(self.to_dict(), ensure_ascii=False) + "\n", "utf-8"),
            ".safetensors": self._save_arrays,
        }
        writer = writers.get(path.suffix.lower()) or render_look(self, chosen, layer, head).save
        try:
            with atomic_write(path) as temporary:
                writer(temporary)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            reason = getattr(error, "strerror", None) or error
            raise MmxError(f"{path} cannot be written: {reason}; choose another name.") from error
        return path

    def _places_of_words(self, words: int | str | Sequence[int | str] | None) -> list[int]:
        """The places of the words asked for, each once, in the order asked."""
        if words is None:
            return list(range(len(self.words)))
        asked = [words] if isinstance(words, str | int) else words
        return list(dict.fromkeys(place for word in asked for place in self.indices(word)))

    def _save_arrays(self, path: Path) -> None:
        from safetensors.torch import save_file

        said = json.dumps([word.text for word in self.words])
        kinds = {"attention": self.attention, "weighted": self.weighted, "relevance": self.relevance}
        tensors = {name: t for name, t in {**kinds, "seen": self.visible}.items() if t is not None}
        save_file({name: t.contiguous() for name, t in tensors.items()}, str(path), metadata={"words": said})


def check_suffix(path: str | Path) -> Path:
    """The path, if its suffix is one that `Look.save` knows. Raises MmxError."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise MmxError(f"{str(path)!r} ends in none of {', '.join(SUFFIXES)}; give such a name.")
    return path


def _bare(word: str) -> str:
    """A word without the signs round it, unless it is nothing else."""
    signs = "".join({letter for letter in word if unicodedata.category(letter)[0] == "P"})
    return word.strip(signs) or word


def _told(place: SourceView) -> dict[str, Any]:
    slots = place.segment.stop - place.segment.start
    return {"slots": slots, "grid": place.segment.grid, "labels": list(place.labels)}


def _shaped(weights: Tensor, segment: Segment) -> Tensor:
    return segment_cells(weights, segment) if segment.grid else weights[segment.start : segment.stop]


def _round(number: Any) -> Any:
    """Five decimals are enough for people; lists of lists from tensors."""
    if isinstance(number, Tensor):
        return _round(number.tolist())
    return [_round(item) for item in number] if isinstance(number, list) else round(float(number), 5)
