"""The rows of a training as token ids, rendered and encoded batch by batch while it runs.

Nothing of an epoch is made before it is needed: each row gets the template of its epoch, and memory
holds the rows' columns, not their texts or tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch.utils.data import Dataset, Sampler, get_worker_info
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import LengthGroupedSampler

from genrec.columns import COMPLETION, PROMPT, TARGET_KIND
from genrec.modeling import encode_rows
from genrec.tasks.instruction_rows import InstructionRows
from genrec.tasks.mixing import Plan

IntArray = npt.NDArray[np.int64]

_SID_TOKEN = r"<[a-z]+_\d+>"
_BYTES_PER_TOKEN = 4  # of text, roughly
_SAMPLE = 200_000  # texts that a tokenizer is trained on at most
_AHEAD = 2_048  # rows that are rendered and encoded at once
_LONGEST = 2_000  # rows of the highest estimates that are encoded to find the longest


def estimated_lengths(path: Path) -> IntArray:
    """About how many tokens each row of ``train.parquet`` has in all. ``# (rows,)``.

    SID tokens are counted, other text is estimated by its bytes: enough to batch rows of similar
    length, at a small part of what encoding them costs.
    """
    text = pl.concat_str(PROMPT, COMPLETION)
    tokens = text.str.count_matches(_SID_TOKEN)
    rest = text.str.replace_all(_SID_TOKEN, "").str.len_bytes()
    counts = tokens + rest // _BYTES_PER_TOKEN + 1
    table = pl.scan_parquet(path, glob=False).select(counts.cast(pl.Int64).alias("tokens"))
    return table.collect(engine="streaming")["tokens"].to_numpy()


def sample_texts(path: Path, seed: int = 0) -> list[str]:
    """Distinct texts of prompts and completions without their SIDs, to train a tokenizer on."""
    plain = pl.col(PROMPT, COMPLETION).str.replace_all(_SID_TOKEN, "")
    table = pl.scan_parquet(path, glob=False).select(plain).collect(engine="streaming")
    texts = pl.concat([table[PROMPT], table[COMPLETION]]).unique(maintain_order=True)
    if len(texts) > _SAMPLE:
        texts = texts.sample(_SAMPLE, seed=seed)
    return texts.to_list()


class EpochRows(Dataset):
    """Rows of the current epoch as `input_ids` and `labels` (−100 on the prompt).

    A place holds rows of about the same length in every epoch, so a sampler that groups by
    `lengths` stays right when the rows change.

    Args:
        rows: all rows.
        plan: which of them each epoch has.
        lengths: estimated tokens of each row. ``# (len(rows),)``
        tokenizer: with the SID tokens.
        sid_ids: ids of the SID tokens.
    """

    def __init__(
        self,
        rows: InstructionRows,
        plan: Plan,
        lengths: IntArray,
        tokenizer: PreTrainedTokenizerBase,
        sid_ids: set[int],
    ) -> None:
        self._rows, self._plan = rows, plan
        self._all_lengths = lengths
        self._tokenizer, self._sid_ids = tokenizer, sid_ids
        self.epoch = -1
        self.set_epoch(0)
        self.follow(range(len(self)))
        self.lengths = lengths[self._now[0]]

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self._plan.length

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch of the trainer; its data loader calls this. Later ones repeat the last."""
        epoch = min(epoch, self._plan.n_epochs - 1)
        if epoch != self.epoch:
            rows, render_epochs = self._plan.slice(epoch)
            order = np.argsort(self._all_lengths[rows], kind="stable")
            self.epoch, self._now = epoch, (rows[order], render_epochs[order])
            self._ahead: dict[int, dict[str, list[int]]] = {}

    def follow(self, order: Sequence[int]) -> None:
        """Take the order in which places will be asked for, so that rows are made ahead of it."""
        self._order = np.asarray(order, dtype=np.int64)
        self._turn = np.empty(len(self), dtype=np.int64)
        self._turn[self._order] = np.arange(len(self._order))
        self._ahead = {}

    def __getitem__(self, place: int) -> dict[str, list[int]]:
        """One row."""
        if not 0 <= place < len(self):
            raise IndexError(place)
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, list[int]]]:
        """The rows of a batch.

        A batch of many families has few rows of each, so rows are rendered and encoded for many
        batches at once: from the first one that is missing on, in the order of `follow`.

        Raises:
            ValueError: a worker process of a data loader asks: it would hang, since the threads of
                Polars don't live on in a fork.
        """
        if (worker := get_worker_info()) is not None:
            raise ValueError(
                f"dataloader_num_workers={worker.num_workers}: leave it at 0; batches "
                "are rendered by threads of the training process"
            )
        for place in places:
            if place not in self._ahead:
                turn = int(self._turn[place])
                at = self._order[turn : turn + _AHEAD]
                at = np.union1d(at, np.setdiff1d(places, [*self._ahead]))
                made = self._encoded(self._now[0][at], self._now[1][at])
                kept = {p: self._ahead[p] for p in places if p in self._ahead}
                self._ahead = {**kept, **dict(zip(at.tolist(), made, strict=True))}
        return [self._ahead[place] for place in places]

    def longest(self) -> int:
        """Tokens of the longest row, among those whose estimates are highest."""
        rows = self._plan.rows  # of all epochs: another template may be longer
        top = np.argsort(-self._all_lengths[rows], kind="stable")[:_LONGEST]
        encoded = self._encoded(rows[top], self._plan.epochs[top])
        return max(len(row["input_ids"]) for row in encoded)

    def _encoded(self, rows: IntArray, epochs: IntArray) -> list[dict[str, list[int]]]:
        text = self._rows.render(rows, epochs)
        made = encode_rows(
            self._tokenizer,
            text[PROMPT].to_list(),
            text[COMPLETION].to_list(),
            self._sid_ids,
            (self._rows.table[TARGET_KIND][rows] == "history").to_list(),
        )
        return [
            {"input_ids": ids, "labels": labels}
            for ids, labels in zip(made["input_ids"], made["labels"], strict=True)
        ]


class EpochSampler(Sampler[int]):
    """Random order of the places, a new one for each epoch; takes the dataset along.

    Accelerate tells a sampler of each new epoch, and the dataset only where no sampler hears it.

    Args:
        rows: the dataset.
        batch_size: rows of an optimizer step.
        seed: of the order.
        grouped: rows of similar length lie together.
    """

    def __init__(self, rows: EpochRows, batch_size: int, seed: int, grouped: bool) -> None:
        self._rows, self._seed = rows, seed
        self._batch_size, self._grouped = batch_size, grouped

    def __len__(self) -> int:
        """Rows of an epoch."""
        return len(self._rows)

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch of the trainer."""
        self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        """Places, in order."""
        order = self._order()
        self._rows.follow(order)
        return iter(order)

    def _order(self) -> list[int]:
        generator = torch.Generator()
        generator.manual_seed(self._seed * 100_003 + self._rows.epoch)
        if self._grouped:
            lengths = self._rows.lengths.tolist()
            sampler = LengthGroupedSampler(self._batch_size, lengths=lengths, generator=generator)
            return list(sampler)
        return torch.randperm(len(self._rows), generator=generator).tolist()
