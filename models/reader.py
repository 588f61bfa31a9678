"""A decoder that reads, scores and continues a text whose cache the context ranks share; no gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.kernels import IntervalMask
from farspan.models.attention import Attending
from farspan.models.cache import LayerCache
from farspan.models.decoder import Decoder
from farspan.models.prefill import Share
from farspan.models.rotary import Rotation, rotation
from farspan.parallel.execute import attention
from farspan.parallel.mesh import Mesh
from farspan.parallel.shared_keys import attend_shared_keys


class Reader:
    """First `prefill` a text, divided over the context ranks. Then `read`, `score` or `decode` what follows it.

    What follows sees everything before it. It is computed on all ranks alike; its keys and values go into the cache of
    the last rank, and every rank keeps those of its own share of the text. All methods are collective.
    """

    def __init__(self, model: Decoder, mesh: Mesh) -> None:
        if model.sharding.sequence_parallel:
            raise ValueError("one token cannot be divided over tensor ranks: set parallel.sequence_parallel to false")
        self.model, self.mesh = model, mesh
        self.caches = [LayerCache() for _ in model.layers]
        self.length = self._prefilled = 0
        self._last: Tensor | None = None  # [1, hidden], of the last token that was read
        self._grows = mesh.context_rank == mesh.degrees.context - 1

    @torch.no_grad()
    def prefill(self, tokens: Sequence[int], share: Share) -> None:
        """Reads the beginning of a text, at least one token, once."""
        if self.length or not len(tokens) or len(tokens) != share.length:
            raise ValueError(f"a reader begins with all {share.length} tokens of its share, not {len(tokens)} of them")
        device = self.mesh.device
        positions = torch.from_numpy(share.positions).to(device)
        kept = torch.from_numpy(share.kept).to(device)
        text = torch.as_tensor(tokens, dtype=torch.int64).to(device)
        turn = rotation(positions[None], self.model.frequencies)
        contexts = [_Prefilling(turn, share, kept, cache, self.model.backend) for cache in self.caches]
        x = self._through_layers(text[positions.clamp(max=len(text) - 1)], contexts)
        at = share.kept[share.positions[share.kept] == len(text) - 1]  # on one rank
        last = x[at.tolist()].sum(0, keepdim=True)
        dist.all_reduce(last, group=self.mesh.context)
        self._last, self.length, self._prefilled = last, len(text), len(text)

    @torch.no_grad()
    def read(self, tokens: Sequence[int]) -> Tensor:
        """Reads on; the hidden states `[tokens, hidden]` behind the last layer."""
        device, count = self.mesh.device, len(tokens)
        positions = torch.arange(self.length, self.length + count, device=device)
        held = self.caches[0].tokens
        end = torch.full((1, count), held, device=device)
        if self._grows:
            end += torch.arange(1, count + 1, device=device)
        begin = torch.zeros_like(end)
        mask = IntervalMask(begin, end, begin, begin)
        turn = rotation(positions[None], self.model.frequencies)
        contexts = [
            _Reading(turn, mask, self._grows, cache, self.mesh.context, self.model.backend) for cache in self.caches
        ]
        x = self._through_layers(torch.as_tensor(tokens, dtype=torch.int64).to(device), contexts)
        self._last, self.length = x[-1:], self.length + count
        return x

    def back_to(self, length: int) -> None:
        """Forgets what was read behind the first `length` tokens, which are those of `prefill` at least."""
        if not self._prefilled <= length <= self.length:
            raise ValueError(f"a reader goes back to {self._prefilled} to {self.length} tokens, not to {length}")
        if self._grows:
            for cache in self.caches:
                cache.tokens -= self.length - length
        self.length, self._last = length, None

    @torch.no_grad()
    def score(self, tokens: Sequence[int]) -> Tensor:
        """Reads on; the log-probability `[tokens]` of each token after all that is before it."""
        before = self._before()
        hidden = torch.cat([before, self.read(tokens)[:-1]])
        labels = torch.as_tensor(tokens, dtype=torch.int64).to(self.mesh.device)
        _, losses = self.model.loss(self.model.norm(hidden), self.model.output_weight, labels)
        return -losses

    @torch.no_grad()
    def next_logits(self) -> Tensor:
        """Of the token that comes next, `[vocabulary]`."""
        logits = (self.model.norm(self._before()) @ self.model.output_weight.T)[0]
        parts = [torch.empty_like(logits) for _ in range(self.mesh.degrees.tensor)]
        dist.all_gather(parts, logits, group=self.mesh.tensor)
        return torch.cat(parts)

    def decode(
        self, limit: int, temperature: float = 0.0, generator: torch.Generator | None = None, stop: int | None = None
    ) -> Iterator[int]:
        """Up to `limit` tokens, one by one, not including `stop`: the likeliest ones at temperature 0, else drawn.

        The first context rank decides, so that rounding and generators of the others do not matter. The last token that
        is given out was not read.
        """
        token = None
        for _ in range(limit):
            if token is not None:
                self.read([token])
            token = self._choose(temperature, generator)
            if token == stop:
                return
            yield token

    def _choose(self, temperature: float, generator: torch.Generator | None) -> int:
        logits = self.next_logits().float()
        if temperature == 0:
            chosen = logits.argmax()[None]
        else:
            probabilities = torch.softmax(logits / temperature, -1).cpu()
            chosen = torch.multinomial(probabilities, 1, generator=generator).to(logits.device)
        dist.broadcast(chosen, dist.get_global_rank(self.mesh.context, 0), self.mesh.context)
        return int(chosen)

    def _through_layers(self, tokens: Tensor, contexts: Sequence[Attending]) -> Tensor:
        x: Tensor = self.model.embedding(tokens)
        for layer, context in zip(self.model.layers, contexts, strict=True):
            x = layer(x, context)
        return x

    def _before(self) -> Tensor:
        if self._last is None:
            raise ValueError("nothing was read, or not since the reader went back, so nothing can follow it")
        return self._last


@dataclass(frozen=True, eq=False)
class _Prefilling:
    """One layer's attention while the context ranks share the rows."""

    rotation: Rotation
    share: Share
    kept: Tensor
    cache: LayerCache
    backend: str

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache.append(k[:, self.kept], v[:, self.kept])
        out, _ = attention(q, k, v, self.share.plan, self.share.group, backend=self.backend)
        return out


@dataclass(frozen=True, eq=False)
class _Reading:
    """One layer's attention while all ranks have the same rows and share the keys."""

    rotation: Rotation
    mask: IntervalMask
    grows: bool
    cache: LayerCache
    group: dist.ProcessGroup
    backend: str

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.grows:
            self.cache.append(k, v)
        return attend_shared_keys(q, *self.cache.read(), self.mask, self.group, self.backend)
