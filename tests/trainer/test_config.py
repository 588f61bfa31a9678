"""The configuration: every mistake is one line with its key, and what is dumped is what was meant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from farspan.trainer.config import ConfigError, RunConfig
from farspan.trainer.config_file import dump_config, load_config

REPOSITORY = Path(__file__).parents[2]
MINIMAL = """
run: {dir: runs/test}
model: {preset: tiny, vocabulary_size: 400, heads: 6, kv_heads: 2}
data: {sources: [python-stdlib], directory: prepared/test}
train: {steps: 10, tokens_per_step: 512, sequence_length: 128}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_star_attention_is_described_in_words(path: Path) -> None:
    star = load_config(path, ["attention.star.block=32"]).attention.star
    assert star is not None
    assert (star.anchor_tokens, star.mode) == (32, "lm")
    assert star.in_words == "blocks of 32 tokens, anchors of 32; global is the last 0.25 of a document"
    assert star.warning is not None
    assert "attention.star.block is 32: " in star.warning
    long = ["train.sequence_length=512", "attention.star.block=256", "attention.star.anchor=1"]
    star = load_config(path, long).attention.star
    assert star is not None
    assert (star.anchor_tokens, star.warning) == (1, None)


def test_what_is_not_given_has_its_default(path: Path) -> None:
    config = load_config(path)
    assert config.run.dir == Path("runs/test")
    assert (config.run.seed, config.launch.processes, config.data.tokenizer) == (0, None, None)
    assert (config.parallel.context, config.parallel.plan, config.parallel.order) == (1, "ring", "zigzag")
    assert (config.parallel.zero_stage, config.train.dtype, config.train.rows_per_step) == (1, "bf16", 4)
    assert config.deepspeed == {}


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_configurations_that_we_ship_are_right(file: Path) -> None:
    assert load_config(file).train.steps > 0


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.stepz=3", "there is no key train.stepz, did you mean 'steps'? (keys there: steps, tokens_per_step, "),
        ("trian.steps=3", "there is no key trian, did you mean 'train'? (keys there: run, launch, model, data, "),
        ("model.hiden_size=3", "there is no key model.hiden_size, did you mean 'hidden_size'? (keys there: preset, "),
        ("train.stpes=null", "there is no key train.stpes, did you mean 'steps'? (keys there: steps, "),
        ("trian.steps=null", "there is no key trian, did you mean 'train'? (keys there: run, launch, model, data, "),
        ("checkpoint.zzz=3", "there is no key checkpoint.zzz (keys there: every, keep)"),
        (
            "data.blend={parts: {b: {wieght: 3}}}",
            "there is no key data.blend.parts.b.wieght, did you mean 'weight'? (keys there: ",
        ),
        ("parallel.contxt=2", "there is no key parallel.contxt, did you mean 'context'? (keys there: context, "),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(path: Path, override: str, problem: str) -> None:
    assert refusal(path, override).startswith(f"{path}: {problem}")


def test_a_misspelt_key_in_the_file_is_refused_too(path: Path) -> None:
    path.write_text(MINIMAL.replace("directory", "direktory"))
    message = refusal(path)
    assert "there is no key data.direktory, did you mean 'directory'?" in message
    assert "data.directory is required" in message


def test_all_problems_come_in_one_line(path: Path) -> None:
    message = refusal(path, "train.stepz=3", "parallel.context=0", "run.seed=x", "modle.layers=2")
    assert message.startswith(f"{path}: ")
    problems = message.removeprefix(f"{path}: ").split("; ")
    assert len(problems) == 4
    assert any(problem.startswith("there is no key train.stepz, did you mean 'steps'?") for problem in problems)
    assert any(problem.startswith("there is no key modle, did you mean 'model'?") for problem in problems)
    assert "parallel.context is 0: input should be greater than 0" in problems
    assert any(problem.startswith("run.seed is 'x': input should be a valid integer") for problem in problems)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.tokens_per_step=500"], "train.tokens_per_step 500 must be a multiple of train.sequence_length 128; "),
        (["train.tokens_per_step=500"], "the nearest is 512"),
        (["train.tokens_per_step=3"], "the nearest is 128"),
        (["train.dtype=fp16"], "train.dtype is 'fp16': input should be 'fp32' or 'bf16'"),
        (["parallel.plan=rng"], "parallel.plan is 'rng', did you mean 'ring'?"),
        (["parallel.plan=rng"], "possible are single, ring, hierarchical_ring"),
        (["parallel.order=zigzak"], "parallel.order is 'zigzak', did you mean 'zigzag'?"),
        (["parallel.order=zigzak"], "possible are contiguous, zigzag, striped"),
        (
            ["attention.backend=cuda"],
            "attention.backend is 'cuda', did you mean 'cudnn'? possible are auto, deterministic, reference, triton",
        ),
        (["parallel.plan=single", "parallel.context=2"], "parallel.plan single keeps a sequence on one rank"),
        (["parallel.zero_stage=0"], "train.dtype bf16 needs parallel.zero_stage 1 or more"),
        (["parallel.zero_stage=4"], "parallel.zero_stage is 4: input should be less than or equal to 3"),
        (["parallel.sequence_parallel=true"], "parallel.sequence_parallel divides tokens over tensor ranks"),
        (["memory.recompute=none", "memory.offload=true"], "memory.offload moves what recomputation starts from"),
        (
            ["memory.recompute=none", "memory.keep_layers=1"],
            "memory.keep_layers 1 spares layers from recomputation, but",
        ),
        (["memory.recompute=none", "memory.keep_layers=auto"], "which spares all; set memory.keep_layers to 0"),
        (["attention.star.block=0"], "attention.star.block is 0: input should be greater than 0"),
        (["attention.star.anchor=3"], "attention.star.block is required"),
        (
            ["attention.star.block=16", "attention.star.anchor=17"],
            "attention.star.anchor 17 is more than attention.star.block 16; lower it",
        ),
        (["attention.star.block=65"], "attention.star.block 65 leaves every document dense, for none has two blocks"),
        (["attention.star.block=65"], "in rows of train.sequence_length 128; lower it to 64 or less"),
        (["attention.star={block: 8, mode: chat}"], "attention.star.mode is 'chat': input should be 'lm' or 'sft'"),
        (["attention.star={block: 8, blok: 8}"], "there is no key attention.star.blok, did you mean 'block'?"),
        (
            ["attention.star={block: 8, mode: sft}", "attention.across_documents=true"],
            "attention.star.mode sft goes by document; set attention.across_documents to false",
        ),
        (["attention.window.width=0"], "attention.window.width is 0: input should be greater than 0"),
        (["attention.window.sinks=4"], "attention.window.width is required"),
        (
            ["model.layers=4", "attention.window={width: 8, full_layers: [1, 4]}"],
            "attention.window.full_layers [1, 4] must be different layers from 0 to 3 (model.layers)",
        ),
        (["attention.window={width: 8, full_layers: [1, 1]}"], "attention.window.full_layers [1, 1] must be different"),
        (
            ["model.layers=2", "attention.window={width: 8, full_layers: [0, 1]}"],
            "names all 2 layers, so that none has a window; leave some out, or leave out attention.window",
        ),
        (
            ["attention.window.width=8", "attention.star.block=8"],
            "attention.star is for layers without a window, and attention.window.full_layers names none; name some",
        ),
        (["attention.sparse.mass=1.5"], "attention.sparse.mass is 1.5: input should be less than or equal to 1"),
        (["attention.sparse.probes=50"], "attention.sparse.probes is 50: input should be 16, 32, 64 or 128"),
        (["attention.sparse.estimator=mobba"], "attention.sparse.estimator is 'mobba'"),
        (["attention.sparse.stride=12"], "attention.sparse.stride is 12: input should be 4, 8, 16, 32 or 64"),
        (["attention.sparse.chunk=100"], "attention.sparse.chunk is 100: input should be a multiple of 128"),
        (
            ["attention.sparse.estimator=xattention", "attention.sparse.mass=0.9"],
            "attention.sparse.mass is for attention.sparse.estimator vertical_slash, and this is xattention; leave it",
        ),
        (
            ["attention.sparse.estimator=moba", "attention.sparse.budgets=budgets.yaml"],
            "attention.sparse.budgets is for attention.sparse.estimator vertical_slash, and this is moba",
        ),
        (["attention.sparse.top_k=3"], "attention.sparse.top_k is for attention.sparse.estimator moba, and this is"),
        (
            ["attention.sparse.estimator=moba"],
            "top_k 12 chunks of attention.sparse.chunk 4096 tokens are all of train.",
        ),
        (["attention.sparse.mass=0.9", "attention.star.block=8"], "leave out one of them"),
        (["attention.sparse.mass=0.9", "parallel.plan=group_cast"], "set parallel.plan to ring, hierarchical_ring"),
        (
            ["model.layers=2", "attention.sparse.dense_layers=[2]"],
            "must be different layers from 0 to 1 (model.layers)",
        ),
        (
            ["model.layers=2", "attention.sparse.dense_layers=[0]", "attention.window={width: 8, full_layers: [0]}"],
            "leave no layer for attention.sparse",
        ),
        (["parallel.sparse_wire=true"], "set parallel.sparse_wire to false, or attention.sparse.mass"),
        (
            ["attention.sparse.mass=0.9", "parallel.sparse_wire=true", "parallel.plan=ulysses"],
            "set parallel.plan to ring, hierarchical_ring or all_gather, or parallel.sparse_wire to false",
        ),
        (["attention.sparse.dense_steps=3", "memory.keep_layers=auto"], "set memory.keep_layers to a number"),
        (
            ["attention.sparse={train: false, evaluate: false}"],
            "attention.sparse.train and attention.sparse.evaluate are false, so that nothing is sparse",
        ),
        (["parallel.plan=star"], "parallel.plan star sends the rows that parallel.order two_class marks, but "),
        (["parallel.plan=star"], "parallel.order is zigzag; set it to two_class"),
        (["parallel.order=two_class"], "two_class is for the global parts of Star Attention; set attention.star.block"),
        (
            ["attention.star.block=8", "parallel.order=two_class", "parallel.tensor=2", "parallel.sequence_parallel=1"],
            "set parallel.sequence_parallel to false",
        ),
        (["model.layers=2", "memory.keep_layers=3"], "memory.keep_layers 3 is more than model.layers 2"),
        (["memory.keep_layers=-1"], "memory.keep_layers is -1; it must be a number of layers, or auto"),
        (["memory.keep_layers=all"], "memory.keep_layers is 'all'; it must be a number of layers, or auto"),
        (["memory.keep_layers=true"], "memory.keep_layers is True; it must be a number of layers, or auto"),
        (["memory.recompute=some"], "memory.recompute is 'some': input should be 'none', 'full' or 'selective'"),
        (["parallel.tensor=4"], "model.heads 6 is not a multiple of parallel.tensor 4"),
        (["model.preset=tinny"], "there is no model.preset 'tinny'; did you mean 'tiny'?"),
        (["model.kv_heads=4"], "model.heads 6 must be a multiple of model.kv_heads 4"),
        (["data.sources=[]"], "data.sources is []: list should have at least 1 item"),
        (["data.heldout_fraction=1"], "data.heldout_fraction is 1: input should be less than 1"),
        (["optimizer.learning_rate=0"], "optimizer.learning_rate is 0: input should be greater than 0"),
        (["optimizer.learning_rate=.nan"], "optimizer.learning_rate is nan: "),
        (["train=3"], "train is 3: it must be a section, with keys of its own"),
        (["train.steps=yes"], "train.steps is True: input should be a number"),
        (["model.layers=no"], "model.layers is False: input should be a number"),
        (["launch.processes=yes"], "launch.processes is True: input should be a number"),
        (["parallel.inner=2"], "parallel.inner 2 does nothing with parallel.plan ring; leave it out, or set "),
        (["parallel.inner=2"], "set parallel.plan to hierarchical_ring or usp"),
        (
            ["parallel={plan: hierarchical_ring, context: 2, inner: 2, ulysses: 2}"],
            "parallel.ulysses 2 does nothing with parallel.plan hierarchical_ring; ",
        ),
        (["parallel.order=zzz"], "parallel.order is 'zzz'; possible are contiguous"),
        (
            ["attention.window.width=128"],
            "attention.window.width 128 leaves every layer dense, for it is not less than train.sequence_length 128; ",
        ),
        (["train.steps="], "train.steps is None: input should be a valid integer"),
        (["deepspeed=3"], "deepspeed is 3: input should be a valid dictionary"),
    ],
)
def test_impossible_values_are_refused_by_key(path: Path, overrides: list[str], words: str) -> None:
    message = refusal(path, *overrides)
    assert message.startswith(f"{path}: ")
    assert words in message


@pytest.mark.parametrize("override", ["deepspeed=3", "deepspeed=[1]"])
def test_a_refusal_speaks_of_keys_not_of_validators(path: Path, override: str) -> None:
    message = refusal(path, override)
    assert "[" not in message.replace("[1]", "")
    assert "class" not in message


def test_overrides_are_yaml_and_take_precedence(path: Path) -> None:
    config = load_config(
        path,
        [
            "train.steps=7",
            "optimizer.learning_rate=3e-4",  # YAML 1.1 reads this as text
            "optimizer.betas=[0.8, 0.9]",
            "data.sources=[a b, c]",
            "run.dir=elsewhere=here",
            "model.qkv_bias=true",
            "data.tokenizer=null",
            "train.sequence_length=1_6",
            "train.steps=8",
        ],
    )
    assert (config.train.steps, config.optimizer.learning_rate) == (8, 3e-4)
    assert (config.optimizer.betas, [source.path for source in config.data.sources]) == ((0.8, 0.9), ["a b", "c"])
    assert config.run.dir == Path("elsewhere=here")
    assert config.model.qkv_bias is True
    assert config.data.tokenizer is None
    assert config.train.sequence_length == 16


def test_null_takes_a_key_of_the_file_away(path: Path) -> None:
    path.write_text(MINIMAL + "attention: {sparse: {mass: 0.5, most_columns: 64}}\n")
    sparse = load_config(path, ["attention.sparse.mass=null"]).attention.sparse
    assert sparse is not None
    assert (sparse.mass, sparse.most_columns) == (0.9, 64)
    assert load_config(path, ["attention.sparse=null"]).attention.sparse is None


def test_stages_of_a_blend_must_last_as_long_as_the_run(path: Path) -> None:
    blend = "data.blend={parts: {a: {}}, stages: [{steps: 1, weights: {a: 1}}]}"
    assert "data.blend.stages end after step 1, and train.steps is 9" in refusal(path, blend, "train.steps=9")


def test_overrides_reach_below_sections_that_the_file_lacks(path: Path) -> None:
    config = load_config(path, ["deepspeed.zero_optimization.offload_optimizer.device=cpu", "eval.rows=3"])
    assert config.deepspeed == {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert config.eval.rows == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "'train.steps' is not an override; write it as section.key=value"),
        ("=3", "'=3' is not an override; write it as section.key=value"),
        ("train.steps=[1", "the value of 'train.steps=[1' is not valid YAML"),
        ("data.sources.first=x", "data.sources.first cannot be set: sources is not a section"),
        ("train.steps.more=x", "train.steps.more cannot be set: steps is not a section"),
    ],
)
def test_what_is_no_override_is_refused(path: Path, override: str, message: str) -> None:
    assert refusal(path, override) == message


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    assert refusal(path) == f"the configuration {path} cannot be read: No such file or directory"
    assert "cannot be read: Is a directory" in refusal(tmp_path)
    path.write_text("run: {dir: a\n")
    assert refusal(path).startswith(f"{path} is not valid YAML: while parsing a flow mapping")
    for text, kind in (("", "NoneType"), ("- a", "list"), ("hello", "str")):
        path.write_text(text)
        assert refusal(path) == f"{path} must hold sections such as 'run:' and 'train:', not {kind}"


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"\xff\xfe\x00\x80")
    assert str(path) in refusal(path)


def test_the_resolved_configuration_reads_back_as_the_same(path: Path, tmp_path: Path) -> None:
    elsewhere = [
        "run.dir=/runs/one two",
        "run.seed=18446744073709551615",
        "launch.processes=4",
        "launch.stop_seconds=0.5",
        "model.preset=qwen2.5-0.5b",
        "model.vocabulary_size=152000",
        "model.tied_embeddings=false",
        "data.tokenizer=other/tokenizer.model",
        "train.dtype=fp32",
        "parallel.zero_stage=0",
        "parallel.context=2",
        "parallel.timeout_seconds=7200",
        "optimizer.learning_rate=1.2345678901234567e-5",
        "optimizer.betas=[0.85, 0.99]",
        "optimizer.epsilon=1e-15",
        "optimizer.schedule=wsd",
        "attention.window={width: 127, full_layers: [1]}",
        "parallel.plan=auto",
        "parallel.inner=2",
        "deepspeed={zero_optimization: {offload_optimizer: {device: cpu}}, wall_clock_breakdown: false}",
    ]
    sparse = [["attention.sparse.mass=0.8"], ["attention.sparse={estimator: moba, chunk: 256, top_k: 2}"]]
    sparse = [[*keys, "train.sequence_length=1024", "train.tokens_per_step=1024"] for keys in sparse]
    for number, overrides in enumerate(
        ([], elsewhere, *sparse, ["deepspeed=extra.json"], ["model.vocabulary_size=null"])
    ):
        config = load_config(path, overrides)
        resolved = tmp_path / f"resolved{number}.yaml"
        resolved.write_text(dump_config(config))
        assert load_config(resolved) == config
        assert yaml.safe_load(resolved.read_text())["model"]["heads"] == config.model.heads
    assert load_config(path, elsewhere).deepspeed == {
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
        "wall_clock_breakdown": False,
    }


def fields(section: type[BaseModel], name: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key with its field, sections taken apart."""
    for key, field in section.model_fields.items():
        sections = [t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type)]
        below = next((section for section in sections if issubclass(section, BaseModel)), None)
        if below is not None:
            yield from fields(below, f"{name}{key}.")
        if below is not field.annotation:
            yield f"{name}{key}", field


def test_every_key_is_documented() -> None:
    known = dict(fields(RunConfig))
    # The sentence that the class docstring of a section would be must not stand in for that of a field.
    assert {name for name, field in known.items() if not (field.description or "").endswith(".")} - {"run.dir"} == set()
    assert known["run.dir"].description
    assert known.keys() >= {
        "run.dir",
        "run.seed",
        "launch.processes",
        "train.steps",
        "train.tokens_per_step",
        "train.sequence_length",
        "train.dtype",
        "parallel.context",
        "parallel.tensor",
        "parallel.plan",
        "parallel.order",
        "parallel.zero_stage",
        "model.preset",
        "attention.backend",
        "attention.star",
        "attention.star.block",
        "attention.star.anchor",
        "attention.star.mode",
        "attention.star.global_fraction",
        "attention.window.width",
        "attention.window.sinks",
        "attention.window.full_layers",
        "optimizer.learning_rate",
        "data.sources",
        "data.tokenizer",
        "eval.every",
        "checkpoint.every",
        "checkpoint.keep",
    }


def test_a_configuration_cannot_be_changed(path: Path) -> None:
    config = load_config(path)
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3


DECOMPOSED = ["data.method=decompose", "train.sequence_length=256", "train.tokens_per_step=1024", "train.steps=8"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.method=concat", "curriculum.cycles=2"],
            "curriculum does nothing with data.method concat",
        ),
        (["data.method=concat", "data.decompose.shortest=16"], "data.decompose does nothing with data.method concat"),
        (
            ["train.sequence_length=384", "train.tokens_per_step=768"],
            "sequence_length is 384, but data.method",
        ),
        (["data.decompose.shortest=100"], "the nearest are 64 and 128"),
        (["data.decompose.shortest=512"], "data.decompose.shortest 512 is more than train.sequence_length 256"),
        (["data.decompose.shortest=64", "curriculum.odds=grow_p3"], "is 'grow_p3', did you mean 'grow_p2'"),
        (["data.decompose.shortest=64", "curriculum.odds=[1, 2]"], "curriculum.odds has 2 numbers, but there are 3"),
        (["data.decompose.shortest=64", "curriculum.mixture=[1]"], "curriculum.mixture has 1 numbers, but there are 3"),
        (["curriculum.cycles=3"], "curriculum.cycles 3 does not divide train.steps 8; the nearest that goes is 9"),
        (["memory.keep_layers=auto"], "memory.keep_layers auto measures the first steps, and data.method decompose"),
        (["attention.sparse.refresh=4"], "attention.sparse.refresh is for rows of one length"),
        (["parallel.context=3", "parallel.tokens_per_rank=100"], "by a power of two of ranks; set it to 2 or 4"),
        (
            ["parallel.context=2", "parallel.tokens_per_rank=100"],
            "over parallel.context 2 is more than parallel",
        ),
    ],
)
def test_what_rows_of_several_lengths_refuse(path: Path, overrides: list[str], message: str) -> None:
    assert message in refusal(path, *DECOMPOSED, *overrides)


def test_lengths_of_rows(path: Path) -> None:
    assert load_config(path, [*DECOMPOSED, "data.decompose.shortest=64"]).row_lengths == (256, 128, 64)
    assert load_config(path, [*DECOMPOSED]).row_lengths == (256,)
    assert load_config(path, ["train.sequence_length=128", "train.tokens_per_step=128"]).row_lengths == (128,)
