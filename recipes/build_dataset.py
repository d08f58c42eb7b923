"""Split rows + semantic ids + prompts -> instruction rows of every task family.

    genrec build_dataset --config recipes/configs/quickstart/build_dataset.yaml
    genrec build_dataset --run_dir runs/mine --tasks all

Writes ``dataset/{train,rl,valid,test}.parquet``, complete rows as TRL takes them (row_id, user_id,
task, target_kind, targets, history, template, prompt, completion, and what else a family shows), a
copy of the templates, so that the run explains itself, and the dataset card (``report.html``,
``card.json``, ``README.md``). A family whose fields the data lack switches itself off, and the card
says why. Rows are made and written chunk by chunk: memory doesn't grow with the data.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import polars as pl
from tqdm import tqdm

from genrec.artifacts import Stage, stage_folder, write_parquet
from genrec.columns import (
    FUTURE,
    HISTORY,
    HISTORY_ITEMS,
    ITEM_ID,
    ITEM_INDEX,
    POSITION,
    REVIEW,
    ROW_ID,
    SEEN,
    SID,
    SUPERVISE_FROM,
    TARGET,
    TARGET_POSITION,
    TARGETS,
    TASK,
    TITLE,
    TRAIN_COUNT,
    USER_ID,
)
from genrec.config import check_choice, parse, run
from genrec.data.splits import GIVEN, read_split
from genrec.prompts import PromptRenderer
from genrec.tasks.attributes import AttributeIndex, item_attributes
from genrec.tasks.card import CardFacts, sampled_texts, write_card
from genrec.tasks.families import FAMILIES, HAS_TITLES, ITEM, SEQUENTIAL, switched_off
from genrec.tasks.instruction_rows import RowWriter, gathered
from genrec.tasks.mixing import named_numbers
from genrec.tasks.noise import ItemDraw, keep_about
from genrec.tasks.reasoning import RATIONALE_ORIGIN, TRAINED_ON_TARGET
from genrec.tasks.rendering import ItemTexts, render_rows
from genrec.tasks.rl_rows import rl_rows, without_reserved
from genrec.tasks.rows import InteractionLog, Sources, interaction_rows, item_rows, read_chunks
from genrec.tasks.sequential import explode, newest_alone, sequential_rows
from genrec.tasks.texts import item_intentions, item_queries, review_aspects, written_renderer
from genrec.tasks.writers import LocalWriter, OpenAIWriter, Writer, llm_item_texts, llm_preferences
from genrec.title_ids import BRACKETS, ItemMap, TitleIds, load_map

logger = logging.getLogger("genrec.build_dataset")

ALL = "all"
WRITERS = ("rules", "openai", "local")
CARD_VOCABULARY = 2000  # of the tokenizer that measures lengths where none is given
WHOLE_HISTORY, PER_ITEM, LAST_ITEM = MODES = ("whole_history", "per_item", "last_item")


@dataclass
class DatasetArgs:
    """Settings of the build_dataset stage."""

    run_dir: str = "runs/default"
    overwrite: bool = False
    # Families of genrec.tasks.families, or "all".
    tasks: list[str] = field(default_factory=lambda: [SEQUENTIAL, "title_to_sid", "sid_to_title"])
    # whole_history: a row per user, every item of the history is supervised in one causal pass.
    # per_item: a row per supervised item.
    # last_item: rows as of whole_history, of which only the newest item is supervised.
    sequential_mode: str = WHOLE_HISTORY
    # About so many rows of a family at most, drawn by row: "title_to_sid=1000", "*=100000".
    max_rows: list[str] = field(default_factory=list)
    keep_rows: str | None = None  # a Parquet file with the row_id of the training rows to keep
    n_templates: int | None = None  # use the first so many seen templates per family; default all
    # Who writes queries, intentions and preferences: "rules", "openai" (any endpoint of that
    # protocol, with the key in OPENAI_API_KEY) or "local" (a model of Hugging Face).
    writer: str = "rules"
    writer_model: str | None = None
    writer_url: str | None = None  # for example http://localhost:8000/v1
    writer_cache: str | None = None  # default: <run_dir>/written_texts.sqlite
    tokenizer_name_or_path: str | None = (
        None  # measures lengths for the card; else one made of rows
    )
    prompts_dir: str | None = None  # your own templates; default: genrec's
    # RL rows: the target is each user's rl_window-th last training interaction; the items from
    # there on are what the reward "future" counts. 1: the last one.
    rl_window: int = 1
    reserve_last: bool = False  # sft's rows end before the RL rows' targets
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        if self.rl_window < 1:
            raise ValueError(f"rl_window={self.rl_window} must be at least 1")
        check_choice("sequential_mode", self.sequential_mode, MODES)
        check_choice("writer", self.writer, WRITERS)
        if (self.writer == "rules") != (self.writer_model is None):
            raise ValueError(
                f"writer={self.writer!r} with writer_model={self.writer_model!r}: name the model "
                f"that writes, and who runs it ({', '.join(WRITERS[1:])})"
            )
        if (self.writer == "openai") != (self.writer_url is not None):
            raise ValueError("writer_url belongs to writer: openai, which needs it")
        for task in self.tasks:
            check_choice("tasks", task, (ALL, *FAMILIES))
        if SEQUENTIAL not in self.families:
            raise ValueError(
                f"tasks={self.tasks} must include {SEQUENTIAL!r}: it is what is served"
            )
        for name in named_numbers("max_rows", self.max_rows):
            check_choice("max_rows", name, ("*", *FAMILIES))
        if self.n_templates is not None and self.n_templates < 1:
            raise ValueError(f"n_templates={self.n_templates} must be at least 1")

    @property
    def families(self) -> list[str]:
        """Names of the families that are asked for."""
        return list(FAMILIES) if ALL in self.tasks else list(dict.fromkeys(self.tasks))


def read_sources(
    args: DatasetArgs, data: Path, semantic_ids: ItemMap, reserved: pl.DataFrame | None
) -> Sources:
    """What rows are made of, beside the split rows; `reserved`: RL rows that sft must not see."""
    seed = args.seed
    catalog = pl.read_parquet(data / "catalog.parquet", glob=False)
    wording = written_renderer()
    log = InteractionLog.of(data / "interactions.parquet")
    attributes = item_attributes(catalog)
    aspects = review_aspects(
        training_reviews(data, reserved) if REVIEW in log.columns else _NO_REVIEWS
    )
    queries = item_queries(catalog, attributes, wording, seed)
    intentions = item_intentions(catalog, attributes, wording, aspects, seed)
    preferences = None
    if args.writer != "rules":
        writer = make_writer(args)
        cache = Path(args.writer_cache or Path(args.run_dir) / "written_texts.sqlite")
        if "query_search" in args.families:
            made = llm_item_texts("query", catalog, wording, writer, cache)
            queries = pl.concat([made, queries.join(made, on=ITEM_INDEX, how="anti")])
        if "intention_search" in args.families:
            made = llm_item_texts("intention", catalog, wording, writer, cache)
            intentions = pl.concat([made, intentions.join(made, on=ITEM_INDEX, how="anti")])

        def preferences(ids: pl.Series, histories: pl.Series) -> pl.DataFrame:
            return llm_preferences(ids, histories, catalog, wording, writer, cache)

    return Sources(
        texts=ItemTexts.of(catalog, semantic_ids),
        item_ids=semantic_ids.item_ids,
        draw=ItemDraw(catalog[TRAIN_COUNT].to_numpy()),
        log=log,
        attributes=AttributeIndex.build(attributes, len(catalog)),
        intentions=intentions,
        queries=queries,
        aspects=aspects,
        wording=wording,
        seed=seed,
        preferences=preferences,
    )


def make_writer(args: DatasetArgs) -> Writer:
    """The LLM that writes texts."""
    assert args.writer_model is not None, "checked by the settings"
    if args.writer == "local":
        return LocalWriter(args.writer_model)
    assert args.writer_url is not None, "checked by the settings"
    return OpenAIWriter(args.writer_url, args.writer_model)


_NO_REVIEWS = pl.DataFrame(schema={USER_ID: pl.String, ITEM_INDEX: pl.Int32, POSITION: pl.Int32})


def training_reviews(data: Path, reserved: pl.DataFrame | None = None) -> pl.DataFrame:
    """Interactions of the training part alone, with their reviews; none of the reserved ones."""
    train = pl.scan_parquet(data / "train.parquet", glob=False)
    if reserved is not None:
        train = without_reserved(train.drop(SEEN, strict=False).collect(), reserved).lazy()
    end = train.group_by(USER_ID).agg(pl.col(TARGET_POSITION).max().alias("_last"))
    log = pl.scan_parquet(data / "interactions.parquet", glob=False)
    return (
        log.join(end, on=USER_ID, how="inner", maintain_order="left")
        .filter(pl.col(POSITION) <= pl.col("_last"))
        .drop("_last")
        .collect()
    )


def off_for_titles(names: Sequence[str]) -> dict[str, str]:
    """Families that say nothing, or can't be read, where items are named by titles."""
    reasons = {}
    for name in names:
        family = FAMILIES[name]
        if HAS_TITLES in family.needs:
            reasons[name] = "items are named by their titles already (quantize --method title)"
        elif family.steps:
            reasons[name] = "chains cite items by semantic ids, these are named by titles"
    return reasons


def check_brackets(renderer: PromptRenderer, names: Sequence[str]) -> None:
    """Refuse templates in which brackets would read as items."""
    for template in renderer.holding(BRACKETS):
        if template.split("/")[0] in names:
            raise ValueError(
                f"template {template!r} holds {' or '.join(BRACKETS)}, which mark items that are "
                "named by titles (quantize --method title); word it without"
            )


def shares(args: DatasetArgs, names: list[str], n_interactions: int) -> dict[str, float]:
    """The share of the interactions that each family takes."""
    limits = named_numbers("max_rows", args.max_rows)
    wanted = {name: limits.get(name, limits.get("*")) for name in names}
    return {
        name: min(1.0, most / max(n_interactions, 1))
        for name, most in wanted.items()
        if most is not None
    }


def training_rows(
    args: DatasetArgs,
    train: Path,
    names: list[str],
    sources: Sources,
    reserved: pl.DataFrame | None,
) -> Iterator[pl.DataFrame]:
    """Rows of all families, from the training rows chunk by chunk."""
    keep = pl.read_parquet(args.keep_rows, columns=[ROW_ID], glob=False) if args.keep_rows else None
    scan = pl.scan_parquet(train, glob=False)
    kept = scan if keep is None else scan.join(keep.lazy(), on=ROW_ID, how="semi")
    supervised = pl.col(HISTORY).list.len().cast(pl.Int64) + 1 - pl.col(SUPERVISE_FROM)
    n_rows, n_interactions = kept.select(pl.len(), supervised.sum()).collect().row(0)
    if keep is not None:
        if not n_rows:
            first = scan.select(ROW_ID).head(1).collect().item()
            raise ValueError(
                f"keep_rows={args.keep_rows} names none of the training rows; its {ROW_ID} should "
                f"read like {first!r}"
            )
        logger.info("keep_rows: %d training rows are left", n_rows)
    taken = shares(args, names, n_interactions)
    in_mode = {WHOLE_HISTORY: lambda rows: rows, PER_ITEM: explode, LAST_ITEM: newest_alone}
    units = n_interactions if args.sequential_mode == PER_ITEM else n_rows
    share = shares(args, [SEQUENTIAL], units).get(SEQUENTIAL, 1.0)
    limits = named_numbers("max_rows", args.max_rows)
    for name in names:
        if FAMILIES[name].unit == ITEM:
            rows = item_rows(FAMILIES[name], sources, scan.collect_schema()[USER_ID])
            most = limits.get(name, limits.get("*"))
            if most is not None and most < len(rows):
                rows = rows.filter(keep_about(rows[ROW_ID], args.seed, most / len(rows)))
            yield rows
    bar = tqdm(total=n_rows, desc="build_dataset", unit=" split rows", mininterval=1)
    for chunk in read_chunks(train):
        if keep is not None:
            chunk = chunk.join(keep, on=ROW_ID, how="semi", maintain_order="left")
        bar.update(len(chunk))
        if reserved is not None:
            chunk = without_reserved(chunk, reserved)
        rows = sequential_rows(in_mode[args.sequential_mode](chunk))
        yield rows if share == 1 else rows.filter(keep_about(rows[ROW_ID], args.seed, share))
        yield from interaction_rows(chunk, names, sources, taken)
    bar.close()


def write_rows(path: Path, tables: Iterator[pl.DataFrame], writer: RowWriter) -> Counter[str]:
    """Write rendered tables; rows per family."""
    counts: Counter[str] = Counter()
    for table in tables:
        writer.write(table)
        counts.update(dict(table[TASK].value_counts().iter_rows()))
    writer.close()
    return counts


def token_counter(
    args: DatasetArgs, path: Path, semantic_ids: ItemMap
) -> tuple[Callable[[Sequence[str]], list[int]], str]:
    """Counts tokens for the dataset card, and what counts them."""
    from transformers import AutoTokenizer  # slow to import

    from genrec.decoding.item_tokens import prepare_tokenizer
    from genrec.modeling import train_tokenizer
    from genrec.prompt_format import encode_text

    if args.tokenizer_name_or_path:
        name = args.tokenizer_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(name)
    else:
        tokenizer = train_tokenizer(sampled_texts(path, 500, args.seed), CARD_VOCABULARY)
        name = f"byte-level BPE of {CARD_VOCABULARY:,} tokens, trained on a sample of these rows"
    prepare_tokenizer(tokenizer, semantic_ids)

    def count(texts: Sequence[str]) -> list[int]:
        return [len(row) for row in encode_text(tokenizer, texts)]

    return count, name


def main() -> None:
    """Run the stage."""
    args = parse(DatasetArgs)
    renderer = PromptRenderer(args.prompts_dir)
    prompts = {"prompts_sha256": renderer.sha256(), "wording_sha256": written_renderer().sha256()}
    config = {**asdict(args), **prompts}
    files = {"keep_rows": Path(args.keep_rows)} if args.keep_rows else {}
    stage = Stage(
        args.run_dir, "build_dataset", config, ["prepare", "quantize"], files=files,
        ignore=["prompts_dir", "keep_rows", "writer_cache"],
    )  # fmt: skip
    if stage.is_done(args.overwrite):
        return
    if args.rl_window > 1 and stage.upstream["prepare"].config.get("protocol") == GIVEN:
        raise ValueError(
            f"rl_window={args.rl_window}: given rows are single moments, and what follows one "
            "isn't known; use rl_window: 1"
        )
    data = stage_folder(args.run_dir, "prepare")
    semantic_ids = load_map(stage_folder(args.run_dir, "quantize"))
    last = rl_rows(read_split(args.run_dir, "train", "build_dataset"), data, args.rl_window)
    reserved = last if args.reserve_last else None
    sources = read_sources(args, data, semantic_ids, reserved)
    off = switched_off(args.families, sources.has())
    if isinstance(semantic_ids, TitleIds):
        off |= off_for_titles(args.families)
        check_brackets(renderer, args.families)
    names = [name for name in args.families if name not in off]
    for name, reason in off.items():
        logger.info("%s is off: %s", name, reason)

    def render(rows: pl.DataFrame, template: str | None = None) -> pl.DataFrame:
        return render_rows(rows, sources.texts, renderer, args.seed, 0, args.n_templates, template)

    train = data / "train.parquet"
    item_ids, user_id = (
        semantic_ids.item_ids,
        pl.scan_parquet(train, glob=False).collect_schema()[USER_ID],
    )
    path = stage.folder / "train.parquet"
    tables = (render(rows) for rows in training_rows(args, train, names, sources, reserved))
    counts = write_rows(path, tables, RowWriter(path, names, item_ids, user_id))
    serving = renderer.names(SEQUENTIAL)[0]
    for split in ("valid", "test"):
        rows = read_split(args.run_dir, split, "build_dataset")
        path = stage.folder / f"{split}.parquet"
        one = iter([render(sequential_rows(rows), serving)])
        write_rows(path, one, RowWriter(path, [SEQUENTIAL], item_ids, user_id))
    rows = render(sequential_rows(last), serving)
    rows = rows.with_columns(last[TARGET], last[SEEN], last[FUTURE])
    ids = [gathered(rows[name], item_ids) for name in (TARGETS, HISTORY_ITEMS)]
    write_parquet(stage.folder / "rl.parquet", rows.with_columns(ids))
    shutil.copytree(renderer.folder, stage.folder / "prompts", dirs_exist_ok=True)
    titles = pl.read_parquet(data / "catalog.parquet", columns=[TITLE], glob=False)[TITLE]
    items = pl.DataFrame({ITEM_ID: item_ids, TITLE: titles, SID: semantic_ids.sids()})
    count, tokenizer = token_counter(args, stage.folder / "train.parquet", semantic_ids)
    facts = CardFacts(
        name=Path(args.run_dir).name,
        counts={name: counts[name] for name in names},
        switched_off=off,
        seed=args.seed,
        n_templates=args.n_templates,
        serving_template=serving,
        prompts_sha256=renderer.sha256(),
        data=stage.upstream["prepare"].metrics,
        tokenizer=tokenizer,
        keep_rows=args.keep_rows is not None,
    )
    write_card(stage.folder, facts, items, count)
    metrics = {
        "rows_per_task": dict(counts),
        "switched_off": off,
        "serving_template": serving,
        **prompts,
        "rationale_origin": RATIONALE_ORIGIN,
        "trained_on_target": TRAINED_ON_TARGET,
    }
    stage.finish(rows=counts.total(), seed=args.seed, metrics=metrics)
    print("; ".join(f"{task}: {n:,} rows" for task, n in counts.items()))
    print(f"dataset card: {stage.folder / 'report.html'}")


if __name__ == "__main__":
    run(main)
