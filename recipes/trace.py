"""Every intermediate value of the line for one user, from the raw rows to the audit record.

    genrec trace --run_dir runs/quickstart --user U01223

Writes nothing but the note that the test rows were read. Without --user it takes the first
explained one. Stages that aren't there yet are named and left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from genrec.artifacts import (
    FOLDERS,
    Manifest,
    load_manifest,
    read_json,
    read_shards,
    require,
    sha256_bytes,
    stage_folder,
)
from genrec.chains import Chain, read_chains
from genrec.columns import (
    HISTORY,
    ITEM_ID,
    PROMPT_SHA256,
    RANK,
    ROW_ID,
    SCORE,
    SEEN,
    SID,
    TARGET,
    TARGET_POSITION,
    TITLE,
    USER_ID,
)
from genrec.config import make_console, parse, run
from genrec.data.splits import GIVEN, read_split, rows_of_user
from genrec.generation.allow_lists import rows_allowed_then
from genrec.metrics import RelevantRanks, gains, hits
from genrec.prompts import escape_text

if TYPE_CHECKING:
    from genrec.recommend import Recommender

_SCORE_TOLERANCE = 1e-3
_ROWS_SHOWN, _ROWS_BEHIND = 40, 5  # of the log, and of these behind the target


@dataclass
class TraceArgs:
    """Settings of trace."""

    run_dir: str = "runs/default"
    user: str | None = None  # default: the first explained user, else the first of the split
    top: int = 5  # prefixes shown per level

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        if self.top < 1:
            raise ValueError(f"top={self.top} must be at least 1")


@dataclass
class View:
    """What the sections share: the run, the user's row, and where to print."""

    run_dir: str
    manifests: dict[str, Manifest]
    split: str
    catalog: pl.DataFrame
    row: dict[str, Any]
    chains: list[Chain]
    console: Console

    def heading(self, text: str) -> None:
        """Print a section heading."""
        self.console.print()
        self.console.print(Text(text, style="bold cyan"))

    def say(self, text: str) -> None:
        """Print text as it is."""
        self.console.print(Text(text))

    def item(self, index: int) -> str:
        """Id and title of a catalogue row."""
        title = escape_text(self.catalog[TITLE][index], 60)
        return f"{self.catalog[ITEM_ID][index]}  {title}"

    def data(self, stage: str, name: str) -> pl.DataFrame:
        """A Parquet file of a stage."""
        return pl.read_parquet(stage_folder(self.run_dir, stage) / name, glob=False)


def load_view(args: TraceArgs) -> tuple[View, list[str]]:
    """The finished stages, the user's row, and the names of the missing stages."""
    require(args.run_dir, "prepare")
    done = {s: require(args.run_dir, s) for s in FOLDERS if load_manifest(args.run_dir, s)}
    split = str(done["recommend"].config["split"]) if "recommend" in done else "test"
    data = stage_folder(args.run_dir, "prepare")
    rows = read_split(args.run_dir, split, "trace")
    chains = []
    if "explain" in done:
        chains = read_chains(stage_folder(args.run_dir, "explain") / "chains.jsonl")
    if args.user is not None:
        mine = rows_of_user(rows, args.user, split)
    else:
        first = chains[0].row_id if chains else rows[ROW_ID][0]
        mine = rows.filter(pl.col(ROW_ID) == first)
    explained = {chain.row_id for chain in chains}
    # A user with several rows: an explained one, if there is.
    candidates = list(mine.iter_rows(named=True))
    row = next((r for r in candidates if r[ROW_ID] in explained), candidates[0])
    console = make_console(width=100)
    view = View(
        args.run_dir, done, split, pl.read_parquet(data / "catalog.parquet", glob=False), row,
        [chain for chain in chains if chain.row_id == row[ROW_ID]], console,
    )  # fmt: skip
    return view, [s for s in FOLDERS if s not in done and s not in ("prune", "grpo")]


def show_data(view: View) -> None:
    """Raw rows, history kept and cut, target."""
    row = view.row
    view.heading("1. The user's rows (prepare)")
    history = row[HISTORY]
    if read_json(stage_folder(view.run_dir, "prepare") / "split.json")["protocol"] == GIVEN:
        view.say(
            f"{row[ROW_ID]}, as given; target {view.item(row[TARGET])}; history, oldest first:"
        )
        for item in history:
            view.say(f"  {view.item(item)}")
        return
    log = view.data("prepare", "interactions.parquet").filter(pl.col(USER_ID) == row[USER_ID])
    cut = row[TARGET_POSITION] - len(history)
    table = Table(box=None, pad_edge=False)
    for name in ("position", "item_id", "title", "timestamp", "rating", "used as"):
        table.add_column(name, overflow="fold")
    # Users with several rows may have much behind this one's target.
    shown = log.filter(pl.col("position") <= row[TARGET_POSITION] + _ROWS_BEHIND)
    shown = shown.sort("position").tail(_ROWS_SHOWN)
    if log.height > shown.height:
        view.say(f"({shown.height} of {log.height} rows, around the target)")
    for event in shown.iter_rows(named=True):
        place = event["position"] - cut
        role = "cut off" if place < 0 else "history" if place < len(history) else "later"
        role = "target" if place == len(history) else role
        table.add_row(
            str(event["position"]),
            str(event[ITEM_ID]),
            Text(escape_text(view.catalog[TITLE][event["item_index"]], 45)),
            *(str("–" if event[n] is None else event[n]) for n in ("timestamp", "rating")),
            role,
        )
    view.console.print(table)
    view.say(
        f"{row[ROW_ID]}: {log.height} interactions; the history keeps {len(history)}, "
        f"{cut} older ones are cut off; target {view.item(row[TARGET])}"
    )


def show_item(view: View) -> None:
    """Vector, codes and SID of the last history item."""
    row = view.row
    if not row[HISTORY]:
        view.say("The history is empty.")
        return
    last = row[HISTORY][-1]
    view.heading(f"2. The last history item: {view.item(last)}")
    if "embed" in view.manifests:
        path = stage_folder(view.run_dir, "embed") / "item_embeddings.npy"
        vector = np.load(path, mmap_mode="r")[last].astype(np.float64)
        head = ", ".join(f"{x:+.3f}" for x in vector[:6])
        view.say(f"vector  ({len(vector)})  {head}, …  norm {np.linalg.norm(vector):.3f}")
    if "quantize" in view.manifests:
        found = view.data("quantize", "items.parquet").row(last, named=True)
        codes = f"codes   {list(found['codes'])}   semantic id" if "codes" in found else "name   "
        view.say(f"{codes} {found[SID]}")


def show_prompt(view: View, recommender: Recommender) -> list[int]:
    """The rendered prompt and its token ids."""
    from genrec.modeling import encode_prompts

    view.heading("3. The prompt (build_dataset)")
    prompt = recommender.prompts([view.row[HISTORY]])
    view.say(f"template {recommender.template}, sha256 {sha256_bytes(prompt[0].encode())[:16]}")
    view.say(prompt[0])
    ids = encode_prompts(recommender.tokenizer, prompt)[0]
    view.say(f"{len(ids)} token ids: {' '.join(map(str, ids))}")
    return ids


def show_search(view: View, recommender: Recommender, prompt: list[int], top: int) -> None:
    """Trie facts, surviving prefixes per level, and the list beside the stored one."""
    from genrec.explain.evidence import torch_engine
    from genrec.explain.prefixes import surviving_prefixes
    from genrec.semantic_ids import SemanticIds, sid_token

    engine, ids = torch_engine(recommender), recommender.semantic_ids
    trie = engine.trie
    view.heading("4. The search (recommend)")
    nodes = " → ".join(f"{len(t):,}" for t in trie.tokens)
    widest = ", ".join(str(trie.max_children(level)) for level in range(trie.n_levels))
    view.say(
        f"trie: {trie.n_items:,} items, prefixes per level {nodes}, at most {widest} children, "
        f"{trie.nbytes / 1024:,.0f} KiB"
    )
    recommended = view.manifests.get("recommend")
    made = recommended.config if recommended else {}
    k, width = made.get("k", 10), made.get("beam_width", 50)
    seen = np.array(view.row[SEEN] if made.get("filter_seen", True) else [], dtype=np.int64)
    view.say(f"beam width {width}, scores over: {engine.normalizer}, {len(seen)} items left out")
    allowed, unlike = None, ""
    try:
        if recommended:
            allowed = rows_allowed_then(recommended, view.catalog[ITEM_ID])
    except ValueError as error:
        unlike = str(error)
    left_out = seen
    if allowed is not None:
        view.say(f"recommend --allow and --deny left {len(allowed):,} of {trie.n_items:,} items")
        left_out = np.union1d(seen, np.setdiff1d(np.arange(trie.n_items), allowed))
    prefixes = []
    if isinstance(ids, SemanticIds):  # the pieces of a title say little
        prefixes = surviving_prefixes(engine, prompt, ids.codes, left_out, width)
    for level, beam in enumerate(prefixes):
        view.say(
            f"level {level + 1}: {len(beam.codes)} of {beam.n_prefixes} prefixes survive "
            f"({beam.n_excluded} excluded)"
        )
        for prefix, log_prob in zip(beam.codes[:top], beam.log_probs[:top], strict=True):
            sid = "".join(sid_token(i, int(code)) for i, code in enumerate(prefix))
            view.say(f"    {sid:<30} {log_prob:8.4f}   p {math.exp(log_prob):.2e}")
    permitted = None if allowed is None else trie.allow(allowed)
    result = engine.search([prompt], k, width, [seen], permitted)
    show_list(view, result.items[0], result.scores[0], result.level_log_probs[0])
    if unlike:
        view.say(f"stored list: not compared, {unlike}; the list above is out of all items")
    else:
        compare_stored(view, recommender, result.items[0], result.scores[0])


def show_list(view: View, items: np.ndarray, scores: np.ndarray, levels: np.ndarray) -> None:
    """The recommended list, the hit marked."""
    table = Table(box=None, pad_edge=False)
    for name in ("rank", "item_id", "title", "log p", "per level", ""):
        table.add_column(name, justify="right" if name in ("rank", "log p") else "left")
    for rank, item in enumerate(items[items >= 0], start=1):
        table.add_row(
            str(rank),
            str(view.catalog[ITEM_ID][int(item)]),
            Text(escape_text(view.catalog[TITLE][int(item)], 45)),
            f"{scores[rank - 1]:.4f}",
            " ".join(f"{x:.2f}" for x in levels[rank - 1]),
            Text("← target", style="green") if item == view.row[TARGET] else "",
        )
    view.console.print(table)
    place = np.flatnonzero(items == view.row[TARGET])
    view.say(f"hit: the target is at rank {place[0] + 1}" if len(place) else "no hit in this list")


def compare_stored(
    view: View, recommender: Recommender, items: np.ndarray, scores: np.ndarray
) -> None:
    """Whether the list made now is the stored one."""
    if "recommend" not in view.manifests:
        return
    table = read_shards(stage_folder(view.run_dir, "recommend"), "recommendations")
    stored = table.filter(pl.col(ROW_ID) == view.row[ROW_ID]).sort(RANK)
    if stored.is_empty():
        view.say("stored list: none, recommend was not asked for this row")
        return
    prompt = recommender.prompts([view.row[HISTORY]])[0]
    same_prompt = sha256_bytes(prompt.encode()).startswith(stored[PROMPT_SHA256][0])
    same = stored["item_index"].to_list() == items[items >= 0].tolist()
    difference = "–"
    if same:
        largest = np.abs(stored[SCORE].to_numpy() - scores[items >= 0]).max()
        difference = f"{largest:.1e}"
        same = bool(largest <= _SCORE_TOLERANCE)
    verdict = "EQUAL to the stored list" if same else "DIFFERENT from the stored list"
    view.say(
        f"{verdict} (largest |Δ log p| {difference}); prompt hash "
        f"{'equal' if same_prompt else 'DIFFERENT'}"
    )


def show_metrics(view: View) -> None:
    """The row's metrics beside the baselines: per system the means over its training seeds."""
    if "evaluate" not in view.manifests:
        return
    view.heading("5. This user's metrics (evaluate)")
    table = view.data("evaluate", "per_user.parquet").filter(pl.col(ROW_ID) == view.row[ROW_ID])
    if table.is_empty():
        view.say("this row was not evaluated")
        return
    k = max(view.manifests["evaluate"].config["ks"])
    several = "hit_ranks" in table.columns  # a row with several relevant items
    for (system,), seeds in table.group_by("system", maintain_order=True):
        seeds = seeds.sort("seed")
        ranks = [[rank] if rank > 0 else [] for rank in seeds["target_rank"]]
        n_relevant = np.ones(len(seeds), dtype=np.int64)
        if several:
            ranks, n_relevant = seeds["hit_ranks"].to_list(), seeds["n_relevant"].to_numpy()
        found = RelevantRanks(
            np.repeat(np.arange(len(ranks)), [len(r) for r in ranks]),
            np.array([rank for r in ranks for rank in r], dtype=np.int64),
            n_relevant,
        )
        places = "; ".join(", ".join(map(str, r)) if r else "–" for r in ranks)
        hr, ndcg = hits(found, k).mean(), gains(found, k).mean()
        view.say(f"  {system:<16} HR@{k} {hr:.2f}   NDCG@{k} {ndcg:.4f}   rank {places}")
    what = f"ranks of the {n_relevant[0]} relevant items" if several else "rank of the target"
    view.say(f"  ({what} for each training seed; – is not in the list)")


def show_chain(view: View) -> None:
    """The explanation of the top item."""
    if "explain" not in view.manifests:
        return
    view.heading("6. Why the top item (explain)")
    if not view.chains:
        view.say("this list was not explained; add the user to explain's `users`")
        return
    chain = min(view.chains, key=lambda chain: chain.rank)
    view.say(
        f"item {chain.item_id}; wording: {chain.rationale_origin}; trained on the target: "
        f"{'yes' if chain.trained_on_target else 'no'}"
    )
    for step in chain.steps:
        view.say(f"[{step.type}] {step.text}")
    for check in chain.checks:
        value = "not defined" if check.value is None else f"{check.value:.4g}"
        verdict = {None: "", True: "  passed", False: "  FAILED"}[check.passed]
        view.say(f"  {check.name:<26} {value}{verdict}")


def show_record(view: View) -> None:
    """Number and hash of the audit record."""
    if "audit" not in view.manifests:
        return
    from genrec.audit.custody import HEAD
    from genrec.audit.records import read_opened

    view.heading("7. The audit record (audit)")
    folder, erased = stage_folder(view.run_dir, "audit"), 0
    for record in read_opened(folder):
        erased += record["erased"]
        if record.get(ROW_ID) == view.row[ROW_ID]:
            total, number = read_json(folder / HEAD)["records"], record["record"]
            view.say(f"record {number} of {total}, sha256 {record['sha256']}")
            view.say(f"replay: genrec audit replay --run_dir {view.run_dir} --record {number}")
            return
    view.say(f"no record of this list{f' ({erased} records are erased)' if erased else ''}")


def main() -> None:
    """Print the sections in the order of the line."""
    args = parse(TraceArgs)
    view, missing = load_view(args)
    view.console.print(Text(f"{args.run_dir}, user {view.row[USER_ID]}", style="bold"))
    if missing:
        view.say(f"not there yet, left out below: {', '.join(missing)}")
    show_data(view)
    show_item(view)
    if not {"quantize", "build_dataset"} & set(missing):
        model = next((s for s in ("grpo", "sft") if s in view.manifests), None)
        made = view.manifests["recommend"].config if "recommend" in view.manifests else {}
        if model is None:
            view.say("There is no model yet, so no prompt is tokenised and nothing is searched.")
        else:
            from genrec.recommend import Recommender

            recommender = Recommender.load(
                args.run_dir,
                made.get("model_stage", model),
                "torch",
                made.get("normalizer"),
                made.get("dtype", "float32"),
                batch_size=1,
            )
            ids = show_prompt(view, recommender)
            show_search(view, recommender, ids, args.top)
    show_metrics(view)
    show_chain(view)
    show_record(view)


if __name__ == "__main__":
    run(main)
