"""The tables of the benches, in the terminal: one look, narrow enough for 80 columns where the figures allow it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

__all__ = ["console", "plain"]


def console() -> Console:
    """A console that prints what it is given: in rich's markup, brackets and colons of paths would be lost."""
    return Console(highlight=False, markup=False, emoji=False)


def plain(title: str, heads: Sequence[str], left: Sequence[str] = (), gap: int = 2) -> Table:
    """A table without lines.

    Args:
        title: stands above, at the left.
        heads: of the columns; figures are at the right.
        left: heads of the columns of words, beside the first one.
        gap: columns of the terminal between two of the table.
    """
    table = Table(box=None, padding=(0, 0, 0, gap), pad_edge=False, title=title, title_justify="left")
    for head in heads:
        words = head in left or head is heads[0]
        table.add_column(head, justify="left" if words else "right", overflow="fold")
    return table
