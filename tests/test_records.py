from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeprune import records
from edgeprune.errors import ConfigError
from edgeprune.records import Artifact, BenchResult, Limit, PrunePlan, Workload

RECORDS = sorted(
    (
        value
        for value in vars(records).values()
        if isinstance(value, type)
        and dataclasses.is_dataclass(value)
        and value.__module__ == records.__name__
    ),
    key=lambda cls: cls.__name__,
)


def strategy(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field type; containers are kept short."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(st.none() if a is type(None) else strategy(a) for a in typing.get_args(kind)))
    if origin is tuple:
        return st.lists(strategy(typing.get_args(kind)[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(st.text(max_size=5), strategy(typing.get_args(kind)[1]), max_size=2)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = {f.name: strategy(hints[f.name]) for f in dataclasses.fields(kind)}
        return st.builds(kind, **fields)
    return {
        str: st.text(max_size=8),
        int: st.integers(-(2**63), 2**63),
        bool: st.booleans(),
        float: st.floats(allow_nan=False, allow_infinity=False),
    }[kind]


def test_the_records_were_found() -> None:
    assert len(RECORDS) >= 30
    kinds = [cls.kind for cls in RECORDS if hasattr(cls, "kind")]
    assert len(kinds) == len(set(kinds)) >= 15


@pytest.mark.parametrize("cls", RECORDS, ids=lambda c: c.__name__)
def test_records_are_frozen_and_keyword_only(cls: type) -> None:
    params = cls.__dataclass_params__  # type: ignore[attr-defined]
    assert params.frozen
    assert "__slots__" in vars(cls)
    assert all(f.kw_only for f in dataclasses.fields(cls))


@pytest.mark.parametrize("cls", RECORDS, ids=lambda c: c.__name__)
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_json_round_trip(cls: type, data: st.DataObject) -> None:
    value = data.draw(strategy(cls))
    text = records.dumps(value)
    assert records.loads(cls, text) == value
    assert records.dumps(records.loads(cls, text)) == text
    plain = json.loads(text)
    if hasattr(cls, "kind"):
        assert (plain["kind"], plain["schema"]) == (cls.kind, 1)


ARTIFACT = Artifact(
    path="artifacts/m.gguf",
    format="gguf",
    quantization="Q4_0",
    bytes=123,
    sha256="ab",
    made_from="k0",
    key="k1",
)


def changed(**over: Any) -> dict[str, Any]:
    return {**records.to_plain(ARTIFACT), **over}


@pytest.mark.parametrize(
    ("over", "problems"),
    [
        ({"bytes": "123"}, ("record.bytes: expected int, found '123'",)),
        ({"bytes": True}, ("record.bytes: expected int, found True",)),
        ({"bytes": 1.0}, ("record.bytes: expected int, found 1.0",)),
        ({"path": None}, ("record.path: expected str, found None",)),
        ({"byte": 1}, ("record: unknown key 'byte' (did you mean 'bytes'?)",)),
        ({"kind": "budget"}, ("record: not a artifact record",)),
        ({"schema": 2}, ("record: written with another schema; this version reads schema 1",)),
        (
            {"bytes": None, "path": 7},
            ("record.path: expected str, found 7", "record.bytes: expected int, found None"),
        ),
    ],
    ids=str,
)
def test_reading_is_strict(over: dict[str, Any], problems: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        records.from_plain(Artifact, changed(**over))
    assert caught.value.problems == problems


def test_missing_keys_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        records.from_plain(Workload, {"prompt_tokens": 1}, where="w")
    assert caught.value.problems == ("w: missing key 'new_tokens'", "w: missing key 'context_tokens'")


@pytest.mark.parametrize("data", [None, [], "x", 3])
def test_not_a_table(data: Any) -> None:
    with pytest.raises(ConfigError, match="w: expected a table"):
        records.from_plain(Workload, data, where="w")


def test_lists_and_tables_are_checked_inside() -> None:
    plain = {"value": [1], "unit": "x", "source": "y"}
    with pytest.raises(ConfigError, match=r"record\.value: expected float, found \[1\]"):
        records.from_plain(Limit, plain)
    hints = typing.get_type_hints(PrunePlan)
    problems: list[str] = []
    records._build(hints["kept"], {"layers.0.ffn": [1, "2"]}, "plan.kept", problems)
    assert problems == ["plan.kept.layers.0.ffn[1]: expected int, found '2'"]
    problems = []
    records._build(typing.get_type_hints(BenchResult)["decode_ns"], 5, "b.decode_ns", problems)
    assert problems == ["b.decode_ns: expected a list"]


def test_whole_numbers_are_floats_where_floats_are_asked() -> None:
    limit = records.from_plain(Limit, {"value": 5, "unit": "x", "source": "y"})
    assert limit.value == 5.0
    assert type(limit.value) is float


@pytest.mark.parametrize("text", ["", "{", "[1,", "nul", "[" * 100_000])
def test_not_json(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^here: not JSON: "):
        records.loads(Artifact, text, where="here")


def test_only_finite_numbers() -> None:
    with pytest.raises(ConfigError, match=r"record\.value: expected a finite number"):
        records.loads(Limit, '{"value": Infinity, "unit": "x", "source": "y"}')
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite numbers only"):
            records.dumps(Limit(value=bad, unit="x", source="y"))


def test_only_plain_values() -> None:
    with pytest.raises(TypeError, match="plain values only, not set"):
        records.to_plain({"a": {1, 2}})


def test_keys_follow_kind_and_content() -> None:
    key = records.make_key("plan", 1, "a", {"x": 1, "y": 2})
    assert key == records.make_key("plan", 1, "a", {"y": 2, "x": 1})
    assert len(key) == 16 and int(key, 16) >= 0
    others = [
        records.make_key("plan", 1, "a"),
        records.make_key("other", 1, "a", {"x": 1, "y": 2}),
        records.make_key("plan", "1", "a", {"x": 1, "y": 2}),
        records.make_key("plan", 1, "a", {"x": 1, "y": 2.5}),
        records.make_key("plan", 1, ["a", {"x": 1, "y": 2}]),
    ]
    assert len({key, *others}) == 6
    assert records.make_key("a", ARTIFACT) != records.make_key("a", dataclasses.replace(ARTIFACT, bytes=124))
