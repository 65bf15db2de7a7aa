"""`/api/v1/tickets`: what browsers open WebSockets and event streams with, as they can't set headers there."""

from __future__ import annotations

from datetime import timedelta

from quart import Response, request
from quart_trio import QuartTrio

from volant.http import TICKET_S, Access, json_response, read_body_or
from volant.model import Ticket, WantTicket
from volant.operations import ApiDeps

from ._params import no_query


def add_routes(app: QuartTrio, deps: ApiDeps, access: Access) -> None:
    """The routes of this resource."""

    @app.post("/api/v1/tickets")
    async def create_ticket() -> Response:
        no_query()
        wanted = await read_body_or(WantTicket())
        expires_at = deps.host.clock.now() + timedelta(seconds=TICKET_S)
        ticket = access.tickets.issue(path=wanted.path, caller=request.scope["state"]["caller"])
        response = json_response(Ticket(ticket, expires_at), 201)
        response.headers["Cache-Control"] = "no-store"
        return response
