"""python demos/one-gpu/train.py runs/pack demos/one-gpu/phases.json runs/one-gpu: the bundled model, on one GPU.

The phases are a list, each beginning from scratch or where an earlier one ended; see `Phase`. Each ends as a checkpoint
folder. Pictures are cropped, turned, recoloured and mixed on the GPU, texts are rows of a table there, and a whole step
is one CUDA graph. Without a GPU, and for trying it: `... runs/one-gpu cpu`, with `steps` in the phases.

Alphabet: B pictures, K texts of each, T text positions, S slots, F feature width, n places to learn from, V vocabulary.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pictures import MEAN, STD, Data, normal, resized, views
from torch import Tensor, nn

from mmx.config.loader import parse_config
from mmx.config.schema import GenerationConfig, ModelConfig
from mmx.memory import Memory
from mmx.models.checkpoint import load_model, save_model
from mmx.models.model import Model

WANTED = 0.33  # room for places to learn from, as a share of B * K * T
SETS = ("photos", "easy", "scenes")
FOLLOWED = 4  # steps between two movements of the mean over time
LOOKED_AT = 20  # steps between two looks at the clock and the loss, for each of which the GPU has to wait


@dataclass
class Phase:
    """One stretch of training; what `phases.json` gives by name."""

    name: str
    start: str | None = None  # an earlier phase
    teachers: list[str] = field(default_factory=list)  # earlier phases, whose mean answer is to be given
    soft: float = 0.7  # share of the teachers in the loss
    backbone: str = "resnet18d"
    arguments: dict[str, Any] = field(default_factory=dict)
    size: int = 160
    dropout: float = 0.3
    seconds: float = 60.0  # of training; the learning rate falls along a cosine over them
    steps: int | None = None  # instead of seconds
    batch: tuple[int, int, int] = (268, 16, 100)  # photographs, easy-VQA, scenes
    texts: tuple[int, int] = (3, 2)  # captions and questions of a photograph
    lr: float = 1.5e-3
    warmup: float = 0.03  # share of the phase
    final_lr: float = 0.02  # share of the rate at its end
    weight_decay: float = 0.1
    smoothing: float = 0.1
    ema: float = 0.999
    strength: float = 1.0  # of crops, turns and colours
    patch: float = 0.5  # chance that a part of another picture is laid over
    mixing: float = 0.25  # chance that another picture shines through
    noise: float = 0.1  # share of the words so far that are replaced by any word
    withheld: float = 0.05  # share of the pictures that are not shown
    naming: float = 0.3  # weight of naming caption words from the mean of the slots
    answers: float = 2.0  # weight of a token of an answer
    seed: int = 0

    def rate(self, gone: float) -> float:
        """The learning rate when a share of the phase is gone: a straight line up, then a cosine down."""
        if gone < self.warmup:
            return self.lr * gone / self.warmup
        falling = 0.5 * (1 + math.cos(math.pi * (gone - self.warmup) / (1 - self.warmup)))
        return self.lr * (self.final_lr + (1 - self.final_lr) * falling)


class Learner:
    """A model, what names words beside it, its optimizer, and the mean of its weights over time."""

    def __init__(self, phase: Phase, data: Data, start: Model | None, teachers: Sequence[Model]) -> None:
        torch.manual_seed(phase.seed)
        self.phase, self.data = phase, data
        self.teachers = [teacher.to(data.device).eval().requires_grad_(False) for teacher in teachers]
        self.model = build(phase, data)
        if start is not None:
            self.model.load_state_dict(start.state_dict())
        width = self.model.encoder("image").width
        self.naming = nn.Linear(width, data.names.shape[1]).to(data.device)
        with torch.no_grad():
            pixels = torch.zeros(2, 3, phase.size, phase.size, device=data.device)
            self.cells = data.cells(math.isqrt(self._memory(self.model, pixels)[0].num_slots))
        self.lr = torch.tensor(phase.lr, device=data.device)
        self.parameters = [*self.model.parameters(), *self.naming.parameters()]
        grouped = [(p, p.ndim > 1 and not name.endswith("table")) for name, p in self.model.named_parameters()]
        grouped += [(p, True) for p in self.naming.parameters()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p, d in grouped if d], "weight_decay": phase.weight_decay},
                {"params": [p for p, d in grouped if not d], "weight_decay": 0.0},
            ],
            lr=self.lr,
            betas=(0.9, 0.98),
            fused=True,
            capturable=data.device == "cuda",
        )
        self.average = {n: t.detach().clone() for n, t in self.model.state_dict().items()}
        self.chosen = {
            name: torch.zeros(count, dtype=torch.long, device=data.device)
            for name, count in zip(SETS, phase.batch, strict=True)
        }
        self.told = torch.zeros((), device=data.device)

    def _memory(self, model: Model, pixels: Tensor) -> tuple[Memory, Tensor]:
        """The memory and the states [B, S, F] it is made of: as `Source` does it, less the looks at the values, for
        which a GPU has to wait."""
        source: Any = model.sources["image"]
        features = source.encoder({"pixels": pixels})
        return source.projection(features), features.states

    def loss(self) -> Tensor:
        """Of the pictures that are chosen; a pure function of them and the dice."""
        phase, data = self.phase, self.data
        photos, easy, scenes = (self.chosen[name] for name in SETS)
        changed, mirrored = views(data.photos[photos], phase.size, phase)
        plain = torch.cat([resized(data.easy[easy], phase.size), resized(data.scenes[scenes], phase.size)])
        light = 1 + 0.2 * (torch.rand(len(plain), 3, 1, 1, device=data.device) - 0.5)
        pixels = normal(torch.cat([changed, (plain * light).clamp(0, 1)]))
        every = torch.cat([ids + data.first[name] for name, ids in self.chosen.items()])
        texts = self._choose(every, len(photos))  # [B, K]
        sides = torch.cat([mirrored, mirrored.new_zeros(len(plain))]).long()[:, None].expand_as(texts)
        rows = data.rows[texts, sides].long()
        starts, lengths = data.starts[texts, None], data.lengths[texts, None]
        place = torch.arange(rows.shape[-1] - 1, device=data.device)
        tokens, labels, mask = rows[..., :-1], rows[..., 1:], place < lengths - 1
        wanted = (place >= starts - 1) & mask
        asks = data.rows[texts, 0, 1] != data.rows[0, 0, 1]  # the first of all is a caption
        weights = (1 + (phase.answers - 1) * asks)[..., None] * wanted
        # As many places for every batch, for a graph has one shape: what is wanted comes first.
        order = wanted.flatten().float().topk(int(WANTED * wanted.numel())).indices
        labels, weights = labels.flatten()[order], weights.flatten()[order]
        noisy = (torch.rand(tokens.shape, device=data.device) < phase.noise) & (place >= starts)
        heard = torch.where(noisy, torch.randint_like(tokens, 6, len(data.tokenizer)), tokens)
        memory, states = self._memory(self.model, pixels)
        hidden = torch.rand(len(pixels), 1, device=data.device) < phase.withheld
        logits = self._logits(self.model, memory.mask_out(hidden), texts, heard, mask, order)
        loss = F.cross_entropy(logits, labels, label_smoothing=phase.smoothing, reduction="none")
        self.told = (loss.detach() * weights).sum() / weights.sum()
        if self.teachers:
            softly = self._softly(logits, pixels, hidden, texts, tokens, mask, order)
            loss = (1 - phase.soft) * loss + phase.soft * softly
        total = (loss * weights).sum() / weights.sum()
        if phase.naming:
            total = total + phase.naming * self._named(states[: len(photos)], photos)
        return total

    def _choose(self, every: Tensor, photos: int) -> Tensor:
        """Texts [B, K] of pictures [B]: of photographs so many captions and so many questions, of the rest any."""
        first, said, asked = self.data.pictures[every].unbind(-1)
        captions, questions = self.phase.texts
        dice = torch.rand(len(every), captions + questions, device=self.data.device)
        anything = first[:, None] + (dice * (said + asked)[:, None]).long()
        # Different captions: neighbours on the circle of them.
        ring = said.clamp(min=1)[:, None]
        circle = (dice[:, :1] * ring + torch.arange(captions, device=self.data.device)).long() % ring
        either = torch.where(asked > 0, asked, said)[:, None]
        offset = (said * (asked > 0))[:, None]
        behind = offset + (dice[:, captions:] * either).long()
        own = first[:, None] + torch.cat([circle, behind], 1)
        return torch.cat([own[:photos], anything[photos:]])

    def _logits(
        self, model: Model, memory: Memory, texts: Tensor, tokens: Tensor, mask: Tensor, order: Tensor
    ) -> Tensor:
        """float [n, V] at some places."""
        shown = Memory(memory.keys, memory.values, memory.mask, memory.layout, self.cells[texts])
        states = model.decoder.hidden_states(tokens, shown, mask)
        return model.decoder.logits(states.flatten(0, 2).index_select(0, order)).float()

    @torch.no_grad()
    def _teachers(self, pixels: Tensor, hidden: Tensor, *asked: Tensor) -> Tensor:
        """The mean of the teachers' probabilities, [n, V]."""
        said = [self._logits(t, self._memory(t, pixels)[0].mask_out(hidden), *asked).softmax(-1) for t in self.teachers]
        return torch.stack(said).mean(0) if len(said) > 1 else said[0]

    def _softly(self, logits: Tensor, pixels: Tensor, hidden: Tensor, *asked: Tensor) -> Tensor:
        """Cross-entropy with what the teachers would say (Hinton et al. 2015), [n]."""
        return -(self._teachers(pixels, hidden, *asked) * logits.log_softmax(-1)).sum(-1)

    def _named(self, states: Tensor, photos: Tensor) -> Tensor:
        """How badly the words of the captions are named from the mean slot: nats a picture, a tenth of them."""
        named, targets = self.naming(states.mean(1)).float(), self.data.names[photos].float()
        return F.binary_cross_entropy_with_logits(named, targets, reduction="none").sum(-1).mean() / 10

    def update(self) -> None:
        """One step of the optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        on_gpu = self.data.device == "cuda"
        # No graph of autograd may live longer than its step: a CUDA graph would have to wait for another stream.
        with torch.autocast(self.data.device, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            total = self.loss()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()

    def follow(self, step: int, every: int) -> None:
        """Move the mean over time towards the weights."""
        decay = min(self.phase.ema, (1 + step) / (10 + step)) ** every
        pairs = [(self.average[n], t) for n, t in self.model.state_dict().items() if t.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in pairs], [t for _, t in pairs], 1 - decay)


def build(phase: Phase, data: Data) -> Model:
    """The bundled model's shape with the phase's backbone, in training mode."""
    options = {
        "backbone": phase.backbone,
        "arguments": phase.arguments,
        "size": phase.size,
        "stage": 3,
        "mean": MEAN,
        "std": STD,
        "interpolation": "bilinear",
    }
    source = {"encoder": "image", "options": options, "projection": {"dropout": 0.1}}
    decoder = {"layers": 3, "width": 256, "heads": 4, "max_position_embeddings": 64, "dropout": phase.dropout}
    settings = {"sources": {"image": source}, "decoder": decoder, "vocab_size": 4096}
    return Model(parse_config(settings, ModelConfig, where="model"), data.tokenizer).to(data.device).train()


def orders(phase: Phase, data: Data) -> Iterator[dict[str, Tensor]]:
    """Which pictures stand in each batch: each set shuffled anew once it is through."""
    generator = torch.Generator(data.device).manual_seed(phase.seed)

    def stream(count: int, batch: int) -> Iterator[Tensor]:
        left = torch.zeros(0, dtype=torch.long, device=data.device)
        while True:
            while len(left) < batch:
                left = torch.cat([left, torch.randperm(count, generator=generator, device=data.device)])
            yield left[:batch]
            left = left[batch:]

    streams = {name: stream(data.count[name], batch) for name, batch in zip(SETS, phase.batch, strict=True)}
    while True:
        yield {name: next(stream) for name, stream in streams.items()}


def captured(learner: Learner, choose: Callable[[], None]) -> Callable[[], None]:
    """The update as one CUDA graph; as it is where there is no CUDA."""
    if learner.data.device != "cuda":
        return learner.update
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            choose()
            learner.update()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    learner.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        learner.update()
    return graph.replay


def run(phase: Phase, data: Data, folder: Path) -> tuple[Model, dict[str, Any]]:
    """Train one phase: the model with the mean of its weights over time, and what is to be told of it."""
    start = load_model(folder / phase.start) if phase.start else None
    learner = Learner(phase, data, start, [load_model(folder / name) for name in phase.teachers])
    order = orders(phase, data)

    def choose() -> None:
        for name, ids in next(order).items():
            learner.chosen[name].copy_(ids)

    learner.lr.zero_()
    update = captured(learner, choose)
    began, step, gone, told = time.monotonic(), 0, 0.0, 0.0
    while gone < 1:
        learner.lr.fill_(phase.rate(gone))
        choose()
        update()
        step += 1
        if step % FOLLOWED == 0:
            learner.follow(step, FOLLOWED)
        if step % LOOKED_AT == 0 and not math.isfinite(told := learner.told.item()):
            raise SystemExit(f"{phase.name} is not finite at step {step}; lower its lr.")
        seconds = time.monotonic() - began
        gone = step / phase.steps if phase.steps else seconds / phase.seconds
    print(f"{phase.name}: {step} steps, {step * sum(phase.batch) / seconds:.0f} views a second, loss {told:.3f}")
    learner.model.load_state_dict(learner.average)
    facts = {"phase": vars(phase), "steps": step, "pictures seen": step * sum(phase.batch), "seconds": round(seconds)}
    return learner.model.eval().cpu(), facts


def main(pack: str, phases: str, out: str, device: str = "cuda") -> None:
    """Run the phases; each is saved in half precision."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
    plan = [Phase(**given) for given in json.loads(Path(phases).read_text(encoding="utf-8"))]
    with get_context("fork").Pool() as pool:  # before CUDA is touched
        data = Data(Path(pack), device, pool, plan[0].size)
    generation = GenerationConfig(max_new_tokens=24, num_beams=3, length_penalty=0.8)
    for phase in plan:
        model, facts = run(phase, data, Path(out))
        facts["versions"] = {"torch": torch.__version__}
        save_model(Path(out) / phase.name, model, facts, generation, torch.float16)


if __name__ == "__main__":
    main(*sys.argv[1:])
