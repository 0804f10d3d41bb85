"""The option `clean_up_tokenization_spaces` of a published tokenizer, as part of our decoder of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What transformers' `clean_up_tokenization` replaces, in its order.
REPLACED = {
    " .": ".",
    " ?": "?",
    " !": "!",
    " ,": ",",
    " ' ": "'",
    " n't": "n't",
    " 'm": "'m",
    " 's": "'s",
    " 've": "'ve",
    " 're": "'re",
}
# transformers ignores the option for byte-pair encoding, unless this option is set too.
FORCED = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


def cleans_up(tokenizer: PreTrainedTokenizerBase, backend: Backend) -> bool:
    """Return whether transformers removes spaces before punctuation from the texts of a tokenizer.

    Args:
        backend: what the tokenizer encodes and decodes with.
    """
    is_bpe = type(backend.model).__name__ == "BPE"
    return bool(tokenizer.clean_up_tokenization_spaces) and (not is_bpe or bool(getattr(tokenizer, FORCED, False)))


def add_clean_up(backend: Backend) -> None:
    """Make a tokenizer remove spaces before punctuation from the texts that it decodes."""
    decoder = backend.decoder or decoders.WordPiece(prefix="\0", cleanup=False)  # without a decoder: joined by spaces
    replacements = [decoders.Replace(spaced, joined) for spaced, joined in REPLACED.items()]
    backend.decoder = decoders.Sequence([decoder, decoders.Fuse(), *replacements])
