"""How users write column transforms: 'auto', 'quantile', 'mass=log,phi=angle,eff=logit(0:1),*=recorded+quantile'."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("auto", "standardize", "log", "logit", "student", "quantile", "angle", "recorded")
FORMS = "auto, standardize, log(LOW), logit(LOW:HIGH), student, quantile(KNOTS), angle(PERIOD), recorded(STEP)"
NONE = "none"  # no transforms at all
MAX_KNOTS = 4096
_WANTED = {"log": (0, 1), "logit": (2, 2), "quantile": (0, 1), "angle": (0, 1), "recorded": (0, 1)}  # numbers


@dataclass(frozen=True)
class Transform:
    """One kind with its numbers, as written."""

    kind: str
    numbers: tuple[float, ...] = ()

    def __str__(self) -> str:
        return self.kind + (f"({':'.join(f'{n:.6g}' for n in self.numbers)})" if self.numbers else "")


Chain = tuple[Transform, ...]
STANDARDIZE: Chain = (Transform("standardize"),)


def shown(chain: Chain) -> str:
    return "+".join(str(transform) for transform in chain)


def as_text(transform: str | Mapping[Any, str]) -> str:
    """What is written for {"mass": "log", "*": "quantile"}, of names or numbers of columns; text as it is.

    Raises ValueError for a column or a kind that cannot be written so, TypeError for anything else.
    """
    if isinstance(transform, str):
        return transform
    if not isinstance(transform, Mapping) or not all(isinstance(kind, str) for kind in transform.values()):
        raise TypeError(f"transform must be text or {{column: text}}, got {transform!r}")
    for column, kind in transform.items():
        if "," in str(column) or "," in kind:
            raise ValueError(f"transform {column!r}: no commas in names or kinds; say the column's number, from 0")
    if not transform:
        raise ValueError("transform names no column: 'none' is for none")
    return ",".join(f"{column}={kind}" for column, kind in transform.items())


def parse(text: str) -> list[tuple[str, Chain]]:
    """What is written, as (column or '*', its transforms in order); ValueError that says what is wrong.

    Entries are separated by commas outside parentheses. An entry without '=' is for all columns.
    """
    found: list[tuple[str, Chain]] = []
    for entry in re.split(r",(?![^()]*\))", text):
        name, equals, chain = entry.rpartition("=")
        name = name.strip() if equals else "*"
        if not name or not chain.strip():
            raise ValueError(f"transform {entry.strip()!r} is not of the form COLUMN=KIND, with a KIND of {FORMS}")
        if any(name == other for other, _ in found):
            raise ValueError(f"transform names column {name!r} twice")
        each = tuple(_one(part.strip()) for part in chain.split("+"))
        if len(each) > 1 and any(transform.kind == "standardize" for transform in each):
            raise ValueError(
                f"transform {chain.strip()!r}: standardize stands alone, and comes behind all others anyway"
            )
        found.append((name, each))
    return found


def _one(text: str) -> Transform:
    match = re.fullmatch(r"([a-z]+)\s*(?:\(([^()]*)\))?", text)
    if match is None or match[1] not in KINDS:
        raise ValueError(f"transform {text!r} is none of {FORMS}")
    kind = match[1]
    numbers = tuple(_number(part, text) for part in match[2].split(":")) if match[2] else ()
    fewest, most = _WANTED.get(kind, (0, 0))
    if not fewest <= len(numbers) <= most:
        what = {"logit": "needs its bounds: logit(LOW:HIGH)", "log": "takes one bound: log(LOW)"}
        raise ValueError(f"transform {text!r} {what.get(kind, 'takes ' + ('one number' if most else 'no numbers'))}")
    if kind == "logit" and not numbers[0] < numbers[1]:
        raise ValueError(f"transform {text!r} needs LOW below HIGH")
    if kind in ("angle", "recorded") and numbers and not numbers[0] > 0:
        raise ValueError(f"transform {text!r} needs a positive number")
    if kind == "quantile" and numbers and not (numbers[0] == int(numbers[0]) and 2 <= numbers[0] <= MAX_KNOTS):
        raise ValueError(f"transform {text!r} needs a whole number of knots from 2 to {MAX_KNOTS}")
    return Transform(kind, numbers)


def _number(text: str, whole: str) -> float:
    """'-1.5', 'pi', '2pi'."""
    match = re.fullmatch(r"([+-]?)([\d.eE+-]*?)\s*(pi)?", text.strip())
    try:
        if match is None or not (match[2] or match[3]):
            raise ValueError
        value = float(match[2] or 1.0) * (math.pi if match[3] else 1.0)
    except ValueError:
        raise ValueError(f"transform {whole!r}: {text.strip()!r} is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"transform {whole!r}: {text.strip()!r} is not finite")
    return -value if match[1] == "-" else value


def chains(text: str, n_features: int, columns: Sequence[str] | None) -> list[Chain]:
    """The transforms of every column; those that no entry names are standardised.

    A column is named by its name, or by its number counted from 0 where no column has such a name.
    ValueError that names what is not there.
    """
    result: list[Chain | None] = [None] * n_features
    default = STANDARDIZE
    for name, chain in parse(text):
        if name == "*":
            default = chain
            continue
        places = [i for i, known in enumerate(columns or ()) if known == name]
        if not places and re.fullmatch(r"\d{1,9}", name) and int(name) < n_features:
            places = [int(name)]
        if len(places) != 1:
            problem = "is the name of several columns: use its number" if places else "is not a column of the data"
            known = f" ({', '.join(columns[:20])})" if columns and not places else ""
            raise ValueError(f"transform: {name!r} {problem}{known}")
        if result[places[0]] is not None:
            raise ValueError(f"transform names column {name!r} twice")
        result[places[0]] = chain
    return [default if chain is None else chain for chain in result]
