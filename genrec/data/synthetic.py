"""A synthetic shop: a catalogue with text, and shoppers whose next purchase can be learned.

Longer than other modules because the shop's vocabulary (departments, product types, what follows
what, brands, words) lies here as data. Nothing is downloaded and nothing depends on the platform:
the same seed gives the same tables.

What the generator puts in, since a benchmark on it has to say so: shoppers have tastes (a few
departments, brands, a price band, a style) that drift; a session serves one need, so its purchases
follow one another (tent, then sleeping bag, then camping mat); consumables are bought again;
popularity has a long tail; some items are released late and stay cold; a share of the purchases is
noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.columns import (
    BRAND,
    CATEGORIES,
    DESCRIPTION,
    ITEM_ID,
    PRICE,
    RATING,
    TIMESTAMP,
    TITLE,
    USER_ID,
)
from genrec.data.readers import RawData

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

DAYS = 730
EPOCH = 1_640_995_200  # 2022-01-01, the shop's first day
MIN_LENGTH = 3
MAX_LENGTH = 80
STYLE_SIZE = 4
CHUNK_CELLS = 20_000_000  # users x items held at once while simulating

CONTINUE_SESSION = 0.46  # chance that a purchase is followed by another one for the same need
FOLLOW = 0.50  # within a session: chance that the next type is one that goes with the last
LATER_FOLLOW = 0.20  # in a new session: chance that it still completes the last purchase
REPLENISH = 0.22  # in a new session: chance that a due consumable is bought again
NOISE = 0.10  # share of purchases whose type is drawn at random
NOVELTY_DAYS = 25.0  # how long a newly released item draws attention


class _Type(NamedTuple):
    """One product type: the lowest level of the category path."""

    department: str
    category: str
    name: str
    price: float  # of the middle item, in the shop's currency
    days: int  # a consumable is used up after about so many days; 0 for durable goods
    variants: str  # key of _VARIANTS
    follows: tuple[str, ...]  # types that are often bought after this one, likeliest first


_VARIANTS = {
    "color": "Black|Slate Grey|Forest Green|Navy|Sand|Burgundy|Ivory|Rust|Teal|Charcoal",
    "size": "Small|Medium|Large|Extra Large|Compact|Standard|Slim|Classic",
    "pack": "Single|2-Pack|3-Pack|4-Pack|6-Pack|8-Pack|12-Pack|Value Pack",
    "volume": "100 ml|150 ml|200 ml|250 ml|300 ml|400 ml|500 ml|750 ml",
    "weight": "250 g|340 g|500 g|750 g|1 kg|2 kg|5 kg|10 kg",
    "persons": "1-Person|2-Person|3-Person|4-Person|6-Person",
    "liters": "0.5 L|0.75 L|1 L|1.5 L|2 L|3 L|5 L|10 L",
}

# department / category / type / price / days of use / variants / what goes with it
_SHOP = """
Camping & Hiking/Shelter/Tent/180/0/persons/Sleeping Bag,Camping Mat,Tarp
Camping & Hiking/Shelter/Tarp/45/0/color/Trekking Poles,Tent
Camping & Hiking/Sleeping Gear/Sleeping Bag/110/0/color/Camping Mat,Camp Pillow,Camping Stove
Camping & Hiking/Sleeping Gear/Camping Mat/60/0/size/Camp Pillow,Camping Stove
Camping & Hiking/Sleeping Gear/Camp Pillow/24/0/color/Headlamp
Camping & Hiking/Camp Kitchen/Camping Stove/65/0/size/Gas Cartridge,Cook Set
Camping & Hiking/Camp Kitchen/Gas Cartridge/9/60/pack/Trail Meal
Camping & Hiking/Camp Kitchen/Cook Set/50/0/persons/Trail Meal,Water Bottle
Camping & Hiking/Camp Kitchen/Trail Meal/11/40/pack/Gas Cartridge
Camping & Hiking/On the Trail/Hiking Backpack/130/0/color/Rain Cover,Water Bottle,Trekking Poles
Camping & Hiking/On the Trail/Rain Cover/22/0/size/Headlamp
Camping & Hiking/On the Trail/Water Bottle/25/0/liters/Trail Meal
Camping & Hiking/On the Trail/Trekking Poles/80/0/color/Hiking Backpack
Camping & Hiking/On the Trail/Headlamp/40/0/color/Trail Meal
Coffee & Tea/Machines/Espresso Machine/350/0/color/Coffee Grinder,Milk Pitcher,Espresso Beans
Coffee & Tea/Machines/Coffee Grinder/95/0/color/Espresso Beans,Filter Coffee
Coffee & Tea/Machines/Gooseneck Kettle/70/0/liters/Pour-Over Dripper,Loose-Leaf Tea
Coffee & Tea/Brewing/Pour-Over Dripper/25/0/color/Paper Filters,Filter Coffee,Gooseneck Kettle
Coffee & Tea/Brewing/Paper Filters/7/60/pack/Filter Coffee
Coffee & Tea/Brewing/Milk Pitcher/20/0/volume/Espresso Cups
Coffee & Tea/Brewing/Espresso Cups/28/0/color/Espresso Beans
Coffee & Tea/Brewing/Teapot/42/0/liters/Loose-Leaf Tea
Coffee & Tea/Pantry/Espresso Beans/18/30/weight/Machine Descaler
Coffee & Tea/Pantry/Filter Coffee/16/30/weight/Paper Filters
Coffee & Tea/Pantry/Loose-Leaf Tea/14/45/weight/Teapot
Coffee & Tea/Pantry/Machine Descaler/12/120/pack/Espresso Beans
Kitchen/Knives & Boards/Chef's Knife/90/0/size/Cutting Board,Sharpening Stone
Kitchen/Knives & Boards/Cutting Board/35/0/size/Sharpening Stone
Kitchen/Knives & Boards/Sharpening Stone/38/0/size/Chef's Knife
Kitchen/Cookware/Cast Iron Skillet/45/0/size/Olive Oil,Spice Set
Kitchen/Cookware/Dutch Oven/160/0/color/Bread Flour,Cast Iron Skillet
Kitchen/Cookware/Saucepan/55/0/liters/Olive Oil
Kitchen/Baking/Stand Mixer/310/0/color/Baking Pan,Kitchen Scale,Bread Flour
Kitchen/Baking/Baking Pan/22/0/size/Bread Flour
Kitchen/Baking/Kitchen Scale/28/0/color/Bread Flour
Kitchen/Baking/Bread Flour/8/35/weight/Baking Pan
Kitchen/Cooking Ingredients/Olive Oil/18/45/volume/Spice Set
Kitchen/Cooking Ingredients/Spice Set/24/120/pack/Olive Oil
Beauty/Skin Care/Facial Cleanser/15/50/volume/Toner,Moisturizer
Beauty/Skin Care/Toner/17/55/volume/Face Serum,Moisturizer
Beauty/Skin Care/Face Serum/32/60/volume/Moisturizer
Beauty/Skin Care/Moisturizer/24/60/volume/Sunscreen
Beauty/Skin Care/Sunscreen/18/70/volume/Lip Balm
Beauty/Skin Care/Lip Balm/6/60/pack/Moisturizer
Beauty/Hair Care/Shampoo/12/45/volume/Conditioner,Hair Mask
Beauty/Hair Care/Conditioner/12/45/volume/Hair Mask
Beauty/Hair Care/Hair Mask/19/70/volume/Hair Brush
Beauty/Hair Tools/Hair Dryer/80/0/color/Hair Brush,Heat Protectant
Beauty/Hair Tools/Hair Brush/16/0/color/Conditioner
Beauty/Hair Tools/Heat Protectant/14/80/volume/Shampoo
Cycling/Protection/Bike Helmet/90/0/size/Bike Light,Cycling Gloves
Cycling/Protection/Cycling Gloves/28/0/size/Cycling Jersey
Cycling/Protection/Bike Lock/55/0/size/Bike Light
Cycling/Equipment/Bike Light/45/0/pack/Bike Lock
Cycling/Equipment/Floor Pump/48/0/color/Inner Tube
Cycling/Equipment/Saddle Bag/30/0/size/Inner Tube,Multi-Tool
Cycling/Equipment/Multi-Tool/26/0/size/Chain Oil
Cycling/Clothing/Cycling Jersey/65/0/size/Bib Shorts
Cycling/Clothing/Bib Shorts/95/0/size/Energy Gel,Cycling Gloves
Cycling/Supplies/Inner Tube/8/110/pack/Chain Oil
Cycling/Supplies/Chain Oil/10/90/volume/Inner Tube
Cycling/Supplies/Energy Gel/20/35/pack/Energy Gel
Home Office/Furniture/Standing Desk/420/0/color/Monitor Arm,Desk Mat,Office Chair
Home Office/Furniture/Office Chair/280/0/color/Standing Desk,Desk Lamp
Home Office/Furniture/Desk Lamp/48/0/color/Desk Organizer
Home Office/Accessories/Monitor Arm/90/0/size/Desk Mat,Mechanical Keyboard
Home Office/Accessories/Mechanical Keyboard/115/0/color/Wrist Rest,Wireless Mouse
Home Office/Accessories/Wireless Mouse/50/0/color/Desk Mat
Home Office/Accessories/Wrist Rest/20/0/color/Wireless Mouse
Home Office/Accessories/Desk Mat/26/0/color/Desk Organizer
Home Office/Accessories/Desk Organizer/24/0/color/Gel Pens
Home Office/Stationery/Notebook/13/55/pack/Gel Pens
Home Office/Stationery/Gel Pens/9/75/pack/Notebook
Garden/Growing/Raised Bed/95/0/size/Potting Soil,Vegetable Seeds
Garden/Growing/Potting Soil/15/60/liters/Plant Food,Vegetable Seeds
Garden/Growing/Vegetable Seeds/5/80/pack/Seed Tray,Potting Soil
Garden/Growing/Seed Tray/14/0/pack/Potting Soil
Garden/Growing/Plant Food/14/60/volume/Potting Soil
Garden/Tools/Pruning Shears/36/0/size/Garden Gloves
Garden/Tools/Garden Gloves/15/0/size/Hand Trowel
Garden/Tools/Hand Trowel/18/0/color/Potting Soil
Garden/Watering/Watering Can/26/0/liters/Plant Food
Garden/Watering/Garden Hose/46/0/size/Hose Nozzle
Garden/Watering/Hose Nozzle/19/0/color/Garden Gloves
Pets/Dogs/Dog Harness/38/0/size/Dog Leash,Dog Treats
Pets/Dogs/Dog Leash/24/0/color/Dog Treats
Pets/Dogs/Dog Bed/62/0/size/Dog Toy
Pets/Dogs/Dog Toy/13/0/pack/Dog Treats
Pets/Dogs/Dry Dog Food/45/30/weight/Dog Treats
Pets/Dogs/Dog Treats/10/25/pack/Dry Dog Food
Pets/Cats/Litter Box/40/0/size/Cat Litter
Pets/Cats/Cat Litter/18/25/weight/Wet Cat Food
Pets/Cats/Wet Cat Food/26/22/pack/Cat Litter
Pets/Cats/Scratching Post/52/0/size/Cat Toy
Pets/Cats/Cat Toy/11/0/pack/Wet Cat Food
"""

_BRANDS = {
    "Camping & Hiking": "Northpeak|Fernweh|Cairn & Co|Alpenglow|Wildmark|Ridgerunner|Basecamp Nine",
    "Coffee & Tea": "Morning Ritual|Cremador|Kettle & Leaf|Dropwise|Nordbrew|Tamper House",
    "Kitchen": "Hearthstone|Ferrovia|Blanc Cuisine|Oak & Iron|Mirepoix|Copperline",
    "Beauty": "Lumière Botanics|Dewfield|Purelane|Saltmere|Juniper & Rose|Hydra Theory|Verda",
    "Cycling": "Velocor|Pavé|Chainworks|Domestique|Switchback|Tailwind Labs",
    "Home Office": "Deskwright|Lumenor|Keystroke|Plainform|Ergon Works|Paperbark",
    "Garden": "Greenthumb Supply|Loam & Leaf|Rosewell|Terracotta Lane|Thornfield",
    "Pets": "Wagmore|Whisker Lane|Good Fetch|Pawsome Pantry|Purrfield|Barkwell",
}
_HOUSE_BRANDS = ("Everyday Basics", "Alder & Finch", "Common Goods")

_LINES = (
    "Ridge|Summit|Meadow|Harbor|Cascade|Aurora|Ember|Drift|Atlas|Willow|Vista|Nomad|Solstice|Pioneer|"
    "Heritage|Essential|Signature|Origin|Terra|Nova|Juniper|Compass|Lagoon|Quartz|Halo|Linden|Orbit|"
    "Haven|Tempo|Canvas"
)
# Of durable goods; of consumables.
_MATERIALS = {
    "Camping & Hiking": (
        "ripstop nylon|recycled polyester|aluminium|waxed canvas",
        "long shelf life",
    ),
    "Coffee & Tea": (
        "stainless steel|borosilicate glass|stoneware|copper",
        "single-origin sourcing",
    ),
    "Kitchen": ("carbon steel|enamelled iron|acacia wood|cast aluminium", "stone-milled quality"),
    "Beauty": ("bamboo|boar bristle|ceramic|tourmaline", "aloe|niacinamide|jojoba oil|green tea"),
    "Cycling": (
        "polycarbonate|anodised aluminium|breathable mesh|steel",
        "race-tested reliability",
    ),
    "Home Office": (
        "solid oak|powder-coated steel|recycled plastic|cork",
        "recycled paper packaging",
    ),
    "Garden": ("galvanised steel|untreated larch|ash wood|brass", "peat-free ingredients"),
    "Pets": (
        "washable cotton|natural rubber|sisal rope|felt",
        "free-range chicken|salmon|no grain",
    ),
}
_STYLES = (
    ("light and minimal", "built to last", "playful", "classic"),
    ("people who travel often", "beginners", "everyday use", "demanding users"),
    (
        "sold in plain packaging",
        "easy to store",
        "made in small batches",
        "shipped in recycled cardboard",
    ),
)


@dataclass(frozen=True)
class _Catalog:
    """Everything the simulation knows of the items; one row per item unless stated."""

    type_of: IntArray
    brand_of: IntArray
    tier: FloatArray  # log price against its type's middle price, in standard units
    style: FloatArray  # (n_items, STYLE_SIZE)
    log_popularity: FloatArray
    release_day: FloatArray
    items_of: IntArray  # (n_types, most items of a type), padded with -1
    n_brands: int


def synthetic_shop(n_users: int = 2000, n_items: int = 600, seed: int = 0) -> RawData:
    """Generate a shop: catalogue with text, and a purchase log of about 12 purchases a user.

    Args:
        n_users: shoppers; each has at least one purchase.
        n_items: catalogue items, spread over the product types.
        seed: same seed, same tables.

    Returns:
        The raw tables, the log ordered by time, ids as strings.

    Raises:
        ValueError: fewer than 1 user or 10 items.
    """
    if n_users < 1:
        raise ValueError(f"n_users={n_users} must be at least 1")
    if n_items < 10:
        raise ValueError(f"n_items={n_items} must be at least 10: smaller shops have no types left")
    rng = np.random.default_rng(seed)
    types = _shop_types()
    catalog, table = _make_catalog(types, n_items, rng)
    chunk = max(1, CHUNK_CELLS // n_items)
    parts = [
        _simulate(types, catalog, min(chunk, n_users - first), first, rng)
        for first in range(0, n_users, chunk)
    ]
    user, item, seconds, rating = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    interactions = (
        pl.DataFrame(
            {
                USER_ID: user,
                ITEM_ID: table[ITEM_ID].gather(item),
                TIMESTAMP: seconds + EPOCH,
                RATING: rating,
            }
        )
        .sort(TIMESTAMP, USER_ID, maintain_order=True)
        .with_columns(pl.format("U{}", pl.col(USER_ID).cast(pl.String).str.zfill(5)))
    )
    return RawData(interactions=interactions, catalog=table.sort(ITEM_ID), users=None)


def _shop_types() -> list[_Type]:
    types = []
    for line in _SHOP.strip().splitlines():
        department, category, name, price, days, variants, follows = line.split("/")
        types.append(
            _Type(
                department,
                category,
                name,
                float(price),
                int(days),
                variants,
                tuple(follows.split(",")),
            )
        )
    known = {kind.name for kind in types}
    assert all(name in known for kind in types for name in kind.follows)
    return types


def _make_catalog(
    types: list[_Type], n_items: int, rng: np.random.Generator
) -> tuple[_Catalog, pl.DataFrame]:
    """Draw the items (types, brands, prices, popularity, release) and write their text."""
    brands = sorted(
        {b for names in _BRANDS.values() for b in names.split("|")} | set(_HOUSE_BRANDS)
    )
    brand_level = rng.normal(0.0, 0.25, len(brands))  # a brand is dear or cheap throughout
    brand_style = rng.normal(0.0, 1.0, (len(brands), STYLE_SIZE))
    share = rng.dirichlet(np.full(len(types), 6.0))
    # Every type gets an item before any type gets its share of the rest.
    base = np.arange(min(n_items, len(types)))
    type_of = np.sort(
        np.concatenate([base, rng.choice(len(types), max(0, n_items - len(types)), p=share)])
        if n_items >= len(types)
        else rng.permutation(len(types))[:n_items]
    ).astype(np.int64)
    brand_of = np.empty(n_items, dtype=np.int64)
    for department, names in _BRANDS.items():
        own = [brands.index(name) for name in (*names.split("|"), *_HOUSE_BRANDS)]
        weights = rng.dirichlet(np.full(len(own), 2.0))
        here = np.flatnonzero(np.array([types[t].department == department for t in type_of]))
        brand_of[here] = rng.choice(own, len(here), p=weights)
    log_price = brand_level[brand_of] + rng.normal(0.0, 0.35, n_items)
    middle = np.array([types[t].price for t in type_of])
    price = np.maximum(np.round(middle * np.exp(log_price)), 2.0) - 0.01
    style = 0.6 * brand_style[brand_of] + 0.8 * rng.normal(0.0, 1.0, (n_items, STYLE_SIZE))

    # About 82% are there from the start, 10% come over time, 8% in the last weeks (cold).
    entry = rng.random(n_items)
    release = np.where(entry < 0.82, 0.0, rng.uniform(0.1, 0.9, n_items) * DAYS)
    release = np.where(entry > 0.92, rng.uniform(DAYS - 45, DAYS, n_items), release)
    _, first = np.unique(type_of, return_index=True)
    release[first] = 0.0  # no type is ever sold out

    counts = np.bincount(type_of, minlength=len(types))
    items_of = np.full((len(types), counts.max()), -1, dtype=np.int64)
    for kind in range(len(types)):
        items_of[kind, : counts[kind]] = np.flatnonzero(type_of == kind)
    catalog = _Catalog(
        type_of=type_of,
        brand_of=brand_of,
        tier=log_price / 0.43,
        style=style,
        log_popularity=rng.normal(0.0, 1.0, n_items),
        release_day=release,
        items_of=items_of,
        n_brands=len(brands),
    )
    return catalog, _write_text(types, catalog, brands, price, rng)


def _write_text(
    types: list[_Type],
    catalog: _Catalog,
    brands: list[str],
    price: FloatArray,
    rng: np.random.Generator,
) -> pl.DataFrame:
    """Titles (unique), category paths and descriptions of the drawn items."""
    n_items = len(price)
    lines = _LINES.split("|")
    rows: list[dict[str, Any]] = []
    taken: set[str] = set()
    numbers = rng.permutation(n_items) + 10_000  # ids say nothing about type or popularity
    words = rng.integers(0, 1 << 30, (n_items, 3))
    for i in range(n_items):
        kind, brand = types[catalog.type_of[i]], brands[catalog.brand_of[i]]
        variants = _VARIANTS[kind.variants].split("|")
        line, variant = lines[words[i, 0] % len(lines)], variants[words[i, 1] % len(variants)]
        title, series = f"{brand} {line} {kind.name}, {variant}", 2
        while title in taken:
            title, series = f"{brand} {line} {series} {kind.name}, {variant}", series + 1
        taken.add(title)
        materials = _MATERIALS[kind.department][kind.days > 0].split("|")
        material = materials[words[i, 2] % len(materials)]
        style = catalog.style[i]
        looks = [
            options[int(place)]
            for options, place in zip(
                _STYLES, (style.argmax(), style.argmin(), np.abs(style).argmax()), strict=True
            )
        ]
        rows.append(
            {
                ITEM_ID: f"SKU{numbers[i]}",
                TITLE: title,
                BRAND: brand,
                CATEGORIES: [kind.department, kind.category, kind.name],
                PRICE: float(round(price[i], 2)),
                DESCRIPTION: f"{kind.name} from the {line} line by {brand}, with {material}. "
                f"Style: {looks[0]}. Made for {looks[1]}; {looks[2]}.",
            }
        )
    return pl.DataFrame(
        rows,
        schema={
            ITEM_ID: pl.String,
            TITLE: pl.String,
            BRAND: pl.String,
            CATEGORIES: pl.List(pl.String),
            PRICE: pl.Float64,
            DESCRIPTION: pl.String,
        },
    )


def _transitions(types: list[_Type]) -> FloatArray:
    """Log-weights of the type that goes with a type, shape (n_types, n_types)."""
    index = {kind.name: i for i, kind in enumerate(types)}
    weights = np.zeros((len(types), len(types)))
    for i, kind in enumerate(types):
        for rank, name in enumerate(kind.follows):
            weights[i, index[name]] = 1.0 / (1 + rank)
    with np.errstate(divide="ignore"):
        return np.log(weights)


def _draw(log_weights: FloatArray, rng: np.random.Generator) -> IntArray:
    """One column index per row, with probability proportional to exp(log_weights)."""
    # Gumbel-max: exact, and needs no normalisation per row.
    return np.argmax(log_weights + rng.gumbel(size=log_weights.shape), axis=1).astype(np.int64)


@dataclass(frozen=True)
class _Shoppers:
    """Tastes of a block of users; one row per user."""

    type_taste: FloatArray  # (n, n_types), log-weights
    brand_taste: FloatArray  # (n, n_brands)
    price_band: FloatArray
    style: FloatArray  # (n, STYLE_SIZE)
    length: IntArray
    start_day: FloatArray
    gap_days: FloatArray  # mean days between two sessions


def _make_shoppers(
    types: list[_Type], catalog: _Catalog, n: int, rng: np.random.Generator
) -> _Shoppers:
    departments = list(_BRANDS)
    of = np.array([departments.index(kind.department) for kind in types])
    department = rng.dirichlet(np.full(len(departments), 0.35), n) + 1e-3  # (n, departments)
    spread = rng.normal(0.0, 0.8, (n, len(types)))
    # Fixed by the shop, not drawn: some types sell more than others.
    general = 0.5 * np.cos(1.7 * np.arange(len(types)))
    taste = np.log(department)[:, of] + spread + general
    taste[:, (catalog.items_of[:, 0] < 0)] = -np.inf
    length = MIN_LENGTH + np.minimum(
        rng.negative_binomial(1.3, 1.3 / (1.3 + 11.0), n), MAX_LENGTH - MIN_LENGTH
    )
    start = rng.uniform(0.0, 0.6 * DAYS, n)
    sessions = np.maximum(1.0, length * (1 - CONTINUE_SESSION))
    return _Shoppers(
        type_taste=taste,
        brand_taste=rng.normal(0.0, 0.9, (n, catalog.n_brands)),
        price_band=rng.normal(0.0, 0.9, n),
        style=rng.normal(0.0, 0.55, (n, STYLE_SIZE)),
        length=length.astype(np.int64),
        start_day=start,
        gap_days=(DAYS - start) / sessions * rng.uniform(0.7, 1.3, n),
    )


def _simulate(
    types: list[_Type], catalog: _Catalog, n: int, first_user: int, rng: np.random.Generator
) -> tuple[IntArray, IntArray, IntArray, FloatArray]:
    """Let `n` users shop, all of them one purchase at a time.

    Returns:
        User numbers, items, seconds since the shop's first day, ratings; one entry per purchase.
    """
    shoppers = _make_shoppers(types, catalog, n, rng)
    follow = _transitions(types)
    follow[:, catalog.items_of[:, 0] < 0] = -np.inf
    days_of_use = np.array([kind.days for kind in types], dtype=np.float64)
    of = np.unique([kind.department for kind in types], return_inverse=True)[1]
    day = shoppers.start_day.copy()
    last = np.full(n, -1, dtype=np.int64)
    last_bought = np.full((n, len(types)), -1, dtype=np.int64)  # item, per user and type
    bought_on = np.full((n, len(types)), np.inf)
    owned = np.zeros((n, len(catalog.type_of)), dtype=bool)
    out: list[tuple[IntArray, IntArray, IntArray, FloatArray]] = []
    for step in range(int(shoppers.length.max())):
        u = np.flatnonzero((shoppers.length > step) & (day < DAYS))
        if len(u) == 0:
            break
        before = last[u]
        same = (rng.random(len(u)) < CONTINUE_SESSION) & (before >= 0)
        gap = np.where(
            same,
            rng.exponential(0.008, len(u)),
            rng.exponential(1.0, len(u)) * shoppers.gap_days[u],
        )
        now = day[u] + np.where(before >= 0, gap + 1e-4, 0.0)
        keep = (now < DAYS) | (before < 0)
        day[u] = np.where(keep, now, DAYS)  # whoever leaves the period stays away
        u, before, same, now = u[keep], before[keep], same[keep], now[keep]
        kind, again = _choose_type(
            shoppers, follow, of, days_of_use, last_bought[u], bought_on[u], u, before, same, now,
            catalog, rng,
        )  # fmt: skip
        # What is still in use isn't bought again: durable goods for good, consumables for a while.
        use = days_of_use[kind]
        in_use = (use == 0) | (now - bought_on[u, kind] < 0.5 * use)
        item, liking = _choose_item(shoppers, catalog, in_use, owned, u, before, kind, now, rng)
        item = np.where(again, last_bought[u, kind], item)
        last[u], owned[u, item] = item, True
        last_bought[u, catalog.type_of[item]] = item
        bought_on[u, catalog.type_of[item]] = now
        stars = np.clip(np.round(4.0 + 0.45 * liking + rng.normal(0.0, 0.7, len(u))), 1, 5)
        out.append((u + first_user, item, np.floor(now * 86_400).astype(np.int64), stars))
    user, item, seconds, rating = (np.concatenate(columns) for columns in zip(*out, strict=True))
    return user, item, seconds, rating


def _choose_type(
    shoppers: _Shoppers,
    follow: FloatArray,
    department_of: IntArray,
    days_of_use: FloatArray,
    last_bought: IntArray,
    bought_on: FloatArray,
    u: IntArray,
    before: IntArray,
    same: BoolArray,
    now: FloatArray,
    catalog: _Catalog,
    rng: np.random.Generator,
) -> tuple[IntArray, BoolArray]:
    """Product type of each user's next purchase, and whether it's the very item bought before."""
    had = catalog.type_of[np.maximum(before, 0)]
    taste = shoppers.type_taste[u]
    # Interest drifts: the department of the last purchase stays on the mind.
    near = (department_of[None, :] == department_of[had][:, None]) & (before >= 0)[:, None]
    kind = _draw(taste + np.where(near, np.where(same, 2.0, 0.8)[:, None], 0.0), rng)

    chance = np.where(same, FOLLOW, LATER_FOLLOW)
    goes_on = (rng.random(len(u)) < chance) & (before >= 0) & np.isfinite(follow[had]).any(axis=1)
    kind = np.where(goes_on, _draw(follow[had] + 0.4 * np.maximum(taste, -5.0), rng), kind)

    # A consumable is due when it is nearly used up; the usual item is bought, mostly.
    due = (days_of_use > 0) & (now[:, None] - bought_on > 0.8 * days_of_use) & (last_bought >= 0)
    refill = (rng.random(len(u)) < REPLENISH) & ~same & due.any(axis=1)
    wanted = _draw(np.where(due, np.maximum(taste, -5.0), -np.inf), rng)
    kind = np.where(refill, wanted, kind)
    again = refill & (rng.random(len(u)) < 0.65)
    noise = (rng.random(len(u)) < NOISE) & ~again
    stocked = np.where(catalog.items_of[:, 0] >= 0, 0.0, -np.inf)
    random_kind = _draw(np.broadcast_to(stocked, taste.shape), rng)
    return np.where(noise, random_kind, kind), again


def _choose_item(
    shoppers: _Shoppers,
    catalog: _Catalog,
    in_use: BoolArray,
    owned: BoolArray,
    u: IntArray,
    before: IntArray,
    kind: IntArray,
    now: FloatArray,
    rng: np.random.Generator,
) -> tuple[IntArray, FloatArray]:
    """Item of the chosen type, by popularity, brand, price band, style and the last purchase."""
    options = catalog.items_of[kind]  # (users, options)
    item = np.maximum(options, 0)
    brand = catalog.brand_of[item]
    liking = np.take_along_axis(shoppers.brand_taste[u], brand, axis=1)
    liking = liking - 0.5 * (catalog.tier[item] - shoppers.price_band[u][:, None]) ** 2
    liking = liking + np.einsum("uod,ud->uo", catalog.style[item], shoppers.style[u])
    previous = np.maximum(before, 0)
    match = 0.9 * (brand == catalog.brand_of[previous][:, None])
    match = match + 0.35 * np.einsum("uod,ud->uo", catalog.style[item], catalog.style[previous])
    score = catalog.log_popularity[item] + liking + np.where(before >= 0, 1.0, 0.0)[:, None] * match
    had = owned[u[:, None], item]
    score = score - had * np.where(in_use, 4.0, 0.7)[:, None]
    age = now[:, None] - catalog.release_day[item]
    fresh = (catalog.release_day[item] > 0) & (age >= 0)
    score = score + 2.5 * fresh * np.exp(-np.maximum(age, 0.0) / NOVELTY_DAYS)
    sold = (options >= 0) & (age >= 0)
    pick = _draw(np.where(sold, score, -np.inf), rng)
    rows = np.arange(len(u))
    return item[rows, pick], np.clip(liking[rows, pick], -3.0, 2.0)
