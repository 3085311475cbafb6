"""Packed attention against the formula, row by row in float64, on the CPU and on a GPU if there is one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from blspkd_fairseq.data.batch import Rows
from blspkd_fairseq.modules import attention
from blspkd_fairseq.modules.attention import attend, attend_stacked

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LENGTHS = (3, 7, 1, 5)


def rows_of(prefix: int, causal: bool, shuffled: bool, device: str) -> Rows:
    total = prefix + sum(LENGTHS)
    order = torch.randperm(total) if shuffled else None
    place = None if order is None else order.argsort()
    parts = (None if one is None else one.to(device) for one in (order, place))
    return Rows(torch.tensor(LENGTHS, device=device), LENGTHS, prefix, *parts, causal=causal)


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Rows,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Every position by itself."""
    total, heads = query.shape[:2]
    order = range(total) if rows.order is None else rows.order.tolist()
    starts = [rows.prefix + sum(LENGTHS[:r]) for r in range(len(LENGTHS))]
    out = torch.zeros(total, heads, value.shape[2], dtype=value.dtype)
    for i, place in enumerate(order):
        row = next((r for r, s in enumerate(starts) if s <= i < s + LENGTHS[r]), None)
        seen = list(range(rows.prefix)) + ([] if row is None else list(range(starts[row], starts[row] + LENGTHS[row])))
        if rows.causal:
            seen = seen[: seen.index(i) + 1]
        if window is not None:
            seen = seen[-window:]
        for h in range(heads):
            group = h * key.shape[1] // heads
            keys = torch.stack([key[order[j], group] for j in seen])
            logits = keys @ query[place, h] * (query.shape[2] ** -0.5 if scale is None else scale)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            weights = torch.cat([logits, logits.new_empty(0) if sinks is None else sinks[h : h + 1]]).softmax(0)
            out[place, h] = weights[: len(seen)] @ torch.stack([value[order[j], group] for j in seen])
    return out


CASES: dict[str, tuple[int, bool, bool, dict[str, Any]]] = {
    "rows": (0, True, False, {}),
    "both ways": (0, False, False, {}),
    "prefix": (4, True, False, {}),
    "prefix, shuffled": (4, True, True, {}),
    "long prefix, shuffled": (9, True, True, {"scale": 0.7}),
    "window": (4, True, True, {"window": 3}),
    "window as long as the prefix": (4, True, True, {"window": 4}),
    "window without prefix": (0, True, False, {"window": 2}),
    "soft cap": (4, True, True, {"softcap": 1.5}),
    "sinks": (4, True, True, {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)}),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("is_short", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula_with_its_gradients(
    case: str, is_short: bool, groups: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MOST_KEYS", 128 if is_short else 0)
    prefix, causal, shuffled, options = CASES[case]
    rows = rows_of(prefix, causal, shuffled, device)
    shapes = [(rows.total, heads, 16) for heads in (4, 4 // groups, 4 // groups)]
    inputs = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    seed = torch.randn(rows.total, 4, 16, dtype=torch.float64)
    exact = [one.double().requires_grad_() for one in inputs]
    expected = formula(*exact, rows, **options)
    (expected * seed).sum().backward()

    given = [one.detach().to(device, copy=True).requires_grad_() for one in inputs]
    moved = {name: v.to(device, dtype) if isinstance(v, Tensor) else v for name, v in options.items()}
    actual = attend(*given, rows, **moved)
    assert actual.dtype == dtype
    (actual * seed.to(device, dtype)).sum().backward()
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 6e-2}[dtype]
    torch.testing.assert_close(actual.cpu().double(), expected, atol=tolerance, rtol=tolerance)
    for one, other in zip(given, exact, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad.cpu().double(), other.grad, atol=2 * tolerance, rtol=2 * tolerance)


@pytest.mark.parametrize("is_short", [True, False])
@pytest.mark.parametrize("case", ["rows", "both ways", "long prefix, shuffled", "window"])
def test_side_by_side(case: str, is_short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MOST_KEYS", 128 if is_short else 0)
    prefix, causal, shuffled, options = CASES[case]
    rows = rows_of(prefix, causal, shuffled, "cpu")
    stacked = torch.randn(rows.total, 8, 16, dtype=torch.float64, requires_grad=True)
    parts = [one.detach().clone().requires_grad_() for one in stacked.split((4, 2, 2), 1)]
    seed = torch.randn(rows.total, 4, 16, dtype=torch.float64)
    expected, actual = attend(*parts, rows, **options), attend_stacked(stacked, 4, rows, **options)
    torch.testing.assert_close(actual, expected)
    for out in (expected, actual):
        (out * seed).sum().backward()
    torch.testing.assert_close(stacked.grad, torch.cat([one.grad for one in parts if one.grad is not None], 1))


@pytest.mark.parametrize("case", ["rows", "both ways", "prefix, shuffled"])
def test_dropout_and_its_gradient(case: str) -> None:
    prefix, causal, shuffled, _ = CASES[case]
    rows = rows_of(prefix, causal, shuffled, "cpu")
    stacked = torch.randn(rows.total, 6, 4, dtype=torch.float64, requires_grad=True)

    def attended(one: Tensor, dropout: float = 0.4) -> Tensor:
        torch.manual_seed(0)
        return attend_stacked(one, 2, rows, dropout=dropout)

    assert torch.autograd.gradcheck(attended, (stacked,))
    with torch.no_grad():
        torch.manual_seed(0)
        many = [attend_stacked(stacked, 2, rows, dropout=0.4) for _ in range(2000)]
    torch.testing.assert_close(torch.stack(many).mean(0), attended(stacked, 0.0).detach(), atol=0.15, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("is_short", [True, False])
@pytest.mark.parametrize("case", ["rows", "both ways"])
def test_autocast_around_it(
    case: str, is_short: bool, dropout: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MOST_KEYS", 128 if is_short else 0)
    prefix, causal, shuffled, _ = CASES[case]
    rows = rows_of(prefix, causal, shuffled, "cpu")
    found = []
    for is_on in (False, True):
        torch.manual_seed(0)
        stacked = torch.randn(rows.total, 6, 8, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            out = attend_stacked(stacked, 2, rows, dropout=dropout)
        out.float().square().sum().backward()
        found.append((out.float(), stacked.grad))
    torch.testing.assert_close(found[1], found[0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("generation", "width", "dropout", "has"),
    [
        ((8, 0), 64, 0.1, True),
        ((9, 0), 256, 0.1, True),
        ((7, 5), 64, 0.0, False),  # T4: no kernel at all
        ((8, 0), 36, 0.0, False),
        ((8, 0), 320, 0.0, False),
        ((8, 9), 256, 0.0, True),  # Gemma on a 4090
        ((8, 9), 256, 0.1, False),
        ((8, 6), 208, 0.0, False),
    ],
)
def test_flash_only_where_the_card_has_it(
    generation: tuple[int, int], width: int, dropout: float, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: generation)
    attention._has_flash.cache_clear()
    query = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(9, 4, width), device=torch.device("cuda:0"))
    options = attention._Options(None, None, None, None, dropout)
    assert attention._is_for_flash(query, options) is has  # type: ignore[arg-type]
    attention._has_flash.cache_clear()
