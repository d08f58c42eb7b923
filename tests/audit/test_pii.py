"""What is masked, what looks like it and isn't, and item ids, which never are."""

from __future__ import annotations

import pytest

from genrec.audit.pii import iban_holds, luhn, mask


@pytest.mark.parametrize(
    ("text", "masked", "counts"),
    [
        ("write to Jo.Doe+x@mail.example.org.", "write to [email].", {"email": 1}),
        ("a@b.co, c@d.eu", "[email], [email]", {"email": 2}),
        ("an müller.hans@example.de, jürgen@bücher.de", "an [email], [email]", {"email": 2}),
        (
            "иван@почта.рф or mu\u0308ller@xn--bcher-kva.xn--p1ai",
            "[email] or [email]",
            {"email": 2},
        ),
        ("IBAN DE89 3704 0044 0532 0130 00!", "IBAN [iban]!", {"iban": 1}),
        ("GB82WEST12345698765432", "[iban]", {"iban": 1}),
        ("de89 3704 0044 0532 0130 00 bitte", "[iban] bitte", {"iban": 1}),
        ("at61 1904 3002 3457 3201 bank data", "[iban] bank data", {"iban": 1}),
        ("gb82west12345698765432, fr1420041010050500013m02606", "[iban], [iban]", {"iban": 2}),
        ("no12 blue 0815 GB82 WEST 1234 5698 7654 32", "no12 blue 0815 [iban]", {"iban": 1}),
        ("card 4111.1111.1111.1111, 3782.822463.10005.", "card [card], [card].", {"card": 2}),
        ("card 4111 1111 1111 1111 here", "card [card] here", {"card": 1}),
        ("378282246310005", "[card]", {"card": 1}),
        ("from 192.168.0.17, then", "from [ip], then", {"ip": 1}),
        ("at 192.168.1.1:8080 and 10.0.0.1: no", "at [ip]:8080 and [ip]: no", {"ip": 2}),
        ("from 2001:db8::1 today", "from [ip] today", {"ip": 1}),
        ("call +49 30 1234567 now", "call [phone] now", {"phone": 1}),
        ("call (212) 555-0142 or 030-123 45 67", "call [phone] or [phone]", {"phone": 2}),
    ],
)
def test_personal_data_is_masked_and_counted(text, masked, counts):
    assert mask(text) == (masked, counts)


@pytest.mark.parametrize(
    "text",
    [
        "", "Shampoo 250 ml, pack of 12", "B00005N7P0", "4111 1111 1111 1112",  # Luhn fails
        "DE88 3704 0044 0532 0130 00",  # mod 97 fails
        "version 1.2.3.4.5", "999.1.1.1", "at 12:30:45", "std::vector", "@home", "2014-07-22",
        "<a_12><b_7><c_99>", "0000 0000 0000 0000", "ISBN 9780306406158", "Δ 1.25, 0.3125",
        "de88 3704 0044 0532 0130 00", "4111.1111.1111.1112", "4111.1111.1111.1111.1",
        "gb74 pink rose face mask pack", "gb19 blue tiny cars long tops", "2 @ 1.99each", "me@home",
        "sizes 1.25 0.50 2.75 3.10 4.05 5.60 7.85", "sizes 10.12.14.16.18.20.22.24",
        "Crème brûlée @ Café, 3.5 oz", "AC/DC 4.5:1, 12:30:45:10", "5.0.0.1.2:1",
    ],
)  # fmt: skip
def test_what_only_looks_like_it_stays(text):
    assert mask(text) == (text, {})


def test_item_ids_are_never_masked():
    ids = [4111111111111111, "010-123-4567", "shop@items.example"]
    text = "items 4111111111111111, 010-123-4567 and shop@items.example; me@items.example"
    masked, counts = mask(text, ids)
    assert masked == text.replace("me@items.example", "[email]") and counts == {"email": 1}
    assert mask(text)[1] == {"card": 1, "phone": 1, "email": 2}


def test_an_item_id_inside_a_longer_number_saves_nothing():
    assert mask("4111111111111111", ["4111"]) == ("[card]", {"card": 1})


def test_check_digits():
    assert luhn("79927398713") and not luhn("79927398710")
    assert iban_holds("NO9386011117947") and not iban_holds("NO9386011117948")
