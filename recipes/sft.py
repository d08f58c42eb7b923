"""Supervised fine-tuning with TRL's SFTTrainer: from scratch, LoRA on any causal LM, or full.

    accelerate launch recipes/sft.py --config recipes/configs/quickstart/sft.yaml

Settings of TRL's SFTConfig (num_train_epochs, learning_rate, bf16, …) go into the same YAML or on
the command line. Writes ``sft/model`` (a plain checkpoint, adapters merged), ``sft/adapter`` (with
LoRA), ``sft/validation.json``, ``sft/log.json`` and ``sft/curves.svg``, a picture of the training
that is drawn anew after each validation; ``sft/model/README.md`` is the model card. Killed and
started again, it resumes at the last checkpoint.

With ``warm_start: <earlier run>`` the model of that run is trained on (daily refresh): on rows with
an interaction or an item that its training part lacked, and on a sample of the old ones,
``replay_share`` of an epoch, against forgetting. The SID map must have grown out of that run's:

    genrec prepare --run_dir runs/today …
    genrec embed --run_dir runs/today --extend runs/yesterday
    genrec quantize --run_dir runs/today --extend runs/yesterday
    genrec build_dataset --run_dir runs/today
    genrec sft --run_dir runs/today --warm_start runs/yesterday --replay_share 0.3

At the end the validation sample is ranked under every score normaliser; the one that the model
declares from then on is in ``sft/model/genrec.json`` and in the manifest, with what was measured.

Longer than other recipes: half of it is settings and their checks, and all ways to train are one
straight line.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
from accelerate.state import PartialState
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from genrec import adapters, modeling, sharding
from genrec.artifacts import Stage, stage_folder, write_json, write_text
from genrec.averaging import WeightAverage
from genrec.bundle.files import CARD
from genrec.bundle.training_card import shown_base, training_card, training_settings
from genrec.columns import PROMPT, TASK
from genrec.config import (
    check_choice,
    check_trainer,
    parse,
    run,
    training_fingerprint,
)
from genrec.data.splits import read_split
from genrec.decoding.item_tokens import item_tokens, prepare_tokenizer
from genrec.decoding.torch_engine import TorchEngine
from genrec.evaluation.normalizer_choice import (
    NormalizerChoice,
    declared_by_hand,
    declared_unmeasured,
    measure_normalizers,
)
from genrec.evaluation.training_picture import CurvesPicture
from genrec.evaluation.validation import BeamValidation
from genrec.normalizers import NORMALIZERS, Normalizer
from genrec.prompt_format import FORMATS, declare_format
from genrec.prompts import PromptRenderer
from genrec.quantizers.code_vectors import code_vectors
from genrec.semantic_ids import TITLES, SemanticIds, map_kind
from genrec.sft_trainer import EpochTrainer, check_training
from genrec.supervised_head import (
    LOSSES,
    NORMALIZERS_OF,
    LossOver,
    add_hidden_dropout,
    use_supervised_head,
)
from genrec.tasks.instruction_rows import InstructionRows
from genrec.tasks.mixing import Plan, named_numbers, named_rows, plan
from genrec.tasks.refresh import apart, compare, refresh_plan, replay_counts
from genrec.tasks.rendering import ItemTexts
from genrec.teachers import TeacherRun, load_teachers
from genrec.title_ids import TitleIds, load_map
from genrec.training_data import EpochRows, estimated_lengths, sample_texts
from genrec.warm_start import (
    EarlierModel,
    check_replay_share,
    check_scope,
    check_stage,
    unseen_codes,
)

logger = logging.getLogger("genrec.sft")

SID_INITS = ("codebooks", "titles", "random", "resized")
LEAST_VOCAB = 300  # bytes, special tokens and a few merges
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
    dropout: float = 0.0  # from scratch: of attention weights
    hidden_dropout: float = 0.0  # from scratch: of embeddings and of what each block adds
    # What a SID token's probability is normalised over in the loss: vocabulary, level (the codes of
    # its level) or trie (those that continue an item's SID). The last two are faster and learn only
    # what the search will ask for; such a model can't write SIDs amid free text.
    loss_over: str = "vocabulary"
    ema_decay: float = 0.0  # validate and serve a moving average of the weights, e.g. 0.999
    # SID rows start as rotated centroids (codebooks), as means of title tokens (titles), or, to be
    # compared with, at random with the spread of the other rows, or as transformers' resize leaves
    # them (resized: all alike).
    sid_init: str = "codebooks"
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
    # Runs whose trained models, over the same SID map and vocabulary, say what the target is beside
    # the label: their mean distribution has `teacher_weight` of it. Each is run over every row.
    teachers: list[str] = field(default_factory=list)
    teacher_weight: float = 0.5
    # Daily refresh: the run whose trained model is trained on, with its tokenizer.
    warm_start: str | None = None
    warm_start_stage: str | None = None  # sft or grpo; default: grpo where it is complete
    replay_share: float = 0.3  # of an epoch: old rows, so that the model doesn't forget them

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        check_choice("size", self.size, modeling.SIZES)
        check_choice("sid_init", self.sid_init, SID_INITS)
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16", "auto"))
        check_choice("prompt_format", self.prompt_format, FORMATS)
        check_choice("normalizer", self.normalizer, ("auto", *NORMALIZERS))
        check_choice("loss_over", self.loss_over, LOSSES)
        if self.normalizer not in ("auto", *NORMALIZERS_OF[self.loss_over]):
            raise ValueError(
                f"normalizer={self.normalizer} with loss_over={self.loss_over}: the model learns "
                f"nothing of what lies outside; use {' or '.join(NORMALIZERS_OF[self.loss_over])}"
            )
        check_stage(self.warm_start_stage)
        check_replay_share(self.replay_share)
        check_numbers(self)
        check_base(self)
        check_adapters(self)


def check_numbers(args: SftArgs) -> None:
    """Refuse numbers that can't work."""
    for name, below in (("dropout", 1), ("hidden_dropout", 1), ("ema_decay", 1)):
        if not 0 <= (value := getattr(args, name)) < below:
            raise ValueError(f"{name}={value} must be at least 0 and below {below}")
    for name, least in (("eval_rows", 0), ("eval_every_steps", 1), ("vocab_size", LEAST_VOCAB)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if not 0 < args.teacher_weight <= 1:
        raise ValueError(f"teacher_weight={args.teacher_weight} must be above 0, at most 1")
    for name, most in named_numbers("caps", args.caps).items():
        if most != int(most):
            raise ValueError(
                f"caps: {name}={most:g} must be a whole number of rows; a share is one of weights"
            )


def check_base(args: SftArgs) -> None:
    """Refuse settings that the model to begin with can't have."""
    if args.model_name_or_path and (args.dropout or args.hidden_dropout):
        raise ValueError("dropout and hidden_dropout are settings of a model from scratch")
    if args.warm_start and args.dropout:
        raise ValueError("dropout is the earlier model's; leave it out with warm_start")
    if args.warm_start and args.model_name_or_path:
        raise ValueError("warm_start begins with that run's model; leave model_name_or_path out")
    if args.prompt_format == "chat" and not (args.model_name_or_path or args.warm_start):
        raise ValueError(
            "prompt_format chat needs model_name_or_path: a tokenizer from scratch has no chat "
            "template"
        )


def check_adapters(args: SftArgs) -> None:
    """Refuse adapters that have no model to sit on."""
    if args.use_lora and not (args.model_name_or_path or args.warm_start):
        raise ValueError("use_lora needs model_name_or_path: adapters sit on a pretrained model")
    for name in ("use_dora", "use_rslora"):
        if getattr(args, name) and not args.use_lora:
            raise ValueError(f"{name} is a kind of LoRA; it needs use_lora")
    if args.load_in_4bit and args.warm_start:
        raise ValueError(
            "load_in_4bit with warm_start: the earlier model is merged into a plain checkpoint; "
            "name that as model_name_or_path to train on it in 4 bits"
        )
    if args.load_in_4bit:
        adapters.check_four_bit(args.use_lora, args.model_name_or_path)


def check_families(loss_over: str, rows_per_epoch: list[dict[str, int]]) -> None:
    """Refuse a loss over less than the vocabulary where SIDs are to be written amid text."""
    mixed = sorted(
        {name for counts in rows_per_epoch for name, rows in counts.items()
         if rows and name.startswith("reasoning")}
    )  # fmt: skip
    if mixed and loss_over != "vocabulary":
        raise ValueError(
            f"loss_over={loss_over} with {', '.join(mixed)}: chains cite SIDs amid text, where a "
            "SID competes with words; use loss_over=vocabulary"
        )


def check_map(loss_over: str, quantize: Path) -> None:
    """Refuse a loss over the codes of a level where items have codes of unequal number."""
    if loss_over != "vocabulary" and map_kind(quantize) == TITLES:
        raise ValueError(
            f"loss_over={loss_over} needs semantic ids of a fixed number of levels; items are "
            "named by titles here (quantize --method title): use loss_over=vocabulary"
        )


def named_normalizer(name: str) -> Normalizer | None:
    """The normaliser that the settings name; None for auto."""
    return next((known for known in NORMALIZERS if known == name), None)


def decide(
    by_hand: Normalizer | None,
    candidates: Sequence[Normalizer],
    validation: BeamValidation | None,
    make: Callable[..., TorchEngine],
    seed: int,
) -> NormalizerChoice:
    """The normaliser that the trained model declares."""
    if by_hand is not None:
        return declared_by_hand(by_hand)
    if validation is None:
        why = "nothing was validated (eval_rows=0 or no validation rows)"
        return declared_unmeasured(candidates[0], why)
    return measure_normalizers(validation, make, seed, candidates)


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


def merged(
    trained: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: SftArgs,
    rows: EpochRows,
    validation: BeamValidation | None,
    make: Callable[[Any], TorchEngine],
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model to serve, before anything is declared of it: in 16 bits merging rounds.

    An adapter that was trained beside 4-bit weights is merged into those that they were made of, so
    the model isn't quite the one that was trained; what its readers must know of it is returned.
    """
    if not args.load_in_4bit:
        return (trained.merge_and_unload() if isinstance(trained, PeftModel) else trained), {}
    assert args.model_name_or_path
    final = adapters.merged_into_base(trained, tokenizer, args.model_name_or_path, args.dtype)
    spread = np.linspace(0, len(rows) - 1, min(N_COMPARED, len(rows))).astype(int)
    texts = [rows[int(place)]["input_ids"] for place in spread]
    told: dict[str, Any] = {
        "quantization": adapters.QUANTIZATION,
        "merged_into": "the unquantised base",
        "merged_against_trained": adapters.logit_gap(trained, final, texts),
    }
    if validation is not None:
        for name, model in (("trained", trained), ("merged", final)):
            told[f"ndcg@{validation.k}_{name}"] = float(validation.per_row(make(model))[1].mean())
    return final, {"trained_on_quantized_base": told}


def earlier_model(args: SftArgs) -> EarlierModel | None:
    """The model that is trained on; None: a first training."""
    if args.warm_start is None:
        return None
    earlier = EarlierModel.of_run(args.warm_start, args.run_dir, args.warm_start_stage)
    check_scope(f"the model of {args.warm_start}", earlier.learned_over, args.loss_over)
    return earlier


def origin(args: SftArgs, earlier: EarlierModel | None) -> dict[str, Any]:
    """Where the model comes from, for its ``genrec.json``."""
    if earlier is None:
        return {"base": shown_base(args.model_name_or_path or f"scratch-{args.size}")}
    return {"base": earlier.about["base"], "lineage": earlier.lineage}


def draw(
    args: SftArgs,
    training: SFTConfig,
    rows: InstructionRows,
    dataset: Path,
    earlier: EarlierModel | None,
) -> tuple[InstructionRows, np.ndarray, Plan, dict[str, int]]:
    """The rows, their estimated lengths, which of them each epoch has, and what is new in them."""
    n_epochs, seed = math.ceil(training.num_train_epochs), training.seed
    weights = named_rows("weights", args.weights)
    caps = {name: int(most) for name, most in named_numbers("caps", args.caps).items()}
    lengths = estimated_lengths(dataset / "train.parquet")
    if earlier is None:
        return rows, lengths, plan(rows.table[TASK], n_epochs, weights, caps, seed), {}
    novelty = compare(stage_folder(args.run_dir, "prepare"), earlier.data)
    if rows.renderer.sha256() != earlier.prompts_sha256:
        logger.warning("the prompts are others than those of the earlier model; it learns them now")
    parts = apart(rows, novelty)
    mixture = refresh_plan(
        parts.rows.table[TASK], parts.n_new, n_epochs, args.replay_share, weights, caps, seed
    )
    facts = {**novelty.counts(), **replay_counts(mixture, parts.n_new)}
    return parts.rows, lengths[parts.origin], mixture, facts


def initialize(
    args: SftArgs,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: list[list[int]],
    semantic_ids: SemanticIds,
    titles: list[str],
    n_text_tokens: int,
    seed: int,
    earlier: EarlierModel | None,
) -> None:
    """Set the SID rows; of an earlier model those alone whose codes no item had before."""
    only = None
    if earlier:
        before = earlier.semantic_ids
        assert isinstance(before, SemanticIds), "a map of codes grows out of one"
        only, seed = unseen_codes(semantic_ids, before), earlier.first_seed
        n_text_tokens = min(token for level in token_ids for token in level)
    if args.sid_init == "codebooks":
        vectors = np.load(stage_folder(args.run_dir, "embed") / "item_embeddings.npy")
        codebooks = code_vectors(vectors, semantic_ids.codes, semantic_ids.codebook_sizes)
        modeling.initialize_from_codebooks(model, token_ids, codebooks, n_text_tokens, seed, only)
    elif args.sid_init == "titles":
        modeling.initialize_from_titles(
            model, tokenizer, token_ids, semantic_ids, titles, n_text_tokens, seed, only
        )
    else:
        spread = modeling.RESIZED if args.sid_init == "resized" else 1.0
        modeling.initialize_around_mean(model, token_ids, n_text_tokens, seed, spread, only)


def base_model(
    args: SftArgs,
    base: Path | str | None,
    training: SFTConfig,
    n_tokens: int,
    longest: int,
    full_history: int,
) -> PreTrainedModel:
    """The model that is trained: loaded, or a small one from scratch.

    Args:
        args: settings.
        base: folder or hub name of the model to load; None: from scratch.
        training: gives the device, and the seed of random weights.
        n_tokens: of the tokenizer.
        longest: tokens of the longest row.
        full_history: SID tokens of the longest history and its target.
    """
    if base:
        if args.load_in_4bit:
            model = adapters.load_four_bit(str(base), args.dtype, str(training.device))
        else:
            model = modeling.load_base(str(base), args.dtype)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and longest > limit:  # those with relative positions have none
            raise ValueError(
                f"the longest row has {longest} tokens, {base} holds {limit}; "
                "prepare with a smaller max_history"
            )
        if args.hidden_dropout:  # an earlier one of ours
            add_hidden_dropout(model, args.hidden_dropout)
        return model
    context = -(-(longest + full_history + 32) // 64) * 64
    model = modeling.from_scratch(args.size, n_tokens, context, training.seed, args.dropout)
    if args.hidden_dropout:
        add_hidden_dropout(model, args.hidden_dropout)
    return model


def main() -> None:
    """Run the stage."""
    args, training = parse(SftArgs, SFTConfig)
    check_trainer(training)
    check_training(training, args.loss_over, bool(args.teachers))
    sharding.check_sft(
        training, args.use_lora, args.eval_rows, args.loss_over, bool(args.teachers),
        args.ema_decay > 0,
    )  # fmt: skip
    config = {**asdict(args), "training": training_fingerprint(training)}
    inputs = ["prepare", "embed", "quantize", "build_dataset"]
    with PartialState().main_process_first():
        earlier = earlier_model(args)
        taught_by = [
            TeacherRun.of_run(run_dir, args.run_dir, cast(LossOver, args.loss_over))
            for run_dir in args.teachers
        ]
        taught_by.sort(key=lambda run: run.content_hash)  # their mean knows no order
        hashes = earlier.hashes if earlier else {}
        hashes |= {f"teachers/{i}": run.content_hash for i, run in enumerate(taught_by)}
        ignore = ["warm_start", "teachers", *([] if taught_by else ["teacher_weight"])]
        stage = Stage(args.run_dir, "sft", config, inputs, ignore=ignore, hashes=hashes)
        check_map(args.loss_over, stage_folder(args.run_dir, "quantize"))
        first = PartialState().is_main_process
        if stage.is_done(args.overwrite and first, alone=first):
            return
    data = stage_folder(args.run_dir, "prepare")
    dataset = stage_folder(args.run_dir, "build_dataset")
    semantic_ids = load_map(stage_folder(args.run_dir, "quantize"))
    texts = ItemTexts.of(pl.read_parquet(data / "catalog.parquet", glob=False), semantic_ids)
    titles = texts.titles.to_list()
    built = stage.upstream["build_dataset"].config
    rows = InstructionRows.read(
        dataset / "train.parquet", semantic_ids.item_ids, texts,
        PromptRenderer(dataset / "prompts"), built["seed"], built["n_templates"],
    )  # fmt: skip
    valid = read_split(args.run_dir, "valid", "sft")
    valid_prompts = pl.read_parquet(dataset / "valid.parquet", glob=False)[PROMPT]

    # Which rows each epoch sees; the tokenizer with SID tokens, or with an end mark of titles.
    rows, lengths, mixture, refresh = draw(args, training, rows, dataset, earlier)
    check_families(args.loss_over, mixture.counts(rows.table[TASK]))
    base = earlier.model if earlier else args.model_name_or_path
    if base:
        tokenizer = modeling.base_tokenizer(str(base), semantic_ids)
    else:
        words = sample_texts(dataset / "train.parquet", training.seed)
        tokenizer = modeling.train_tokenizer([*titles, *words], args.vocab_size)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    declare_format(tokenizer, args.prompt_format)
    n_text_tokens = len(tokenizer)
    prepare_tokenizer(tokenizer, semantic_ids)
    written = item_tokens(tokenizer, semantic_ids)
    trie, token_ids = written.trie, written.token_ids
    train_rows = EpochRows(rows, mixture, lengths, tokenizer, written.last)
    longest = longest_row = train_rows.longest()
    # What is served later may be longer than any training row.
    served = modeling.encode_prompts(tokenizer, valid_prompts.to_list())
    longest = max(longest, *(len(ids) + trie.n_levels for ids in served), 0)

    # Model, SID rows, adapters.
    sharding.load_whole(training)
    # Rotary positions cost nothing: hold a full history also where no training row has one.
    full = (stage.upstream["prepare"].config["max_history"] + 1) * trie.n_levels
    model = base_model(args, base, training, len(tokenizer), longest, full)
    modeling.resize_embeddings(model, tokenizer)
    if isinstance(semantic_ids, TitleIds):
        print("items are named by titles: no tokens are added, all rows are kept")
    elif earlier or len(tokenizer) > n_text_tokens:
        initialize(
            args, model, tokenizer, token_ids, semantic_ids, titles, n_text_tokens, training.seed,
            earlier,
        )  # fmt: skip
    else:
        print("the base model has these SID tokens already; their rows are kept")
    sharding.split_again(training)

    training.output_dir = str(stage.folder / "checkpoints")
    average = WeightAverage(args.ema_decay) if args.ema_decay else None
    trainer = EpochTrainer(
        train_rows,
        average,
        model=model,
        args=training,
        processing_class=tokenizer,
        peft_config=adapter_config(args, model, written.own),
    )
    assert trainer.model is not None
    adapters.expose_head_bias(trainer.model)
    adapters.keep_token_rows_in_fp32(trainer.model)
    teachers = None
    if taught_by:
        teachers = load_teachers(
            taught_by, args.teacher_weight, tokenizer, longest_row, args.dtype, training.device
        )
    # Below any adapter.
    use_supervised_head(model, token_ids, cast(LossOver, args.loss_over), trie, teachers)
    engine = partial(
        TorchEngine, trie=trie, sid_token_ids=token_ids, pad_token_id=tokenizer.pad_token_id
    )
    by_hand = named_normalizer(args.normalizer)
    candidates = NORMALIZERS_OF[args.loss_over]
    validation = None
    if args.eval_rows and len(valid):
        validation = BeamValidation.of_split(
            stage.folder,
            lambda m: engine(m, normalizer=by_hand or candidates[0]),
            tokenizer,
            valid,
            valid_prompts,
            args.eval_rows,
            training.seed,
            args.filter_seen,
            every_steps=args.eval_every_steps,
            average=average,
            at_start=earlier is not None,  # the earlier model stays where training makes it worse
        )
        validation.log_to(trainer)
        trainer.add_callback(validation)
    trainer.add_callback(CurvesPicture(stage.folder, "sft", validation))
    trainer.train(resume_from_checkpoint=modeling.last_checkpoint(training.output_dir))

    # Save what is served: the best weights, merged.
    trainer.accelerator.wait_for_everyone()
    weights = sharding.gathered(trainer)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.accelerator.is_main_process:  # it alone has measured, and saves
        best = validation.restore_best(trained) if validation else None
        if average and best is None:
            average.put_into(trained)
        write_json(stage.folder / "log.json", trainer.state.log_history)
        if args.use_lora:
            trained.save_pretrained(stage.folder / "adapter")
        make = partial(engine, normalizer=by_hand or candidates[0])
        final, quantized = merged(trained, tokenizer, args, train_rows, validation, make)
        choice = decide(by_hand, candidates, validation, partial(engine, final), training.seed)
        about = {
            "stage": "sft",
            **origin(args, earlier),
            "normalizer": choice.normalizer,
            "normalizer_choice": asdict(choice),
            **({"teachers": [run.told() for run in taught_by]} if taught_by else {}),
            **quantized,
        }
        modeling.save_model(final, tokenizer, semantic_ids, stage.folder / "model", about, weights)
        parameters = final.num_parameters()
        metrics: dict[str, Any] = {"parameters": parameters, "best": best, "longest_row": longest}
        metrics["rows_per_epoch"] = mixture.counts(rows.table[TASK])
        metrics["normalizer"] = asdict(choice)
        metrics |= validation.summary() if validation else {}
        metrics |= {"warm_start": {**refresh, **origin(args, earlier)}} if earlier else {}
        ranks = (args.lora_rank, args.lora_alpha) if args.use_lora else None
        settings = training_settings(training, trainer.state.global_step, ranks, args.load_in_4bit)
        card = training_card(stage, semantic_ids, settings, metrics, args.filter_seen)
        write_text(stage.folder / "model" / CARD, card)
        notes = [ON_QUANTIZED] if quantized else []
        stage.finish(
            mixture.length, training.seed, metrics | quantized, notes,
            skip=["checkpoints", "best.safetensors"],
        )  # fmt: skip
        print(f"{parameters:,} parameters; {mixture.length:,} rows an epoch; validation: {best}")
        print(f"scores normalised over {choice}")


if __name__ == "__main__":
    run(main)
