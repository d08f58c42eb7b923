"""Find and mask personal data in free text: e-mail, IBAN, card, IP address and phone number.

Patterns and check digits, no language model: names and places are found only by another finder
beside them (see `genrec.audit.presidio`). Whatever is an item id stays as it is, since a masked id
could no longer be looked up.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable

# Of any script, and with accents as characters of their own.
_LOCAL = r"\w\u0300-\u036f.%+-"
_EMAIL = rf"[{_LOCAL}]+@(?:[\w\u0300-\u036f-]+\.)+(?:[^\W\d_]{{2,}}|xn--[A-Za-z0-9-]+)"
# In small letters words of a title would pass for groups of four; so all but the first, which may
# be a bank's name, have a digit there.
_IBAN = (
    r"[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?"
    r"|[a-z]{2}\d{2} ?[a-z0-9]{4}(?: ?(?=[a-z]{0,3}\d)[a-z0-9]{4}){1,6}"
    r"(?: ?(?=[a-z]{0,2}\d)[a-z0-9]{1,3})?"
)
# With dots in the groups of a card alone: prices and sizes in a row have dots, too.
_CARD = r"\d(?:[ -]?\d){12,18}|(?:\d{4}(?:\.\d{4}){3}|\d{4}\.\d{6}\.\d{5})(?!\.\d)"
_IP_V4 = r"(?:\d{1,3}\.){3}\d{1,3}"
_IP_V6 = r"(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}"
# International, or with separators: a bare run of digits is far more often a size or an id.
_PHONE = "|".join(
    (
        r"\+\d(?:[ ./-]?\(?\d\)?){6,14}",
        r"(?<!\d )\(?0[1-9]\d{0,3}\)?[ ./-]\d{2,5}(?:[ ./-]?\d{2,5}){1,3}",
        r"\(\d{3}\) ?\d{3}[ .-]\d{4}",
        r"\d{3}[.-]\d{3}[.-]\d{4}",
    )
)


# Text -> start, end and kind of what it finds.
Finder = Callable[[str], Iterable[tuple[int, int, str]]]


def luhn(digits: str) -> bool:
    """Whether a card number's check digit holds (ISO/IEC 7812-1, annex B)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def iban_holds(text: str) -> bool:
    """Whether an IBAN without spaces has a valid length and check digits (ISO 13616, mod 97)."""
    moved = text[4:] + text[:4]
    return 15 <= len(text) <= 34 and int("".join(str(int(c, 36)) for c in moved)) % 97 == 1


def _is_iban(text: str) -> bool:
    return iban_holds(text.replace(" ", ""))


def _is_card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return len(set(digits)) > 1 and luhn(digits)


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return text != "::"  # the scope mark of C++ and Rust


# In this order: a card number could be read as a phone number, an IBAN holds what looks like one.
KINDS: dict[str, tuple[re.Pattern[str], Callable[[str], bool]]] = {
    "email": (re.compile(rf"(?<![{_LOCAL}]){_EMAIL}(?![\w-])"), lambda text: True),
    "iban": (re.compile(rf"(?<!\w)(?:{_IBAN})(?!\w)"), _is_iban),
    "card": (re.compile(rf"(?<![\w.-])(?:{_CARD})(?!\w)"), _is_card),
    # A port or a colon may follow the address of version 4.
    "ip": (
        re.compile(rf"(?<![\w.:])(?:{_IP_V4}(?!\w|\.\d)|{_IP_V6}(?![\w:]|\.\d))"),
        _is_ip,
    ),
    "phone": (re.compile(rf"(?<![\w.+])(?:{_PHONE})(?!\w|[.-]\d)"), lambda text: True),
}
_MASKED = re.compile(rf"\[(?:{'|'.join(KINDS)})\]")


def mask(
    text: str, item_ids: Iterable[object] = (), find: Finder | None = None
) -> tuple[str, dict[str, int]]:
    """Replace personal data by ``[kind]``.

    Args:
        text: any text.
        item_ids: identifiers that must survive wherever they stand as a whole word.
        find: finds more in what the patterns left.

    Returns:
        The text and how many of each kind were masked (kinds without a find are left out).
    """
    counts: dict[str, int] = {}
    for kind, (pattern, holds) in KINDS.items():
        kept = _places(text, item_ids) if pattern.search(text) else []

        def replace(
            match: re.Match[str],
            kind: str = kind,
            holds: Callable[[str], bool] = holds,
            kept: list[tuple[int, int]] = kept,
        ) -> str:
            is_id = any(a < match.end() and match.start() < b for a, b in kept)
            if is_id or not holds(match.group()):
                return match.group()
            counts[kind] = counts.get(kind, 0) + 1
            return f"[{kind}]"

        text = pattern.sub(replace, text)
    if find is not None:
        kept = [*_places(text, item_ids), *(m.span() for m in _MASKED.finditer(text))]
        reached = len(text)  # from the end on, so that places stay right
        for start, end, kind in sorted(find(text), reverse=True):
            if end > reached or any(a < end and start < b for a, b in kept):
                continue
            text, reached = f"{text[:start]}[{kind}]{text[end:]}", start
            counts[kind] = counts.get(kind, 0) + 1
    return text, counts


def _places(text: str, item_ids: Iterable[object]) -> list[tuple[int, int]]:
    """Where the ids stand as whole words: (start, end)."""
    places = []
    for name in {str(item) for item in item_ids} - {""}:
        if name in text:
            found = re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text)
            places += [match.span() for match in found]
    return places
