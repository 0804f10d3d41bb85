"""Decoding compared with transformers: greedy, beam search, and many questions about one image.

Axes: B images, K questions about each, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from mmx.bench.hf_references import QUESTIONS, BenchSetting, ModelPair, build_pair
from mmx.bench.timing import BenchResult, Quantity, TimedRuns, alternate, compare
from mmx.config.schema import GenerationConfig
from mmx.generation import CachedDecodeStep, PromptBatch, generate
from mmx.memory import Memory
from mmx.models.model import Model
from mmx.models.source import SourceBatch
from mmx.nn.prepack import MIN_NUMEL

NUM_TOKENS = 20
NUM_ANSWER_TOKENS = 10
NUM_BEAMS = 5
BATCH_SIZES = (1, 8)
BANDWIDTH_MB = {"micro": 8}  # megabytes read to measure the memory bandwidth; else 512, more than any CPU cache
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}

Tokens = list[list[int]]
Functions = dict[str, Callable[[], Tokens]]


class Decoded(NamedTuple):
    """The tokens of B*K texts, and the bytes of the memory after decoding."""

    texts: Tokens
    memory_bytes: int


def ms_per_token(name: str, tokens: int = NUM_TOKENS) -> Quantity:
    """Milliseconds per token of runs that generate `tokens` tokens."""
    return Quantity(name, "ms per token", lambda seconds: 1000 * seconds / tokens)


# ---- greedy ----------------------------------------------------------------------------------------------------------


def greedy(setting: BenchSetting) -> Iterator[BenchResult]:
    """ViT-GPT2, twenty tokens of encoded images: decoding alone."""
    pair = build_pair("vit-gpt2", setting)
    weight_bytes = bytes_read(pair.model, setting)
    pair.for_inference()
    for batch in BATCH_SIZES:
        runs = greedy_runs(pair, pair.pixels(batch))
        same = runs["mmx"].output == runs["reference"].output
        name = f"greedy, batch {batch}"
        yield compare(ms_per_token(name), runs["mmx"], runs["reference"], same, setting.description)
        if batch == 1:
            yield _bandwidth_result(name, runs["mmx"], weight_bytes, setting)


def greedy_runs(pair: ModelPair, pixels: Tensor) -> dict[str, TimedRuns[Tokens]]:
    """Time greedy decoding of encoded images."""
    options = GenerationConfig(**_exact_length(NUM_TOKENS))
    memory = pair.encode(pixels)
    with torch.no_grad():
        states = pair.reference.encoder(pixels.to(pair.reference.dtype)).last_hidden_state
    functions: Functions = {
        "reference": lambda: _reference_greedy(pair, states),
        "mmx": lambda: decode(pair, memory, options).texts,
    }
    return alternate(functions, pair.setting.repeats, pair.setting.device)


def _reference_greedy(pair: ModelPair, states: Tensor) -> Tokens:
    encoder_outputs = BaseModelOutput(last_hidden_state=states)  # a new one each time: generate() writes into it
    tokens: Tensor = pair.reference.generate(
        encoder_outputs=encoder_outputs, do_sample=False, **_exact_length(NUM_TOKENS)
    )
    return _generated(tokens)


def bytes_read(model: Model, setting: BenchSetting) -> float:
    """Return the bytes of decoder weights that are read for one token.

    All weights count except positions and, unless it is also the output projection, the token embedding, of which one
    row is read. The keys and values of the memory are not part of the decoder.
    """
    is_tied = model.config.decoder.tie_word_embeddings
    total = 0
    for name, tensor in model.decoder.state_dict().items():
        if "positions." in name or (name == "embedding.weight" and not is_tied):
            continue
        is_quantized = setting.dtype == "int8" and tensor.ndim >= 2 and tensor.numel() >= MIN_NUMEL
        dtype = "float32" if setting.dtype == "int8" and not is_quantized else setting.dtype
        total += tensor.numel() * DTYPE_BYTES[dtype]
    return total


def bandwidth(megabytes: int, device: str) -> float:
    """Return the memory bandwidth in bytes per second: the best of 15 passes (sum, maximum, scalar product)."""
    numbers = torch.ones(megabytes * 250_000, device=device)
    functions: dict[str, Callable[[], Tensor]] = {
        "sum": numbers.sum,
        "maximum": numbers.amax,
        "product": lambda: torch.dot(numbers, numbers),
    }
    runs = alternate(functions, 5, device)
    return numbers.nbytes / min(min(run.seconds) for run in runs.values())


def _bandwidth_result(name: str, mmx: TimedRuns[Tokens], weight_bytes: float, setting: BenchSetting) -> BenchResult:
    """Return the time of reading the weights at full memory bandwidth, in percent of the measured time."""
    megabytes = BANDWIDTH_MB.get(setting.size, 512)
    bytes_per_second = bandwidth(megabytes, setting.device)
    bound = weight_bytes / bytes_per_second
    note = (
        f"100 % is {weight_bytes / 1e6:.1f} MB of decoder weights per token at {bytes_per_second / 1e9:.1f} GB/s, the "
        f"best of 15 passes (sum, maximum, scalar product) over {megabytes} MB; weights that fit into the cache can "
        "exceed it"
    )
    quantity = Quantity(f"{name}: of the bandwidth bound", "%", lambda seconds: 100 * bound * NUM_TOKENS / seconds)
    return compare(quantity, TimedRuns(mmx.seconds, None), note=note)


# ---- beam search -----------------------------------------------------------------------------------------------------


def beams(setting: BenchSetting) -> Iterator[BenchResult]:
    """BLIP captions with five beams: with encoding of the image, and decoding alone."""
    pair = build_pair("blip", setting).for_inference()
    for batch in BATCH_SIZES:
        pixels = pair.pixels(batch)
        runs = _beam_runs(pair, pixels)
        note = _join_notes(describe_memory_bytes(pair, pixels), setting.description)
        for suffix, description in (("", "with encoding"), (" decoding", "decoding alone")):
            mmx = runs[f"mmx{suffix}"]
            reference = runs[f"reference{suffix}"]
            same = mmx.output == reference.output
            convert = partial(_milliseconds, count=batch)
            quantity = Quantity(f"beams, batch {batch}, {description}", "ms per caption", convert)
            yield compare(quantity, mmx, reference, same, note)


def _beam_runs(pair: ModelPair, pixels: Tensor) -> dict[str, TimedRuns[Tokens]]:
    options = {**_exact_length(NUM_TOKENS), "num_beams": NUM_BEAMS}
    config = GenerationConfig(**options)
    reference_pixels = pixels.to(pair.reference.dtype)
    memory = pair.encode(pixels)
    with torch.no_grad():
        states = pair.reference.vision_model(pixel_values=reference_pixels)[0]
    functions: Functions = {
        "reference": lambda: _generated(pair.reference.generate(reference_pixels, **options)),
        "mmx": lambda: decode(pair, pair.encode(pixels), config).texts,
        "reference decoding": lambda: _reference_blip_decoding(pair, states),
        "mmx decoding": lambda: decode(pair, memory, config).texts,
    }
    return alternate(functions, pair.setting.repeats, pair.setting.device)


def describe_memory_bytes(pair: ModelPair, pixels: Tensor) -> str:
    """Describe the bytes of cross-attention keys and values at one beam and at five."""
    megabytes = []
    for num_beams in (1, NUM_BEAMS):
        options = GenerationConfig(num_beams=num_beams, **_exact_length(2))
        megabytes.append(decode(pair, pair.encode(pixels), options).memory_bytes / 1e6)
    one, five = megabytes
    return f"cross-attention keys and values of mmx take {one:.2f} MB at 1 beam and {five:.2f} MB at {NUM_BEAMS}"


def _reference_blip_decoding(pair: ModelPair, states: Tensor) -> Tokens:
    """Decode as BlipForConditionalGeneration.generate does, from encoded images [B, S, F]."""
    config = pair.reference.config.text_config
    tokens: Tensor = pair.reference.text_decoder.generate(
        input_ids=torch.full((len(states), 1), pair.bos, device=states.device),
        eos_token_id=config.sep_token_id,
        pad_token_id=config.pad_token_id,
        encoder_hidden_states=states,
        encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long, device=states.device),
        num_beams=NUM_BEAMS,
        **_exact_length(NUM_TOKENS),
    )
    return _generated(tokens)


# ---- questions -------------------------------------------------------------------------------------------------------


def questions(setting: BenchSetting) -> Iterator[BenchResult]:
    """Sixteen questions about one image: the reference encodes the image with each question, mmx encodes it once."""
    pair = build_pair("blip-vqa", setting)
    padding_model = attend_padding(pair.model)
    pair.for_inference()
    batch = pair.tokenizer(QUESTIONS, padding=True, return_tensors="pt", return_token_type_ids=False)
    ids = batch["input_ids"].to(setting.device)
    mask = batch["attention_mask"].to(setting.device)
    pixels = pair.pixels(1)
    collated = pair.model.collate("question_encoder", QUESTIONS)._replace(streams=len(QUESTIONS))
    reference_pixels = pixels.to(pair.reference.dtype)
    repeated = reference_pixels.repeat(len(QUESTIONS), 1, 1, 1)
    functions: Functions = {
        "reference": lambda: _reference_answers(pair, repeated, ids, mask),
        "mmx": lambda: _mmx_answers(pair, padding_model, pixels, collated),
        "mmx default": lambda: _mmx_answers(pair, pair.model, pixels, collated),
    }
    runs = alternate(functions, setting.repeats, setting.device)
    reference = runs["reference"]
    same = runs["mmx"].output == reference.output
    note = _join_notes(
        "padding is attended, as in the reference, which encodes the image 16 times", setting.description
    )
    name = f"{len(QUESTIONS)} questions, one image"
    yield compare(Quantity(name, "ms for all", _milliseconds), runs["mmx"], reference, same, note)
    one_by_one: Tokens = []
    for index, length in enumerate(mask.sum(1).tolist()):
        one_by_one += _reference_answers(pair, reference_pixels, ids[index : index + 1, :length], None)
    same = runs["mmx default"].output == one_by_one
    note = _join_notes(
        "padding is not attended, the default; same: as the answers of the reference one by one", setting.description
    )
    name = f"{len(QUESTIONS)} questions, padding masked"
    yield compare(Quantity(name, "ms for all", _milliseconds), runs["mmx default"], reference, same, note)


def _reference_answers(pair: ModelPair, pixels: Tensor, ids: Tensor, mask: Tensor | None) -> Tokens:
    tokens: Tensor = pair.reference.generate(
        pixel_values=pixels, input_ids=ids, attention_mask=mask, do_sample=False, **_exact_length(NUM_ANSWER_TOKENS)
    )
    return _generated(tokens)


def _mmx_answers(pair: ModelPair, model: Model, pixels: Tensor, collated: SourceBatch) -> Tokens:
    with torch.inference_mode():
        memory = model.with_questions(pair.encode(pixels), collated).to(dtype=model.decoder.embedding.weight.dtype)
    options = GenerationConfig(**_exact_length(NUM_ANSWER_TOKENS))
    return decode(pair, memory, options, len(QUESTIONS)).texts


def attend_padding(model: Model) -> Model:
    """Return the model with a question encoder that attends to padding; all weights are shared, not copied."""
    config = model.config.question_encoder
    assert config is not None and model.question_encoder is not None, "the model needs a question encoder"
    changed = config.model_copy(update={"attend_padding": True})
    copied = Model(model.config.model_copy(update={"question_encoder": changed}), model.tokenizer)
    copied = copied.to(model.device).eval()
    copied.sources = model.sources
    copied.decoder = model.decoder
    assert isinstance(copied.question_encoder, nn.Module)
    copied.question_encoder.load_state_dict(model.question_encoder.state_dict(), assign=True)
    return copied


# ---- shared ----------------------------------------------------------------------------------------------------------


def decode(pair: ModelPair, memory: Memory, options: GenerationConfig, streams: int = 1) -> Decoded:
    """Generate `streams` texts over each memory with mmx."""
    tokens = torch.full((memory.batch_size, streams, 1), pair.bos, device=memory.mask.device)
    prompts = PromptBatch(tokens, torch.ones_like(tokens, dtype=torch.bool))
    with torch.inference_mode():
        step = CachedDecodeStep(pair.model.decoder, memory, options.max_new_tokens)
        rows = generate(step, prompts, options, pair.model.tokenizer.eos_token_id)
    texts = [list(candidates[0].tokens) for row in rows for candidates in row]
    return Decoded(texts, step.memory.nbytes)


def _generated(tokens: Tensor) -> Tokens:
    """Return the tokens of the reference, [B, 1 + T], without the prompt of one token."""
    return [row[1:] for row in tokens.tolist()]


def _exact_length(tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": tokens, "min_new_tokens": tokens}


def _milliseconds(seconds: float, count: int = 1) -> float:
    return 1000 * seconds / count


def _join_notes(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
