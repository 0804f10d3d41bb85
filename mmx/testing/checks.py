"""The checks of the conformance kit, one function each: returns nothing, or raises CheckFailed or CheckSkipped.

Axes: B rows, S slots, F feature size. Differences are relative to the root mean square of the compared values.
"""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmx.config.loader import parse_config
from mmx.encoders.base import Encoder
from mmx.encoders.contract import collate
from mmx.errors import ConfigError
from mmx.models.checkpoint import unique_tensors
from mmx.testing.check import TOLERANCE, Check, CheckFailed, CheckSkipped
from mmx.testing.encoder_under_test import (
    SOURCE,
    EncoderUnderTest,
    first_difference,
    is_equal,
    max_relative_difference,
    reloaded_options,
    visible_states,
)
from mmx.testing.grid_influence import centers_of_influence
from mmx.testing.input_types import check_input_types
from mmx.testing.runtime_checks import (
    check_bfloat16,
    check_compile,
    check_device,
    check_global_state,
    check_import,
)


def check_options(subject: EncoderUnderTest) -> None:
    """Options are validated, survive writing and reading, and rebuild the encoder."""
    try:
        parse_config({"no_such_option": 1}, subject.encoder_class.Options, where=SOURCE)
    except ConfigError:
        pass
    else:
        raise CheckFailed("the unknown option no_such_option was accepted")
    encoder = subject.build()
    if not isinstance(encoder.options, subject.encoder_class.Options):
        raise CheckFailed(f"self.options is {type(encoder.options).__name__}, not its Options")
    options = reloaded_options(encoder)
    if options != encoder.options:
        raise CheckFailed("self.options changes when it is written as YAML and read again")
    if _shapes(subject.build(options)) != _shapes(encoder):
        raise CheckFailed("an encoder built from self.options has other tensors than the encoder itself")


def check_prepare(subject: EncoderUnderTest) -> None:
    """`prepare` is deterministic."""
    encoder = subject.build()
    first = subject.prepare_all(encoder)
    second = subject.prepare_all(encoder)
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        if name := first_difference(a, b):
            raise CheckFailed(f"{name!r} of sample {number} differs between two calls of prepare")


def check_data_worker(subject: EncoderUnderTest) -> None:
    """The encoder can be pickled for a data worker, and prepares the same tensors there."""
    encoder = subject.build()
    copy = ForkingPickler.loads(bytes(ForkingPickler.dumps(encoder)))
    own = subject.prepare_all(encoder)
    copied = subject.prepare_all(copy)
    for number, (a, b) in enumerate(zip(own, copied, strict=True)):
        if name := first_difference(a, b):
            raise CheckFailed(f"{name!r} of sample {number} differs in a pickled copy of the encoder")


def check_output_shapes(subject: EncoderUnderTest) -> None:
    """States [B, S, F] of a floating dtype, a bool mask, a valid grid, one row per input."""
    encoder = subject.build()
    rows = subject.prepare_all(encoder)
    for batch in (rows, rows[:1]):
        features = subject.encode(encoder, batch)
        if len(features.states) != len(batch):
            raise CheckFailed(f"{len(batch)} inputs gave {len(features.states)} rows of states")


def check_finite(subject: EncoderUnderTest) -> None:
    """No NaN and no infinity in slots that may be attended."""
    encoder = subject.build()
    features = subject.encode(encoder, subject.prepare_all(encoder))
    is_invalid = ~torch.isfinite(features.states).all(-1) & features.mask
    num_invalid = int(is_invalid.sum())
    if num_invalid:
        raise CheckFailed(f"{num_invalid} of {int(features.mask.sum())} visible slots contain NaN or infinity")


def check_mask(subject: EncoderUnderTest) -> None:
    """The mask is True for slots that may be attended: as many in a batch as alone, and at least one."""
    encoder = subject.build()
    rows = subject.prepare_all(encoder)
    batched = subject.encode(encoder, rows).mask.sum(-1).tolist()
    alone = [int(subject.encode(encoder, [row]).mask.sum()) for row in rows]
    if min(alone) == 0:
        raise CheckFailed(f"no slot of sample {alone.index(0)} may be attended; is the mask inverted?")
    if batched != alone:
        raise CheckFailed(
            f"the samples have {alone} visible slots alone, {batched} in one batch; is the mask inverted?"
        )


def check_padding(subject: EncoderUnderTest) -> None:
    """The values of padding do not change visible states."""
    encoder = subject.build()
    rows = subject.prepare_all(encoder)
    padded = []
    for name in rows[0]:
        if rows[0][name].ndim and len({row[name].shape[0] for row in rows}) > 1:
            padded.append(name)
    if not padded:
        raise CheckSkipped("all inputs have one shape; nothing is padded")
    batch = collate(encoder, SOURCE, rows)
    changed_batch = {name: tensor.clone() for name, tensor in batch.items()}
    for name in padded:
        for number, row in enumerate(rows):
            _overwrite_padding(changed_batch[name][number, row[name].shape[0] :], row[name])
    with torch.no_grad():
        expected = subject.check_shapes(encoder, encoder(batch))
        found = subject.check_shapes(encoder, encoder(changed_batch))
    for number in range(len(rows)):
        difference = max_relative_difference(visible_states(expected, number), visible_states(found, number))
        if not difference <= TOLERANCE:
            raise CheckFailed(f"other values in the padding change the states of sample {number} by {difference:.2g}")


def check_batch_independence(subject: EncoderUnderTest) -> None:
    """An input has the same states alone and in a batch."""
    encoder = subject.build()
    rows = subject.prepare_all(encoder)
    batched = subject.encode(encoder, rows)
    for number, row in enumerate(rows):
        alone = subject.encode(encoder, [row])
        difference = max_relative_difference(visible_states(alone, 0), visible_states(batched, number))
        if not difference <= TOLERANCE:
            raise CheckFailed(
                f"sample {number} alone and in a batch of {len(rows)} differ by {difference:.2g}, above {TOLERANCE:g}"
            )


def check_order(subject: EncoderUnderTest) -> None:
    """Reordering the rows of a batch reorders the rows of states."""
    encoder = subject.build()
    rows = subject.prepare_all(encoder)
    forward = subject.encode(encoder, rows)
    reversed_ = subject.encode(encoder, rows[::-1])
    for number in range(len(rows)):
        other = visible_states(reversed_, len(rows) - 1 - number)
        difference = max_relative_difference(visible_states(forward, number), other)
        if not difference <= TOLERANCE:
            raise CheckFailed(f"sample {number} differs by {difference:.2g} if the batch is reversed")


def check_deterministic(subject: EncoderUnderTest) -> None:
    """In eval mode the same batch has exactly the same states, for any random state."""
    encoder = subject.build()
    rows = subject.prepare_all(encoder)
    torch.manual_seed(1)
    first = subject.encode(encoder, rows).states
    torch.manual_seed(2)
    if not is_equal(first, subject.encode(encoder, rows).states):
        raise CheckFailed("two forward passes of one batch in eval mode differ")


def check_gradients(subject: EncoderUnderTest) -> None:
    """Every trainable parameter, and every floating-point input that is not the window, gets a gradient."""
    encoder = subject.build()
    _perturb_parameters(encoder)
    batch = collate(encoder, SOURCE, subject.prepare_all(encoder))
    inputs = {name: tensor.clone().requires_grad_() for name, tensor in batch.items() if tensor.is_floating_point()}
    features = subject.check_shapes(encoder, encoder({**batch, **inputs}))
    targets: dict[str, Tensor] = {
        name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad
    }
    targets |= {f"input {name}": tensor for name, tensor in inputs.items() if tensor is not features.window}
    if not targets:
        raise CheckSkipped("it has no trainable parameters and no floating-point input")
    states = features.states[features.mask]
    if not states.requires_grad:
        raise CheckFailed("the states have no gradient")
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)
    gradients = torch.autograd.grad((states * weights).sum(), list(targets.values()), allow_unused=True)
    missing = []
    for name, gradient in zip(targets, gradients, strict=True):
        if gradient is None or not gradient.any():
            missing.append(name)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckFailed(f"no gradient reaches {', '.join(missing[:3])}{more}")


def check_save_load(subject: EncoderUnderTest) -> None:
    """Options, tensors and files of a checkpoint restore the encoder."""
    encoder = subject.build()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = folder / "tensors.safetensors"
        tensors = unique_tensors(encoder.state_dict())
        save_file({name: _changed_copy(tensor) for name, tensor in tensors.items()}, path)
        encoder.load_state_dict(load_file(path), strict=False)
        encoder.save_files(folder)
        restored = subject.build(reloaded_options(encoder))
        restored.load_files(folder)
        missing, unexpected = restored.load_state_dict(load_file(path), strict=False)
    names = unique_tensors(restored.state_dict()).keys()
    mismatched = [name for name in missing if name in names] + unexpected
    if mismatched:
        listed = ", ".join(mismatched[:3])
        raise CheckFailed(f"its tensors do not fit the encoder rebuilt from its options: {listed}")
    expected = subject.encode(encoder, subject.prepare_all(encoder))
    found = subject.encode(restored, subject.prepare_all(restored))
    if not (is_equal(expected.states, found.states) and is_equal(expected.mask, found.mask)):
        raise CheckFailed("after saving and loading, the same inputs have other states")


def check_grid(subject: EncoderUnderTest) -> None:
    """The cells of the grid are in order: the pixels that influence a cell most are where the cell is."""
    encoder = subject.build()
    batch = collate(encoder, SOURCE, subject.prepare_all(encoder))
    images = [name for name, tensor in batch.items() if tensor.is_floating_point() and tensor.ndim == 4]
    if encoder.dimensions != 2 or encoder.modality != "image" or len(images) != 1:
        raise CheckSkipped("it has no grid over images")
    pixels = batch[images[0]].clone().requires_grad_()
    features = subject.check_shapes(encoder, encoder({**batch, images[0]: pixels}))
    assert features.grid is not None
    rows, columns = features.grid
    if min(rows, columns) < 2:
        raise CheckSkipped(f"a grid of {rows} x {columns} has no direction")
    cells = sorted({(row, column) for row in (0, rows // 2, rows - 1) for column in (0, columns // 2, columns - 1)})
    slots = [row * columns + column - rows * columns for row, column in cells]
    centers = centers_of_influence([features.states[:, slot] for slot in slots], pixels)
    for first, (y1, x1) in zip(cells, centers, strict=True):
        for second, (y2, x2) in zip(cells, centers, strict=True):
            is_above = first[0] < second[0]
            is_left = first[1] < second[1]
            if (is_above and not y1 < y2) or (is_left and not x1 < x2):
                raise CheckFailed(
                    f"cell {first} of the grid {rows} x {columns} depends on the pixels around x {x1:.2f}, y {y1:.2f}, "
                    f"and cell {second} on those around x {x2:.2f}, y {y2:.2f}"
                )


CHECKS = (
    Check("options", check_options, "a misspelled option must be an error, and a checkpoint must rebuild the encoder.",
          "derive Options from mmx.config.schema.FrozenModel, and let self.options hold all that __init__ needs."),
    Check("prepare", check_prepare, "the same input must become the same tensors.",
          "return a dict of CPU tensors; use no random numbers in prepare."),
    Check("input_types", check_input_types, "training gives images as PIL images, lists give paths, tars give bytes.",
          "read every input with mmx.load_image or mmx.load_audio, which take all of these types."),
    Check("data_worker", check_data_worker, "inputs are prepared in other processes.",
          "keep no open file, lambda, lock or local class on self; create them inside prepare."),
    Check("output_shapes", check_output_shapes, "the projection reads states [B, S, F], a bool mask [B, S] and a grid.",
          "return Features(states, mask, grid) with F = self.width and as many rows as inputs."),
    Check("finite", check_finite, "one NaN in a visible slot makes all logits of all rows NaN.",
          "look for divisions by zero, logarithms of zero, and softmax over no slots."),
    Check("mask", check_mask, "True means may be attended; with an inverted mask, only padding is attended.",
          "return True for slots that exist, False for padding; invert a mask with the opposite meaning."),
    Check("padding", check_padding, "a batch may hold longer inputs; an answer must not depend on them.",
          "use the mask inside the encoder: in attention, in pooling, before convolutions and norms over time."),
    Check("batch_independence", check_batch_independence, "an answer must not depend on the rest of the batch.",
          "compute no statistics over the batch in eval mode; see also the padding check."),
    Check("order", check_order, "rows must not be exchanged or treated by their index.",
          "treat all rows alike, and return them in the order of the batch."),
    Check("deterministic", check_deterministic, "the same input must have the same answer.",
          "use no random numbers if self.training is False."),
    Check("gradients", check_gradients, "a parameter without gradient is never trained.",
          "do not detach or round; remove unused parameters, or set requires_grad to False."),
    Check("save_load", check_save_load, "a checkpoint consists of options, tensors and files; anything else is lost.",
          "keep what is learned in parameters and buffers, everything else in options or save_files."),
    Check("import", check_import, "a plugin is imported together with others, which it must not affect.",
          "define only classes and constants; print, seed and configure nothing at import."),
    Check("global_state", check_global_state, "other code relies on its own random states and settings.",
          "use a torch.Generator for random numbers, and restore every setting."),
    Check("grid", check_grid, "boxes and attention maps are placed by the grid.",
          "order the last rows*columns slots row by row from the top left, and give (rows, columns)."),
    Check("bfloat16", check_bfloat16, "training and GPUs use bfloat16.",
          "keep exponentials, logarithms and large sums in float32 (x.float())."),
    Check("compile", check_compile, "torch.compile is used to speed up large encoders.",
          "compute with tensors only in forward: no state that changes between calls, no branches on tracing."),
    Check("device", check_device, "models run on GPUs.",
          "create tensors on the device of the batch: torch.arange(n, device=x.device)."),
)  # fmt: skip


def _shapes(encoder: Encoder) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in encoder.state_dict().items()}


def _perturb_parameters(encoder: Encoder) -> None:
    """Add noise to every parameter: those initialized to zero (gates, last norms) would block all gradients."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.02)


def _changed_copy(tensor: Tensor) -> Tensor:
    """Return a copy with slightly other values, so that loading has an effect."""
    copy = tensor.detach().clone().contiguous()
    return copy * 1.01 if copy.is_floating_point() else copy


def _overwrite_padding(padding: Tensor, values: Tensor) -> None:
    """Overwrite padding with other plausible values; a mask is unchanged."""
    if padding.dtype == torch.bool or not padding.numel():
        return
    indices = torch.arange(padding.shape[0]) % max(1, len(values))
    padding.copy_(values[indices] * 3 + 1 if values.is_floating_point() else values[indices])
