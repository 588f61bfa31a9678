"""The keys and values that a rank keeps of what was read."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """Of one layer, `[1, tokens, kv heads, D]`, rotated; in no certain order, since what comes later sees them all."""

    def __init__(self) -> None:
        self.tokens = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Room is made for an eighth more than is needed, so that decoding does not copy the cache at every token."""
        needed = self.tokens + keys.shape[1]
        if self._keys is None or self._values is None or needed > self._keys.shape[1]:
            room = needed if self._keys is None else needed + needed // 8 + 64
            self._keys, self._values = self._moved(self._keys, keys, room), self._moved(self._values, values, room)
        self._keys[:, self.tokens : needed] = keys
        self._values[:, self.tokens : needed] = values
        self.tokens = needed

    def read(self) -> tuple[Tensor, Tensor]:
        assert self._keys is not None, "nothing was appended yet"
        assert self._values is not None
        return self._keys[:, : self.tokens], self._values[:, : self.tokens]

    def _moved(self, held: Tensor | None, like: Tensor, room: int) -> Tensor:
        buffer = torch.empty(like.shape[0], room, *like.shape[2:], dtype=like.dtype, device=like.device)
        if held is not None:
            buffer[:, : self.tokens] = held[:, : self.tokens]
        return buffer
