"""MovieLens: each of GroupLens' layouts in its published form."""

from __future__ import annotations

from pathlib import Path

import pytest

from genrec.data.readers import movielens_files, read_movielens

RATINGS_CSV = "userId,movieId,rating,timestamp\n1,1,4.0,964982703\n1,3,0.5,964981247\n"
MOVIES_CSV = (
    "movieId,title,genres\n"
    '1,"Cité, La (1995)",Adventure|Children\n'
    '3,"Say ""Hi"" (1999)",(no genres listed)\n'
)


def write(folder: Path, name: str, text: str, encoding: str = "utf-8") -> None:
    (folder / name).write_bytes(text.encode(encoding))


def ml_100k(folder: Path, header: bool, encoding: str) -> Path:
    genres = ["0"] * 19
    genres[1] = genres[5] = "1"
    names = "unknown|Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|Drama|Fantasy"
    names += "|Film-Noir|Horror|Musical|Mystery|Romance|Sci-Fi|Thriller|War|Western"
    item = f'1|"Café (1995)|01-Jan-1995||http://x|{"|".join(genres)}\n'
    other = f"2|unknown|||{''}|1|{'|'.join(['0'] * 18)}\n"
    user = "5|24|M|technician|85711\n"
    heads = ("item|title|releaseDate|videoReleaseDate|imdbURL|" + names, "user|age|gender|job|zip")
    write(folder, "u.data", "5\t1\t4\t881250949\n5\t2\t2\t881250948\n")
    write(folder, "u.item", (heads[0] + "\n" if header else "") + item + other, encoding)
    write(folder, "u.user", (heads[1] + "\n" if header else "") + user)
    return folder


def ml_1m(folder: Path) -> Path:
    write(folder, "ratings.dat", "1::1193::5::978300760\n2::661::3::978302109\n")
    films = '661::Léon: The "Pro" (1994)::Crime|Drama\n1193::Alien::Sci-Fi\n'
    write(folder, "movies.dat", films, "latin-1")
    write(folder, "users.dat", "1::F::1::10::48067\n2::M::56::16::70072-1234\n3::M::25::99::1\n")
    return folder


@pytest.mark.parametrize(("header", "encoding"), [(False, "latin-1"), (True, "utf-8")])
def test_100k_in_both_forms(tmp_path, header, encoding):
    raw = read_movielens(ml_100k(tmp_path, header, encoding))
    assert raw.interactions.rows() == [(5, 1, 881250949, 4.0), (5, 2, 881250948, 2.0)]
    assert raw.catalog.rows() == [(1, '"Café (1995)', ["Action", "Comedy"]), (2, "unknown", [])]
    assert raw.users is not None
    assert raw.users.rows() == [(5, 24, "M", "technician")]


@pytest.mark.parametrize(
    ("file", "more", "message"),
    [
        ("u.item", "\n", "item_id is missing .1 such rows"),
        ("u.data", "\t1\t4\t881250949\n", "user_id is missing"),
        ("u.data", "5\t\t4\t881250949\n", "item_id is missing"),
        ("u.user", "5|24|M|technician|85711\n", "must be unique, 5"),
    ],
)
def test_rows_without_ids_and_users_twice_are_refused(tmp_path, file, more, message):
    ml_100k(tmp_path, False, "utf-8")
    with (tmp_path / file).open("a") as opened:
        opened.write(more)
    with pytest.raises(ValueError, match=message):
        read_movielens(tmp_path)


def test_1m_with_its_codes_written_out(tmp_path):
    raw = read_movielens(ml_1m(tmp_path))
    assert raw.interactions.columns == ["user_id", "item_id", "timestamp", "rating"]
    assert raw.interactions.rows() == [(1, 1193, 978300760, 5.0), (2, 661, 978302109, 3.0)]
    assert raw.catalog.rows() == [
        (661, 'Léon: The "Pro" (1994)', ["Crime", "Drama"]), (1193, "Alien", ["Sci-Fi"]),
    ]  # fmt: skip
    assert raw.users is not None
    assert raw.users.columns == ["user_id", "age", "gender", "occupation"]
    assert raw.users.rows() == [
        (1, "Under 18", "F", "K-12 student"),
        (2, "56+", "M", "self-employed"),
        (3, "25-34", "M", None),  # a code that the README doesn't have
    ]


def test_10m_has_half_stars_and_no_users(tmp_path):
    ml_1m(tmp_path)
    (tmp_path / "users.dat").unlink()
    write(tmp_path, "ratings.dat", "1::661::3.5::978302109\n")
    raw = read_movielens(tmp_path)
    assert raw.users is None
    assert raw.interactions.rows() == [(1, 661, 978302109, 3.5)]


def test_csv_releases(tmp_path):
    write(tmp_path, "ratings.csv", RATINGS_CSV)
    write(tmp_path, "movies.csv", MOVIES_CSV)
    raw = read_movielens(tmp_path)
    assert raw.interactions.rows() == [(1, 1, 964982703, 4.0), (1, 3, 964981247, 0.5)]
    assert raw.catalog.rows() == [
        (1, "Cité, La (1995)", ["Adventure", "Children"]), (3, 'Say "Hi" (1999)', []),
    ]  # fmt: skip
    assert raw.users is None
    assert movielens_files(tmp_path) == {
        "ratings": tmp_path / "ratings.csv", "items": tmp_path / "movies.csv",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("u.user", "5|24|M\n", r"u.user has 3 fields a row, it should have 5; use .* ml-100k"),
        ("u.data", "5\t1\t4\n", r"u.data has 3 fields a row, it should have 4"),
        ("u.data", "5\tx\t4\t881250949\n", r"u.data can't be read"),
        (
            "u.data",
            "5\t9\t4\t881250949\n",
            r"1 interactions .* have 1 items that .*u.item lacks: 9",
        ),
        ("u.item", "", r"u.item is empty"),
    ],
)
def test_100k_with_faults(tmp_path, name, text, message):
    write(ml_100k(tmp_path, False, "utf-8"), name, text)
    with pytest.raises(ValueError, match=message):
        read_movielens(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ratings.dat", "1::661::3\n", r"ratings.dat"),
        ("ratings.dat", "1::661::3::9\n1:x:661::3::978302109\n", r"ratings.dat row 2: expected u"),
        ("ratings.dat", "1::661::good::978302109\n", r"ratings.dat can't be read.*good"),
        ("movies.dat", "661::Alien\n", r"movies.dat has 2 fields a row, it should have 3"),
        ("users.dat", "1::F\n", r"users.dat has 2 fields a row, it should have 5"),
    ],
)
def test_dat_files_with_faults(tmp_path, name, text, message):
    write(ml_1m(tmp_path), name, text)
    with pytest.raises(ValueError, match=message):
        read_movielens(tmp_path)


def test_csv_files_with_faults(tmp_path):
    with pytest.raises(ValueError, match=r"has none of u.data, ratings.dat, ratings.csv"):
        read_movielens(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere is not a folder"):
        read_movielens(tmp_path / "nowhere")
    write(tmp_path, "ratings.csv", RATINGS_CSV)
    with pytest.raises(ValueError, match=r"lacks movies.csv"):
        read_movielens(tmp_path)
    write(tmp_path, "movies.csv", MOVIES_CSV)
    write(tmp_path, "ratings.csv", RATINGS_CSV.replace("userId", "user"))
    with pytest.raises(ValueError, match="has no column 'userId'"):
        read_movielens(tmp_path)
    write(tmp_path, "ratings.csv", RATINGS_CSV.replace("0.5", "bad"))
    with pytest.raises(ValueError, match=r"ratings.csv can't be read as csv.*bad"):
        read_movielens(tmp_path)
    write(tmp_path, "ratings.csv", RATINGS_CSV.replace("1,3,", "1,,"))
    with pytest.raises(ValueError, match=r"ratings.csv has empty fields"):
        read_movielens(tmp_path)
