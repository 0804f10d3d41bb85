"""Text to tokens and back: a byte-level BPE of the `tokenizers` library, with the marks of `mmx.text.prompts`.

Byte-level means that there is no unknown text. `tokenizer.json` is the library's own format, which transformers'
PreTrainedTokenizerFast reads as well.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mmx.errors import CheckpointError, MmxError
from mmx.text.prompts import BOS, CAPTION, EOS, PAD, SPECIAL_TOKENS, Prompt, SpecialToken, normalize_whitespace


class Tokenizer:
    """`encode` and `decode` plain text, `prompt` to tokens. Holds the ids of pad and eos.

    A mark is a token of its own, or, where `marks` names it ("bos", "caption", ...), those tokens (of a tokenizer that
    was not made here). With `marks`, some may be lacking: that is a task which the model was not made for.
    """

    def __init__(self, engine: Engine, marks: Mapping[str, Sequence[int]] | None = None) -> None:
        # With this switch a person who types "<eos>" gets its letters, not the mark.
        engine.encode_special_tokens = True
        self.engine = engine
        self.marks = {
            mark: ids for mark in SPECIAL_TOKENS if (ids := _tokens_of(engine, mark, marks or {})) is not None
        }
        self.pad, self.eos = (self.marks[mark][0] for mark in (PAD, EOS))

    def __len__(self) -> int:
        return int(self.engine.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Plain text to tokens; no mark is added or read. Raises MmxError for half a character, as a terminal makes of
        bytes that are no UTF-8."""
        try:
            return list(self.engine.encode(text, add_special_tokens=False).ids)
        except TypeError:
            raise MmxError(f"{text!r:.60} has a half of a character; expected a text in UTF-8.") from None

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens to text; marks are left out."""
        return normalize_whitespace(self.engine.decode(list(tokens), skip_special_tokens=True))

    def words(self, tokens: Sequence[int]) -> list[tuple[str, list[int]]]:
        """The words of a text, each with the places of its tokens, in order; a mark belongs to no word.

        Words are what spaces part; a token that reaches over several is a piece of each. Holds for every kind of
        tokenizer: of bytes, word pieces or sentence pieces.
        """
        so_far = [self.engine.decode(list(tokens[:n]), skip_special_tokens=True) for n in range(len(tokens) + 1)]
        # Half a letter is shown as another one: what a token adds ends where the text still agrees with the whole.
        known = [len(os.path.commonprefix([text, so_far[-1]])) for text in so_far]
        spans = [(*found.span(), found.group(), list[int]()) for found in re.finditer(r"\S+", so_far[-1])]
        marks = {token for token, added in self.engine.get_added_tokens_decoder().items() if added.special}
        for place, token in enumerate(tokens):
            begins, ends = known[place], known[place + 1]
            touched = [span for span in spans if span[0] < ends and span[1] > begins]
            touched = touched or [span for span in spans if span[1] > begins][:1]
            for *_, pieces in touched if token not in marks else ():
                pieces.append(place)
        return [(text, pieces) for *_, text, pieces in spans]

    def prompt(self, prompt: Prompt) -> list[int]:
        """A prompt to tokens: marks by their ids, strings as plain text. Raises MmxError for a task that is lacking."""
        if lacking := next((p for p in prompt if p in SPECIAL_TOKENS and p not in self.marks), None):
            made, asked = ("answer questions", "caption") if lacking is CAPTION else ("caption", "answer questions")
            raise MmxError(f"this model was made to {made}, not to {asked}; give another model with --model.")
        parts = (self.marks[p] if isinstance(p, SpecialToken) else self.encode(p) for p in prompt)
        return [token for part in parts for token in part]

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        self.engine.save(str(path))

    def to_json(self) -> str:
        """The content of `tokenizer.json`."""
        return str(self.engine.to_str())

    @staticmethod
    def from_json(
        text: str, where: str = "tokenizer.json", marks: Mapping[str, Sequence[int]] | None = None
    ) -> Tokenizer:
        """Rebuild from the content of a `tokenizer.json`."""
        try:
            return Tokenizer(Engine.from_str(text), marks)
        except CheckpointError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{where} is no tokenizer; expected a file of the tokenizers library.") from error

    @staticmethod
    def train(texts: Iterable[str], vocabulary: int) -> Tokenizer:
        """Learn at most `vocabulary` tokens from texts (Sennrich et al. 2016, byte-pair encoding). Case is folded."""
        engine = Engine(models.BPE())
        engine.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        engine.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[mark.text for mark in SPECIAL_TOKENS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            min_frequency=2,
            show_progress=False,
        )
        engine.train_from_iterator(texts, trainer)
        return Tokenizer(engine)


def _tokens_of(engine: Engine, mark: SpecialToken, marks: Mapping[str, Sequence[int]]) -> list[int] | None:
    """The tokens of a mark; None for a task that the marks do not name."""
    name = mark.text.strip("<>")
    if name in marks:
        return list(marks[name])
    found = engine.token_to_id(mark.text)
    if found is not None:
        return [int(found)]
    if marks and mark not in (PAD, BOS, EOS):
        return None
    raise CheckpointError(f"the tokenizer has no token {mark.text!r}; train one with mmx, or add it to this one.")
