"""The promises of an encoder, one function each: silent where it is kept, `Broken` with what was seen where it is not.

Alphabet: B rows, S slots, F feature width. Differences are in units of the root mean square of what is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmx.config.loader import parse_config
from mmx.encoders.base import Encoder
from mmx.encoders.contract import collate
from mmx.errors import ConfigError
from mmx.models.checkpoint import unique_tensors
from mmx.testing.encoder_under_test import (
    EncoderUnderTest,
    equal,
    max_relative_difference,
    rebuilt_options,
    unlike,
    visible,
)
from mmx.testing.process_state import effects_of_import, process_state, reseed_all

CLOSE = 1e-3  # kernels add up in another order when the batch has another size
BFLOAT16 = 0.1  # of 8 bits of mantissa, after some layers; the median over slots


class CheckFailed(Exception):
    """A promise is not kept; the text says what was seen."""


class CheckSkipped(Exception):
    """A promise that does not apply; the text says why."""


class Check(NamedTuple):
    """One promise: its name, what is run, why anybody cares, and what to do when it is broken."""

    name: str
    run: Callable[[EncoderUnderTest], None]
    reason: str
    remedy: str


def options(subject: EncoderUnderTest) -> None:
    """Options are validated, written and read back, and build the encoder again."""
    try:
        parse_config({"no_such_option": 1}, subject.kind.Options, where="kit")
    except ConfigError:
        pass
    else:
        raise CheckFailed("an option that does not exist, no_such_option, was accepted in silence")
    encoder = subject.build()
    if not isinstance(encoder.options, subject.kind.Options):
        raise CheckFailed(f"self.options is {type(encoder.options).__name__}, not its Options")
    read = rebuilt_options(encoder)
    if read != encoder.options:
        raise CheckFailed("self.options, written as YAML and read again, are other options")
    again, own = subject.build(read).state_dict(), encoder.state_dict()
    if {n: t.shape for n, t in again.items()} != {n: t.shape for n, t in own.items()}:
        raise CheckFailed("an encoder built from self.options has other tensors than the one that carries them")


def preparing(subject: EncoderUnderTest) -> None:
    """`prepare` gives plain tensors, and the same ones each time."""
    encoder = subject.build()
    first, second = subject.prepared(encoder), subject.prepared(encoder)
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        if name := unlike(a, b):
            raise CheckFailed(f"{name!r} of sample {number} differs between two calls of prepare")


def worker(subject: EncoderUnderTest) -> None:
    """The encoder can be sent to a data worker, and prepares there what it prepares here; its tensors come back."""
    encoder = subject.build()
    sent = ForkingPickler.loads(bytes(ForkingPickler.dumps(encoder)))
    here, there = subject.prepared(encoder), subject.prepared(sent)
    for number, (a, b) in enumerate(zip(here, there, strict=True)):
        if name := unlike(a, b):
            raise CheckFailed(f"{name!r} of sample {number} is prepared otherwise by a copy in another process")


def form(subject: EncoderUnderTest) -> None:
    """States [B, S, F] of floating numbers, a bool mask, a grid that fits, a row for each input."""
    encoder = subject.build()
    rows = subject.prepared(encoder)
    for batch in (rows, rows[:1]):
        features = subject.encode(encoder, batch)
        if len(features.states) != len(batch):
            raise CheckFailed(f"{len(batch)} inputs gave {len(features.states)} rows of states")


def finite(subject: EncoderUnderTest) -> None:
    """No NaN and no infinity where a slot may be attended."""
    encoder = subject.build()
    features = subject.encode(encoder, subject.prepared(encoder))
    bad = int((~torch.isfinite(features.states).all(-1) & features.mask).sum())
    if bad:
        raise CheckFailed(f"{bad} of {int(features.mask.sum())} visible slots hold NaN or infinity")


def mask(subject: EncoderUnderTest) -> None:
    """True marks what may be attended: as much of an input in a batch as of the same input alone, and never nothing."""
    encoder = subject.build()
    rows = subject.prepared(encoder)
    together = subject.encode(encoder, rows).mask.sum(-1).tolist()
    alone = [int(subject.encode(encoder, [row]).mask.sum()) for row in rows]
    if min(alone) == 0:
        raise CheckFailed(f"nothing of sample {alone.index(0)} may be attended when it is alone; is the mask inverted?")
    if together != alone:
        raise CheckFailed(
            f"alone the samples have {alone} visible slots, in one batch {together}; is the mask inverted?"
        )


def alone(subject: EncoderUnderTest) -> None:
    """An input gives the same states alone and beside others."""
    encoder = subject.build()
    rows = subject.prepared(encoder)
    together = subject.encode(encoder, rows)
    for number, row in enumerate(rows):
        far = max_relative_difference(visible(subject.encode(encoder, [row]), 0), visible(together, number))
        if not far <= CLOSE:
            raise CheckFailed(
                f"sample {number} alone and in a batch of {len(rows)} differ by {far:.2g}, above {CLOSE:g}"
            )


def padding(subject: EncoderUnderTest) -> None:
    """What stands in the padding of a batch changes nothing that may be attended."""
    encoder = subject.build()
    rows = subject.prepared(encoder)
    names = [n for n in rows[0] if rows[0][n].ndim and len({row[n].shape[0] for row in rows}) > 1]
    if not names:
        raise CheckSkipped("all inputs have one shape; nothing is padded")
    clean = collate(encoder, "kit", rows)
    dirty = {name: tensor.clone() for name, tensor in clean.items()}
    for name in names:
        for number, row in enumerate(rows):
            _spoil(dirty[name][number, row[name].shape[0] :], row[name])
    with torch.no_grad():
        before, after = (subject.check(encoder, encoder(batch)) for batch in (clean, dirty))
    for number in range(len(rows)):
        far = max_relative_difference(visible(before, number), visible(after, number))
        if not far <= CLOSE:
            raise CheckFailed(f"junk in the padding moves the visible states of sample {number} by {far:.2g}")


def order(subject: EncoderUnderTest) -> None:
    """Rows in another order give the same rows in that order."""
    encoder = subject.build()
    rows = subject.prepared(encoder)
    forward, backward = subject.encode(encoder, rows), subject.encode(encoder, rows[::-1])
    for number in range(len(rows)):
        far = max_relative_difference(visible(forward, number), visible(backward, len(rows) - 1 - number))
        if not far <= CLOSE:
            raise CheckFailed(f"sample {number} differs by {far:.2g} when the batch is turned round")


def deterministic(subject: EncoderUnderTest) -> None:
    """In eval the same batch gives the same states to the bit, whatever the dice say."""
    encoder = subject.build()
    rows = subject.prepared(encoder)
    torch.manual_seed(1)
    first = subject.encode(encoder, rows).states
    torch.manual_seed(2)
    if not equal(first, subject.encode(encoder, rows).states):
        raise CheckFailed("two passes in eval mode over one batch differ")


def gradients(subject: EncoderUnderTest) -> None:
    """A gradient reaches every parameter that wants one, and the input where that is made of numbers."""
    encoder = subject.build()
    _leave_zero(encoder)
    batch = collate(encoder, "kit", subject.prepared(encoder))
    lively = {name: t.clone().requires_grad_() for name, t in batch.items() if t.is_floating_point()}
    features = subject.check(encoder, encoder({**batch, **lively}))
    wanted = {n: p for n, p in encoder.named_parameters() if p.requires_grad} | {
        f"input {n}": t for n, t in lively.items()
    }
    if not wanted:
        raise CheckSkipped("it has no parameters to train and no input of numbers")
    states = features.states[features.mask]
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)
    if not states.requires_grad:
        raise CheckFailed("the states carry no gradient at all")
    found = torch.autograd.grad((states * weights).sum(), list(wanted.values()), allow_unused=True)
    missed = [name for name, gradient in zip(wanted, found, strict=True) if gradient is None or not gradient.any()]
    if missed:
        raise CheckFailed(
            f"no gradient reaches {', '.join(missed[:3])}{f' and {len(missed) - 3} more' * (len(missed) > 3)}"
        )


def saved(subject: EncoderUnderTest) -> None:
    """Options, tensors and files of a checkpoint give the same encoder again."""
    encoder = subject.build()
    with TemporaryDirectory() as place:
        path = Path(place) / "tensors.safetensors"
        tensors = {name: t.detach().clone().contiguous() for name, t in unique_tensors(encoder.state_dict()).items()}
        save_file({name: _moved(tensor) for name, tensor in tensors.items()}, path)
        encoder.load_state_dict(load_file(path), strict=False)
        encoder.save_files(Path(place))
        again = subject.build(rebuilt_options(encoder))
        again.load_files(Path(place))
        missing, extra = again.load_state_dict(load_file(path), strict=False)
    names = unique_tensors(again.state_dict()).keys()
    if lost := [name for name in missing if name in names] + extra:
        raise CheckFailed(f"its tensors do not fit the encoder rebuilt from its options: {', '.join(lost[:3])}")
    one, two = (subject.encode(part, subject.prepared(part)) for part in (encoder, again))
    if not (equal(one.states, two.states) and equal(one.mask, two.mask)):
        raise CheckFailed("after saving and loading, the same inputs give other states")


def imports(subject: EncoderUnderTest) -> None:
    """Importing the encoder does nothing else: no output, no switch, no seed, no logging, no threads."""
    module = subject.kind.__module__
    if module == "__main__":
        raise CheckSkipped("it was defined in the running script, not in a module")
    if effects := effects_of_import(module):
        raise CheckFailed(f"importing {module} {effects}")


def globals_(subject: EncoderUnderTest) -> None:
    """Preparing and encoding leave the state of the process as it was."""
    encoder = subject.build()
    reseed_all()
    before = process_state()
    subject.encode(encoder, subject.prepared(encoder))
    changed = [name for name, value in process_state().items() if value != before[name]]
    if changed:
        raise CheckFailed(f"prepare or forward changed {', '.join(changed)}")


def grid(subject: EncoderUnderTest) -> None:
    """The cells of the grid lie on the picture as they say: what a cell depends on most lies around its place."""
    encoder = subject.build()
    batch = collate(encoder, "kit", subject.prepared(encoder))
    planes = [n for n, t in batch.items() if t.is_floating_point() and t.ndim == 4]
    if encoder.dimensions != 2 or encoder.modality != "image" or len(planes) != 1:
        raise CheckSkipped("it gives no grid over pictures")
    pixels = batch[planes[0]].clone().requires_grad_()
    features = subject.check(encoder, encoder({**batch, planes[0]: pixels}))
    assert features.grid is not None
    rows, columns = features.grid
    if min(rows, columns) < 2:
        raise CheckSkipped(f"a grid of {rows} x {columns} has no direction")
    places = sorted({(row, column) for row in (0, rows // 2, rows - 1) for column in (0, columns // 2, columns - 1)})
    slots = [row * columns + column - rows * columns for row, column in places]
    centres = _centres_of_influence([features.states[:, slot] for slot in slots], pixels)
    for (r1, c1), (y1, x1) in zip(places, centres, strict=True):
        for (r2, c2), (y2, x2) in zip(places, centres, strict=True):
            if (r1 < r2 and not y1 < y2) or (c1 < c2 and not x1 < x2):
                raise CheckFailed(
                    f"cell ({r1}, {c1}) of the grid {rows} x {columns} depends on the pixels around x {x1:.2f}, y "
                    f"{y1:.2f}, and cell ({r2}, {c2}) on those around x {x2:.2f}, y {y2:.2f}"
                )


def bfloat16(subject: EncoderUnderTest) -> None:
    """Under autocast in bfloat16, as in training, the states are those of float32 within a bound."""
    encoder = subject.build()
    rows = subject.prepared(encoder)
    exact = subject.encode(encoder, rows)
    with torch.autocast("cpu", torch.bfloat16):
        rough = subject.encode(encoder, rows)
    before, after = (torch.cat([visible(features, n) for n in range(len(rows))]) for features in (exact, rough))
    shares = (before - after).norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-6)
    far = float(shares[torch.isfinite(before).all(-1)].median())
    if not far <= BFLOAT16:
        raise CheckFailed(f"the median slot differs by {far:.2f} of its length in bfloat16, above {BFLOAT16:g}")


def compiled(subject: EncoderUnderTest) -> None:
    """torch.compile gives the same states (traced and differentiated, without generating code for the machine)."""
    encoder = subject.build()
    batch = collate(encoder, "kit", subject.prepared(encoder))
    with torch.no_grad():
        plain = subject.check(encoder, encoder(batch))
        try:
            torch._dynamo.reset()
            fast = subject.check(encoder, torch.compile(encoder, backend="aot_eager")(batch))
        finally:
            torch._dynamo.reset()
    far = (
        max_relative_difference(plain.states[plain.mask], fast.states[fast.mask])
        if torch.equal(plain.mask, fast.mask)
        else float("inf")
    )
    if not far <= CLOSE:
        raise CheckFailed(f"compiled, it gives states that differ by {far:.2g}")


def device(subject: EncoderUnderTest) -> None:
    """On a GPU everything happens there."""
    if not torch.cuda.is_available():
        raise CheckSkipped("there is no GPU here")
    encoder = subject.build()
    here = subject.encode(encoder, subject.prepared(encoder))
    batch = {n: t.cuda() for n, t in collate(encoder, "kit", subject.prepared(encoder)).items()}
    with torch.no_grad():
        there = subject.check(encoder.cuda(), encoder(batch))
    if there.states.device.type != "cuda":
        raise CheckFailed(f"its states are on {there.states.device} when its weights and its batch are on a GPU")
    far = max_relative_difference(here.states[here.mask], there.states.cpu()[there.mask.cpu()])
    if not far <= 10 * CLOSE:
        raise CheckFailed(f"on the GPU its states differ by {far:.2g}")


CHECKS = (
    Check("options", options, "a slip of the finger in a configuration must be told, and a checkpoint must rebuild.",
          "derive Options from mmx.config.schema.Frozen, and let self.options hold all that __init__ needs."),
    Check("prepare", preparing, "a picture seen twice is the same picture, and workers return plain tensors.",
          "return a dict of CPU tensors; draw nothing at random in prepare."),
    Check("worker", worker, "inputs are prepared in other processes while the model works.",
          "keep no open file, lambda, lock or local class on self; make them inside prepare."),
    Check("form", form, "the projection reads states [B, S, F], a bool mask [B, S] and a grid.",
          "return Features(states, mask, grid) with F = self.width and as many rows as inputs."),
    Check("finite", finite, "one NaN in a visible slot makes every word of every row NaN.",
          "look for divisions by zero, logarithms of silence, and softmaxes over nothing."),
    Check("mask", mask, "True means may be attended; inverted, the decoder looks at padding alone.",
          "return True for slots that exist, False for padding; invert a mask that means the opposite."),
    Check("padding", padding, "a batch may hold longer inputs; an answer must not depend on them.",
          "use the mask inside the encoder: in attention, in pooling, before convolutions and norms over time."),
    Check("alone", alone, "an answer must not depend on which other questions came with it.",
          "take no statistics over the batch in eval; see also the padding check."),
    Check("order", order, "rows must not be mixed up or numbered.",
          "treat every row alike, and return the rows in the order of the batch."),
    Check("deterministic", deterministic, "the same input must give the same answer.",
          "draw nothing at random when self.training is False."),
    Check("gradients", gradients, "what no gradient reaches is never trained.",
          "do not detach or round on the way; remove parameters that are not used, or set requires_grad to False."),
    Check("saved", saved, "a checkpoint is options, tensors and files; anything else is lost.",
          "keep what was learned in parameters and buffers, all else in options or save_files."),
    Check("import", imports, "a plugin is imported beside others, which it must not disturb.",
          "define classes and constants only; print, seed and configure nothing at import."),
    Check("globals", globals_, "other encoders and the trainer rely on their own dice and switches.",
          "use a generator of your own for random numbers, and restore every switch."),
    Check("grid", grid, "boxes and attention maps are drawn where the grid says.",
          "order the last rows*columns slots row by row from the top left, and give (rows, columns)."),
    Check("bfloat16", bfloat16, "training and GPUs use bfloat16.",
          "keep exponentials, logarithms and large sums in float32 (x.float())."),
    Check("compile", compiled, "torch.compile is what makes large encoders fast.",
          "compute with tensors only in forward: no state that changes from call to call, no branches on tracing."),
    Check("device", device, "models run on GPUs.",
          "make new tensors where the batch is: torch.arange(n, device=x.device)."),
)  # fmt: skip


# ---- pieces ----------------------------------------------------------------------------------------------------


def _leave_zero(encoder: Encoder) -> None:
    """Move every parameter a little: what starts at zero on purpose (the last norm of a residual branch, a gate) stops
    all gradients until the first step."""
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=dice).to(parameter), alpha=0.02)


def _moved(tensor: Tensor) -> Tensor:
    """Slightly other numbers, so that loading is seen to do something."""
    return tensor * 1.01 if tensor.is_floating_point() else tensor


def _spoil(padded: Tensor, real: Tensor) -> None:
    """Put into padding what might stand there; a mask stays as it is."""
    if padded.dtype != torch.bool and padded.numel():
        places = torch.arange(padded.shape[0]) % max(1, len(real))
        padded.copy_(real[places] * 3 + 1 if real.is_floating_point() else real[places])


def _centres_of_influence(slots: list[Tensor], pixels: Tensor) -> list[tuple[float, float]]:
    """(y, x) in 0..1 for each slot's states [B, F]: the centre of the pixels [B, C, h, w] that move it more than they
    move the others. What moves all alike, as in an encoder that mixes everything, says nothing about a place."""
    maps = []
    for slot in slots:
        (gradient,) = torch.autograd.grad((slot * slot.detach().sign()).sum(), pixels, retain_graph=True)
        energy = gradient.square().sum((0, 1), keepdim=True).double()
        energy = torch.nn.functional.adaptive_avg_pool2d(energy, 16)[0, 0]
        maps.append(energy / energy.sum().clamp(min=1e-30))
    shares = torch.stack(maps) / torch.stack(maps).sum(0).clamp(min=1e-30)
    above = (shares - 1 / len(slots)).clamp(min=0)
    above = above / above.sum((1, 2), keepdim=True).clamp(min=1e-30)
    scale = torch.linspace(0, 1, 16, dtype=torch.float64)
    return [(float((each.sum(1) * scale).sum()), float((each.sum(0) * scale).sum())) for each in above]
