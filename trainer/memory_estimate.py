"""How much memory of a GPU a run will take, from the configuration alone, and what to change where that is too much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from farspan.parallel.degrees import Degrees
from farspan.trainer.arrangement import Arrangement
from farspan.trainer.config import RunConfig
from farspan.trainer.sparse_memory import estimation_bytes, index_bytes

# What is on a GPU beside tensors: the CUDA context, NCCL's buffers, libraries' workspaces, holes between tensors.
_BESIDE_TENSORS = 2 * 2**30
# DeepSpeed's defaults: elements that it reduces at once at stages 2 and 3, and weights that it gathers at stage 3.
_REDUCED_AT_ONCE = 500_000_000
_GATHERED_AT_ONCE = 1_000_000_000
# Layers whose kept tensors are on the device with `memory.offload`: the last, the one in use, and one on its way.
_NOT_YET_OFFLOADED = 3


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one GPU at the fullest moment of a step.

    `engine` is what DeepSpeed communicates through; `kept` what layers keep between the passes; `working` what the
    moment itself takes, which is named by `moment`; `beside` what tensors do not account for.
    """

    weights: int
    gradients: int
    optimizer: int
    engine: int
    kept: int
    working: int
    moment: str
    beside: int = _BESIDE_TENSORS

    @property
    def tensors(self) -> int:
        """What PyTorch's allocator gives out at most."""
        return self.weights + self.gradients + self.optimizer + self.engine + self.kept + self.working

    @property
    def total(self) -> int:
        return self.tensors + self.beside


def estimate_memory(config: RunConfig, degrees: Degrees, plan_bytes: int = 0, selection: int = 0) -> MemoryEstimate:
    """`model.vocabulary_size` must be known.

    `plan_bytes` is what a plan holds of other ranks and on its way, `selection` what lists of a sparse index take.

    Counted are the tensors that autograd saves in `models/`, those alive at once where most are, and the states that
    DeepSpeed keeps in its optimizers: see `_states`, `_Layer` and `_moments`.
    """
    weights, gradients, optimizer, engine = _states(config, degrees)
    layer = _Layer.of(config, degrees)
    memory, layers = config.memory, config.model.layers
    whole = layers if memory.recompute == "none" else memory.keep_layers_at_first
    again = layers - whole
    on_device = min(again, _NOT_YET_OFFLOADED) if memory.offload else again
    few = layer.input + (layer.results if memory.recompute == "selective" else 0)
    sparse = config.attention.sparse
    indexes = 0
    if sparse is not None and sparse.train:
        indexes = len(sparse.layers(layers, config.attention.window)) * index_bytes(config, sparse)
    kept = on_device * few + whole * layer.saved + layer.angles + indexes
    # Layers that keep everything are done with before another is computed again.
    recomputed = 0 if whole else layer.saved - few
    moments = _moments(config, degrees, layer, recomputed, plan_bytes + selection)
    moment = max(moments, key=lambda name: moments[name])
    return MemoryEstimate(weights, gradients, optimizer, engine, kept, moments[moment], moment)


def _states(config: RunConfig, degrees: Degrees) -> tuple[int, int, int, int]:
    """Weights, gradients, optimizer state and the engine's buffers.

    In bf16 there are bf16 weights, fp32 gradients, and fp32 weights and two moments in the optimizer. In fp32 the
    optimizer of stage 0 needs no weights of its own. ZeRO divides the optimizer's from stage 1 on, gradients from 2 on,
    weights at 3, over data x context ranks.
    """
    stage, share = config.parallel.zero_stage, degrees.shard
    size = config.model.parameters() // degrees.tensor
    weights = size * _itemsize(config) // (share if stage == 3 else 1)
    gradients = 4 * size // (share if stage >= 2 else 1)
    optimizer = 8 * size if stage == 0 else 12 * size // share
    engine = 0
    if stage >= 2:
        engine += 4 * min(size, _REDUCED_AT_ONCE)
    if stage == 3 and share > 1:
        engine += _itemsize(config) * min(size, _GATHERED_AT_ONCE)
    return weights, gradients, optimizer, engine


@dataclass(frozen=True)
class _Layer:
    """Bytes of one layer for the tokens of one rank. `saved` is all that autograd saves, with `input` and `results`.

    `results` are attention's out and lse; `inner` is one tensor inside the feed-forward, `stream` one gradient of the
    residual stream, `angles` the rotary cosines and sines, which all layers share. `slots` are a row's tokens there.
    """

    input: int
    results: int
    saved: int
    inner: int
    stream: int
    rows: int
    angles: int
    slots: int

    @classmethod
    def of(cls, config: RunConfig, degrees: Degrees) -> _Layer:
        train, model, tensor = config.train, config.model, degrees.tensor
        order = Arrangement(config, degrees.context).order()
        tokens, size = order.slots * train.micro_batch_rows, _itemsize(config)
        stream = tokens * model.hidden_size * size
        divided = stream // (tensor if config.parallel.sequence_parallel else 1)
        heads, kv_heads = model.heads_of_rank(tensor)
        queries = tokens * heads * model.head_dim * size
        rows = queries + 2 * tokens * kv_heads * model.head_dim * size
        results = queries + 4 * tokens * heads
        inner = tokens * model.feed_forward_size // tensor * size
        # Input, its norm, the stream after attention, its norm; q, k, v; gate, up and their product.
        saved = 4 * divided + rows + results + 3 * inner
        return cls(divided, results, saved, inner, stream, rows, 4 * tokens * model.head_dim, order.slots)


def _moments(config: RunConfig, degrees: Degrees, layer: _Layer, recomputed: int, beside: int) -> dict[str, int]:
    """What each of the moments that may be the fullest takes beyond states and kept tensors.

    `beside` is what attention takes beside its own operands and results.
    """
    model, size = config.model, _itemsize(config)
    vocabulary = (model.vocabulary_size or 0) // degrees.tensor
    projection = vocabulary * model.hidden_size
    chunk = config.train.loss_chunk_tokens * vocabulary * size
    # The gradient of tied embeddings waits for the embedding's own backward pass.
    waiting = projection * size if model.tied_embeddings else 0
    # Operands and gradients of attention; beside them, with other ranks, fp32 totals of the latter.
    attention = layer.rows + 2 * layer.results + (2 * layer.rows if size == 2 and degrees.context > 1 else 0)
    moments = {
        # The last hidden states, their norm, and their gradient beside that of the projection, fp32 before it is cast.
        "loss": 3 * layer.stream + 4 * projection + max(chunk, size * projection + layer.stream),
        # The gradient of the product has taken the product's place when those of gate and up are made.
        "feed-forward backward": waiting + recomputed + layer.stream + 2 * layer.inner,
        "attention backward": waiting + max(0, recomputed - 3 * layer.inner) + layer.stream + attention + beside,
    }
    if (sparse := config.attention.sparse) is not None:
        # The norm that queries, keys and values are made of, and what of the layer's input is not kept.
        moments["estimation"] = 2 * layer.stream + layer.rows + estimation_bytes(config, sparse, layer.slots)
    return moments


def _itemsize(config: RunConfig) -> int:
    return 2 if config.train.dtype == "bf16" else 4


def remedies(config: RunConfig, degrees: Degrees, plan_bytes: int, available: int, selection: int = 0) -> Iterator[str]:
    """Single changes of the configuration with which it would fit, such as "memory.offload: true"."""
    train, parallel, memory = config.train, config.parallel, config.memory

    def fits(section: str, degrees: Degrees = degrees, share: float = 1.0, **keys: object) -> bool:
        changed = config.model_copy(update={section: getattr(config, section).model_copy(update=keys)})
        beside = int(share * plan_bytes), int(share * selection)
        return estimate_memory(changed, degrees, *beside).total <= available

    if memory.keep_layers and fits("memory", keep_layers=0):
        yield "memory.keep_layers: 0"
    for mode in {"none": ("selective", "full"), "selective": ("full",), "full": ()}[memory.recompute]:
        if fits("memory", recompute=mode, keep_layers=0):
            yield f"memory.recompute: {mode}"
            break
    if not memory.offload and memory.recompute != "none" and fits("memory", offload=True, keep_layers=0):
        yield "memory.offload: true"
    if degrees.tensor > 1 and not parallel.sequence_parallel and fits("parallel", sequence_parallel=True):
        yield "parallel.sequence_parallel: true"
    for stage in range(parallel.zero_stage + 1, 4):
        if fits("parallel", zero_stage=stage):
            yield f"parallel.zero_stage: {stage}"
            break
    if train.micro_batch_rows > 1 and fits("train", micro_batch_rows=1, share=1 / train.micro_batch_rows):
        yield "train.micro_batch_rows: 1"
    if train.loss_chunk_tokens > 1024 and fits("train", loss_chunk_tokens=1024):
        yield "train.loss_chunk_tokens: 1024"
    for times in (2, 4, 8, 16, 32):
        context = degrees.context * times
        data = max(1, degrees.data // times)
        more = Degrees(data, context, degrees.tensor)
        if fits("parallel", more, 1 / times, context=context):
            processes = f" with launch.processes: {more.world}" if more.world != degrees.world else ""
            held = f" with parallel.tokens_per_rank: {-(-train.sequence_length // context)}"
            yield f"parallel.context: {context}{held if parallel.tokens_per_rank else ''}{processes}"
            break
