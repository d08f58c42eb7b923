"""TRL's SFTTrainer on rows that are rendered anew for each epoch."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from genrec.averaging import WeightAverage, trainable
from genrec.training_data import EpochRows, EpochSampler

STRATEGIES = ("random", "group_by_length")


def check_training(training: SFTConfig, loss_over: str, taught: bool) -> None:
    """Refuse settings of TRL's that would do nothing here, or another thing than they say.

    Args:
        training: TRL's settings.
        loss_over: what a SID token's probability is normalised over.
        taught: whether teachers have a part of the target.

    Raises:
        ValueError: there is such a setting.
    """
    if number := training.dataloader_num_workers:
        raise ValueError(
            f"dataloader_num_workers={number} must be 0: batches are rendered by threads of the "
            "training process"
        )
    own = next(field.default for field in fields(SFTConfig) if field.name == "max_length")
    if training.max_length not in (None, own):
        raise ValueError(
            f"max_length={training.max_length}: rows are cut nowhere, since a cut one would lose "
            "its target; prepare with a smaller max_history"
        )
    if training.completion_only_loss is False:
        raise ValueError(
            "completion_only_loss=false: prompts are never learned here; a history's items are "
            "(build_dataset --sequential_mode whole_history)"
        )
    if (strategy := training.train_sampling_strategy) not in STRATEGIES:
        raise ValueError(
            f"train_sampling_strategy={strategy} is not known here; choose one of "
            f"{', '.join(STRATEGIES)}: an epoch's rows are drawn anew"
        )
    if (rate := training.label_smoothing_factor) and (taught or loss_over != "vocabulary"):
        raise ValueError(
            f"label_smoothing_factor={rate:g} smooths over the whole vocabulary, and leaves out "
            f"loss_over={loss_over} and teachers; use one or the other"
        )
    if training.loss_type == "dft" and taught:
        raise ValueError("loss_type=dft weighs a label by its probability; teachers have no label")


class EpochTrainer(SFTTrainer):
    """TRL's trainer on `EpochRows`.

    Args:
        rows: what is trained on, token ids and labels.
        average: of the weights, if one is kept; it lies in each checkpoint.
        args: TRL's settings; those about preparing texts are overwritten.
        **settings: of the trainer.
    """

    def __init__(
        self, rows: EpochRows, average: WeightAverage | None, args: SFTConfig, **settings: Any
    ) -> None:
        # The rows are encoded already, and cut nowhere.
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        args.max_length = None
        args.remove_unused_columns = False
        # TRL takes Datasets alone and looks at the first row of one; torch's loader takes any rows.
        first = Dataset.from_list([rows[0]])
        super().__init__(train_dataset=first, args=args, **settings)
        self.train_dataset = rows
        self._average = average
        if average:
            self.add_callback(average)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Into a checkpoint; its last file, which says that it is complete, is written later."""
        super()._save(output_dir, state_dict)
        if self._average and output_dir:
            self._average.save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights of a checkpoint, in the precision that they were trained in.

        PEFT loads adapters in float32, also where TRL trains them in bfloat16 (on a 4-bit base).
        """
        assert self.model is not None
        kinds = {name: p.dtype for name, p in trainable(self.model).items()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in trainable(self.model).items():
            parameter.data = parameter.data.to(kinds[name])

    def _get_train_sampler(self, train_dataset: object = None) -> EpochSampler:
        rows = self.train_dataset
        assert isinstance(rows, EpochRows)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        grouped = self.args.train_sampling_strategy == "group_by_length"
        return EpochSampler(rows, batch, self.args.seed, grouped)
