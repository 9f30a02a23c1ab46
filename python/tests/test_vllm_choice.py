"""Load or compute: the choice alone."""

from __future__ import annotations

import pytest

from kvar.vllm.choice import ADVANTAGE, Choice, Override

BLOCK = 16


def choice(
    *, computed_a_s: float = 0, loaded_a_s: float = 0, override: Override = Override.AUTO
) -> Choice:
    made = Choice(override=override, deadline_s=1000.0)
    if computed_a_s:
        made.computing.see(computed_a_s, 1.0)
    if loaded_a_s:
        made.loading.see(loaded_a_s, 1.0)
    return made


def test_everything_is_loaded_until_both_speeds_are_known() -> None:
    assert choice().choose(160, BLOCK).tokens == 160
    assert choice(computed_a_s=1e9).choose(160, BLOCK).tokens == 160
    assert choice(loaded_a_s=1).choose(160, BLOCK).tokens == 160


def test_a_long_prefix_pays_where_a_short_one_does_not() -> None:
    made = choice(computed_a_s=10_000, loaded_a_s=1_000_000)
    assert made.choose(16, BLOCK).tokens == 0
    assert made.choose(1600, BLOCK).tokens == 1600


def test_speeds_that_change_by_less_than_a_fifth_turn_nothing_over() -> None:
    # Without the price of a start that would blur it.
    tokens = 1 << 20
    made = choice(computed_a_s=1000, loaded_a_s=1000 / (ADVANTAGE * 0.95))
    assert made.choose(tokens, BLOCK).tokens > 0
    made.loading.tokens_a_s = 1000 / (ADVANTAGE * 1.05)
    assert made.choose(tokens, BLOCK).tokens == 0
    made.loading.tokens_a_s = 1000 * ADVANTAGE * 0.95
    assert made.choose(tokens, BLOCK).tokens == 0
    made.loading.tokens_a_s = 1000 * ADVANTAGE * 1.05
    assert made.choose(tokens, BLOCK).tokens > 0


def test_an_operator_may_have_everything_loaded() -> None:
    made = choice(computed_a_s=1e9, loaded_a_s=1, override=Override.ALWAYS)
    assert made.choose(160, BLOCK).tokens == 160


def test_where_nothing_can_arrive_in_time_nothing_is_loaded() -> None:
    made = choice(computed_a_s=0.001, loaded_a_s=1)
    made.queued_tokens = 10_000
    assert made.choose(160, BLOCK).tokens == 0


def test_the_speed_of_computing_is_that_of_steps_that_are_mostly_prompt() -> None:
    made = choice()
    # Other requests' answers alone say nothing about prompts.
    assert made.step_began(0.0, 0, 500) == 0
    assert made.step_began(0.0, 100, 500) == 0
    number = made.step_began(0.0, 400, 500)
    made.step_ended(2.0, number)
    assert made.computing.tokens_a_s == pytest.approx(200)


def test_a_step_scheduled_ahead_is_timed_from_the_end_of_the_one_before() -> None:
    made = choice()
    first = made.step_began(0.0, 400, 400)
    second = made.step_began(0.1, 400, 400)
    made.step_ended(2.0, first)
    assert made.step_ended(4.0, second) == (400, 2.0)


def test_a_step_that_was_never_run_is_forgotten() -> None:
    made = choice()
    lost = made.step_began(0.0, 400, 400)
    number = made.step_began(10.0, 400, 400)
    assert made.step_ended(12.0, number) == (400, 2.0)
    assert made.step_ended(13.0, lost) == (0, 0.0)
