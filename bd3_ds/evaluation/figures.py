"""Evaluation records as text: a perplexity with its error, estimator and share of the set."""

from __future__ import annotations

from typing import Any


def perplexity(record: dict[str, Any]) -> str:
    """Such as 243.02 ± 1.20; without the error where the value is exact."""
    error = record.get("ppl_stderr", record["ppl"] * record["stderr"])
    return f"{record['ppl']:.2f}" + (f" ± {error:.2f}" if error else "")


def nats(record: dict[str, Any]) -> str:
    """Such as 5.4929 ± 0.0049; without the error where the value is exact."""
    return f"{record['nelbo']:.4f}" + (f" ± {record['stderr']:.4f}" if record["stderr"] else "")


def sequences(record: dict[str, Any]) -> str:
    """Such as 64 of 1,671, or all 1,671; empty for records of versions that did not count them."""
    if record.get("chunks") is None:
        return ""
    if record.get("chunks_in_set") is None:
        return f"{record['chunks']:,}"
    taken, there = record["chunks"], record["chunks_in_set"]
    return f"all {there:,}" if taken == there else f"{taken:,} of {there:,}"


def estimator(record: dict[str, Any]) -> str:
    """Such as stratified, 4 views."""
    views = record.get("views")
    return record["estimator"] + (f", {views} view{'' if views == 1 else 's'}" if views else "")


def duration(seconds: float) -> str:
    """A rough length of time for people, in the largest unit that gives a number above 1.5 or so."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:,.0f} {unit}"
    return f"{max(1.0, seconds):.0f} s"
