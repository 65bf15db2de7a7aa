"""Messages, and which method of an actor handles which.

Handlers are found by the exact type of the message, in a table that the class builds once. So the sender of a
message that nobody handles learns it at once, at the place where the mistake is.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Coroutine, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeVar, overload

if TYPE_CHECKING:
    from ._exit import Exit
    from ._mailbox import Deferred
    from ._ref import Ref

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
S = TypeVar("S")
M_co = TypeVar("M_co", covariant=True)
Q_co = TypeVar("Q_co", bound="Request[Any]", covariant=True)

Handler: TypeAlias = Callable[[Any, Any], Coroutine[Any, Any, Any]]
_MARK = "__handles__"


class Request(Generic[R_co]):
    """Base of the messages that are answered; `R` is the type of the answer. Derive a frozen dataclass from it.

    `raises` names the exceptions by which a handler refuses: such a one travels to the asker, and the actor goes on.
    So raise it before you change anything. Any other exception of a handler is a crash::

        @dataclass(frozen=True)
        class Withdraw(Request[int]):
            amount: int
            raises = (NotEnough,)
    """

    __slots__ = ()

    #: The exceptions that a handler hands to the asker instead of dying of them.
    raises: ClassVar[tuple[type[Exception], ...]] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Down:
    """The one message that a monitor sends: the incarnation of `ref` that was watched has ended, and is cleaned up."""

    ref: Ref[Any]
    reason: Exit


class _HandlesRequest(Generic[Q_co]):
    __slots__ = ("_message",)

    def __init__(self, message: type[Q_co]) -> None:
        self._message = message

    def __call__(
        self: _HandlesRequest[Request[R]],
        method: Callable[[S, Q_co], Coroutine[Any, Any, R | Deferred[R]]],
        /,
    ) -> Callable[[S, Q_co], Coroutine[Any, Any, R | Deferred[R]]]:
        _mark(method, self._message)
        return method


class _HandlesMessage(Generic[M_co]):
    __slots__ = ("_message",)

    def __init__(self, message: type[M_co]) -> None:
        self._message = message

    def __call__(
        self, method: Callable[[S, M_co], Coroutine[Any, Any, None]], /
    ) -> Callable[[S, M_co], Coroutine[Any, Any, None]]:
        _mark(method, self._message)
        return method


@overload
def handles(message: type[Q_co], /) -> _HandlesRequest[Q_co]: ...  # type: ignore[overload-overlap]  # the first match is meant
@overload
def handles(message: type[M_co], /) -> _HandlesMessage[M_co]: ...
def handles(message: type[Any], /) -> _HandlesRequest[Any] | _HandlesMessage[Any]:
    """Marks the method of an actor that handles messages of exactly this type.

    The handler of a `Request[R]` returns R, or the `Deferred[R]` that it has from `ctx.defer(message)`.

    :raises TypeError: when `message` is no class, or a dataclass or struct that is not frozen: both sides
    share it; or the method is not async.
    """
    if not isinstance(message, type):
        raise TypeError(f"handles() takes the class of a message, not {message!r}")
    if not _frozen(message):
        raise TypeError(f"{message.__qualname__} is shared by sender and receiver: make it frozen")
    return _HandlesRequest(message) if issubclass(message, Request) else _HandlesMessage(message)


def handlers_of(cls: type) -> Mapping[type, Handler]:
    """The handlers of an actor class, also those that it inherits; an override needs no second mark.

    :raises TypeError: when two methods claim the same message.
    """
    names: dict[type, str] = {}
    for base in reversed(cls.__mro__):
        own: dict[type, str] = {}
        for name, attribute in vars(base).items():
            message = getattr(attribute, _MARK, None)
            if message is None:
                continue
            if message in own:
                raise TypeError(f"{base.__qualname__} handles {message.__qualname__} in {own[message]} and in {name}")
            own[message] = name
        names.update(own)
    return MappingProxyType({message: getattr(cls, name) for message, name in names.items()})


def _mark(method: Any, message: type) -> None:
    if not inspect.iscoroutinefunction(method):
        raise TypeError(f"the handler of {message.__qualname__} must be an async method, not {method!r}")
    setattr(method, _MARK, message)


def _frozen(message: type) -> bool:
    params = getattr(message, "__dataclass_params__", None)
    if params is not None:
        return bool(params.frozen)
    config = getattr(message, "__struct_config__", None)
    return config is None or bool(config.frozen)
