"""Seconds that a user gives: limits of requests, and how long a stop waits."""

from __future__ import annotations

import math

from miinb.errors import InvalidRequest, InvalidValue
from miinb.frozen import plain

LONGEST_S = 1e8  # three years: sockets take no more


def time_limit(timeout_s: object) -> float:
    """Of a request, at most `LONGEST_S`. Raises InvalidRequest: it is no positive number."""
    limit = _number(timeout_s)
    if not 0 < limit < math.inf:
        raise InvalidRequest(f"timeout_s: {timeout_s!r} is no positive number of seconds.")
    return min(limit, LONGEST_S)


def drain_limit(drain_s: object) -> float:
    """For how long a stop waits for requests, at most `LONGEST_S`. Raises InvalidValue: it is none, or negative."""
    limit = _number(drain_s)
    if not limit >= 0:
        raise InvalidValue(f"drain_s: {drain_s!r} is no number of seconds.", hint="0 waits for nothing.")
    return min(limit, LONGEST_S)


def _number(value: object) -> float:
    """NaN of what is none."""
    number = plain(value)
    return float(number) if isinstance(number, (int, float)) and not isinstance(number, bool) else math.nan
