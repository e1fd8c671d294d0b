"""Errors a user can act on; each class has its own exit code."""

from __future__ import annotations

from collections.abc import Sequence


class EdgepruneError(Exception):
    """What was wrong and where (`message`), and what to do next (`hint`)."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class ConfigError(EdgepruneError):
    """Bad input or configuration; carries every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str], hint: str | None = None) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("; ".join(self.problems), hint)


class InfeasibleError(EdgepruneError):
    """No plan or candidate meets the budget; the message names the nearest and the limit."""

    exit_code = 3


class UnsupportedModelError(EdgepruneError):
    """A family we do not know, or a shape the family does not cover."""

    exit_code = 4


class MissingExtraError(EdgepruneError):
    """An optional library is absent; the hint names the extra that brings it."""

    exit_code = 5

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(
            f"this needs the library '{library}', which is not installed",
            f"pip install 'edgeprune[{extra}]'",
        )
        self.extra = extra


class StageError(EdgepruneError):
    """An exporter, runtime or device failed; the message carries its last words."""

    exit_code = 6


class DeviceError(StageError):
    """A device could not be reached or could not measure; `kind` is the reason in one word."""

    def __init__(self, kind: str, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.kind = kind
