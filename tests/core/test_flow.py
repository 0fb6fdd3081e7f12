"""stp.core.flow: promises (1) and (2) of its head."""

from __future__ import annotations

from stp.core.flow import (
    CONTROL_WINDOW,
    MAX_WINDOW,
    SESSION_WINDOW,
    STREAM_WINDOW,
    ReceiveCredit,
    WindowBudget,
)


def take(credit: ReceiveCredit, taken: int, now: float, rtt: float, budget: WindowBudget) -> int:
    credit.taken = taken
    grown = credit.grow(now, rtt, budget) if credit.due() else 0
    credit.announce()
    return grown


def test_credit_is_due_when_a_quarter_of_the_window_is_taken() -> None:
    credit = ReceiveCredit(1000)
    credit.taken = 249
    assert not credit.due()
    credit.taken = 250
    assert credit.due()
    assert credit.announce() == 1250
    assert not credit.due()


def test_the_first_windows_are_what_both_sides_count_on() -> None:
    """R-7-7: nothing tells a peer of them."""
    assert (CONTROL_WINDOW, STREAM_WINDOW, SESSION_WINDOW) == (64 << 10, 512 << 10, 2 << 20)


def test_credit_is_never_lowered() -> None:
    """R-7-3."""
    credit = ReceiveCredit(1000)
    credit.limit = 5000
    credit.taken = 500
    assert credit.announce() == 5000


def test_a_window_grows_while_it_is_the_limit() -> None:
    """A reader that takes a window per round trip gets twice as much, up to MAX_WINDOW."""
    credit, budget = ReceiveCredit(STREAM_WINDOW), WindowBudget(100 * MAX_WINDOW)
    now = 0.0
    for _ in range(40):
        now += 0.1
        take(credit, credit.limit, now, 0.1, budget)
    assert credit.window == MAX_WINDOW
    assert credit.grown == MAX_WINDOW - STREAM_WINDOW
    assert budget.left == 100 * MAX_WINDOW - credit.grown


def test_a_window_stays_while_the_sender_is_the_limit() -> None:
    """A window that lasts for three round trips is not what holds the sender."""
    credit, budget = ReceiveCredit(STREAM_WINDOW), WindowBudget(100 * MAX_WINDOW)
    for n in range(1, 60):
        take(credit, n * STREAM_WINDOW // 3, n * 0.1, 0.1, budget)
    assert credit.window == STREAM_WINDOW


def test_growth_stops_at_the_budget_of_the_process() -> None:
    credit, budget = ReceiveCredit(STREAM_WINDOW), WindowBudget(STREAM_WINDOW)
    for n in range(1, 40):
        take(credit, credit.limit, n * 0.1, 0.1, budget)
    assert credit.window == 2 * STREAM_WINDOW
    assert budget.left == 0
    budget.give_back(credit.grown)
    assert budget.left == STREAM_WINDOW
