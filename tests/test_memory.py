"""Memory: select, spread, join, focus, save. A masked slot and the order of the joined never change what is said."""

import math
import re

import pytest
import torch
from decoder_cases import HEADS, some_decoder, some_memory, some_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mmx.errors import MmxError
from mmx.memory import Memory, Segment, cat

properties = settings(max_examples=50, deadline=None)


def pictured(rows=2, columns=3, prefix=0, batch=2, slots_before=()):
    """A memory of one picture with a grid and `prefix` slots of the whole input, after plain sources of other sizes."""
    slots = prefix + rows * columns
    before = [some_memory(batch, n, source=f"text{i}") for i, n in enumerate(slots_before)]
    drawn = some_memory(batch, slots)
    picture = Memory(drawn.keys, drawn.values, drawn.mask, (Segment("image", 0, slots, (rows, columns)),))
    return cat(*before, picture)


def test_its_numbers():
    memory = some_memory(batch=2, slots=5, layers=3, heads=4, width=8)
    assert (memory.batch_size, memory.num_slots) == (2, 5)
    assert memory.nbytes == 2 * 3 * 2 * 4 * 5 * 8 * 4
    assert memory.to(dtype=torch.bfloat16).nbytes == memory.nbytes // 2
    keys, values = memory.layer(2)
    assert torch.equal(keys, memory.keys[2])
    assert torch.equal(values, memory.values[2])
    shared = some_memory(layers=1)
    assert torch.equal(shared.layer(5)[0], shared.keys[0])


def test_to_changes_the_numbers_type_alone():
    memory = some_memory(hidden=1)
    half = memory.to(dtype=torch.float16)
    assert half.keys.dtype == half.values.dtype == torch.float16
    assert half.mask.dtype == torch.bool
    assert half.layout == memory.layout
    assert torch.equal(memory.to("cpu").keys, memory.keys)
    assert memory.to().keys.dtype == torch.float32


@properties
@given(st.lists(st.integers(0, 3), min_size=0, max_size=6))
def test_select_takes_the_rows_in_the_order_asked(rows):
    memory = some_memory(batch=4, hidden=2).mask_out(torch.eye(4, 5).bool())
    picked = memory.select(rows)
    assert picked.batch == len(rows)
    for place, row in enumerate(rows):
        assert torch.equal(picked.keys[:, place], memory.keys[:, row])
        assert torch.equal(picked.values[:, place], memory.values[:, row])
        assert torch.equal(picked.mask[place], memory.mask[row])
    assert picked.layout == memory.layout
    assert torch.equal(memory.select(torch.tensor(rows, dtype=torch.long)).keys, picked.keys)


@properties
@given(st.permutations(range(6)), st.integers(1, 6))
def test_spread_then_select_is_the_same_and_the_others_see_nothing(order, count):
    rows = torch.tensor(order[:count])
    memory = some_memory(batch=count, hidden=1)
    spread = memory.scatter(rows, 6)
    back = spread.select(rows)
    assert torch.equal(back.keys, memory.keys)
    assert torch.equal(back.values, memory.values)
    assert torch.equal(back.mask, memory.mask)
    others = [row for row in range(6) if row not in order[:count]]
    assert not spread.mask[others].any()
    assert (spread.keys[:, others] == 0).all()
    assert (spread.values[:, others] == 0).all()


def test_by_stream_stands_the_texts_of_a_row_side_by_side():
    memory = some_memory(batch=6, slots=4, hidden=1)
    folded = memory.fold_streams(3)
    assert folded.keys.shape == (2, 2, HEADS, 12, 8)
    for row in range(2):
        for k in range(3):
            stretch = slice(k * 4, k * 4 + 4)
            assert torch.equal(folded.keys[:, row, :, stretch], memory.keys[:, row * 3 + k])
            assert torch.equal(folded.values[:, row, :, stretch], memory.values[:, row * 3 + k])
            assert torch.equal(folded.mask[row, stretch], memory.mask[row * 3 + k])
    assert folded.layout == tuple(Segment("image", 4 * k, 4 * k + 4) for k in range(3))


def test_seen_by_hand():
    questions = some_memory(batch=2, slots=2, source="question").fold_streams(2)
    memory = cat(some_memory(batch=1, slots=1), questions)
    assert some_memory().stream_mask_for(4) is None
    assert memory.stream_mask_for(2).int().tolist() == [[[1, 1, 1, 0, 0], [1, 0, 0, 1, 1]]]
    beams = [[1, 1, 1, 0, 0]] * 2 + [[1, 0, 0, 1, 1]] * 2
    assert memory.stream_mask_for(4).int().tolist() == [beams]
    with pytest.raises(MmxError, match="3 streams cannot share a memory of 2 questions; give a multiple of 2"):
        memory.stream_mask_for(3)
    with pytest.raises(MmxError, match="1 streams"):
        memory.stream_mask_for(1)


@pytest.mark.parametrize("beams", [1, 2])
def test_questions_as_sources_over_one_picture_are_as_each_alone(beams):
    decoder, picture = some_decoder(), some_memory(batch=2, slots=5)
    questions = some_memory(batch=6, slots=4, source="question")
    questions = questions.mask_out(torch.rand(6, 4) < 0.3)
    tokens = some_tokens(2, 3 * beams, 6)
    together = decoder(tokens, cat(picture, questions.fold_streams(3)))
    for k in range(3):
        streams = slice(k * beams, (k + 1) * beams)
        alone = decoder(tokens[:, streams], cat(picture, questions.select([k, 3 + k])))
        torch.testing.assert_close(together[:, streams], alone, atol=1e-5, rtol=0)
    another = decoder(tokens[:, :beams], cat(picture, questions.select([1, 4])))
    assert (together[:, :beams] - another).abs().max() > 1e-2


@properties
@given(st.integers(0, 2**31), st.permutations(range(3)))
def test_the_order_of_joined_sources_changes_no_logit(seed, order):
    torch.manual_seed(seed)
    decoder, tokens = some_decoder(layers=1), some_tokens(2, 2, 4)
    parts = [some_memory(slots=n, layers=1, hidden=n % 2, source=str(n)) for n in (1, 4, 7)]
    first, second = decoder(tokens, cat(*parts)), decoder(tokens, cat(*[parts[i] for i in order]))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


def test_join_keeps_the_numbers_and_moves_the_layout():
    image, text = pictured(prefix=1), some_memory(slots=4, hidden=1, source="text")
    joined = cat(text, image)
    assert torch.equal(joined.keys, torch.cat([text.keys, image.keys], 3))
    assert torch.equal(joined.values, torch.cat([text.values, image.values], 3))
    assert torch.equal(joined.mask, torch.cat([text.mask, image.mask], 1))
    assert joined.layout == (Segment("text", 0, 4), Segment("image", 4, 11, (2, 3)))
    empty = Memory.empty(2, 2, HEADS, 8)
    assert torch.equal(cat(empty, text).keys, text.keys)
    assert torch.equal(cat(text).keys, text.keys)


@properties
@given(st.integers(0, 2**31), st.sampled_from([1.0, 1e4, 1e12]), st.integers(1, 64))
def test_a_masked_slot_changes_no_logit(seed, size, extra):
    torch.manual_seed(seed)
    decoder, tokens, memory = some_decoder(layers=1), some_tokens(2, 2, 4), some_memory(layers=1)
    junk = some_memory(slots=extra, layers=1, hidden=extra, source="junk")
    junk = Memory(size * junk.keys, -size * junk.values, junk.mask, junk.layout)
    plain = decoder(tokens, memory)
    torch.testing.assert_close(decoder(tokens, cat(memory, junk)), plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(decoder(tokens, cat(junk, memory)), plain, atol=1e-5, rtol=0)


def test_hide_masks_and_only_masks():
    memory = some_memory(hidden=2)
    hidden = memory.mask_out(torch.tensor([[True], [False]]))
    assert hidden.mask.int().tolist() == [[0] * 5, [1, 1, 1, 0, 0]]
    assert hidden.keys is memory.keys
    assert memory.mask[0].any(), "the memory itself stays as it was"


# Boxes over a grid of 2 rows and 3 columns; cells are [0 1 2] above [3 4 5].
BOXES = [
    ((0, 0, 1, 1), [0, 1, 2, 3, 4, 5]),
    ((0, 0, 0.3, 0.4), [0]),
    ((0, 0, 1 / 3, 1 / 2), [0]),
    ((0.3, 0.4, 0.4, 0.6), [0, 1, 3, 4]),
    ((0.7, 0.6, 0.71, 0.61), [5]),
    ((1 / 3, 0, 2 / 3, 1), [1, 4]),
    ((0, 0.5, 1, 1), [3, 4, 5]),
    ((0.99, 0, 1, 0.01), [2]),
]


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(("box", "cells"), BOXES)
def test_focus_keeps_the_cells_that_touch_the_box(box, cells, prefix):
    memory = pictured(prefix=prefix, slots_before=(3,))
    narrowed = memory.focus(box)
    kept = [0, 1, 2] + [3 + prefix + cell for cell in cells]
    assert narrowed.mask[0].nonzero()[:, 0].tolist() == kept
    assert torch.equal(narrowed.mask[0], narrowed.mask[1])
    assert narrowed.layout == memory.layout


def test_focus_with_a_box_for_each_and_never_unmasks():
    memory = pictured().mask_out(torch.tensor([[True, False, False, False, False, False]]))
    narrowed = memory.focus([(0, 0, 0.5, 1), (0.7, 0, 1, 1)])
    assert narrowed.mask.int().tolist() == [[0, 1, 0, 1, 1, 0], [0, 0, 1, 0, 0, 1]]
    unlike = some_memory().focus((0, 0, 0.1, 0.1))
    assert unlike.mask.all(), "a source without a grid stays"


@properties
@given(st.integers(1, 8), st.integers(1, 8), *[st.floats(0, 1, width=32)] * 4)
def test_focus_equals_the_overlap_of_rectangles(rows, columns, a, b, c, d):
    (x0, x1), (y0, y1) = sorted((a, c)), sorted((b, d))
    # Edges closer to a line of the grid than single precision are either side of it.
    lines = [abs(x * columns - round(x * columns)) for x in (x0, x1)] + [
        abs(y * rows - round(y * rows)) for y in (y0, y1)
    ]
    if x1 - x0 < 1e-4 or y1 - y0 < 1e-4 or any(0 < gap < 1e-4 for gap in lines):
        return
    kept = pictured(rows, columns, batch=1).focus((x0, y0, x1, y1)).mask[0].view(rows, columns)
    for row in range(rows):
        for column in range(columns):
            wide = min(x1, (column + 1) / columns) - max(x0, column / columns)
            high = min(y1, (row + 1) / rows) - max(y0, row / rows)
            assert bool(kept[row, column]) == (wide > 1e-6 and high > 1e-6)


@pytest.mark.parametrize(
    "box",
    [
        (0.5, 0, 0.5, 1),
        (0.6, 0, 0.5, 1),
        (0, 0.6, 1, 0.5),
        (-0.1, 0, 1, 1),
        (0, 0, 1, 1.1),
        (0, 0, 640, 480),
        (math.nan, 0, 1, 1),
        (0, 0, 1),
        (0, 0, 1, 1, 1),
        [(0, 0, 1, 1)] * 3,
        [(0, 0, 1, 1), (0, 0, 0, 1)],
        [(0, 0, 1), (0, 0, 1)],
    ],
)
def test_bad_boxes_are_refused_with_what_is_expected(box):
    with pytest.raises(MmxError, match=r"is no region; expected x0,y0,x1,y1 in 0..1 with x0 < x1 and y0 < y1"):
        pictured().focus(box)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_saved_is_loaded_bit_by_bit(tmp_path, dtype):
    questions = some_memory(batch=4, slots=2, source="question").fold_streams(2)
    memory = cat(pictured(prefix=1), questions).to(dtype=dtype).focus((0, 0, 0.5, 0.5))
    memory.save(tmp_path / "memory.safetensors")
    loaded = Memory.load(tmp_path / "memory.safetensors")
    for part in ("keys", "values", "mask"):
        assert torch.equal(getattr(loaded, part), getattr(memory, part))
    assert loaded.keys.dtype == dtype
    assert loaded.layout == memory.layout
    assert isinstance(loaded.layout[0].grid, tuple)


def test_an_empty_memory_is_saved_and_loaded(tmp_path):
    memory = Memory.empty(2, 3, HEADS, 8, dtype=torch.float16)
    memory.save(str(tmp_path / "empty"))
    loaded = Memory.load(str(tmp_path / "empty"))
    assert (loaded.num_slots, loaded.batch_size, loaded.nbytes, loaded.layout) == (0, 3, 0, ())
    assert loaded.keys.dtype == torch.float16


def test_what_an_encoder_just_made_can_be_saved(tmp_path):
    """Keys that still carry a gradient, and are no contiguous stretch of memory."""
    keys = torch.randn(5, 2, 2, HEADS, 8, requires_grad=True).permute(1, 2, 3, 0, 4)
    memory = Memory(keys, keys * 2, torch.ones(2, 5, dtype=torch.bool), (Segment("image", 0, 5),))
    memory.save(tmp_path / "memory")
    assert torch.equal(Memory.load(tmp_path / "memory").values, keys * 2)


def foreign_files(folder):
    whole = some_memory()
    tensors = {"keys": whole.keys, "values": whole.values, "mask": whole.mask}
    (folder / "text").write_text("not a memory")
    (folder / "nothing").write_bytes(b"")
    save_file(tensors, folder / "no layout")
    save_file({"keys": whole.keys}, folder / "no values", metadata={"layout": "[]"})
    save_file(tensors, folder / "no json", metadata={"layout": "image"})
    save_file(tensors, folder / "a number", metadata={"layout": "5"})
    save_file(tensors, folder / "too short", metadata={"layout": '[["image", 0]]'})
    whole.save(folder / "whole")
    (folder / "torn").write_bytes((folder / "whole").read_bytes()[:-7])
    return ["text", "nothing", "no layout", "no values", "no json", "a number", "too short", "torn", "missing", "."]


def test_a_foreign_file_is_refused_in_one_sentence(tmp_path):
    for name in foreign_files(tmp_path):
        with pytest.raises(MmxError, match=r"is not a saved memory; expected a file written by Memory.save\.$"):
            Memory.load(tmp_path / name)


def test_a_file_whose_parts_do_not_fit_is_refused(tmp_path):
    whole = some_memory()
    tensors = {"keys": whole.keys, "values": whole.values, "mask": whole.mask}
    save_file(tensors, tmp_path / "memory", metadata={"layout": '[["image", 0, 4, null]]'})
    with pytest.raises(MmxError, match="the layout covers 4 of 5 slots"):
        Memory.load(tmp_path / "memory")


def test_check_names_the_part_that_does_not_fit():
    keys, mask = torch.zeros(2, 3, HEADS, 6, 8), torch.ones(3, 6, dtype=torch.bool)
    whole = (Segment("image", 0, 6, (2, 3)),)
    refusals = [
        (
            (keys[0], keys[0], mask, whole),
            "keys [3, 2, 6, 8] and values [3, 2, 6, 8] are no memory; both must be [L, B",
        ),
        ((keys, keys[:, :, :, :5], mask, whole), "values [2, 3, 2, 5, 8] are no memory"),
        (
            (keys, keys, mask.float(), whole),
            "the mask is torch.float32 [3, 6]; expected bool [B, S] = [3, 6], True = may",
        ),
        ((keys, keys, mask[:2], whole), "the mask is torch.bool [2, 6]"),
        ((keys, keys, mask, ()), "the layout covers 0 of 6 slots; every slot belongs to one source"),
        ((keys, keys, mask, (Segment("image", 0, 7),)), "the layout covers 7 of 6 slots"),
        ((keys, keys, mask, (Segment("image", 0, 2), Segment("text", 3, 6))), "source='text', start=3"),
        ((keys, keys, mask, (Segment("image", 0, 6, (2, 4)),)), "or is shorter than its grid"),
        ((keys, keys, mask, (Segment("a", 0, 8), Segment("b", 8, 6))), "source='b', start=8"),
    ]
    Memory(keys, keys, mask, whole)
    for parts, sentence in refusals:
        with pytest.raises(MmxError, match=re.escape(sentence)):
            Memory(*parts)


def test_join_refuses_what_does_not_fit_together():
    with pytest.raises(MmxError, match="join was given no memory"):
        cat()
    for other in (some_memory(batch=3), some_memory(layers=1), some_memory(heads=4), some_memory(width=4)):
        with pytest.raises(MmxError, match=re.escape("memories of [L, B, H, D] [2, 2, 2, 8] and")):
            cat(some_memory(), other)


def test_it_cannot_be_changed_by_mistake():
    with pytest.raises(AttributeError):
        some_memory().mask = None


# ---- pointing --------------------------------------------------------------------------------------------------------


def test_each_stream_points_at_its_own_box_as_if_it_were_alone():
    decoder, memory, tokens = some_decoder(), some_memory(batch=2, slots=7, grid=(2, 3)), some_tokens(2, 3, 5)
    boxes = [[(0.0, 0.0, 0.3, 0.4), None, (0.5, 0.5, 1.0, 1.0)], [None, (0.0, 0.0, 1.0, 1.0), (0.7, 0.1, 0.8, 0.2)]]
    together = decoder(tokens, memory.focus(boxes))
    for b, row in enumerate(boxes):
        for k, box in enumerate(row):
            own = memory.select([b])
            own = own if box is None else own.focus(box)
            alone = decoder(tokens[b : b + 1, k : k + 1], own)
            torch.testing.assert_close(together[b, k], alone[0, 0], atol=1e-5, rtol=1e-5)


def test_boxes_of_streams_by_hand():
    memory = some_memory(batch=1, slots=5, grid=(2, 2)).focus([[None, (0.0, 0.0, 0.5, 0.5), (0.6, 0.0, 1.0, 1.0)]])
    assert memory.stream_mask.int().tolist() == [[[1, 1, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 1, 0, 1]]]
    again = memory.focus([[None, None, (0.0, 0.0, 1.0, 0.5)]])
    assert again.stream_mask.int().tolist() == [[[1, 1, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]]
    assert memory.mask.all(), "the mask says what exists, which pointing does not change"


def test_what_is_shown_stays_with_its_memory(tmp_path):
    memory = some_memory(batch=3, slots=5, grid=(2, 2))
    memory = memory.focus([[None, (0.0, 0.0, 0.5, 0.5)], [(0.5, 0.5, 1.0, 1.0), None], [None, None]])
    assert torch.equal(memory.select([1, 0]).stream_mask, memory.stream_mask[[1, 0]])
    spread = memory.scatter(torch.tensor([2, 0, 3]), 4)
    assert torch.equal(spread.stream_mask[2], memory.stream_mask[0])
    assert not spread.mask[1].any()
    memory.save(tmp_path / "memory")
    assert torch.equal(Memory.load(tmp_path / "memory").stream_mask, memory.stream_mask)
    joined = cat(memory, some_memory(batch=3, slots=2, source="text"))
    assert joined.stream_mask.shape == (3, 2, 7)
    assert joined.stream_mask[:, :, 5:].all(), "what points at the picture hides nothing of a text"
    with pytest.raises(MmxError, match=re.escape("what is shown is torch.float32 [3, 2, 5]; expected bool [B, K, S]")):
        Memory(memory.keys, memory.values, memory.mask, memory.layout, memory.stream_mask.float())


@pytest.mark.parametrize(
    "box", [[[(0, 0, 1)]], [[(0.5, 0.0, 0.1, 1.0)]], [[None], [None], [None]], ["a"], [[(0, 0, 2, 1)]], 3]
)
def test_a_box_of_a_stream_that_is_no_region_is_refused(box):
    with pytest.raises(MmxError, match="is no region; expected x0,y0,x1,y1 in 0..1"):
        some_memory(batch=2, slots=4, grid=(2, 2)).focus(box)
