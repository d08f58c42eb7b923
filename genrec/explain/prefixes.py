"""What the beam kept at each level, for one prompt: the intermediate values of a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.explain.evidence import FloatArray, IntArray


@dataclass(frozen=True)
class SurvivingPrefixes:
    """The beam after one level.

    Attributes:
        codes: surviving prefixes, best first, (n, level + 1).
        log_probs: their summed log-probabilities, (n,).
        n_prefixes: prefixes of this length in the catalogue.
        n_excluded: of these, how many hold only items that are left out for this user.
    """

    codes: IntArray
    log_probs: FloatArray
    n_prefixes: int
    n_excluded: int


def surviving_prefixes(
    engine: TorchEngine, prompt: Sequence[int], codes: IntArray, seen: IntArray, beam_width: int
) -> list[SurvivingPrefixes]:
    """Run the search of one prompt again, stopping after every level.

    The beam after level l of a catalogue is the result of the same search over the catalogue of
    its prefixes of l + 1 codes, so the engine itself answers and nothing is imitated here.

    Args:
        engine: the run's.
        prompt: token ids.
        codes: of all items, (n_items, n_levels).
        seen: catalogue rows that the user must not get.
        beam_width: prefixes kept per level.
    """
    levels = []
    for depth in range(1, codes.shape[1] + 1):
        prefixes, inverse, counts = np.unique(
            codes[:, :depth], axis=0, return_inverse=True, return_counts=True
        )
        gone = np.bincount(inverse.ravel()[np.unique(seen)], minlength=len(prefixes)) == counts
        part = TorchEngine(
            engine.model,
            SidTrie.build(prefixes),
            [ids.tolist() for ids in engine.sid_ids[:depth]],
            engine.pad_token_id,
            engine.normalizer,
            batch_size=1,
        )
        result = part.search([prompt], beam_width, beam_width, [np.flatnonzero(gone)])
        kept = result.items[0] >= 0
        levels.append(
            SurvivingPrefixes(
                prefixes[result.items[0][kept]],
                result.scores[0][kept].astype(np.float64),
                len(prefixes),
                int(gone.sum()),
            )
        )
    return levels
