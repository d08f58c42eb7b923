"""Model + trie -> a ranked list of catalogue items for every row of a split, or for anybody.

    genrec recommend --config recipes/configs/quickstart/recommend.yaml --run_dir runs/quickstart
    genrec recommend --run_dir runs/next --model_run runs/mine  # a later catalogue, an old model
    genrec recommend --run_dir runs/mine --users users.parquet --output_dir lists/today
    genrec recommend … --one_per_title true --max_per_category 3      # with --users
    genrec recommend … --memory_weight 0.2            # likewise: an item memory beside the model
    genrec recommend … --opt_out opted-out.csv        # of a split: no profiling for these users
    genrec recommend … --shard 1/8                    # one of eight jobs of a cluster, any order
    genrec recommend … --executor ray --num_actors 4  # needs genrec[ray]

With `model_run` the model, its tokenizer, templates and length of histories are that run's;
`run_dir` needs prepare, embed and quantize alone, extended from that run (see embed.py). A new
item's SID is made of tokens that the model knows, in prompts as in lists. Scores are normalised
over what the model declares; another `normalizer` is noted in the manifest.

`users` names a table with a user and a list of item ids in each row, oldest first: a Parquet file
or folder, CSV, TSV, JSON Lines, or a Hugging Face dataset. It is read in parts, so its size doesn't
matter. A user without history gets the list that the model gives to nobody known. `allow` and
`deny` name files of item ids, one a line (or a table's item_id column).

`opt_out` names a file of users who opted out of profiling. With a split, their lists lie apart in
``non-profiling.parquet``: the most popular items of the training part, the same for all, made
without history and without the filter of seen items. Where the file is a table with a column
item_id, that is the item on show where the list will stand, and the list holds those most alike it
in content (by the embed stage's text vectors). Neither evaluate nor explain looks at them; audit
keeps a record of each.

Writes ``recommendations/recommendations-<first row>-<last row>.parquet``, … (one row per
recommended item), ``progress.json`` while it works, and for a split ``rows.parquet`` (the rows that
were asked for). Killed and started again, it goes on at the next shard, and the files are the same
as without the kill. With `shard` the last part that finishes writes the manifest.

Longer than other recipes: half of it is settings and their checks.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

import polars as pl
from tqdm import tqdm

from genrec.artifacts import (
    MANIFEST,
    Stage,
    load_manifest,
    require,
    stage_folder,
    write_parquet,
)
from genrec.bundle.parts import ServedParts
from genrec.columns import ITEM_ID, ROW_ID, USER_ID
from genrec.config import check_choice, parse, run
from genrec.data.splits import read_split
from genrec.decoding.sampling import GumbelTopK, LevelSampling, Sampler, check_sampler
from genrec.embedding.vectors import VECTORS, content_file
from genrec.engine_options import check_engine_options, engine_options
from genrec.evaluation.item_memory import ItemMemory, memory_of_run
from genrec.generation.allow_lists import allowed_rows
from genrec.generation.jobs import (
    CHECKED,
    PROGRESS,
    WHOLE,
    GenerationJob,
    ProgressFile,
    check_users,
    generate,
    list_facts,
    locked,
    measured_speed,
    parse_part,
)
from genrec.generation.memory import POWER, check_power
from genrec.generation.non_profiling import (
    NON_PROFILING,
    SHOWN,
    non_profiling_lists,
    opted_out,
    shows_items,
)
from genrec.generation.prompt_lengths import PromptLengths, context_of
from genrec.generation.shaping import ListRules, caps_and_weights, parse_boosts
from genrec.generation.shards import DAMAGED, ShardInfo
from genrec.generation.users import (
    UNKNOWN,
    Marks,
    SplitRows,
    UserColumns,
    UserRows,
    UserTable,
    kept_sha256,
    remove_copy,
    source_marks,
    source_sha256,
)
from genrec.item_lists import IntArray
from genrec.normalizers import NORMALIZERS, Normalizer, declared_normalizer, mismatch
from genrec.recommend import TITLES_ON_TORCH, Recommender, check_descent
from genrec.semantic_ids import TITLES, SemanticIds, map_kind
from genrec.title_ids import load_map

logger = logging.getLogger("genrec.recommend")

# Settings that matter only with `users`, and those that can't change a list.
OF_USERS = ("users_split", "users_subset", "user_column", "history_column", "exclude_column",
    "candidates_column", "list_separator", "unknown_items", "sampler", "temperature", "top_p",
    "one_per_title", "title_variant", "max_per_category", "category_depth", "boosts",
    "max_cosine", "memory_weight", "memory_power")  # fmt: skip
HOW = ("batch_size", "output_dir", "shard", "executor", "ray_address", "num_actors",
    "cpus_per_actor", "gpus_per_actor", "tensor_parallel_size", "gpu_memory_utilization",
    "max_model_len", "cache_dir")  # fmt: skip
# Those of HOW that can change a list where sums are rounded to 16 bits: in which order they are
# taken depends on what is computed together.
ORDER_OF_SUMS = ("batch_size", "tensor_parallel_size")


@dataclass
class RecommendArgs:
    """Settings of the recommend stage."""

    run_dir: str = "runs/default"
    overwrite: bool = False
    model_stage: str | None = None  # sft or grpo; default: grpo where it is complete
    model_run: str | None = None  # run that the model comes from; default: run_dir
    engine: str = "torch"  # torch (in process), vllm, or vllm-inworker (see README)
    split: str = "test"
    k: int = 10
    beam_width: int = 50  # prefixes kept per level; wider is more exact and slower
    normalizer: str | None = None  # full, level or trie; default: what the model declares
    filter_seen: bool = True  # leave out what the user already has; evaluate must use the same rule
    dtype: str = "float32"
    batch_size: int = 64  # users decoded together
    shard_size: int = 2048  # rows per output file; the unit of resuming
    max_rows: int | None = None  # a deterministic sample of the split's rows; default all
    seed: int = 0
    allow: str | None = None  # file of item ids: nothing else is recommended
    deny: str | None = None  # file of item ids that nobody gets
    opt_out: str | None = None  # file of user ids whose lists must use no history; for a split
    # Anybody's users in place of a split.
    users: str | None = None  # table file, folder of Parquet files, or Hugging Face dataset
    users_split: str = "train"  # of a Hugging Face dataset
    users_subset: str | None = None
    user_column: str = "user_id"
    history_column: str = "history"  # item ids, oldest first: a list, or text
    exclude_column: str | None = None  # further items that the user must not get
    candidates_column: str | None = None  # the only items that the user may get; null: all
    list_separator: str = " "  # between the ids of a list that is text
    unknown_items: str = "error"  # items that the catalogue lacks: error, or drop (counted)
    output_dir: str | None = None  # where lists for `users` go; run_dir stays as it is
    # Diversity and business rules, for `users` alone; what each costs: benchmarks/list_shaping.py.
    sampler: str | None = None  # draw lists: gumbel (needs the trie normaliser) or levels
    temperature: list[float] = field(default_factory=lambda: [1.0])  # of levels: one, or per level
    top_p: list[float] = field(default_factory=lambda: [1.0])  # of levels: one, or per level
    one_per_title: bool = False  # of items with the same title keep the best
    title_variant: str | None = None  # regex of what titles of variants differ in, ",[^,]*$"
    max_per_category: int | None = None  # items of one category in a list
    category_depth: int = -1  # which part of the category path; negative counts from the end
    boosts: list[str] = field(default_factory=list)  # "category=factor"
    max_cosine: float | None = None  # of items whose vectors are nearer than that keep the best
    memory_weight: float = 0.0  # of an item memory in what lists are ordered by (see ensemble.py)
    memory_power: float = POWER  # its probabilities go by score ** power
    cache_dir: str | None = None  # where its settings are kept; default: as in evaluate
    # How the work is done; in float32 the result doesn't depend on it.
    shard: str = "1/1"  # i/n: make every n-th shard from the i-th on
    executor: str = "local"  # local, or ray (genrec[ray])
    ray_address: str | None = None  # of a running cluster; default: one on this machine
    num_actors: int = 1  # engines at once under ray
    cpus_per_actor: int | None = None  # cores and threads; default: all of them, shared equally
    gpus_per_actor: float | None = None  # default: that of tensor_parallel_size, 0 without GPUs
    tensor_parallel_size: int | None = None  # of vllm: GPUs that share a model; default 1
    gpu_memory_utilization: float | None = None  # of vllm: share of a GPU; default: the engine's
    max_model_len: int | None = None  # of both vLLM engines: tokens; default: the model's

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        check_choice("engine", self.engine, ("torch", "vllm", "vllm-inworker"))
        check_choice("split", self.split, ("valid", "test"))
        if self.normalizer is not None:
            check_choice("normalizer", self.normalizer, NORMALIZERS)
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        check_choice("executor", self.executor, ("local", "ray"))
        check_choice("unknown_items", self.unknown_items, ("error", "drop"))
        if self.model_stage is not None:
            check_choice("model_stage", self.model_stage, ("sft", "grpo"))
        if (self.users is None) != (self.output_dir is None):
            raise ValueError(
                "--users and --output_dir belong together: a run folder holds the lists of a split"
            )
        check_folders(self)
        check_numbers(self)
        if self.users is not None and self.opt_out is not None:
            raise ValueError(
                "opt_out is for a split; leave those who opted out of the table of --users, or "
                "give their rows an empty history"
            )
        if self.users is not None and self.max_rows is not None:
            raise ValueError("max_rows samples a split; give --users a table of fewer users")
        check_engine_options(self.engine, engine_options(self))
        check_gpus(self)
        if self.sampler is not None:
            check_choice("sampler", self.sampler, ("gumbel", "levels"))
            if self.engine != "torch":
                raise ValueError(f"sampler={self.sampler} needs engine=torch, not {self.engine}")
        check_power(self.memory_power)
        if not self.memory_weight and (self.memory_power != POWER or self.cache_dir):
            raise ValueError("memory_power and cache_dir are of a memory: set memory_weight, too")
        if self.memory_weight and self.users is None:
            raise ValueError(
                "memory_weight is for --users; for a split use genrec ensemble --memory_weight, "
                "which leaves the model's own lists to be explained and replayed"
            )
        if not list_rules(self).plain and self.users is None:
            raise ValueError(
                "lists that are drawn or shaped are for --users: those of a split are evaluated, "
                "explained and replayed as the model's own"
            )
        if not self.list_separator:
            raise ValueError("list_separator is empty; name what stands between two item ids")


def check_folders(args: RecommendArgs) -> None:
    """Reject folders that would mix lists with what they are made from."""
    for name in ("users", "output_dir", "model_run"):
        if getattr(args, name) == "":
            raise ValueError(f"--{name} is empty; name a path, or leave the flag out")
    if args.output_dir is None or args.users is None:
        return
    output = Path(args.output_dir).resolve()
    lists = stage_folder(output, "recommend")
    taken = {"run_dir": args.run_dir, "model_run": args.model_run}
    if Path(args.users).is_dir():
        taken["users"] = args.users
    for name, folder in taken.items():
        if folder is not None and output.is_relative_to(Path(folder).resolve()):
            raise ValueError(
                f"--output_dir {args.output_dir} lies in --{name} {folder}, which stays as it is; "
                "name a folder outside of it"
            )
    if Path(args.users).resolve().is_relative_to(lists):
        raise ValueError(f"--users {args.users} lies in {lists}, where lists are written; move it")


def check_numbers(args: RecommendArgs) -> None:
    """Reject numbers that can't work."""
    if not 1 <= args.k <= args.beam_width:
        raise ValueError(f"k={args.k} must lie between 1 and beam_width={args.beam_width}")
    for name in ("shard_size", "batch_size", "max_rows", "num_actors", "cpus_per_actor"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not 0 <= args.seed < 1 << 63:
        raise ValueError(f"seed={args.seed} must lie between 0 and 2^63 - 1")
    # nan is in no range
    if args.gpus_per_actor is not None and not 0 <= args.gpus_per_actor < math.inf:
        raise ValueError(f"gpus_per_actor={args.gpus_per_actor} must be a number of at least 0")


def gpus_of_an_actor(args: RecommendArgs) -> float | None:
    """GPUs of each; None: one where there are any."""
    if args.gpus_per_actor is None and (args.tensor_parallel_size or 1) > 1:
        return args.tensor_parallel_size
    return args.gpus_per_actor


def check_gpus(args: RecommendArgs) -> None:
    """Reject GPUs that an engine wouldn't use."""
    size = args.tensor_parallel_size or 1
    gpus = gpus_of_an_actor(args) or 0
    if args.executor == "ray" and (size > 1 or gpus > 1) and size != gpus:
        raise ValueError(
            f"gpus_per_actor={gpus:g} with tensor_parallel_size={size}: an engine uses one GPU or "
            "tensor_parallel_size (engine=vllm) of them; set both to the same number"
        )


def list_rules(args: RecommendArgs) -> ListRules:
    """The rules that the settings state."""
    temperature, top_p = (v[0] if len(v) == 1 else v for v in (args.temperature, args.top_p))
    if args.sampler != "levels" and (temperature, top_p) != (1.0, 1.0):
        raise ValueError("temperature and top_p belong to sampler=levels")
    sampler: Sampler | None = None
    if args.sampler == "gumbel":
        sampler = GumbelTopK(args.seed)
    elif args.sampler == "levels":
        sampler = LevelSampling(temperature, top_p, seed=args.seed)
    vectors = None if args.max_cosine is None else stage_folder(args.run_dir, "embed") / VECTORS
    return ListRules(
        sampler, args.one_per_title, args.title_variant, args.max_per_category,
        args.category_depth, parse_boosts(args.boosts), args.max_cosine, vectors,
        args.memory_weight,
    )  # fmt: skip


def make_stage(args: RecommendArgs, model_stage: str) -> Stage:
    """The stage with all that decides its result."""
    source = args.run_dir if args.model_run is None else args.model_run
    inputs, of_model = ["prepare", "quantize"], ["build_dataset", model_stage]
    if args.max_cosine is not None:
        inputs.append("embed")
    exact = args.dtype == "float32"
    ignore, hashes = [name for name in HOW if exact or name not in ORDER_OF_SUMS], {}
    if args.model_run is None:
        inputs += of_model
        ignore.append("model_run")
    else:
        hashes = {f"model_run/{s}": require(source, s).content_hash for s in of_model}
    # What isn't in effect is no setting of this run.
    given = ("allow", "deny", "opt_out", "users", "max_cosine")
    ignore += [name for name in given if getattr(args, name) is None]
    ignore += OF_USERS if args.users is None else ["split", "max_rows"]
    ignore += [] if args.memory_weight else ["memory_weight", "memory_power"]
    if args.users is not None and args.sampler is None:
        ignore.append("seed")
    files: dict[str, Path | str] = {}
    for name, what in {"allow": "item", "deny": "item", "opt_out": "user"}.items():
        if (path := getattr(args, name)) is not None:
            if not Path(path).is_file():
                raise ValueError(f"--{name} {path} is not a file; name a list of {what} ids")
            files[name] = path
    if args.opt_out is not None and shows_items(args.opt_out) and "embed" not in inputs:
        inputs.append("embed")
    if args.users is not None:
        hashes["users"] = users_sha256(args)
    if args.output_dir is not None:
        hashes |= {f"run_dir/{s}": require(args.run_dir, s).content_hash for s in inputs}
        inputs = []
    config = {**asdict(args), "model_stage": model_stage}
    root = args.run_dir if args.output_dir is None else args.output_dir
    return Stage(root, "recommend", config, inputs, files, ignore, hashes)


def users_sha256(args: RecommendArgs) -> str:
    """Hash of the users' table; of several parts the first makes it for all."""
    assert args.users is not None and args.output_dir is not None
    if parse_part(args.shard) == WHOLE:
        return source_sha256(args.users, args.users_split, args.users_subset)
    with locked(args.output_dir):
        return kept_sha256(args.users, args.output_dir, args.users_split, args.users_subset)


def check_catalogue(args: RecommendArgs, catalog: pl.DataFrame) -> None:
    """Reject what this catalogue can't fulfil before users are read or a model is loaded."""
    if args.k > len(catalog):
        raise ValueError(
            f"k={args.k:,} exceeds the {len(catalog):,} items of the catalogue; use at most that"
        )
    rules = list_rules(args)
    caps_and_weights(catalog, rules)
    if isinstance(rules.sampler, GumbelTopK) and args.normalizer != "trie":
        raise ValueError(
            f"sampler=gumbel needs normalizer=trie: under {args.normalizer} the scores are no "
            "distribution over items; set --normalizer trie, or --sampler levels"
        )
    if args.memory_weight and args.normalizer != "trie":
        raise ValueError(
            f"memory_weight needs normalizer=trie: under {args.normalizer} the scores are no "
            "distribution over items, and a memory would drown them; set --normalizer trie"
        )
    folder = stage_folder(args.run_dir, "quantize")
    if args.engine != "torch" and map_kind(folder) == TITLES:
        raise ValueError(TITLES_ON_TORCH.format(engine=args.engine))
    if rules.sampler is not None:
        n_levels = SemanticIds.load(folder).n_levels
        check_sampler(rules.sampler, cast(Normalizer, args.normalizer), n_levels)


def set_opted_out_apart(
    args: RecommendArgs,
    stage: Stage,
    rows: pl.DataFrame,
    catalog: pl.DataFrame,
    allowed: IntArray | None,
) -> pl.DataFrame:
    """Write lists for those who opted out of profiling, and return the rows of all others."""
    assert args.opt_out is not None
    chosen, shown = opted_out(rows[USER_ID], args.opt_out, catalog[ITEM_ID])
    if chosen.all():
        raise ValueError(f"{args.opt_out} names every user of these rows; nobody is left to list")
    vectors = None
    if (shown >= 0).any():
        if (name := content_file(args.run_dir)) is None:
            raise ValueError(
                f"{args.opt_out} names items on show, but the items of {args.run_dir} were "
                f"embedded by behaviour alone: no content to go by; leave its column {ITEM_ID} away"
            )
        vectors = stage_folder(args.run_dir, "embed") / name
    sids = load_map(stage_folder(args.run_dir, "quantize")).sids()
    apart, shown = rows.filter(chosen), shown[chosen.to_numpy()]
    table = non_profiling_lists(apart, shown, catalog, sids, args.k, allowed, vectors)
    write_parquet(stage.folder / NON_PROFILING, table)
    return rows.filter(~chosen)


def make_memory(args: RecommendArgs) -> ItemMemory | None:
    """The memory of the catalogue's run, tuned before any list is made."""
    if not args.memory_weight:
        return None
    memory, told = memory_of_run(args.run_dir, args.filter_seen, args.cache_dir, args.memory_power)
    print(f"item memory: {told}")
    return memory


def make_users(
    args: RecommendArgs,
    stage: Stage,
    catalog: pl.DataFrame,
    marks: Marks | None,
    allowed: IntArray | None,
) -> UserRows:
    """The rows that lists are made for; `marks` of a table are from before it was hashed."""
    if args.users is None:
        rows = read_split(
            args.run_dir, args.split, "recommend", model_stage=stage.config["model_stage"]
        )
        if args.max_rows is not None and args.max_rows < len(rows):
            rows = rows.sample(args.max_rows, seed=args.seed).sort(ROW_ID)
        if rows.is_empty():
            raise ValueError(f"the {args.split} split of {args.run_dir} has no rows")
        if args.opt_out is not None:
            rows = set_opted_out_apart(args, stage, rows, catalog, allowed)
        write_parquet(stage.folder / "rows.parquet", rows.select(ROW_ID, USER_ID))
        return SplitRows(rows, args.filter_seen)
    columns = UserColumns(
        args.user_column,
        args.history_column,
        args.exclude_column,
        args.candidates_column,
        args.list_separator,
    )
    return UserTable(
        args.users,
        catalog[ITEM_ID],
        columns,
        args.unknown_items,
        args.filter_seen,
        stage.folder,
        args.users_split,
        args.users_subset,
        marks,
    )


def read_users(
    args: RecommendArgs, job: GenerationJob, n_items: int, model_stage: str
) -> dict[str, int]:
    """Check all users, with the length of their prompts, before the model is loaded."""
    parts = ServedParts.of_run(args.run_dir, model_stage, args.model_run)
    if args.model_run is not None:  # a stranger's map would be called one of other tokens
        check_descent(args.run_dir, load_map(parts.semantic_ids), args.model_run, parts.model)
    context = context_of(parts.model, args.engine, args.max_model_len)
    with tqdm(total=job.users.n_rows, unit="user", desc="check of the users", delay=2) as bar:
        return check_users(job, n_items, PromptLengths(parts, context), bar.update)


def make_lists(
    args: RecommendArgs, job: GenerationJob, part: tuple[int, int], model_stage: str
) -> ProgressFile:
    """Make the shards of a part that are missing."""
    todo = job.missing(part)
    progress = ProgressFile(job, part, job.n_users(todo))
    load = partial(
        Recommender.load,
        args.run_dir,
        model_stage,
        args.engine,
        cast(Normalizer, args.normalizer),
        args.dtype,
        args.batch_size,
        args.model_run,
        engine_options(args) or None,
    )
    label = f"recommend ({args.engine}{'' if part == WHOLE else f', part {args.shard}'})"
    done = progress.total - job.n_users(todo)
    with tqdm(total=progress.total, initial=done, unit="user", desc=label) as bar:
        if not todo:
            logger.info("all %d users of part %s are done", done, args.shard)
        elif args.executor == "ray":
            from genrec.generation.ray_executor import generate_with_ray

            def finished(info: ShardInfo, seconds: float | None) -> None:
                bar.update(info.stop - info.start)
                progress.finished(info, seconds)

            actors, gpus, address = args.num_actors, gpus_of_an_actor(args), args.ray_address
            cpus = args.cpus_per_actor
            generate_with_ray(load, job, todo, actors, gpus, address, finished, cpus)
        else:
            generate(load(), job, todo, bar.update, progress.finished)
    return progress


def finish(
    args: RecommendArgs,
    stage: Stage,
    job: GenerationJob,
    progress: ProgressFile,
    notes: Sequence[str],
) -> None:
    """Write the manifest if every shard of every part is there, else say what is missing."""
    job.check_folder()
    # The files first: checking their content reads all of them.
    missing = job.absent() or job.missing()
    own = job.starts(parse_part(args.shard))
    if gone := [start for start in missing if start in own]:
        raise ValueError(
            f"{len(gone):,} finished shards of part {args.shard} are gone or damaged, the first is "
            f"{job.path(gone[0])}; start this command again"
        )
    progress.write()
    if missing:
        print(
            f"part {args.shard} is done; the stage is not: {len(missing):,} of "
            f"{len(job.starts()):,} shards are missing, the first is {job.path(missing[0]).name}; "
            "start the other parts, or this command without --shard"
        )
        return
    if (stage.folder / MANIFEST).exists():
        return  # another part was the last
    if isinstance(job.users, UserTable):
        job.users.check_unchanged()
    remove_copy(stage.folder)
    metrics = {**measured_speed(job), **list_facts(job)}
    apart = ""
    if args.opt_out is not None:
        lists = pl.read_parquet(stage.folder / NON_PROFILING, columns=[ROW_ID, SHOWN], glob=False)
        lists = lists.unique(ROW_ID)
        by_content = lists[SHOWN].count()
        metrics |= {"non_profiling_lists": len(lists), "content_lists": by_content}
        apart = f"; {len(lists) - by_content:,} lists by popularity"
        apart += f" and {by_content:,} by content" if by_content else ""
        apart += " for users who opted out"
    stage.finish(metrics["items"], args.seed, metrics, notes, skip=(PROGRESS, DAMAGED, CHECKED))
    print(
        f"{job.users.n_rows:,} lists of {args.k} by the {stage.config['model_stage']} model on "
        f"{args.engine} ({metrics['users_per_s']} users/s a process); "
        f"{metrics['certified_share']:.1%} provably exact; "
        f"{metrics['short_lists']:,} shorter than {args.k}{apart}"
    )


def main() -> None:
    """Run the stage."""
    args = parse(RecommendArgs)
    part = parse_part(args.shard)
    if args.overwrite and part != WHOLE:
        raise ValueError("--overwrite with --shard would set other parts' lists aside; drop one")
    source = args.run_dir if args.model_run is None else args.model_run
    model_stage = args.model_stage or ("grpo" if load_manifest(source, "grpo") else "sft")
    require(source, model_stage)
    declared = declared_normalizer(stage_folder(source, model_stage) / "model")
    args = replace(args, normalizer=args.normalizer or declared)
    marks = None if args.users is None else source_marks(args.users)
    require(args.run_dir, "prepare")
    require(args.run_dir, "quantize")
    catalog = pl.read_parquet(stage_folder(args.run_dir, "prepare") / "catalog.parquet", glob=False)
    check_catalogue(args, catalog)
    stage = make_stage(args, model_stage)
    allowed = allowed_rows(catalog[ITEM_ID], args.allow, args.deny)
    # One process at a time begins or ends: parts may be started at the same moment.
    with locked(stage.run_dir):
        if part != WHOLE:
            stage.check_shared()
        if stage.is_done(args.overwrite, alone=False):  # parts share the folder
            return
        rule = require(source, model_stage).config.get("filter_seen")
        if rule not in (None, args.filter_seen):
            print(f"warning: {model_stage} was validated with filter_seen={rule}, this differs")
        job = GenerationJob(
            make_users(args, stage, catalog, marks, allowed),
            stage.folder,
            args.k,
            min(args.beam_width, len(catalog)),  # as many prefixes are all there are
            stage.fingerprint,
            args.shard_size,
            allowed,
            list_rules(args),
            make_memory(args),
        )
        checked = read_users(args, job, len(catalog), model_stage)
    if checked[UNKNOWN]:
        print(
            f"warning: {checked[UNKNOWN]:,} items that the catalogue lacks are left out of the "
            f"rows of {checked['rows_with_unknown']:,} users"
        )
    progress = make_lists(args, job, part, model_stage)
    note = mismatch(cast(Normalizer, args.normalizer), declared)
    with locked(stage.run_dir):
        finish(args, stage, job, progress, [note] if note else [])


if __name__ == "__main__":
    run(main)
