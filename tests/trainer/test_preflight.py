"""What cannot work is said in one line, with the key to change, before any process starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.corpus import prepare_small

from farspan.trainer.config import ConfigError
from farspan.trainer.config_file import load_config
from farspan.trainer.preflight import Preflight, check, default_processes


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration beside its prepared data: small real text, a tokenizer of 384 pieces."""
    folder = tmp_path_factory.mktemp("preflight")
    prepare_small(folder, vocabulary_size=384)
    path = folder / "run.yaml"
    path.write_text(
        f"""
run: {{dir: {folder}/run}}
model: {{hidden_size: 32, layers: 2, heads: 4, kv_heads: 2, head_dim: 8, feed_forward_size: 48}}
data: {{sources: [{folder}/text], directory: {folder}/prepared}}
train: {{steps: 2, tokens_per_step: 768, sequence_length: 64, dtype: fp32}}
"""
    )
    return path


@pytest.fixture(autouse=True)
def nothing_is_left_behind(config_file: Path) -> Iterator[None]:
    yield
    assert not (config_file.parent / "run").exists()


def preflight(config_file: Path, processes: int, *overrides: str) -> Preflight:
    return check(load_config(config_file, overrides), processes)


def refusal(config_file: Path, processes: int, *overrides: str) -> str:
    config = load_config(config_file, overrides)
    with pytest.raises(ConfigError) as caught:
        check(config, processes)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_a_run_is_made_of(config_file: Path) -> None:
    found = preflight(config_file, 1, "train.micro_batch_rows=4")
    assert (found.degrees.data, found.degrees.context, found.degrees.tensor) == (1, 1, 1)
    assert found.model.vocabulary_size == found.prepared.vocabulary_size == 384
    assert preflight(config_file, 1, "model.vocabulary_size=400").model.vocabulary_size == 400


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA there are no more processes than devices")
def test_degrees_are_divided(config_file: Path) -> None:
    degrees = preflight(config_file, 12, "parallel.context=2", "parallel.tensor=2").degrees
    assert (degrees.data, degrees.context, degrees.tensor) == (3, 2, 2)


def test_processes_are_given_or_one_a_gpu(config_file: Path) -> None:
    assert default_processes(load_config(config_file, ["launch.processes=5"])) == 5
    assert default_processes(load_config(config_file)) == max(1, torch.cuda.device_count())


def test_an_impossible_mesh(config_file: Path) -> None:
    message = refusal(config_file, 3, "parallel.context=2")
    assert message.startswith(
        "3 processes cannot be divided into parallel.context 2 x parallel.tensor 1; possible are "
    )


def test_rows_that_do_not_divide(config_file: Path) -> None:
    message = refusal(config_file, 5)
    assert message.startswith("train.tokens_per_step 768 is 12 rows of train.sequence_length 64, which data 5 x ")
    assert message.endswith("; the nearest train.tokens_per_step that goes is 640")
    message = refusal(config_file, 4, "train.micro_batch_rows=2", "parallel.context=2", "train.tokens_per_step=640")
    assert "data 2 x train.micro_batch_rows 2 do not divide" in message
    assert message.endswith("; the nearest train.tokens_per_step that goes is 512")


def test_star_attention_for_answers_needs_data_that_has_them(config_file: Path) -> None:
    preflight(config_file, 1, "attention.star.block=16")
    message = refusal(config_file, 1, "attention.star.block=16", "attention.star.mode=sft")
    assert message.startswith("attention.star.mode sft takes the end of each context from the data, and ")


def test_a_tokenizer_larger_than_the_model(config_file: Path) -> None:
    message = refusal(config_file, 1, "model.vocabulary_size=383")
    assert message.startswith("model.vocabulary_size 383 is smaller than the tokenizer's 384 (")
    assert "data.tokenizer" in message


def test_another_tokenizer_than_the_datas(config_file: Path, tmp_path: Path) -> None:
    own = config_file.parent / "prepared" / "tokenizer.model"
    preflight(config_file, 1, f"data.tokenizer={own}")
    other = tmp_path / "other.model"
    other.write_bytes(own.read_bytes() + b"\0")
    assert refusal(config_file, 1, f"data.tokenizer={other}").startswith(f"data.tokenizer is {other} (sha256 ")
    missing = refusal(config_file, 1, f"data.tokenizer={tmp_path / 'missing.model'}")
    assert missing.startswith(f"data.tokenizer is {tmp_path / 'missing.model'}, where no file is: ")


def test_data_that_is_not_prepared(config_file: Path, tmp_path: Path) -> None:
    message = refusal(config_file, 1, f"data.directory={tmp_path / 'nowhere'}")
    assert str(tmp_path / "nowhere") in message
    assert "farspan prepare" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA has it")
def test_sequence_parallelism_without_cuda(config_file: Path) -> None:
    message = refusal(config_file, 2, "parallel.tensor=2", "parallel.sequence_parallel=true")
    assert message.startswith("parallel.sequence_parallel needs CUDA")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA has a host to move to")
def test_offloading_without_cuda(config_file: Path) -> None:
    message = refusal(config_file, 1, "memory.offload=true")
    assert message == "memory.offload moves tensors from a GPU to its host, and there is no GPU; set it to false"


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA has memory to measure")
def test_measuring_memory_without_cuda(config_file: Path) -> None:
    message = refusal(config_file, 1, "memory.keep_layers=auto")
    assert message == "memory.keep_layers auto measures a GPU's memory, and there is no GPU; set it to a number"


def test_tokens_that_sequence_parallelism_cannot_divide(config_file: Path) -> None:
    overrides = ["parallel.tensor=2", "parallel.sequence_parallel=true", "parallel.context=1"]
    rows = ["train.sequence_length=63", "train.tokens_per_step=63", "parallel.order=contiguous"]
    message = refusal(config_file, 2, *overrides, *rows)
    assert message.startswith("parallel.sequence_parallel divides a context rank's 63 tokens by parallel.tensor 2")
    assert message.endswith("change train.sequence_length")


def test_a_vocabulary_that_tensor_ranks_cannot_share(config_file: Path) -> None:
    """The size comes from the tokenizer here, so that only now can it be known."""
    changes = ["model.heads=5", "model.kv_heads=5", "model.feed_forward_size=50", "parallel.tensor=5"]
    assert refusal(config_file, 5, *changes) == "model.vocabulary_size 384 is not a multiple of parallel.tensor 5"


def test_contradictions_in_the_deepspeed_section(config_file: Path) -> None:
    message = refusal(config_file, 1, "deepspeed.zero_optimization.stage=2")
    assert message.startswith("deepspeed.zero_optimization.stage is set by parallel.zero_stage here")


def test_too_little_text_for_one_row(config_file: Path) -> None:
    """Either split: the held-out one is small, and is needed at the last step at the latest."""
    tokens = preflight(config_file, 1).prepared.tokens
    assert tokens["heldout"] < tokens["train"]
    for split in ("heldout", "train"):
        length = tokens[split] + 1
        message = refusal(config_file, 1, f"train.sequence_length={length}", f"train.tokens_per_step={length}")
        assert f"train.sequence_length is {length}, but the " in message
        assert "split has only" in message
        assert ("data.heldout_fraction" in message) == (split == "heldout")


def test_too_little_text_for_a_step_of_the_longest_rows(config_file: Path) -> None:
    lengths = ("data.method=decompose", "train.sequence_length=8192", "train.tokens_per_step=524288")
    message = refusal(config_file, 1, *lengths, "data.decompose.shortest=8192")
    assert message.startswith("the text has ")
    assert "rows of train.sequence_length 8192, and a step takes 64: lower train.sequence_length or" in message


def test_every_length_is_checked(config_file: Path) -> None:
    """Whole tiles for sparse attention: 128 tokens striped by 64 over two ranks have none."""
    keys = ("data.method=decompose", "data.decompose.shortest=128", "train.sequence_length=1024")
    keys += ("train.tokens_per_step=2048", "parallel.context=2", "parallel.order=striped", "parallel.stripe=64")
    assert "attention.sparse with parallel.order striped: " in refusal(config_file, 2, *keys, "attention.sparse={}")
