"""Dataclass fields that declare which values they may hold.

    sync_steps: Annotated[int | None, whole(1, "Use 1 to exchange after every step.")] = None

The rule is part of the annotation (PEP 593) and not of the field's metadata, because transformers' HfArgumentParser
passes all metadata on to argparse.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Kind = TypeVar("Kind", bound="DataclassInstance")


@dataclass(frozen=True)
class Rule:
    """What a field may hold.

    Args:
        text: what the value must be, in the words of the error.
        remedy: what to do instead.
        holds: whether a value is allowed. None is not passed to it if the type allows None.
    """

    text: str
    remedy: str
    holds: Callable[[Any], bool]


def number(interval: str, remedy: str) -> Rule:
    """A number in an interval such as "[0, inf)", which contains neither infinity nor NaN."""
    low, high = map(float, interval[1:-1].split(","))

    def holds(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        above_low = value > low or (value == low and interval[0] == "[")
        return above_low and (value < high or (value == high and interval[-1] == "]"))

    return Rule(f"a number in {interval}", remedy, holds)


def whole(at_least: int, remedy: str) -> Rule:
    """An integer of at least `at_least`."""
    return Rule(f"an integer >= {at_least}", remedy, lambda value: type(value) is int and value >= at_least)


def one_of(choices: Sequence[str | int], remedy: str) -> Rule:
    """One of a few words or numbers."""
    return Rule(f"one of {', '.join(map(repr, choices))}", remedy, lambda value: value in tuple(choices))


def check_field(kind: type, name: str, value: Any) -> None:
    """Raises ValueError if the field `name` of the dataclass `kind` may not hold `value`."""
    optional, about = _annotations(kind)[name]
    if optional and value is None:
        return
    for rule in about:
        if isinstance(rule, Rule) and not rule.holds(value):
            text = f"{rule.text} or None" if optional else rule.text
            raise ValueError(f"`{name}` must be {text}, got {value!r}. {rule.remedy}")


def check_fields(kind: type, instance: Any) -> None:
    """Checks the fields of the dataclass `kind`, but not those of classes it is mixed into; see `check_field`."""
    for each in fields(kind):
        check_field(kind, each.name, getattr(instance, each.name))


def marked(kind: type, mark: Any) -> tuple[str, ...]:
    """The names of the fields whose annotation contains `mark`."""
    return tuple(name for name, (_, about) in _annotations(kind).items() if mark in about)


def by_name(kind: type[Kind], source: Any, **others: Any) -> Kind:
    """An instance of the dataclass `kind`, with each field taken from `others` or else from `source`, by name."""
    names = [each.name for each in fields(kind) if each.name not in others]
    return kind(**{name: getattr(source, name) for name in names}, **others)


def help_from_docstring(cls: type) -> type:
    """Decorator, applied before `dataclass`: makes each field's paragraph of the docstring, `    name (...): text`, its
    help on the command line."""
    paragraphs = re.findall(r"^    (\w+) \(.*?\): (.+(?:\n {8}.+)*)", inspect.cleandoc(cls.__doc__ or ""), re.MULTILINE)
    help_of = {name: " ".join(text.split()).replace("%", "%%") for name, text in paragraphs}  # argparse expands %
    for name in cls.__annotations__:
        setattr(cls, name, field(default=vars(cls)[name], metadata={"help": help_of.get(name)}))
    return cls


@functools.cache
def _annotations(kind: type) -> dict[str, tuple[bool, tuple[Any, ...]]]:
    """For each field, whether its type allows None, and the rest of its annotation."""
    hints = get_type_hints(kind, include_extras=True)
    found = {}
    for each in fields(kind):
        bare, *about = get_args(hints[each.name]) if get_origin(hints[each.name]) is Annotated else [hints[each.name]]
        found[each.name] = type(None) in get_args(bare), tuple(about)
    return found
