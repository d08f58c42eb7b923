"""Checks of the data linter on the catalogue's text: shared, missing, odd and long titles."""

from __future__ import annotations

import numpy as np
import polars as pl

from genrec.columns import BRAND, DESCRIPTION, TARGET, TITLE
from genrec.data.lint_tables import Finding, LintTables, folded_titles, graded, not_run, shown

SHARED_TITLES = 0.01  # share of the items
MISSING_TITLES = 0.05
LONG_TITLES, LONG_TITLE = 0.01, 200  # share; characters (a history holds many titles)

# What a title must not hold, by check: escaping makes it harmless in prompts, but not meaningful.
PATTERNS = {
    "token-like text": r"<[A-Za-z]+_\d+>|<\|[^|<>]*\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>",
    "template marks": r"\{\{|\}\}|\{%|%\}|\{#|#\}",
    "control or broken characters": r"[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\x{FFFD}]",
    "markup": r"(?i)&(?:[a-z]+|#\d+|#x[0-9a-f]+);|</?[a-z]+[0-9]?(?:\s[^<>]*)?/?>|/>",
}


def check_text(tables: LintTables) -> list[Finding]:
    """All checks of this module."""
    return [
        shared_titles(tables),
        missing_titles(tables),
        *(odd_text(tables, kind) for kind in PATTERNS),
        long_titles(tables),
    ]


def shared_titles(tables: LintTables) -> Finding:
    """Do several items have the same title (but for case and spaces)?"""
    name, titles = "titles shared by items", folded_titles(tables)
    if titles.null_count() == len(titles):
        return not_run(name, "no item has a title")
    shared = (titles.is_duplicated() & titles.is_not_null()).to_numpy()
    share = float(shared.sum() / (len(titles) - titles.null_count()))
    rows = ""
    if not tables.test.is_empty():
        rows = f", {shared[tables.test[TARGET].to_numpy()].mean():.1%} of the test targets"
    example = None
    if shared.any():
        at = int(np.argmax(shared))
        alike = titles.eq(titles[at]).fill_null(False).arg_true()
        names = ", ".join(tables.item_name(i) for i in alike.head(4).to_list())
        example = f"items {names}: {shown(tables.catalog[TITLE][at])}"
    return graded(
        name,
        share,
        SHARED_TITLES,
        None,
        f"{shared.sum():,} items ({share:.1%} of those with a title) share theirs{rows}",
        "A prompt or an answer by title doesn't say which one is meant; score by item id, and add "
        "brand or category where titles are asked for",
        example,
    )


def missing_titles(tables: LintTables) -> Finding:
    """How many items have no title of their own?"""
    name, titles = "missing titles", folded_titles(tables)
    if titles.is_empty():
        return not_run(name, "the catalogue is empty")
    missing = titles.is_null()
    share = titles.null_count() / len(titles)
    return graded(
        name,
        share,
        MISSING_TITLES,
        None,
        f"{titles.null_count():,} of {len(titles):,} items ({share:.1%}) have no title",
        "Text vectors and tasks on titles know nothing of these; bring titles or collaborative "
        "vectors",
        f"item {tables.item_name(int(missing.arg_max() or 0))}",
    )


def odd_text(tables: LintTables, kind: str) -> Finding:
    """How many items have text in which something of a kind stands that no product text needs?

    Args:
        tables: the tables.
        kind: a key of `PATTERNS`.
    """
    catalog = tables.catalog
    columns = [c for c in (TITLE, BRAND, DESCRIPTION) if c in catalog.columns]
    found = catalog.select(
        pl.col(c).cast(pl.String).str.contains(PATTERNS[kind]).fill_null(False) for c in columns
    )
    counts = {c: int(found[c].sum()) for c in columns}
    hit = found.select(pl.any_horizontal(columns)).to_series()
    example = None
    if hit.any():
        column = next(c for c in columns if counts[c])
        at = int(found[column].arg_max() or 0)
        part = catalog[column].cast(pl.String)[at : at + 1].str.extract(f"({PATTERNS[kind]})")
        example = f"item {tables.item_name(at)}, {column}: {shown(part[0])}"
    named = ", ".join(f"{c} {n:,}" for c, n in counts.items())
    return graded(
        f"{kind} in item text",
        int(hit.sum()),
        1,
        None,
        f"{int(hit.sum()):,} items ({named})",
        "Prompts escape it, so that it can't act as a token or a template; clean the catalogue if "
        "it means nothing to people",
        example,
    )


def long_titles(tables: LintTables) -> Finding:
    """How many titles are so long that they crowd a prompt?"""
    length = tables.catalog[TITLE].str.len_chars().fill_null(0).to_numpy()
    count = int((length > LONG_TITLE).sum())
    longest = int(length.max()) if len(length) else 0
    share = count / max(len(length), 1)
    text = (
        f"{count:,} titles ({share:.1%}) have more than {LONG_TITLE} characters; the longest has "
        f"{longest:,}"
    )
    example = f"item {tables.item_name(int(np.argmax(length)))}" if len(length) else None
    return graded(
        "very long titles",
        share,
        LONG_TITLES,
        None,
        text,
        "Prompts cut them; a history of such titles fills the context, so shorten them",
        example,
    )
