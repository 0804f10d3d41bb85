"""The contract of an encoder: what is refused at its door, and how prepared inputs become a batch."""

import re

import pytest
import torch

from mmx.config.schema import SourceConfig
from mmx.encoders.base import Encoder, Features
from mmx.encoders.contract import check_features, encode, prepare
from mmx.errors import EncoderError
from mmx.models.model import SourceBatch
from mmx.models.source import build_encoder
from mmx.testing import ToyEncoder, tiny_model, toy_tokenizer

B, S, F = 2, 6, 8


class FlatEncoder(ToyEncoder):
    modality = "picture"
    dimensions = 2


class WidthlessEncoder(Encoder):
    modality = "nothing"

    def prepare(self, raw):
        return {}

    def forward(self, batch):
        return None


class OneRowEncoder(ToyEncoder):
    """Forgets that there is a batch."""

    def forward(self, batch):
        features = super().forward(batch)
        return Features(features.states[:1], features.mask[:1])


def toy(kind=ToyEncoder):
    return kind(kind.Options(features=F))


def good(states=(B, S, F), mask=(B, S), grid=None, kind=torch.float32, told=torch.bool):
    return Features(torch.zeros(states, dtype=kind), torch.ones(mask, dtype=told), grid)


WRONG = {  # name: (what the encoder gives, what is said to be given, what is said to be expected)
    "nothing": (None, "gave NoneType", "Features(states, mask, grid)"),
    "a tensor": (torch.zeros(B, S, F), "gave Tensor", "Features(states, mask, grid)"),
    "a pair of others": ((1, 2), "gave tuple of (int, int)", "Features(states, mask, grid)"),
    "no mask": (Features(torch.zeros(B, S, F), None), "gave Features of (Tensor, NoneType, NoneType)", "Features("),
    "a list": (Features([[0.0]], torch.ones(B, S)), "gave Features of (list, Tensor, NoneType)", "Features("),
    "two axes": (good(states=(S, F)), "states [6, 8]", "[B, S, F] with F = its width 8"),
    "four axes": (good(states=(B, 2, 3, F)), "states [2, 2, 3, 8]", "[B, S, F]"),
    "another width": (good(states=(B, S, 7)), "states [2, 6, 7]", "F = its width 8"),
    "whole numbers": (good(kind=torch.int64), "states of torch.int64", "floating-point"),
    "a float mask": (good(told=torch.float32), "a mask torch.float32 [2, 6]", "bool [2, 6], True = may be attended"),
    "a whole mask": (good(told=torch.int64), "a mask torch.int64 [2, 6]", "bool [2, 6]"),
    "a short mask": (good(mask=(B, 5)), "a mask torch.bool [2, 5]", "bool [2, 6]"),
    "a mask per text": (good(mask=(B, 1, S)), "a mask torch.bool [2, 1, 6]", "bool [2, 6]"),
    "a grid too large": (good(grid=(2, 4)), "grid (2, 4) for 6 slots", "covering its last rows*columns slots"),
    "a grid of one": (good(grid=(6,)), "grid (6,) for 6 slots", "(rows, columns)"),
    "a broken grid": (good(grid=(1.5, 4)), "grid (1.5, 4) for 6 slots", "(rows, columns)"),
    "an empty grid": (good(grid=(0, 6)), "grid (0, 6) for 6 slots", "(rows, columns)"),
    "a word as grid": (good(grid="2x"), "grid 2x for 6 slots", "(rows, columns)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_breaks_the_contract_is_refused_at_the_door(name):
    given, said, expected = WRONG[name]
    with pytest.raises(EncoderError) as caught:
        check_features(given, toy(), "sound")
    sentence = str(caught.value)
    assert sentence.startswith("encoder ToyEncoder of source 'sound' gave ")
    assert said in sentence
    assert expected in sentence
    assert sentence.count("\n") == 0


def test_a_plane_encoder_must_give_its_grid():
    with pytest.raises(EncoderError, match=r"FlatEncoder of source 'eye' gave grid None for 6 slots; expected \(rows"):
        check_features(good(), toy(FlatEncoder), "eye")
    assert check_features(good(grid=[2, 3]), toy(FlatEncoder), "eye").grid == (2, 3)
    assert check_features(good(grid=(1, 5)), toy(FlatEncoder), "eye").grid == (1, 5), "one slot may stand before"


def test_a_mask_elsewhere_is_refused():
    given = Features(torch.zeros(B, S, F), torch.ones(B, S, dtype=torch.bool, device="meta"))
    with pytest.raises(EncoderError, match="a mask on meta; expected one on cpu"):
        check_features(given, toy(), "sound")


def test_states_that_did_not_stay_with_their_batch_are_refused():
    with pytest.raises(EncoderError, match="gave states on cpu; expected them on meta, where its batch was"):
        check_features(good(), toy(), "sound", torch.device("meta"))


class Attached(ToyEncoder):
    """Prepares with its own parameters, whose gradient cannot leave a data worker."""

    def prepare(self, raw):
        return {**super().prepare(raw), "numbers": self.linear.weight[:, 0]}


def test_what_cannot_leave_a_data_worker_is_refused():
    with pytest.raises(EncoderError, match="Attached of source 'x' gave 'numbers' with a gradient or on cpu in"):
        prepare(toy(Attached), "x", [1.0])
    for given, said in ((None, "gave None in prepare"), ({}, "gave nothing in prepare"), ([1], "gave list in prepare")):
        lazy = toy()
        lazy.prepare = lambda raw, given=given: given
        with pytest.raises(EncoderError, match=said):
            prepare(lazy, "x", [1.0])


def test_memory_that_has_run_out_is_not_the_encoders_fault():
    hungry = toy()
    hungry.forward = lambda batch: (_ for _ in ()).throw(torch.OutOfMemoryError("no room"))
    with pytest.raises(torch.OutOfMemoryError):
        encode(hungry, "x", {}, torch.device("cpu"))


def test_good_features_pass_untouched():
    given = good()
    passed = check_features(given, toy(), "sound")
    assert passed.states is given.states
    assert passed.mask is given.mask
    plain = check_features((given.states, given.mask, None), toy(), "sound")
    assert isinstance(plain, Features)


def test_the_door_stands_in_the_model():
    model = tiny_model({"numbers": f"{__name__}:OneRowEncoder"})
    batch = model.collate("numbers", [[1.0], [2.0]])
    with pytest.raises(EncoderError, match="source 'numbers' gave 1 rows of features for 2 inputs"):
        model.encode({"numbers": batch}, 2)


def test_an_encoder_without_a_width_is_named():
    with pytest.raises(EncoderError, match=r"WidthlessEncoder of model.sources.x sets no self.width"):
        build_encoder(SourceConfig(encoder=f"{__name__}:WidthlessEncoder"), toy_tokenizer(), "model.sources.x")


def test_the_bare_contract_says_what_to_define():
    bare = Encoder(Encoder.Options())
    with pytest.raises(EncoderError, match=r"Encoder has no prepare\(raw\); define it"):
        bare.prepare(1)
    with pytest.raises(EncoderError, match=r"Encoder has no forward\(batch\); define it"):
        bare({})
    assert bare.accepts("a.png") is False


def test_collate_stacks_what_is_alike_and_keeps_its_kind():
    items = [{"x": torch.full((2, 3), float(n)), "n": torch.tensor(n)} for n in range(3)]
    batch = toy().collate(items)
    assert batch["x"].shape == (3, 2, 3)
    assert batch["x"][:, 0, 0].tolist() == [0.0, 1.0, 2.0]
    assert batch["n"].tolist() == [0, 1, 2]
    assert batch["n"].dtype == torch.int64


def test_collate_pads_the_end_with_zeros_and_false():
    encoder = toy()
    batch = encoder.collate([encoder.prepare([1.0, 2.0, 3.0]), encoder.prepare([4.0])])
    assert batch["numbers"].tolist() == [[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]]
    assert batch["mask"].tolist() == [[True, True, True], [True, False, False]]
    assert batch["mask"].dtype == torch.bool


@pytest.mark.parametrize("shapes", [[(2, 3), (2, 4)], [(2,), (2, 2)], [(), (1,)]])
def test_collate_names_what_cannot_be_padded(shapes):
    with pytest.raises(EncoderError, match=re.escape("'x' of ") + ".*only first axes may differ"):
        toy().collate([{"x": torch.zeros(shape)} for shape in shapes])


def test_padding_changes_no_feature():
    encoder = toy().eval()
    together = encoder(encoder.collate([encoder.prepare([1.0, 2.0, 3.0]), encoder.prepare([4.0])]))
    alone = encoder(encoder.collate([encoder.prepare([4.0])]))
    assert torch.equal(together.states[1:, :1], alone.states)


def test_rows_that_do_not_match_are_an_error_not_a_broadcast():
    model = tiny_model()
    batch = model.collate("numbers", [[1.0], [2.0]])
    lost = SourceBatch({name: tensor[:1] for name, tensor in batch.inputs.items()}, batch.rows)
    with pytest.raises(EncoderError, match="source 'numbers' gave 1 rows of features for 2 inputs"):
        model.encode({"numbers": lost}, 2)
