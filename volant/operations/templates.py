"""Templates, which new VMs are cloned from."""

from __future__ import annotations

from volant.model import BuildTemplate, TemplateView

from ._context import Context
from ._permission import Permission
from ._table import TABLE


@TABLE.operation(
    "GET /api/v1/templates",
    permission=Permission.VIEW,
    answer="All, also those that are being built or could not be",
    errors=(503,),
)
async def list_templates(context: Context) -> list[TemplateView]:
    """List the templates that new VMs are cloned from."""
    return list(await context.deps.vms.templates.list())


@TABLE.operation(
    "POST /api/v1/templates",
    permission=Permission.CONTROL,
    status=201,
    answer="It is there",
    errors=(404, 409, 422, 503),
    client_timeout_s=600,
)
async def build_template(context: Context, *, body: BuildTemplate) -> TemplateView:
    """Build the template of a kind of VM, and wait for it.

    One that is there is returned at once; one that is being built is waited for. A client that leaves cancels nothing.
    """
    return await context.deps.vms.templates.build(body)


@TABLE.operation(
    "DELETE /api/v1/templates/{digest}", permission=Permission.CONTROL, answer="Removed", errors=(404, 503)
)
async def remove_template(context: Context, digest: str) -> None:
    """Remove a template; its clones keep running."""
    await context.deps.vms.templates.remove(digest)
