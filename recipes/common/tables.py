"""Tables, as text and as Markdown, and the figures in them."""

from __future__ import annotations

from collections.abc import Sequence

from hf_lsam.spread import mean_and_deviation


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligns rows with the same number of cells in columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table without a final newline."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_and_spread(values: Sequence[float], digits: int = 2, scale: float = 1.0) -> str:
    """Mean ± standard deviation over seeds, for example 89.93 ± 0.42; a single value is shown alone."""
    mean, deviation = (f"{scale * value:.{digits}f}" for value in mean_and_deviation(values))
    return f"{mean} ± {deviation}" if len(values) > 1 else mean
