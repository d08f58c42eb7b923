"""Reinforcement learning with verifiable rewards: TRL's GRPO over the trie (ReRe, GREAM).

    accelerate launch recipes/grpo.py --config recipes/configs/quickstart/grpo.yaml

Starts from ``sft/model`` (merged, so that a reference model is the SFT model exactly). Settings of
TRL's GRPOConfig go into the same YAML or on the command line. Writes ``grpo/model``,
``grpo/before.json`` (how often a group hits before training), ``grpo/validation.json`` and
``grpo/log.json``, and ``grpo/stopped.json`` where the training collapsed and was stopped; the model
is the best measured one in any case. Killed and started again, it resumes at the last checkpoint.

``build_dataset --reserve_last true`` keeps the targets of RL rows out of what SFT learns; without
it, RL trains on targets that the model has seen.

Rollouts, log-probabilities and validation share one score normaliser, and the model that comes out
declares it, so that serving follows. ``grpo/curves.svg`` is a picture of the training, and
``grpo/model/README.md`` the model card.

With ``chains`` it trains reasoning mode: each prompt gets so many chains of free text, and each
chain its items (`genrec.reasoning_rollouts`). The SFT model must have learned the family
`reasoning_recommendation`. Prompts are that family's, validation merges lists as `genrec reason`
does, and the plain prompts that `genrec recommend` serves are not trained.

Longer than other recipes: a third of it is settings and their checks.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
from accelerate.state import PartialState
from datasets import Dataset
from trl import GRPOConfig

from genrec import adapters, modeling, sharding
from genrec.advantages import CHAIN_VALUES, ChainValue
from genrec.artifacts import Stage, read_json, stage_folder, write_json, write_text
from genrec.averaging import WeightAverage
from genrec.bundle.files import CARD
from genrec.bundle.parts import trained_families
from genrec.bundle.training_card import training_card, training_settings
from genrec.chain_reader import ChainReader
from genrec.chain_rewards import CHAIN_REWARDS
from genrec.columns import (
    FUTURE,
    HISTORY,
    HISTORY_ITEMS,
    PROMPT,
    ROW_ID,
    SEEN,
    TARGET,
    TRAIN_COUNT,
    USER_ID,
)
from genrec.config import (
    check_choice,
    check_trainer,
    parse,
    run,
    training_fingerprint,
)
from genrec.data.splits import read_split
from genrec.decoding.free_text import TextSampling
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.embedding.vectors import COLLABORATIVE_VECTORS, content_vectors
from genrec.evaluation.collapse import CollapseStop
from genrec.evaluation.normalizer_choice import measure_normalizers
from genrec.evaluation.reasoning_validation import ReasoningValidation
from genrec.evaluation.training_picture import CurvesPicture
from genrec.evaluation.validation import BeamValidation
from genrec.group_losses import LOSSES, Loss
from genrec.normalizers import NORMALIZERS, Normalizer, declared_normalizer
from genrec.prompts import PromptRenderer
from genrec.reasoning import REASONING, decision_marker, marker_ids
from genrec.reasoning_rollouts import ReasoningGRPOTrainer
from genrec.rewards import (
    NOVELTY_ON,
    CompletedItems,
    RewardFunction,
    make_future_reward,
    make_novelty_reward,
    make_rank_reward,
    make_similarity_reward,
    prefix_reward,
    rule_reward,
)
from genrec.rollout_groups import ROLLOUTS, Rollouts
from genrec.rollouts import CREDITS, BeamGRPOTrainer, Credit, Objective
from genrec.semantic_ids import SemanticIds, require_codes
from genrec.tasks.families import FAMILIES, SEQUENTIAL
from genrec.tasks.rendering import ItemTexts, served_prompts

logger = logging.getLogger(__name__)

ITEM_REWARDS = ("rule", "rank", "prefix", "semantic", "collaborative", "future", "novelty")
REWARDS = (*ITEM_REWARDS, *CHAIN_REWARDS)
DEFAULT_REWARDS = ("rule", "rank")


@dataclass
class GrpoArgs:
    """Settings of the grpo stage beside TRL's GRPOConfig."""

    run_dir: str = "runs/default"
    overwrite: bool = False
    # Weighted by TRL's reward_weights, in this order; formulas and failure modes: genrec.rewards,
    # and genrec.chain_rewards for format, citations and claims, which need chains.
    rewards: list[str] = field(default_factory=lambda: list(DEFAULT_REWARDS))
    future_window: int = 1  # of "future"; build_dataset's rl_window must be as large
    future_discount: float = 0.7
    novelty_on: str = "hits"  # or beside: all items of a group that has a hit
    beam_width: int = 50  # of the rollouts; num_generations of these items form a group
    rollouts: str = "beam"  # or sample, gumbel, dynamic; see genrec.rollout_groups
    oversample: float = 1.5  # dynamic: draws per item of a group
    # grpo (TRL's loss_type), listwise (cross entropy over the group) or sdpo (the target against
    # the beam's misses; TRL's beta is S-DPO's); see genrec.group_losses.
    loss: str = "grpo"
    listwise_temperature: float = 0.1
    credit: str = "item"  # or level: each level gets what its prefix decided
    pass_at_k: int = 0  # GREAM's bonus; 0: none. Its weight:
    pass_at_k_weight: float = 1.0
    filter_groups: bool = False  # groups without a difference in reward count nothing
    resample: int = 0  # exchange rows whose group has no hit, so many times at most
    add_target: bool = False  # the target stands in for the last item of a group without a hit
    sft_weight: float = 0.0  # of the supervised loss on the targets, added to the other
    # Reasoning mode: so many chains per prompt, drawn at TRL's temperature, and num_generations /
    # chains items behind each, by `rollouts`; validation merges as many chains. 0: items alone.
    chains: int = 0
    max_chain_tokens: int = 256
    chain_value: str = "mean"  # or best: what its items make a chain worth
    before_rows: int = 500  # rows whose hits are counted before training; 0: none
    # A training is stopped whose NDCG@10 stays below (1 - stop_tolerance) x its start, or whose
    # entropy below stop_entropy x its start, for stop_patience measurements (logs); 0: never.
    stop_patience: int = 3
    stop_tolerance: float = 0.1
    stop_entropy: float = 0.02
    # Over what scores are normalised: in rollouts, the policy's log-probabilities, validation, and
    # by the model that comes out. trie is the stable one: under the others, negative advantages
    # push mass onto tokens that can't be produced. null: what the SFT model declares.
    normalizer: str | None = "trie"
    filter_seen: bool = True  # rollouts follow the rule of evaluation
    use_lora: bool = False
    lora_rank: int = 16
    lora_alpha: int = 32
    dtype: str = "float32"
    ema_decay: float = 0.0  # validate and serve a moving average of the weights, e.g. 0.98
    eval_rows: int = 500  # validation rows for NDCG@10; 0 turns it off
    eval_every_steps: int = 50

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        for reward in self.rewards:
            check_choice("rewards", reward, REWARDS)
        if not self.rewards or len(set(self.rewards)) < len(self.rewards):
            raise ValueError(f"rewards={self.rewards} must name at least one, each once")
        check_choice("rollouts", self.rollouts, ROLLOUTS)
        check_choice("loss", self.loss, LOSSES)
        check_choice("credit", self.credit, CREDITS)
        check_choice("chain_value", self.chain_value, CHAIN_VALUES)
        if (of_chains := set(CHAIN_REWARDS) & set(self.rewards)) and self.chains < 2:
            raise ValueError(
                f"rewards={self.rewards} with chains={self.chains}: {', '.join(sorted(of_chains))} "
                "only tell the chains of a prompt apart; set chains to 2 or more"
            )
        check_choice("novelty_on", self.novelty_on, NOVELTY_ON)
        if self.normalizer is not None:
            check_choice("normalizer", self.normalizer, NORMALIZERS)
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie in [0, 1)")
        CollapseStop.check(self.stop_tolerance, self.stop_patience, self.stop_entropy)

    @property
    def objective(self) -> Objective:
        """Rollouts, loss and advantages."""
        return Objective(
            cast(Rollouts, self.rollouts), self.oversample, cast(Loss, self.loss),
            self.listwise_temperature, cast(Credit, self.credit), self.pass_at_k,
            self.pass_at_k_weight, self.filter_groups, self.resample, self.add_target,
            self.sft_weight, self.chains, self.max_chain_tokens, cast(ChainValue, self.chain_value),
        )  # fmt: skip


@dataclass(frozen=True)
class Reasoning:
    """What reasoning mode needs of a run.

    Attributes:
        marker: words between a chain and its item.
        reader: of chains.
        renderer: the run's templates.
        texts: of the items.
        max_history: items that a prompt shows.
    """

    marker: str
    reader: ChainReader
    renderer: PromptRenderer
    texts: ItemTexts
    max_history: int

    @classmethod
    def of_run(cls, run_dir: str, semantic_ids: SemanticIds) -> "Reasoning":
        """Read it.

        Raises:
            ValueError: the SFT model did not learn to reason, or a template can't be read back.
        """
        if REASONING not in (families := trained_families(run_dir)):
            raise ValueError(
                f"chains: the SFT model was not trained on {REASONING!r} (but on "
                f"{', '.join(sorted(families))}); build the dataset with --tasks {SEQUENTIAL} "
                f"{REASONING} (or all), then run sft again, or set chains: 0"
            )
        renderer = PromptRenderer(stage_folder(run_dir, "build_dataset") / "prompts")
        data = stage_folder(run_dir, "prepare")
        catalog = pl.read_parquet(data / "catalog.parquet", glob=False)
        reader = ChainReader.of_run(semantic_ids, catalog, renderer.folder)
        texts = ItemTexts.of(catalog, semantic_ids)
        shown = read_json(data / "manifest.json")["config"]["max_history"]
        return cls(decision_marker(renderer), reader, renderer, texts, shown)

    def rows(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Rows with histories of catalogue rows: those that can be reasoned from, with prompts."""
        rows = rows.filter(pl.col(HISTORY).list.len() >= FAMILIES[REASONING].least_history)
        shown = pl.col(HISTORY).list.tail(self.max_history)
        rows = rows.with_columns(shown, shown.alias(HISTORY_ITEMS))
        return rows.with_columns(served_prompts(rows, REASONING, self.texts, self.renderer))

    def rl_rows(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Rows of ``rl.parquet``, whose histories are item ids, as `rows` makes them."""
        ids = self.reader.item_ids
        index = pl.int_range(len(ids), dtype=pl.Int32, eager=True)
        known = pl.element().replace_strict(ids, index, return_dtype=pl.Int32)
        return self.rows(rows.with_columns(pl.col(HISTORY_ITEMS).list.eval(known).alias(HISTORY)))


def reward_functions(
    args: GrpoArgs, items: CompletedItems, num_generations: int
) -> list[RewardFunction]:
    """The rewards that are asked for, with what of the run they look at.

    Args:
        args: the settings.
        items: reads completions.
        num_generations: items of a list; in reasoning mode of each chain's.

    Raises:
        ValueError: the run has no vectors of the kind that a reward compares.
    """
    found: list[RewardFunction] = []
    for name in args.rewards:
        if name == "rule":
            found.append(rule_reward)
        elif name == "rank":
            found.append(make_rank_reward(num_generations))
        elif name == "prefix":
            found.append(prefix_reward)
        elif name == "future":
            found.append(make_future_reward(items, args.future_window, args.future_discount))
        elif name == "novelty":
            catalog = stage_folder(args.run_dir, "prepare") / "catalog.parquet"
            counts = pl.read_parquet(catalog, columns=[TRAIN_COUNT], glob=False)[
                TRAIN_COUNT
            ].to_numpy()
            found.append(make_novelty_reward(items, counts, num_generations, args.novelty_on))
        elif name in CHAIN_REWARDS:
            found.append(CHAIN_REWARDS[name])
        else:
            found.append(make_similarity_reward(name, item_vectors(args.run_dir, name), items))
    return found


def item_vectors(run_dir: str, reward: str) -> np.ndarray:
    """Vectors that the rewards "semantic" and "collaborative" compare, (n_items, dim)."""
    if reward == "semantic":
        vectors, fix = content_vectors(run_dir), "method: text or fused"
    else:
        path = stage_folder(run_dir, "embed") / COLLABORATIVE_VECTORS
        vectors, fix = np.load(path) if path.exists() else None, "collaborative vectors"
    if vectors is None:
        raise ValueError(
            f"reward {reward}: the embed stage of {run_dir} has no such vectors; run embed with "
            f"{fix}, or leave the reward out"
        )
    return vectors


def check_rewards(args: GrpoArgs, training: GRPOConfig, objective: Objective) -> None:
    """Refuse weights and data that don't go with the rewards, before a model is loaded."""
    weights = training.reward_weights
    if weights is not None and len(weights) != len(args.rewards):
        raise ValueError(
            f"reward_weights={weights} for rewards={args.rewards}: one weight per reward is needed"
        )
    objective.check(training, args.normalizer or "trie")
    for name in {"semantic", "collaborative"} & set(args.rewards):
        item_vectors(args.run_dir, name)
    if "future" not in args.rewards:
        return
    built = read_json(stage_folder(args.run_dir, "build_dataset") / "manifest.json")["config"]
    if built.get("rl_window", 1) < args.future_window:
        raise ValueError(
            f"future_window={args.future_window} exceeds build_dataset's rl_window="
            f"{built.get('rl_window', 1)}; build the rows with --rl_window {args.future_window}"
        )


def rl_columns(
    rows: pl.DataFrame, semantic_ids: SemanticIds, token_ids: list[list[int]], filter_seen: bool
) -> dict[str, list[Any]]:
    """The training rows as TRL takes them; what is a row's own stays in it."""
    codes = semantic_ids.codes[rows[TARGET].to_numpy()]
    levels = [np.asarray(ids)[codes[:, level]] for level, ids in enumerate(token_ids)]
    columns = {
        "prompt": rows[PROMPT].to_list(),
        "row_id": rows[ROW_ID].to_list(),
        "target_sid_ids": np.stack(levels, axis=1).tolist(),
        TARGET: rows[TARGET].to_list(),
    }
    shown = [SEEN] if filter_seen else []
    shown += [name for name in (FUTURE, HISTORY) if name in rows.columns]
    return columns | {name: rows[name].to_list() for name in shown}


def count_hits(trainer: BeamGRPOTrainer, folder: Path, n_rows: int) -> None:
    """Write ``before.json`` and say it; a resumed training keeps what it has."""
    path = folder / "before.json"
    if not n_rows or path.exists() or not trainer.accelerator.is_main_process:
        return
    found = trainer.hits_before(n_rows)
    write_json(path, found)
    groups = ", ".join(f"{hits} hits: {n:,}" for hits, n in found["hits_per_group"].items())
    print(f"before training, of {found['rows']:,} groups by hits: {groups}")


def chosen_normalizer(asked: str | None, declared: Normalizer) -> tuple[Normalizer, list[str]]:
    """The normaliser of this training and of its model, and what the manifest has to note."""
    chosen = next((known for known in NORMALIZERS if known == asked), declared)
    if chosen != "trie":
        logger.warning(
            "normalizer %s: negative advantages can push mass onto tokens that can't be produced; "
            "trie is the stable one",
            chosen,
        )
    if chosen == declared:
        return chosen, []
    note = (
        f"the SFT model declared normalizer {declared}; this training uses {chosen} throughout, "
        f"and its model declares {chosen}"
    )
    logger.warning(note)
    return chosen, [note]


def keep_best(
    model: Any, validation: BeamValidation | None, average: WeightAverage | None
) -> dict[str, Any] | None:
    """Give the model the weights that measured best; without a measurement, their average."""
    best = validation.restore_best(model) if validation else None
    if average and best is None:
        average.put_into(model)
    return best


def main() -> None:
    """Run the stage."""
    args, training = parse(GrpoArgs, GRPOConfig)
    check_trainer(training)
    sharding.check_grpo(training)
    objective = args.objective
    config = {**asdict(args), "training": training_fingerprint(training)}
    inputs = ["prepare", "quantize", "build_dataset", "sft"]
    if {"semantic", "collaborative"} & set(args.rewards):
        inputs.append("embed")
    with PartialState().main_process_first():
        stage = Stage(args.run_dir, "grpo", config, inputs)
        require_codes(stage_folder(args.run_dir, "quantize"))
        first = PartialState().is_main_process
        if stage.is_done(args.overwrite and first, alone=first):
            return
    check_rewards(args, training, objective)
    dataset = stage_folder(args.run_dir, "build_dataset")
    semantic_ids = SemanticIds.load(stage_folder(args.run_dir, "quantize"))
    trie = SidTrie.build(semantic_ids.codes)
    declared = declared_normalizer(stage_folder(args.run_dir, "sft") / "model")
    normalizer, notes = chosen_normalizer(args.normalizer, declared)
    rows = pl.read_parquet(dataset / "rl.parquet", glob=False)
    valid = read_split(args.run_dir, "valid", "grpo")
    valid = valid.with_columns(pl.read_parquet(dataset / "valid.parquet", glob=False)[PROMPT])
    reasoning = None
    if args.chains:
        reasoning = Reasoning.of_run(args.run_dir, semantic_ids)
        rows, valid = reasoning.rl_rows(rows), reasoning.rows(valid)
    if args.filter_seen:
        # A target that the filter removes can't be hit: the whole group would be noise.
        rows = rows.filter(~pl.col(SEEN).list.contains(pl.col(TARGET)))

    model, tokenizer, about = modeling.load_model(
        stage_folder(args.run_dir, "sft") / "model", semantic_ids, args.dtype
    )
    token_ids = modeling.sid_token_ids(tokenizer, semantic_ids)
    lora = None
    if args.use_lora:
        lora = adapters.lora_config(model, token_ids, args.lora_rank, args.lora_alpha)

    training.output_dir = str(stage.folder / "checkpoints")
    training.max_completion_length = trie.n_levels + 1  # a SID and EOS
    make_trainer: Callable[..., BeamGRPOTrainer] = BeamGRPOTrainer
    if reasoning is not None:
        marker = reasoning.marker
        n_marker = len(marker_ids(tokenizer, marker))
        training.max_completion_length += args.max_chain_tokens + n_marker
        make_trainer = partial(ReasoningGRPOTrainer, marker=marker, reader=reasoning.reader)
    average = WeightAverage(args.ema_decay) if args.ema_decay else None
    items = CompletedItems(trie, token_ids)
    per_list = training.num_generations // objective.lists_per_prompt
    trainer = make_trainer(
        trie=trie,
        sid_token_ids=token_ids,
        beam_width=args.beam_width,
        normalizer=normalizer,
        objective=objective,
        average=average,
        model=model,
        args=training,
        reward_funcs=reward_functions(args, items, per_list),
        train_dataset=Dataset.from_dict(
            rl_columns(rows, semantic_ids, token_ids, args.filter_seen)
        ),
        processing_class=tokenizer,
        peft_config=lora,
    )
    assert trainer.model is not None
    adapters.expose_head_bias(trainer.model)
    count_hits(trainer, stage.folder, args.before_rows)

    engine = partial(
        TorchEngine, trie=trie, sid_token_ids=token_ids, pad_token_id=tokenizer.pad_token_id
    )
    validation = None
    if args.eval_rows and len(valid):
        sample = np.random.default_rng(training.seed).permutation(len(valid))[: args.eval_rows]
        measured = valid[sample]
        make_validation: Callable[..., BeamValidation] = BeamValidation
        if reasoning is not None:
            make_validation = partial(
                ReasoningValidation,
                tokenizer=tokenizer,
                marker=reasoning.marker,
                n_chains=args.chains,
                sampling=TextSampling(
                    training.temperature, 1.0, args.max_chain_tokens, training.seed
                ),
            )
        validation = make_validation(
            folder=stage.folder,
            make_engine=lambda m: engine(m, normalizer=normalizer),  # measured as it is served
            prompts=modeling.encode_prompts(tokenizer, measured[PROMPT].to_list()),
            targets=measured[TARGET].to_numpy(),
            seen=[np.array(s) for s in measured[SEEN].to_list()] if args.filter_seen else None,
            every_steps=args.eval_every_steps,
            at_start=True,
            users=measured[USER_ID].rank("dense").to_numpy(),
            average=average,
        )
        validation.log_to(trainer)
        trainer.add_callback(validation)
    stop = CollapseStop(
        stage.folder, validation, args.stop_tolerance, args.stop_patience, args.stop_entropy
    )
    trainer.add_callback(stop)  # behind the validation that it reads
    trainer.add_callback(CurvesPicture(stage.folder, "grpo", validation))
    trainer.train(resume_from_checkpoint=modeling.last_checkpoint(training.output_dir))

    trainer.accelerator.wait_for_everyone()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.accelerator.is_main_process:  # it alone has measured, and saves
        best = keep_best(trained, validation, average)
        write_json(stage.folder / "log.json", trainer.state.log_history)
        if args.use_lora:
            trained.save_pretrained(stage.folder / "adapter")
        # What serving under another one would be worth: reported, not chosen by.
        compared = None
        if validation is not None:
            compared = measure_normalizers(validation, partial(engine, trained), training.seed)
        about = {name: about[name] for name in ("base", "lineage") if name in about}
        about |= {"stage": "grpo", "normalizer": normalizer}
        modeling.save_model(trained, tokenizer, semantic_ids, stage.folder / "model", about)
        start = validation.history[0] if validation else None
        parameters = sum(p.numel() for p in trained.parameters())
        metrics = {
            "parameters": parameters, "start": start, "best": best, "rewards": args.rewards,
            "stopped": stop.reason,
            "normalizer": {
                "normalizer": normalizer, "declared_by_sft": declared,
                "measured": compared.measured if compared else {},
                "against_default": compared.against_default if compared else {},
            },
        }  # fmt: skip
        metrics |= validation.summary() if validation else {}
        ranks = (args.lora_rank, args.lora_alpha) if args.use_lora else None
        settings = training_settings(training, trainer.state.global_step, ranks)
        card = training_card(stage, semantic_ids, settings, metrics, args.filter_seen)
        write_text(stage.folder / "model" / CARD, card)
        stage.finish(
            len(rows), training.seed, metrics, notes, skip=["checkpoints", "best.safetensors"]
        )
        print(f"{len(rows):,} RL rows; validation before: {start}; best: {best}")
        print(f"scores normalised over {normalizer}, as the model declares")


if __name__ == "__main__":
    run(main)
