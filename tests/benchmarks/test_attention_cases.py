from __future__ import annotations

import pytest
import torch
from attention_cases import MASKS, Answer, Case, answer
from attention_peers import Farspan, block_mask
from support.oracle import dense_attention

CPU = torch.device("cpu")


def _case(mask: str) -> Case:
    return Case.random(mask, 480, heads=4, kv_heads=2, head_dim=8, device=CPU)


@pytest.mark.parametrize("mask", MASKS)
def test_the_sampled_answer_is_the_dense_one(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_cases._SCORES", 2 * 480 * 100)  # several blocks of rows
    case = _case(mask)
    allowed = case.mask.visible(slice(0, 480), slice(0, 480))
    out, _, dq, dk, dv = dense_attention(case.q, case.k, case.v, allowed, case.dout)
    assert max(answer(case).errors(out, (dq, dk, dv)).values()) < 1e-12


def test_an_error_in_any_result_is_seen() -> None:
    case = _case("documents")
    right: Answer = answer(case)
    peer = Farspan(case, "reference")
    out, gradients = peer.forward(), peer.backward()
    assert 1e-4 < max(right.errors(out, gradients).values()) < 4e-3
    for place in range(3):
        wrong = [x * 1.1 if at == place else x for at, x in enumerate(gradients)]
        assert max(right.errors(out, (wrong[0], wrong[1], wrong[2])).values()) > 0.09


@pytest.mark.parametrize("mask", MASKS)
def test_flex_attention_gets_the_same_mask(mask: str) -> None:
    case = _case(mask)
    lists = block_mask(case.mask, case.mask_function, tile=32)
    row, key = torch.arange(480)[:, None], torch.arange(480)
    by_element = case.mask_function(torch.tensor(0), torch.tensor(0), row, key).expand(480, 480)
    seen = torch.zeros(480, 480, dtype=torch.bool)
    for counts, indices, whole in (
        (lists.full_kv_num_blocks, lists.full_kv_indices, True),
        (lists.kv_num_blocks, lists.kv_indices, False),
    ):
        for tile, count in enumerate(counts[0, 0].tolist()):
            for column in indices[0, 0, tile, :count].tolist():
                part = (slice(tile * 32, tile * 32 + 32), slice(column * 32, column * 32 + 32))
                seen[part] = True if whole else by_element[part]
    assert torch.equal(seen, case.mask.visible(slice(0, 480), slice(0, 480))[0])


def test_documents_fill_the_row() -> None:
    case = Case.random("documents", 32_768, heads=1, kv_heads=1, head_dim=2, device=CPU)
    sizes = case.mask.begin[0].unique_consecutive().diff()
    assert len(sizes) > 4
    assert int(sizes.min()) >= 256
