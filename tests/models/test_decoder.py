"""The decoder equals a plain fp64 one, whatever mesh carries it out."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import Tensor

from farspan.kernels import masks
from farspan.models.config import ModelConfig
from farspan.models.decoder import Decoder, DecoderInput
from farspan.models.layers import Sharding
from farspan.parallel import orders, plans
from farspan.parallel.degrees import Degrees
from farspan.parallel.mesh import Mesh
from farspan.parallel.prepare import prepare

pytestmark = pytest.mark.distributed

LENGTH, VOCABULARY, LAYERS = 45, 66, 2
# Odd documents: one of a single token, other ones in each row, and none at all that a context rank's share divides.
DOCUMENTS = ([0, 1, 20, 45], [0, 7, 8, 33, 45])
# How many tokens a token of each layer sees, itself included.
WINDOWS = (9, LENGTH)
# Which dim of a weight tensor ranks divide; the others are whole on each.
ROWS_DIVIDED = ("query", "key", "value", "gate", "up", "projection", "embedding")
COLUMNS_DIVIDED = ("out", "down")


def model_config(extras: bool, tied: bool) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "vocabulary_size": VOCABULARY,
            "hidden_size": 32,
            "layers": LAYERS,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 8,
            "feed_forward_size": 48,
            "qkv_bias": extras,
            "qk_norm": extras,
            "tied_embeddings": tied,
            "rotary_theta": 500.0,
            "norm_epsilon": 1e-2,  # large enough to be seen
        }
    )


def whole_weights(config: ModelConfig) -> dict[str, Tensor]:
    """Every weight as one matrix, fp32, by its name in the decoder's state; norms and biases are no ones and zeros."""
    hidden, inner = config.hidden_size, config.feed_forward_size
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (VOCABULARY, hidden), "norm.weight": (hidden,)}
    if not config.tied_embeddings:
        shapes["projection.weight"] = (VOCABULARY, hidden)
    for i in range(config.layers):
        attention, feed_forward = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        shapes |= {f"{attention}_norm.weight": (hidden,), f"{feed_forward}_norm.weight": (hidden,)}
        for name, size in (("query", query), ("key", key), ("value", key)):
            shapes[f"{attention}.{name}.weight"] = (size, hidden)
            if config.qkv_bias:
                shapes[f"{attention}.{name}.bias"] = (size,)
        if config.qk_norm:
            shapes |= {f"{attention}.{name}_norm.weight": (config.head_dim,) for name in ("query", "key")}
        shapes |= {f"{attention}.out.weight": (hidden, query), f"{feed_forward}.down.weight": (hidden, inner)}
        shapes |= {f"{feed_forward}.{name}.weight": (inner, hidden) for name in ("gate", "up")}
    weights = {}
    for number, (name, shape) in enumerate(shapes.items()):
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        weights[name] = 1 + 0.3 * drawn if "norm" in name else 0.2 * drawn
    return weights


def divided_dim(name: str) -> int | None:
    module, kind = name.split(".")[-2:]
    if module in ROWS_DIVIDED:
        return 0
    return 1 if module in COLUMNS_DIVIDED and kind == "weight" else None


def share(name: str, whole: Tensor, tensor: int, rank: int) -> Tensor:
    """What one tensor rank holds of a weight, or of its gradient."""
    dim = divided_dim(name)
    return whole if dim is None else whole.chunk(tensor, dim)[rank]


def text() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and rotary positions of both rows; every fifth label is missing, as is each document's last."""
    generator = torch.Generator().manual_seed(99)
    tokens = torch.randint(0, VOCABULARY, (len(DOCUMENTS), LENGTH), generator=generator)
    labels, positions = torch.full_like(tokens, -100), torch.zeros_like(tokens)
    for row, documents in enumerate(DOCUMENTS):
        for begin, end in pairwise(documents):
            labels[row, begin : end - 1] = tokens[row, begin + 1 : end]
            positions[row, begin:end] = torch.arange(end - begin)
    labels[:, ::5] = -100
    return tokens, labels, positions


# The plain decoder: fp64, dense, one matrix of who sees whom, nothing shared with the package.


def plain_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight


def plain_rotary(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """`[B, S, H, D]`: component i is turned with component i + D/2 by position / theta^(2i/D)."""
    half = x.shape[-1] // 2
    turned = torch.empty_like(x)
    for i in range(half):
        angle = (positions.double() / theta ** (2 * i / x.shape[-1]))[:, :, None]
        a, b = x[..., i], x[..., i + half]
        turned[..., i] = a * angle.cos() - b * angle.sin()
        turned[..., i + half] = b * angle.cos() + a * angle.sin()
    return turned


def plain_attention(
    config: ModelConfig, w: dict[str, Tensor], at: str, x: Tensor, positions: Tensor, window: int
) -> Tensor:
    def heads(name: str) -> Tensor:
        projected = x @ w[f"{at}.{name}.weight"].T
        if config.qkv_bias:
            projected = projected + w[f"{at}.{name}.bias"]
        projected = projected.reshape(*x.shape[:2], -1, config.head_dim)
        if config.qk_norm and name != "value":
            projected = plain_norm(projected, w[f"{at}.{name}_norm.weight"], config.norm_epsilon)
        return plain_rotary(projected, positions, config.rotary_theta) if name != "value" else projected

    q, k, v = heads("query"), heads("key"), heads("value")
    which = torch.zeros(len(DOCUMENTS), LENGTH)
    for row, documents in enumerate(DOCUMENTS):
        for begin in documents[1:-1]:
            which[row, begin:] += 1
    near = torch.ones(LENGTH, LENGTH).tril().bool() & ~torch.ones(LENGTH, LENGTH).tril(-window).bool()
    seen = (which[:, :, None] == which[:, None, :]) & near
    out = torch.zeros_like(q)
    for head in range(config.heads):
        kv_head = head // (config.heads // config.kv_heads)
        scores = q[:, :, head] @ k[:, :, kv_head].transpose(1, 2) / math.sqrt(config.head_dim)
        out[:, :, head] = torch.softmax(scores.masked_fill(~seen, -math.inf), -1) @ v[:, :, kv_head]
    return out.flatten(2) @ w[f"{at}.out.weight"].T


def plain_losses(config: ModelConfig, w: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of every token of `text()`, `[B, S]`, 0 where there is no label."""
    tokens, labels, positions = text()
    x = w["embedding.weight"][tokens]
    for i in range(config.layers):
        at = f"layers.{i}"
        normed = plain_norm(x, w[f"{at}.attention_norm.weight"], config.norm_epsilon)
        x = x + plain_attention(config, w, f"{at}.attention", normed, positions, WINDOWS[i])
        normed = plain_norm(x, w[f"{at}.feed_forward_norm.weight"], config.norm_epsilon)
        gate, up = (normed @ w[f"{at}.feed_forward.{name}.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ w[f"{at}.feed_forward.down.weight"].T
    projection = w["embedding.weight"] if config.tied_embeddings else w["projection.weight"]
    log_probabilities = torch.log_softmax(plain_norm(x, w["norm.weight"], config.norm_epsilon) @ projection.T, -1)
    chosen = log_probabilities.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels == -100, 0.0, -chosen)


def compare(
    rank: int, world: int, context: int, tensor: int, extras: bool, tied: bool, order_name: str, plan_name: str
) -> dict[str, float]:
    """By name: the largest difference to the plain decoder, relative to the largest value; losses and gradients."""
    config = model_config(extras, tied)
    whole = {name: weight.double().requires_grad_() for name, weight in whole_weights(config).items()}
    expected_losses = plain_losses(config, whole)
    expected_losses.sum().backward()

    mesh = Mesh.create(Degrees(world // (context * tensor), context, tensor), torch.device("cpu"))
    try:
        model = Decoder(config, Sharding(tensor), loss_chunk_tokens=7)
        parameters = dict(model.named_parameters())
        assert parameters.keys() == whole.keys()
        for name, parameter in parameters.items():
            parameter.data.copy_(share(name, whole[name].detach(), tensor, mesh.tensor_rank))
        order = orders.build(order_name, LENGTH, context, stripe=4)
        heads = config.heads // tensor, config.kv_heads // tensor
        prepared = []
        for window in WINDOWS:
            mask = masks.stack(masks.sliding_window(LENGTH, window, 0, documents) for documents in DOCUMENTS)
            plan = plans.build(plan_name, order, mask, heads)
            prepared.append(prepare(plan, order, mask, mesh.context_rank))
        tokens, labels, positions = text()
        batch = DecoderInput(
            tokens=order.shard(tokens, mesh.context_rank),
            labels=order.shard(labels, mesh.context_rank, padding=-100),
            rotary_positions=order.shard(positions, mesh.context_rank),
            plans=prepared,
            group=mesh.context,
        )
        total, losses = model(batch)
        assert losses.dtype == torch.float32
        assert total.item() == losses.double().sum().item()
        total.backward()
        parts = [torch.empty_like(losses) for _ in range(context)]
        dist.all_gather(parts, losses, group=mesh.context)
        differences = {"losses": relative(order.unshard(parts), expected_losses)}
        for name, parameter in parameters.items():
            assert parameter.grad is not None, name
            dist.all_reduce(parameter.grad, group=mesh.context)
            wanted = whole[name].grad
            assert wanted is not None
            # A weight that is whole on each tensor rank must have the whole gradient there, without further sums.
            differences[name] = relative(parameter.grad, share(name, wanted, tensor, mesh.tensor_rank))
        return differences
    finally:
        mesh.destroy()


def relative(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("extras", [True, False], ids=["bias-and-norms", "plain"])
@pytest.mark.parametrize(
    ("context", "tensor", "order", "plan"),
    [
        (1, 1, "contiguous", "single"),
        (1, 2, "zigzag", "ring"),
        (2, 1, "zigzag", "ring"),
        (2, 2, "striped", "ring"),
        (2, 2, "zigzag", "all_gather"),
    ],
)
def test_losses_and_gradients_equal_the_plain_decoder(
    pool: Pool, context: int, tensor: int, order: str, plan: str, extras: bool, tied: bool
) -> None:
    for differences in pool.run(context * tensor, compare, context, tensor, extras, tied, order, plan):
        assert {name: value for name, value in differences.items() if not value < 1e-5} == {}


def initial_weights(rank: int, world: int, tensor: int, seed: int) -> dict[str, Tensor]:
    mesh = Mesh.create(Degrees(world // tensor, 1, tensor), torch.device("cpu"))
    try:
        model = Decoder(model_config(extras=True, tied=False), Sharding(tensor, seed=seed))
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    finally:
        mesh.destroy()


def test_initial_weights_do_not_depend_on_the_tensor_degree(pool: Pool) -> None:
    alone, other = pool.run(2, initial_weights, 1, 7)
    for name, weight in alone.items():
        assert torch.equal(weight, other[name]), name
    for rank, shared in enumerate(pool.run(2, initial_weights, 2, 7)):
        assert shared.keys() == alone.keys()
        for name, weight in shared.items():
            assert torch.equal(weight, share(name, alone[name], 2, rank)), name


def test_initial_weights_have_the_published_scale(pool: Pool) -> None:
    """Each is drawn for itself from the seed; outputs into the residual stream are smaller by sqrt(2 x layers)."""
    (weights,) = pool.run(1, initial_weights, 1, 7)
    (again,) = pool.run(1, initial_weights, 1, 8)
    matrices = {name: weight for name, weight in weights.items() if weight.dim() == 2}
    digests = {hashlib.sha256(weight.flatten()[:64].numpy().tobytes()).hexdigest() for weight in matrices.values()}
    assert len(digests) == len(matrices)
    for name, weight in weights.items():
        if weight.dim() == 2:
            std = 0.02 / math.sqrt(2 * LAYERS) if divided_dim(name) == 1 else 0.02
            assert float(weight.std()) == pytest.approx(std, rel=0.15), name
            assert not torch.equal(weight, again[name]), name
        else:
            assert bool((weight == ("norm" in name)).all()), name


def refusals(rank: int, world: int) -> list[str]:
    mesh = Mesh.create(Degrees(1, 1, 1), torch.device("cpu"))
    messages = []
    try:
        for config, tensor in (
            (model_config(True, True).model_copy(update={"vocabulary_size": None}), 1),
            (model_config(True, True), 4),
        ):
            try:
                Decoder(config, Sharding(tensor))
            except ValueError as error:
                messages.append(str(error))
    finally:
        mesh.destroy()
    return messages


def test_impossible_decoders_are_refused(pool: Pool) -> None:
    assert pool.run(1, refusals) == [
        [
            "a decoder needs model.vocabulary_size",
            "model.kv_heads 2 is not a multiple of parallel.tensor 4",
        ]
    ]


def parameter_counts(rank: int, world: int) -> list[tuple[int, int]]:
    mesh = Mesh.create(Degrees(1, 1, 1), torch.device("cpu"))
    try:
        counts = []
        for extras in (True, False):
            for tied in (True, False):
                config = model_config(extras, tied)
                counts.append((config.parameters(), sum(p.numel() for p in Decoder(config, Sharding()).parameters())))
        return counts
    finally:
        mesh.destroy()


def test_the_stated_number_of_parameters_is_that_of_a_real_decoder(pool: Pool) -> None:
    (counts,) = pool.run(1, parameter_counts)
    assert len({built for _, built in counts}) == 4
    for stated, built in counts:
        assert stated == built
