"""What `diffattn inspect` prints."""

import fnmatch
import re
from collections import defaultdict
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.table import Table

from diffattn.inspect import AttentionRow, Inspection


def show(inspection: Inspection, title: str, *, every: bool = False) -> None:
    """Print a table: a row for each layer, or for all layers that are alike."""
    console = Console(markup=False, highlight=False, emoji=False)
    # Into a file or a pipe without a width of its own: one line a row, for grep.
    if not console.is_terminal and "COLUMNS" not in console._environ:
        console.width = 250
    rows = inspection.rows
    console.print(f"{title}: {len(rows)} attention layers, of which patch would take {count(rows)}")
    for component, inputs in inspection.inputs.items():
        share = inspection.share.get(component)
        estimate = "" if share is None else f"; attention takes {percent(share)} of a forward (estimate)"
        console.print(f"{component + ': ' if component else ''}{inputs}{estimate}", soft_wrap=True)
    table = Table("n", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in ("layer", "class", "heads x dim", "tokens", "attention", "est. share", "patch"):
        table.add_column(heading, overflow="fold")
    if inspection.measured_on:
        table.add_column("rel. error")
    table.columns[0].justify = "right"
    notes: dict[str, int] = {}
    for row, members in ((r, 1) for r in rows) if every or inspection.measured_on else alike(rows):
        note = notes.setdefault(f"{row.installs or 'stock stays'}: {row.why}", len(notes) + 1)
        table.add_row(
            str(members),
            row.name,
            row.attention,
            heads(row),
            "?" if row.tokens is None else tokens(*row.tokens),
            row.mechanism if row.context in ("itself", "?") else f"{row.mechanism}, to {row.context}",
            "?" if row.share is None else percent(row.share),
            f"{'patched' if row.installs else 'stock'} [{note}]",
            *(["" if row.error is None else f"{row.error:.3f}"] if inspection.measured_on else []),
        )
    fit(table, console.width)
    console.print(table)
    for text, note in notes.items():
        console.print(f"[{note}] {text}", soft_wrap=True)
    if inspection.measured_on:
        console.print(
            "rel. error: of the layer's output beside the stock layer's, on what the stock model gives it in "
            f"{inspection.measured_on}; 0 is the same, 1 as bad as returning 0.",
            soft_wrap=True,
        )
    if inspection.share:
        console.print(
            "est. share: of the time of a stock forward, projections left out. An estimate, not measured: operations "
            "and bytes, eager, bfloat16, batch 1, at the rates of an H100, without the launch gaps of small models.",
            soft_wrap=True,
        )


def fit(table: Table, width: int) -> None:
    """Break cells between words where the table is too wide; the names of layers, which are one word, come last."""
    columns = table.columns
    widths = [max(map(len, (column.header, *column.cells))) for column in columns]
    least = [max(len(word) for cell in (c.header, *c.cells) for word in cell.split() or [""]) for c in columns]
    least[1] = min(widths[1], 16)
    least[3] = max(map(len, columns[3].cells), default=least[3])  # heads x dim
    for i in (5, 7, 4, 3, 6, 1):
        excess = sum(widths) + 2 * len(widths) - 1 - width  # each but the last with two spaces
        widths[i] -= max(0, min(excess, widths[i] - least[i]))
    for column, each in zip(columns, widths, strict=True):
        column.width = each


def alike(rows: list[AttentionRow]) -> list[tuple[AttentionRow, int]]:
    """Rows that differ in name alone become one, with a glob that `--layers` takes and the sum of their shares."""
    groups: dict[tuple, list[AttentionRow]] = defaultdict(list)
    for row in rows:
        share = None if row.share is None else f"{row.share:.3e}"
        groups[re.sub(r"\d+", "*", row.name), replace(row, name="", share=None), share].append(row)
    merged = []
    for members in groups.values():
        glob = common_glob([row.name for row in members])
        if {row.name for row in rows if fnmatch.fnmatchcase(row.name, glob)} == {row.name for row in members}:
            shares = [row.share for row in members]
            share = None if None in shares else sum(shares)
            merged.append((replace(members[0], name=glob, share=share), len(members)))
        else:
            merged += [(row, 1) for row in members]
    return merged


def common_glob(names: list[str]) -> str:
    """`["a.0.b.1", "a.3.b.1"]` -> `"a.*.b.1"`"""
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(parts[0] if len(set(parts)) == 1 else "*" for parts in columns)


def count(rows: list[AttentionRow]) -> int:
    return sum(row.installs is not None for row in rows)


def heads(row: AttentionRow) -> str:
    if row.heads is None:
        return "?"
    shared = "" if row.kv_heads in (None, row.heads) else f"/{row.kv_heads}"
    return f"{row.heads}{shared} x {row.head_dim or '?'}"


def tokens(queries: int, keys: int) -> str:
    return str(queries) if queries == keys else f"{queries} to {keys}"


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.095 else f"{share:.1%}"
