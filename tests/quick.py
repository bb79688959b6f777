"""Parameters of which only some are in the quick tests; the others are marked slow."""

from collections.abc import Iterable

import pytest


def quick(cases: Iterable, *kept) -> list:
    """All `cases`, for `pytest.mark.parametrize`: those that are not `kept` only vary one that is, and are slow."""
    cases = list(cases)
    assert all(case in cases for case in kept), f"{kept} are not all among {cases}"
    return [case if case in kept else _slow(case) for case in cases]


def _slow(case):
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
