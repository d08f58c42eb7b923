"""Prompts: load, render, escape and hash ``prompts/<family>/{seen,unseen}/*.jinja``.

The only place where a prompt is made. Training, rollouts, evaluation and serving call `render` with
the same template and therefore see the same bytes. Text from catalogues and users is escaped: SID
tokens are ordinary added tokens, so an unescaped title "<a_12>" would become one.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEXT_CHARS = 300

# Every added or special token of common tokenizers is written with one of these brackets; the
# full-width and small forms turn into them under Unicode normalisation.
_BRACKETS = str.maketrans(
    {
        "<": "‹",
        ">": "›",
        "＜": "‹",
        "＞": "›",
        "﹤": "‹",
        "﹥": "›",
        "[": "(",
        "]": ")",
        "［": "(",
        "］": ")",
        "﹇": "(",
        "﹈": ")",
        "≮": "‹",
        "≯": "›",
    }
)
_SPACE = re.compile(r"\s+")


def escape_text(text: str, max_chars: int = MAX_TEXT_CHARS) -> str:
    """Untrusted text made safe for a prompt: one line, no control or bracket characters, bounded.

    Args:
        text: a title, a name, a query, …
        max_chars: longer text is cut and ends in "…".
    """
    text = text[: 4 * max_chars]  # bounds the work below
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)
    # Format characters (zero-width, direction overrides) and lone surrogates carry no meaning here.
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Cs"))
    text = _SPACE.sub(" ", text.translate(_BRACKETS)).strip()
    return text if len(text) <= max_chars else text[: max_chars - 1].rstrip() + "…"


def default_folder() -> Path:
    """The prompts of a checkout, else those inside the installed package."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "prompts", package / "bundled" / "prompts"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no prompts folder beside or inside {package}; reinstall genrec")


class PromptRenderer:
    """All templates of a folder.

    Template names are relative paths without the ending, e.g. ``sequential/seen/01``.

    Args:
        folder: holds ``<family>/seen/*.jinja`` and ``<family>/unseen/*.jinja``; default: genrec's
            own.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        self.folder = Path(folder) if folder else default_folder()
        # Sandboxed: templates may come from somebody else's run folder.
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, keep_trailing_newline=True
        )
        self._sources: dict[str, str] = {}
        self._templates = {}
        for path in sorted(self.folder.glob("*/*/*.jinja")):
            name = path.relative_to(self.folder).with_suffix("").as_posix()
            self._sources[name] = path.read_text(encoding="utf-8")
            try:
                self._templates[name] = environment.from_string(self._sources[name])
            except TemplateError as error:
                raise ValueError(f"{path} is not a valid template: {error}") from error
        if not self._templates:
            raise ValueError(f"{self.folder} holds no <family>/<seen|unseen>/*.jinja templates")

    def names(self, family: str, kind: str = "seen") -> list[str]:
        """Sorted template names of a family.

        Raises:
            ValueError: there is none.
        """
        names = [name for name in self._templates if name.startswith(f"{family}/{kind}/")]
        if not names:
            raise ValueError(f"{self.folder} has no templates {family}/{kind}/*.jinja")
        return names

    def render(
        self,
        template: str,
        sids: Mapping[str, str] | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> str:
        """The prompt.

        Args:
            template: a template name.
            sids: fields made of SID tokens by genrec itself; inserted as they are.
            texts: fields of untrusted text; escaped.

        Raises:
            ValueError: unknown template, a field that it needs is missing, or it fails otherwise.
        """
        if template not in self._templates:
            raise ValueError(
                f"unknown template {template!r}; {self.folder} has {sorted(self._templates)}"
            )
        fields = {name: escape_text(text) for name, text in (texts or {}).items()}
        try:
            return self._templates[template].render(**fields, **(sids or {}))
        except Exception as error:  # a template is a program: it may divide by zero, too
            raise ValueError(f"template {template!r}: {error}") from error

    def pick(self, family: str, row_id: str, seed: int, limit: int | None = None) -> str:
        """A seen template as a function of (row_id, seed) alone.

        Args:
            family: task family.
            row_id: the row.
            seed: of the run.
            limit: use only the first so many templates.
        """
        names = self.names(family)[:limit]
        digest = hashlib.blake2b(f"{seed}:{row_id}".encode(), digest_size=8).digest()
        return names[int.from_bytes(digest, "big") % len(names)]

    def sha256(self) -> str:
        """Hash over all template names and texts."""
        digest = hashlib.sha256()
        for name in sorted(self._sources):
            digest.update(f"{name}\0{self._sources[name]}\0".encode())
        return digest.hexdigest()
