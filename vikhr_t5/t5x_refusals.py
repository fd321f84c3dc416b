"""What an adapter of t5x's names does with an argument: accept it where it changes nothing, or refuse it by name."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

from vikhr_t5.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])


class Refusal(UserError):
    """A binding of t5x that we do not follow. `binding`: "DatasetConfig.pack", for looking up where it stands."""

    def __init__(self, binding: str, value: Any, instead: str):
        super().__init__(
            f"{binding} = {getattr(value, '__name__', None) or repr(value)} is not for vikhr-t5: {instead}"
        )
        self.binding = binding


def stands_for(ours: Any) -> Callable[[F], F]:
    """A decorator: which object of ours an adapter makes."""

    def mark(adapter: F) -> F:
        adapter.stands_for = ours  # type: ignore[attr-defined]
        return adapter

    return mark


def accept(binding: str, value: Any, values: Sequence[Any], instead: str) -> None:
    """Refusal unless `value` is one of those that change nothing here."""
    if not any(value is one or (type(value) is type(one) and value == one) for one in values):
        raise Refusal(binding, value, instead)


def accept_stand_in(binding: str, value: Any, name: str) -> None:
    """Refusal unless `value` is None or the stand-in of t5x's own `name`: the default, given explicitly."""
    if value is not None and getattr(value, "__name__", None) != name:
        raise Refusal(binding, value, f"only t5x's own {name} has a counterpart: remove the binding")


def say(line: str) -> None:
    """A line on stderr, of one process."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)
