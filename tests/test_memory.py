"""Memory: select, scatter, cat, focus, save. Masked slots and the order of concatenated sources change no logit."""

import math
from dataclasses import replace

import pytest
import torch
from decoder_cases import HEADS, random_decoder, random_memory, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mmx.boxes import check_box
from mmx.errors import MmxError
from mmx.memory import Memory, Segment, cat

properties = settings(max_examples=50, deadline=None)
FINGERPRINT = "0123456789abcdef"


def with_fingerprint(memory, fingerprint=FINGERPRINT):
    """A memory as a model makes it."""
    return replace(memory, fingerprint=fingerprint)


def image_memory(rows=2, columns=3, prefix=0, batch=2, slots_before=()):
    """The memory of an image with a grid and `prefix` slots of the valid input, after sources without a grid."""
    before = [random_memory(batch, slots, source=f"text{i}") for i, slots in enumerate(slots_before)]
    return cat(*before, random_memory(batch, prefix + rows * columns, grid=(rows, columns)))


def test_sizes():
    memory = random_memory(batch=2, slots=5, layers=3, heads=4, width=8)
    assert (memory.batch_size, memory.num_slots) == (2, 5)
    assert memory.nbytes == 2 * 3 * 2 * 4 * 5 * 8 * 4
    assert memory.to(dtype=torch.bfloat16).nbytes == memory.nbytes // 2
    keys, values = memory.layer(2)
    assert torch.equal(keys, memory.keys[2])
    assert torch.equal(values, memory.values[2])
    shared = random_memory(layers=1)
    assert torch.equal(shared.layer(5)[0], shared.keys[0])


def test_repr_is_one_short_line():
    assert repr(random_memory(slots=100)) == (
        "Memory(image: 100 slots, batch 2, 2 layers, 2 heads x 8, float32, 51 kB)"
    )
    questions = random_memory(batch=6, slots=4, source="question", dtype=torch.float16).fold_streams(3)
    assert repr(questions) == "Memory(question: 12 slots, batch 2, 2 layers, 2 heads x 8, 3 streams, float16, 3 kB)"
    assert repr(Memory.empty(2, 1, HEADS, 8)) == "Memory(no slots, batch 1, 2 layers, 2 heads x 8, float32, 0 B)"


def test_to_changes_the_dtype_of_keys_and_values_only():
    memory = random_memory(masked=1)
    half = memory.to(dtype=torch.float16)
    assert half.keys.dtype == half.values.dtype == torch.float16
    assert half.mask.dtype == torch.bool
    assert half.layout == memory.layout
    assert torch.equal(memory.to("cpu").keys, memory.keys)
    assert memory.to().keys.dtype == torch.float32


@properties
@given(st.lists(st.integers(0, 3), min_size=0, max_size=6))
def test_select_returns_the_rows_in_order(rows):
    memory = random_memory(batch=4, masked=2).mask_out(torch.eye(4, 5).bool())
    selected = memory.select(rows)
    assert selected.batch_size == len(rows)
    for index, row in enumerate(rows):
        assert torch.equal(selected.keys[:, index], memory.keys[:, row])
        assert torch.equal(selected.values[:, index], memory.values[:, row])
        assert torch.equal(selected.mask[index], memory.mask[row])
    assert selected.layout == memory.layout
    assert torch.equal(memory.select(torch.tensor(rows, dtype=torch.long)).keys, selected.keys)


@properties
@given(st.permutations(range(6)), st.integers(1, 6))
def test_scatter_then_select_is_the_identity_and_other_rows_are_masked(order, count):
    rows = torch.tensor(order[:count])
    memory = random_memory(batch=count, masked=1)
    scattered = memory.scatter(rows, 6)
    back = scattered.select(rows)
    assert torch.equal(back.keys, memory.keys)
    assert torch.equal(back.values, memory.values)
    assert torch.equal(back.mask, memory.mask)
    others = [row for row in range(6) if row not in order[:count]]
    assert not scattered.mask[others].any()
    assert (scattered.keys[:, others] == 0).all()
    assert (scattered.values[:, others] == 0).all()


def test_fold_streams_concatenates_the_slots_of_the_streams():
    memory = random_memory(batch=6, slots=4, masked=1)
    folded = memory.fold_streams(3)
    assert folded.keys.shape == (2, 2, HEADS, 12, 8)
    for row in range(2):
        for k in range(3):
            slots = slice(k * 4, k * 4 + 4)
            assert torch.equal(folded.keys[:, row, :, slots], memory.keys[:, row * 3 + k])
            assert torch.equal(folded.values[:, row, :, slots], memory.values[:, row * 3 + k])
            assert torch.equal(folded.mask[row, slots], memory.mask[row * 3 + k])
    assert folded.layout == tuple(Segment("image", 4 * k, 4 * k + 4) for k in range(3))


def test_stream_mask_for_repeats_each_stream_for_its_beams():
    questions = random_memory(batch=2, slots=2, source="question").fold_streams(2)
    memory = cat(random_memory(batch=1, slots=1), questions)
    assert random_memory().stream_mask_for(4) is None
    assert memory.stream_mask_for(2).int().tolist() == [[[1, 1, 1, 0, 0], [1, 0, 0, 1, 1]]]
    beams = [[1, 1, 1, 0, 0]] * 2 + [[1, 0, 0, 1, 1]] * 2
    assert memory.stream_mask_for(4).int().tolist() == [beams]
    for streams in (3, 1):
        with pytest.raises(MmxError) as error:
            memory.stream_mask_for(streams)
        assert error.value.code == "memory.streams"
        assert error.value.details == {"streams": streams, "expected": 2}


@pytest.mark.parametrize("beams", [1, 2])
def test_folded_questions_give_the_logits_of_each_question_alone(beams):
    decoder, image = random_decoder(), random_memory(batch=2, slots=5)
    questions = random_memory(batch=6, slots=4, source="question")
    questions = questions.mask_out(torch.rand(6, 4) < 0.3)
    tokens = random_tokens(2, 3 * beams, 6)
    together = decoder(tokens, cat(image, questions.fold_streams(3)))
    for k in range(3):
        streams = slice(k * beams, (k + 1) * beams)
        alone = decoder(tokens[:, streams], cat(image, questions.select([k, 3 + k])))
        torch.testing.assert_close(together[:, streams], alone, atol=1e-5, rtol=0)
    another = decoder(tokens[:, :beams], cat(image, questions.select([1, 4])))
    assert (together[:, :beams] - another).abs().max() > 1e-2


@properties
@given(st.integers(0, 2**31), st.permutations(range(3)))
def test_the_order_of_concatenated_sources_changes_no_logit(seed, order):
    torch.manual_seed(seed)
    decoder, tokens = random_decoder(num_layers=1), random_tokens(2, 2, 4)
    parts = [random_memory(slots=n, layers=1, masked=n % 2, source=str(n)) for n in (1, 4, 7)]
    first, second = decoder(tokens, cat(*parts)), decoder(tokens, cat(*[parts[i] for i in order]))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


def test_cat_keeps_the_tensors_and_shifts_the_layout():
    image, text = image_memory(prefix=1), random_memory(slots=4, masked=1, source="text")
    together = cat(text, image)
    assert torch.equal(together.keys, torch.cat([text.keys, image.keys], 3))
    assert torch.equal(together.values, torch.cat([text.values, image.values], 3))
    assert torch.equal(together.mask, torch.cat([text.mask, image.mask], 1))
    assert together.layout == (Segment("text", 0, 4), Segment("image", 4, 11, (2, 3)))
    empty = Memory.empty(2, 2, HEADS, 8)
    assert torch.equal(cat(empty, text).keys, text.keys)
    assert torch.equal(cat(text).keys, text.keys)


@properties
@given(st.integers(0, 2**31), st.sampled_from([1.0, 1e4, 1e12]), st.integers(1, 64))
def test_a_masked_slot_changes_no_logit(seed, size, extra):
    torch.manual_seed(seed)
    decoder, tokens, memory = random_decoder(num_layers=1), random_tokens(2, 2, 4), random_memory(layers=1)
    junk = random_memory(slots=extra, layers=1, masked=extra, source="junk")
    junk = Memory(size * junk.keys, -size * junk.values, junk.mask, junk.layout)
    plain = decoder(tokens, memory)
    torch.testing.assert_close(decoder(tokens, cat(memory, junk)), plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(decoder(tokens, cat(junk, memory)), plain, atol=1e-5, rtol=0)


def test_mask_out_changes_the_mask_only():
    memory = random_memory(masked=2)
    hidden = memory.mask_out(torch.tensor([[True], [False]]))
    assert hidden.mask.int().tolist() == [[0] * 5, [1, 1, 1, 0, 0]]
    assert hidden.keys is memory.keys
    assert memory.mask[0].any(), "the memory itself is unchanged"


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
def test_focus_keeps_the_cells_that_overlap_the_box(box, cells, prefix):
    memory = image_memory(prefix=prefix, slots_before=(3,))
    focused = memory.focus(box)
    kept = [0, 1, 2] + [3 + prefix + cell for cell in cells]
    assert focused.mask[0].nonzero()[:, 0].tolist() == kept
    assert torch.equal(focused.mask[0], focused.mask[1])
    assert focused.layout == memory.layout


def test_focus_with_a_box_for_each_memory_never_unmasks():
    memory = image_memory().mask_out(torch.tensor([[True, False, False, False, False, False]]))
    focused = memory.focus([(0, 0, 0.5, 1), (0.7, 0, 1, 1)])
    assert focused.mask.int().tolist() == [[0, 1, 0, 1, 1, 0], [0, 0, 1, 0, 0, 1]]
    unlike = random_memory().focus((0, 0, 0.1, 0.1))
    assert unlike.mask.all(), "a source without a grid is kept"


@properties
@given(st.integers(1, 8), st.integers(1, 8), *[st.floats(0, 1, width=32)] * 4)
def test_focus_keeps_the_cells_that_overlap_any_random_box(rows, columns, a, b, c, d):
    (x0, x1), (y0, y1) = sorted((a, c)), sorted((b, d))
    # Edges closer to a line of the grid than single precision are either side of it.
    lines = [abs(x * columns - round(x * columns)) for x in (x0, x1)] + [
        abs(y * rows - round(y * rows)) for y in (y0, y1)
    ]
    if x1 - x0 < 1e-4 or y1 - y0 < 1e-4 or any(0 < gap < 1e-4 for gap in lines):
        return
    kept = image_memory(rows, columns, batch=1).focus((x0, y0, x1, y1)).mask[0].view(rows, columns)
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
def test_invalid_boxes_are_refused(box):
    with pytest.raises(MmxError) as error:
        image_memory().focus(box)
    assert error.value.code == "memory.box"
    assert repr(error.value.details["box"]) == repr(box)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_saved_memory_loads_identical(tmp_path, dtype):
    questions = random_memory(batch=4, slots=2, source="question").fold_streams(2)
    memory = cat(with_fingerprint(image_memory(prefix=1)), questions).to(dtype=dtype).focus((0, 0, 0.5, 0.5))
    memory.save(tmp_path / "memory.safetensors")
    loaded = Memory.load(tmp_path / "memory.safetensors")
    for part in ("keys", "values", "mask"):
        assert torch.equal(getattr(loaded, part), getattr(memory, part))
    assert loaded.keys.dtype == dtype
    assert loaded.layout == memory.layout
    assert loaded.fingerprint == FINGERPRINT
    assert isinstance(loaded.layout[0].grid, tuple)


def test_an_empty_memory_is_saved_and_loaded(tmp_path):
    memory = with_fingerprint(Memory.empty(2, 3, HEADS, 8, dtype=torch.float16))
    memory.save(str(tmp_path / "empty"))
    loaded = Memory.load(str(tmp_path / "empty"))
    assert (loaded.num_slots, loaded.batch_size, loaded.nbytes, loaded.layout) == (0, 3, 0, ())
    assert loaded.keys.dtype == torch.float16


def test_tensors_with_a_gradient_that_are_not_contiguous_can_be_saved(tmp_path):
    """Keys that still carry a gradient, and are no contiguous slots of memory."""
    keys = torch.randn(5, 2, 2, HEADS, 8, requires_grad=True).permute(1, 2, 3, 0, 4)
    memory = Memory(keys, keys * 2, torch.ones(2, 5, dtype=torch.bool), (Segment("image", 0, 5),))
    memory = with_fingerprint(memory)
    memory.save(tmp_path / "memory")
    assert torch.equal(Memory.load(tmp_path / "memory").values, keys * 2)


def foreign_files(folder):
    valid = random_memory()
    tensors = {"keys": valid.keys, "values": valid.values, "mask": valid.mask}
    (folder / "text").write_text("not a memory")
    (folder / "nothing").write_bytes(b"")
    save_file(tensors, folder / "no layout")
    save_file({"keys": valid.keys}, folder / "no values", metadata={"layout": "[]"})
    save_file(tensors, folder / "no json", metadata={"layout": "image"})
    save_file(tensors, folder / "a number", metadata={"layout": "5"})
    save_file(tensors, folder / "too short", metadata={"layout": '[["image", 0]]'})
    with_fingerprint(valid).save(folder / "valid")
    (folder / "torn").write_bytes((folder / "valid").read_bytes()[:-7])
    return ["text", "nothing", "no layout", "no values", "no json", "a number", "too short", "torn", "missing", "."]


def test_other_files_are_refused(tmp_path):
    for name in foreign_files(tmp_path):
        with pytest.raises(MmxError) as error:
            Memory.load(tmp_path / name)
        assert error.value.code == "memory.file"
        assert error.value.details == {"path": str(tmp_path / name)}
        assert "\n" not in str(error.value)


def test_the_fingerprint_follows_its_memory():
    memory = with_fingerprint(image_memory())
    derived = [
        memory.select([1]),
        memory.scatter(torch.tensor([2, 0]), 3),
        memory.fold_streams(2),
        memory.mask_out(torch.tensor([True] + [False] * 5)),
        memory.focus((0.0, 0.0, 0.5, 0.5)),
        memory.focus([[None, (0.0, 0.0, 0.5, 0.5)]] * 2),
        memory.to("cpu", torch.bfloat16),
        cat(memory),
        cat(memory, memory),
        cat(random_memory(), memory),
        cat(memory, random_memory()),
    ]
    assert [item.fingerprint for item in derived] == [FINGERPRINT] * len(derived)
    assert cat(random_memory(), random_memory()).fingerprint is None


def test_memories_of_different_models_are_not_concatenated():
    with pytest.raises(MmxError) as error:
        cat(with_fingerprint(random_memory()), random_memory(), with_fingerprint(random_memory(), "other"))
    assert error.value.code == "memory.other_model"
    assert error.value.details == {"fingerprint": "other", "expected": FINGERPRINT}


def test_a_saved_memory_always_has_a_fingerprint(tmp_path):
    memory = random_memory()
    with pytest.raises(MmxError) as error:
        memory.save(tmp_path / "memory")
    assert error.value.code == "memory.no_fingerprint"
    assert not (tmp_path / "memory").exists()
    tensors = {"keys": memory.keys, "values": memory.values, "mask": memory.mask}
    save_file(tensors, tmp_path / "older", metadata={"layout": '[["image", 0, 5, null]]'})
    with pytest.raises(MmxError) as error:
        Memory.load(tmp_path / "older")
    assert error.value.code == "memory.no_fingerprint"
    assert error.value.details == {"path": str(tmp_path / "older")}


def test_a_file_whose_layout_does_not_fit_is_refused(tmp_path):
    valid = random_memory()
    tensors = {"keys": valid.keys, "values": valid.values, "mask": valid.mask}
    save_file(tensors, tmp_path / "memory", metadata={"layout": '[["image", 0, 4, null]]', "fingerprint": "f"})
    with pytest.raises(MmxError) as error:
        Memory.load(tmp_path / "memory")
    assert error.value.code == "memory.layout"
    assert error.value.details == {"covered": 4, "expected": 5}


def test_tensors_and_layouts_that_do_not_fit_are_refused():
    keys, mask = torch.zeros(2, 3, HEADS, 6, 8), torch.ones(3, 6, dtype=torch.bool)
    valid = (Segment("image", 0, 6, (2, 3)),)
    refused = [
        ((keys[0], keys[0], mask, valid), "memory.shape"),
        ((keys, keys[:, :, :, :5], mask, valid), "memory.shape"),
        ((keys, keys, mask.float(), valid), "memory.mask"),
        ((keys, keys, mask[:2], valid), "memory.mask"),
        ((keys, keys, mask, ()), "memory.layout"),
        ((keys, keys, mask, (Segment("image", 0, 7),)), "memory.layout"),
        ((keys, keys, mask, (Segment("image", 0, 2), Segment("text", 3, 6))), "memory.layout"),
        ((keys, keys, mask, (Segment("image", 0, 6, (2, 4)),)), "memory.layout"),
        ((keys, keys, mask, (Segment("a", 0, 8), Segment("b", 8, 6))), "memory.layout"),
        ((keys, keys, mask, valid, mask[:, None].float()), "memory.stream_mask"),
        ((keys, keys, mask, valid, mask), "memory.stream_mask"),
        ((keys, keys, mask, valid, mask[:, None, :5]), "memory.stream_mask"),
    ]
    Memory(keys, keys, mask, valid, mask[:, None])
    for arguments, code in refused:
        with pytest.raises(MmxError) as error:
            Memory(*arguments)
        assert error.value.code == code


def test_cat_refuses_other_shapes():
    with pytest.raises(MmxError) as error:
        cat()
    assert error.value.code == "memory.cat"
    for other in (random_memory(batch=3), random_memory(layers=1), random_memory(heads=4), random_memory(width=4)):
        with pytest.raises(MmxError) as error:
            cat(random_memory(), other)
        assert error.value.code == "memory.cat"
        assert error.value.details["expected"] == [2, 2, HEADS, 8]
        assert error.value.details["shape"] != [2, 2, HEADS, 8]


def test_it_is_immutable():
    with pytest.raises(AttributeError):
        random_memory().mask = None


# ---- boxes of streams ------------------------------------------------------------------------------------------------


def test_a_box_for_each_stream_gives_the_logits_of_each_box_alone():
    decoder, memory, tokens = random_decoder(), random_memory(batch=2, slots=7, grid=(2, 3)), random_tokens(2, 3, 5)
    boxes = [[(0.0, 0.0, 0.3, 0.4), None, (0.5, 0.5, 1.0, 1.0)], [None, (0.0, 0.0, 1.0, 1.0), (0.7, 0.1, 0.8, 0.2)]]
    together = decoder(tokens, memory.focus(boxes))
    for b, row in enumerate(boxes):
        for k, box in enumerate(row):
            own = memory.select([b])
            own = own if box is None else own.focus(box)
            alone = decoder(tokens[b : b + 1, k : k + 1], own)
            torch.testing.assert_close(together[b, k], alone[0, 0], atol=1e-5, rtol=1e-5)


def test_stream_mask_of_boxes():
    memory = random_memory(batch=1, slots=5, grid=(2, 2)).focus([[None, (0.0, 0.0, 0.5, 0.5), (0.6, 0.0, 1.0, 1.0)]])
    assert memory.stream_mask.int().tolist() == [[[1, 1, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 1, 0, 1]]]
    narrower = memory.focus([[None, None, (0.0, 0.0, 1.0, 0.5)]])
    assert narrower.stream_mask.int().tolist() == [[[1, 1, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]]
    assert memory.mask.all(), "the mask holds the slots that exist, which boxes do not change"


def test_the_stream_mask_follows_its_memory(tmp_path):
    memory = random_memory(batch=3, slots=5, grid=(2, 2))
    memory = with_fingerprint(memory)
    memory = memory.focus([[None, (0.0, 0.0, 0.5, 0.5)], [(0.5, 0.5, 1.0, 1.0), None], [None, None]])
    assert torch.equal(memory.select([1, 0]).stream_mask, memory.stream_mask[[1, 0]])
    scattered = memory.scatter(torch.tensor([2, 0, 3]), 4)
    assert torch.equal(scattered.stream_mask[2], memory.stream_mask[0])
    assert not scattered.mask[1].any()
    memory.save(tmp_path / "memory")
    assert torch.equal(Memory.load(tmp_path / "memory").stream_mask, memory.stream_mask)
    together = cat(memory, random_memory(batch=3, slots=2, source="text"))
    assert together.stream_mask.shape == (3, 2, 7)
    assert together.stream_mask[:, :, 5:].all(), "boxes restrict sources with a grid only"


@pytest.mark.parametrize(
    "box", [[[(0, 0, 1)]], [[(0.5, 0.0, 0.1, 1.0)]], [[None], [None], [None]], ["a"], [[(0, 0, 2, 1)]], 3]
)
def test_invalid_boxes_of_streams_are_refused(box):
    with pytest.raises(MmxError) as error:
        random_memory(batch=2, slots=4, grid=(2, 2)).focus(box)
    assert error.value.code == "memory.box"


@pytest.mark.parametrize("box", [(0, 0, 1), [[0, 0, 1, 1], [0, 0, 1, 1]], (0.5, 0, 0.1, 1), "box", 3, [[None]]])
def test_check_box_refuses_everything_but_one_box(box):
    check_box(None)
    check_box([0, 0, 0.5, 1])
    with pytest.raises(MmxError) as error:
        check_box(box)
    assert error.value.code == "memory.box"


@pytest.mark.parametrize(
    "rows", [[2], [-1], [0, 5], "a", [0.5], [True], [True, False, True], [[0]], None, torch.tensor(0)]
)
def test_rows_to_select_are_checked(rows):
    with pytest.raises(MmxError) as error:
        random_memory(2).select(rows)
    assert error.value.code == "memory.rows"
    assert error.value.details["batch_size"] == 2


def test_a_memory_that_cannot_be_written_is_an_error(tmp_path):
    for path in (tmp_path / "missing" / "memory.safetensors", tmp_path):
        with pytest.raises(MmxError) as error:
            replace(random_memory(1), fingerprint="0123456789abcdef").save(path)
        assert error.value.code == "memory.save"
        assert error.value.details["path"] == str(path)


# ---- windows -----------------------------------------------------------------------------------------------------

PADDED = (0.0, -0.5, 1.0, 1.5)  # a wide image, half as high as the square around it
CROPPED = (0.25, 0.0, 0.75, 1.0)  # the center square of a wide image


def windowed(memory, *windows):
    """A memory whose grids cover these regions of the inputs, one for each memory."""
    return replace(memory, windows=torch.tensor(windows)[:, None].expand(-1, memory.num_slots, -1))


def rows_in_focus(memory):
    """For each memory, the rows and columns of its grid that may be attended."""
    grid = memory.mask[:, -16:].view(-1, 4, 4)
    return [(cells.any(1).nonzero()[:, 0].tolist(), cells.any(0).nonzero()[:, 0].tolist()) for cells in grid]


def test_focus_moves_the_box_to_the_window_of_each_memory():
    memory = windowed(image_memory(4, 4, prefix=1, batch=2, slots_before=(2,)), PADDED, CROPPED)
    lower_left = (0.0, 0.5, 0.5, 1.0)
    expected = [([2], [0, 1]), ([2, 3], [0, 1])]
    assert rows_in_focus(memory.focus(lower_left)) == expected
    assert rows_in_focus(memory.select([1, 0]).focus(lower_left)) == expected[::-1]
    assert rows_in_focus(memory.scatter(torch.tensor([2, 0]), 3).focus(lower_left))[::2] == expected[::-1]
    assert rows_in_focus(cat(random_memory(2, 3, source="text"), memory).focus(lower_left)) == expected
    of_streams = memory.focus([[lower_left, None], [None, lower_left]]).stream_mask
    assert torch.equal(of_streams[0, 0, 3:], memory.focus(lower_left).mask[0, 3:])
    assert torch.equal(of_streams[1, 1, 3:], memory.focus(lower_left).mask[1, 3:])
    assert of_streams[0, 1].all()


def test_a_box_beside_the_window_leaves_no_cell():
    memory = windowed(image_memory(4, 4, batch=1), CROPPED)
    assert not memory.focus((0.0, 0.0, 0.25, 1.0)).mask.any()
    assert rows_in_focus(memory.focus((0.0, 0.0, 0.3, 1.0))) == [([0, 1, 2, 3], [0])]


def test_windows_are_kept(tmp_path):
    memory = windowed(with_fingerprint(image_memory(4, 4, batch=2)), PADDED, CROPPED)
    memory.save(tmp_path / "memory")
    assert torch.equal(Memory.load(tmp_path / "memory").windows, memory.windows)
    folded = memory.fold_streams(2)
    assert torch.equal(folded.windows[0, 16:], memory.windows[1])
    half = memory.to(dtype=torch.float16)
    assert half.windows.dtype == torch.float32
    other = cat(memory, image_memory(2, 2, batch=2))
    assert other.windows[0, -1].tolist() == [0, 0, 1, 1]
    for wrong in (torch.zeros(2, 16, 2), torch.zeros(2, 15, 4), torch.zeros(2, 16, 4, dtype=torch.long)):
        with pytest.raises(MmxError) as error:
            replace(memory, windows=wrong)
        assert error.value.code == "memory.windows"
