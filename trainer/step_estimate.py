"""How long an optimizer step is expected to take, and what of that is communication that nothing hides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from farspan.parallel.cluster import Cluster
from farspan.parallel.degrees import Degrees
from farspan.parallel.plan import Direction
from farspan.parallel.timeline import Timeline
from farspan.trainer.config import RunConfig


@dataclass(frozen=True)
class StepEstimate:
    """Seconds of one optimizer step. `attention` waits for nothing; what it has to wait is in `waiting`."""

    attention: float
    linear: float
    loss: float
    elementwise: float
    optimizer: float
    waiting: float
    tensor: float
    reduction: float

    @property
    def compute(self) -> float:
        return self.attention + self.linear + self.loss + self.elementwise + self.optimizer

    @property
    def exposed(self) -> float:
        """Communication that nothing hides, and ranks that wait for busier ones."""
        return self.waiting + self.tensor + self.reduction

    @property
    def total(self) -> float:
        return self.compute + self.exposed


def estimate_step(
    config: RunConfig,
    degrees: Degrees,
    cluster: Cluster,
    attention: Sequence[Mapping[Direction, Timeline]],
    tokens: int,
) -> StepEstimate:
    """In bf16. `attention` has the timelines of each layer's; `tokens` are those of a rank's micro-batch.

    Matrix products at `matrix_tflops`; element-wise passes and the optimizer by the bytes that they move, each tensor
    read or written once a function. Gradients and weights are exchanged after the backward pass (at ZeRO 2 and 3 beside
    it, which is not counted on). Copies of `memory.offload` are taken to be hidden.
    """
    model, train, tensor = config.model, config.train, degrees.tensor
    micro_batches = train.rows_per_step // (degrees.data * train.micro_batch_rows)
    layers = model.layers
    whole = layers if config.memory.recompute == "none" else config.memory.keep_layers_at_first
    again = layers - whole
    # The last layers are those that keep everything.
    attention_again = attention[:again] if config.memory.recompute == "full" else []
    timelines = [line for layer in attention for line in layer.values()]
    timelines += [layer["forward"] for layer in attention_again]

    query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
    hidden, inner = model.hidden_size, model.feed_forward_size
    weights = (2 * hidden * (query + key) + 3 * hidden * inner) // tensor
    projection = (model.vocabulary_size or 0) * hidden // tensor
    rate, bandwidth = 1e12 * cluster.matrix_tflops, 1e9 * cluster.memory_gigabytes_per_second
    linear = 2 * weights * tokens * (3 * layers + again) / rate
    # Two norms, two additions to the stream, rotary embeddings, and SwiGLU; backward twice as much.
    passes = 2 * (10 * hidden + (2 * (query + key) + 3 * inner) // tensor) * tokens / bandwidth
    # Of the logits: statistics, gradient, and the products that make and read them.
    logits = 4 * 2 * (model.vocabulary_size or 0) // tensor * tokens / bandwidth

    parameters = model.parameters() // tensor
    return StepEstimate(
        attention=micro_batches * sum(line.seconds - line.exposed_seconds for line in timelines),
        linear=micro_batches * linear,
        loss=micro_batches * (6 * projection * tokens / rate + logits),
        # Each micro-batch also adds bf16 gradients to fp32 ones.
        elementwise=micro_batches * ((3 * layers + again) * passes + 12 * parameters / bandwidth),
        # Gradient norm and clipping; master weights and moments are read and written.
        optimizer=(12 * parameters + 30 * parameters / degrees.shard) / bandwidth,
        waiting=micro_batches * sum(line.exposed_seconds for line in timelines),
        tensor=micro_batches * (4 * layers + 2 * again) * _all_reduce(2 * tokens * hidden, tensor, tensor, cluster),
        reduction=_reduction(config, degrees, cluster, parameters, micro_batches),
    )


def _all_reduce(bytes_: float, ranks: int, span: int, cluster: Cluster) -> float:
    """Over `ranks` that lie within `span` consecutive GPUs: everything goes round twice.

    Rings between nodes share the outer links of all GPUs of a node, unless each GPU is in a ring of its own.
    """
    bandwidth = cluster.inner.link.bytes_per_second
    if span > cluster.gpus_per_node:
        bandwidth = min(bandwidth, cluster.outer.link.bytes_per_second * cluster.gpus_per_node * ranks / span)
    return 2 * (ranks - 1) / ranks * bytes_ / bandwidth


def _reduction(config: RunConfig, degrees: Degrees, cluster: Cluster, parameters: int, micro_batches: int) -> float:
    """Gradients travel in fp32: an all-reduce a step at stages 0 and 1, half of one a micro-batch above.

    Weights come back in bf16, half an all-reduce: once a step, or at stage 3 twice a micro-batch.
    """
    stage, ranks = config.parallel.zero_stage, degrees.shard
    gradients = _all_reduce(4 * parameters, ranks, degrees.world, cluster)
    weights = _all_reduce(2 * parameters, ranks, degrees.world, cluster) / 2
    if stage == 0:
        return gradients
    if stage == 1:
        return gradients + weights
    return micro_batches * gradients / 2 + (2 * micro_batches if stage == 3 else 1) * weights
