"""SASRec as the surrogate of data pruning: what each training row is worth to it.

Its last encoder layer and the norm behind it carry the gradients that influence and effort are
measured by: the parameters next to the output, some 25,000 of them at a width of 64, so one row's
gradient is small and the Hessian's products are cheap. The tied item embeddings are by far the
largest part and get no Hessian; as output layer they enter the effort by its closed form (their
second role, as input, is left out: it would need a gradient of catalogue size per row).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from genrec.columns import ROW_ID, SUPERVISE_FROM
from genrec.evaluation.baselines import training_sequences
from genrec.evaluation.sequential import SequentialTransformer
from genrec.item_lists import ItemLists
from genrec.tasks.pruning import (
    dealrec_score,
    influence_direction,
    score_samples,
    softmax_layer_norms,
)

_CELLS = 8_000_000  # numbers of a batch's logits, and of its gradients: bounds the memory
_MAX_ROWS = 256

IntArray = npt.NDArray[np.int64]


class RowLosses(nn.Module):
    """Loss of each split row: the mean cross entropy of the items that it supervises.

    The mean, not the sum, so that long rows aren't kept for their length. A row that supervises
    nothing but a first item, which SASRec can't predict, has loss 0.

    Args:
        model: a trained SASRec.
    """

    def __init__(self, model: SequentialTransformer) -> None:
        super().__init__()
        if not model.settings.causal:
            raise ValueError(
                "the surrogate must be SASRec: BERT4Rec's losses depend on drawn masks"
            )
        self.model = model

    def hidden_and_weights(
        self, ids: torch.Tensor, supervised: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states ``(n, length - 1, dim)`` and the predictions' weights."""
        # The fused attention kernels have neither second derivatives nor a rule for vmap.
        with sdpa_kernel(SDPBackend.MATH):
            hidden = self.model(ids[:, :-1])
        weights = supervised[:, 1:].to(hidden.dtype)
        return hidden, weights / weights.sum(dim=1, keepdim=True).clamp(min=1)

    def forward(self, ids: torch.Tensor, supervised: torch.Tensor) -> torch.Tensor:
        """Losses of right-padded windows.

        Args:
            ids: histories with targets. ``# (n, length)``
            supervised: the positions to predict. ``# (n, length)``

        Returns:
            ``# (n,)``
        """
        hidden, weights = self.hidden_and_weights(ids, supervised)
        targets = ids[:, 1:].clamp(max=self.model.n_items - 1)  # padding weighs nothing
        log_probs = self.model.logits(hidden).log_softmax(dim=-1)
        found = log_probs.gather(2, targets[:, :, None])[:, :, 0]
        return -(found * weights).sum(dim=1)

    def output_layer_norms(self, ids: torch.Tensor, supervised: torch.Tensor) -> torch.Tensor:
        """Norm of each row's gradient with respect to the output layer. ``# (n,)``."""
        hidden, weights = self.hidden_and_weights(ids, supervised)
        targets = ids[:, 1:].clamp(max=self.model.n_items - 1)
        errors = self.model.logits(hidden).softmax(dim=-1)
        errors.scatter_add_(2, targets[:, :, None], torch.full_like(errors[:, :, :1], -1.0))
        return softmax_layer_norms(hidden, errors * weights[:, :, None])

    def last_layer(self) -> list[str]:
        """Names of the parameters of the last encoder layer and the final norm."""
        last = f"model.encoder.layers.{self.model.settings.layers - 1}."
        starts = (last, "model.encoder.norm.")
        return [name for name, _ in self.named_parameters() if name.startswith(starts)]


@dataclass(frozen=True)
class RowBatches:
    """Split rows as batches of (ids, supervised), shortest rows first, made anew each time.

    Attributes:
        sequences: history and target of each row, in the order of the batches.
        first: first supervised position of each.
        order: row of the split of each.
        padding: fills the ends.
        cells_per_position: numbers that a position costs, for the size of a batch.
        cells_per_row: numbers that a row costs.
    """

    sequences: ItemLists
    first: IntArray
    order: IntArray
    padding: int
    cells_per_position: int
    cells_per_row: int

    @classmethod
    def of(cls, rows: pl.DataFrame, losses: RowLosses) -> RowBatches:
        """All rows of a split."""
        sequences = training_sequences(rows)
        order = np.argsort(sequences.lengths, kind="stable")
        sizes = dict(losses.named_parameters())
        gradient = sum(sizes[name].numel() for name in losses.last_layer())
        first = rows[SUPERVISE_FROM].to_numpy().astype(np.int64)[order]
        model = losses.model
        return cls(sequences.take(order), first, order, model.padding, model.n_items, gradient)

    def sample(self, n_rows: int, seed: int) -> RowBatches:
        """At most `n_rows` of the rows, drawn."""
        if n_rows >= len(self.order):
            return self
        drawn = np.random.default_rng(seed).choice(len(self.order), n_rows, replace=False)
        drawn = np.sort(drawn)
        return RowBatches(
            self.sequences.take(drawn), self.first[drawn], self.order[drawn], self.padding,
            self.cells_per_position, self.cells_per_row,
        )  # fmt: skip

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches whose logits and gradients stay within the bound."""
        start, lengths = 0, self.sequences.lengths
        while start < len(lengths):
            stop = min(start + _MAX_ROWS, len(lengths))
            while stop - start > 1:  # sorted by length: the last row is the longest
                cost = max(int(lengths[stop - 1]) * self.cells_per_position, self.cells_per_row)
                if (stop - start) * cost <= _CELLS:
                    break
                stop = max(start + 1, min(start + _CELLS // cost, stop - 1))
            yield self._batch(np.arange(start, stop))
            start = stop

    def _batch(self, rows: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
        part = self.sequences.take(rows)
        ids = np.full((len(rows), max(2, int(part.lengths.max()))), self.padding, dtype=np.int64)
        place = np.arange(len(part.values)) - part.offsets[part.rows]
        ids[part.rows, place] = part.values
        supervised = np.arange(ids.shape[1]) >= self.first[rows][:, None]
        supervised &= ids != self.padding
        return torch.from_numpy(ids), torch.from_numpy(supervised)


def score_rows(
    model: SequentialTransformer,
    rows: pl.DataFrame,
    effort_weight: float = 0.5,
    damping: float = 0.01,
    curvature_rows: int = 2000,
    max_iterations: int = 50,
    seed: int = 0,
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Influence, effort, loss and DEALRec's score of every training row.

    Args:
        model: SASRec, trained on `rows`.
        rows: training split rows.
        effort_weight: of effort in the score (the paper's lambda).
        damping: of the Hessian; grows where it must, see `influence_direction`.
        curvature_rows: rows that the Hessian is estimated on, drawn.
        max_iterations: of conjugate gradients.
        seed: of that draw.

    Returns:
        row_id, influence, effort, loss and score, in the order of `rows`; and how the influence was
        found: damping, iterations, residual, the mean gradient's norm and the rows' mean norm.

    Raises:
        ValueError: no rows, or a surrogate that diverged.
    """
    losses = RowLosses(model).eval()
    batches, names = RowBatches.of(rows, losses), losses.last_layer()
    direction = influence_direction(
        losses, batches, names, damping, batches.sample(curvature_rows, seed), max_iterations
    )
    found = score_samples(losses, batches, names, direction.vector)
    with torch.no_grad():
        output = torch.cat([losses.output_layer_norms(*batch) for batch in batches])
    effort = np.hypot(found.effort, output.double().numpy())
    score = dealrec_score(found.influence, effort, effort_weight)
    back = np.argsort(batches.order)
    columns = {"influence": found.influence, "effort": effort, "loss": found.loss, "score": score}
    table = pl.DataFrame({ROW_ID: rows[ROW_ID], **{k: v[back] for k, v in columns.items()}})
    return table, {
        "damping": direction.damping,
        "iterations": direction.iterations,
        "residual": direction.residual,
        "mean_gradient_norm": direction.gradient_norm,
        "mean_norm_of_gradients": float(found.effort.mean()),
    }
