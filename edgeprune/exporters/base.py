"""What an export format has to say about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgeprune.families.base import Family
from edgeprune.records import Constraints, ModelDims


@dataclass(frozen=True, slots=True, kw_only=True)
class Exporter:
    """One export format.

    Attributes:
        suffix: file name ending, with the dot.
        extra: the optional dependency group that brings the format's library.
        quantizations: names accepted, the least compressed first.
        constraints: (family, dims, quantization) to the shapes that load; loads no library.
        file_cost: (family, config, tokenizer metadata, …) to an object that predicts bytes.
        export: writes one file; see the module for its arguments.
        verify_readback: reads the file back; its bytes, or StageError when it is not what was planned.
    """

    name: str
    summary: str
    reference: str
    suffix: str
    extra: str
    quantizations: tuple[str, ...]
    constraints: Callable[[Family, ModelDims, str], Constraints]
    file_cost: Callable[..., Any]
    export: Callable[..., int]
    verify_readback: Callable[..., int]
