"""`/api/v1/tickets`: what browsers open WebSockets and event streams with, as they can't set headers there."""

from __future__ import annotations

from datetime import timedelta

from quart import Response
from quart_trio import QuartTrio

from volant.model import Ticket

from ._body import Nothing, read_body
from ._doors import Doors
from ._edge import TICKET_S, Access
from ._json import json_response
from ._params import no_query


def add_routes(app: QuartTrio, doors: Doors, access: Access) -> None:
    """The routes of this resource."""

    @app.post("/api/v1/tickets")
    async def create_ticket() -> Response:
        no_query()
        await read_body(Nothing)
        expires_at = doors.host.wall_clock() + timedelta(seconds=TICKET_S)
        response = json_response(Ticket(access.tickets.issue(), expires_at), 201)
        response.headers["Cache-Control"] = "no-store"
        return response
