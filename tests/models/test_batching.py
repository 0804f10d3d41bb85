"""Padding of texts and boxes by hand."""

import torch

from mmx.models.batching import IGNORE_INDEX, pad_texts, select_label_positions, stack_boxes


def test_pad_texts_by_hand():
    texts = [[([1, 2], [5, 6, 9]), ([3], [9])], [([4], [7, 9])]]
    tokens, mask, targets = pad_texts(texts, 2, pad_token=0)
    assert tokens.tolist() == [[[1, 2, 5, 6], [3, 0, 0, 0]], [[4, 7, 0, 0], [0, 0, 0, 0]]]
    assert mask.long().tolist() == [[[1, 1, 1, 1], [1, 0, 0, 0]], [[1, 1, 0, 0], [0, 0, 0, 0]]]
    n = IGNORE_INDEX
    assert targets.tolist() == [[[n, 5, 6, 9], [9, n, n, n]], [[7, 9, n, n], [n, n, n, n]]]
    assert [tensor.shape for tensor in pad_texts(texts, 3, 0, multiple=8)] == [(2, 3, 8)] * 3


def test_select_label_positions_by_hand():
    targets = torch.tensor([[[IGNORE_INDEX, 5], [6, IGNORE_INDEX]]])
    positions, labels = select_label_positions(targets, 1)
    assert (positions.tolist(), labels.tolist()) == ([1, 2], [5, 6])
    positions, labels = select_label_positions(targets, 4)
    assert (positions.tolist(), labels.tolist()) == ([1, 2, 0, 0], [5, 6, IGNORE_INDEX, IGNORE_INDEX])


def test_stack_boxes_fills_missing_boxes_with_nan():
    box = (0.0, 0.0, 0.5, 1.0)
    stacked = stack_boxes([[None, box], [None]], streams=3)
    assert stacked.shape == (2, 3, 4)
    assert stacked[0, 1].tolist() == list(box)
    assert stacked.isnan().all(-1).tolist() == [[True, False, True], [True, True, True]]
    assert stack_boxes([[None], []], streams=2) is None
