"""Groups of layers whose KV lives differently: how long blocks are, and what of them a hit needs.

Pure arithmetic of tokens and block positions; docs/internals/hybrid.md has the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """One of vLLM's KV cache groups."""

    number: int
    """Its place among the engine's groups."""
    block_tokens: int
    window: int | None = None
    """How many tokens, itself included, a token looks at; None: all before it."""

    def needed_from(self, tokens: int) -> int:
        """Position of the first block that is needed to go on after so many tokens.

        >>> Group(0, 32).needed_from(192), Group(1, 32, window=64).needed_from(192)
        (0, 4)
        """
        if self.window is None:
            return 0
        return max(tokens - self.window + 1, 0) // self.block_tokens


class Groups:
    """All groups of an engine."""

    def __init__(self, groups: Sequence[Group], hash_tokens: int) -> None:
        self.all = tuple(groups)
        self.hash_tokens = hash_tokens
        self.hit_tokens = math.lcm(*(group.block_tokens for group in groups))
        """Hits end at multiples of this."""
        self.whole = tuple(group for group in groups if group.window is None)
        self.windowed = tuple(group for group in groups if group.window is not None)

    @classmethod
    def one(cls, block_tokens: int) -> Groups:
        """Full attention in all layers."""
        return cls([Group(0, block_tokens)], block_tokens)

    @property
    def fail_whole(self) -> bool:
        """Whether a load that lost a block is of no use at all."""
        return len(self.all) > 1 or bool(self.windowed)

    def known_tokens(self, chain: Sequence[bytes]) -> int:
        """Tokens that a chain of hashes covers."""
        return len(chain) * self.hash_tokens

    def hashes(self, group: Group, chain: Sequence[bytes], first: int, last: int) -> list[bytes]:
        """What blocks ``first`` to ``last`` (without it) of a group are named by.

        The hash at the end of a block covers everything before it.
        """
        scale = group.block_tokens // self.hash_tokens
        if scale == 1:
            return list(chain[first:last])
        return [chain[(position + 1) * scale - 1] for position in range(first, last)]
