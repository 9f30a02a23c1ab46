"""Why a prompt's tokens were no hit: each token of it is booked once, where it ended.

```text
prompt --> full_blocks --> looked_up --> present --> chosen --> loaded --> used
   |            |              |            |           |          |         |
   |            +--> local     |            |           |          |         +- lost: aborted
   |                           |            |           |          +- lost: corrupt, deadline, ...
   |                           |            |           +- lost: recompute, too_late, mode, ...
   |                           |            +- lost: absent
   |                           +- lost: mode_off, opted_out, store_away, lookup_deadline, ...
   +- lost: partial_block
```

| stage | tokens |
|---|---|
| prompt | of a request that the engine admitted: all it knew of it then |
| full_blocks | in full blocks, without the last token, which is always computed |
| local | of those, what the engine's own cache had |
| looked_up | of the rest, what the store answered about |
| present | what it had |
| chosen | what was ordered to be loaded |
| loaded | what came, whole |
| used | what the request then ran on |

What must always be true: a stage's tokens are those of the next and those lost on the way to it
(``local`` is nobody's loss), so that ``prompt == local + used + all losses``. A request is booked
when its fate is known and not before, all at once, so that this holds in every reading. One that is
never admitted is never booked; one that is preempted goes through again, with its answer so far.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvar.vllm.metrics import Counters

STAGES = ("prompt", "full_blocks", "local", "looked_up", "present", "chosen", "loaded", "used")
_PLACE = {stage: place for place, stage in enumerate(STAGES)}


@dataclass
class Account:
    """One admission of one request."""

    prompt: int
    full_blocks: int
    local: int
    again: bool
    left: int
    """Tokens that are still on their way."""
    stage: str = "local"
    ordered: bool = False
    """Its load was ordered: it has been admitted."""
    reached: dict[str, int] = field(default_factory=dict)
    lost: dict[tuple[str, str], int] = field(default_factory=dict)


class Funnel:
    """The accounts of all requests that wait, load, or were just admitted."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._open: dict[str, Account] = {}
        self._booked: set[str] = set()

    def begin(self, request_id: str, prompt: int, full_blocks: int, local: int) -> None:
        """The engine asks about a request; the last time before its admission counts.

        One whose load failed altogether is asked about again, and stays where it was lost.
        """
        account = self._open.get(request_id)
        if account is not None and _PLACE[account.stage] >= _PLACE["loaded"]:
            return
        full_blocks = min(full_blocks, prompt)
        local = min(local, full_blocks)
        again = request_id in self._booked
        self._open[request_id] = Account(prompt, full_blocks, local, again, full_blocks - local)

    def to(self, request_id: str, stage: str, tokens: int, reason: str) -> None:
        """Of what is left, so many tokens come to this stage; the others are lost for a reason."""
        account = self._open.get(request_id)
        if account is None or _PLACE[stage] < _PLACE[account.stage]:
            return
        kept = max(min(tokens, account.left), 0)
        if kept < account.left:
            lost = account.lost.get((stage, reason), 0)
            account.lost[stage, reason] = lost + account.left - kept
        account.left = account.reached[stage] = kept
        account.stage = stage

    def ordered(self, request_id: str, tokens: int) -> None:
        """The engine has pages for so many of the tokens it was offered, and waits for them."""
        self.to(request_id, "chosen", tokens, "declined")
        account = self._open.get(request_id)
        if account is not None:
            account.ordered = True

    def book(self, request_id: str) -> None:
        """The request runs: what is left is used."""
        account = self._open.get(request_id)
        if account is None:
            return
        if not account.ordered:
            self.to(request_id, "chosen", 0, "declined")
        del self._open[request_id]
        self._booked.add(request_id)
        stages = {"prompt": account.prompt, "full_blocks": account.full_blocks}
        stages["local"] = account.local
        for stage in STAGES[_PLACE["looked_up"] :]:
            stages[stage] = account.reached.get(stage, account.left)
        for stage, tokens in stages.items():
            self._counters.add("funnel_tokens", tokens, stage)
        partial = account.prompt - account.full_blocks
        self._counters.add("lost_tokens", partial, "full_blocks", "partial_block")
        for (stage, reason), tokens in account.lost.items():
            self._counters.add("lost_tokens", tokens, stage, reason)
        if account.again:
            self._counters.add("readmitted_tokens", account.prompt)

    def finished(self, request_id: str) -> None:
        """The request has ended: one that had begun to load is booked, one that waited is not."""
        account = self._open.get(request_id)
        if account is not None and account.ordered:
            self.to(request_id, "loaded" if account.stage == "chosen" else "used", 0, "aborted")
            self.book(request_id)
        self._open.pop(request_id, None)
        self._booked.discard(request_id)
