"""stp.core.keepalive: promises (1) to (3) of its head (R-8-9)."""

from __future__ import annotations

import random

import pytest

from stp.core.keepalive import GROWTH, MARGIN, RETRY_AFTER, STEADY, KeepaliveLearner
from stp.core.path import KEEPALIVE, KEEPALIVE_LEAST, KEEPALIVE_MOST


def test_answers_lengthen_the_interval_step_by_step() -> None:
    learner = KeepaliveLearner()
    assert learner.interval == KEEPALIVE
    for _ in range(STEADY):
        assert learner.interval == KEEPALIVE
        learner.on_answer(KEEPALIVE)
    assert learner.interval == KEEPALIVE * GROWTH
    for _ in range(100):
        learner.on_answer(learner.interval)
    assert learner.interval == KEEPALIVE_MOST
    assert learner.changed


def test_answers_to_an_impatient_owner_prove_nothing() -> None:
    learner = KeepaliveLearner()
    for _ in range(100):
        learner.on_answer(5.0)
    assert learner.interval == KEEPALIVE
    assert not learner.changed


@pytest.mark.parametrize("limit", [20.0, 24.0, 30.0, 47.0, 60.0, 109.0])
def test_it_settles_below_what_the_nat_keeps(limit: float) -> None:
    """A NAT that forgets after `limit` seconds: it is tried again only once in RETRY_AFTER answers."""
    learner = KeepaliveLearner()
    forgotten = 0
    for _ in range(3 * RETRY_AFTER):
        if learner.interval > limit:
            forgotten += 1
            learner.on_forgotten(learner.interval)
        else:
            learner.on_answer(learner.interval)
    assert learner.interval <= limit
    assert learner.interval >= min(MARGIN, 1 / GROWTH) * limit or learner.interval == KEEPALIVE_LEAST
    assert forgotten <= 2 + 3


def test_too_long_is_forgotten_when_routers_may_have_restarted() -> None:
    learner = KeepaliveLearner(40.0)
    learner.on_forgotten(40.0)
    assert learner.interval == pytest.approx(30.0)
    for _ in range(RETRY_AFTER + 100):
        learner.on_answer(learner.interval)
    assert learner.interval == KEEPALIVE_MOST


@pytest.mark.parametrize("seed", range(20))
def test_the_interval_stays_in_bounds_whatever_is_said(seed: int) -> None:
    rng = random.Random(seed)
    learner = KeepaliveLearner(rng.uniform(0, 500), rng.choice([0.0, rng.uniform(0, 500)]))
    for _ in range(500):
        silence = rng.choice([learner.interval, rng.uniform(0, 1000)])
        rng.choice([learner.on_answer, learner.on_forgotten])(silence)
        assert KEEPALIVE_LEAST <= learner.interval <= KEEPALIVE_MOST
