"""Checks of the process and the runtime: import, global state, bfloat16, torch.compile and GPU."""

from __future__ import annotations

import torch

from mmx.encoders.contract import collate
from mmx.testing.check import TOLERANCE, CheckFailed, CheckSkipped
from mmx.testing.encoder_under_test import SOURCE, EncoderUnderTest, max_relative_difference, visible_states
from mmx.testing.process_state import advance_random_states, effects_of_import, process_state

DEVICE_TOLERANCE = 1e-2
BFLOAT16_TOLERANCE = 0.1  # 8 bits of mantissa, accumulated over layers; median over slots


def check_import(subject: EncoderUnderTest) -> None:
    """Importing the encoder has no side effects: no output, and no change of settings, seeds, logging or threads."""
    module = subject.encoder_class.__module__
    if module == "__main__":
        raise CheckSkipped("it was defined in the running script, not in a module")
    effects = effects_of_import(module)
    if effects:
        raise CheckFailed(f"importing {module} {effects}")


def check_global_state(subject: EncoderUnderTest) -> None:
    """Preparing and encoding do not change the global state of the process."""
    encoder = subject.build()
    advance_random_states()
    before = process_state()
    subject.encode(encoder, subject.prepare_all(encoder))
    after = process_state()
    changed = [name for name in before if after[name] != before[name]]
    if changed:
        raise CheckFailed(f"prepare or forward changed {', '.join(changed)}")


def check_bfloat16(subject: EncoderUnderTest) -> None:
    """Autocast to bfloat16, as in training, changes the states by a bounded amount."""
    encoder = subject.build()
    rows = subject.prepare_all(encoder)
    exact = subject.encode(encoder, rows)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = subject.encode(encoder, rows)
    expected = torch.cat([visible_states(exact, number) for number in range(len(rows))])
    found = torch.cat([visible_states(rounded, number) for number in range(len(rows))])
    relative = (expected - found).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-6)
    difference = float(relative[torch.isfinite(expected).all(-1)].median())
    if not difference <= BFLOAT16_TOLERANCE:
        raise CheckFailed(
            f"the median slot differs by {difference:.2f} of its norm in bfloat16, above {BFLOAT16_TOLERANCE:g}"
        )


def check_compile(subject: EncoderUnderTest) -> None:
    """torch.compile (tracing and autograd, without code generation) gives the same states."""
    encoder = subject.build()
    batch = collate(encoder, SOURCE, subject.prepare_all(encoder))
    with torch.no_grad():
        eager = subject.check_shapes(encoder, encoder(batch))
        try:
            torch._dynamo.reset()
            compiled = subject.check_shapes(encoder, torch.compile(encoder, backend="aot_eager")(batch))
        finally:
            torch._dynamo.reset()
    if not torch.equal(eager.mask, compiled.mask):
        raise CheckFailed("compiled, it returns another mask")
    difference = max_relative_difference(eager.states[eager.mask], compiled.states[compiled.mask])
    if not difference <= TOLERANCE:
        raise CheckFailed(f"compiled, its states differ by {difference:.2g}")


def check_device(subject: EncoderUnderTest) -> None:
    """On a GPU, all computation is on the GPU."""
    if not torch.cuda.is_available():
        raise CheckSkipped("there is no GPU here")
    encoder = subject.build()
    on_cpu = subject.encode(encoder, subject.prepare_all(encoder))
    batch = collate(encoder, SOURCE, subject.prepare_all(encoder))
    gpu_batch = {name: tensor.cuda() for name, tensor in batch.items()}
    with torch.no_grad():
        on_gpu = subject.check_shapes(encoder.cuda(), encoder(gpu_batch))
    if on_gpu.states.device.type != "cuda":
        raise CheckFailed(f"its states are on {on_gpu.states.device} with weights and batch on a GPU")
    gpu_states = on_gpu.states.cpu()[on_gpu.mask.cpu()]
    difference = max_relative_difference(on_cpu.states[on_cpu.mask], gpu_states)
    if not difference <= DEVICE_TOLERANCE:
        raise CheckFailed(f"on the GPU its states differ by {difference:.2g}")
