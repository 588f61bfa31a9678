"""On a GPU: training takes the same course with every attention backend, and whichever layers are computed again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.corpus import prepare_small

from farspan.models import attention
from farspan.parallel.degrees import Degrees
from farspan.parallel.mesh import Mesh
from farspan.trainer.config_file import load_config
from farspan.trainer.metrics import MetricsFile
from farspan.trainer.preflight import check
from farspan.trainer.stop import StopRequest
from farspan.trainer.train import train_on

pytestmark = pytest.mark.gpu

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
STEPS, HEAD_DIM = 20, 64
OVERRIDES = [
    "launch.processes=1",
    "parallel.context=1",
    f"train.steps={STEPS}",
    "train.sequence_length=1024",
    "train.tokens_per_step=2048",
    "train.dtype=bf16",
    "eval.every=0",
    "eval.rows=2",
    f"model.head_dim={HEAD_DIM}",
    "optimizer.learning_rate=1e-3",
    "optimizer.warmup_steps=5",
    # With usual weights attention says so little in the first steps that twice its scale would not show.
    "model.initializer_std=0.15",
]
ACROSS = "attention.across_documents=true"  # one causal mask, which every library knows


@dataclass
class Runs:
    """Trains in folders of its own; the process group, the mesh and the text are the same for all runs."""

    mesh: Mesh
    folder: Path
    prepared: Path
    count: int = 0

    def losses(self, *overrides: str) -> tuple[list[float], list[str]]:
        """The loss of every step and at last that of held-out text; what the run reported."""
        self.count += 1
        directory = self.folder / str(self.count)
        directory.mkdir()
        folders = [f"run.dir={directory}", f"data.directory={self.prepared}"]
        config = load_config(QUICKSTART, [*OVERRIDES, *folders, *overrides])
        reports: list[str] = []
        train_on(self.mesh, config, check(config, 1), StopRequest(), True, reports.append)
        rows = MetricsFile(directory / "metrics.jsonl").read()
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        return [float(row["loss"]) for row in rows] + [float(rows[-1]["eval_loss"])], reports


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("training")
    device = torch.device("cuda", 0)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            environment.setenv(name, value)
        dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1, device_id=device)
        mesh = Mesh.create(Degrees(1, 1, 1), device)
        yield Runs(mesh, folder, prepare_small(folder))
        mesh.destroy()
        dist.destroy_process_group()


def worst(losses: list[float], others: list[float]) -> float:
    """Largest relative difference over all steps."""
    return max(abs(a - b) / abs(a) for a, b in zip(losses, others, strict=True))


@pytest.mark.parametrize(
    ("documents", "backends"),
    [(ACROSS, ["triton", "cudnn", "flash", "deterministic", "auto"]), ("", ["triton", "deterministic"])],
)
def test_every_backend_trains_like_the_reference(runs: Runs, documents: str, backends: list[str]) -> None:
    """Within bf16 noise: the distance of the reference in bf16 from the reference in fp32.

    That is an upper bound, for weights and all other layers are rounded there too, and only attention differs between
    backends. It is not too wide: attention whose scale is a tenth off leaves it by far.
    """
    common = [documents] if documents else []
    reference, _ = runs.losses("attention.backend=reference", *common)
    exact, _ = runs.losses("attention.backend=reference", "train.dtype=fp32", *common)
    noise = worst(reference, exact)
    wrong_scale = partial(attention.attention, scale=1.1 * HEAD_DIM**-0.5)
    with mock.patch.object(attention, "attention", wrong_scale):
        wrong, _ = runs.losses("attention.backend=reference", *common)
    found = {name: worst(reference, runs.losses(f"attention.backend={name}", *common)[0]) for name in backends}
    print(f"{documents or 'packed documents'}: noise {noise:.1e}, wrong scale {worst(reference, wrong):.1e}, {found}")
    assert reference[-2] < 0.8 * reference[0]
    assert worst(reference, wrong) > 2 * noise
    assert {name: difference for name, difference in found.items() if not difference <= noise} == {}


def test_layers_that_keep_everything_change_no_digit(runs: Runs) -> None:
    backend = "attention.backend=triton"
    plain, _ = runs.losses(backend, "memory.recompute=none")
    assert runs.losses(backend, "memory.recompute=selective", "memory.keep_layers=2")[0] == plain
    losses, reports = runs.losses(backend, "memory.recompute=selective", "memory.keep_layers=auto")
    assert losses == plain
    said = [line for line in reports if line.startswith("memory.keep_layers auto: ")]
    print(said)
    assert len(said) == 1
    assert "the last 4 of 4 layers keep everything" in said[0]
