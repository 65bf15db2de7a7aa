"""How a guest that is nobody's VM is talked to: until it answers, and for as long as it lives."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from volant.channel import AgentClient, AgentProtocolError, AgentUnreachable
from volant.hypervisor import HypervisorError, Machine

ANSWER_S = 10.0
_AGAIN_S = 0.2


class TemplateFailed(Exception):
    """There is no template, or what was made of it is of no use, and why; `code` is a stable word."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


async def while_it_lives(machine: Machine, do: Callable[[], Awaitable[None]], timeout_s: float) -> None:
    """Do something with a guest, unless that ends before, or it takes too long. :raises TemplateFailed:"""
    why: list[TemplateFailed] = []

    async def watch(scope: trio.CancelScope) -> None:
        try:
            message = (await machine.ended()).message
        except HypervisorError as error:
            message = str(error)
        why.append(TemplateFailed("guest_ended", message))
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch, nursery.cancel_scope)
        with trio.move_on_after(timeout_s) as patience:
            try:
                await do()
            except TemplateFailed as error:
                why.append(error)
        nursery.cancel_scope.cancel()
    if patience.cancelled_caught:
        raise TemplateFailed("agent_timeout", f"the guest was not ready within {timeout_s:g} s")
    if why:
        raise why[0]


async def ask(
    client: AgentClient, method: str, path: str, body: object = None, *, timeout_s: float = ANSWER_S
) -> dict[str, Any]:
    """One request, again until there is an answer; the caller has a deadline.

    :raises TemplateFailed: the agent refuses.
    """
    while True:
        try:
            answer = await client.request_json(method, path, body, timeout_s=timeout_s)
        except AgentUnreachable:
            await trio.sleep(_AGAIN_S)
            continue
        except AgentProtocolError as error:
            raise TemplateFailed("agent_refused", f"the agent answers nonsense: {error}") from error
        said = answer.body if isinstance(answer.body, dict) else {}
        if not 200 <= answer.status < 300:
            why = f"the agent answers {method} {path} with {answer.status}: {said.get('detail')}"
            raise TemplateFailed("agent_refused", why[:500])
        return said
