"""Text to tokens and back: a byte-level BPE of the `tokenizers` library with the special tokens of `mmx.text.prompts`.

Byte-level means that no text is unknown. `tokenizer.json` is in the library's own format, which transformers'
PreTrainedTokenizerFast reads as well.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mmx.errors import CheckpointError, MmxError
from mmx.text.prompts import BOS, CAPTION, EOS, PAD, SPECIAL_TOKENS, Prompt, SpecialToken

REPLACEMENT = "\ufffd"  # stands for bytes that are not UTF-8
MAX_CHARACTER_BYTES = 4


def _byte_of_letter() -> dict[str, int]:
    """The byte of each letter of byte-level tokens: printable ones stand for themselves, others for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + number): byte for number, byte in enumerate(others)}


BYTE_OF_LETTER = _byte_of_letter()


class WordTokens(NamedTuple):
    """A word of a text and the positions of its tokens."""

    text: str
    positions: list[int]


class Tokenizer:
    """Encodes plain text and prompts, and decodes tokens.

    Args:
        backend: tokenizer of the `tokenizers` library.
        special_tokens: token ids by name (`bos`, `caption`, ...) for a backend that was not trained here and lacks the
            special tokens of mmx. Tasks whose special tokens are then still missing are not available.

    Attributes:
        special_tokens: token ids of each special token; several or none for a backend that was not trained here.
        pad_token_id: id of the padding token.
        eos_token_id: id of the token that ends a text.

    Raises:
        CheckpointError: code `tokenizer.special_token`, if the backend lacks a special token that is not given.
    """

    def __init__(self, backend: Backend, special_tokens: Mapping[str, Sequence[int]] | None = None) -> None:
        backend.encode_special_tokens = True  # "<eos>" typed by a user is encoded as text
        self.backend = backend
        self._added_tokens = backend.get_added_tokens_decoder()
        self._is_byte_level = backend.decoder is not None and b'"ByteLevel"' in backend.decoder.__getstate__()
        self.special_tokens: dict[SpecialToken, list[int]] = {}
        for token in SPECIAL_TOKENS:
            ids = _special_token_ids(backend, token, special_tokens or {})
            if ids is not None:
                self.special_tokens[token] = ids
        self.pad_token_id = self.special_tokens[PAD][0]
        self.eos_token_id = self.special_tokens[EOS][0]

    def __len__(self) -> int:
        return int(self.backend.get_vocab_size())

    def __repr__(self) -> str:
        names = ", ".join(token.name for token in self.special_tokens)
        return f"Tokenizer({len(self)} tokens, special tokens: {names})"

    # ---- encoding ----------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a plain text, without special tokens.

        Raises:
            MmxError: code `tokenizer.encoding`, for a lone surrogate, as a terminal makes of bytes that are not UTF-8.
        """
        try:
            return list(self.backend.encode(text, add_special_tokens=False).ids)
        except TypeError:
            raise MmxError(
                f"{text!r:.60} holds an incomplete character; expected a text in UTF-8.", code="tokenizer.encoding"
            ) from None

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt. Raises MmxError (tokenizer.task) for a task that the model does not have."""
        tokens: list[int] = []
        for item in prompt:
            if isinstance(item, str):
                tokens += self.encode(item)
            elif item in SPECIAL_TOKENS and item not in self.special_tokens:
                raise _missing_task(item)
            else:
                tokens += self.special_tokens[item]
        return tokens

    # ---- decoding ----------------------------------------------------------------------------------------------

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens, white space at its ends, and an incomplete last character.

        A text can end in the middle of a character where the number of its tokens is limited.
        """
        text = self._decode(tokens)
        if text.endswith(REPLACEMENT) and self._ends_inside_character(tokens):
            text = self._decode_complete(tokens)
        return text.strip()

    def pieces(self) -> list[bytes]:
        """Return the bytes that each token adds to a text; none for a special token.

        For vocabularies of words or sentence pieces they are those after another token: most begin with a space.
        """
        before = self.encode("a")[:1]
        prefix = self._decode(before)
        pieces: list[bytes] = []
        for token in range(len(self)):
            name = str(self.backend.id_to_token(token) or "")
            if self._is_special(token):
                pieces.append(b"")
            elif self._is_byte_level or re.fullmatch(r"<0x[0-9A-F]{2}>", name):
                pieces.append(self._bytes_of(token))
            else:
                pieces.append(self._decode([*before, token]).removeprefix(prefix).encode())
        return pieces

    def truncate(self, tokens: Sequence[int], max_tokens: int) -> list[int]:
        """Return the first tokens, at most `max_tokens`, that end where a character ends."""
        kept = list(tokens[:max_tokens])
        while kept and self._ends_inside_character(kept):
            kept.pop()
        return kept

    def words(self, tokens: Sequence[int]) -> list[WordTokens]:
        """Return the words of a text, separated by spaces, with the positions of their tokens.

        Special tokens belong to no word; a token that reaches over several words belongs to each of them. Works for any
        kind of tokenizer: bytes, word pieces or sentence pieces.
        """
        prefixes = [self._decode(tokens[:length]) for length in range(len(tokens) + 1)]
        text = prefixes[-1]
        # An incomplete character decodes to a replacement character: a token ends where its prefix of the tokens still
        # agrees with the text.
        ends = [len(os.path.commonprefix([prefix, text])) for prefix in prefixes]
        words = [_Word(match.start(), match.end(), match.group(), []) for match in re.finditer(r"\S+", text)]
        for position, token in enumerate(tokens):
            if not self._is_special(token):
                for word in _overlapping_words(words, ends[position], ends[position + 1]):
                    word.positions.append(position)
        return [WordTokens(word.text, word.positions) for word in words]

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.backend.decode(list(tokens), skip_special_tokens=True))

    def _decode_complete(self, tokens: Sequence[int]) -> str:
        """The text of tokens without the bytes at its end that begin a character."""
        complete = self._decode(self.truncate(tokens, len(tokens)))
        # A token of a byte-level vocabulary may end a character and begin the next one.
        shortened = self._decode(tokens).removesuffix(REPLACEMENT)
        return shortened if self._is_byte_level else complete

    def _ends_inside_character(self, tokens: Sequence[int]) -> bool:
        """Whether the last bytes begin a character of UTF-8 and do not complete it."""
        texts = [token for token in tokens if not self._is_special(token)]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(b"".join(self._bytes_of(token) for token in texts[-MAX_CHARACTER_BYTES:]))
        pending, _ = decoder.getstate()
        return bool(pending)

    def _bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for, a part of a character in vocabularies with tokens for single bytes."""
        text = str(self.backend.id_to_token(token) or "")
        if self._is_byte_level and token not in self._added_tokens:
            return bytes(BYTE_OF_LETTER[letter] for letter in text if letter in BYTE_OF_LETTER)
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", text)
        return text.encode() if byte is None else bytes.fromhex(byte.group(1))

    def _is_special(self, token: int) -> bool:
        return token in self._added_tokens and bool(self._added_tokens[token].special)

    # ---- files, training ---------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        self.backend.save(str(path))

    def to_json(self) -> str:
        """Return the content of `tokenizer.json`."""
        return str(self.backend.to_str())

    @staticmethod
    def from_json(
        text: str, where: str = "tokenizer.json", special_tokens: Mapping[str, Sequence[int]] | None = None
    ) -> Tokenizer:
        """Rebuild a tokenizer from the content of a `tokenizer.json`.

        Raises:
            CheckpointError: code `tokenizer.file`, with the name `where` of the file; or as the constructor.
        """
        try:
            return Tokenizer(Backend.from_str(text), special_tokens)
        except CheckpointError:
            raise
        except Exception as error:  # the library raises Exception itself
            raise CheckpointError(
                f"{where} is not a tokenizer; expected a file of the tokenizers library.",
                code="tokenizer.file",
                path=where,
            ) from error

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int, lowercase: bool = False, nfkc: bool = False) -> Tokenizer:
        """Train a tokenizer of at most `vocab_size` tokens (byte-pair encoding, Sennrich et al. 2016).

        Any text is encoded and decoded as written, apart from white space at its ends.

        Args:
            lowercase: encode texts in lower case.
            nfkc: replace compatibility characters by their plain forms, such as "½" by "1⁄2" (Unicode's NFKC).
        """
        backend = Backend(models.BPE())
        steps: list[normalizers.Normalizer] = []
        if nfkc:
            steps.append(normalizers.NFKC())
        if lowercase:
            steps.append(normalizers.Lowercase())
        if steps:
            backend.normalizer = normalizers.Sequence(steps)
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[token.text for token in SPECIAL_TOKENS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            min_frequency=2,
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return Tokenizer(backend)


@dataclass(frozen=True)
class _Word:
    """A word, its span of characters, and the positions of its tokens."""

    start: int
    end: int
    text: str
    positions: list[int]


def _overlapping_words(words: Sequence[_Word], start: int, end: int) -> list[_Word]:
    """The words that overlap a span of characters; the next word if there is none, as for a token of a space."""
    overlapping = [word for word in words if word.start < end and word.end > start]
    return overlapping or [word for word in words if word.end > start][:1]


def _special_token_ids(backend: Backend, token: SpecialToken, given: Mapping[str, Sequence[int]]) -> list[int] | None:
    """The ids of a special token; None for one of a task that `given` does not have."""
    if token.name in given:
        return list(given[token.name])
    token_id = backend.token_to_id(token.text)
    if token_id is not None:
        return [int(token_id)]
    if given and token not in (PAD, BOS, EOS):
        return None
    raise CheckpointError(
        f"the tokenizer has no token {token.text!r}; train one with mmx, or add it to this one.",
        code="tokenizer.special_token",
        token=token.text,
    )


def _missing_task(token: SpecialToken) -> MmxError:
    available, requested = ("answer questions", "caption") if token is CAPTION else ("caption", "answer questions")
    return MmxError(
        f"this model was trained to {available}, not to {requested}; give another model with --model.",
        code="tokenizer.task",
        token=token.text,
    )
