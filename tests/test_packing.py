"""The layout of batches without padding, and attention on it, in fp32 on the CPU. Whole models are in test_models.py."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import actor
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from runner.models import attention
from runner.models.attention import _cudnn, _flash, _is_even, alibi_bias, attend
from runner.models.packing import among_real, lay_out, spread

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 1]])
IDS = torch.arange(15).view(3, 5)


def test_the_layout_of_rows_padded_anywhere():
    at = lay_out(IDS, MASK)
    assert at.ids.tolist() == [[2, 3, 4, 5, 6, 11, 12, 13, 14]]
    assert at.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert at.bounds.tolist() == [0, 3, 5, 9] and at.bounds.dtype == torch.int32
    assert (at.rows, at.longest) == (3, 4)
    assert at.slots.tolist() == [0, 1, 2, 4, 5, 8, 9, 10, 11]


@pytest.mark.parametrize("mask", [MASK, torch.ones_like(MASK)])
def test_rows_are_unpacked_to_the_left_and_packed_again(mask):
    at = lay_out(IDS, mask)
    x = torch.randn(int(mask.sum()), 2, 3)
    rows = at.unpack(x)
    assert rows.shape == (3, 2, at.longest, 3)
    for row, begin, end in zip(rows, at.bounds, at.bounds[1:], strict=False):
        assert torch.equal(row[:, : end - begin], x[begin:end].transpose(0, 1))
        assert row[:, end - begin :].eq(0).all()
    assert torch.equal(at.pack(rows), x)


def test_places_among_real_tokens_and_back():
    assert among_real(MASK, torch.tensor([2, 4, 6, 11])).tolist() == [0, 2, 4, 5]
    values = torch.arange(1.0, 10.0, requires_grad=True)
    table = spread(values, MASK)
    assert table.tolist() == [[0, 0, 1, 2, 3], [4, 5, 0, 0, 0], [0, 6, 7, 8, 9]]
    (gradient,) = torch.autograd.grad((table * IDS).sum(), values)
    assert gradient.tolist() == [2, 3, 4, 5, 6, 11, 12, 13, 14]


@pytest.mark.parametrize("heads", [4, 2])
def test_each_row_attends_to_itself(heads):
    """With a head of keys for each of the four of queries, and for two of them."""
    at = lay_out(IDS, MASK)
    query, key, value = (torch.randn(9, n, 8) for n in (4, heads, heads))
    found = attend(query, key, value, at, dropout=0.0, scale=0.3)
    for begin, end in ((0, 3), (3, 5), (5, 9)):
        alone = (x[begin:end].repeat_interleave(4 // x.size(1), dim=1).transpose(0, 1) for x in (query, key, value))
        expected = F.scaled_dot_product_attention(*alone, is_causal=True, scale=0.3).transpose(0, 1)
        torch.testing.assert_close(found[begin:end], expected)


@pytest.mark.parametrize("kernel", [_flash, _cudnn])
def test_the_operators_for_attention_take_what_they_are_given(kernel):
    """Shapes alone, forward and backward: torch calls them private, so that another version may have changed them."""
    at = lay_out(torch.zeros(3, 3, dtype=torch.long), torch.ones(3, 3, dtype=torch.long))
    at = replace(at, bounds=at.bounds.to("meta"))
    query, key, value = (torch.empty(9, n, 8, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (4, 2, 2))
    out = kernel(query, key, value, at, scale=0.3)
    out.sum().backward()
    assert (out.shape, out.dtype) == (query.shape, query.dtype)
    assert all(x.grad.shape == x.shape for x in (query, key, value))


@pytest.mark.parametrize(("lengths", "even"), [([128, 128], True), ([256], True), ([128, 127], False), ([100, 100], False), ([77], False)])
def test_rows_are_even_where_they_are_few_shapes(lengths, even):
    width = max(lengths)
    mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()
    assert _is_even(lay_out(mask, mask)) == even


@pytest.mark.parametrize("heads", [4, 6])  # 6 is no power of 2: two more slopes of another row
def test_alibi_is_that_of_transformers(heads):
    """Up to a number per query, which softmax does not see."""
    bias = alibi_bias(heads, 5, torch.float32, torch.device("cpu"))[0]
    expected = build_alibi_tensor(torch.ones(1, 5), heads, torch.float32).expand(heads, 5, 5)
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    assert bias.masked_select(future).eq(-torch.inf).all()
    torch.testing.assert_close(bias.softmax(-1), expected.masked_fill(future, -torch.inf).softmax(-1))


@pytest.mark.parametrize(("name", "change", "free"), [("opt", {}, True), ("bloom", {}, False), ("opt", {"attention_dropout": 0.1}, False)])
def test_a_micro_batch_costs_its_tokens_where_not_even_attention_pads(name, change, free, monkeypatch):
    """Elsewhere one long row among short ones would take the memory of as many long rows."""
    model = actor(name)
    for key, value in change.items():
        setattr(model.hf.config, key, value)
    assert not model.pads_nothing  # on a CPU
    monkeypatch.setattr(attention, "_has_flash", lambda device, dtype: True)
    assert model.pads_nothing == free
