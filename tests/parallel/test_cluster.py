"""The presets and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from farspan.parallel.cluster import load_cluster


def test_clusters_are_presets_or_files(tmp_path: Path) -> None:
    cluster = load_cluster("h200")
    network = cluster.network(tensor=2)
    assert network.ranks_per_node == 4
    # What was measured between two H200s: 194 GB/s for 16 MiB and 357 GB/s for 1 GiB.
    for size, measured in ((2**24, 194e9), (2**30, 357e9)):
        seconds = size / network.inner.bytes_per_second + network.inner.latency
        assert size / seconds == pytest.approx(measured, rel=0.01)
    mine = tmp_path / "mine.yaml"
    mine.write_text("gpu: X\n")
    with pytest.raises(ValueError, match=r"mine\.yaml: compute_capability: Field required; gpus_per_node"):
        load_cluster(str(mine))
    with pytest.raises(ValueError, match="there is no cluster 'h20'; did you mean 'h200'"):
        load_cluster("h20")
    with pytest.raises(ValueError, match="which cannot be read: No such file"):
        load_cluster(str(tmp_path / "none.yaml"))
    assert replace(network, ranks_per_node=1) == cluster.network(tensor=16)
