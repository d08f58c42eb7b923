"""How good a SID map is: use of the codes, what prefixes mean, what they keep of the neighbours.

`quality_report` gathers all of it in one dictionary that goes into JSON; `quality_page` draws it.
Each part of the report is a function of its own; the file is long because they are one report.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.columns import BRAND, CATEGORIES, TITLE
from genrec.item_lists import ItemLists
from genrec.quantizers.neighbours import (
    co_purchases,
    nearest_vectors,
    neighbour_preservation,
    pair_preservation,
    prefix_groups,
)
from genrec.quantizers.quantizer import Quantizer, check_codes

log = logging.getLogger(__name__)

IntArray = npt.NDArray[np.integer]
FloatArray = npt.NDArray[np.floating]

NEIGHBOURS = 10  # per item
FEWEST, MOST = 5, 500  # distinct values of an attribute that prefixes are compared with
CURVE_POINTS = 200  # epochs of a training that are drawn
AGREEMENT_ITEMS = 50_000  # adjusted mutual information is slow: larger catalogues are sampled
MAP_ITEMS = 3_000
_PERMUTATIONS = 5  # of the categories, for the purity by chance
_MAX_DEPTH = 12  # of a category path
_MAX_TEXT = 300  # characters of a title that are looked at
_COMMON = 0.05
_MARKED = 0.05  # rank of a word that is hardly more frequent than elsewhere
_CENTRE_ROWS = 2_000  # items of a code among which the most central are sought
_BLOCK_ROWS = 8_192
_WORD = r"(?u)\b[^\W\d_]{3,20}\b"
_UNITS = ("count", "fluid", "gram", "grams", "inch", "inches", "ounce", "ounces", "pack", "size")


def row_ids(codes: IntArray) -> npt.NDArray[np.int64]:
    """A number per distinct row of `codes`, in lexicographic order from 0, (n_items,).

    Ten times as fast as ``np.unique(codes, axis=0)`` on a million rows.
    """
    if codes.shape[1] == 0:
        return np.zeros(len(codes), dtype=np.int64)
    return prefix_groups(codes)[:, -1]


def shared_rows(codes: np.ndarray) -> np.ndarray:
    """Boolean (n_items,): which rows of `codes` occur more than once."""
    ids = row_ids(np.asarray(codes))
    return np.bincount(ids)[ids] > 1


def collision_rate(codes: np.ndarray) -> float:
    """Share of items whose SID is shared with another item: items that share a SID / items."""
    return float(shared_rows(np.asarray(codes)).mean())


def level_usage(codes: np.ndarray, codebook_sizes: Sequence[int]) -> list[dict[str, float]]:
    """How each level uses its codebook.

    Args:
        codes: (n_items, n_levels).
        codebook_sizes: number of codes per level.

    Returns:
        Per level: ``size``; ``used``, codes that some item has; ``perplexity``, 2 to the entropy in
        bits; ``gini`` over the whole codebook, 0 if all codes are used alike and near 1 if few take
        all; ``largest_share`` of the items that has the most frequent code.
    """
    report = []
    for level, size in enumerate(codebook_sizes):
        counts = np.bincount(codes[:, level], minlength=size)
        p = counts[counts > 0] / counts.sum()
        place = 2.0 * np.arange(1, len(counts) + 1) - len(counts) - 1
        report.append(
            {
                "size": size,
                "used": int((counts > 0).sum()),
                "perplexity": float(2 ** -(p * np.log2(p)).sum()),
                "gini": float(place @ np.sort(counts) / (len(counts) * counts.sum())),
                "largest_share": float(p.max()),
            }
        )
    return report


def prefix_usage(codes: IntArray) -> list[dict[str, float]]:
    """How items spread over the prefixes of each length.

    Returns:
        Per ``length``: ``distinct`` prefixes, ``mean_items`` and ``max_items`` of one, and
        ``alone``, items that no other item shares the prefix with.
    """
    report = []
    for level, group in enumerate(prefix_groups(codes).T):
        counts = np.bincount(group)
        report.append(
            {
                "length": level + 1,
                "distinct": len(counts),
                "mean_items": float(counts.mean()),
                "max_items": int(counts.max()),
                "alone": int((counts == 1).sum()),
            }
        )
    return report


def attribute_agreement(codes: IntArray, catalog: pl.DataFrame, seed: int = 0) -> dict[str, Any]:
    """Whether items of one prefix are of one category, or one brand.

    A category is the path cut to the depth that has most between `FEWEST` and `MOST` distinct
    values; of brands the `MOST` most frequent count. Catalogues of more than `AGREEMENT_ITEMS`
    items with a value are sampled.

    Args:
        codes: (n_items, n_levels).
        catalog: row i is item i; columns ``categories`` (paths) and ``brand``, where there.
        seed: of the sample and the permutations.

    Returns:
        Column -> ``values`` (distinct), ``items`` compared, ``depth`` (categories only), and per
        prefix ``length`` 1 and 2: ``groups``; ``purity``, the share of items whose value is their
        prefix's most frequent; ``chance``, the purity of as many random groups of the same sizes,
        since purity rises with the number of groups; ``adjusted_mutual_information``, 0 by
        chance and 1 if prefixes and values say the same (Vinh et al. 2010).
    """
    from sklearn.metrics import adjusted_mutual_info_score

    prefixes = prefix_groups(codes[:, :2])
    found: dict[str, Any] = {}
    for column, (labels, about) in _attributes(catalog).items():
        rng = np.random.default_rng(seed)
        rows = np.flatnonzero(labels >= 0)
        if len(rows) > AGREEMENT_ITEMS:
            rows = np.sort(rng.choice(rows, AGREEMENT_ITEMS, replace=False))
        kept = labels[rows]
        lengths = []
        for length, group in enumerate(prefixes[rows].T, 1):
            random = [_purity(group, rng.permutation(kept)) for _ in range(_PERMUTATIONS)]
            agreement = float(adjusted_mutual_info_score(kept, group))
            lengths.append(
                {
                    "length": length,
                    "groups": len(np.unique(group)),
                    "purity": _purity(group, kept),
                    "chance": float(np.mean(random)),
                    "adjusted_mutual_information": agreement,
                }
            )
        found[column] = {**about, "items": len(rows), "prefixes": lengths}
    return found


def _attributes(catalog: pl.DataFrame) -> dict[str, tuple[npt.NDArray[np.int64], dict[str, int]]]:
    """Column -> number of each item's value (-1: none), and what is compared."""
    found = {}
    if CATEGORIES in catalog.columns:
        path = pl.col(CATEGORIES).list.drop_nulls()
        longest = min(int(catalog.select(path.list.len().max()).item() or 0), _MAX_DEPTH)
        cuts = []
        for depth in range(1, longest + 1):
            cut = path.list.head(depth).list.join("\x1f").replace("", None)
            series = catalog.select(cut.alias(CATEGORIES))[CATEGORIES]
            if FEWEST <= series.drop_nulls().n_unique() <= MOST:
                cuts.append((series.drop_nulls().n_unique(), -depth, series))
        if cuts:
            values, depth, series = max(cuts, key=lambda cut: cut[:2])
            found[CATEGORIES] = (_numbers(series), {"values": values, "depth": -depth})
    if BRAND in catalog.columns:
        brands = catalog[BRAND].cast(pl.String).replace("", None)
        counts = brands.drop_nulls().value_counts(sort=True).sort(
            "count", BRAND, descending=[True, False]
        )  # fmt: skip
        common = counts[BRAND].head(MOST)
        if len(common) >= FEWEST:
            kept = pl.select(pl.when(brands.is_in(common.implode())).then(brands)).to_series()
            found[BRAND] = (_numbers(kept), {"values": len(common)})
    return found


def _numbers(series: pl.Series) -> npt.NDArray[np.int64]:
    return series.rank("dense").cast(pl.Int64).fill_null(0).to_numpy() - 1


def _purity(groups: IntArray, labels: IntArray) -> float:
    """Share of items whose label is the most frequent of their group."""
    pairs, counts = np.unique(np.stack([groups, labels]), axis=1, return_counts=True)
    most = np.zeros(int(groups.max()) + 1, dtype=np.int64)
    np.maximum.at(most, pairs[0], counts)
    return float(most.sum() / len(labels))


def reconstruction_error(
    codes: IntArray, vectors: FloatArray, quantizer: Quantizer
) -> dict[str, Any]:
    """What the codes leave unexplained of the vectors: 0 nothing, 1 as much as their mean does.

    Args:
        codes: (n_items, n_levels); a level of suffixes or item tokens behind the quantizer's levels
            describes nothing and is left out.
        vectors: that the quantizer encodes, (n_items, dim).
        quantizer: the fitted one.

    Returns:
        ``after_level``, for each level of the quantizer: mean squared distance of the latents to
        what the codes so far stand for, by the quantizer's `level_costs`, over the latents'
        variance; None where it is infinite or there is no variance. The parts that a product
        quantizer has not coded yet count with their variance. ``decoded``: the same for the decoded
        vectors in the space of the input.
    """
    from genrec.quantizers.product import ProductQuantizer

    codes = codes[:, : len(quantizer.codebook_sizes)]
    check_codes(codes, quantizer.codebook_sizes)
    exact = codes.astype(np.int32)
    energy, decoded = np.zeros(codes.shape[1]), 0.0
    of_latents, of_vectors = _Spread(), _Spread()
    for start in range(0, len(codes), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        rows = np.asarray(vectors[block], dtype=np.float32)
        latents, own = quantizer.project(rows), exact[block]
        for level in range(codes.shape[1]):
            costs = quantizer.level_costs(latents, own[:, :level], level)
            energy[level] += costs[np.arange(len(own)), own[:, level]].sum(dtype=np.float64)
        decoded += float(((quantizer.decode(own) - rows) ** 2).sum(dtype=np.float64))
        of_latents.add(latents)
        of_vectors.add(rows)
    latent = of_latents.by_dimension()
    if isinstance(quantizer, ProductQuantizer):
        parts = latent.reshape(-1, quantizer.part).sum(axis=1)
        energy = latent.sum() + np.cumsum(energy - parts)
    return {
        "after_level": [_ratio(float(left), float(latent.sum())) for left in energy],
        "decoded": _ratio(decoded, float(of_vectors.by_dimension().sum())),
    }


class _Spread:
    """Squared distances to the mean, summed over rows that come in blocks."""

    def __init__(self) -> None:
        self.rows, self.sums, self.squares = 0, np.zeros(1), np.zeros(1)

    def add(self, block: FloatArray) -> None:
        exact = block.astype(np.float64)
        self.rows += len(exact)
        self.sums = self.sums + exact.sum(axis=0)
        self.squares = self.squares + (exact**2).sum(axis=0)

    def by_dimension(self) -> npt.NDArray[np.float64]:
        return np.maximum(self.squares - self.sums**2 / self.rows, 0.0)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 and math.isfinite(part / whole) else None


def code_labels(
    first: IntArray, catalog: pl.DataFrame, vectors: FloatArray | None = None, words: int = 4
) -> list[dict[str, Any]]:
    """What the items of each level-1 code have in common, in words.

    Words of titles and categories are ranked by ``sqrt(p) log(p / q)``, where p is the share of the
    code's items that have the word and q the share of all items: how much more frequent the word
    is than elsewhere, over the standard error of that (Monroe et al. 2008, without a prior). Words
    of a single item, or of less than `_COMMON` of the items, don't describe a code of many.

    Args:
        first: level-1 code of each item, (n_items,).
        catalog: row i is item i; columns ``title`` and ``categories``, where there.
        vectors: (n_items, dim); examples are then the items nearest to the code's centre, else the
            first ones of the catalogue.
        words: at most so many per code.

    Returns:
        The codes in use, most frequent first: ``code``, ``items``, ``words``, ``examples`` (up to
        three different titles).
    """
    codes, group, counts = np.unique(first, return_inverse=True, return_counts=True)
    ranked = _ranked_words(group, counts, catalog)
    titles = [str(t or "") for t in catalog[TITLE]] if TITLE in catalog.columns else []
    members = np.split(np.argsort(group, kind="stable"), np.cumsum(counts)[:-1])
    labels = []
    for i in np.argsort(-counts, kind="stable"):
        chosen: list[str] = []
        for word in ranked[i] if ranked else []:
            # "nails" adds nothing to "nail".
            if not any(word.startswith(c) or c.startswith(word) for c in chosen):
                chosen.append(word)
        central = members[i] if vectors is None else _by_centrality(members[i], vectors)
        examples = dict.fromkeys(titles[row][:_MAX_TEXT] for row in central if titles)
        examples.pop("", None)
        labels.append(
            {
                "code": int(codes[i]),
                "items": int(counts[i]),
                "words": chosen[:words],
                "examples": list(examples)[:3],
            }
        )
    return labels


def _ranked_words(group: IntArray, counts: IntArray, catalog: pl.DataFrame) -> list[list[str]]:
    """The words of each group, most characteristic first; empty if no item has words."""
    import scipy.sparse as sp
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

    parts = [pl.col(TITLE).cast(pl.String).str.slice(0, _MAX_TEXT)] * (TITLE in catalog.columns)
    if CATEGORIES in catalog.columns:
        parts.append(pl.col(CATEGORIES).list.join(" ").str.slice(0, _MAX_TEXT))
    if not parts:
        return []
    texts = catalog.select(pl.concat_str(parts, separator=" ", ignore_nulls=True)).to_series()
    stop_words = [*ENGLISH_STOP_WORDS, *_UNITS]
    counter = CountVectorizer(stop_words=stop_words, token_pattern=_WORD, binary=True)
    try:
        has = counter.fit_transform(texts.fill_null(""))  # (n_items, n_words)
    except ValueError:  # scikit-learn's word for: there are no words
        return []
    rows = (np.ones(len(group)), (group, np.arange(len(group))))
    share = sp.diags_array(1 / counts) @ sp.csr_array(rows, shape=(len(counts), len(group))) @ has
    share = sp.csr_array(share)
    overall = np.asarray(has.mean(axis=0)).ravel()
    score = np.sqrt(share.data) * np.log(share.data / overall[share.indices])
    fewest = np.minimum(counts, np.maximum(2, _COMMON * counts)) / counts
    score[share.data < np.repeat(fewest, np.diff(share.indptr)) - 1e-9] = 0
    names = counter.get_feature_names_out()
    ranked = []
    for start, stop in zip(share.indptr[:-1], share.indptr[1:], strict=True):
        columns, own = share.indices[start:stop], score[start:stop]
        best = np.lexsort((columns, -own))[:20]
        ranked.append([str(names[columns[j]]) for j in best if own[j] > _MARKED])
    return ranked


def _by_centrality(members: IntArray, vectors: FloatArray) -> IntArray:
    """Rows of a group, the one nearest to their mean direction first."""
    members = members[:_CENTRE_ROWS]
    rows = np.asarray(vectors[members], dtype=np.float32)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(length > 0, length, 1)
    near = np.round(rows @ rows.mean(axis=0), 6)  # equal titles tie but for rounding
    return members[np.argsort(-near, kind="stable")]


def item_map(
    first: IntArray,
    vectors: FloatArray,
    method: Literal["tsne", "pca"] = "tsne",
    most: int = MAP_ITEMS,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Item vectors in two dimensions, for looking at.

    Args:
        first: level-1 code of each item, (n_items,).
        vectors: (n_items, dim).
        method: "tsne" (van der Maaten & Hinton 2008) on the first 50 principal axes, about half a
            minute for 3,000 items, or "pca", the first two axes, at once.
        most: items; a larger catalogue is sampled.
        seed: of the sample and the projection.

    Returns:
        ``method``, ``items``, ``sampled`` and, per item, ``x`` and ``y`` in 0 … 1 and ``code``;
        None if the vectors are fewer than 10 or all alike.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if method not in ("tsne", "pca"):
        raise ValueError(f"map method {method!r} is neither 'tsne' nor 'pca'")
    rows = np.arange(len(vectors))
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(seed).choice(len(rows), most, replace=False))
    sample = np.asarray(vectors[rows], dtype=np.float32)
    size = float(np.abs(sample).max(initial=0.0))
    sample = sample - sample.mean(axis=0)
    if len(sample) < 10 or sample.std() <= 1e-6 * size:  # alike but for rounding
        return None
    axes = min(50 if method == "tsne" else 2, len(sample) - 1, sample.shape[1])
    flat = PCA(axes, random_state=seed).fit_transform(sample)
    if method == "tsne":
        log.info("drawing a map of %d items by t-SNE", len(sample))
        scaled = flat / flat.std()  # t-SNE's first steps suit a variance near 1
        perplexity = min(30.0, (len(flat) - 1) / 3)
        # PCA's start needs two axes; a random one does for vectors of one dimension.
        init = "pca" if axes > 1 else "random"
        tsne = TSNE(perplexity=perplexity, init=init, max_iter=600, random_state=seed)
        flat = tsne.fit_transform(scaled)
    plane = np.zeros((len(flat), 2))
    plane[:, : flat.shape[1]] = flat[:, :2]
    low, high = plane.min(axis=0), plane.max(axis=0)
    plane = 0.5 + (plane - (low + high) / 2) / float((high - low).max())
    return {
        "method": method,
        "items": len(rows),
        "sampled": len(rows) < len(vectors),
        "x": [round(float(v), 3) for v in plane[:, 0]],
        "y": [round(float(v), 3) for v in plane[:, 1]],
        "code": [int(code) for code in first[rows]],
    }


def training_curves(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How an RQ-VAE's training went, thinned to some `CURVE_POINTS` epochs.

    Args:
        history: `RQVAE.history`, a row per epoch.

    Returns:
        ``epochs`` in all and ``kept``, the one whose weights are kept; lists of equal length:
        ``epoch``, the losses ``total`` and ``reconstruction``, ``collision_rate``, and
        ``perplexity``, in which each entry has a value per level.
    """
    at = np.linspace(0, len(history) - 1, min(CURVE_POINTS, len(history))).round().astype(int)
    kept = next(row["epoch"] for row in history if row["kept"])
    rows = [history[i] for i in sorted({*at.tolist(), kept - 1})]
    names = ("epoch", "total", "reconstruction", "collision_rate", "perplexity")
    return {"epochs": len(history), "kept": kept} | {n: [row[n] for row in rows] for n in names}


def quality_report(
    codes: IntArray,
    codebook_sizes: Sequence[int],
    vectors: FloatArray | None = None,
    catalog: pl.DataFrame | None = None,
    sequences: ItemLists | None = None,
    quantizer: Quantizer | None = None,
    collisions: Mapping[str, Any] | None = None,
    held_out: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    duplicates: Mapping[str, Any] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
    map_method: Literal["tsne", "pca"] = "tsne",
) -> dict[str, Any]:
    """Everything that is known of a SID map, for JSON and for the page.

    Args:
        codes: (n_items, n_levels); row i of everything else is the same item.
        codebook_sizes: number of codes per level.
        vectors: item vectors, (n_items, dim).
        catalog: titles, categories and brands.
        sequences: every user's items in the training split, and no others.
        quantizer: that encoded the vectors, for the reconstruction.
        collisions: what their resolution found and did, taken over as it is.
        held_out: pairs of items that came after one another outside of training, such as every
            user's last training item and validation target, (n_pairs,) each.
        duplicates: `duplicate_report` of the vectors that were quantized, under "vectors", and of
            other ones under their names, taken over as they are.
        history: of an RQ-VAE's training, see `training_curves`.
        seed: of samples, permutations and the map.
        map_method: see `item_map`.

    Returns:
        Parts whose input was not given are None. ``vector_neighbours`` and
        ``copurchase_neighbours`` are the headline figures: the mean share of an item's 10 nearest
        by cosine, and of the 10 with most users in common, that have its first code.

    Raises:
        ValueError: there are no items, shapes disagree, or a code is outside its codebook.
    """
    codes = np.asarray(codes)
    check_codes(codes, tuple(codebook_sizes))
    for name, rows in (("vectors", vectors), ("catalog", catalog)):
        if rows is not None and len(rows) != len(codes):
            raise ValueError(
                f"{name} has {len(rows)} rows, codes has {len(codes)}; row i of both has to be the "
                "same item"
            )
    if not len(codes):
        raise ValueError("there are no items; a report needs at least one")
    by_vector = by_users = after = None
    if vectors is not None:
        by_vector = neighbour_preservation(codes, near := nearest_vectors(vectors, NEIGHBOURS))
        by_vector["sampled"] = near.sampled
    if sequences is not None:
        common = co_purchases(sequences, len(codes), NEIGHBOURS)
        by_users = neighbour_preservation(codes, common)
    if held_out is not None:
        after = pair_preservation(codes, *held_out)
    report = {
        "n_items": len(codes),
        "seed": seed,
        "duplicates": None if duplicates is None else dict(duplicates),
        "collision_rate": collision_rate(codes),
        "collisions": None if collisions is None else dict(collisions),
        "vector_neighbours": by_vector and by_vector["same_code"][0],
        "copurchase_neighbours": by_users and by_users["same_code"][0],
        "training": training_curves(history) if history else None,
        "levels": level_usage(codes, codebook_sizes),
        "prefixes": prefix_usage(codes),
        "items_by_code": [
            [int(n) for n in np.sort(np.bincount(codes[:, level], minlength=size))[::-1]]
            for level, size in enumerate(codebook_sizes)
        ],
        "reconstruction": None
        if quantizer is None or vectors is None
        else reconstruction_error(codes, vectors, quantizer),
        "attributes": None if catalog is None else attribute_agreement(codes, catalog, seed),
        "neighbours": {"vector": by_vector, "copurchase": by_users, "held_out": after},
        "first_codes": None if catalog is None else code_labels(codes[:, 0], catalog, vectors),
        "map": None if vectors is None else item_map(codes[:, 0], vectors, map_method, seed=seed),
    }
    json.dumps(report, allow_nan=False)  # raises on NaN and on what JSON can't hold
    return report
