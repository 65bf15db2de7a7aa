"""`/api/v1/tickets`: what browsers open WebSockets and event streams with, as they can't set headers there."""

from __future__ import annotations

from datetime import timedelta

from quart import Response, request
from quart_trio import QuartTrio

from volant.model import Ticket, WantTicket

from ._body import read_body_or
from ._doors import Doors
from ._edge import TICKET_S, Access
from ._json import json_response
from ._params import no_query


def add_routes(app: QuartTrio, doors: Doors, access: Access) -> None:
    """The routes of this resource."""

    @app.post("/api/v1/tickets")
    async def create_ticket() -> Response:
        no_query()
        wanted = await read_body_or(WantTicket())
        expires_at = doors.host.wall_clock() + timedelta(seconds=TICKET_S)
        ticket = access.tickets.issue(path=wanted.path, caller=request.scope["state"]["caller"])
        response = json_response(Ticket(ticket, expires_at), 201)
        response.headers["Cache-Control"] = "no-store"
        return response
