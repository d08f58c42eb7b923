"""Queries, intentions and preferences by rules: from metadata, histories and reviews.

LC-Rec (Zheng et al. 2024) and Mender (Paischer et al. 2024) let an LLM write such texts
(`genrec.tasks.writers` does); these rules need none, and what they say can be looked up. Item texts
describe one item of the catalogue. Texts of a user take the history or the reviews *before* a
moment, and nothing else goes in.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from genrec.columns import (
    BRAND,
    ITEM_ID,
    ITEM_INDEX,
    POSITION,
    RATING,
    REVIEW,
    SUMMARY,
    TITLE,
    USER_ID,
)
from genrec.data.cleaning import missing_title
from genrec.prompts import PromptRenderer, default_folder, escape_series
from genrec.tasks.attributes import (
    CATEGORY,
    KEYWORD,
    KIND,
    KINDS,
    PRICE_BAND,
    VALUE,
    AttributeIndex,
    Histories,
    Recurring,
    field,
    recurring,
)

TEXT, ORIGIN, RULE = "text", "origin", "rule"
BLOCK_ROWS = 1 << 14  # histories looked at together
MAX_LIKES = 3
_QUERY_WORDS = (2, 6)
_TOKEN = r"[\p{L}\p{N}][\p{L}\p{M}\p{N}.'’-]*"

# What reviews talk about -> the words that say so.
_ASPECT_WORDS = {
    "comfort": "comfort comfortable comfortably comfy uncomfortable",
    "fit": "fit fits fitted fitting size sized sizing tight loose snug",
    "quality": "quality durable sturdy flimsy sturdier durability wellmade",
    "price": "price priced pricey cheap expensive affordable value bargain overpriced",
    "looks": "look looks looking cute stylish pretty beautiful style ugly gorgeous design",
    "colour": "color colors colour colours shade shades",
    "smell": "smell smells scent scented fragrance odor odour stinks",
    "material": "material materials fabric cotton leather plastic metal wool silk",
    "softness": "soft softer softness rough scratchy silky",
    "weight": "lightweight heavy weighs bulky",
    "ease of use": "easy easily simple difficult complicated convenient handy",
    "effect": "works worked working effective effectiveness results useless",
    "taste": "taste tastes flavor flavors flavour flavours delicious bland",
    "sound": "sound sounds audio noise noisy loud quiet",
    "battery": "battery batteries charge charging recharge",
    "delivery": "shipping shipped delivery delivered arrived packaging",
    "story": "story plot storyline characters writing ending",
    "acting": "acting actor actors actress cast performance performances",
}
LIKED, DISLIKED = 4.0, 2.0  # stars from which a review counts as praise, up to which as complaint


def written_renderer(folder: str | None = None) -> PromptRenderer:
    """The templates of ``prompts/written``; `folder` names another such folder."""
    return PromptRenderer(folder or default_folder() / "written")


def run_wording(prompts: Path) -> PromptRenderer:
    """The wording of a run, whose copy of the templates lies in `prompts`.

    It is the run's own where it has one: genrec's may be another by now.
    """
    own = prompts / "written"
    return written_renderer(str(own) if own.is_dir() else None)


def fill(
    renderer: PromptRenderer,
    family: str,
    row_ids: pl.Series,
    seed: int = 0,
    epoch: int = 0,
    sids: dict[str, pl.Series] | None = None,
    texts: dict[str, pl.Series] | None = None,
) -> pl.Series:
    """A family's text for each row, by the template that (row_id, seed, epoch) draws.

    Args:
        renderer: the templates of `written_renderer`.
        family: of the templates; families draw independently of one another.
        row_ids: one per row, any type.
        seed: of the draw.
        epoch: of the training.
        sids: fields that are inserted as they are.
        texts: fields of untrusted text.

    Returns:
        Texts; null where a field is null.
    """
    sids, texts = sids or {}, texts or {}
    names = list({**sids, **texts})
    frame = pl.DataFrame({**sids, **texts}).with_columns(
        ("written/" + family + "/" + row_ids.cast(pl.String)).alias("_id")
    )
    frame = frame.with_row_index("_row").drop_nulls(names)
    drawn = renderer.pick_many(family, frame["_id"], seed, epoch)
    parts = [pl.DataFrame(schema={"_row": pl.UInt32, TEXT: pl.String})]
    for template, part in frame.with_columns(_template=drawn).group_by("_template"):
        own_sids, own_texts = ({name: part[name] for name in some} for some in (sids, texts))
        text = renderer.render_many(str(template[0]), own_sids, own_texts)
        parts.append(part.select("_row", text.alias(TEXT)))
    every = pl.DataFrame({"_row": pl.int_range(len(row_ids), dtype=pl.UInt32, eager=True)})
    return every.join(pl.concat(parts), on="_row", how="left", maintain_order="left")[TEXT]


def phrases(table: pl.DataFrame, renderer: PromptRenderer, family: str) -> pl.Series:
    """`family`_<kind> filled with each row's value: a phrase per attribute. ``# (len(table),)``."""
    parts = [pl.DataFrame(schema={"_row": pl.UInt32, TEXT: pl.String})]
    for (kind,), part in table.with_row_index("_row").group_by(KIND):
        text = fill(renderer, f"{family}_{kind}", part[VALUE], texts={VALUE: part[VALUE]})
        parts.append(part.select("_row", text.alias(TEXT)))
    return pl.concat(parts).sort("_row")[TEXT]


def tokens(text: pl.Expr) -> pl.Expr:
    """The distinct words of a text in lower case, as a list."""
    return text.str.to_lowercase().str.extract_all(_TOKEN).list.unique(maintain_order=True)


def names_title(catalog: pl.DataFrame, texts: pl.DataFrame) -> pl.Series:
    """Whether each item text holds its item's title, as a whole or without a closing "(…)".

    Args:
        catalog: the catalogue; a missing title is in no text.
        texts: item_index, text.
    """
    shown = escape_series(field(catalog, TITLE, pl.String)).str.to_lowercase()
    titles = pl.DataFrame({"whole": shown, "missing": missing_title(catalog)}).select(
        pl.int_range(pl.len(), dtype=pl.Int32).alias(ITEM_INDEX),
        pl.when(~pl.col("missing")).then("whole").alias("whole"),
    )
    bare = pl.col("whole").str.replace(r"\s*\([^()]*\)$", "")
    joined = texts.join(titles, on=ITEM_INDEX, how="left", maintain_order="left")
    text = pl.col(TEXT).str.to_lowercase()
    found = [
        (part.str.len_chars() > 0) & text.str.contains(part, literal=True)
        for part in (pl.col("whole"), bare)
    ]
    return joined.select(pl.any_horizontal(*found).fill_null(False).alias("found"))["found"]


def item_facts(attributes: pl.DataFrame, n_items: int) -> pl.DataFrame:
    """The most telling value of each kind per item, null where there is none.

    Of the categories that is the rarest one (a path's last, as a rule), of the words the one that
    most items share: the others are often names.

    Returns:
        category, brand, price_band, keyword, and wider: the second rarest category.
        ``# (n_items, 5)``
    """
    counted = attributes.with_columns(items=pl.len().over(KIND, VALUE)).with_row_index("place")
    often = pl.col("items").cast(pl.Int64)
    rank = pl.when(pl.col(KIND) == CATEGORY).then(often).when(pl.col(KIND) == KEYWORD).then(-often)
    # Of two categories that the same items have the later one is the narrower.
    place = pl.col("place").cast(pl.Int64)
    place = pl.when(pl.col(KIND) == CATEGORY).then(-place).otherwise(place)
    order = counted.sort(ITEM_INDEX, KIND, rank.otherwise(0), place)
    best = order.with_columns(nth=pl.int_range(pl.len()).over(ITEM_INDEX, KIND))
    facts = pl.DataFrame({ITEM_INDEX: pl.int_range(n_items, dtype=pl.Int32, eager=True)})
    for name, kind, nth in (*((kind, kind, 0) for kind in KINDS), ("wider", CATEGORY, 1)):
        part = best.filter(pl.col(KIND) == kind, pl.col("nth") == nth)
        part = part.select(ITEM_INDEX, pl.col(VALUE).alias(name))
        facts = facts.join(part, on=ITEM_INDEX, how="left", maintain_order="left")
    return facts.drop(ITEM_INDEX)


def item_queries(
    catalog: pl.DataFrame,
    attributes: pl.DataFrame,
    renderer: PromptRenderer,
    seed: int = 0,
    epoch: int = 0,
) -> pl.DataFrame:
    """A short search for each item: its category, brand and a word of its title, 2 to 6 words.

    Args:
        catalog: the catalogue.
        attributes: its `item_attributes`.
        renderer: the templates of `written_renderer`.
        seed: of the template draw.
        epoch: of the training.

    Returns:
        item_index, text, origin; items of which fewer than two words are known are left out.
    """
    facts = item_facts(attributes, len(catalog)).with_columns(pl.all().fill_null(""))
    fields = {name: facts[name] for name in (CATEGORY, BRAND, KEYWORD)}
    drawn = fill(renderer, "query", catalog[ITEM_ID], seed, epoch, texts=fields)
    every = facts.select(pl.concat_str(BRAND, CATEGORY, "wider", KEYWORD, separator=" "))[BRAND]
    frame = pl.DataFrame({"drawn": drawn, "every": every}).select(
        pl.int_range(pl.len(), dtype=pl.Int32).alias(ITEM_INDEX),
        tokens(pl.col("drawn")).alias("drawn"),
        tokens(pl.col("every")).alias("every"),
    )
    fewest, most = _QUERY_WORDS
    enough = pl.col("drawn").list.len() >= fewest
    words = pl.when(enough).then("drawn").otherwise("every").list.head(most)
    frame = frame.with_columns(words.alias("words")).filter(pl.col("words").list.len() >= fewest)
    return frame.select(
        ITEM_INDEX, pl.col("words").list.join(" ").alias(TEXT), pl.lit(RULE).alias(ORIGIN)
    )


def item_intentions(
    catalog: pl.DataFrame,
    attributes: pl.DataFrame,
    renderer: PromptRenderer,
    aspects: pl.DataFrame | None = None,
    seed: int = 0,
    epoch: int = 0,
) -> pl.DataFrame:
    """A sentence of somebody who wants what the item is, without its title.

    Args:
        catalog: the catalogue.
        attributes: its `item_attributes`.
        renderer: the templates of `written_renderer`.
        aspects: `review_aspects` of the TRAINING reviews; what at least two of an item's reviews
            praise, and more praise than complain about, is named (the two most praised).
        seed: of the template draw.
        epoch: of the training.

    Returns:
        item_index, text, origin; items of which nothing is known, or whose title is in every such
        sentence, are left out.
    """
    facts = item_facts(attributes, len(catalog)).drop("wider")
    facts = facts.with_columns(aspects=_praised(aspects, len(catalog)))
    columns = {name: _wish(facts[name], renderer) for name in facts.columns}
    # With brand and word of the title, and without where these would give the title away.
    tellings = []
    for names in (facts.columns, [CATEGORY, PRICE_BAND, "aspects"]):
        parts = pl.concat_str([columns[name] for name in names], separator=" ", ignore_nulls=True)
        wish = pl.select(wish=pl.when(parts != "").then(parts))["wish"]
        text = fill(renderer, "intention", catalog[ITEM_ID], seed, epoch, texts={"wish": wish})
        table = pl.DataFrame({TEXT: text}).with_row_index(ITEM_INDEX).cast({ITEM_INDEX: pl.Int32})
        tellings.append(table.select(pl.when(~names_title(catalog, table)).then(TEXT))[TEXT])
    table = table.with_columns(pl.coalesce(tellings).alias(TEXT)).drop_nulls()
    return table.with_columns(pl.lit(RULE).alias(ORIGIN))


def _wish(values: pl.Series, renderer: PromptRenderer) -> pl.Series:
    """The part of a wish that a fact makes; null stays null. Each distinct one is rendered once."""
    distinct = values.drop_nulls().unique(maintain_order=True).rename(VALUE)
    said = fill(renderer, f"wish_{values.name}", distinct, texts={VALUE: distinct})
    table = pl.DataFrame({VALUE: distinct, TEXT: said})
    asked = values.to_frame(VALUE)
    return asked.join(table, on=VALUE, how="left", maintain_order="left")[TEXT].rename(values.name)


def _praised(aspects: pl.DataFrame | None, n_items: int) -> pl.Series:
    """The two aspects per item that reviews praise most, null where none is praised twice."""
    table = pl.DataFrame({ITEM_INDEX: pl.int_range(n_items, dtype=pl.Int32, eager=True)})
    if aspects is None:
        return pl.Series("aspects", [None] * n_items, dtype=pl.String)
    sign = pl.col("sign")
    votes = aspects.group_by(ITEM_INDEX, "aspect").agg(
        likes=(sign > 0).sum(), dislikes=(sign < 0).sum()
    )
    liked = votes.filter(pl.col("likes") >= 2, pl.col("likes") > pl.col("dislikes"))
    liked = liked.sort(ITEM_INDEX, -pl.col("likes").cast(pl.Int64), "aspect")
    best = liked.group_by(ITEM_INDEX, maintain_order=True).agg(
        pl.col("aspect").head(2).str.join(" and ").alias("aspects")
    )
    return table.join(best, on=ITEM_INDEX, how="left", maintain_order="left")["aspects"]


def enumeration(words: pl.Expr) -> pl.Expr:
    """A list as "a, b and c"; null for an empty one."""
    n = words.list.len()
    most = words.list.slice(0, pl.max_horizontal(n.cast(pl.Int64) - 1, 0)).list.join(", ")
    last = words.list.last()
    return pl.when(n > 1).then(pl.concat_str(most, pl.lit(" and "), last)).otherwise(last)


def history_preferences(
    history: pl.Series,
    index: AttributeIndex,
    renderer: PromptRenderer,
    row_ids: pl.Series,
    seed: int = 0,
    epoch: int = 0,
) -> pl.Series:
    """What recurs in each history more than in the catalogue, as a sentence; null where nothing.

    The (up to) `MAX_LIKES` attributes of the highest scores (see `Recurring`); one that is shared
    by no two items beyond those of a better one says the same again and is skipped. They are named
    by how recent they are. Each row's text is a function of that row's history, id, seed and epoch.

    Args:
        history: lists of catalogue rows, oldest first; what came before the target.
        index: attributes of the catalogue.
        renderer: the templates of `written_renderer`.
        row_ids: for the template draw.
        seed: of the template draw.
        epoch: of the training.
    """
    wordings = phrases(index.table, renderer, "attribute")
    parts = [pl.Series(dtype=pl.String)]
    for start in range(0, len(history), BLOCK_ROWS):
        histories = Histories.from_column(history.slice(start, BLOCK_ROWS), index.n_items)
        picked = _distinct_likes(recurring(histories, index))
        newest = [like.masks & -like.masks for like in picked]  # the lowest bit: the newest item
        table = pl.concat(
            pl.DataFrame({"row": like.rows, "attribute": like.attributes, "newest": bit})
            for like, bit in zip(picked, newest, strict=True)
        ).sort("row", "newest", maintain_order=True)
        table = table.with_columns(wordings.gather(table["attribute"]).alias("phrase"))
        likes = table.group_by("row", maintain_order=True).agg(likes=pl.col("phrase"))
        rows = pl.DataFrame({"row": np.arange(len(histories.lengths))})
        rows = rows.join(likes, on="row", how="left", maintain_order="left")
        parts.append(rows.select(enumeration(pl.col("likes")).alias("likes"))["likes"])
    return fill(renderer, "preference", row_ids, seed, epoch, texts={"likes": pl.concat(parts)})


def _distinct_likes(found: Recurring) -> list[Recurring]:
    """The best entry of each row, then the best of those that add two items to it, and so on."""
    picked = []
    for _ in range(MAX_LIKES):
        best = found.best()
        picked.append(best)
        if not len(best.rows):
            break
        taken = best.masks[np.searchsorted(best.rows, found.rows)]
        left = found.masks & ~taken
        found = found.filter((left & (left - (left > 0))) != 0)  # two bits or more
    return picked


def review_aspects(reviews: pl.DataFrame) -> pl.DataFrame:
    """What each review praises or complains about.

    A rule, and a coarse one: an aspect is mentioned if one of its words is, and the sign is the
    rating's (`LIKED` stars or more, `DISLIKED` or less; reviews between say neither). English.

    Args:
        reviews: interactions with user_id, item_index, position, rating, and summary and/or review.

    Returns:
        user_id, item_index, position, aspect, sign (1 or −1): each aspect once per review.
    """
    lexicon = pl.DataFrame(
        [(word, aspect) for aspect, words in _ASPECT_WORDS.items() for word in words.split()],
        schema={"word": pl.String, "aspect": pl.String},
        orient="row",
    )
    keys = (USER_ID, ITEM_INDEX, POSITION)
    known = [name for name in (SUMMARY, REVIEW) if name in reviews.columns]
    if not known or RATING not in reviews.columns:
        return reviews.select(keys).clear().with_columns(aspect=pl.lit(""), sign=pl.lit(0, pl.Int8))
    rating = pl.col(RATING)
    sign = pl.when(rating >= LIKED).then(1).when(rating <= DISLIKED).then(-1).cast(pl.Int8)
    text = pl.concat_str(known, separator=" ", ignore_nulls=True)
    words = tokens(text).alias("word")
    mentions = reviews.select(*keys, words, sign.alias("sign")).drop_nulls("sign").explode("word")
    mentions = mentions.with_columns(pl.col("word").str.strip_chars(".'’-"))
    found = mentions.join(lexicon, on="word", how="inner", maintain_order="left")
    return found.select(*keys, "aspect", "sign").unique(maintain_order=True)


def review_preferences(
    rows: pl.DataFrame,
    aspects: pl.DataFrame,
    renderer: PromptRenderer,
    row_ids: pl.Series,
    seed: int = 0,
    epoch: int = 0,
) -> pl.Series:
    """What a user's reviews praised and complained about before a moment, as a sentence.

    Args:
        rows: user_id and position (of the target in the user's ordered sequence): reviews of
            earlier positions of that user count, and no others.
        aspects: `review_aspects` of the interactions.
        renderer: the templates of `written_renderer`.
        row_ids: for the template draw.
        seed: of the template draw.
        epoch: of the training.

    Returns:
        Texts; null where no earlier review says anything. An aspect that was praised as often as
        complained about is not named; at most `MAX_LIKES` of each sign are, most frequent first.
    """
    asked = rows.select(USER_ID, POSITION).with_row_index("row")
    votes = (
        asked.join(aspects, on=USER_ID, suffix="_review")
        .filter(pl.col(f"{POSITION}_review") < pl.col(POSITION))
        .group_by("row", "aspect")
        .agg(votes=pl.col("sign").cast(pl.Int64).sum())
        .filter(pl.col("votes") != 0)
        .sort("row", -pl.col("votes").abs(), "aspect")
    )
    opinions = []
    for name, sign in (("opinion_likes", 1), ("opinion_dislikes", -1)):
        side = votes.filter(pl.col("votes").sign() == sign).group_by("row", maintain_order=True)
        named = side.agg(pl.col("aspect").head(MAX_LIKES))
        named = asked.join(named, on="row", how="left", maintain_order="left")
        words = named.select(enumeration(pl.col("aspect")).alias("aspects"))["aspects"]
        opinions.append(fill(renderer, name, row_ids, seed, epoch, texts={"aspects": words}))
    both = pl.concat_str(opinions, separator=" but ", ignore_nulls=True)
    opinion = pl.select(both=pl.when(both != "").then(both))["both"]
    return fill(renderer, "review_preference", row_ids, seed, epoch, texts={"opinions": opinion})
