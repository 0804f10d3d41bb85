"""A tiny random Whisper of transformers, which reads one second of audio, and its checkpoint folder."""

import json

from parity_cases import byte_tokenizer, randomized, save_all
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

MEL_BANDS = 8
FRAMES = 50
VOCAB_SIZE = 120
HIDDEN_SIZE = 32
EOS, START, ENGLISH, GERMAN, TRANSLATE, TRANSCRIBE, NO_TIMES = range(7)
PROMPT = [START, ENGLISH, TRANSCRIBE, NO_TIMES]
TOKENS = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>", "<|no|>"]
MULTILINGUAL = {
    "lang_to_id": {"<|en|>": ENGLISH, "<|de|>": GERMAN},
    "task_to_id": {"translate": TRANSLATE, "transcribe": TRANSCRIBE},
    "is_multilingual": True,
}
SUPPRESSED = {"suppress_tokens": [20, 21, 22, START], "begin_suppress_tokens": [30, EOS]}
GENERATION = {"no_timestamps_token_id": NO_TIMES, "max_length": 40, **SUPPRESSED}


def build(seed=0):
    """A tiny reference."""
    config = WhisperConfig(
        d_model=HIDDEN_SIZE,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        vocab_size=VOCAB_SIZE,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=40,
        decoder_ffn_dim=48,
        num_mel_bins=MEL_BANDS,
        max_source_positions=FRAMES,
        max_target_positions=30,
        scale_embedding=True,
        bos_token_id=EOS,
        pad_token_id=EOS,
        eos_token_id=EOS,
        decoder_start_token_id=START,
    )
    return randomized(WhisperForConditionalGeneration(config), seed, size=0.4)


def save(folder, reference, further_tokens=(), **generation):
    """Save a checkpoint. `further_tokens` follow TOKENS; `generation`: fields of generation_config.json."""
    tokenizer = byte_tokenizer(VOCAB_SIZE, (*TOKENS, *further_tokens), bos_token=TOKENS[0], eos_token=TOKENS[0])
    save_all(folder, reference, tokenizer, WhisperFeatureExtractor(feature_size=MEL_BANDS, chunk_length=1))
    path = folder / "generation_config.json"
    fields = json.loads(path.read_text())
    del fields["_from_model_config"]  # otherwise transformers ignores the added fields
    path.write_text(json.dumps(fields | GENERATION | generation))
    return str(folder)
