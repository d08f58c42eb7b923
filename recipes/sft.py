"""Supervised fine-tuning with TRL's SFTTrainer: from scratch, LoRA on any causal LM, or full.

    accelerate launch recipes/sft.py --config recipes/configs/quickstart/sft.yaml

Settings of TRL's SFTConfig (num_train_epochs, learning_rate, bf16, …) go into the same YAML or on
the command line. Writes ``sft/model`` (a plain checkpoint, adapters merged), ``sft/adapter`` (with
LoRA), ``sft/validation.json`` and ``sft/log.json``. Killed and started again, it resumes at the
last checkpoint.
"""

from dataclasses import asdict, dataclass

import numpy as np
import polars as pl
from accelerate.state import PartialState
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from genrec import modeling
from genrec.artifacts import Stage, stage_folder, write_json
from genrec.columns import COMPLETION, PROMPT, TITLE
from genrec.config import check_choice, parse, run, training_fingerprint
from genrec.data.splits import read_split
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.evaluation.validation import BeamValidation
from genrec.prompts import escape_text
from genrec.quantizers.code_vectors import code_vectors
from genrec.semantic_ids import SemanticIds

SID_INITS = ("codebooks", "titles")


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
    use_lora: bool = False  # train adapters and the SID rows instead of all weights
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    eval_rows: int = 500  # validation rows for NDCG@10 after each epoch; 0 turns it off
    filter_seen: bool = True  # leave out what the user has while validating; as in recommend
    eval_every_steps: int | None = None  # measure every so many steps instead

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        check_choice("size", self.size, modeling.SIZES)
        check_choice("sid_init", self.sid_init, SID_INITS)
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16", "auto"))
        if self.use_lora and not self.model_name_or_path:
            raise ValueError(
                "use_lora needs model_name_or_path: adapters sit on a pretrained model"
            )


def main() -> None:
    """Run the stage."""
    args, training = parse(SftArgs, SFTConfig)
    config = {**asdict(args), "training": training_fingerprint(training)}
    inputs = ["prepare", "embed", "quantize", "build_dataset"]
    with PartialState().main_process_first():
        stage = Stage(args.run_dir, "sft", config, inputs)
        if stage.is_done(args.overwrite and PartialState().is_main_process):
            return
    data = stage_folder(args.run_dir, "prepare")
    dataset = stage_folder(args.run_dir, "build_dataset")
    semantic_ids = SemanticIds.load(stage_folder(args.run_dir, "quantize"))
    titles = [escape_text(t) for t in pl.read_parquet(data / "catalog.parquet")[TITLE]]
    rows = pl.read_parquet(dataset / "train.parquet")
    valid = read_split(args.run_dir, "valid", "sft")
    valid_prompts = pl.read_parquet(dataset / "valid.parquet")[PROMPT]

    # Tokenizer with SID tokens, then the rows as token ids.
    if args.model_name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    else:
        text = rows[PROMPT].str.replace_all(r"<[a-z]+_\d+>", "").unique(maintain_order=True)
        tokenizer = modeling.train_tokenizer([*titles, *text], args.vocab_size)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    n_text_tokens = len(tokenizer)
    token_ids = modeling.add_sid_tokens(tokenizer, semantic_ids)
    sid_set = {token for level in token_ids for token in level}
    encoded = modeling.encode_rows(
        tokenizer, rows[PROMPT].to_list(), rows[COMPLETION].to_list(), sid_set
    )
    longest = max(len(ids) for ids in encoded["input_ids"])
    # What is served later may be longer than any training row.
    served = modeling.encode_prompts(tokenizer, valid_prompts.to_list())
    longest = max(longest, *(len(ids) + semantic_ids.n_levels for ids in served), 0)

    # Model, SID rows, adapters.
    if args.model_name_or_path:
        model = modeling.load_base(args.model_name_or_path, args.dtype)
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
    lora = None
    if args.use_lora:
        lora = modeling.lora_config(
            model, token_ids, args.lora_rank, args.lora_alpha, args.lora_dropout
        )

    # TRL takes rows that are token ids and labels already.
    training.output_dir = str(stage.folder / "checkpoints")
    training.dataset_kwargs = {"skip_prepare_dataset": True}
    training.max_length = None
    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=Dataset.from_dict(encoded),
        processing_class=tokenizer,
        peft_config=lora,
    )
    assert trainer.model is not None
    modeling.expose_head_bias(trainer.model)
    trie = SidTrie.build(semantic_ids.codes)
    validation = None
    if args.eval_rows and len(valid):
        validation = BeamValidation.of_split(
            stage.folder,
            lambda m: TorchEngine(m, trie, token_ids, tokenizer.pad_token_id),
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
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.accelerator.is_main_process:  # it alone has measured, and saves
        best = validation.restore_best(trained) if validation else None
        write_json(stage.folder / "log.json", trainer.state.log_history)
        if args.use_lora:
            trained.save_pretrained(stage.folder / "adapter")
        about = {"stage": "sft", "base": args.model_name_or_path or f"scratch-{args.size}"}
        modeling.save_model(trained, tokenizer, semantic_ids, stage.folder / "model", about)
        parameters = sum(p.numel() for p in trained.parameters())
        metrics = {"parameters": parameters, "best": best, "longest_row": longest}
        stage.finish(len(rows), training.seed, metrics, skip=["checkpoints", "best.safetensors"])
        print(f"{parameters:,} parameters, {len(rows):,} rows; best on validation: {best}")


if __name__ == "__main__":
    run(main)
