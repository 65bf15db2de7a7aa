"""Talks to a guest without a VM, until it answers and while it lives."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from volant.channel import AgentClient, AgentProtocolError, AgentUnreachable
from volant.hypervisor import HypervisorError, Machine

ANSWER_S = 10.0
_RETRY_S = 0.2


class TemplateFailed(Exception):
    """There is no template, or a process restored from one is unusable. `code` is a stable error code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


async def while_alive(machine: Machine, work: Callable[[], Awaitable[None]], timeout_s: float) -> None:
    """Runs `work` with a guest. :raises TemplateFailed: the guest ends before, or it takes longer than `timeout_s`."""
    failures: list[TemplateFailed] = []

    async def watch(scope: trio.CancelScope) -> None:
        try:
            message = (await machine.ended()).message
        except HypervisorError as error:
            message = str(error)
        failures.append(TemplateFailed("guest_ended", message))
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch, nursery.cancel_scope)
        with trio.move_on_after(timeout_s) as scope:
            try:
                await work()
            except TemplateFailed as error:
                failures.append(error)
        nursery.cancel_scope.cancel()
    if scope.cancelled_caught:
        raise TemplateFailed("agent_timeout", f"the guest was not ready within {timeout_s:g} s")
    if failures:
        raise failures[0]


async def ask(
    client: AgentClient, method: str, path: str, body: object = None, *, timeout_s: float = ANSWER_S
) -> dict[str, Any]:
    """Returns the agent's answer, and repeats the request until there is one; the caller sets the deadline.

    :raises TemplateFailed: the agent refuses.
    """
    while True:
        try:
            answer = await client.request_json(method, path, body, timeout_s=timeout_s)
        except AgentUnreachable:
            await trio.sleep(_RETRY_S)
            continue
        except AgentProtocolError as error:
            raise TemplateFailed("agent_refused", f"the agent answers nonsense: {error}") from error
        found = answer.body if isinstance(answer.body, dict) else {}
        if not 200 <= answer.status < 300:
            why = f"the agent answers {method} {path} with {answer.status}: {found.get('detail')}"
            raise TemplateFailed("agent_refused", why[:500])
        return found
