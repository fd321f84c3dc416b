"""Settings: a YAML file and `name=value` overrides -> a dataclass, strictly.

A dataclass states names, types and defaults once. A name that it lacks, or a value of another type, is refused with
the place in the file and the nearest names.
"""

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from vikhr_t5.errors import UserError, nearest

T = TypeVar("T")


def read_config(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """A dataclass from a YAML file.

    Args:
        cls: a dataclass; its fields may be plain types, Literal, Optional, list, dict of str, and dataclasses again.
        path: the YAML file.
        overrides: "train.max_steps=100", values in YAML; later ones win.

    Raises:
        UserError: the file is missing or no YAML, a name is unknown or missing, or a value is of another type.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: settings are `name: value` lines, and this is a {type(values).__name__}")
    values = values or {}
    for override in overrides:
        _override(values, override)
    return build(cls, values, str(path))


def to_yaml(config: Any) -> str:
    """A dataclass as the YAML that `read_config` reads."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), allow_unicode=True, sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def build(cls: type[T], values: dict[str, Any], where: str) -> T:
    """The dataclass from plain values, checked; `where` begins the message of an error."""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            raise UserError(f"{where}: unknown setting {name!r}; {nearest(str(name), fields)}")
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: setting {name!r} is missing")
    arguments = {name: _typed(hints[name], value, f"{where}: {name}") for name, value in values.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"override {override!r} is not of the form name=value")
    *parents, last = name.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"override {override!r}: {parent} has no settings below it")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r} is no YAML: {' '.join(str(error).split())}") from None


def _typed(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        wanted = [argument for argument in arguments if argument is not type(None)]
        for argument in wanted[:-1]:
            try:
                return _typed(argument, value, where)
            except UserError:
                continue
        return _typed(wanted[-1], value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"{where} is {value!r}; {nearest(str(value), map(str, arguments))}")
        return value
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise _wrong(where, value, "`name: value` lines")
        return build(kind, value, where)  # type: ignore[arg-type]
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise _wrong(where, value, "a list")
        return origin(_typed(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(where, value, "`name: value` lines")
        return {str(name): _typed(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if kind is float and isinstance(value, str):  # YAML reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Any or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    raise _wrong(where, value, {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "text"))


def _wrong(where: str, value: Any, wanted: str) -> UserError:
    return UserError(f"{where} is {value!r}, and {wanted} is wanted")
