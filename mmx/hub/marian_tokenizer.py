"""The tokenizer of Marian: a SentencePiece unigram model, with token ids from vocab.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mmx.errors import CheckpointError
from mmx.hub.clean_up import add_clean_up
from mmx.hub.hf_checkpoint import HFCheckpoint, read_errors
from mmx.text.tokenizer import Tokenizer

SPM = "source.spm"
VOCAB = "vocab.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
UNKNOWN = "<unk>"
# Values of enums in sentencepiece_model.proto.
UNIGRAM = 1
NORMAL = 1
USER_DEFINED = 4


class _SentencePieceModel(NamedTuple):
    """normalizer: its `normalizer_spec`; scores: log-probability of each piece that text may become."""

    normalizer: Any
    scores: dict[str, float]


def read_sentencepiece(checkpoint: HFCheckpoint, special_tokens: Mapping[str, list[int]]) -> Tokenizer:
    """Read the pieces of source.spm (Kudo 2018, "Subword Regularization", section 3.2) with the ids of vocab.json.

    Pieces that only the target language has are used for text that would be unknown otherwise. Language codes, such as
    >>fr<<, are single tokens. Raises CheckpointError for files that are missing, damaged, or of another kind.
    """
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Engine

    names = _read_vocab(checkpoint)
    spm = _read_spm(checkpoint)
    with read_errors(checkpoint, f"{VOCAB} and {SPM}"):
        unknown_id = names.index(UNKNOWN)
        special_ids = [*special_tokens["pad"], *special_tokens["eos"], unknown_id]
        # Text must not become a special token. No text contains these names: spaces are replaced by "▁" first.
        special_names = {token_id: f" {names[token_id]}" for token_id in special_ids}
        pieces = _score_pieces(names, spm.scores, special_names)
        engine = Engine(models.Unigram(pieces, unk_id=unknown_id, byte_fallback=False))
        engine.normalizer, engine.pre_tokenizer = _normalization(spm.normalizer)
        engine.decoder = decoders.Metaspace(prepend_scheme="always")
        if _cleans_up(checkpoint):
            add_clean_up(engine)
        engine.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special_names.values()])
        language_codes = [name for name in names if name.startswith(">>") and name.endswith("<<")]
        engine.add_tokens([AddedToken(code, normalized=False) for code in language_codes])
        return Tokenizer.from_json(engine.to_str(), checkpoint.name, special_tokens)


def _score_pieces(
    names: list[str], scores: Mapping[str, float], special_names: Mapping[int, str]
) -> list[tuple[str, float]]:
    """Return (piece, score) in the order of the ids.

    Pieces without a score get such a low one that any segmentation into known pieces has a higher score.
    """
    score_per_letter = 10 * min(-1.0, *scores.values())
    pieces = []
    for token_id, name in enumerate(names):
        score = scores.get(name, score_per_letter * len(name) - 1)
        pieces.append((special_names.get(token_id, name), score))
    return pieces


def _cleans_up(checkpoint: HFCheckpoint) -> bool:
    is_file = (checkpoint.folder / TOKENIZER_CONFIG).is_file()
    return is_file and checkpoint.read_json(TOKENIZER_CONFIG).get("clean_up_tokenization_spaces") is True


def _read_vocab(checkpoint: HFCheckpoint) -> list[str]:
    """Return the tokens of vocab.json in the order of their ids, which must be 0, 1, 2, ..."""
    ids = checkpoint.read_json(VOCAB)
    has_all_ids = {str(token_id) for token_id in ids.values()} == {str(i) for i in range(len(ids))}
    if not ids or not has_all_ids or UNKNOWN not in ids:
        raise CheckpointError(
            f"{VOCAB} of {checkpoint.name!r} does not number its tokens, {UNKNOWN} among them, from 0 without gaps; "
            "download it again.",
            code="hub.vocab",
            name=checkpoint.name,
            file=VOCAB,
        )
    return sorted(ids, key=lambda token: int(ids[token]))


def _read_spm(checkpoint: HFCheckpoint) -> _SentencePieceModel:
    try:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined,unused-ignore]
    except ImportError as error:
        raise CheckpointError(
            "reading Marian's tokens needs sentencepiece and protobuf: pip install 'mmx[marian]'.",
            code="hub.sentencepiece_missing",
        ) from error
    path = checkpoint.folder / SPM
    if not path.exists():
        raise CheckpointError(
            f"{checkpoint.name!r} has no {SPM}; expected the SentencePiece model of its tokens.",
            code="hub.file_missing",
            name=checkpoint.name,
            file=SPM,
        )
    with read_errors(checkpoint, SPM):
        proto = ModelProto.FromString(path.read_bytes())
        scores = {piece.piece: piece.score for piece in proto.pieces if piece.type in (NORMAL, USER_DEFINED)}
    if proto.trainer_spec.model_type != UNIGRAM or not scores:
        raise CheckpointError(
            f"{SPM} of {checkpoint.name!r} is no unigram model, the only kind that mmx supports.",
            code="hub.spm_type",
            name=checkpoint.name,
            file=SPM,
        )
    return _SentencePieceModel(proto.normalizer_spec, scores)


def _normalization(spec: Any) -> tuple[Any, Any]:
    """Return the normalizer and the pre-tokenizer of a SentencePiece `normalizer_spec`."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
        steps.append(normalizers.Replace(Regex(r"\A | \z"), ""))
    prepend_scheme = "always" if spec.add_dummy_prefix else "never"
    return normalizers.Sequence(steps), pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=True)
