"""A run goes on from its checkpoint on another number of ranks, as if nothing had happened."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.corpus import prepare_small
from support.pool import Pool
from support.training import small_model, train_runs

from farspan.trainer.checkpoint.reshard import SavedShards, parameter_groups
from farspan.trainer.checkpoint.shards import Shards
from farspan.trainer.config import RunConfig

pytestmark = pytest.mark.distributed

STEPS, HALF = 6, 3


def config_of(directory: Path, prepared: Path, **changes: Any) -> RunConfig:
    """With parameters of odd sizes, which ranks cannot share evenly."""
    tree: dict[str, Any] = {
        "run": {"dir": str(directory), "seed": 5},
        "model": {**small_model(2), "hidden_size": 33, "qkv_bias": True, "tied_embeddings": True},
        "data": {"sources": ["unused"], "directory": str(prepared)},
        "train": {"steps": STEPS, "sequence_length": 48, "tokens_per_step": 192, "dtype": changes.pop("dtype", "fp32")},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "checkpoint": {"every": HALF},
        "eval": {"rows": 2},
        "deepspeed": changes.pop("deepspeed", {}),
    }
    return RunConfig.model_validate(tree | {"parallel": changes})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small(tmp_path_factory.mktemp("corpus"))


def alike(pool: Pool, config: RunConfig) -> Pool:
    """DeepSpeed counts the modules of a process, and training at ZeRO 3 wants all ranks to have counted as many."""
    if config.parallel.zero_stage == 3:
        pool.close()
    return pool


def train_and_count(rank: int, world: int, config: RunConfig) -> tuple[list[dict[str, Any]], dict[int, set[int]]]:
    """The rows of metrics.jsonl, on rank 0, and which samples this rank took in which step."""
    from farspan.trainer.feed import Feed

    taken: dict[int, set[int]] = {}
    original = Feed.training_batches

    def counted(feed: Feed, step: int) -> Any:
        batches = original(feed, step)
        taken.setdefault(step, set()).update(sample for batch in batches for sample in batch.samples)
        return batches

    with patch.object(Feed, "training_batches", counted):
        (rows,) = train_runs(rank, world, [config])
    return rows, taken


def train(pool: Pool, world: int, config: RunConfig) -> tuple[list[dict[str, Any]], dict[int, set[int]]]:
    results = alike(pool, config).run(world, train_and_count, config)
    taken: dict[int, set[int]] = {}
    for _, of_rank in results:
        for step, samples in of_rank.items():
            taken.setdefault(step, set()).update(samples)
    return results[0][0], taken


def begun(straight: Path, directory: Path, step: int = HALF) -> Path:
    """The run directory of `straight`, as a kill after `step` leaves it."""
    shutil.copytree(straight, directory)
    for checkpoint in (directory / "checkpoints").iterdir():
        if checkpoint.name > f"step_{step:08d}":
            shutil.rmtree(checkpoint)
    return directory


def agrees(
    pool: Pool,
    tmp_path: Path,
    prepared: Path,
    zero: int,
    worlds: list[tuple[int, int]],
    first: int = 2,
    tensor: int = 1,
) -> None:
    """`worlds` are numbers of ranks with their context degrees, `first` that of the run which is not interrupted."""
    keys = {"zero_stage": zero, "tensor": tensor}
    straight = tmp_path / "straight"
    expected, samples = train(pool, first * tensor, config_of(straight, prepared, context=first, **keys))
    for world, context in worlds:
        directory = begun(straight, tmp_path / f"{world}x{context}")
        rows, taken = train(pool, world * tensor, config_of(directory, prepared, context=context, **keys))
        assert rows[:HALF] == expected[:HALF]
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        for row, other in zip(rows[HALF:], expected[HALF:]):
            assert (row["tokens"], row["learning_rate"]) == (other["tokens"], other["learning_rate"])
            for key in ("loss", "grad_norm"):
                assert row[key] == pytest.approx(other[key], rel=1e-5), (world, context, row["step"], key)
        assert rows[-1]["eval_loss"] == pytest.approx(expected[-1]["eval_loss"], rel=1e-5)
        steps = range(HALF, STEPS)
        assert {step: taken[step] for step in steps} == {step: samples[step] for step in steps}


def test_a_run_of_two_ranks_goes_on_with_one_and_with_four(pool: Pool, tmp_path: Path, prepared: Path) -> None:
    agrees(pool, tmp_path, prepared, 1, [(1, 1), (4, 2)])


@pytest.mark.full
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_zero_stage_goes_on_with_other_ranks(pool: Pool, tmp_path: Path, prepared: Path, zero: int) -> None:
    agrees(pool, tmp_path, prepared, zero, [(1, 1), (2, 1), (4, 4)])


@pytest.mark.full
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_tensor_ranks_keep_their_parts(pool: Pool, tmp_path: Path, prepared: Path, zero: int) -> None:
    agrees(pool, tmp_path, prepared, zero, [(1, 1)], tensor=2)


def hand_over(rank: int, world: int, config: RunConfig, source: Path, ranks: int, target: Path) -> None:
    """Loads the engine's state that `ranks` saved in `source`, and saves it from these ranks in `target`."""
    from farspan.launch.quiet import quiet_libraries

    quiet_libraries()
    from farspan.parallel.mesh import Mesh
    from farspan.trainer.engine import Engine
    from farspan.trainer.preflight import check
    from farspan.trainer.train import build_model

    preflight = check(config, world)
    mesh = Mesh.create(preflight.degrees, torch.device("cpu"))
    engine = Engine(config, mesh, build_model(config, preflight.model, mesh))
    engine.load(str(source), ranks)
    engine.save(str(target))
    engine.close()
    mesh.destroy()


def elements(engine: Path, zero: int) -> dict[tuple[Any, ...], torch.Tensor]:
    """Weights and moments of every parameter in the files of two ranks; their padding at ZeRO 3 is arbitrary."""
    saved, found = SavedShards(engine, 0, zero), {}
    sizes = [tensors["exp_avg"].numel() for tensors in saved.state(0).optimizer]
    shards = Shards(parameter_groups(saved.model()["param_shapes"]), sizes, 2, zero)
    for rank in range(2):
        state = saved.state(rank)
        for run in shards.runs(rank):
            tensors = {"weight": state.weights[run.flat], **state.optimizer[run.flat]}
            for key, tensor in tensors.items():
                place = slice(run.offset, run.offset + run.count) if tensor.dim() else ...
                found[rank, run.name, run.start, key] = tensor.detach()[place]
    return found


ROUND_ROBIN = {"zero_optimization": {"round_robin_gradients": True}}
SMALL_TENSORS = {"zero_optimization": {"sub_group_size": 3000}}


@pytest.mark.full
@pytest.mark.parametrize(
    ("zero", "dtype", "deepspeed"),
    [
        (1, "fp32", {}),
        (2, "fp32", {}),
        (3, "fp32", {}),
        (1, "bf16", {}),
        (2, "bf16", {}),
        (3, "bf16", {}),
        (2, "fp32", ROUND_ROBIN),
        (3, "fp32", SMALL_TENSORS),
        (1, "bf16", {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
    ],
)
def test_state_that_went_over_three_and_four_ranks_comes_back_to_the_bit(
    pool: Pool, tmp_path: Path, prepared: Path, zero: int, dtype: str, deepspeed: dict[str, Any]
) -> None:
    def config(name: str, context: int) -> RunConfig:
        keys = {"context": context, "zero_stage": zero, "dtype": dtype, "deepspeed": deepspeed}
        return config_of(tmp_path / name, prepared, **keys)

    straight = config("run", 2)
    alike(pool, straight).run(2, train_runs, [straight])
    source = tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}"
    before = source
    for world, ranks in ((3, 2), (4, 3), (1, 4), (2, 1)):
        after = tmp_path / f"by{world}"
        pool.run(world, hand_over, config(after.name, world), before, ranks, after)
        before = after
    expected, found = elements(source / "engine", zero), elements(before / "engine", zero)
    assert list(found) == list(expected)
    assert {key[-1] for key in expected} == {"weight", "exp_avg", "exp_avg_sq", "step"}
    assert [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])] == []


@pytest.mark.full
def test_a_checkpoint_after_a_change_of_ranks_resumes_again(pool: Pool, tmp_path: Path, prepared: Path) -> None:
    def config(name: str, **changes: Any) -> RunConfig:
        config = config_of(tmp_path / name, prepared, zero_stage=2, **changes)
        return config.model_copy(
            update={"checkpoint": config.checkpoint.model_copy(update={"every": 1, "keep": STEPS})}
        )

    expected, _ = train(pool, 2, config("straight", context=2))
    rows, before = expected, tmp_path / "straight"
    for step, world in ((2, 4), (3, 1), (4, 3), (5, 2)):
        directory = begun(before, tmp_path / f"after{step}", step)
        rows, _ = train(pool, world, config(directory.name, context=world))
        before = directory
    for row, other in zip(rows, expected, strict=True):
        assert (row["step"], row["tokens"]) == (other["step"], other["tokens"])
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)


def failed_load(rank: int, world: int, config: RunConfig) -> str:
    """What a run that resumes says against the checkpoint."""
    from farspan.trainer.config import ConfigError

    try:
        train_runs(rank, world, [config])
    except ConfigError as error:
        return str(error)
    return "nothing"


@pytest.mark.full
def test_what_cannot_be_divided_anew_is_refused(pool: Pool, tmp_path: Path, prepared: Path) -> None:
    gaps = {"zero_optimization": {"parameter_alignment": True}}
    straight = tmp_path / "straight"
    pool.run(2, train_runs, [config_of(straight, prepared, context=2, zero_stage=2, deepspeed=gaps)])
    before = {path: path.read_bytes() for path in straight.rglob("checkpoints/*/*") if path.is_file()}
    for change, named in (
        ({"context": 1, "zero_stage": 2, "deepspeed": gaps}, "parameter_alignment"),
        ({"context": 1, "zero_stage": 1}, "parallel.zero_stage was 2 and is 1"),
    ):
        (said,) = pool.run(1, failed_load, config_of(straight, prepared, **change))
        assert named in said
        assert "\n" not in said
        pool.close()  # the mesh of a run that failed is still there
    said, _ = pool.run(2, failed_load, config_of(straight, prepared, context=1, tensor=2, zero_stage=2))
    assert "parallel.tensor was 1 and is 2" in said
    pool.close()
    assert before == {path: path.read_bytes() for path in straight.rglob("checkpoints/*/*") if path.is_file()}


@pytest.mark.parametrize(
    "zero_stage", [1, pytest.param(0, marks=pytest.mark.full), pytest.param(3, marks=pytest.mark.full)]
)
def test_what_the_configuration_says_of_the_optimizer_counts_after_a_resume(
    tmp_path: Path, prepared: Path, pool: Pool, zero_stage: int
) -> None:
    """DeepSpeed would go on with what the checkpoint says."""
    straight = config_of(tmp_path / "straight", prepared, zero_stage=zero_stage)
    losses = [row["loss"] for row in train(pool, 2, straight)[0]]
    for key, value in {"weight_decay": 5.0, "gradient_clipping": 1e-3, "betas": (0.0, 0.5), "epsilon": 1.0}.items():
        config = config_of(begun(straight.run.dir, tmp_path / key), prepared, zero_stage=zero_stage)
        optimizer = config.optimizer.model_copy(update={key: value})
        rows, _ = train(pool, 2, config.model_copy(update={"optimizer": optimizer}))
        found = [row["loss"] for row in rows]
        assert found[: HALF + 1] == losses[: HALF + 1]
        assert found[-1] != losses[-1], key
