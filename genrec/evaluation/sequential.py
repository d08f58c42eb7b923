"""SASRec and BERT4Rec with full-softmax cross entropy: the trained baselines.

One small transformer over item ids, causal for SASRec (Kang and McAuley 2018) and bidirectional for
BERT4Rec (Sun et al. 2019), both with the softmax over the whole catalogue: sampled negatives are
what made the SASRec of most tables weak (Klenitskiy and Vasilev 2023; Petrov and Macdonald 2023).
Layers come from `torch.nn.TransformerEncoder`; item embeddings are tied to the output layer.

Why not RecTools' (0.19 has both models, with a full softmax too): every baseline here learns from
the same split rows as the model, histories and supervised positions given, where RecTools cuts
sequences from an interaction table, which some datasets don't have; training stops by NDCG@10 of
lists over the whole catalogue with seen items left out, as they are scored later, where RecTools
logs a validation loss; a killed training goes on to the same weights; and on Python 3.11 RecTools
pins NumPy below 2, which vLLM's extras exclude. The price is that nobody else's defaults vouch for
these: the tables state settings, curves and why training stopped.

Tuning is not equal to the kNNs': two dropouts, with the first seed, against some twenty values of
five settings. A value at its grid's edge, which of two every value is, is reported as such.

Deviations from the papers: pre-norm and GELU in both; positions count from a window's start;
logits are computed only where something is predicted, not on padding.

Longer than other modules: model, losses, training and lists differ by one flag, `causal`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import nn
from torch.nn import functional as F

from genrec.artifacts import sha256_json
from genrec.columns import HISTORY, RELEVANT, SUPERVISE_FROM, TARGET
from genrec.data.splits import content_sha256
from genrec.evaluation.baselines import (
    DEVICES,
    TRAINING_VERSION,
    UnfitData,
    supervised_positions,
    training_sequences,
)
from genrec.evaluation.lists import relevant_items
from genrec.evaluation.tuning import relevant_ranks
from genrec.item_lists import ItemLists, list_series
from genrec.metrics import EMPTY, gains, hits

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]

_SCORED_ROWS = 256  # rows whose scores over the catalogue are held at once
_WARMUP_STEPS = 200
MAX_ITEMS = 200_000  # a batch has some 800 rows of logits over the catalogue
_BUCKET = 16  # batches that are sorted by length together: little padding, still random


@dataclass(frozen=True)
class SequentialSettings:
    """Hyper-parameters of a sequential transformer.

    Attributes:
        causal: True is SASRec, False BERT4Rec.
        dim: width of the embeddings and of the feed-forward layer.
        layers: transformer layers.
        heads: attention heads.
        dropout: on embeddings, attention and feed-forward.
        learning_rate: of Adam, constant after a short warm-up.
        batch_size: training windows per step.
        max_epochs: most epochs.
        patience: measurements without a better validation NDCG@10 before training stops.
        epochs_per_measurement: epochs between two measurements.
        mask_share: BERT4Rec: share of a window's items that are masked in an epoch.
    """

    causal: bool = True
    dim: int = 128
    layers: int = 2
    heads: int = 2
    dropout: float = 0.5
    learning_rate: float = 1e-3
    batch_size: int = 128
    max_epochs: int = 100
    patience: int = 8
    epochs_per_measurement: int = 1
    mask_share: float = 0.3

    def __post_init__(self) -> None:
        """Check the values."""
        rules = {
            f"dim={self.dim} must be a multiple of heads={self.heads}": self.heads >= 1
            and self.dim % self.heads == 0,
            f"layers={self.layers} must be at least 1": self.layers >= 1,
            f"dropout={self.dropout} must lie in [0, 1)": 0 <= self.dropout < 1,
            f"mask_share={self.mask_share} must lie in (0, 1)": 0 < self.mask_share < 1,
            f"max_epochs={self.max_epochs} must be at least 1": self.max_epochs >= 1,
            f"batch_size={self.batch_size} must be at least 1": self.batch_size >= 1,
            f"patience={self.patience} must be at least 1": self.patience >= 1,
            f"epochs_per_measurement={self.epochs_per_measurement} must be at least 1": (
                self.epochs_per_measurement >= 1
            ),
            f"learning_rate={self.learning_rate} must be above 0": self.learning_rate > 0,
        }
        if broken := [rule for rule, holds in rules.items() if not holds]:
            raise ValueError("; ".join(broken))

    @classmethod
    def of(cls, name: str) -> SequentialSettings:
        """Defaults of "SASRec" or "BERT4Rec".

        BERT4Rec is measured every third epoch, and may train three times as many: it predicts only
        the masked third of the items in each.
        """
        if name == "SASRec":
            return cls()
        return cls(causal=False, max_epochs=300, epochs_per_measurement=3)

    @property
    def name(self) -> str:
        """Name of the model."""
        return "SASRec" if self.causal else "BERT4Rec"

    def identity(self) -> dict[str, Any]:
        """What makes a training run this one; when it stops doesn't: it may go on later."""
        values = asdict(self)
        return {key: values[key] for key in values if key not in ("max_epochs", "patience")}

    def describe(self) -> str:
        """The settings in one line."""
        values = asdict(self)
        hidden = {"causal", "patience", "epochs_per_measurement", "max_epochs"}
        hidden |= {"mask_share"} if self.causal else set()
        return ", ".join(f"{key}={value:g}" for key, value in values.items() if key not in hidden)


class SequentialTransformer(nn.Module):
    """Item and position embeddings, an encoder, and the item embeddings again as output layer.

    Rows of the embedding: the catalogue, then the mask, then padding.

    Args:
        n_items: size of the catalogue.
        max_length: longest input.
        settings: hyper-parameters.
    """

    def __init__(self, n_items: int, max_length: int, settings: SequentialSettings) -> None:
        """Initialise with N(0, 0.02), as both papers do."""
        super().__init__()
        self.n_items, self.max_length, self.settings = n_items, max_length, settings
        self.mask, self.padding = n_items, n_items + 1
        self.room = max_length - 1  # newest items of a history that are read
        self.items = nn.Embedding(n_items + 2, settings.dim, padding_idx=self.padding)
        self.positions = nn.Embedding(max_length, settings.dim)
        self.dropout = nn.Dropout(settings.dropout)
        layer = nn.TransformerEncoderLayer(
            settings.dim,
            settings.heads,
            settings.dim,
            settings.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(
            layer, settings.layers, nn.LayerNorm(settings.dim), enable_nested_tensor=False
        )
        self.bias = nn.Parameter(torch.zeros(n_items))
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states of right-padded windows. ``(batch, length) -> (batch, length, dim)``."""
        length = ids.shape[1]
        hidden = self.items(ids) + self.positions.weight[:length]  # (batch, length, dim)
        causal = None
        if self.settings.causal:  # padding stands behind everything, so no item sees it
            causal = nn.Transformer.generate_square_subsequent_mask(length, device=ids.device)
        padded = None if self.settings.causal else ids == self.padding
        return self.encoder(
            self.dropout(hidden),
            mask=causal,
            src_key_padding_mask=padded,
            is_causal=self.settings.causal,
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores over the catalogue. ``hidden (n, dim) -> (n, n_items)``."""
        return F.linear(hidden, self.items.weight[: self.n_items], self.bias)


def _padded(lists: ItemLists, rows: IntArray, fill: int) -> torch.Tensor:
    """The lists of `rows` as one right-padded tensor. ``# (rows, longest)``."""
    part = lists.take(rows)
    ids = np.full((len(rows), int(part.lengths.max())), fill, dtype=np.int64)
    ids[part.rows, np.arange(len(part.values)) - part.offsets[part.rows]] = part.values
    return torch.from_numpy(ids)


@dataclass(frozen=True)
class _Windows:
    """Training windows and which of their positions are supervised."""

    sequences: ItemLists
    supervised: npt.NDArray[np.bool_]  # (n_values,)

    @classmethod
    def of_rows(cls, rows: pl.DataFrame) -> _Windows:
        sequences = training_sequences(rows)
        flags = np.zeros(len(sequences.values), dtype=bool)
        flags[supervised_positions(rows, sequences)] = True
        return cls(sequences, flags)

    def batches(self, size: int, rng: np.random.Generator) -> Iterator[IntArray]:
        """Random batches of windows of similar length."""
        usable = np.flatnonzero(self.sequences.lengths >= 2)
        order = rng.permutation(usable)
        batches = []
        for start in range(0, len(order), size * _BUCKET):
            chunk = order[start : start + size * _BUCKET]
            chunk = chunk[np.argsort(self.sequences.lengths[chunk], kind="stable")]
            batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        for i in rng.permutation(len(batches)):
            yield batches[i]

    def flags(self, rows: IntArray) -> torch.Tensor:
        part = ItemLists(self.supervised.astype(np.int64), self.sequences.offsets)
        return _padded(part, rows, 0).bool()


def _next_item_loss(
    model: SequentialTransformer, windows: _Windows, rows: IntArray
) -> torch.Tensor:
    """SASRec: at every position, cross entropy of the next item over the whole catalogue."""
    device = model.bias.device
    ids = _padded(windows.sequences, rows, model.padding).to(device)
    flags = windows.flags(rows).to(device)
    hidden = model(ids[:, :-1])
    predicted = flags[:, 1:]
    return F.cross_entropy(model.logits(hidden[predicted]), ids[:, 1:][predicted])


def _cloze_loss(
    model: SequentialTransformer, windows: _Windows, rows: IntArray, rng: np.random.Generator
) -> torch.Tensor:
    """BERT4Rec: cross entropy of masked items; at least one of a window, often just the last."""
    ids, flags = _padded(windows.sequences, rows, model.padding), windows.flags(rows)
    lengths = torch.from_numpy(windows.sequences.lengths[rows])
    draws = torch.from_numpy(rng.random(ids.shape))
    masked = (draws < model.settings.mask_share) & flags
    last = F.one_hot(lengths - 1, ids.shape[1]).bool()
    # As at serving, a tenth of the windows hides the last item alone; and no window hides none.
    only_last = torch.from_numpy(rng.random(len(rows)) < 0.1) | ~masked.any(dim=1)
    masked = torch.where(only_last[:, None], last, masked).to(model.bias.device)
    ids = ids.to(model.bias.device)
    hidden = model(ids.masked_fill(masked, model.mask))
    return F.cross_entropy(model.logits(hidden[masked]), ids[masked])


def recommend_sequential(
    model: SequentialTransformer, history: ItemLists, seen: ItemLists, k: int
) -> IntArray:
    """The items of `list_sequential` alone."""
    return list_sequential(model, history, seen, k)[0]


@torch.no_grad()
def list_sequential(
    model: SequentialTransformer, history: ItemLists, seen: ItemLists, k: int
) -> tuple[IntArray, npt.NDArray[np.float32]]:
    """The `k` items of highest score for each history.

    Args:
        model: a trained model, on any device.
        history: items of each row, oldest first; an empty one gets the model's prior.
        seen: items to leave out, per row.
        k: list length.

    Returns:
        Item indices, padded with `EMPTY` where the catalogue is used up, and their
        log-probabilities over the whole catalogue, −inf behind the last. ``# (n_rows, k)`` each
    """
    model.eval()
    device = model.bias.device
    keep = np.minimum(history.lengths, model.room)
    lists = np.full((len(history), k), EMPTY, dtype=np.int64)
    log_probs = np.full((len(history), k), -np.inf, dtype=np.float32)
    order = np.argsort(keep, kind="stable")  # by length: little padding
    for start in range(0, len(order), _SCORED_ROWS):
        rows = order[start : start + _SCORED_ROWS]
        part, length = history.take(rows), keep[rows]
        # The newest items, then the mask (BERT4Rec) or nothing (SASRec).
        extra = 0 if model.settings.causal else 1
        ids = np.full((len(rows), max(1, int(length.max()) + extra)), model.padding, np.int64)
        place = np.arange(len(part.values)) - part.offsets[part.rows]
        place -= (part.lengths - length)[part.rows]
        kept = place >= 0
        ids[part.rows[kept], place[kept]] = part.values[kept]
        if extra:
            ids[np.arange(len(rows)), length] = model.mask
        else:
            ids[length == 0, 0] = model.mask
        last = np.maximum(length + extra - 1, 0)
        states = model(torch.from_numpy(ids).to(device))  # (rows, length, dim)
        hidden = states[torch.arange(len(rows), device=device), torch.from_numpy(last).to(device)]
        scores = model.logits(hidden)
        total = scores.logsumexp(1, keepdim=True)
        banned = seen.take(rows)
        cells = (torch.from_numpy(banned.rows), torch.from_numpy(banned.values))
        scores[tuple(cell.to(device) for cell in cells)] = -torch.inf
        best = scores.topk(min(k, model.n_items), dim=1)
        found = best.indices.masked_fill(best.values == -torch.inf, EMPTY).cpu().numpy()
        lists[rows, : found.shape[1]] = found
        log_probs[rows, : found.shape[1]] = (best.values - total).cpu().numpy()
    return lists, log_probs


@dataclass(frozen=True)
class Trained:
    """A trained model and its way there.

    Attributes:
        model: with the weights of the best measurement, on the CPU.
        curve: one entry per measurement: epoch, loss, validation HR@10 and NDCG@10, seconds.
    """

    model: SequentialTransformer
    curve: list[dict[str, float]]

    @property
    def stopped(self) -> str:
        """Why training ended: "patience", or "cap" if the epochs ran out before."""
        return "patience" if _since_best(self.curve) >= self.model.settings.patience else "cap"

    @property
    def best(self) -> dict[str, float]:
        """The measurement with the highest validation NDCG@10."""
        return max(self.curve, key=lambda entry: entry["ndcg@10"])


def compute_device(device: str) -> torch.device:
    """The device that one of `DEVICES` stands for.

    Raises:
        ValueError: another name, or "cuda" where there is no GPU.
    """
    if device not in DEVICES:
        raise ValueError(f"device={device!r} is not known; choose from {', '.join(DEVICES)}")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ValueError("device=cuda, but torch finds no GPU; use device=auto or device=cpu")
    return torch.device("cuda" if available and device != "cpu" else "cpu")


def training_key(
    rows: pl.DataFrame,
    valid: pl.DataFrame,
    seen: ItemLists,
    n_items: int,
    settings: SequentialSettings,
    seed: int,
) -> str:
    """Hash of all that a trained state depends on (arguments as of `train_sequential`).

    The device is not part of it: a state made on a GPU goes on, and recommends, on a CPU.
    """
    judged = [name for name in (HISTORY, TARGET, RELEVANT) if name in valid.columns]
    unseen = pl.DataFrame({"seen": list_series(pl.Series("seen", seen.values), seen.offsets)})
    tables = {
        "rows": rows.select(HISTORY, TARGET, SUPERVISE_FROM),
        "valid": valid.select(judged),
        "seen": unseen,
    }
    return sha256_json(
        {
            **settings.identity(),
            "seed": seed,
            "n_items": n_items,
            "version": TRAINING_VERSION,
            "content": content_sha256(tables),
        }
    )


def train_sequential(
    rows: pl.DataFrame,
    valid: pl.DataFrame,
    seen: ItemLists,
    n_items: int,
    settings: SequentialSettings,
    seed: int = 0,
    checkpoint: Path | None = None,
    device: str = "auto",
) -> Trained:
    """Train until validation NDCG@10 stops rising, or to `max_epochs`; keep the best weights.

    Args:
        rows: training split rows.
        valid: validation split rows (model choice only).
        seen: items to leave out of the validation lists, per validation row.
        n_items: size of the catalogue.
        settings: hyper-parameters.
        seed: of the initialisation, the batches and the masks.
        checkpoint: file that holds the state after each measurement; a run killed in between goes
            on from there. It is left behind when training ends, so a finished run is just loaded,
            on any device.
        device: one of `DEVICES`; "auto" takes a GPU where there is one.

    Returns:
        The trained model. The same seed gives the same model, interrupted or not, on one machine
        and kind of device.

    Raises:
        ValueError: no usable training rows, no validation rows, or more than `MAX_ITEMS` items.
    """
    if valid.is_empty():
        raise UnfitData("early stopping needs validation rows, and there are none")
    if n_items > MAX_ITEMS:
        raise UnfitData(
            f"full softmax over {n_items} items needs more memory than a baseline should take; "
            f"SASRec and BERT4Rec are offered for at most {MAX_ITEMS} items"
        )
    windows = _Windows.of_rows(rows)
    if not (windows.sequences.lengths >= 2).any():
        raise UnfitData("no training row has two items, so there is no next item to learn")
    history, relevant = ItemLists.from_column(valid[HISTORY]), relevant_items(valid)
    torch.manual_seed(seed)
    longest = max(int(windows.sequences.lengths.max()), int(history.lengths.max()) + 2)
    model = SequentialTransformer(n_items, longest, settings)
    # Behind the longest training window lie positions whose embeddings were never trained.
    model.room = int(windows.sequences.lengths.max()) - 1
    model.to(compute_device(device))
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate, betas=(0.9, 0.98))
    state: dict[str, Any] = {
        "key": training_key(rows, valid, seen, n_items, settings, seed),
        "curve": [],
        "best": {name: value.clone() for name, value in model.state_dict().items()},
    }
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if saved["key"] != state["key"]:
            raise ValueError(
                f"{checkpoint} belongs to other settings or data, or was made by another version; "
                "delete it"
            )
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state |= {"curve": saved["curve"], "best": saved["best"]}
    curve = state["curve"]
    while not _finished(curve, settings):
        started = time.perf_counter()
        first = int(curve[-1]["epoch"]) if curve else 0
        loss = _train_epochs(model, optimizer, windows, seed, first)
        rank = relevant_ranks(recommend_sequential(model, history, seen, 10), relevant)
        entry = {
            "epoch": float(first + settings.epochs_per_measurement),
            "loss": loss,
            "hr@10": float(hits(rank, 10).mean()),
            "ndcg@10": float(gains(rank, 10).mean()),
            "seconds": round(time.perf_counter() - started, 1),
        }
        if entry["ndcg@10"] > max((e["ndcg@10"] for e in curve), default=-1.0):
            state["best"] = {name: value.clone() for name, value in model.state_dict().items()}
        curve.append(entry)
        logger.info("%s seed %d: %s", settings.name, seed, entry)
        if checkpoint is not None:
            now = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            _save(checkpoint, {**state, **now})
    model.load_state_dict(state["best"])
    if _since_best(curve) < settings.patience:
        logger.warning(
            "%s seed %d stopped at its cap of %d epochs, still rising; raise max_epochs",
            settings.name, seed, settings.max_epochs,
        )  # fmt: skip
    return Trained(model.cpu().eval(), curve)


def _train_epochs(
    model: SequentialTransformer,
    optimizer: torch.optim.Optimizer,
    windows: _Windows,
    seed: int,
    first: int,
) -> float:
    """Train until the next measurement; the mean loss."""
    settings = model.settings
    losses: list[float] = []
    model.train()
    for epoch in range(first, first + settings.epochs_per_measurement):
        # Seeded by the epoch, so that an interrupted run repeats what it lost.
        torch.manual_seed(seed * 100_003 + epoch)
        rng = np.random.default_rng([seed, epoch])
        for batch in windows.batches(settings.batch_size, rng):
            if settings.causal:
                loss = _next_item_loss(model, windows, batch)
            else:
                loss = _cloze_loss(model, windows, batch, rng)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            steps = len(losses) + (_WARMUP_STEPS if first else 0)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * min(1.0, (steps + 1) / _WARMUP_STEPS)
            optimizer.step()
            losses.append(float(loss.detach()))
    return float(np.mean(losses))


def _save(checkpoint: Path, state: dict[str, Any]) -> None:
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    partial = checkpoint.with_name(checkpoint.name + ".partial")
    torch.save(state, partial)
    partial.replace(checkpoint)


def _since_best(curve: list[dict[str, Any]]) -> int:
    scores = [entry["ndcg@10"] for entry in curve]
    return len(scores) - 1 - int(np.argmax(scores))


def _finished(curve: list[dict[str, Any]], settings: SequentialSettings) -> bool:
    if not curve:
        return False
    return curve[-1]["epoch"] >= settings.max_epochs or _since_best(curve) >= settings.patience
