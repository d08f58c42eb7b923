"""Supervised fine-tuning with TRL's SFTTrainer: from scratch, LoRA on any causal LM, or full.

    accelerate launch recipes/sft.py --config recipes/configs/quickstart/sft.yaml

Settings of TRL's SFTConfig (num_train_epochs, learning_rate, bf16, …) go into the same YAML or on
the command line. Writes ``sft/model`` (a plain checkpoint, adapters merged), ``sft/adapter`` (with
LoRA), ``sft/validation.json`` and ``sft/log.json``. Killed and started again, it resumes at the
last checkpoint.

At the end the validation sample is ranked under every score normaliser; the one that the model
declares from then on is in ``sft/model/genrec.json`` and in the manifest, with what was measured.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from accelerate.state import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from genrec import adapters, modeling, sharding
from genrec.artifacts import Stage, stage_folder, write_json
from genrec.columns import PROMPT, TASK
from genrec.config import check_choice, parse, run, training_fingerprint
from genrec.data.splits import read_split
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.evaluation.normalizer_choice import (
    DEFAULT,
    NormalizerChoice,
    declared_by_hand,
    declared_unmeasured,
    measure_normalizers,
)
from genrec.evaluation.validation import BeamValidation
from genrec.normalizers import NORMALIZERS, Normalizer
from genrec.prompt_format import FORMATS, declare_format
from genrec.prompts import PromptRenderer
from genrec.quantizers.code_vectors import code_vectors
from genrec.semantic_ids import SemanticIds
from genrec.tasks.instruction_rows import InstructionRows
from genrec.tasks.mixing import named_numbers, named_rows, plan
from genrec.tasks.rendering import ItemTexts
from genrec.training_data import EpochRows, EpochSampler, estimated_lengths, sample_texts

SID_INITS = ("codebooks", "titles")
N_COMPARED = 64  # rows on which a merged model is compared with the 4-bit one that was trained

ON_QUANTIZED = (
    "the adapter was trained on a 4-bit base and is merged into the unquantised one: the model "
    "isn't quite the one that was trained; metrics.trained_on_quantized_base says by how much"
)


@dataclass
class SftArgs:
    """Settings of the sft stage beside TRL's SFTConfig."""

    run_dir: str = "runs/default"
    overwrite: bool = False
    model_name_or_path: str | None = None  # any Hugging Face causal LM; default: from scratch
    dtype: str = "float32"  # of the loaded base model's weights
    size: str = "small"  # from scratch: tiny, small or base
    vocab_size: int = 2000  # from scratch: text tokens of the tokenizer trained on the catalogue
    dropout: float = 0.0  # from scratch: attention dropout
    sid_init: str = "codebooks"  # SID rows start as rotated centroids, or as means of title tokens
    # plain, or chat: the prompt is the user's turn in the tokenizer's chat template. auto: what a
    # model that genrec trained declares, else plain. The saved tokenizer carries it.
    prompt_format: str = "auto"
    use_lora: bool = False  # train adapters and the SID rows instead of all weights
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    use_dora: bool = False  # a magnitude per output beside LoRA's direction
    use_rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    lora_target_modules: list[str] = field(default_factory=lambda: [adapters.ALL_LINEAR])
    # QLoRA: adapters on an NF4 base that computes in `dtype`; they are merged into the unquantised
    # base in the end. Needs genrec[quant].
    load_in_4bit: bool = False
    # How often an epoch goes through a family's rows, once if it isn't named: "fusion=0.5", or
    # "*=0" for all others; with a number per epoch it is a curriculum: "title_to_sid=1,0.5,0".
    weights: list[str] = field(default_factory=list)
    caps: list[str] = field(default_factory=list)  # rows in an epoch at most: "rating=5000"
    eval_rows: int = 500  # validation rows for NDCG@10 after each epoch; 0 turns it off
    filter_seen: bool = True  # leave out what the user has while validating; as in recommend
    eval_every_steps: int | None = None  # measure every so many steps instead
    # Over what the model's scores are normalised, wherever it ranks: full (the whole vocabulary),
    # level or trie. auto: full, unless another one is better on validation by more than chance.
    normalizer: str = "auto"

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        check_choice("size", self.size, modeling.SIZES)
        check_choice("sid_init", self.sid_init, SID_INITS)
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16", "auto"))
        check_choice("prompt_format", self.prompt_format, FORMATS)
        check_choice("normalizer", self.normalizer, ("auto", *NORMALIZERS))
        if self.use_lora and not self.model_name_or_path:
            raise ValueError(
                "use_lora needs model_name_or_path: adapters sit on a pretrained model"
            )
        if self.prompt_format == "chat" and not self.model_name_or_path:
            raise ValueError(
                "prompt_format chat needs model_name_or_path: a tokenizer from scratch has no chat "
                "template"
            )
        for name in ("use_dora", "use_rslora"):
            if getattr(self, name) and not self.use_lora:
                raise ValueError(f"{name} is a kind of LoRA; it needs use_lora")
        if self.load_in_4bit:
            adapters.check_four_bit(self.use_lora, self.model_name_or_path)


def check_workers(number: int) -> None:
    """Refuse loader processes before the model is loaded."""
    if number:
        raise ValueError(
            f"dataloader_num_workers={number} must be 0: batches are rendered by threads of the "
            "training process"
        )


def named_normalizer(name: str) -> Normalizer | None:
    """The normaliser that the settings name; None for auto."""
    return next((known for known in NORMALIZERS if known == name), None)


def decide(
    by_hand: Normalizer | None,
    validation: BeamValidation | None,
    make: Callable[..., TorchEngine],
    seed: int,
) -> NormalizerChoice:
    """The normaliser that the trained model declares."""
    if by_hand is not None:
        return declared_by_hand(by_hand)
    if validation is None:
        return declared_unmeasured("nothing was validated (eval_rows=0 or no validation rows)")
    return measure_normalizers(validation, make, seed)


def base_model(args: SftArgs, device: str) -> PreTrainedModel:
    """The pretrained model, its layers in 4 bits where asked for."""
    assert args.model_name_or_path
    if args.load_in_4bit:
        return adapters.load_four_bit(args.model_name_or_path, args.dtype, device)
    return modeling.load_base(args.model_name_or_path, args.dtype)


def adapter_config(
    args: SftArgs, model: PreTrainedModel, token_ids: list[list[int]]
) -> LoraConfig | None:
    """The adapters to train; None where all weights are."""
    if not args.use_lora:
        return None
    return adapters.lora_config(
        model, token_ids, args.lora_rank, args.lora_alpha, args.lora_dropout,
        use_dora=args.use_dora, use_rslora=args.use_rslora,
        target_modules=args.lora_target_modules,
    )  # fmt: skip


def unquantized(
    trained: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: SftArgs,
    rows: EpochRows,
    validation: BeamValidation | None,
    make: Callable[[Any], TorchEngine],
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model to serve, and what its readers must know: it isn't quite the one that was trained.

    The adapter was trained beside 4-bit weights and is merged into those that they were made of.
    """
    assert args.model_name_or_path
    merged = adapters.merged_into_base(trained, tokenizer, args.model_name_or_path, args.dtype)
    spread = np.linspace(0, len(rows) - 1, min(N_COMPARED, len(rows))).astype(int)
    texts = [rows[int(place)]["input_ids"] for place in spread]
    told: dict[str, Any] = {
        "quantization": adapters.QUANTIZATION,
        "merged_into": "the unquantised base",
        "merged_against_trained": adapters.logit_gap(trained, merged, texts),
    }
    if validation is not None:
        for name, model in (("trained", trained), ("merged", merged)):
            told[f"ndcg@{validation.k}_{name}"] = float(validation.per_row(make(model))[1].mean())
    return merged, {"trained_on_quantized_base": told}


class EpochTrainer(SFTTrainer):
    """TRL's trainer on rows that are rendered anew for each epoch."""

    def __init__(self, rows: EpochRows, **settings: Any) -> None:
        # TRL takes Datasets alone and looks at the first row of one; torch's loader takes any rows.
        super().__init__(train_dataset=Dataset.from_list([rows[0]]), **settings)
        self.train_dataset = rows

    def _get_train_sampler(self, train_dataset: object = None) -> EpochSampler:
        rows = self.train_dataset
        assert isinstance(rows, EpochRows)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        grouped = self.args.train_sampling_strategy == "group_by_length"
        return EpochSampler(rows, batch, self.args.seed, grouped)


def main() -> None:
    """Run the stage."""
    args, training = parse(SftArgs, SFTConfig)
    check_workers(training.dataloader_num_workers)
    sharding.check_sft(training, args.use_lora, args.eval_rows)
    config = {**asdict(args), "training": training_fingerprint(training)}
    inputs = ["prepare", "embed", "quantize", "build_dataset"]
    with PartialState().main_process_first():
        stage = Stage(args.run_dir, "sft", config, inputs)
        if stage.is_done(args.overwrite and PartialState().is_main_process):
            return
    data = stage_folder(args.run_dir, "prepare")
    dataset = stage_folder(args.run_dir, "build_dataset")
    semantic_ids = SemanticIds.load(stage_folder(args.run_dir, "quantize"))
    texts = ItemTexts.of(pl.read_parquet(data / "catalog.parquet"), semantic_ids)
    titles = texts.titles.to_list()
    built = stage.upstream["build_dataset"].config
    rows = InstructionRows.read(
        dataset / "train.parquet", semantic_ids.item_ids, texts,
        PromptRenderer(dataset / "prompts"), built["seed"], built["n_templates"],
    )  # fmt: skip
    valid = read_split(args.run_dir, "valid", "sft")
    valid_prompts = pl.read_parquet(dataset / "valid.parquet")[PROMPT]

    # Which rows each epoch sees; the tokenizer with SID tokens.
    mixture = plan(
        rows.table[TASK], math.ceil(training.num_train_epochs), named_rows("weights", args.weights),
        {name: int(most) for name, most in named_numbers("caps", args.caps).items()},
        training.seed,
    )  # fmt: skip
    if args.model_name_or_path:
        tokenizer = modeling.base_tokenizer(args.model_name_or_path, semantic_ids)
    else:
        words = sample_texts(dataset / "train.parquet", training.seed)
        tokenizer = modeling.train_tokenizer([*titles, *words], args.vocab_size)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    declare_format(tokenizer, args.prompt_format)
    n_text_tokens = len(tokenizer)
    token_ids = modeling.add_sid_tokens(tokenizer, semantic_ids)
    sid_set = {token for level in token_ids for token in level}
    lengths = estimated_lengths(dataset / "train.parquet")
    train_rows = EpochRows(rows, mixture, lengths, tokenizer, sid_set)
    longest = train_rows.longest()
    # What is served later may be longer than any training row.
    served = modeling.encode_prompts(tokenizer, valid_prompts.to_list())
    longest = max(longest, *(len(ids) + semantic_ids.n_levels for ids in served), 0)

    # Model, SID rows, adapters.
    sharding.load_whole(training)
    if args.model_name_or_path:
        model = base_model(args, str(training.device))
        limit = model.config.max_position_embeddings
        if longest > limit:
            raise ValueError(
                f"the longest row has {longest} tokens, {args.model_name_or_path} holds {limit}; "
                "prepare with a smaller max_history"
            )
    else:
        # Rotary positions cost nothing: hold a full history also where no training row has one.
        full = (stage.upstream["prepare"].config["max_history"] + 1) * semantic_ids.n_levels
        context = -(-(longest + full + 32) // 64) * 64
        model = modeling.from_scratch(
            args.size, len(tokenizer), context, training.seed, args.dropout
        )
    modeling.resize_embeddings(model, tokenizer)
    if len(tokenizer) == n_text_tokens:
        print("the base model has these SID tokens already; their rows are kept")
    elif args.sid_init == "codebooks":
        vectors = np.load(stage_folder(args.run_dir, "embed") / "item_embeddings.npy")
        codebooks = code_vectors(vectors, semantic_ids.codes, semantic_ids.codebook_sizes)
        modeling.initialize_from_codebooks(
            model, token_ids, codebooks, n_text_tokens, training.seed
        )
    else:
        modeling.initialize_from_titles(
            model, tokenizer, token_ids, semantic_ids, titles, n_text_tokens, training.seed
        )

    sharding.split_again(training)

    # TRL takes rows that are token ids and labels already.
    training.output_dir = str(stage.folder / "checkpoints")
    training.dataset_kwargs = {"skip_prepare_dataset": True}
    training.max_length = None
    training.remove_unused_columns = False
    trainer = EpochTrainer(
        train_rows,
        model=model,
        args=training,
        processing_class=tokenizer,
        peft_config=adapter_config(args, model, token_ids),
    )
    assert trainer.model is not None
    adapters.expose_head_bias(trainer.model)
    adapters.keep_token_rows_in_fp32(trainer.model)
    trie = SidTrie.build(semantic_ids.codes)
    engine = partial(
        TorchEngine, trie=trie, sid_token_ids=token_ids, pad_token_id=tokenizer.pad_token_id
    )
    by_hand = named_normalizer(args.normalizer)
    validation = None
    if args.eval_rows and len(valid):
        validation = BeamValidation.of_split(
            stage.folder,
            lambda m: engine(m, normalizer=by_hand or DEFAULT),
            tokenizer,
            valid,
            valid_prompts,
            args.eval_rows,
            training.seed,
            args.filter_seen,
            every_steps=args.eval_every_steps,
        )
        trainer.add_callback(validation)
    trainer.train(resume_from_checkpoint=modeling.last_checkpoint(training.output_dir))

    # Save what is served: the best weights, merged.
    trainer.accelerator.wait_for_everyone()
    weights = sharding.gathered(trainer)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.accelerator.is_main_process:  # it alone has measured, and saves
        best = validation.restore_best(trained) if validation else None
        write_json(stage.folder / "log.json", trainer.state.log_history)
        if args.use_lora:
            trained.save_pretrained(stage.folder / "adapter")
        final: PreTrainedModel = trained
        quantized: dict[str, Any] = {}
        if args.load_in_4bit:
            make = partial(engine, normalizer=by_hand or DEFAULT)
            final, quantized = unquantized(trained, tokenizer, args, train_rows, validation, make)
        choice = decide(by_hand, validation, partial(engine, final), training.seed)
        about = {
            "stage": "sft",
            "base": args.model_name_or_path or f"scratch-{args.size}",
            "normalizer": choice.normalizer,
            "normalizer_choice": asdict(choice),
            **quantized,
        }
        modeling.save_model(final, tokenizer, semantic_ids, stage.folder / "model", about, weights)
        parameters = final.num_parameters()
        metrics: dict[str, Any] = {"parameters": parameters, "best": best, "longest_row": longest}
        metrics["rows_per_epoch"] = mixture.counts(rows.table[TASK])
        metrics["normalizer"] = asdict(choice)
        notes = [ON_QUANTIZED] if quantized else []
        stage.finish(
            mixture.length, training.seed, metrics | quantized, notes,
            skip=["checkpoints", "best.safetensors"],
        )  # fmt: skip
        print(f"{parameters:,} parameters; {mixture.length:,} rows an epoch; validation: {best}")
        print(f"scores normalised over {choice}")


if __name__ == "__main__":
    run(main)
