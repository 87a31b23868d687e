"""Numbers and durations as people read them."""

from __future__ import annotations

import math


def duration(seconds: float) -> str:
    """`3725.4` -> `1h 2m 5s`; as in ms-swift's logs, zero leading parts are left out."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(max(seconds, 0.0))
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, secs = divmod(rest, 60)
    parts = [(days, "d"), (hours, "h"), (minutes, "m")]
    while parts and parts[0][0] == 0:
        parts.pop(0)
    return " ".join([f"{n}{unit}" for n, unit in parts] + [f"{secs}s"])


def number(value: float | None) -> str:
    """Four significant digits, thousands grouped, tiny values in e-notation; `-` where there is no value."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2e}" if size < 1e-4 else f"{value:.4g}"
