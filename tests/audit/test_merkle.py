"""Roots against the test vectors of certificate transparency, and every path of small trees."""

from __future__ import annotations

import pytest

from genrec.audit.merkle import leaf_hash, path, root, root_from_path

# Inputs and roots of the reference tests of certificate-transparency-go (trees of 0 to 8 leaves).
INPUTS = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657",
    "606162636465666768696a6b6c6d6e6f"]  # fmt: skip
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
LEAVES = [leaf_hash(bytes.fromhex(text)) for text in INPUTS]


@pytest.mark.parametrize("size", range(9))
def test_roots_are_those_of_the_reference(size):
    assert root(LEAVES[:size]) == ROOTS[size]


@pytest.mark.parametrize("size", range(1, 20))
def test_each_path_leads_to_the_root_and_no_other_does(size):
    leaves = [leaf_hash(bytes([n])) for n in range(size)]
    top = root(leaves)
    for place, leaf in enumerate(leaves):
        steps = path(leaves, place)
        assert root_from_path(leaf, place, size, steps) == top
        assert root_from_path(leaf_hash(b"other"), place, size, steps) != top
        if size > 1:
            assert root_from_path(leaf, place, size, [leaf, *steps[1:]]) != top
            with pytest.raises(ValueError, match="too short"):
                root_from_path(leaf, place, size, steps[:-1])
        with pytest.raises(ValueError, match="too long"):
            root_from_path(leaf, place, size, [*steps, top])


def test_places_outside_the_tree():
    with pytest.raises(ValueError, match="place=3 is no leaf of a tree of 3"):
        path(LEAVES[:3], 3)
    with pytest.raises(ValueError, match="place=-1"):
        root_from_path(LEAVES[0], -1, 3, [])
