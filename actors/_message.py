"""Messages, and the methods of actors that handle them.

The exact type of a message selects its handler, in a table that the class builds once. So a message without a handler
raises in its sender, where the mistake is.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeVar, overload

if TYPE_CHECKING:
    from ._exit import Exit
    from ._mailbox import Deferred
    from ._ref import Ref

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
S = TypeVar("S")
H = TypeVar("H", bound=Callable[..., Coroutine[Any, Any, Any]])
M1 = TypeVar("M1", covariant=True)
M2 = TypeVar("M2")
M3 = TypeVar("M3")
Q1 = TypeVar("Q1", bound="Request[Any]", covariant=True)
Q2 = TypeVar("Q2", bound="Request[Any]")
Q3 = TypeVar("Q3", bound="Request[Any]")

Handler: TypeAlias = Callable[[Any, Any], Coroutine[Any, Any, Any]]
_MARK = "__handles__"


class Request(Generic[R_co]):
    """Base of the messages that have an answer, of type `R`. Derive a frozen dataclass from it.

    `raises` names the exceptions by which a handler rejects a request: the caller of `ask` receives them, and the actor
    keeps running. So raise them before you change anything. Any other exception is a crash, also an exception group::

        @dataclass(frozen=True)
        class Withdraw(Request[int]):
            amount: int
            raises = (NotEnough,)
    """

    __slots__ = ()

    #: The exceptions that the caller of `ask` receives, and that do not crash the actor.
    raises: ClassVar[tuple[type[Exception], ...]] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Down:
    """The message that `ctx.monitor` delivers once: the watched incarnation of `ref` has ended and is cleaned up."""

    ref: Ref[Any]
    reason: Exit


class _HandlesRequests(Generic[Q1]):
    def __init__(self, messages: tuple[type[Any], ...]) -> None:
        self._messages = messages

    def __call__(
        self: _HandlesRequests[Request[R]], method: Callable[[S, Q1], Coroutine[Any, Any, R | Deferred[R]]], /
    ) -> Callable[[S, Q1], Coroutine[Any, Any, R | Deferred[R]]]:
        return _mark(method, self._messages)


class _HandlesMessages(Generic[M1]):
    def __init__(self, messages: tuple[type[Any], ...]) -> None:
        self._messages = messages

    def __call__(
        self, method: Callable[[S, M1], Coroutine[Any, Any, None]], /
    ) -> Callable[[S, M1], Coroutine[Any, Any, None]]:
        return _mark(method, self._messages)


# mypy joins the types of several arguments to their base, so each number of arguments has a signature of its own.
@overload
def handles(m1: type[Q1], /) -> _HandlesRequests[Q1]: ...  # type: ignore[overload-overlap]  # the first match wins
@overload
def handles(m1: type[Q1], m2: type[Q2], /) -> _HandlesRequests[Q1 | Q2]: ...  # type: ignore[overload-overlap]
@overload
def handles(m1: type[Q1], m2: type[Q2], m3: type[Q3], /) -> _HandlesRequests[Q1 | Q2 | Q3]: ...  # type: ignore[overload-overlap]
@overload
def handles(m1: type[M1], /) -> _HandlesMessages[M1]: ...
@overload
def handles(m1: type[M1], m2: type[M2], /) -> _HandlesMessages[M1 | M2]: ...
@overload
def handles(m1: type[M1], m2: type[M2], m3: type[M3], /) -> _HandlesMessages[M1 | M2 | M3]: ...
@overload
def handles(*messages: type[Any]) -> Callable[[H], H]: ...
def handles(*messages: type[Any]) -> Any:
    """Marks the method of an actor that handles messages of exactly these types.

    The handler of a `Request[R]` returns R, or the `Deferred[R]` that `ctx.defer(message)` gave it. Type checkers check
    the handlers of up to three types.

    :raises TypeError: no class is given; a class is a dataclass or msgspec struct that is not frozen, although sender
        and receiver share the message; or the method is not async.
    """
    if not messages or not all(isinstance(message, type) for message in messages):
        raise TypeError(f"handles() takes classes of messages, not {messages!r}")
    for message in messages:
        if not _frozen(message):
            raise TypeError(f"{message.__qualname__} is shared by sender and receiver: make it frozen")
    return (_HandlesRequests if issubclass(messages[0], Request) else _HandlesMessages)(messages)


def handlers_of(cls: type) -> dict[type, Handler]:
    """Returns the handlers of an actor class, inherited ones included. An override needs no mark of its own.

    :raises TypeError: two methods of one class handle the same message. A subclass may handle it in another method.
    """
    names: dict[type, str] = {}
    for base in reversed(cls.__mro__):
        own: dict[type, str] = {}
        for name, attribute in vars(base).items():
            for message in getattr(attribute, _MARK, ()):
                if message in own:
                    raise TypeError(
                        f"{base.__qualname__} handles {message.__qualname__} in {own[message]} and in {name}"
                    )
                own[message] = name
        names.update(own)
    return {message: getattr(cls, name) for message, name in names.items()}


def _mark(method: H, messages: tuple[type, ...]) -> H:
    if not inspect.iscoroutinefunction(method):
        raise TypeError(f"the handler of {messages[0].__qualname__} must be an async method, not {method!r}")
    setattr(method, _MARK, messages)
    return method


def _frozen(message: type) -> bool:
    params = getattr(message, "__dataclass_params__", None)
    if params is not None:
        return bool(params.frozen)
    config = getattr(message, "__struct_config__", None)
    return config is None or bool(config.frozen)
