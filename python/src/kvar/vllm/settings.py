"""What an operator can say in ``kv_connector_extra_config``, checked before anything starts.

| key                | default | meaning                                                      |
|--------------------|---------|--------------------------------------------------------------|
| endpoint           | needed  | ``host:port`` of a node                                      |
| namespace          | default | whose blocks these are                                       |
| namespace_key_file | needed  | key file of the namespace; the node writes one beside its data |
| mode               | load    | off, observe, save or load, see :class:`Mode`: the most that |
|                    |         | is done; the operator's ``kvar mode`` may ask for less       |
| deadline_ms        | 2000    | longest time one load or save may take before it is given up |
| lookup_deadline_ms | 20      | longest time the scheduler waits for a lookup                |
| lease_ms           | 2000    | how long what a lookup found stays unless it is renewed      |
| choice             | auto    | auto: load what comes sooner than it could be computed;      |
|                    |         | always: load all that is stored                              |
| traffic_class      | 0       | your number for this engine's traffic: 1, 2, and 3 and above |
|                    |         | are learned apart by the node; 0: not said                   |
| handover           | false   | another engine reads what this one saves once, soon          |
| load               | async   | async, or layers: each layer is waited for when it is used,  |
|                    |         | see :class:`LoadWay`                                         |
| save               | after   | after: once the step is over; layers: each layer as it is    |
|                    |         | computed, see :class:`SaveWay`                               |
| any_version        | false   | run under a vLLM that this was not tried with, too           |

An unknown key is an error: a misspelt one would otherwise be a silent default.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import kvar
from kvar.vllm.choice import Override

# A load of an 8k-token prompt of a mid-sized model is some hundred megabytes: a tenth of this on a
# good link. Past it, computing the prompt again is the better deal almost everywhere.
DEADLINE_MS_DEFAULT = 2_000

# The scheduler serves all requests, so it may not wait long for one. A healthy node answers in
# well under 1 ms; 20 ms outlast a context switch storm on a small machine.
LOOKUP_DEADLINE_MS_DEFAULT = 20

# Longer than any scheduler takes between two steps, in which it is renewed; what an engine that
# died keeps from others ends with it. The store gives no more than the half minute.
LEASE_MS_DEFAULT = 2_000
LEASE_MS_MAX = 30_000

# No setting of a deadline makes sense beyond a minute: the request would be gone.
DEADLINE_MS_MAX = 60_000

#: The number is one byte of a put.
TRAFFIC_CLASS_MAX = 255


Word = TypeVar("Word", bound=enum.Enum)


class Mode(enum.Enum):
    """How much the connector does. Each includes the one before it, save for loading."""

    OFF = "off"
    """Nothing at all; the connector is there and touches neither node nor cache."""
    OBSERVE = "observe"
    """Look up and count what would have been a hit; load and save nothing."""
    SAVE = "save"
    """Observe, and save what the engine computes; load nothing."""
    LOAD = "load"
    """Save and load: the normal way to run."""

    @property
    def looks_up(self) -> bool:
        """Whether the scheduler asks the node at all."""
        return self is not Mode.OFF

    @property
    def saves(self) -> bool:
        """Whether computed blocks go to the store."""
        return self in (Mode.SAVE, Mode.LOAD)

    @property
    def loads(self) -> bool:
        """Whether stored blocks come back."""
        return self is Mode.LOAD

    def within(self, other: Mode) -> Mode:
        """The one of the two that does less."""
        return min(self, other, key=list(Mode).index)


class LoadWay(enum.Enum):
    """How a request gets what is stored of its prompt."""

    ASYNC = "async"
    """It waits outside the batch until all of it is there; the others run on. The right way where
    several requests run: nobody but the request waits."""
    LAYERS = "layers"
    """It runs at once, and each layer's KV is waited for when that layer is computed. What hides
    the load is the compute of the same step (the rest of the prompt, and what others compute), and
    what does not fit under it the whole batch waits for: for one long request at a time. One rank
    (no tensor or pipeline parallelism), pages in host memory."""


class SaveWay(enum.Enum):
    """When what was computed is sent."""

    AFTER = "after"
    """As whole blocks, once the step is over: nothing is done for it while the engine computes."""
    LAYERS = "layers"
    """Each layer of the step's full blocks while the next ones are computed, so that a block is
    there soon after its step; visible all at once, or never. What there is no room for goes after
    the step. Pages in host memory."""


class SettingsError(kvar.ConfigError):
    """The connector cannot start like this; the message names the setting and what to write."""


@dataclass(frozen=True)
class Settings:
    """The checked settings of one connector."""

    endpoint: str
    namespace: str
    namespace_key_file: str
    mode: Mode
    deadline_ms: int
    lookup_deadline_ms: int
    lease_ms: int
    choice: Override
    traffic_class: int = 0
    handover: bool = False
    load: LoadWay = LoadWay.ASYNC
    save: SaveWay = SaveWay.AFTER
    any_version: bool = False

    @classmethod
    def from_extra_config(cls, extra: Mapping[str, Any]) -> Settings:
        """Reads ``kv_connector_extra_config``; raises :class:`SettingsError` on anything odd."""
        known = set(cls.__dataclass_fields__)
        unknown = sorted(set(extra) - known)
        if unknown:
            raise SettingsError(
                f"kv_connector_extra_config has unknown keys {', '.join(unknown)}; "
                f"the known ones are {', '.join(sorted(known))}"
            )
        return cls(
            endpoint=_text(extra, "endpoint", None),
            namespace=_text(extra, "namespace", "default"),
            namespace_key_file=_text(extra, "namespace_key_file", None),
            mode=_one_of(Mode, extra, "mode", Mode.LOAD),
            deadline_ms=_milliseconds(extra, "deadline_ms", DEADLINE_MS_DEFAULT),
            lookup_deadline_ms=_milliseconds(
                extra, "lookup_deadline_ms", LOOKUP_DEADLINE_MS_DEFAULT
            ),
            lease_ms=_milliseconds(extra, "lease_ms", LEASE_MS_DEFAULT, LEASE_MS_MAX),
            choice=_one_of(Override, extra, "choice", Override.AUTO),
            traffic_class=_traffic_class(extra),
            handover=_flag(extra, "handover"),
            load=_one_of(LoadWay, extra, "load", LoadWay.ASYNC),
            save=_one_of(SaveWay, extra, "save", SaveWay.AFTER),
            any_version=_flag(extra, "any_version"),
        )


def _one_of(kind: type[Word], extra: Mapping[str, Any], name: str, default: Word) -> Word:
    word = extra.get(name, default.value)
    try:
        return kind(word)
    except ValueError:
        words = ", ".join(one.value for one in kind)
        raise SettingsError(f"{name} is {word!r}; write one of {words}") from None


def _text(extra: Mapping[str, Any], name: str, default: str | None) -> str:
    value = extra.get(name, default)
    if isinstance(value, str) and value:
        return value
    if value is None:
        raise SettingsError(f"kv_connector_extra_config needs {name}")
    raise SettingsError(f"{name} is {value!r}; write a text that is not empty")


def _traffic_class(extra: Mapping[str, Any]) -> int:
    value = extra.get("traffic_class", 0)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= TRAFFIC_CLASS_MAX:
        raise SettingsError(
            f"traffic_class is {value!r}; write your number for this engine's traffic, "
            f"1 to {TRAFFIC_CLASS_MAX}, or 0 for none"
        )
    return value


def _flag(extra: Mapping[str, Any], name: str) -> bool:
    value = extra.get(name, False)
    if not isinstance(value, bool):
        raise SettingsError(f"{name} is {value!r}; write true or false")
    return value


def _milliseconds(
    extra: Mapping[str, Any], name: str, default: int, most: int = DEADLINE_MS_MAX
) -> int:
    value = extra.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise SettingsError(f"{name} is {value!r}; write whole milliseconds from 1 to {most}")
    return value
