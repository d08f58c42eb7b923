"""Benchmark: from a log to split rows, instruction rows and tokens, at 1M to 100M interactions.

    python recipes/benchmarks/dataset.py                                  # 1,000,000 interactions
    python recipes/benchmarks/dataset.py --interactions 1000000 10000000 100000000
    python recipes/benchmarks/dataset.py --quick                          # 200,000, under a minute

The log is synthetic and lies on disk as Parquet: users' activities follow a power law, items are
Zipf-distributed, users interleave in the order of time. Each stage runs in a process of its own,
whose peak memory (`resource.getrusage`) no other stage has raised:

- index: read the log, check it, order it, number the items, cut leave-one-out rows with their
  windows, write all tables as `genrec prepare` does. Rates count interactions. This stage holds the
  log in memory, so its peak grows; "index_bytes_per_interaction" says by how much.
- whole_history, per_item, mix: split rows to instruction rows to ``train.parquet`` as `genrec
  build_dataset` does: a row per window, for all of the data; a row per item; and every family of
  interactions that these data allow (both of as many rows as `--rows` says). Rates count rows
  that were written. Their peak doesn't grow with the data.
- tokenize: what `genrec sft` does with them: encoding alone, and what its dataset delivers in
  batches of 64, rendered anew for an epoch. One process, no workers.
- others: the same per_item rows by what one would otherwise write: a Python loop with a template
  per row, and `datasets.Dataset.map` with the same function.

CPU only. The last line is one JSON object; its headline figures are those of the last size.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from genrec.artifacts import write_json, write_parquet
from genrec.columns import (
    COMPLETION,
    HISTORY_ITEMS,
    ITEM_ID,
    PROMPT,
    ROW_ID,
    TARGETS,
    TASK,
    TRAIN_COUNT,
    USER_ID,
)
from genrec.data.cleaning import clean
from genrec.data.readers import read_table
from genrec.data.splits import leave_one_out
from genrec.prompts import PromptRenderer
from genrec.semantic_ids import SemanticIds
from genrec.tasks.attributes import AttributeIndex, item_attributes
from genrec.tasks.families import FAMILIES, INTERACTION, SEQUENTIAL, switched_off
from genrec.tasks.instruction_rows import InstructionRows, RowWriter
from genrec.tasks.mixing import plan
from genrec.tasks.noise import ItemDraw
from genrec.tasks.rendering import ItemTexts, render_rows
from genrec.tasks.rows import InteractionLog, Sources, interaction_rows, read_chunks
from genrec.tasks.sequential import explode, sequential_rows
from genrec.tasks.texts import item_intentions, item_queries, review_aspects, written_renderer

MEAN_LENGTH = 20  # interactions per user
MAX_HISTORY = 20
CODEBOOK = 256
BATCH = 64
STAGES = ("log", "index", "whole_history", "per_item", "mix", "tokenize", "others")


def make_log(folder: Path, n: int, n_items: int) -> dict[str, Any]:
    """``log.parquet`` and ``items.parquet``, made and written in chunks.

    The activity of the user of rank x (a share) is proportional to x^(-2/3), from a third of the
    mean to some 200 times of it; the item of rank r is drawn with a probability of 1/r. Chunks
    follow one another in time; within a chunk times are in no order.
    """
    (folder / "data").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    n_users, floor = max(n // MEAN_LENGTH, 10), 0.04
    user_ids, item_ids = rng.permutation(n_users) + 10_000_000, rng.permutation(n_items) + 1
    size = 1 << 20
    writer = None
    for start in range(0, n, size):
        rows = min(size, n - start)
        rank = (floor + (1 - floor) * rng.random(rows)) ** 3
        user = ((rank - floor**3) / (1 - floor**3) * n_users).astype(np.int64)
        item = (np.exp(rng.random(rows) * np.log(n_items)) - 1).astype(np.int64)
        moment = 1_500_000_000 + rng.integers(start, start + rows, rows) * 100_000_000 // n
        table = pa.table(
            {
                "user_id": user_ids[np.minimum(user, n_users - 1)],
                "item_id": item_ids[np.minimum(item, n_items - 1)],
                "time": moment,
                "rating": rng.integers(1, 6, rows).astype(np.float64),
            }
        )
        writer = writer or pq.ParquetWriter(folder / "log.parquet", table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    make_items(folder / "items.parquet", n_items, rng)
    return {"interactions": n, "log_mb": round((folder / "log.parquet").stat().st_size / 1e6)}


def make_items(path: Path, n_items: int, rng: np.random.Generator) -> None:
    """A catalogue with titles of three words, brands, category paths, prices, descriptions."""
    words = np.array([f"{a}{b}" for a in _SYLLABLES for b in _SYLLABLES], dtype=object)

    def drawn(n: int) -> np.ndarray:
        return words[(len(words) * rng.random((n_items, n)) ** 2).astype(np.int64)]

    title, text, filed = drawn(3), drawn(12), rng.integers(0, 20, (n_items, 2))
    pl.DataFrame(
        {
            "item_id": np.arange(1, n_items + 1),
            "title": [" ".join(row).title() + f" {i}" for i, row in enumerate(title)],
            "brand": drawn(1)[:, 0],
            "category": [f"Shop > Section {a} > Shelf {a}-{b}" for a, b in filed],
            "price": np.round(rng.lognormal(3, 1, n_items), 2),
            "description": [" ".join(row).capitalize() + "." for row in text],
        }
    ).write_parquet(path)


_SYLLABLES = "ba ke lo mi nu pra sti tor ven zil cha dro fen gal hux".split()


def index(folder: Path, _: int) -> dict[str, Any]:
    """The log as split rows on disk: what `genrec prepare` does."""
    data = folder / "data"
    seconds: dict[str, float] = {}
    with timed(seconds, "read"):
        raw = read_table(
            folder / "log.parquet", folder / "items.parquet", time_column="time",
            rating_column="rating", brand_column="brand", category_column="category",
            category_separator=">", price_column="price", description_column="description",
        )  # fmt: skip
        n = raw.interactions.height
    with timed(seconds, "clean"):
        clean_data = clean(raw)
        del raw
    with timed(seconds, "write log"):
        write_parquet(data / "interactions.parquet", clean_data.interactions)
    with timed(seconds, "split"):
        splits = leave_one_out(
            clean_data.interactions, len(clean_data.catalog), max_history=MAX_HISTORY
        )
    with timed(seconds, "write rows"):
        counts = pl.Series(TRAIN_COUNT, splits.train_count, dtype=pl.Int32)
        write_parquet(data / "catalog.parquet", clean_data.catalog.with_columns(counts))
        for name in ("train", "valid", "test"):
            write_parquet(data / f"{name}.parquet", getattr(splits, name))
    written = sum(path.stat().st_size for path in data.iterdir())
    return {
        "interactions": n,
        "users": splits.valid.height + splits.train_only_users,
        "train_rows": splits.train.height,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "rows_per_s": round(n / sum(seconds.values())),
        "bytes_written_per_interaction": round(written / n, 1),
    }


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note the seconds of a block."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def random_sids(item_ids: pl.Series) -> SemanticIds:
    """Three levels of codes, no two items alike."""
    shape = (CODEBOOK,) * 3
    drawn = np.random.default_rng(1).choice(CODEBOOK**3, len(item_ids), replace=False)
    codes = np.stack(np.unravel_index(drawn, shape), axis=1).astype(np.int32)
    return SemanticIds(item_ids, codes, shape)


def read_sources(data: Path) -> Sources:
    """What rows are made of: random SIDs, and all that the catalogue says."""
    catalog = pl.read_parquet(data / "catalog.parquet")
    semantic_ids = random_sids(catalog[ITEM_ID])
    wording, attributes = written_renderer(), item_attributes(catalog)
    log = InteractionLog.of(data / "interactions.parquet")
    no_aspects = review_aspects(pl.read_parquet(data / "interactions.parquet", n_rows=0))
    return Sources(
        texts=ItemTexts.of(catalog, semantic_ids),
        item_ids=semantic_ids.item_ids,
        draw=ItemDraw(catalog[TRAIN_COUNT].to_numpy()),
        log=log,
        attributes=AttributeIndex.build(attributes, len(catalog)),
        intentions=item_intentions(catalog, attributes, wording, no_aspects),
        queries=item_queries(catalog, attributes, wording),
        aspects=no_aspects,
        wording=wording,
        seed=0,
    )


def render(folder: Path, most: int, mode: str) -> dict[str, Any]:
    """Split rows as rendered instruction rows on disk: what `genrec build_dataset` does."""
    sources, renderer = read_sources(folder / "data"), PromptRenderer()
    off = switched_off(list(FAMILIES), sources.has())
    mixed = [n for n, f in FAMILIES.items() if n not in off and f.unit == INTERACTION]
    names = mixed if mode == "mix" else [SEQUENTIAL]
    train = folder / "data" / "train.parquet"
    user_id = pl.read_parquet_schema(train)[USER_ID]
    base = peak_gb()

    def tables() -> Iterator[pl.DataFrame]:
        # Whole chunks go through all families: a few thousand rows of each, and no more than asked.
        for chunk in read_chunks(train, min(50_000, max(2_000, most // len(names)))):
            if mode == "whole_history":
                yield sequential_rows(chunk)
            elif mode == "per_item":
                yield sequential_rows(explode(chunk))
            else:
                yield from interaction_rows(chunk, names, sources, {})

    path = folder / f"{mode}.parquet"
    writer = RowWriter(path, names, sources.item_ids, user_id)
    per_family: dict[str, list[float]] = {}
    started = last = time.perf_counter()
    for rows in tables():
        writer.write(render_rows(rows, sources.texts, renderer))
        now = time.perf_counter()
        spent = per_family.setdefault(rows[TASK][0] if len(rows) else "", [0, 0.0])
        spent[0], spent[1], last = spent[0] + len(rows), spent[1] + now - last, now
        if writer.rows >= most:
            break
    writer.close()
    seconds = time.perf_counter() - started
    result: dict[str, Any] = {
        "rows": writer.rows,
        "rows_per_s": round(writer.rows / seconds),
        "bytes_per_row": round(path.stat().st_size / writer.rows, 1),
        "mb_per_s": round(path.stat().st_size / seconds / 1e6, 1),
        "gb_before_the_first_row": round(base, 2),
    }
    if mode == "mix":
        # The first family of a chunk pays for the columns that others share.
        result["families"] = {n: round(rows / spent) for n, (rows, spent) in per_family.items()}
    return result


def tokenize(folder: Path, most: int) -> dict[str, Any]:
    """Encoding alone, and what the dataset of a training delivers batch by batch."""
    from genrec.modeling import add_sid_tokens, encode_rows, train_tokenizer
    from genrec.training_data import EpochRows, EpochSampler, estimated_lengths, sample_texts

    sources = read_sources(folder / "data")
    words = sources.texts.titles.to_list()[:20_000] + sample_texts(folder / "mix.parquet")[:20_000]
    tokenizer = train_tokenizer(words, 2000)
    levels = add_sid_tokens(tokenizer, random_sids(sources.item_ids))
    sid_ids = {token for level in levels for token in level}
    found: dict[str, Any] = {}
    for mode in ("per_item", "mix"):
        path = folder / f"{mode}.parquet"
        text = pl.scan_parquet(path).select(PROMPT, COMPLETION).head(most).collect()
        started, tokens = time.perf_counter(), 0
        for part in text.iter_slices(1000):
            made = encode_rows(
                tokenizer, part[PROMPT].to_list(), part[COMPLETION].to_list(), sid_ids
            )
            tokens += sum(map(len, made["input_ids"]))
        seconds = time.perf_counter() - started
        rows = InstructionRows.read(
            path, sources.item_ids, sources.texts, PromptRenderer(), 0, None
        )
        data = EpochRows(
            rows, plan(rows.table[TASK], 2), estimated_lengths(path), tokenizer, sid_ids
        )
        data.set_epoch(1)
        order = list(EpochSampler(data, BATCH, 0, grouped=False))[: most // 4]
        started = time.perf_counter()
        for start in range(0, len(order), BATCH):
            data.__getitems__(order[start : start + BATCH])
        delivered = len(order) / (time.perf_counter() - started)
        found[mode] = {
            "rows": len(text),
            "rows_per_s": round(len(text) / seconds),
            "tokens_per_s": round(tokens / seconds),
            "tokens_per_row": round(tokens / len(text), 1),
            "epoch_rows_per_s_in_batches_of_64": round(delivered),
        }
    return found


def others(folder: Path, most: int) -> dict[str, Any]:
    """The same rows by a loop and by datasets.map, and whether they are the same."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    sources, renderer = read_sources(folder / "data"), PromptRenderer()
    names = renderer.names(SEQUENTIAL)
    sids = sources.texts.sids.to_list()
    split = pl.read_parquet(folder / "data" / "train.parquet", n_rows=most)
    rows = sequential_rows(explode(split)).head(most)
    ours = render_rows(rows, sources.texts, renderer)
    template = dict(zip(ours[ROW_ID], ours["template"], strict=True))
    ending = f"{SEQUENTIAL}/completion/01"

    def one(row: dict[str, Any]) -> dict[str, str]:
        history = "".join([sids[item] for item in row[HISTORY_ITEMS]])
        targets = "".join([sids[item] for item in row[TARGETS]])
        name = template.get(row[ROW_ID], names[0])
        return {
            PROMPT: renderer.render(name, sids={"history": history}),
            COMPLETION: renderer.render(ending, sids={"targets": targets}),
        }

    started = time.perf_counter()
    made = [{**row, **one(row)} for row in rows.iter_rows(named=True)]
    pl.DataFrame(made, schema_overrides=rows.schema).write_parquet(folder / "loop.parquet")
    loop = len(rows) / (time.perf_counter() - started)
    same = pl.read_parquet(folder / "loop.parquet")[PROMPT].equals(ours[PROMPT])
    dataset = Dataset(rows.to_arrow(compat_level=pl.CompatLevel.oldest()))
    started = time.perf_counter()
    dataset.map(one, load_from_cache_file=False).to_parquet(folder / "map.parquet")
    mapped = len(rows) / (time.perf_counter() - started)
    return {
        "rows": len(rows),
        "python_loop_rows_per_s": round(loop),
        "datasets_map_rows_per_s": round(mapped),
        "same_prompts": same,
    }


def peak_gb() -> float:
    """Largest resident memory of this process so far, in GB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (1e9 if sys.platform == "darwin" else 1e6)


def run_stage(stage: str, folder: Path, most: int, n_items: int) -> dict[str, Any]:
    """One stage in this process."""
    functions: dict[str, Callable[[Path, int], dict[str, Any]]] = {
        "log": lambda folder, most: make_log(folder, most, n_items),
        "index": index, "tokenize": tokenize, "others": others,
    }  # fmt: skip
    function = functions.get(stage, lambda folder, most: render(folder, most, stage))
    before, cpu = peak_gb(), time.process_time()
    found = function(folder, most)
    measured = {
        "cpu_s": round(time.process_time() - cpu, 1),
        "peak_gb": round(peak_gb(), 2),
        "gb_imports": round(before, 2),
        "load": round(os.getloadavg()[0], 1),
    }
    return found | measured


def in_own_process(stage: str, folder: Path, most: int, n_items: int) -> dict[str, Any]:
    """`run_stage`, with a peak that no earlier work has raised."""
    command = [sys.executable, __file__, "--stage", stage, "--folder", str(folder)]
    command += ["--rows", str(most), "--items", str(n_items)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{stage}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def of_size(n: int, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All stages on so many interactions."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"interactions": n}
    size = {"log": n, "whole_history": 1 << 62, "tokenize": args.rows // 20}
    size["others"] = args.rows // 50
    for stage in args.stages:
        found[stage] = in_own_process(stage, folder, size.get(stage, args.rows), args.items)
        print(f"{n:,} {stage}: {found[stage]}", flush=True)
    return found


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--interactions", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--items", type=int, default=100_000, help="of the catalogue")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of per_item and mix")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument(
        "--quick", action="store_true", help="200,000 interactions, rows; 10,000 items"
    )
    parser.add_argument("--folder", type=Path, help="for the files, kept; default: temporary")
    parser.add_argument("--output", type=Path, help="JSON, rewritten after each size")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(run_stage(args.stage, args.folder, args.rows, args.items)))
        return
    if args.quick:
        args.interactions, args.rows, args.items = [200_000], 100_000, 10_000
    sizes: list[dict[str, Any]] = []
    for n in args.interactions:
        folder = args.folder or Path(tempfile.mkdtemp(prefix="genrec-dataset-"))
        sizes.append(of_size(n, folder / str(n), args))
        if not args.folder:
            shutil.rmtree(folder)
        if args.output:
            write_json(args.output, {**headline(sizes), "sizes": sizes})
    print(json.dumps({**headline(sizes), "sizes": sizes}))


def headline(sizes: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the last size; of rendering those of the mix, the slowest of the three."""
    last = sizes[-1]
    found: dict[str, Any] = {"interactions": last["interactions"]}
    for name, stage in (("rows_indexed_per_s", "index"), ("rows_rendered_per_s", "mix")):
        if stage in last:
            found[name] = last[stage]["rows_per_s"]
    if "tokenize" in last:
        found["rows_tokenized_per_s"] = last["tokenize"]["mix"]["rows_per_s"]
    measured = [last[stage] for stage in STAGES[1:5] if stage in last]
    found["peak_gb"] = max((stage["peak_gb"] for stage in measured), default=None)
    if len(sizes) > 1 and all("index" in size for size in sizes):
        grown = last["index"]["peak_gb"] - sizes[0]["index"]["peak_gb"]
        more = last["interactions"] - sizes[0]["interactions"]
        found["index_bytes_per_interaction"] = round(grown * 1e9 / more, 1) if more else None
    if "others" in last and "per_item" in last:
        ours = last["per_item"]["rows_per_s"]
        found["times_python_loop"] = round(ours / last["others"]["python_loop_rows_per_s"], 1)
        found["times_datasets_map"] = round(ours / last["others"]["datasets_map_rows_per_s"], 1)
    return found


if __name__ == "__main__":
    main()
