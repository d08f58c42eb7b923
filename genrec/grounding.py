"""Free text grounded to catalogue items: the nearest ones by text embedding.

Bao et al. 2023, "A Bi-Step Grounding Paradigm for Large Language Models in Recommendation Systems"
(BIGRec, arXiv 2308.08434): a language model writes what it would recommend, in words; the items
whose embeddings lie nearest to that text are recommended. With D_i the L2 distance of item i and
N_i its training interactions, popularity is put in as in the paper:

    D̂_i = (D_i − min_j D_j) / (max_j D_j − min_j D_j)
    C_i = N_i / Σ_j N_j,   P_i = (C_i − min_j C_j) / (max_j C_j − min_j C_j)
    D̃_i = D̂_i / (1 + P_i)^γ

γ = 0 leaves it out. Minima and maxima are over the whole catalogue, so filters change no distance.

Deviations: the encoder is the run's own, which made the item vectors (the paper takes the states of
the fine-tuned LLM), and an item's text is all that the embed stage read of it, not its title alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.artifacts import Manifest, require, sha256_file, stage_folder
from genrec.columns import TRAIN_COUNT
from genrec.embedding.vectors import content_vectors

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Encoder = Callable[[Sequence[str]], FloatArray]

_BLOCK = 1 << 25  # distances that are held at once


@dataclass(frozen=True)
class Grounded:
    """Nearest items of texts; row i belongs to text i.

    Attributes:
        items: catalogue rows, nearest first, (n, k); −1 where fewer than k are allowed, and in the
            rows of texts that say nothing to the encoder.
        distances: L2 distances, (n, k) float32, reweighted where popularity counts; inf at padding.
        known: whether the encoder knows anything of the text, (n,). To LSA a text of unknown words
            is a zero vector, which is near to nothing.
    """

    items: IntArray
    distances: FloatArray
    known: npt.NDArray[np.bool_]


class TextGrounder:
    """Grounds texts to the items of a catalogue.

    Args:
        encode: texts -> vectors in the space of `vectors`, (n, dim); zero rows for what it doesn't
            know.
        vectors: of the items, (n_items, dim). An item with a zero row is as far as the farthest.
        counts: training interactions of each item, (n_items,).

    Raises:
        ValueError: the two tables have different numbers of items.
    """

    def __init__(
        self,
        encode: Encoder,
        vectors: npt.NDArray[np.floating],
        counts: npt.NDArray[np.integer],
    ) -> None:
        if vectors.ndim != 2 or len(vectors) != len(counts) or not len(vectors):
            raise ValueError(
                f"vectors have shape {vectors.shape} for {len(counts)} items; one row per item is "
                "needed"
            )
        self.encode, self.vectors = encode, np.asarray(vectors, dtype=np.float32)
        self._squares = np.einsum("id,id->i", self.vectors, self.vectors)
        self._empty = ~self.vectors.any(axis=1)
        spread = float(counts.max() - counts.min())
        self._popularity = (counts - counts.min()) / (spread or 1.0)  # the sum cancels

    @classmethod
    def load(
        cls,
        run_dir: Path | str,
        prompt: str | None = None,
        model_name_or_path: str | None = None,
    ) -> TextGrounder:
        """With the text encoder and the item vectors of a run.

        Args:
            run_dir: the run; prepare and embed must be complete.
            prompt: put before each text, for encoders that tell queries from passages ("query: ");
                None: the one that items were embedded with.
            model_name_or_path: folder of the model that embedded the items. A run remembers the
                name of one on the Hub; of a local one it remembers the files' hashes, and they are
                compared.

        Raises:
            ValueError: the items were embedded without a text encoder, it is not known where it
                lies, or its files are not the ones that made the vectors.
        """
        manifest = require(run_dir, "embed")
        encode = _encoder(run_dir, manifest, prompt, model_name_or_path)
        vectors = content_vectors(run_dir)
        assert vectors is not None, "there is a text encoder"
        catalog = stage_folder(run_dir, "prepare") / "catalog.parquet"
        counts = pl.read_parquet(catalog, columns=[TRAIN_COUNT], glob=False)[TRAIN_COUNT]
        return cls(encode, vectors, counts.to_numpy())

    def ground(
        self,
        texts: Sequence[str],
        k: int,
        popularity: float = 0.0,
        seen: Sequence[npt.NDArray[np.integer]] | None = None,
        allowed: npt.NDArray[np.integer] | None = None,
    ) -> Grounded:
        """The k nearest items of each text, by exhaustive search.

        What is filtered is left out of the search, so a list is shorter than k only where fewer
        items are allowed.

        Args:
            texts: what is to be grounded.
            k: items per text.
            popularity: the exponent γ, at least 0.
            seen: catalogue rows that each text must not get, or None.
            allowed: catalogue rows that may be found at all, as `SidTrie.allow` takes them; None:
                every item.

        Raises:
            ValueError: `k` or γ out of range, an empty allow-list, rows outside the catalogue, or
                `seen` of another length than `texts`.
        """
        n_items = len(self.vectors)
        if k < 1:
            raise ValueError(f"k={k} must be at least 1")
        if not 0 <= popularity < np.inf:
            raise ValueError(f"popularity={popularity} must be a number of at least 0")
        if seen is not None and len(seen) != len(texts):
            raise ValueError(f"seen has {len(seen)} entries for {len(texts)} texts")
        if allowed is not None and len(allowed) == 0:
            raise ValueError("the allow-list is empty: no item could be found")
        barred = np.zeros(n_items, dtype=bool)
        if allowed is not None:
            barred[:] = True
            barred[_rows(allowed, n_items)] = False
        items = np.full((len(texts), k), -1, dtype=np.int64)
        distances = np.full((len(texts), k), np.inf, dtype=np.float32)
        queries = self.encode(texts) if len(texts) else np.zeros((0, self.vectors.shape[1]))
        known = np.asarray(queries.any(axis=1))
        weight = (1 + self._popularity) ** popularity
        step = max(1, _BLOCK // n_items)
        for start in range(0, len(texts), step):
            found = self._distances(queries[start : start + step])
            if popularity:
                found = _rescaled(found) / weight
            found[:, barred] = np.inf
            if seen is not None:
                for row, own in enumerate(seen[start : start + step]):
                    found[row, _rows(own, n_items)] = np.inf
            best = _smallest(found, min(k, n_items))
            nearest = np.take_along_axis(found, best, axis=1)
            real = np.isfinite(nearest) & known[start : start + step, None]
            part = slice(start, start + len(found)), slice(0, best.shape[1])
            items[part], distances[part] = (
                np.where(real, best, -1), np.where(real, nearest, np.inf),
            )  # fmt: skip
        return Grounded(items, distances, known)

    def _distances(self, queries: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """L2 distances, (n, n_items)."""
        queries = np.asarray(queries, dtype=np.float32)
        squares = np.einsum("id,id->i", queries, queries)[:, None]
        found = np.maximum(squares - 2 * (queries @ self.vectors.T) + self._squares, 0)
        found = np.sqrt(found, dtype=np.float64)
        if self._empty.any():
            others = found[:, ~self._empty]
            found[:, self._empty] = others.max(axis=1, keepdims=True, initial=0)
        return found


def _rescaled(distances: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """To [0, 1] over the catalogue, row by row."""
    low, high = distances.min(axis=1, keepdims=True), distances.max(axis=1, keepdims=True)
    return (distances - low) / np.where(high > low, high - low, 1)


def _smallest(values: npt.NDArray[np.float64], k: int) -> IntArray:
    """Columns of the k smallest of each row, in order; of equal ones the first columns. (n, k)."""
    limit = np.partition(values, k - 1, axis=1)[:, k - 1 : k]
    out = np.empty((len(values), k), dtype=np.int64)
    for row, (own, most) in enumerate(zip(values, limit, strict=True)):
        near = np.flatnonzero(own <= most)  # k, and what is as far as the k-th
        out[row] = near[np.argsort(own[near], kind="stable")][:k]
    return out


def _rows(rows: npt.NDArray[np.integer], n_items: int) -> IntArray:
    found = np.asarray(rows, dtype=np.int64)
    if found.size and (found.min() < 0 or found.max() >= n_items):
        raise ValueError(
            f"catalogue rows {found.min()}..{found.max()} were given; there are 0..{n_items - 1}"
        )
    return found


def _encoder(
    run_dir: Path | str, manifest: Manifest, prompt: str | None, model_name_or_path: str | None
) -> Encoder:
    """The run's text encoder, set as for its items."""
    config, method = manifest.config, manifest.config["method"]
    if method not in ("lsa", "sentence-transformers", "lm"):
        raise ValueError(
            f"the items of {run_dir} were embedded by method={method}, which can't encode a text; "
            "embed them by lsa, sentence-transformers or lm to ground texts"
        )
    if method == "lsa":
        from genrec.embedding.lsa import LSA

        if prompt is not None or model_name_or_path is not None:
            raise ValueError(
                f"prompt={prompt!r} and model_name_or_path={model_name_or_path!r} don't go with "
                "LSA, which counts words; leave them out"
            )
        return LSA.load(stage_folder(run_dir, "embed")).encode
    names = ("max_length", "normalize", "dtype")
    settings = {name: config[name] for name in names}
    settings["prompt"] = config["prompt"] if prompt is None else prompt
    settings["model_name_or_path"] = _model(manifest, model_name_or_path)
    if method == "lm":
        from genrec.embedding.lm_pooling import lm_vectors

        return partial(lm_vectors, **settings, pooling=config["pooling"])
    from genrec.embedding.text_encoder import encode_texts

    return partial(encode_texts, **settings)


def _model(manifest: Manifest, given: str | None) -> str:
    """Name or folder of the model that embedded the items."""
    known = manifest.config.get("model_name_or_path")
    if known is not None and given not in (None, known):
        raise ValueError(
            f"model_name_or_path={given!r} did not embed the items, {known!r} did; leave it out"
        )
    name = known or given
    if name is None:
        raise ValueError(
            "the items were embedded by a local model, whose folder a run does not record; give "
            "model_name_or_path"
        )
    for file, recorded in manifest.inputs.items():
        if file.startswith("model/"):
            path = Path(name) / file.removeprefix("model/")
            if not path.is_file() or sha256_file(path) != recorded:
                raise ValueError(
                    f"{path} is missing or is not the file that embedded the items; restore it, or "
                    "rerun embed and what follows"
                )
    return name
