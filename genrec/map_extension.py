"""An SID map grown for a later catalogue: known items keep their SIDs, new ones get free ones.

New items are placed by what the map was made with: its quantizer; the rule of its index; and where
it was imported, the vectors of the items that have its codes.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.artifacts import require, sha256_file, stage_folder
from genrec.columns import ITEM_ID
from genrec.quantizers.category_names import CategoryNames
from genrec.quantizers.code_vectors import quantizer_of_codes
from genrec.quantizers.collisions import has_item_tokens, place_items
from genrec.quantizers.item_indexes import SEMANTIC, next_codes
from genrec.quantizers.loading import load_quantizer
from genrec.quantizers.quantizer import CodeArray, Quantizer
from genrec.semantic_ids import SemanticIds

logger = logging.getLogger(__name__)

IMPORTED = "import"  # the method of a map that was read from an index.json
QUANTIZER_FILE = "quantizer.safetensors"
SAME_SPACE = 0.5  # agreement of old items' first codes with their vectors', at least


def extended_map(
    old_run: Path, catalog: pl.DataFrame, vectors: npt.NDArray[np.floating], seed: int
) -> tuple[SemanticIds, Quantizer | None, dict[str, Any]]:
    """The old run's map for a later catalogue.

    Args:
        old_run: a run whose quantize stage is complete, with codes (not titles).
        catalog: the later catalogue.
        vectors: of its items, in the old run's space, (n_items, dim).
        seed: of a random index's draw, and of the order in which equal items are placed.

    Returns:
        The map, the quantizer (None for a map without one), and what was done.

    Raises:
        ValueError: the vectors or the quantizer are of another run, or there is no room left.
    """
    folder = stage_folder(old_run, "quantize")
    manifest, old = require(old_run, "quantize"), SemanticIds.load(folder)
    method = manifest.metrics["method"]
    codes, known = old.known_codes(catalog[ITEM_ID])
    taken, sizes, n_new = old.taken_codes(), old.codebook_sizes, int((~known).sum())
    quantizer = own_quantizer(folder, old)
    if quantizer is not None and known.any():
        check_same_space(quantizer, vectors[known], codes[known], old_run)
    if not n_new:
        placed = codes[:0]
    elif quantizer is not None:
        tokens = has_item_tokens(taken, sizes)
        placed = place_items(quantizer, vectors[~known], taken, sizes, tokens, seed)
    elif method == IMPORTED:
        if not known.any():
            raise ValueError(
                f"no item of the catalogue is one of {old_run}, so there is nothing to place "
                f"{n_new} new items by; import an index of this catalogue"
            )
        like = quantizer_of_codes(vectors[known], codes[known], sizes)
        placed = place_items(like, vectors[~known], taken, sizes, seed=seed)
    else:
        paths = None
        if method == SEMANTIC:
            names = CategoryNames.load(folder)
            paths = names.of_codes(taken) + names.paths(catalog.filter(pl.Series(~known)))
        placed = next_codes(method, taken, sizes, n_new, seed, paths)
    codes[~known] = placed
    grown = old.successor(catalog[ITEM_ID], codes)
    reserved = 0 if grown.reserved is None else len(grown.reserved)
    report = {"method": "extend", "new": n_new, "kept": int(known.sum()), "reserved": reserved}
    return grown, quantizer, {**report, "index_method": method}


def own_quantizer(folder: Path, ids: SemanticIds) -> Quantizer | None:
    """The quantizer beside a map, None if it has none.

    Raises:
        ValueError: it is not the one that gave the map its codes, or it is gone.
    """
    path = folder / QUANTIZER_FILE
    if ids.quantizer_sha256 is None:
        return None
    if not path.exists() or sha256_file(path) != ids.quantizer_sha256:
        raise ValueError(
            f"{path} is not the quantizer that gave this map its codes; "
            "restore it: with another one new items would get codes that don't fit"
        )
    return load_quantizer(path)


def check_same_space(
    quantizer: Quantizer, vectors: npt.NDArray[np.floating], codes: CodeArray, run: Path
) -> None:
    """Refuse vectors of another encoder: new items would be placed at random."""
    same = first_code_agreement(quantizer.encode(vectors)[:, 0], codes[:, 0])
    if same < SAME_SPACE:
        raise ValueError(
            f"the old items' vectors give their first codes to {max(same, 0):.0%} only: they are "
            f"of another space than those of {run}; embed with `extend: {run}`"
        )
    if same < 0.95:
        logger.warning("the old items' vectors give their first codes to %.0f%%", 100 * same)


def first_code_agreement(encoded: npt.NDArray[np.integer], held: npt.NDArray[np.integer]) -> float:
    """How far two lists of first codes agree, where many items may have left full codes.

    Where more items fall to a code than there are SIDs below it, the rest have another code than
    their vector's. So agreement counts beyond chance and as a share of what the two lists' use of
    the codes allows: Cohen's kappa over its maximum.

    Args:
        encoded: codes of the items' vectors, (n_items,).
        held: codes that the items have, (n_items,).

    Returns:
        1 if all items have the code that they can have, about 0 for lists that have nothing to do
        with each other; the plain share of equal ones where the use of the codes allows no more
        than chance.
    """
    n_items, size = len(held), int(max(encoded.max(), held.max())) + 1
    given, kept = np.bincount(encoded, minlength=size), np.bincount(held, minlength=size)
    same = float((encoded == held).mean())
    chance = float((given / n_items) @ (kept / n_items))
    most = float(np.minimum(given, kept).sum()) / n_items
    return (same - chance) / (most - chance) if most - chance > 1e-9 else same
