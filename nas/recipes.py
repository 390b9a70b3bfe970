"""Recipes: frozen dataclasses of plain values, whose types, ranges and finiteness are checked when they are built:

    @recipe
    class Blur:
        radius: Count = 1
        kind: Literal["box", "gaussian"] = "box"

An annotation is the check, by pydantic in strict mode: no text for a number, no true for one, no infinity. Values stay as they were given,
but for lists, which become tuples, so that a recipe can be hashed. A dataclass without the decorator is checked by `check_recipes`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache, partial
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from nas.contracts import OPTIONAL, UserError, frozen

Count = Annotated[int, Field(ge=1, le=10**9)]
Natural = Annotated[int, Field(ge=0, le=10**9)]
Few = Annotated[int, Field(ge=1, le=4096)]
"""Of what is made or looked at for each single decision, or is the size of a layer."""
Batch = Annotated[int, Field(ge=1, le=10**6)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]

T = TypeVar("T")


@overload
def recipe(cls: type[T], /) -> type[T]: ...
@overload
def recipe(*, kw_only: bool = False) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def recipe(cls: type[T] | None = None, /, *, kw_only: bool = False) -> type[T] | Callable[[type[T]], type[T]]:
    """A frozen dataclass that checks its fields before its own `__post_init__` runs."""

    def decorate(cls: type[T]) -> type[T]:
        own: Callable[[Any], None] | None = cls.__dict__.get("__post_init__")
        if own is not None or not hasattr(cls, "__post_init__"):

            def checked(self: Any) -> None:
                check_recipe(self)
                if own is not None:
                    own(self)

            cls.__post_init__ = checked  # type: ignore[attr-defined]
        cls.__checked__ = True  # type: ignore[attr-defined]
        return dataclass(frozen=True, kw_only=kw_only)(cls)

    return decorate if cls is None else decorate(cls)


def check_recipe(made: Any) -> None:
    """Raises UserError, naming the recipe, its field, the value and what it should be, where a field is not what its annotation says.
    Lists of a frozen dataclass become tuples."""
    adapters = _adapters(type(made))  # type: ignore[arg-type]
    for one in fields(made):
        value = getattr(made, one.name)
        if isinstance(value, list):
            value = frozen(value)
            object.__setattr__(made, one.name, value)
        if _too_long(value):
            raise UserError(
                f"{type(made).__name__}: {one.name}={_shown(value)}: it should be less than 2^63, or have a decimal point"
            )
        if one.name in adapters:
            try:
                adapters[one.name].validate_python(value)
            except ValidationError as error:
                raise UserError(f"{type(made).__name__}: {one.name}={_shown(value)}: {_reason(error, value)}") from None


def _too_long(value: Any) -> bool:
    """Whether there is an integer that the libraries below cannot take, where a number is asked for."""
    if isinstance(value, tuple):
        return any(map(_too_long, value))
    return isinstance(value, int) and abs(value) >= 2**63


def check_recipes(*parts: Any) -> None:
    """Checks dataclasses that did not check themselves, and those that they hold."""
    for part in parts:
        if is_dataclass(part) and not isinstance(part, type):
            if not getattr(type(part), "__checked__", False):
                check_recipe(part)
            for one in fields(part):
                check_recipes(*_inside(getattr(part, one.name, None)))


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        yield from value
    elif isinstance(value, Mapping):
        yield from value.values()
    else:
        yield value


@lru_cache(maxsize=512)
def _adapters(cls: Any) -> dict[str, TypeAdapter[Any]]:
    """By field; a field whose annotation means nothing here is not checked."""
    found: dict[str, TypeAdapter[Any]] = {}
    try:
        hints = get_type_hints(cls, include_extras=True)
    except (NameError, TypeError):  # names for a type checker alone
        return found
    config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    for one in fields(cls):
        try:
            found[one.name] = TypeAdapter(_plain(hints[one.name]), config=config)
        except (PydanticSchemaGenerationError, PydanticUserError, KeyError):
            continue
    return found


def _plain(hint: Any) -> Any:
    """The annotation with classes as checks of an instance, and protocols as checks of what they name."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return Annotated[hint, BeforeValidator(partial(_no_truth, arguments))]
    if origin is Annotated:
        return Annotated[(_plain(arguments[0]), *hint.__metadata__)]
    if origin in (Union, types.UnionType):
        return Union[tuple(_plain(one) for one in arguments)]  # noqa: UP007  made of a tuple
    if origin is tuple or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return types.GenericAlias(origin, tuple(one if one is ... else _plain(one) for one in arguments))
    if isinstance(hint, type) and getattr(hint, "_is_protocol", False):
        return Annotated[Any, AfterValidator(partial(_offers, hint))]
    if isinstance(hint, type) and hint is not Any and hint.__module__ != "builtins":
        return Annotated[Any, AfterValidator(partial(_is_a, hint))]
    return hint


def _no_truth(known: tuple[Any, ...], value: Any) -> Any:
    """True equals 1 for Python, but is no number of channels."""
    if isinstance(value, bool) and not any(isinstance(one, bool) for one in known):
        raise ValueError(f"it should be {' or '.join(map(repr, known))}")
    return value


def _is_a(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"it should be a {kind.__name__}")
    return value


def _offers(protocol: type, value: Any) -> Any:
    names = [name for base in protocol.__mro__ for name in vars(base) if not name.startswith("_")]
    names = [name for name in names if name not in OPTIONAL.get(protocol.__name__, ())]
    missing = [name for name in names if not hasattr(type(value), name) and name not in getattr(value, "__dict__", {})]
    if missing:
        raise ValueError(f"it is no {protocol.__name__}, for it has no {', '.join(dict.fromkeys(missing))}")
    return value


def _reason(error: ValidationError, value: Any) -> str:
    """What pydantic found, in one line, with the place inside the value where it is not all of it."""
    told: list[str] = []
    for found in error.errors(include_url=False, include_context=False):
        words = found["msg"].removeprefix("Value error, ")
        words = (
            words.replace("Input should", "it should")
            .replace("Tuple should", "it should")
            .partition(" after validation")[0]
        )
        places = [
            place for place in found["loc"] if isinstance(place, int) or (isinstance(value, Mapping) and place in value)
        ]
        told.append(words + (f" (at {places[0]!r}: {_shown(found['input'])})" if places else ""))
    distinct = list(dict.fromkeys(told))
    return " or ".join([distinct[0], *(words.removeprefix("it should be ") for words in distinct[1:3])])


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
