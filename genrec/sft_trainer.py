"""TRL's SFTTrainer on rows that are rendered anew for each epoch."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from genrec.averaging import WeightAverage
from genrec.training_data import EpochRows, EpochSampler


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

    def _get_train_sampler(self, train_dataset: object = None) -> EpochSampler:
        rows = self.train_dataset
        assert isinstance(rows, EpochRows)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        grouped = self.args.train_sampling_strategy == "group_by_length"
        return EpochSampler(rows, batch, self.args.seed, grouped)
