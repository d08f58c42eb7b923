"""The parts of the quality report, by hand and on catalogues whose answer is known."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

from genrec.item_lists import ItemLists
from genrec.quantizers import quality as module
from genrec.quantizers.product import ProductQuantizer
from genrec.quantizers.quality import (
    attribute_agreement,
    code_labels,
    item_map,
    level_usage,
    prefix_usage,
    quality_report,
    reconstruction_error,
)
from genrec.quantizers.residual_kmeans import ResidualKMeans


def test_level_usage_by_hand():
    codes = np.array([[0, 1], [0, 1], [0, 0], [2, 0]])
    first, second = level_usage(codes, (4, 2))
    assert first["used"] == 2 and first["size"] == 4 and first["largest_share"] == 0.75
    # Sorted counts 0, 0, 1, 3 with weights -3, -1, 1, 3: (1 + 9) / (4 * 4)
    assert first["gini"] == pytest.approx(0.625)
    assert second["gini"] == 0.0 and second["perplexity"] == pytest.approx(2.0)
    one = level_usage(np.zeros((5, 1), dtype=int), (8,))[0]
    assert one["perplexity"] == 1.0 and one["gini"] == pytest.approx(7 / 8)


def test_prefix_usage_by_hand():
    codes = np.array([[0, 1], [0, 1], [0, 2], [3, 1]])
    assert prefix_usage(codes) == [
        {"length": 1, "distinct": 2, "mean_items": 2.0, "max_items": 3, "alone": 1},
        {"length": 2, "distinct": 3, "mean_items": 4 / 3, "max_items": 2, "alone": 2},
    ]


def catalogue(n_items: int = 120) -> tuple[np.ndarray, pl.DataFrame]:
    """Codes that follow six categories at depth 2; the brand has nothing to do with them."""
    kind = np.arange(n_items) % 6
    codes = np.stack([kind, np.arange(n_items) // 6 % 4], axis=1)
    frame = pl.DataFrame(
        {
            "title": [
                f"{'lamp mat pot hat tea bag'.split()[k]} no {i}" for i, k in enumerate(kind)
            ],
            "categories": [["Shop", f"Kind {k}", f"Item {i}"] for i, k in enumerate(kind)],
            "brand": [f"B{b}" for b in np.random.default_rng(0).integers(0, 5, n_items)],
        }
    )
    return codes, frame


def test_categories_at_the_depth_with_most_values():
    codes, frame = catalogue()
    found = attribute_agreement(codes, frame)
    category = found["categories"]
    assert (category["depth"], category["values"]) == (3, 120)  # within 5 … 500
    wide = frame.with_columns(
        pl.concat_list(pl.col("categories").list.head(2), pl.Series([f"x{i}" for i in range(120)]))
        .alias("categories")
    )  # fmt: skip
    many = pl.concat([wide.with_columns(title=pl.lit(f"{i}")) for i in range(5)]).with_columns(
        pl.concat_list(
            pl.col("categories").list.head(2), pl.int_range(pl.len()).cast(pl.String)
        ).alias("categories")
    )
    found = attribute_agreement(np.tile(codes, (5, 1)), many)["categories"]
    assert (found["depth"], found["values"], found["items"]) == (2, 6, 600)  # 600 are too many
    first, second = found["prefixes"]
    assert (first["groups"], second["groups"]) == (6, 24)
    assert first["purity"] == second["purity"] == 1.0
    assert first["adjusted_mutual_information"] == pytest.approx(1.0)
    assert 0.5 < second["adjusted_mutual_information"] < 1.0  # four groups say what one would
    assert first["chance"] < 0.35 < 1.0


def test_unrelated_values_agree_no_better_than_chance():
    codes, frame = catalogue(600)
    for part in attribute_agreement(codes, frame)["brand"]["prefixes"]:
        assert part["purity"] == pytest.approx(part["chance"], abs=0.06)
        assert abs(part["adjusted_mutual_information"]) < 0.03


def test_purity_by_hand_and_missing_values():
    codes = np.array([[0], [0], [0], [1], [1], [1], [1]])
    frame = pl.DataFrame(
        {
            "categories": [["a"], ["a"], ["b"], ["c"], None, ["d"], ["e"]],
            "brand": ["x", None, "", "x", "y", "y", "z"],
        }
    )
    found = attribute_agreement(codes, frame)
    assert set(found) == {"categories"}  # three brands are too few
    part = found["categories"]
    assert (part["values"], part["items"], part["depth"]) == (5, 6, 1)
    assert len(part["prefixes"]) == 1  # codes of one level
    assert part["prefixes"][0]["purity"] == pytest.approx((2 + 1) / 6)
    nothing = pl.DataFrame(
        {"categories": [[], None, [""]]}, schema={"categories": pl.List(pl.String)}
    )
    assert attribute_agreement(codes[:3], nothing) == {}
    assert attribute_agreement(codes[:3], pl.DataFrame({"title": ["a", "b", "c"]})) == {}


def test_agreement_of_a_large_catalogue_is_sampled(monkeypatch):
    monkeypatch.setattr(module, "AGREEMENT_ITEMS", 60)
    codes, frame = catalogue(600)
    found = attribute_agreement(codes, frame, seed=1)
    assert found["brand"]["items"] == 60
    assert found == attribute_agreement(codes, frame, seed=1)
    assert found != attribute_agreement(codes, frame, seed=2)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(7)
    centres = rng.normal(size=(12, 6)) * 3
    return (centres[np.arange(240) % 12] + rng.normal(size=(240, 6)) + 5).astype(np.float32)


def test_reconstruction_equals_a_direct_computation(vectors, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ROWS", 100)  # blocks don't change sums
    quantizer = ResidualKMeans.fit(vectors, (8, 6, 4))
    codes = quantizer.encode(vectors)
    found = reconstruction_error(codes, vectors, quantizer)
    error = ((quantizer.decode(codes) - vectors) ** 2).sum()
    expected = error / ((vectors - vectors.mean(axis=0)) ** 2).sum()
    assert found["decoded"] == pytest.approx(expected, rel=1e-4)
    assert found["after_level"][-1] == pytest.approx(expected, rel=1e-3)
    assert found["after_level"] == sorted(found["after_level"], reverse=True)
    assert 0 < found["after_level"][0] < 1
    shuffled = reconstruction_error(np.random.default_rng(0).permutation(codes), vectors, quantizer)
    assert shuffled["decoded"] > 1  # worse than the mean alone


def test_reconstruction_of_a_product_quantizer_counts_the_parts_to_come(vectors):
    quantizer = ProductQuantizer.fit(vectors, (6, 6, 6), rotate=False)
    codes = quantizer.encode(vectors)
    found = reconstruction_error(codes, vectors, quantizer)
    assert found["after_level"] == sorted(found["after_level"], reverse=True)
    assert found["after_level"][-1] == pytest.approx(found["decoded"], rel=1e-3)
    assert found["after_level"][0] > 0.5  # two thirds of the dimensions are still to come


def test_reconstruction_without_variance_is_unknown(vectors):
    quantizer = ResidualKMeans.fit(vectors, (4,))
    alike = np.repeat(vectors[:1], 5, axis=0)
    found = reconstruction_error(quantizer.encode(alike), alike, quantizer)
    assert found == {"after_level": [None], "decoded": None}
    with pytest.raises(ValueError, match="levels"):
        reconstruction_error(np.zeros((5, 0), dtype=int), alike, quantizer)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_level_that_describes_nothing_is_left_out_of_the_reconstruction(vectors, normalize):
    quantizer = ResidualKMeans.fit(vectors, (6, 4), normalize_residuals=normalize)
    codes = quantizer.encode(vectors)
    whole = reconstruction_error(codes, vectors, quantizer)
    assert len(whole["after_level"]) == 2
    tokens = np.column_stack([codes, np.arange(len(codes))])
    assert reconstruction_error(tokens, vectors, quantizer) == whole
    # The first level alone, whatever is normalised below it.
    first = ResidualKMeans.fit(vectors, (6,))
    alone = reconstruction_error(codes[:, :1], vectors, first)["after_level"]
    assert whole["after_level"][0] == pytest.approx(alone[0], rel=1e-5)


def test_labels_name_what_sets_a_code_apart():
    titles = [
        "red wool hat",
        "blue wool hats",
        "wool hat",
        "steel pot",
        "steel tea pot",
        "the 12 oz",
    ]
    frame = pl.DataFrame({"title": titles, "categories": [["Shop"]] * 6})
    first = np.array([4, 4, 4, 1, 1, 9])
    labels = code_labels(first, frame)
    assert [entry["code"] for entry in labels] == [4, 1, 9]
    assert [entry["items"] for entry in labels] == [3, 2, 1]
    # "shop" is everywhere; "red", "blue" and "tea" are of one item; "hats" repeats "hat".
    assert labels[0]["words"] == ["wool", "hat"]
    assert sorted(labels[1]["words"]) == ["pot", "steel"]
    assert labels[2]["words"] == []
    assert labels[0]["examples"] == titles[:3]


def test_examples_are_central_and_different():
    vectors = np.array([[0, 1.0], [1, 0.1], [1, 0], [1, 0], [1, -0.4]], dtype=np.float32)
    frame = pl.DataFrame({"title": ["far", "near", "same", "same", "other"]})
    found = code_labels(np.zeros(5, dtype=int), frame, vectors)[0]["examples"]
    assert found == ["near", "same", "other"]


def test_labels_of_hostile_titles():
    titles = ["<script>alert(1)</script>" * 1000, "x script y", "", "\u202e" * 50, "  "]
    frame = pl.DataFrame({"title": titles, "categories": [None, ["<b>x"], [], None, None]})
    first = np.array([0, 0, 1, 1, 2])
    entries = code_labels(first, frame)
    words = [word for entry in entries for word in entry["words"]]
    assert words and all(word.isalpha() and len(word) <= 20 for word in words)
    assert max(len(t) for entry in entries for t in entry["examples"]) <= 300
    assert code_labels(first, pl.DataFrame({"item_id": range(5)}))[0]["words"] == []
    bare = code_labels(first, pl.DataFrame({"title": ["1", "2", "3", "4", "5"]}))
    assert all(entry["words"] == [] for entry in bare)


def test_the_map_keeps_clusters_apart():
    rng = np.random.default_rng(0)
    kind = np.arange(120) % 3
    vectors = (np.eye(3)[kind] * 40 + rng.normal(size=(120, 3))).astype(np.float32)
    for method in ("pca", "tsne"):
        drawn = item_map(kind, vectors, method)
        points = np.array([drawn["x"], drawn["y"]]).T
        assert points.min() >= 0 and points.max() <= 1
        centres = np.array([points[kind == k].mean(axis=0) for k in range(3)])
        nearest = np.linalg.norm(points[:, None] - centres, axis=2).argmin(axis=1)
        assert (nearest == kind).mean() > 0.95, method
        assert drawn["code"] == kind.tolist() and drawn["items"] == 120 and not drawn["sampled"]
    some = item_map(kind, vectors, "pca", most=50, seed=1)
    assert some["sampled"] and len(some["x"]) == len(some["code"]) == 50
    assert some == item_map(kind, vectors, "pca", most=50, seed=1)
    line = item_map(kind, vectors[:, :1], "pca")
    assert set(line["y"]) == {0.5} and max(line["x"]) == 1.0
    assert item_map(kind, np.full((120, 3), 0.1, dtype=np.float32), "pca") is None
    assert item_map(kind[:5], vectors[:5]) is None
    with pytest.raises(ValueError, match="'umap' is neither"):
        item_map(kind, vectors, "umap")


def sequences(*rows: list[int]) -> ItemLists:
    return ItemLists(np.concatenate([*map(np.array, rows)]), np.cumsum([0, *map(len, rows)]))


def test_the_report_holds_every_part_and_is_json(vectors):
    _, frame = catalogue(240)
    quantizer = ResidualKMeans.fit(vectors, (12, 8))
    codes = quantizer.encode(vectors)
    train = sequences([0, 12, 24], [0, 12], [5, 7])
    report = quality_report(
        codes, (12, 8), vectors, frame, train, quantizer, {"rate_before": 0.5, "moved": 3},
        (np.array([0, 1]), np.array([12, 13])), map_method="pca",
    )  # fmt: skip
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["vector_neighbours"] == report["neighbours"]["vector"]["same_code"][0] > 0.5
    assert report["copurchase_neighbours"] == report["neighbours"]["copurchase"]["same_code"][0]
    assert report["neighbours"]["held_out"]["pairs"] == 2
    assert [sum(counts) for counts in report["items_by_code"]] == [240, 240]
    assert report["items_by_code"][0] == sorted(report["items_by_code"][0], reverse=True)
    assert report["collision_rate"] > 0 and report["collisions"]["moved"] == 3
    assert set(report["attributes"]) == {"categories", "brand"}
    assert report["reconstruction"]["decoded"] < 0.5 and report["map"]["method"] == "pca"
    assert sum(entry["items"] for entry in report["first_codes"]) == 240


def test_a_report_of_codes_alone():
    report = quality_report(np.array([[0, 1], [1, 0]]), (2, 2))
    assert report["collision_rate"] == 0.0 and report["n_items"] == 2
    for part in ("map", "attributes", "first_codes", "reconstruction", "vector_neighbours"):
        assert report[part] is None
    assert report["neighbours"] == {"vector": None, "copurchase": None, "held_out": None}


@pytest.mark.parametrize(
    ("codes", "sizes", "settings", "words"),
    [
        (np.zeros((0, 2), dtype=int), (2, 2), {}, "there are no items"),
        (np.array([[0, 2]]), (2, 2), {}, "outside its codebook"),
        (np.array([[0]]), (2, 2), {}, "2 levels"),
        (np.array([[0]]), (2,), {"vectors": np.ones((2, 3))}, "vectors has 2 rows, codes has 1"),
        (np.array([[0]]), (2,), {"catalog": pl.DataFrame({"title": []})}, "catalog has 0 rows"),
    ],
)
def test_what_does_not_fit_together_is_refused(codes, sizes, settings, words):
    with pytest.raises(ValueError, match=words):
        quality_report(codes, sizes, **settings)
