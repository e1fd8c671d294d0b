from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import ConfigError
from edgeprune.units import BYTE_UNITS, format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("200MB", 200_000_000),
        ("6GB", 6_000_000_000),
        ("6GiB", 6 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("512 MiB", 512 * 2**20),
        (" 1kB ", 1000),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("7B", 7),
        ("0.1GB", 100_000_000),
    ],
)
def test_parse_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("6G", "size '6G' has unknown unit 'G'", "did you mean 6GB?"),
        ("6gb", "size '6gb' has unknown unit 'gb'", "did you mean 6GB?"),
        ("6Gib", "size '6Gib' has unknown unit 'Gib'", "did you mean 6GiB?"),
        ("6", "size '6' is not a number followed by a unit", "write it like 200MB"),
        ("", "size '' is not a number followed by a unit", "write it like"),
        ("-6GB", "size '-6GB' is not a number followed by a unit", "write it like"),
        ("1e3MB", "size '1e3MB' is not a number followed by a unit", "write it like"),
        ("٣GB", "size '٣GB' is not a number followed by a unit", "write it like"),
        ("0GB", "size '0GB' must be at least one byte", "give a positive size"),
        ("9999999TiB", "size '9999999TiB' is beyond any device", "check the unit"),
        ("6 parsecs", "size '6 parsecs' has unknown unit 'parsecs'", "units: B, kB"),
    ],
)
def test_parse_bytes_refuses(text: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_bytes(text)
    assert caught.value.problems == (message,)
    assert hint in str(caught.value.hint)


def test_refusal_names_the_option() -> None:
    with pytest.raises(ConfigError, match=r"^--budget '6G' has unknown unit 'G'$"):
        parse_bytes("6G", what="--budget")


@given(st.integers(1, 2**20), st.sampled_from(sorted(BYTE_UNITS)))
def test_whole_numbers_are_exact(n: int, unit: str) -> None:
    expected = n * BYTE_UNITS[unit]
    if expected <= 2**60:
        assert parse_bytes(f"{n}{unit}") == expected
        assert parse_bytes(f"  {n} {unit} ") == expected


@given(st.text(max_size=12))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        assert 1 <= parse_bytes(text) <= 2**60
    except ConfigError as error:
        assert error.exit_code == 2
        assert error.hint


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (143_000_000, "143 MB"),
        (6_000_000_000, "6.00 GB"),
        (99_950, "100 kB"),
        (9_995, "10.0 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (5e12, "5000 GB"),
    ],
)
def test_format_bytes(n: float, text: str) -> None:
    assert format_bytes(n) == text


@given(st.integers(1, 10**12))
def test_printed_bytes_read_back_within_a_percent(n: int) -> None:
    assert parse_bytes(format_bytes(n)) == pytest.approx(n, rel=0.0051)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.4, "59 min 59 s"),
        (7800, "2 h 10 min"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
