"""A text generator that is loaded from a folder or a public name, and uploaded to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch

from mmx.config.schema import GenerationConfig, Precision
from mmx.errors import CheckpointError
from mmx.hub.pretrained import load_pretrained
from mmx.hub.push import PushOptions, push_checkpoint
from mmx.inference.arguments import check_device
from mmx.inference.generator import TextGenerator
from mmx.models.model import Model


class PretrainedGenerator(TextGenerator):
    """Base of `Pipeline` with the methods that models of other libraries have too.

    Args:
        folder: the checkpoint that the model was loaded from, if it was.
    """

    def __init__(self, model: Model, generation: GenerationConfig | None = None, folder: Path | None = None) -> None:
        super().__init__(model, generation)
        self.folder = folder

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: Precision = "float32",
    ) -> Self:
        """Load a folder or a public name. The arguments are those of `mmx.load`, which calls it.

        Example:
            >>> model = mmx.Pipeline.from_pretrained("anna/captions")
        """
        check_device(device)
        loaded = load_pretrained(name, revision, device)
        loaded.model.prepare_for_inference(dtype)
        return cls(loaded.model, loaded.generation, loaded.folder)

    def push_to_hub(
        self, name: str, private: bool = False, revision: str | None = None, license_name: str | None = None
    ) -> str:
        """Upload the checkpoint that this model was loaded from, as `mmx push` does; return the address of the commit.

        Args:
            name: public name, `user/name`.
            private, revision, license_name: as in `mmx.hub.push.PushOptions`.

        Raises CheckpointError if it was loaded from no checkpoint of mmx, or if it could not be uploaded.

        Example:
            >>> model = mmx.load("runs/mine/best")
            >>> model.push_to_hub("anna/captions")
        """
        if self.folder is None:
            raise CheckpointError(
                f"{name!r} could not be pushed, because this model was loaded from no checkpoint of mmx; write one "
                "with mmx import or mmx.models.checkpoint.save_model, and load it.",
                code="hub.no_folder",
                name=name,
            )
        return push_checkpoint(self.folder, name, PushOptions(private, revision, license_name))
