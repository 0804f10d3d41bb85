"""Texts of tokens: those of transformers, whatever `clean_up_tokenization_spaces` of the tokenizer says."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mmx.hub.clean_up import FORCED
from mmx.hub.hf_checkpoint import HFCheckpoint
from mmx.hub.hf_config import read_tokenizer
from mmx.text.tokenizer import Tokenizer

TEXTS = [
    "a .22 rifle",
    "Bonjour !",
    "it 's here , is n't it ?",
    "I 'm , we 've ; they 're : so .",
    "the ' quoted ' word",
    "Zoë Müller ½ ﬁ U.S.A. ...",
    "a . b",
    "two  spaces\nand a line",
]
SPECIAL_TOKENS = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
IDS = {"pad": [1], "bos": [2], "eos": [3]}


def word_piece(with_decoder: bool) -> Backend:
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=list(SPECIAL_TOKENS.values()))
    backend.train_from_iterator(TEXTS * 4, trainer)
    if with_decoder:
        backend.decoder = decoders.WordPiece(cleanup=False)
    return backend


def byte_level() -> Backend:
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special_tokens = list(SPECIAL_TOKENS.values())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special_tokens, initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS * 4, trainer)
    backend.decoder = decoders.ByteLevel()
    return backend


def unigram() -> Backend:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special_tokens = list(SPECIAL_TOKENS.values())
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special_tokens, unk_token="<unk>")
    backend.train_from_iterator(TEXTS * 4, trainer)
    backend.decoder = decoders.Metaspace()
    return backend


BACKENDS = {
    "word pieces": word_piece(True),
    "no decoder": word_piece(False),
    "bytes": byte_level(),
    "sentence pieces": unigram(),
}


def save_tokenizer(folder: Path, backend: Backend, options: dict[str, bool]) -> None:
    PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS).save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("clean_up_tokenization_spaces", None)
    path.write_text(json.dumps(config | options))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("clean_up", [None, False, True, "forced"])
def test_texts_equal_those_of_transformers(tmp_path, name, clean_up):
    options = {} if clean_up is None else {"clean_up_tokenization_spaces": bool(clean_up)}
    if clean_up == "forced":
        options[FORCED] = True
    save_tokenizer(tmp_path, BACKENDS[name], options)
    reference = AutoTokenizer.from_pretrained(str(tmp_path))
    tokenizer = read_tokenizer(HFCheckpoint("tiny", tmp_path), IDS)
    saved = Tokenizer.from_json(tokenizer.to_json(), special_tokens=IDS)
    changed = 0
    for text in TEXTS:
        tokens = [2, *reference(text, add_special_tokens=False)["input_ids"], 3]
        expected = reference.decode(tokens, skip_special_tokens=True).strip()
        assert tokenizer.decode(tokens) == saved.decode(tokens) == expected
        changed += reference.clean_up_tokenization(expected) != expected
    is_cleaned = clean_up == "forced" or (clean_up is True and name != "bytes")
    assert (changed == 0) == is_cleaned, "the texts have spaces that the option removes"
