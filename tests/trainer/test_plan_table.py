from __future__ import annotations

from farspan.kernels import masks
from farspan.parallel import orders, plans
from farspan.parallel.verify import verify
from farspan.trainer.plan_table import by_rank


def _lines(name: str, world: int) -> list[str]:
    order, mask = orders.build(name, 64 * world, world, stripe=4), masks.causal(64 * world)
    found = verify(plans.ring(order, mask, (4, 2)), order, mask, head_dim=16)
    return list(by_rank(found, 2, 100))


def test_ranks_that_are_alike_share_a_line() -> None:
    lines = _lines("zigzag", 8)
    assert lines[0].split()[:3] == ["ranks", "work", "MB"]
    work = lines.index(next(line for line in lines if line.startswith("work forward")))
    assert lines[work + 1] == "0-7     98888888"


def test_a_contiguous_order_shows_its_triangle() -> None:
    lines = _lines("contiguous", 4)
    work = lines.index("work forward by stage, one column each: 9 is the most, . is none")
    assert lines[work + 1 : work + 5] == ["0       4...", "1       49..", "2       499.", "3       4999"]
    shares = [float(line.split()[1]) for line in lines[1:5]]
    assert shares == sorted(shares)
    assert sum(shares) == 4.0


def test_many_ranks_are_quantiles_and_the_worst() -> None:
    lines = _lines("contiguous", 65)
    assert len(lines) == 5
    assert lines[1].split()[:4] == ["work,", "of", "the", "mean"]
    assert lines[-1].startswith("rank 64 has the most work: 1.98")
    assert max(len(line) for line in lines) <= 100
