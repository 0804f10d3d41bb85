"""Text to tokens and back: a byte-level BPE of the `tokenizers` library, with the marks of `mmx.prompts`.

Byte-level means that there is no unknown text. `tokenizer.json` is the library's own format, which transformers'
PreTrainedTokenizerFast reads as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mmx.errors import CheckpointError
from mmx.prompts import BOS, EOS, MARKS, PAD, Mark, Prompt, tidy_text


class Tokenizer:
    """`encode` and `decode` plain text, `prompt` to tokens. Holds the ids of pad, bos and eos."""

    def __init__(self, engine: Engine) -> None:
        # With this switch a person who types "<eos>" gets its letters, not the mark.
        engine.encode_special_tokens = True
        self.engine = engine
        self.ids = {mark: _id(engine, mark) for mark in MARKS}
        self.pad, self.bos, self.eos = (self.ids[mark] for mark in (PAD, BOS, EOS))

    def __len__(self) -> int:
        return int(self.engine.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Plain text to tokens; no mark is added or read."""
        return list(self.engine.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens to text; marks are left out."""
        return tidy_text(self.engine.decode(list(tokens), skip_special_tokens=True))

    def prompt(self, prompt: Prompt) -> list[int]:
        """A prompt to tokens: marks by their ids, strings as plain text."""
        parts = ([self.ids[p]] if isinstance(p, Mark) else self.encode(p) for p in prompt)
        return [token for part in parts for token in part]

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        self.engine.save(str(path))

    def to_json(self) -> str:
        """The content of `tokenizer.json`."""
        return str(self.engine.to_str())

    @staticmethod
    def from_json(text: str, where: str = "tokenizer.json") -> Tokenizer:
        """Rebuild from the content of a `tokenizer.json`."""
        try:
            return Tokenizer(Engine.from_str(text))
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
            special_tokens=[mark.text for mark in MARKS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            min_frequency=2,
            show_progress=False,
        )
        engine.train_from_iterator(texts, trainer)
        return Tokenizer(engine)


def _id(engine: Engine, mark: Mark) -> int:
    found = engine.token_to_id(mark.text)
    if found is None:
        raise CheckpointError(f"the tokenizer has no token {mark.text!r}; train one with mmx, or add it to this one.")
    return int(found)
