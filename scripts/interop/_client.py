"""What the Python clients print: the text, or with a list of texts one JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence

NEW_TOKENS = 24


def answer(
    name: str,
    version: str,
    *,
    given: Sequence[int],
    made: Sequence[int],
    text: str,
    encode: Callable[[str], Sequence[int]],
    texts: str | None,
    **more: object,
) -> int:
    """Print what a client generated; 1 when it was nothing. `texts`: a JSON file, `encode` adds no tokens."""
    if not made:
        print(f"Error: {name} generated nothing", file=sys.stderr)
        return 1
    if texts is None:
        print(text)
        return 0
    with open(texts, encoding="utf-8") as file:
        asked = json.load(file)
    found = {
        "version": version,
        "given": [int(i) for i in given],
        "made": [int(i) for i in made],
        "text": text,
        "ids": [[int(i) for i in encode(t)] for t in asked],
        **more,
    }
    print(json.dumps(found))
    return 0
