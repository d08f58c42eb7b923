"""Reinforcement learning with verifiable rewards: TRL's GRPO on constrained-beam rollouts (ReRe).

    accelerate launch recipes/grpo.py --config recipes/configs/quickstart/grpo.yaml

Starts from ``sft/model`` (merged, so that a reference model is the SFT model exactly). Settings of
TRL's GRPOConfig go into the same YAML or on the command line. Writes ``grpo/model``,
``grpo/validation.json`` and ``grpo/log.json``. Killed and started again, it resumes at the last
checkpoint.

Rollouts, log-probabilities and validation share one score normaliser, and the model that comes out
declares it, so that serving follows. ``grpo/curves.svg`` is a picture of the training, and
``grpo/model/README.md`` the model card.
"""

import logging
from dataclasses import asdict, dataclass, field
from functools import partial

import polars as pl
from accelerate.state import PartialState
from datasets import Dataset
from trl import GRPOConfig

from genrec import adapters, modeling, sharding
from genrec.artifacts import Stage, stage_folder, write_json, write_text
from genrec.bundle.files import CARD
from genrec.bundle.training_card import training_card, training_settings
from genrec.columns import PROMPT, ROW_ID, SEEN, TARGET
from genrec.config import check_choice, parse, run, training_fingerprint
from genrec.data.splits import read_split
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.evaluation.curves import CurvesPicture
from genrec.evaluation.normalizer_choice import measure_normalizers
from genrec.evaluation.validation import BeamValidation
from genrec.normalizers import NORMALIZERS, Normalizer, declared_normalizer
from genrec.rewards import make_rank_reward, rule_reward
from genrec.rollouts import BeamGRPOTrainer
from genrec.semantic_ids import SemanticIds

logger = logging.getLogger(__name__)

REWARDS = ("rule", "rank")


@dataclass
class GrpoArgs:
    """Settings of the grpo stage beside TRL's GRPOConfig."""

    run_dir: str = "runs/default"
    overwrite: bool = False
    rewards: list[str] = field(default_factory=lambda: list(REWARDS))  # weights: reward_weights
    beam_width: int = 50  # of the rollouts; num_generations of these items form a group
    # Over what scores are normalised: in rollouts, the policy's log-probabilities, validation, and
    # by the model that comes out. trie is the stable one: under the others, negative advantages
    # push mass onto tokens that can't be produced. null: what the SFT model declares.
    normalizer: str | None = "trie"
    filter_seen: bool = True  # rollouts follow the rule of evaluation
    use_lora: bool = False
    lora_rank: int = 16
    lora_alpha: int = 32
    dtype: str = "float32"
    eval_rows: int = 500  # validation rows for NDCG@10; 0 turns it off
    eval_every_steps: int = 50

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        for reward in self.rewards:
            check_choice("rewards", reward, REWARDS)
        if not self.rewards:
            raise ValueError("rewards is empty; name at least one")
        if self.normalizer is not None:
            check_choice("normalizer", self.normalizer, NORMALIZERS)
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))


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


def main() -> None:
    """Run the stage."""
    args, training = parse(GrpoArgs, GRPOConfig)
    sharding.check_grpo(training)
    config = {**asdict(args), "training": training_fingerprint(training)}
    inputs = ["prepare", "quantize", "build_dataset", "sft"]
    with PartialState().main_process_first():
        stage = Stage(args.run_dir, "grpo", config, inputs)
        if stage.is_done(args.overwrite and PartialState().is_main_process):
            return
    dataset = stage_folder(args.run_dir, "build_dataset")
    semantic_ids = SemanticIds.load(stage_folder(args.run_dir, "quantize"))
    trie = SidTrie.build(semantic_ids.codes)
    declared = declared_normalizer(stage_folder(args.run_dir, "sft") / "model")
    normalizer, notes = chosen_normalizer(args.normalizer, declared)
    rows = pl.read_parquet(dataset / "rl.parquet")
    valid = read_split(args.run_dir, "valid", "grpo")
    valid_prompts = pl.read_parquet(dataset / "valid.parquet")[PROMPT]
    if args.filter_seen:
        # A target that the filter removes can't be hit: the whole group would be noise.
        rows = rows.filter(~pl.col(SEEN).list.contains(pl.col(TARGET)))

    model, tokenizer, about = modeling.load_model(
        stage_folder(args.run_dir, "sft") / "model", semantic_ids, args.dtype
    )
    token_ids = modeling.sid_token_ids(tokenizer, semantic_ids)
    columns = {
        "prompt": rows[PROMPT].to_list(),
        "row_id": rows[ROW_ID].to_list(),
        "target_sid_ids": [
            [token_ids[level][code] for level, code in enumerate(codes)]
            for codes in semantic_ids.codes[rows[TARGET].to_numpy()].tolist()
        ],
    }
    if args.filter_seen:
        columns[SEEN] = rows[SEEN].to_list()
    lora = None
    if args.use_lora:
        lora = adapters.lora_config(model, token_ids, args.lora_rank, args.lora_alpha)

    training.output_dir = str(stage.folder / "checkpoints")
    training.max_completion_length = trie.n_levels + 1  # a SID and EOS
    rewards = {"rule": rule_reward, "rank": make_rank_reward(training.num_generations)}
    trainer = BeamGRPOTrainer(
        trie=trie,
        sid_token_ids=token_ids,
        beam_width=args.beam_width,
        normalizer=normalizer,
        model=model,
        args=training,
        reward_funcs=[rewards[name] for name in args.rewards],
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        peft_config=lora,
    )
    assert trainer.model is not None
    adapters.expose_head_bias(trainer.model)

    engine = partial(
        TorchEngine, trie=trie, sid_token_ids=token_ids, pad_token_id=tokenizer.pad_token_id
    )
    validation = None
    if args.eval_rows and len(valid):
        validation = BeamValidation.of_split(
            stage.folder,
            lambda m: engine(m, normalizer=normalizer),  # measured as it is served
            tokenizer,
            valid,
            valid_prompts,
            args.eval_rows,
            training.seed,
            args.filter_seen,
            every_steps=args.eval_every_steps,
            at_start=True,
        )
        validation.log_to(trainer)
        trainer.add_callback(validation)
    trainer.add_callback(CurvesPicture(stage.folder, "grpo", validation))
    trainer.train(resume_from_checkpoint=modeling.last_checkpoint(training.output_dir))

    trainer.accelerator.wait_for_everyone()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.accelerator.is_main_process:  # it alone has measured, and saves
        best = validation.restore_best(trained) if validation else None
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
