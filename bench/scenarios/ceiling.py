"""What could have been found: the measure beside every hit rate."""

from __future__ import annotations

from collections.abc import Sequence


class Ceiling:
    """What an endless cache that loses nothing and costs no time would find of each prompt.

    Whole blocks only, never the prompt's last token (it is always computed), and of an answer all
    but the last token, whose KV nobody computed.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._known: set[tuple[int, ...]] = set()

    def tokens(self, prompt_ids: Sequence[int]) -> int:
        """Tokens of this prompt that are known."""
        whole = (len(prompt_ids) - 1) // self._block_tokens
        found = 0
        for chain in self._chains(prompt_ids, whole):
            if chain not in self._known:
                break
            found += self._block_tokens
        return found

    def learn(self, ids: Sequence[int]) -> None:
        """These tokens were computed, one after the other."""
        self._known.update(self._chains(ids, len(ids) // self._block_tokens))

    def _chains(self, ids: Sequence[int], blocks: int) -> list[tuple[int, ...]]:
        """A name for each leading block, which stands for all that is before it."""
        chains: list[tuple[int, ...]] = []
        before = 0
        for block in range(blocks):
            here = ids[block * self._block_tokens : (block + 1) * self._block_tokens]
            chains.append((block, before, hash(tuple(here))))
            before = hash(chains[-1])
        return chains
