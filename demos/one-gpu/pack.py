"""python demos/one-gpu/pack.py data runs/pack: photographs, easy-VQA and scenes as three files that fit in one GPU.

`pictures.bin` holds encoded pictures back to back, `texts.npz` every text of every picture as tokens of the bundled
tokenizer, `said.json` what people said. Scenes are not painted here, only numbered: `train.py` paints them.
"""

import io
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from mmx.config.schema import DataConfig
from mmx.data.examples import Example, TextTask
from mmx.data.formats import read_examples
from mmx.data.scene_texts import captions, pointed_questions, questions
from mmx.data.scenes import generate_scene
from mmx.models.checkpoint import BUNDLED, TOKENIZER
from mmx.text.prompts import caption_prompt, normalize_caption, question_prompt
from mmx.text.tokenizer import Tokenizer

WIDTH = 26  # tokens of the longest text that is kept whole: prompt, target and end
SCENES = ((1, ()), (3, ("color", "size", "relation", "position")))  # seed, kinds of questions (none: all, and captions)
OTHER_SIDE = {"left": "right", "right": "left", "leftmost": "rightmost", "rightmost": "leftmost"}


@dataclass
class Texts:
    """Texts of pictures as one table. A picture's captions stand first, its questions behind them."""

    tokenizer: Tokenizer
    rows: list[list[int]] = field(default_factory=list)
    mirrored: list[list[int]] = field(default_factory=list)  # the same, told of the mirror image
    starts: list[int] = field(default_factory=list)  # tokens of the prompt
    boxes: list[tuple[float, ...]] = field(default_factory=list)
    pictures: list[tuple[int, int, int]] = field(default_factory=list)  # first row, captions, questions

    def add(self, turns: list[TextTask]) -> None:
        """The texts of the next picture."""
        turns = sorted(turns, key=lambda turn: turn.question is not None)
        first = len(self.rows)
        said = 0
        for turn in turns:
            for target in turn.targets:
                row, start = self._tokens(turn.question, target)
                other, _ = self._tokens(turn.question and mirrored(turn.question), mirrored(target))
                self.rows.append(row)
                self.mirrored.append(other if len(other) == len(row) else row)
                self.starts.append(start)
                self.boxes.append(turn.box or (np.nan,) * 4)
                said += turn.question is None
        self.pictures.append((first, said, len(self.rows) - first - said))

    def _tokens(self, question: str | None, target: str) -> tuple[list[int], int]:
        tokenizer = self.tokenizer
        prompt = tokenizer.encode_prompt(caption_prompt() if question is None else question_prompt(question))
        target_tokens = tokenizer.encode(normalize_caption(target))[: WIDTH - 1 - len(prompt)]
        return [*prompt, *target_tokens, tokenizer.eos_token_id], len(prompt)

    def arrays(self) -> dict[str, np.ndarray]:
        """What `train.py` reads."""
        rows, other = (np.full((len(self.rows), WIDTH), self.tokenizer.pad_token_id, np.int16) for _ in range(2))
        for place, (row, mirror) in enumerate(zip(self.rows, self.mirrored, strict=True)):
            rows[place, : len(row)], other[place, : len(row)] = row, mirror
        return {
            "rows": rows,
            "mirrored": other,
            "starts": np.array(self.starts, np.int16),
            "lengths": np.array([len(row) for row in self.rows], np.int16),
            "boxes": np.array(self.boxes, np.float32),
            "pictures": np.array(self.pictures, np.int32),
        }


def mirrored(text: str) -> str:
    """What is left is right."""
    return re.sub(r"\b(left|right)(most)?\b", lambda found: OTHER_SIDE[found.group()], text)


def scene_turns(seed: int, number: int, kinds: tuple[str, ...]) -> list[TextTask]:
    """What may be learned of a scene; nothing where it offers no question of these kinds."""
    scene = generate_scene(seed, number)
    asked = [q for q in (*questions(scene), *pointed_questions(scene)) if not kinds or q.question_type in kinds]
    said = [] if kinds else [TextTask(captions(scene))]
    return said + [TextTask((q.answer,), q.question, q.question_type, q.box) for q in asked]


def photograph(example: Example) -> bytes:
    """The picture as WebP, a third of its JPEG."""
    buffer = io.BytesIO()
    Image.open(example.sources["image"]).convert("RGB").save(buffer, "WEBP", quality=70, method=6)
    return buffer.getvalue()


def main(data: str, out: str, scenes: str = "24000") -> None:
    """Write the three files, with so many scenes of each seed."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_json((BUNDLED / TOKENIZER).read_text(encoding="utf-8"))
    flickr = f"{data}/flickr8k/dataset_flickr8k.json"
    photos = list(read_examples(DataConfig(path=flickr, split="train", derive_questions=True)))
    easy = list(read_examples(DataConfig(path=f"{data}/easy_vqa/train.jsonl", fraction=(0, 0.9))))
    texts, pictures = Texts(tokenizer), []
    for example in photos + easy:
        texts.add(list(example.tasks))
    pictures += [photograph(example) for example in photos]
    pictures += [Path(example.sources["image"]).read_bytes() for example in easy]
    numbers = []
    for seed, kinds in SCENES:
        for number in range(int(scenes)):
            if turns := scene_turns(seed, number, kinds):
                texts.add(turns)
                numbers.append((seed, number))
    (folder / "pictures.bin").write_bytes(b"".join(pictures))
    ends = np.cumsum([len(picture) for picture in pictures])
    counts = np.array([len(photos), len(easy)])
    np.savez_compressed(folder / "texts.npz", ends=ends, counts=counts, scenes=np.array(numbers), **texts.arrays())
    said = [[t for turn in e.tasks if turn.question is None for t in turn.targets] for e in photos]
    (folder / "said.json").write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
