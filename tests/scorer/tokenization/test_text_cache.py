"""What is kept of texts, within its bounds."""

from __future__ import annotations

from kvatlas.scorer.tokenization.text_cache import Beginning, TextCache


def begun(text: str, tokens: int = 10) -> Beginning:
    """A beginning whose last character decides about what is before it."""
    return Beginning(text, len(text) - 1, bytes(4 * tokens))


def test_the_longest_beginning_of_an_owner_is_found() -> None:
    cache = TextCache(1_000_000)
    for owner, text in ((1, "abc"), (1, "abx"), (2, "abcdef")):
        cache.put_beginning(owner, begun(text))
    found = cache.beginning(1, "abcdefgh")
    assert found is not None
    assert (found.text, found.chars) == ("abc", 2)
    assert cache.beginning(1, "ab") is None
    assert cache.beginning(3, "abcdefgh") is None


def test_a_text_that_goes_on_takes_the_place_of_what_it_began_with() -> None:
    cache = TextCache(1_000_000)
    cache.put_beginning(1, begun("abc" * 100))
    before = cache.used_bytes
    cache.put_beginning(1, begun("abc" * 100 + "d"))
    assert cache.used_bytes == before + 1
    assert cache.beginning(1, "abc" * 100) is None
    cache.drop(1)
    assert cache.used_bytes == 0


def test_beginnings_stay_within_a_quarter_and_parts_within_the_rest() -> None:
    cache = TextCache(100_000)
    cache.put(1, ((f"{number:04}" * 200, bytes(400)) for number in range(200)))
    full = cache.used_bytes
    assert 90_000 < full <= 100_000
    for number in range(40):
        cache.put_beginning(1, begun(f"{number:04}" * 500))
        assert cache.used_bytes <= 100_000
    assert cache.beginning(1, "0039" * 501) is not None
    assert cache.beginning(1, "0000" * 501) is None
    assert cache.get(1, ["0199" * 200]) != [None]
    cache.put_beginning(1, begun("y" * 20_000))  # more than an eighth
    assert cache.beginning(1, "y" * 20_001) is None
    for number in range(100):
        cache.put_beginning(2, begun(f"{number:04}"))
    assert cache.beginning(1, "0039" * 501) is None  # there are so many at most
