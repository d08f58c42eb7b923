"""What tests see of an HTML page."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr"}
APART = {"td", "th", "span", "text", "p"}  # these stand apart without a space between them


class Page(HTMLParser):
    """Elements with their attributes, parents and text; raises on wrong nesting."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"<{tag}> repeats an attribute"
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in APART:
            self.texts.append(("", " "))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.open:
            self.texts.append((self.open[-1], data))

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        """Attributes of every such element; a name may end in _ (class_)."""
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [a for t, a, _ in self.elements if t == tag and wanted.items() <= a.items()]

    def marked(self, kind: str) -> int:
        """Groups of that class inside figures."""
        return len(self.all("g", class_=kind))

    def pieces(self, *tags: str) -> list[str]:
        """Text inside those elements, piece by piece; all text without tags."""
        return [data for tag, data in self.texts if tag and (not tags or tag in tags)]

    def text(self) -> str:
        """All that a reader sees, with single spaces."""
        return re.sub(r"\s+", " ", "".join(data for tag, data in self.texts if tag != "style"))
