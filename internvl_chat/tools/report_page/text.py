"""Numbers and texts of the page. All texts of a run are untrusted and escaped here."""

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

MAX_TEXT_LENGTH, FOLD_LENGTH = 4000, 160
SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_number(value: float) -> str:
    """Format a number with four significant digits."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    if abs(value) >= 10_000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3e}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.3g}".replace("e-0", "e-")


def format_ticks(values: Sequence[float]) -> list[str]:
    """Format the labels of an axis, with as many digits as make them differ."""
    labels: list[str] = []
    for digits in range(4, 13):
        labels = [_format_tick(value, digits) for value in values]
        if len(set(labels)) == len(set(values)):
            break
    return labels


def _format_tick(value: float, digits: int) -> str:
    factor, suffix = next((pair for pair in SUFFIXES if abs(value) >= max(pair[0], 1e4)), (1.0, ""))
    mantissa, exponent, power = f"{value / factor:.{digits}g}".partition("e")
    return f"{mantissa}{exponent}{int(power) if power else ''}{suffix}"


def format_count(value: float) -> str:
    """Format a large number with a suffix: 1.05M."""
    for factor, suffix in SUFFIXES:
        if abs(value) >= factor:
            return f"{value / factor:.3g} {suffix}".replace(" ", "")
    return f"{value:.3g}"


def format_duration(seconds: float) -> str:
    """Format seconds as `45 s`, `12 min`, `3 h 05 min` or `2 d 4 h`."""
    if not 0 <= seconds < 1e9:
        return "unknown"
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def format_value(value: Any) -> str:
    """Format a JSON value as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def clean(value: Any, max_length: int = MAX_TEXT_LENGTH) -> str:
    """Escape a value for HTML, shortened."""
    text = format_value(value)
    text = text if len(text) <= max_length else f"{text[:max_length]} [{len(text) - max_length:,} more characters]"
    return escape(text)


def render_table(titles: list[str], rows: list[list[str]], num_texts: int = 1) -> str:
    """Render a table of HTML cells; those after the first `num_texts` columns are numbers."""
    classes = [""] * num_texts + [' class="number"'] * (len(titles) - num_texts)
    head = "".join(f"<th{css}>{title}</th>" for css, title in zip(classes, titles, strict=True))
    lines = ("".join(f"<td{css}>{cell}</td>" for css, cell in zip(classes, row, strict=True)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def fold(value: Any) -> str:
    """Escape a text; a long one shows its beginning, and all of it on a click."""
    text = format_value(value).strip()
    if not text:
        return '<span class="soft">(empty)</span>'
    if len(text) <= FOLD_LENGTH:
        return clean(text)
    return f"<details><summary>{clean(text[:FOLD_LENGTH])}…</summary>…{clean(text[FOLD_LENGTH:])}</details>"
