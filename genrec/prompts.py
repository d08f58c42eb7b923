"""Prompts: load, render, escape and hash ``prompts/<family>/{seen,unseen}/*.jinja``.

The only place where a prompt is made. Training, rollouts, evaluation and serving call `render` with
the same template and therefore see the same bytes. Text from catalogues and users is escaped: SID
tokens are ordinary added tokens, so an unescaped title "<a_12>" would become one.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
from jinja2 import StrictUndefined, TemplateError, nodes
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
_NEW_FORMATS = frozenset(map(chr, range(0x13439, 0x13440)))  # since Unicode 15, Python may lag
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
    text = "".join(
        c for c in text if unicodedata.category(c) not in ("Cf", "Cs") and c not in _NEW_FORMATS
    )
    text = _SPACE.sub(" ", text.translate(_BRACKETS)).strip()
    return text if len(text) <= max_chars else text[: max_chars - 1].rstrip() + "…"


def escape_series(texts: pl.Series, max_chars: int = MAX_TEXT_CHARS) -> pl.Series:
    """`escape_text` for a column, row for row the same text; null stays null."""
    text = pl.col("text").str.slice(0, 4 * max_chars)
    text = text.str.replace_all(r"[\p{Cc}\p{Zl}\p{Zp}]", " ").str.replace_all(r"\p{Cf}", "")
    text = text.str.replace_many(
        [chr(c) for c in _BRACKETS], [str(to) for to in _BRACKETS.values()]
    )
    text = text.str.replace_all(r"\s+", " ").str.strip_chars()
    cut = text.str.slice(0, max_chars - 1).str.strip_chars_end() + "…"
    shown = pl.when(text.str.len_chars() <= max_chars).then(text).otherwise(cut)
    frame = pl.DataFrame({"text": texts.cast(pl.String)})
    return frame.select(shown.alias(texts.name)).to_series()


def says_something(texts: pl.Series) -> pl.Series:
    """Whether anything is left of each text when it is escaped; null stays null."""
    start = texts.str.slice(0, 4 * MAX_TEXT_CHARS)
    return start.str.contains(r"[^\s\p{Cc}\p{Cf}\p{Zl}\p{Zp}]")


def row_hashes(row_ids: pl.Series, seed: int) -> npt.NDArray[np.uint64]:
    """A number for each row id that depends on (row_id, seed) alone, on every machine.

    Args:
        row_ids: text, no nulls. ``# (rows,)``
        seed: of the draw.

    Returns:
        Uniform 64-bit numbers. ``# (rows,)``
    """
    if row_ids.is_empty():
        return np.zeros(0, dtype=np.uint64)
    text = row_ids.to_arrow(compat_level=pl.CompatLevel.oldest())  # bytes one after another
    _, ends, letters = text.buffers()
    offsets = np.frombuffer(ends, dtype=np.int64)[text.offset : text.offset + len(text) + 1]
    letters = np.frombuffer(letters or b"", dtype=np.uint8)
    lengths = np.diff(offsets)
    value = np.empty(len(lengths), dtype=np.uint64)
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(int(lengths.max(initial=0)) + 1, _PRIME, dtype=np.uint64))
        for start in range(0, len(lengths), _HASH_ROWS):
            rows = slice(start, min(start + _HASH_ROWS, len(lengths)))
            begin, part = offsets[rows], letters[offsets[start] : offsets[rows.stop]]
            begin, size = begin - begin[0], lengths[rows]
            terms = powers[np.arange(len(part)) - np.repeat(begin, size)]
            terms *= part.astype(np.uint64) + np.uint64(1)
            sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(terms)])
            value[rows] = sums[begin + size] - sums[begin]
        return _mixed(value + _mixed(np.array([seed], dtype=np.int64).astype(np.uint64)))


_PRIME = 0x100000001B3  # of the FNV hash
_HASH_ROWS = 1 << 12  # hashed at once: what stays in the cache


def _mixed(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit moves every output bit."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


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
        self._parts: dict[str, _Parts | None] = {}
        for path in sorted(self.folder.glob("*/*/*.jinja")):
            name = path.relative_to(self.folder).with_suffix("").as_posix()
            self._sources[name] = path.read_text(encoding="utf-8")
            try:
                self._templates[name] = environment.from_string(self._sources[name])
                self._parts[name] = _plain_parts(environment.parse(self._sources[name]))
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

    def render_many(
        self,
        template: str,
        sids: Mapping[str, pl.Series] | None = None,
        texts: Mapping[str, pl.Series] | None = None,
    ) -> pl.Series:
        """The prompts of many rows, each the same text as `render` gives for the row alone.

        A template that only inserts fields, as all of genrec's do, is filled for all rows at once;
        one with logic in it is run row by row.

        Args:
            template: a template name.
            sids: columns of text made by genrec itself; inserted as they are.
            texts: columns of untrusted text; escaped.

        Raises:
            ValueError: as `render`; columns of different lengths, or one with nulls.
        """
        columns = _escaped(template, sids, texts)
        return self._fill([template], np.zeros(len(next(iter(columns.values()))), int), columns)

    def render_each(
        self,
        templates: pl.Series,
        sids: Mapping[str, pl.Series] | None = None,
        texts: Mapping[str, pl.Series] | None = None,
    ) -> pl.Series:
        """`render_many` with a template for each row; all of them see the same columns.

        Args:
            templates: template names. ``# (rows,)``
            sids: as `render_many` takes them.
            texts: as `render_many` takes them.

        Raises:
            ValueError: as `render_many`.
        """
        columns = _escaped(str(templates.first()), sids, texts, len(templates))
        names = templates.unique(maintain_order=True)
        number = templates.cast(pl.Enum(names)).to_physical().to_numpy()
        return self._fill(names.to_list(), number, columns)

    def _fill(
        self, names: list[str], number: npt.NDArray[np.integer], columns: Mapping[str, pl.Series]
    ) -> pl.Series:
        """Rows by the template of their number; such with the same fields in order go together."""
        alike: dict[tuple[str, ...] | str, list[int]] = {}
        literals: list[tuple[str, ...]] = []
        for i, name in enumerate(names):
            if name not in self._templates:
                self.render(name)  # says what is there
            fields, around = self._parts[name] or (name, ())  # a name: it has logic in it
            if missing := [f for f in fields if f not in columns and fields != name]:
                raise ValueError(f"template {name!r}: {missing[0]!r} is undefined")
            alike.setdefault(fields, []).append(i)
            literals.append(around)
        made, order = [pl.Series([], dtype=pl.String)], []
        for fields, members in alike.items():
            own, mine = columns, number
            if len(alike) > 1:
                order.append(np.flatnonzero(np.isin(number, members)))
                at = pl.Series(order[-1])
                own, mine = {n: column[at] for n, column in columns.items()}, number[order[-1]]
            if isinstance(fields, str):
                each = pl.DataFrame(own).iter_rows(named=True)
                made.append(pl.Series([self.render(fields, sids=row) for row in each]))
            else:
                made.append(_inserted(fields, [literals[i] for i in members], members, mine, own))
        if len(alike) == 1:
            return made[-1].cast(pl.String).alias("_prompt")
        whole = pl.concat([part.cast(pl.String).alias("_prompt") for part in made])
        return whole[pl.Series(np.argsort(np.concatenate(order)))] if order else whole

    def fields(self, template: str) -> set[str] | None:
        """Names of the fields that a template inserts; None where logic decides."""
        parts = self._parts[template]
        return None if parts is None else set(parts[0])

    def pick_many(
        self, family: str, row_ids: pl.Series, seed: int, epoch: int = 0, limit: int | None = None
    ) -> pl.Series:
        """A seen template for each row, as a function of (row_id, seed, epoch) alone.

        From epoch to epoch a row goes through the templates in turn, from a random one on.

        Args:
            family: task family.
            row_ids: the rows. ``# (rows,)``
            seed: of the run.
            epoch: of the training, from 0.
            limit: use only the first so many templates.

        Returns:
            Template names. ``# (rows,)``
        """
        names = self.names(family)[:limit]
        first = row_hashes(row_ids, seed) % np.uint64(len(names))
        number = (first + np.uint64(epoch)) % np.uint64(len(names))
        return pl.Series(names, dtype=pl.String).gather(number.astype(np.uint32))

    def holding(self, characters: str) -> list[str]:
        """Names of the templates whose text holds one of these characters."""
        return [n for n, text in self._sources.items() if not set(characters).isdisjoint(text)]

    def sha256(self) -> str:
        """Hash over all template names and texts."""
        digest = hashlib.sha256()
        for name in sorted(self._sources):
            digest.update(f"{name}\0{self._sources[name]}\0".encode())
        return digest.hexdigest()


def _escaped(
    template: str,
    sids: Mapping[str, pl.Series] | None,
    texts: Mapping[str, pl.Series] | None,
    n_rows: int | None = None,
) -> dict[str, pl.Series]:
    """All columns, as they may be inserted; raises ValueError if they can't be."""
    columns = {name: escape_series(text) for name, text in (texts or {}).items()}
    columns |= sids or {}
    lengths = {len(column) for column in columns.values()}
    lengths |= set() if n_rows is None else {n_rows}
    if len(lengths) != 1 or not columns:
        raise ValueError(f"template {template!r}: columns of {sorted(lengths)} rows")
    if empty := [name for name, column in columns.items() if column.null_count()]:
        raise ValueError(f"template {template!r}: {empty[0]!r} is null in some rows")
    return columns


def _inserted(
    fields: tuple[str, ...],
    literals: Sequence[tuple[str, ...]],
    members: Sequence[int],
    number: npt.NDArray[np.integer],
    columns: Mapping[str, pl.Series],
) -> pl.Series:
    """Fields between the literal texts of each row's template.

    Args:
        fields: in order.
        literals: of each member, one more than there are fields.
        members: numbers of the templates, ascending.
        number: template of each row. ``# (rows,)``
        columns: of the fields. ``# (rows,)`` each
    """
    frame = pl.DataFrame({str(i): columns[name] for i, name in enumerate(fields)})
    member = pl.Series(np.searchsorted(members, number)) if len(members) > 1 else None
    pieces: list[pl.Expr] = []
    for place in range(len(fields) + 1):
        texts = [own[place] for own in literals]
        piece = pl.lit(texts[0])
        if member is not None and len({*texts}) > 1:
            piece = pl.lit(pl.Series(texts)[member])
        pieces += [piece, *(pl.col(str(place)) for _ in fields[place : place + 1])]
    if not fields:
        frame = pl.DataFrame({"0": number})
    return frame.with_columns(pl.concat_str(pieces).alias("_prompt"))["_prompt"]


# Of a template that only inserts fields: their names, and the texts before, between and behind.
_Parts = tuple[tuple[str, ...], tuple[str, ...]]


def _plain_parts(template: nodes.Template) -> _Parts | None:
    """Fields and literal texts of a template that only inserts fields, else None."""
    fields, literals = [], [""]
    for statement in template.body:
        if not isinstance(statement, nodes.Output):
            return None
        for node in statement.nodes:
            if isinstance(node, nodes.TemplateData):
                literals[-1] += node.data
            elif isinstance(node, nodes.Name):
                fields.append(node.name)
                literals.append("")
            else:
                return None
    return tuple(fields), tuple(literals)
