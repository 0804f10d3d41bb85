"""For plugin authors and tests: the conformance kit, and small test doubles that need no download.

    from mmx.testing import check_encoder
    check_encoder("my_package:MyEncoder")          # raises EncoderError with every failed check and its remedy

`toy_tokenizer` encodes text as bytes, `ToyEncoder` encodes numbers, `tiny_model` builds a small model with any encoder.
"""

from mmx.testing.conformance import CheckResult, check_encoder, encoder_checks
from mmx.testing.toys import ToyEncoder, tiny_model, toy_tokenizer

__all__ = ["CheckResult", "ToyEncoder", "check_encoder", "encoder_checks", "tiny_model", "toy_tokenizer"]
