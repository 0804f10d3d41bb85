"""Decoding beside transformers: greedy, with beams, and many questions about one picture.

Alphabet: B pictures, K questions about each, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from mmx.bench.hf_references import QUESTIONS, BenchSetting, ModelPair, build_pair
from mmx.bench.timing import BenchResult, TimedRuns, alternate, compare
from mmx.config.schema import GenerationConfig
from mmx.generation import CachedDecodeStep, PromptBatch, generate
from mmx.memory import Memory
from mmx.models.model import Model
from mmx.models.source import SourceBatch
from mmx.nn.prepack import MIN_NUMEL

TOKENS, ANSWER, BEAMS = 20, 10, 5
BATCHES = (1, 8)
READ_MB = {"micro": 8}  # megabytes read to measure the bandwidth; else 512, more than any cache holds
Contenders = dict[str, Callable[[], Any]]
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def greedy(setting: BenchSetting) -> Iterator[BenchResult]:
    """ViT-GPT2, twenty tokens, the picture encoded before: decoding alone."""
    pair = build_pair("vit-gpt2", setting)
    size = bytes_read(pair.model, setting)
    pair.for_inference()
    for batch in BATCHES:
        runs = _greedy_runs(pair, pair.pixels(batch))
        ours, theirs = runs["ours"], runs["theirs"]
        same, name = ours.first == generated_tokens(theirs.first, 1), f"greedy, batch {batch}"
        yield compare(name, "ms a token", lambda s: 1000 * s / TOKENS, ours, theirs, same, setting.description)
        if batch == 1:
            yield _floor(name, ours, size, setting)


def _greedy_runs(pair: ModelPair, pixels: Tensor) -> dict[str, TimedRuns]:
    options = GenerationConfig(**_exactly(TOKENS))
    memory = pair.encode(pixels)
    with torch.no_grad():
        states = pair.reference.encoder(pixels.to(pair.reference.dtype)).last_hidden_state
    contenders: Contenders = {
        "theirs": lambda: _from_states(pair, states),
        "ours": lambda: timed_generation(pair, memory, options)[0],
    }
    return alternate(contenders, pair.setting.repeats, pair.setting.device)


def _from_states(pair: ModelPair, states: Tensor) -> Tensor:
    # Made anew each time: transformers writes into what it is given.
    encoded = BaseModelOutput(last_hidden_state=states)
    return pair.reference.generate(encoder_outputs=encoded, do_sample=False, **_exactly(TOKENS))


def bytes_read(model: Model, setting: BenchSetting) -> float:
    """What one token of one text reads of our decoder, once: all but positions and, where it is not also the head, the
    embedding (a row of each is read). Keys and values of what is looked at are no part of the decoder."""
    tied = model.config.decoder.tie_word_embeddings
    total = 0
    for name, tensor in model.decoder.state_dict().items():
        if "positions." in name or (name == "embedding.weight" and not tied):
            continue
        small = setting.dtype == "int8" and (tensor.ndim < 2 or tensor.numel() < MIN_NUMEL)
        total += tensor.numel() * (4 if small else BYTES[setting.dtype])
    return total


def bandwidth(megabytes: int, device: str) -> float:
    """Bytes that are read in a second: the best of five passes each of a sum, a maximum and a scalar product."""
    numbers = torch.ones(megabytes * 250_000, device=device)
    passes: Contenders = {"sum": numbers.sum, "maximum": numbers.amax, "product": lambda: torch.dot(numbers, numbers)}
    runs = alternate(passes, 5, device)
    return numbers.nbytes / min(seconds for passed in runs.values() for seconds in passed.seconds)


def _floor(name: str, ours: TimedRuns, size: float, setting: BenchSetting) -> BenchResult:
    megabytes = READ_MB.get(setting.size, 512)
    speed = bandwidth(megabytes, setting.device)
    note = (
        f"floor: {size / 1e6:.1f} MB of decoder weights a token at {speed / 1e9:.1f} GB/s, the best of 15 passes (sum, "
        f"maximum, scalar product) over {megabytes} MB; weights that stay in a cache can do better than it"
    )
    bare = TimedRuns(ours.seconds)
    return compare(f"{name}: of the bandwidth floor", "%", lambda s: 100 * size / speed / (s / TOKENS), bare, note=note)


def beams(setting: BenchSetting) -> Iterator[BenchResult]:
    """BLIP captions with five beams: from pixels, and decoding alone."""
    pair = build_pair("blip", setting).for_inference()
    for batch in BATCHES:
        pixels = pair.pixels(batch)
        runs, note = _beam_runs(pair, pixels), _told([cross_bytes(pair, pixels), setting.description])
        per_caption = partial(_milliseconds, parts=batch)
        for part, what in (("", "picture and all"), (" alone", "decoding alone")):
            ours, theirs = runs[f"ours{part}"], runs[f"theirs{part}"]
            same, name = ours.first == generated_tokens(theirs.first, 1), f"beams, batch {batch}, {what}"
            yield compare(name, "ms a caption", per_caption, ours, theirs, same, note)


def _beam_runs(pair: ModelPair, pixels: Tensor) -> dict[str, TimedRuns]:
    most, theirs_see = {**_exactly(TOKENS), "num_beams": BEAMS}, pixels.to(pair.reference.dtype)
    options = GenerationConfig(**most)
    memory = pair.encode(pixels)
    with torch.no_grad():
        states = pair.reference.vision_model(pixel_values=theirs_see)[0]
    contenders: Contenders = {
        "theirs": lambda: pair.reference.generate(theirs_see, **most),
        "ours": lambda: timed_generation(pair, pair.encode(pixels), options)[0],
        "theirs alone": lambda: _blip_decoder(pair, states),
        "ours alone": lambda: timed_generation(pair, memory, options)[0],
    }
    return alternate(contenders, pair.setting.repeats, pair.setting.device)


def cross_bytes(pair: ModelPair, pixels: Tensor) -> str:
    """What is held to be looked at while one beam is followed, and while five are."""
    held = {
        n: timed_generation(pair, pair.encode(pixels), GenerationConfig(num_beams=n, **_exactly(2)))[1]
        for n in (1, BEAMS)
    }
    one, five = (held[n] / 1e6 for n in (1, BEAMS))
    return f"our cross keys and values take {one:.2f} MB at 1 beam and {five:.2f} MB at {BEAMS}"


def _blip_decoder(pair: ModelPair, states: Tensor) -> Tensor:
    """What transformers' BLIP does once it has looked."""
    text = pair.reference.config.text_config
    return pair.reference.text_decoder.generate(
        input_ids=torch.full((len(states), 1), pair.begin, device=states.device),
        eos_token_id=text.sep_token_id,
        pad_token_id=text.pad_token_id,
        encoder_hidden_states=states,
        encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long, device=states.device),
        num_beams=BEAMS,
        **_exactly(TOKENS),
    )


def questions(setting: BenchSetting) -> Iterator[BenchResult]:
    """Sixteen questions about one picture: transformers takes the picture with each, padded; ours encodes it once."""
    pair = build_pair("blip-vqa", setting)
    shown = attend_padding(pair.model)
    pair.for_inference()
    given = pair.tokenizer(QUESTIONS, padding=True, return_tensors="pt", return_token_type_ids=False)
    ids, mask = given["input_ids"].to(setting.device), given["attention_mask"].to(setting.device)
    pixels, asked = pair.pixels(1), pair.model.collate("question_encoder", QUESTIONS)._replace(streams=len(QUESTIONS))
    theirs_see = pixels.to(pair.reference.dtype)
    repeated = theirs_see.repeat(len(QUESTIONS), 1, 1, 1)
    contenders: Contenders = {
        "theirs": lambda: _their_answers(pair, repeated, ids, mask),
        "ours": lambda: _our_answers(pair, shown, pixels, asked),
        "ours apart": lambda: _our_answers(pair, pair.model, pixels, asked),
    }
    runs = alternate(contenders, setting.repeats, setting.device)
    ours, apart, theirs = runs["ours"], runs["ours apart"], runs["theirs"]
    note = _told(
        ["padding is looked at, as transformers does it; it encodes the picture with each", setting.description]
    )
    same, name = ours.first == generated_tokens(theirs.first, 1), f"{len(QUESTIONS)} questions, one picture"
    yield compare(name, "ms for all", _milliseconds, ours, theirs, same, note)
    one_by_one = [
        _their_answers(pair, theirs_see, ids[k : k + 1, :length], None) for k, length in enumerate(mask.sum(1).tolist())
    ]
    same, name = apart.first == generated_tokens(torch.cat(one_by_one), 1), f"{len(QUESTIONS)} questions, each as alone"
    note = _told(
        ["our default, no padding is looked at; same as transformers' answers one by one", setting.description]
    )
    yield compare(name, "ms for all", _milliseconds, apart, theirs, same, note)


def _their_answers(pair: ModelPair, pixels: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    return pair.reference.generate(
        pixel_values=pixels, input_ids=ids, attention_mask=mask, do_sample=False, **_exactly(ANSWER)
    )


def _our_answers(pair: ModelPair, model: Model, pixels: Tensor, asked: SourceBatch) -> list[list[int]]:
    with torch.inference_mode():
        memory = model.with_questions(pair.encode(pixels), asked).to(dtype=model.decoder.embedding.weight.dtype)
    return timed_generation(pair, memory, GenerationConfig(**_exactly(ANSWER)), len(QUESTIONS))[0]


def attend_padding(model: Model) -> Model:
    """The model with a reader that shows padding; decoder, sources and weights are the same, not copied."""
    assert model.config.question_encoder is not None and model.question_encoder is not None, "only a reader can"
    reader = model.config.question_encoder.model_copy(update={"attend_padding": True})
    twin = Model(model.config.model_copy(update={"question_encoder": reader}), model.tokenizer).to(model.device).eval()
    twin.sources, twin.decoder = model.sources, model.decoder
    assert isinstance(twin.question_encoder, nn.Module)
    twin.question_encoder.load_state_dict(model.question_encoder.state_dict(), assign=True)
    return twin


def timed_generation(
    pair: ModelPair, memory: Memory, options: GenerationConfig, streams: int = 1
) -> tuple[list[list[int]], int]:
    """Our tokens of each of B*K texts, and the bytes of the memory that was looked at in the end."""
    tokens = torch.full((memory.batch_size, streams, 1), pair.begin, device=memory.mask.device)
    with torch.inference_mode():
        step = CachedDecodeStep(pair.model.decoder, memory, options.max_new_tokens)
        made = generate(step, PromptBatch(tokens, torch.ones_like(tokens, dtype=torch.bool)), options, pair.model.tokenizer.eos_token_id)
    return [list(texts[0].tokens) for row in made for texts in row], step.memory.nbytes


def generated_tokens(rows: Tensor, prompt: int) -> list[list[int]]:
    """Their tokens [B, prompt + T] without the prompt."""
    return [row[prompt:] for row in rows.tolist()]


def _exactly(tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": tokens, "min_new_tokens": tokens}


def _milliseconds(seconds: float, parts: int = 1) -> float:
    return 1000 * seconds / parts


def _told(notes: list[str]) -> str:
    return "; ".join(note for note in notes if note)
