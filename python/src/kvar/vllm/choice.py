"""Load or compute: whether what is stored comes sooner than the engine could compute it again.

```text
   scheduler: tokens and seconds of each step  --> tokens computed a second --+
   workers:   tokens and seconds of loads      --> tokens loaded a second   --+--> Choice.tokens()
   scheduler: tokens ordered and not there yet --> the queue                --+

   load takes     LOAD_START_S + (queue + tokens) / loaded a second
   compute takes  tokens / computed a second
```

Loading pays for a long prefix before it pays for a short one (it has a price to begin with), and
no load is worth more than what arrives by its deadline: a longer one is cut to that.

What must always be true:
* until both speeds are known everything is loaded: that is what the store is for, and how the
  speed of loading becomes known;
* a choice is not turned over by noise: the other way must be better by ``ADVANTAGE``;
* one eligible request in ``EXPLORE_EVERY`` loads whatever was chosen, or a link that was slow once
  would never be asked again.

Computing gets slower a token the longer the prompt is, which is left out: it speaks for loading
where this says so anyway.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

# To switch, the other way must be better by a fifth: speeds are estimates of a busy machine.
ADVANTAGE = 1.2

# One request in so many loads regardless. 2 % of requests pay for knowing.
EXPLORE_EVERY = 50

# What a load takes before its first byte: two steps of hand-over and the store's answer.
LOAD_START_S = 0.002

# Share of the newest observation in a speed. A burst of ten is forgotten after some thirty.
NEWEST_SHARE = 0.1

# A step tells how fast prompts are computed if at least so many of its tokens were of prompts:
# fewer, and it measures the fixed price of a step.
STEP_TOKENS_MIN = 64

# Of a deadline so much is planned with: a load that just misses it is worth nothing.
DEADLINE_SHARE = 0.5


class Override(enum.Enum):
    """What an operator may decide instead."""

    AUTO = "auto"
    """Load what comes sooner than it could be computed."""
    ALWAYS = "always"
    """Load all that is stored."""


@dataclass
class Speed:
    """Tokens a second, as seen lately."""

    tokens_a_s: float = 0.0

    def see(self, tokens: float, seconds: float) -> None:
        """Takes in one observation; the later ones count more."""
        if tokens <= 0 or seconds <= 0:
            return
        # Averaged by time a token, so that a stall weighs as long as it took.
        newest = seconds / tokens
        if self.tokens_a_s:
            newest = (1 - NEWEST_SHARE) / self.tokens_a_s + NEWEST_SHARE * newest
        self.tokens_a_s = 1 / newest


@dataclass(frozen=True)
class Chosen:
    """What to do with a stored prefix."""

    tokens: int
    """How many of its tokens to load."""
    explores: bool = False
    """Loaded against the choice, to know."""
    computes: bool = False
    """None of them, since computing is sooner; otherwise the rest would come too late."""


class Choice:
    """What was seen of both ways, and the decision. Belongs to the scheduler."""

    def __init__(self, *, override: Override, deadline_s: float) -> None:
        self._override = override
        self._deadline_s = deadline_s
        self.loading = Speed()
        self.computing = Speed()
        self.queued_tokens = 0
        """Ordered and not there yet."""
        self._computes = False
        self._eligible = 0
        self._next_step = 0
        self._begun: dict[int, tuple[float, int]] = {}
        self._ended = float("-inf")

    def step_began(self, now: float, prompt_tokens: int, all_tokens: int) -> int:
        """A step of so many tokens goes to the workers: its number if its end is of interest, or 0.

        One that also brings other requests' answers forward takes longer for it, which is the
        price of computing a prompt on this engine; only steps that are mostly prompt count.
        """
        if prompt_tokens < STEP_TOKENS_MIN or 2 * prompt_tokens < all_tokens:
            return 0
        self._next_step += 1
        self._begun[self._next_step] = (now, prompt_tokens)
        return self._next_step

    def step_ended(self, now: float, number: int) -> tuple[int, float]:
        """A step has ended, the one of this number if it has one: its tokens and seconds."""
        # An engine that schedules ahead begins a step before the one before has ended.
        before, self._ended = self._ended, now
        began, tokens = self._begun.pop(number, (now, 0))
        # Steps end in order: those before, if they are still here, were never run.
        self._begun = {later: step for later, step in self._begun.items() if later > number}
        seconds = now - max(began, before)
        self.computing.see(tokens, seconds)
        return (tokens, seconds) if tokens else (0, 0.0)

    def loaded(self, tokens: float, seconds: float) -> None:
        """So many tokens were loaded in so much time in which loads were under way."""
        self.loading.see(tokens, seconds)

    def load_s(self, tokens: int) -> float:
        """Seconds until so many tokens would be there; 0 if that is not known."""
        if not self.loading.tokens_a_s:
            return 0.0
        return LOAD_START_S + (self.queued_tokens + tokens) / self.loading.tokens_a_s

    def compute_s(self, tokens: int) -> float:
        """Seconds that computing them takes; 0 if that is not known."""
        return tokens / self.computing.tokens_a_s if self.computing.tokens_a_s else 0.0

    def choose(self, tokens: int, block_tokens: int) -> Chosen:
        """How many of ``tokens`` stored ones, whole blocks from the first, are to be loaded."""
        if tokens <= 0 or self._override is Override.ALWAYS:
            return Chosen(max(tokens, 0))
        load_s, compute_s = self.load_s(tokens), self.compute_s(tokens)
        if not load_s or not compute_s:
            return Chosen(tokens)
        self._eligible += 1
        if self._computes:
            self._computes = load_s * ADVANTAGE > compute_s
        else:
            self._computes = load_s > compute_s * ADVANTAGE
        if self._computes:
            if self._eligible % EXPLORE_EVERY:
                return Chosen(0, computes=True)
            return Chosen(max(self._in_time(tokens, block_tokens), block_tokens), explores=True)
        return Chosen(self._in_time(tokens, block_tokens))

    def _in_time(self, tokens: int, block_tokens: int) -> int:
        """As many as arrive well before a load is given up."""
        left_s = self._deadline_s * DEADLINE_SHARE - LOAD_START_S
        most = int(left_s * self.loading.tokens_a_s) - self.queued_tokens
        return min(tokens, max(most // block_tokens, 0) * block_tokens)
