"""Every parser meets a few thousand hostile inputs in each run of the suite; `make fuzz` takes longer."""

from __future__ import annotations

import pytest

from tests.fuzz.engine import CORPUS, Target, inputs, run, try_one
from tests.fuzz.targets import TARGETS

SEED = 1
COUNT = 4000
"""Inputs for each target, or what fits into a second."""


@pytest.mark.parametrize("name", TARGETS)
def test_fault_46_any_bytes_parse_or_raise_what_is_promised(name: str) -> None:
    outcome = run(TARGETS[name](), seed=SEED, seconds=1.0, count=COUNT, findings=1)
    assert outcome.inputs > 20
    for finding in outcome.findings:
        pytest.fail(f"{name}: {finding.data.hex()}\n{finding.report}", pytrace=False)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_accepted(name: str) -> None:
    """A target whose seeds are refused at the door would test nothing behind it."""
    target = TARGETS[name]()
    verdicts = [try_one(target, seed)[0] for seed in target.seeds]
    assert verdicts.count(False) >= max(1, len(verdicts) // 3)


@pytest.mark.parametrize(
    "case",
    [p for p in sorted(CORPUS.rglob("*")) if p.is_file() and p.name != ".gitkeep"],
    ids=lambda p: f"{p.parent.name}-{p.name}",
)
def test_fault_46_what_was_found_stays_mended(case) -> None:  # type: ignore[no-untyped-def]
    report = try_one(TARGETS[case.parent.name](), case.read_bytes())[1]
    if report:
        pytest.fail(report, pytrace=False)


def test_the_fuzzer_finds_a_bug_and_cuts_it_down() -> None:
    def feed(data: bytes) -> None:
        if b"\xff\xff" in data and data:
            raise IndexError("planted")
        if len(data) > 30:
            raise ValueError("promised")

    target = Target(name="planted", feed=feed, seeds=[bytes(20)], promised=(ValueError,))
    outcome = run(target, seed=1, seconds=10, count=20_000, findings=1)
    assert [f.data for f in outcome.findings] == [b"\xff\xff"]


def test_inputs_repeat() -> None:
    target = Target(name="any", feed=len, seeds=[b"seed"], promised=())
    first, second = (tuple(x for _, x in zip(range(200), inputs(target, 7), strict=False)) for _ in "ab")
    assert first == second
