"""What is asked of a recovery; plain values, loads without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgeprune.errors import ConfigError
from edgeprune.registry import names, suggest

AUTO = "auto"
OBJECTIVES = ("distill", "lm")
PRECISIONS = ("auto", "float32")
DEFAULT_MINUTES = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryRecipe:
    """Method and its switches, objective, text, and what ends it: minutes, tokens, or both."""

    method: str
    options: dict[str, str] = field(default_factory=dict)
    objective: str = "distill"
    mix: float = 0.5  # share of the KL in 'distill'; the rest is the plain loss on the text
    minutes: float | None = None  # of wall time, writing the text included
    tokens: int | None = None  # of training
    data: str | None = None  # file or data set; None: written by the parent
    samples: int = 256  # windows that the parent writes, at most
    length: int = 256  # tokens of a window
    batch: int = 8  # windows of a step, over all processes
    rate: float | None = None  # None: the method's
    quantization: str | None = (
        None  # type that the result will be stored in, for methods that train through it
    )
    seed: int = 0
    gradient_checkpointing: bool = False
    precision: str = "auto"  # bfloat16 products where the machine is fast at them; or float32
    shard: bool = False  # FSDP: processes share the weights out among them
    checkpoint_s: float = 60.0  # between checkpoints; changes no result

    @property
    def steps(self) -> int | None:
        return None if self.tokens is None else max(1, self.tokens // (self.length * self.batch))


def methods() -> tuple[str, ...]:
    """Names a user may give."""
    return (AUTO, *names("recovery.methods"))


def check(recipe: RecoveryRecipe) -> None:
    """Refuse what cannot be done, before the slow part. Raises ConfigError listing every problem."""
    problems = []
    if recipe.method not in methods():
        problems.append(f"unknown recovery '{recipe.method}'{suggest(recipe.method, methods())}")
    if recipe.objective not in OBJECTIVES:
        problems.append(f"unknown recovery objective '{recipe.objective}'")
    if recipe.precision not in PRECISIONS:
        problems.append(f"unknown recovery precision '{recipe.precision}'")
    if recipe.method == AUTO and recipe.minutes is None:
        problems.append("--recovery auto shares out minutes: give --recovery-minutes")
    if recipe.method == AUTO and recipe.options:
        problems.append("--recovery-option belongs to one method, and auto tries several")
    if recipe.minutes is None and recipe.tokens is None:
        problems.append("recovery has no end: give --recovery-minutes or --recovery-tokens")
    if problems:
        raise ConfigError(problems, f"methods: {', '.join(methods())}")
