"""For plugin authors and for our own tests: the conformance kit, and small stand-ins that need no download.

    from mmx.testing import check_encoder
    check_encoder("my_package:MyEncoder")          # raises EncoderError with every broken promise, reason and remedy

`toy_tokenizer` spells text by bytes, `ToyEncoder` reads numbers, `tiny_model` mounts any encoder on a small decoder.
"""

from mmx.testing.conformance import CheckResult, check_encoder, encoder_checks
from mmx.testing.toys import ToyEncoder, tiny_model, toy_tokenizer

__all__ = ["CheckResult", "ToyEncoder", "check_encoder", "encoder_checks", "tiny_model", "toy_tokenizer"]
