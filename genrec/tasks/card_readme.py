"""The dataset card as Markdown, in the form of the Hugging Face hub."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from genrec.page import display_text
from genrec.tasks.card_page import (
    COUNTED,
    LEAKS,
    ORIGINS,
    data_facts,
    family_rows,
    leak_table,
    length_table,
    origin_table,
    other_splits,
    reasoning_facts,
    settings,
    summary,
    tokenizer_name,
)

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$-])")
_FAMILY_COLUMNS = {
    "name": "Family", "unit": "Made of", "shows": "Prompt shows", "asks": "Asks for",
    "rows": "Rows", "share": "Share", "templates": "Templates",
}  # fmt: skip
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))  # fmt: skip


def render_readme(card: Mapping[str, Any]) -> str:
    """The card as Markdown with the front matter that the Hugging Face hub and datasets read.

    Rows of different kinds have different columns, and a configuration has one set of columns: so
    training rows, the held-out rows and the rows for RL are a configuration each.
    """
    groups = {"train": ["train"], "held_out": ["valid", "test"], "rl": ["rl"]}
    splits = {"valid": "validation"}
    configs = [
        {
            "config_name": name,
            **({"default": True} if name == "train" else {}),
            "data_files": [
                {"split": splits.get(s, s), "path": f"{s}.parquet"}
                for s in parts
                if s in card["splits"]
            ],
        }
        for name, parts in groups.items()
        if any(s in card["splits"] for s in parts)
    ]
    size = next((word for most, word in _SIZES if card["rows"] < most), "n>1B")
    front = {
        "pretty_name": display_text(card["name"]),
        "task_categories": ["text-generation"],
        "size_categories": [size],
        "tags": ["recommendation", "generative-recommendation", "semantic-ids", "instruction-data"],
        "configs": configs,
    }
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---\n\n" + "\n".join(_readme_lines(card)).rstrip() + "\n"


def _readme_lines(card: Mapping[str, Any]) -> list[str]:
    """The same facts as on the page, but for the figures and the examples."""
    others = other_splits(card)
    lines = [
        f"# Instruction data of {escaped(card['name'])}", "",
        "Prompts and completions that teach a language model to recommend items by semantic ids",
        "(SIDs), made by genrec. The figures and ten rows with titles are in `report.html`, all",
        "numbers in `card.json`, the templates in `prompts/`.", "",
        f"{card['rows']:,} training rows{f'; {others} rows' if others else ''}.",
        *(escaped(text) for text in summary(card)), "",
        "## Families", "",
    ]  # fmt: skip
    rows = [[row[key] for key in _FAMILY_COLUMNS] for row in family_rows(card)]
    lines += markdown_table(list(_FAMILY_COLUMNS.values()), rows)
    if card["switched_off"]:
        reasons = card["switched_off"].items()
        lines += ["Switched off:", "", *(f"- {escaped(n)}: {escaped(r)}" for n, r in reasons), ""]
    if card["lengths"]:
        counted = f"Tokenizer: {escaped(tokenizer_name(card))}. {COUNTED}"
        lines += ["## Length in tokens", "", counted, "", *markdown_table(**length_table(card))]
    if (origins := origin_table(card))["rows"]:
        lines += ["## Who wrote the texts", "", ORIGINS, "", *markdown_table(**origins)]
    lines += ["## What prompts know of their targets", "", LEAKS, ""]
    if (leaks := leak_table(card))["rows"]:
        lines += markdown_table(**leaks)
    if reasoning := reasoning_facts(card):
        lines += [
            f"Reasoning rows ({escaped(reasoning['families'])}): rationale_origin "
            f"{escaped(reasoning['origin'])}, trained_on_target "
            f"{reasoning['trained_on_target']}. {reasoning['words']}", "",
        ]  # fmt: skip
    facts = [*settings(card), ("Prompts, SHA-256", card["prompts_sha256"]), *data_facts(card)]
    return [*lines, "## How it was made", "", *(f"- {label}: {escaped(v)}" for label, v in facts)]


def escaped(text: str) -> str:
    """Untrusted text for Markdown: no markup of either kind."""
    return _MARKDOWN.sub(r"\\\1", html.escape(display_text(text, 400), quote=False))


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, with an empty line behind it."""
    head, *body = [[escaped(cell) for cell in row] for row in (columns, *rows)]
    lines = [head, ["---"] * len(columns), *body]
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]
