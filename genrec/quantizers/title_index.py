"""Title index: the tokens of an item's title and an end mark as its codes.

BIGRec (Bao et al. 2023, "A Bi-Step Grounding Paradigm for LLMs in Recommendation") and ReRe let the
model write titles. Here the titles' own tokens form the codes, so the same trie and the same beam
produce them, and no title that isn't in the catalogue can be written. Codes are padded with the end
mark: what follows the first one is forced, and says nothing.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from genrec.quantizers.quantizer import CodeArray

logger = logging.getLogger(__name__)

Tokens = tuple[int, ...]


class TextTokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    eos_token_id: Any
    all_special_ids: Any

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any:
        """Mapping whose ``input_ids`` is a list of token ids per text."""
        ...

    def get_added_vocab(self) -> dict[str, int]:
        """Tokens beyond the trained vocabulary: special ones and SID tokens."""
        ...


@dataclass(frozen=True)
class TitleIndex:
    """Titles as codes.

    Attributes:
        codes: token ids, (n_items, longest title + 1) int32; distinct rows, each with at least one
            end mark after the title.
        end_id: token id of the end mark, the tokenizer's EOS.
        lengths: tokens of each title without end marks, (n_items,) int32.
        texts: what the tokens are the encoding of: the escaped title, shortened and numbered where
            that was needed. ``tokenizer(texts[i]) == codes[i, :lengths[i]]``.
        numbered: rows whose tokens another item had already, so that " (2)", … was added.
        shortened: rows whose title is longer than `max_tokens`.
        untitled: rows without a title, which are called "item <id>".
    """

    codes: CodeArray
    end_id: int
    lengths: CodeArray
    texts: tuple[str, ...]
    numbered: tuple[int, ...]
    shortened: tuple[int, ...]
    untitled: tuple[int, ...]


def title_index(
    titles: Sequence[str | None],
    item_ids: Sequence[int | str],
    tokenizer: TextTokenizer,
    max_tokens: int,
    escape: Callable[[str], str],
) -> TitleIndex:
    """Encode each item's title, made distinct, as a completion of that text would be.

    Items are handled in catalogue order: the first of equal titles keeps it, and items appended to
    the catalogue change no earlier text (a longer title adds end marks to all rows).

    Args:
        titles: one per item; None and blank ones are replaced by "item <id>".
        item_ids: identifiers, for those.
        tokenizer: the model's; a text is encoded on its own, without special tokens.
        max_tokens: tokens of a title at most, the end mark not counted; longer ones are cut.
        escape: makes untrusted text safe, as in prompts: `genrec.prompts.escape_text`.

    Raises:
        ValueError: lengths differ, `max_tokens` is too small to tell the items apart, the tokenizer
            has no EOS, or a text encodes to a special or SID token.
    """
    if len(titles) != len(item_ids) or len(titles) == 0 or max_tokens < 1:
        raise ValueError(
            f"{len(titles)} titles for {len(item_ids)} items with max_tokens={max_tokens}; one "
            "title per item, items and at least one token are needed"
        )
    end_id = tokenizer.eos_token_id
    if end_id is None:
        raise ValueError("the tokenizer has no EOS token, which marks a title's end; set eos_token")
    texts = [escape(title or "") for title in titles]
    untitled = tuple(row for row, text in enumerate(texts) if not text)
    for row in untitled:
        texts[row] = escape(f"item {item_ids[row]}")
    # Encoded at once: only the few titles that need a change are encoded again.
    encoded = [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    shortened = tuple(row for row, ids in enumerate(encoded) if len(ids) > max_tokens)
    for row in shortened:
        texts[row], encoded[row] = _shorten(texts[row], "", tokenizer, max_tokens)
    numbered = _make_distinct(texts, encoded, tokenizer, max_tokens)
    _check_tokens(texts, encoded, tokenizer)
    lengths = np.array([len(ids) for ids in encoded], dtype=np.int32)
    codes = np.full((len(encoded), int(lengths.max()) + 1), end_id, dtype=np.int32)
    codes[np.arange(codes.shape[1]) < lengths[:, None]] = np.concatenate(encoded)
    logger.info(
        "title index: %d items, %d tokens at most, %d numbered, %d shortened, %d untitled",
        len(codes), lengths.max(), len(numbered), len(shortened), len(untitled),
    )  # fmt: skip
    return TitleIndex(
        codes, int(end_id), lengths, tuple(texts), tuple(numbered), shortened, untitled
    )


def _make_distinct(
    texts: list[str], encoded: list[Tokens], tokenizer: TextTokenizer, max_tokens: int
) -> list[int]:
    """Number texts whose tokens an earlier item has, in place; the rows concerned."""
    taken: set[Tokens] = set()
    last_number: dict[Tokens, int] = {}
    rows = []
    for row, own in enumerate(encoded):
        tokens, text, number = own, texts[row], last_number.get(own, 1)
        while tokens in taken:
            number += 1
            text, tokens = _shorten(texts[row], f" ({number})", tokenizer, max_tokens)
        if tokens != own:
            rows.append(row)
            last_number[own] = number
            texts[row], encoded[row] = text, tokens
        taken.add(tokens)
    return rows


def _shorten(
    text: str, suffix: str, tokenizer: TextTokenizer, max_tokens: int
) -> tuple[str, Tokens]:
    """A start of a text, as long as may be, that fits with the suffix, and its tokens.

    It is cut between characters, not between tokens, so that the tokens are what encoding the text
    gives, and no character is left in pieces.
    """

    def encode(length: int) -> Tokens:
        cut = text[:length].rstrip() + suffix
        return tuple(tokenizer([cut], add_special_tokens=False)["input_ids"][0])

    if len(whole := encode(len(text))) <= max_tokens:
        return text + suffix, whole
    # A longer text has more tokens, or now and then fewer: then the search may stop early, but
    # where it stops was tried and fits.
    length = bisect_right(range(1, len(text) + 1), max_tokens, key=lambda n: len(encode(n)))
    if length == 0:
        raise ValueError(
            f"max_tokens={max_tokens} can't hold the first character of {text!r} and {suffix!r}, "
            "which tells it from other items; raise max_tokens"
        )
    return text[:length].rstrip() + suffix, encode(length)


def _check_tokens(texts: list[str], encoded: list[Tokens], tokenizer: TextTokenizer) -> None:
    """Raise ValueError if a text has no tokens, or one that text must not become."""
    forbidden = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    for text, ids in zip(texts, encoded, strict=True):
        if not ids or not forbidden.isdisjoint(ids):
            raise ValueError(
                f"the title {text[:80]!r} becomes {len(ids)} tokens, with special, SID or unknown "
                f"ones {sorted(forbidden.intersection(ids))[:3]}; escape titles with "
                "genrec.prompts.escape_text and use a tokenizer that knows every byte"
            )
