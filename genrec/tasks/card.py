"""The dataset card: what is in ``train.parquet``, measured, for people and for programs.

Everything is measured on the finished file: counts by streaming, token lengths and examples on rows
that are drawn row group by row group, so a file of any size is described in flat memory. The same
file and seed give the same card, byte for byte. The forms that people read are made in
`genrec.tasks.card_page`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from genrec.artifacts import write_json, write_text
from genrec.columns import (
    COMPLETION,
    HISTORY_ITEMS,
    ITEM_ID,
    PROMPT,
    ROW_ID,
    SID,
    TARGET_KIND,
    TARGETS,
    TASK,
    TEMPLATE,
    TEXT_ORIGIN,
    TITLE,
)
from genrec.semantic_ids import SID_TOKEN
from genrec.tasks.card_page import render_card_page
from genrec.tasks.card_readme import render_readme
from genrec.tasks.families import FAMILIES
from genrec.tasks.reasoning import RATIONALE_ORIGIN, TRAINED_ON_TARGET

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
CountTokens = Callable[[Sequence[str]], Sequence[int]]  # texts -> number of tokens of each

MEASURED_ROWS = 2_000  # per family, for token lengths
EXAMPLES = 10
EXAMPLE_ITEMS = 10  # of a history (the newest) or of targets (the first) in an example
SPLITS = ("train", "valid", "test", "rl")

_BATCH_ROWS = 16_384  # decoded at a time
# Lengths 1, 2, 3, …, then four bins an octave: whole numbers, about even on a logarithmic axis.
_EDGES = np.unique(np.ceil(2.0 ** (np.arange(4 * 30) / 4)).astype(np.int64))


@dataclass(frozen=True)
class CardFacts:
    """What the stage knows and the file doesn't say.

    Attributes:
        name: of the dataset or run.
        counts: rows of each family that is on, 0 for one that found none.
        switched_off: families that were asked for and are off, each with the reason.
        seed: of all draws.
        n_templates: seen templates that are drawn from per family at most, None for all.
        serving_template: of the sequential task in validation, test, RL and serving.
        prompts_sha256: hash over all templates.
        data: statistics of the prepared data (the metrics of its manifest).
        tokenizer: which one measured the lengths, in a few words.
        keep_rows: whether training rows were chosen (pruned) beforehand.
    """

    name: str
    counts: Mapping[str, int]
    switched_off: Mapping[str, str]
    seed: int
    n_templates: int | None
    serving_template: str
    prompts_sha256: str
    data: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = ""
    keep_rows: bool = False


def write_card(
    folder: Path, facts: CardFacts, items: pl.DataFrame, count_tokens: CountTokens | None = None
) -> dict[str, Any]:
    """Write ``card.json``, ``report.html`` and ``README.md`` (a Hugging Face dataset card).

    Args:
        folder: of the stage, with the finished ``train.parquet``.
        facts: what the file doesn't say.
        items: item_id, title and sid of every item.
        count_tokens: tokens of each text, a SID token counting one; None leaves lengths out.

    Returns:
        What ``card.json`` holds.

    Raises:
        ValueError: `count_tokens` doesn't know the SID tokens.
    """
    card = dataset_card(folder, facts, items, count_tokens)
    write_json(folder / "card.json", card)
    write_text(folder / "report.html", render_card_page(card))
    write_text(folder / "README.md", render_readme(card))
    return card


def dataset_card(
    folder: Path, facts: CardFacts, items: pl.DataFrame, count_tokens: CountTokens | None = None
) -> dict[str, Any]:
    """The card as a dictionary that JSON can hold; arguments as `write_card`."""
    path = folder / "train.parquet"
    files = {split: folder / f"{split}.parquet" for split in SPLITS}
    counted = _counted(path)
    rows = dict(counted.group_by(TASK).agg(pl.col("len").sum()).iter_rows())
    assert {name: n for name, n in facts.counts.items() if n} == rows, "the file has other rows"
    names = [name for name in FAMILIES if name in facts.counts]
    reasoning = any(FAMILIES[name].steps for name in names)
    return {
        "name": facts.name,
        "rows": sum(rows.values()),
        "splits": {s: pq.read_metadata(f).num_rows for s, f in files.items() if f.exists()},
        "families": [_family(name, counted, sum(rows.values())) for name in names],
        "switched_off": dict(facts.switched_off),
        "text_origin": _origins(counted),
        "rationale_origin": RATIONALE_ORIGIN if reasoning else None,
        "trained_on_target": TRAINED_ON_TARGET if reasoning else None,
        "lengths": None
        if count_tokens is None or not rows
        else _lengths(path, rows, facts, items, count_tokens),
        "examples": _examples(path, rows, items, facts.seed),
        "seed": facts.seed,
        "n_templates": facts.n_templates,
        "serving_template": facts.serving_template,
        "prompts_sha256": facts.prompts_sha256,
        "keep_rows": facts.keep_rows,
        "data": dict(facts.data),
    }


def _counted(path: Path) -> pl.DataFrame:
    """Rows by family, template and origin of the text."""
    scan = pl.scan_parquet(path, glob=False)
    keys = [TASK, TEMPLATE, TEXT_ORIGIN]
    if TEXT_ORIGIN not in scan.collect_schema().names():
        scan = scan.with_columns(pl.lit(None, dtype=pl.String).alias(TEXT_ORIGIN))
    counted = scan.group_by(keys).agg(pl.len()).collect(engine="streaming")
    return counted.sort(keys, nulls_last=True)


def _family(name: str, counted: pl.DataFrame, total: int) -> dict[str, Any]:
    """What one family's rows are."""
    family, mine = FAMILIES[name], counted.filter(pl.col(TASK) == name)
    rows = int(mine["len"].sum())
    return {
        "name": name,
        "unit": family.unit,
        "prompt": list(family.prompt),
        "shows_target": sorted(family.shows_target),
        "target_kind": family.target_kind,
        "reasoning": bool(family.steps),
        "rows": rows,
        "share": rows / max(total, 1),
        "templates": mine[TEMPLATE].n_unique(),
        "text_origin": _origins(mine),
    }


def _origins(counted: pl.DataFrame) -> dict[str, int]:
    """Rows by origin of their text, most first; rows without such a text are left out."""
    known = counted.drop_nulls(TEXT_ORIGIN).group_by(TEXT_ORIGIN).agg(pl.col("len").sum())
    return dict(known.sort(["len", TEXT_ORIGIN], descending=[True, False]).iter_rows())


def sampled_texts(path: Path, per_family: int, seed: int) -> list[str]:
    """Prompts and completions of so many rows of each family, to train a tokenizer on.

    Args:
        path: of ``train.parquet``.
        per_family: rows at most.
        seed: of the draw.
    """
    tasks = pl.scan_parquet(path, glob=False).select(pl.col(TASK).unique())
    most = dict.fromkeys(tasks.collect(engine="streaming")[TASK].to_list(), per_family)
    parts = list(sampled_rows(path, [PROMPT, COMPLETION], most, seed))
    return [text for part in parts for name in (PROMPT, COMPLETION) for text in part[name]]


def sampled_rows(
    path: Path, columns: Sequence[str], most: Mapping[str, int], seed: int
) -> Iterator[pl.DataFrame]:
    """Rows of each family drawn without replacement, in file order, a table per row group.

    Args:
        path: of instruction rows.
        columns: to read, task among them or not.
        most: family -> rows; all rows of a family that has no more.
        seed: of the draw, which depends on it, the family's name and its number of rows.
    """
    with pq.ParquetFile(path) as file:
        # Rows per family in each row group, from the one column.
        there = [Counter(_tasks(file, group)) for group in range(file.num_row_groups)]
        total = sum(there, Counter[str]())
        chosen = {name: _draw(total[name], n, name, seed) for name, n in most.items()}
        begin: Counter[str] = Counter()
        for group, counts in enumerate(there):
            places = {}
            for name in counts.keys() & chosen.keys():
                low, high = begin[name], begin[name] + counts[name]
                mine = chosen[name][(chosen[name] >= low) & (chosen[name] < high)] - low
                if len(mine):
                    places[name] = mine
            begin.update(counts)
            if places:
                yield _read_places(file, group, places, columns)


def _tasks(file: pq.ParquetFile, group: int) -> pl.Series:
    """Family of each row of a row group."""
    table = pl.from_arrow(file.read_row_group(group, columns=[TASK]))
    assert isinstance(table, pl.DataFrame)
    return table[TASK].cast(pl.String)


def _draw(n_rows: int, most: int, name: str, seed: int) -> IntArray:
    """Sorted places among a family's rows."""
    if n_rows <= most:
        return np.arange(n_rows)
    rng = np.random.default_rng([seed % 2**32, *name.encode()])
    return np.sort(rng.choice(n_rows, most, replace=False, shuffle=False))


def _read_places(
    file: pq.ParquetFile, group: int, places: Mapping[str, IntArray], columns: Sequence[str]
) -> pl.DataFrame:
    """The named rows of a row group; ``places`` count within their family."""
    tasks = _tasks(file, group).to_numpy()
    at = np.sort(np.concatenate([np.flatnonzero(tasks == n)[p] for n, p in places.items()]))
    parts, start = [], 0
    # Batch by batch: a row group may hold a million rows.
    for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=list(columns)):
        mine = at[(at >= start) & (at < start + batch.num_rows)] - start
        start += batch.num_rows
        if len(mine):
            part = pl.from_arrow(batch.take(pa.array(mine)))
            assert isinstance(part, pl.DataFrame)
            parts.append(part)
    return pl.concat(parts)


def _lengths(
    path: Path,
    rows: Mapping[str, int],
    facts: CardFacts,
    items: pl.DataFrame,
    count_tokens: CountTokens,
) -> dict[str, Any]:
    """Token lengths of each family and of all rows; families weigh as many rows as they have."""
    _check_sids(items[SID], count_tokens)
    parts = []
    wanted = dict.fromkeys(rows, MEASURED_ROWS)
    for table in sampled_rows(path, [TASK, PROMPT, COMPLETION], wanted, facts.seed):
        counts = {name: _count(table[name], count_tokens) for name in (PROMPT, COMPLETION)}
        parts.append(table.select(TASK).with_columns(**counts))
    measured = pl.concat(parts).with_columns(
        (pl.col(PROMPT) + pl.col(COMPLETION)).alias("both"),
        # Rows that a measured one stands for.
        (pl.col(TASK).replace_strict(rows, return_dtype=pl.Float64) / pl.len().over(TASK)).alias(
            "weight"
        ),
    )
    lengths = measured["both"].clip(1).to_numpy()
    low, high = np.searchsorted(_EDGES, (lengths.min(), lengths.max()), "right")
    edges = _EDGES[low - 1 : high + 1]
    tables = measured.partition_by(TASK, as_dict=True)
    return {
        "tokenizer": facts.tokenizer,
        "most_per_family": MEASURED_ROWS,
        "edges": edges.tolist(),
        "tokens": round(float((measured["both"] * measured["weight"]).sum())),
        "overall": _summary(measured, edges),
        "families": {name: _summary(tables[(name,)], edges) for name in FAMILIES if name in rows},
    }


def _check_sids(sids: pl.Series, count_tokens: CountTokens) -> None:
    """Raise ValueError unless SID tokens count one each."""
    some = sids.gather(np.unique(np.linspace(0, len(sids) - 1, 50).astype(np.uint32))).to_list()
    for sid, found in zip(some, count_tokens(some), strict=True):
        n = len(SID_TOKEN.findall(sid))
        if n and found != n:  # a title has as many tokens as it has
            raise ValueError(
                f"count_tokens gives {found} tokens for {sid!r}, which is {n} SID tokens; add the "
                "SID tokens to the tokenizer (genrec.modeling.add_sid_tokens)"
            )


def _count(texts: pl.Series, count_tokens: CountTokens) -> pl.Series:
    return pl.Series(texts.name, list(count_tokens(texts.to_list())), dtype=pl.Int64)


def _summary(measured: pl.DataFrame, edges: IntArray) -> dict[str, Any]:
    """Mean, quantiles and histogram of lengths in tokens; the histogram counts rows."""
    lengths, weights = measured["both"].to_numpy(), measured["weight"].to_numpy()
    counts, _ = np.histogram(np.maximum(lengths, 1), [*edges[:-1], np.inf], weights=weights)
    return {
        "measured": len(lengths),
        "mean": float(np.average(lengths, weights=weights)),
        "mean_completion": float(np.average(measured[COMPLETION].to_numpy(), weights=weights)),
        "p50": weighted_quantile(lengths, weights, 0.5),
        "p95": weighted_quantile(lengths, weights, 0.95),
        "longest": int(lengths.max()),
        "histogram": np.rint(counts).astype(int).tolist(),
    }


def weighted_quantile(lengths: IntArray, weights: FloatArray, share: float) -> int:
    """The least length that at least that share of the weight doesn't exceed.

    Args:
        lengths: ``# (rows,)``
        weights: rows that each stands for. ``# (rows,)``
        share: between 0 and 1.
    """
    order = np.argsort(lengths, kind="stable")
    reached = np.cumsum(weights[order])
    # Weights are fractions: what misses the share by rounding alone has reached it.
    place = int(np.searchsorted(reached, share * reached[-1] * (1 - 1e-12)))
    return int(lengths[order][min(place, len(lengths) - 1)])


def _examples(
    path: Path, rows: Mapping[str, int], items: pl.DataFrame, seed: int
) -> list[dict[str, Any]]:
    """Rows in full, spread over the families; histories and targets with their titles."""
    names = [name for name in FAMILIES if name in rows]
    if len(names) > EXAMPLES:  # families that are alike stand together: every so many
        at = np.linspace(0, len(names) - 1, EXAMPLES).round().astype(int)
        names = [names[i] for i in at]
    most = {name: EXAMPLES // len(names) + (i < EXAMPLES % len(names))
        for i, name in enumerate(names)}  # fmt: skip
    columns = [ROW_ID, TASK, TARGET_KIND, TEMPLATE, PROMPT, COMPLETION, HISTORY_ITEMS, TARGETS]
    if TEXT_ORIGIN in pq.read_schema(path).names:
        columns.append(TEXT_ORIGIN)
    found = [
        row
        for part in sampled_rows(path, columns, most, seed)
        for row in part.iter_rows(named=True)
    ]
    found.sort(key=lambda row: names.index(row[TASK]))  # stable: else in file order
    shown = [(r[HISTORY_ITEMS][-EXAMPLE_ITEMS:], r[TARGETS][:EXAMPLE_ITEMS]) for r in found]
    wanted = [item for lists in shown for part in lists for item in part]
    known = items.filter(
        pl.col(ITEM_ID).is_in(pl.Series(wanted, dtype=items[ITEM_ID].dtype).implode())
    )
    about = {row[ITEM_ID]: row for row in known.select(ITEM_ID, TITLE, SID).iter_rows(named=True)}
    return [
        {
            "family": row[TASK],
            **{name: row[name] for name in (ROW_ID, TARGET_KIND, TEMPLATE, PROMPT, COMPLETION)},
            TEXT_ORIGIN: row.get(TEXT_ORIGIN),
            "history": [about[item] for item in history],
            "n_history": len(row[HISTORY_ITEMS]),
            "targets": [about[item] for item in targets],
            "n_targets": len(row[TARGETS]),
        }
        for row, (history, targets) in zip(found, shown, strict=True)
    ]
