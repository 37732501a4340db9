"""The base of every method: a constructor whose signature is the option schema, checked when called."""

from __future__ import annotations

import functools
import inspect
import sys
import typing
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from tokenary.core.card import Card
from tokenary.core.errors import OptionError, UnknownNameError


class Method:
    """Base of all methods.

    A subclass writes an ordinary ``__init__`` with annotated, defaulted parameters; ranges are said with
    ``Annotated[int, Field(ge=1)]``, choices with ``Literal``. Arguments are checked and converted (``"24"`` to 24)
    before the body runs, so that text from a command line and values from Python pass the same gate.

    What a stranger's recipe may set, over a network, is said with ``Field(json_schema_extra={"remote": ...})``: False
    for nothing, a list of values, or the most. Without it, anything but free text, which may name a file.

    Attributes
    ----------
    card : Card
        The card of the file that the class stands in.
    options : Mapping
        The checked options, read-only.
    """

    options: Mapping[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _checked(cls.__init__)  # type: ignore[method-assign]

    @classmethod
    def card_of(cls) -> Card:
        """Return the card that stands beside the class."""
        return sys.modules[cls.__module__].CARD

    @property
    def card(self) -> Card:
        """The card that stands beside the class."""
        return self.card_of()

    @classmethod
    def schema(cls) -> dict[str, Any]:
        """Return the options as JSON schema (properties with type, range, default)."""
        fields = {name: (annotation, default) for name, annotation, default in _parameters(cls.__init__)}
        made = _create_model(cls.__name__, fields)
        return made.model_json_schema()

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in getattr(self, "options", {}).items())
        return f"{type(self).__name__}({given})"


def _create_model(name: str, fields: dict[str, Any]) -> type[BaseModel]:
    from pydantic import create_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an option may have the name of a method of pydantic's
        return create_model(name, __config__=ConfigDict(arbitrary_types_allowed=True), **fields)


def _parameters(init: Callable[..., None]) -> list[tuple[str, Any, Any]]:
    """Name, annotation and default of each option of a constructor."""
    init = inspect.unwrap(init)
    hints = typing.get_type_hints(init, include_extras=True)
    return [
        (name, hints.get(name, Any), ... if parameter.default is inspect.Parameter.empty else parameter.default)
        for name, parameter in inspect.signature(init).parameters.items()
        if name != "self"
    ]


def _expected(error: ValidationError) -> str:
    """Say in words what would have been accepted."""
    texts = [item["msg"].removeprefix("Value error, ").removeprefix("Input should be ") for item in error.errors()]
    return " or ".join(dict.fromkeys(texts))


def _checked(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap a constructor so that its arguments are checked against its annotations."""
    signature = inspect.signature(init)

    @functools.cache
    def adapters() -> dict[str, TypeAdapter]:
        config = ConfigDict(arbitrary_types_allowed=True)
        made: dict[str, TypeAdapter] = {}
        for name, annotation, _ in _parameters(init):
            try:
                made[name] = TypeAdapter(annotation, config=config)
            except Exception:  # a type that brings its own configuration refuses another one
                made[name] = TypeAdapter(annotation)
        return made

    @functools.wraps(init)
    def checked(self: Method, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in signature.parameters:
                raise UnknownNameError(f"option of {type(self).__name__}", name, list(signature.parameters)[1:])
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            raise OptionError("arguments", args, str(error)) from None
        bound.apply_defaults()
        values = dict(list(bound.arguments.items())[1:])
        for name, value in values.items():
            try:
                values[name] = adapters()[name].validate_python(value)
            except ValidationError as error:
                raise OptionError(name, value, _expected(error)) from None
        init(self, **values)
        self.options = MappingProxyType(values)  # last: a base class's constructor passes here too

    return checked
