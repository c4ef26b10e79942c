"""Memory divided by shares, with the tax on idle pages: Waldspurger, OSDI 2002, 5.1 and 5.2.

A client with S shares that has P pages, of which the fraction f is active, has the adjusted ratio

    rho = S / (P * (f + k * (1 - f)))        k = 1 / (1 - tax)

and min-funding revocation takes a page from whoever has the lowest. Doing so page by page ends where all
ratios are equal but for those at a bound; `divide` finds that end directly. A client with A active pages has
f = min(1, A / P), so P * (f + k * (1 - f)) is P up to A, and A + k * (P - A) beyond: an active page costs 1,
an idle one k. Everybody may spend in proportion to his shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Claim", "adjusted_ratio", "divide"]

STEPS = 64
"""Halvings of the search: the price of a page is then known to a thousandth of a page of any client."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What one client asks of the memory to divide, in pages."""

    shares: int
    active: int
    least: int
    most: int


def adjusted_ratio(shares: int, pages: float, active: float, idle_cost: float) -> float:
    """Return rho, the adjusted shares-per-page ratio, of a client whose fraction `active` of `pages` is active."""
    return shares / (pages * (active + idle_cost * (1 - active))) if pages else math.inf


def divide(budget: int, claims: Sequence[Claim], idle_cost: float) -> list[int]:
    """Return the pages of each client: together at most `budget`, and within a page each of all of it.

    Nobody gets less than `least`, even where the budget is less than all of them, nor more than `most`. An idle
    page costs as much as `idle_cost` active ones.
    """
    if sum(claim.most for claim in claims) <= budget:
        return [claim.most for claim in claims]
    # The budget lies between what a unit of money a share buys at `low` and at `high`. What is bought at `low`
    # never exceeds it, so that rounding cannot either.
    low = 0.0
    high = max((_price(claim, claim.most, idle_cost) / claim.shares for claim in claims), default=0.0)
    for _ in range(STEPS):
        middle = (low + high) / 2
        if sum(_bought(claim, middle, idle_cost) for claim in claims) <= budget:
            low = middle
        else:
            high = middle
    return [_bought(claim, low, idle_cost) for claim in claims]


def _price(claim: Claim, pages: int, idle_cost: float) -> float:
    """Return what `pages` cost this client."""
    return pages if pages <= claim.active else claim.active + (pages - claim.active) * idle_cost


def _bought(claim: Claim, money: float, idle_cost: float) -> int:
    """Return the whole pages that a client has at `money` a share, within its bounds."""
    spent = claim.shares * money
    pages = spent if spent <= claim.active else claim.active + (spent - claim.active) / idle_cost
    return max(claim.least, min(claim.most, math.floor(pages)))
