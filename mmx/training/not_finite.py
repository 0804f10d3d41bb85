"""The error of a loss or gradient that is not finite: it names the encoder at fault, or else the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from mmx.data.batching import Batch
from mmx.errors import MmxError, TrainingError
from mmx.models.model import Model
from mmx.training.invalid_features import InvalidFeatures, find_invalid_features


def not_finite_error(
    model: Model, batches: Sequence[Batch], accelerator: Accelerator, is_finite: bool, step: int, state: Path | None
) -> TrainingError:
    """Return the error of this step, the same on all ranks. Must be called on all ranks.

    Args:
        is_finite: whether the loss and gradient of this rank are finite.
        step: number of the step, from 1.
        state: the last saved state of the run.
    """
    advice = "no state was saved yet:" if state is None else f"the last good state is {state}: use --resume and"
    path = None if state is None else str(state)
    own = [] if is_finite else [_find_invalid_features(model, batches, accelerator)]
    found: list[InvalidFeatures] = [features for features in gather_object(own) if features is not None]
    if found:
        invalid = found[0]
        return TrainingError(
            f"encoder {invalid.encoder} of source {invalid.source!r} gives NaN or infinity in {invalid.stage} "
            f"for sample {invalid.sample} at step {step}; {advice} correct the sample or the encoder.",
            code="training.encoder_not_finite",
            step=step,
            source=invalid.source,
            encoder=invalid.encoder,
            sample=invalid.sample,
            stage=invalid.stage,
            state=path,
        )
    samples = gather_object([name for batch in batches for name in batch.ids[:2]])[:6]
    return TrainingError(
        f"the loss or its gradient is not finite at step {step} (samples {', '.join(samples)}, …); "
        f"{advice} lower training.learning_rate or training.max_grad_norm.",
        code="training.not_finite",
        step=step,
        samples=samples,
        state=path,
    )


def sampling_error(
    error: MmxError, model: Model, batches: Sequence[Batch], accelerator: Accelerator, step: int, state: Path | None
) -> MmxError:
    """Return the error of captions that could not be sampled, the same on all ranks. Must be called on all ranks.

    Features and logits that are not finite are reported as those of a loss; `error` is returned if there are none.
    """
    not_finite = not_finite_error(model, batches, accelerator, False, step, state)
    is_overflow = error.code == "generation.not_finite"
    return not_finite if is_overflow or not_finite.code == "training.encoder_not_finite" else error


def _find_invalid_features(model: Model, batches: Sequence[Batch], accelerator: Accelerator) -> InvalidFeatures | None:
    try:
        return find_invalid_features(model, batches, accelerator.autocast())
    except Exception:  # noqa: BLE001 - the other ranks wait for this one; the general message follows
        return None
