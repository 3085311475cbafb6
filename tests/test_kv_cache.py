"""Keys and values that grow in place: as transformers' own, without a copy at each step."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_llm_families import make
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from blspkd_fairseq import compat
from blspkd_fairseq.generation.kv_cache import GrowingLayer, cut_to, give_room, has_plain_layers, keep_rows, take_row


def states(columns: int, rows: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 2, columns, 4), torch.randn(rows, 2, columns, 6)


def test_it_holds_what_a_dynamic_layer_holds() -> None:
    torch.manual_seed(0)
    growing, plain = GrowingLayer(), DynamicLayer()
    earlier = []
    for columns in (5, *[1] * 150, 3):
        new = states(columns)
        earlier.append([one.clone() for one in plain.update(*new)])
        held = growing.update(*new)
        assert all(torch.equal(a, b) for a, b in zip(held, earlier[-1], strict=True))
    assert growing.get_seq_length() == plain.get_seq_length() == 158
    changes = {"reorder_cache": torch.tensor([2, 0, 0]), "batch_select_indices": torch.tensor([2, 0]), "crop": -2}
    for change, argument in changes.items():  # beam search and the like
        for layer in (growing, plain):
            getattr(layer, change)(argument)
        new = states(1, len(plain.keys))
        for a, b in zip(growing.update(*new), plain.update(*new), strict=True):
            assert torch.equal(a, b)


def test_a_step_writes_its_column_alone() -> None:
    layer = GrowingLayer()
    layer.update(*states(5))
    keys, values = layer.keys, layer.values
    places = set()
    for _ in range(130):
        layer.update(*states(1))
        places.add((layer.keys.data_ptr(), layer.values.data_ptr()))
    assert len(places) == 3  # of 130 steps two found no room
    assert keys.shape[2] == values.shape[2] == 5 and torch.equal(layer.keys[:, :, :5], keys)


def test_who_goes_on_from_the_same_columns_does_not_write_into_anothers() -> None:
    whole = Cache(layers=[GrowingLayer()])
    whole.update(*states(6), 0)
    parts = [take_row(whole, 1, 6), cut_to(whole, 4), keep_rows(whole, [0, 2], 5)]
    before = [part.layers[0].keys.clone() for part in parts]
    whole.update(*states(1), 0)
    for part in parts:
        part.update(*states(1, len(part.layers[0].keys)), 0)
    for part, keys in zip(parts, before, strict=True):
        assert torch.equal(part.layers[0].keys[:, :, :-1], keys)
    assert whole.layers[0].keys.shape[2] == 7


@pytest.mark.parametrize("kind", ["llama", "mistral", "jamba"])
def test_layers_of_full_attention_get_room(kind: str) -> None:
    llm = make(kind)
    ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = llm(input_ids=ids).logits[:, -1]
        cache = give_room(compat.cache_of(llm(input_ids=ids[:, :4], use_cache=True)))
        for column in (4, 5):
            output = llm(input_ids=ids[:, column : column + 1], use_cache=True, **compat.cache_argument(cache))
    torch.testing.assert_close(output.logits[:, -1], expected)
    kinds = {type(layer) for layer in cache.layers}
    assert DynamicLayer not in kinds and has_plain_layers(cache) == (kind != "jamba")
    assert (GrowingLayer in kinds) == (kind != "mistral")


@pytest.mark.parametrize("masked", [True, False])
def test_decoding_on_a_cpu_makes_no_float32_copy_of_keys(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    llm = make("llama").to(torch.bfloat16)
    compat.use_fast_cpu_attention(llm)
    seen: list[torch.dtype] = []
    attend = F.scaled_dot_product_attention

    def noting(query: Tensor, key: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(key.dtype)
        return attend(query, key, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    ids = torch.randint(3, 50, (2, 6))
    valid = torch.ones(2, 6, dtype=torch.long)
    valid[0, :2] = int(not masked)
    with torch.no_grad():
        cache = compat.cache_of(llm(input_ids=ids[:, :5], attention_mask=valid[:, :5], use_cache=True))
        assert set(seen) == {torch.float32}  # all queries at once: nothing is saved
        seen.clear()
        output = llm(input_ids=ids[:, 5:], attention_mask=valid, **compat.cache_argument(cache)).logits[:, -1]
        assert set(seen) == {torch.bfloat16}
        whole = llm(input_ids=ids, attention_mask=valid, position_ids=(valid.cumsum(1) - 1).clamp(min=0)).logits[:, -1]
    torch.testing.assert_close(output, whole, atol=0.05, rtol=0.05)
