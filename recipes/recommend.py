"""Model + trie -> a ranked list of catalogue items for every row of a split.

    genrec recommend --config recipes/configs/quickstart/recommend.yaml --run_dir runs/quickstart
    genrec recommend --run_dir runs/next --model_run runs/mine  # a later catalogue, an old model

With `model_run` the model, its tokenizer, templates and length of histories are that run's;
`run_dir` needs prepare, embed and quantize alone, extended from that run (see embed.py). A new
item's SID is made of tokens that the model knows, in prompts as in lists. Scores are normalised
over what the model declares; another `normalizer` is noted in the manifest.

Writes ``recommendations/recommendations-00000.parquet``, … (one row per recommended item) and
``rows.parquet`` (the rows that were asked for). Killed and started again, it goes on at the next
shard.
"""

import time
from dataclasses import asdict, dataclass

import polars as pl
from tqdm import tqdm

from genrec.artifacts import (
    Stage,
    load_manifest,
    read_shards,
    require,
    stage_folder,
    write_parquet,
)
from genrec.columns import CERTIFIED, RANK, ROW_ID, SEEN, USER_ID
from genrec.config import check_choice, parse, run
from genrec.data.splits import read_split
from genrec.normalizers import NORMALIZERS, declared_normalizer, mismatch


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

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        check_choice("engine", self.engine, ("torch", "vllm", "vllm-inworker"))
        check_choice("split", self.split, ("valid", "test"))
        if self.normalizer is not None:
            check_choice("normalizer", self.normalizer, NORMALIZERS)
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        if self.model_stage is not None:
            check_choice("model_stage", self.model_stage, ("sft", "grpo"))
        if not 1 <= self.k <= self.beam_width:
            raise ValueError(f"k={self.k} must lie between 1 and beam_width={self.beam_width}")


def main() -> None:
    """Run the stage."""
    args = parse(RecommendArgs)
    source = args.model_run or args.run_dir
    model_stage = args.model_stage or ("grpo" if load_manifest(source, "grpo") else "sft")
    require(source, model_stage)
    declared = declared_normalizer(stage_folder(source, model_stage) / "model")
    normalizer = next((known for known in NORMALIZERS if known == args.normalizer), declared)
    config = {**asdict(args), "model_stage": model_stage, "normalizer": normalizer}
    inputs, of_model = ["prepare", "quantize"], ["build_dataset", model_stage]
    ignore, hashes = ["batch_size"], {}
    if args.model_run is None:
        inputs += of_model
        ignore.append("model_run")
    else:
        hashes = {f"model_run/{s}": require(source, s).content_hash for s in of_model}
    stage = Stage(args.run_dir, "recommend", config, inputs, ignore=ignore, hashes=hashes)
    if stage.is_done(args.overwrite):
        return
    from genrec.recommend import Recommender, generate

    rule = require(source, model_stage).config.get("filter_seen")
    if rule not in (None, args.filter_seen):
        print(f"warning: {model_stage} was validated with filter_seen={rule}, this differs")
    rows = read_split(args.run_dir, args.split, "recommend", model_stage=model_stage)
    if args.max_rows is not None and args.max_rows < len(rows):
        rows = rows.sample(args.max_rows, seed=args.seed).sort(ROW_ID)
    write_parquet(stage.folder / "rows.parquet", rows.select(ROW_ID, USER_ID))
    recommender = Recommender.load(
        args.run_dir,
        model_stage,
        args.engine,
        normalizer,
        args.dtype,
        args.batch_size,
        args.model_run,
    )
    seen = rows[SEEN] if args.filter_seen else None
    started = time.perf_counter()
    with tqdm(total=len(rows), unit="user", desc=f"recommend ({args.engine})") as bar:
        done = generate(
            recommender,
            rows,
            stage.folder,
            args.k,
            args.beam_width,
            seen,
            args.shard_size,
            bar.update,
        )
    seconds = time.perf_counter() - started
    table = read_shards(stage.folder, "recommendations")
    first = table.filter(pl.col(RANK) == 1)
    metrics = {
        "users_per_s": round(done / seconds, 1) if done else None,
        "certified_share": first.select(pl.col(CERTIFIED).mean()).item(),
    }
    note = mismatch(normalizer, declared)
    stage.finish(rows=len(table), seed=args.seed, metrics=metrics, notes=[note] if note else [])
    print(
        f"{len(rows):,} lists of {args.k} by the {model_stage} model on {args.engine} "
        f"({metrics['users_per_s']} users/s); {metrics['certified_share']:.1%} provably exact"
    )


if __name__ == "__main__":
    run(main)
