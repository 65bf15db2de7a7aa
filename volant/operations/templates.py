"""Templates, which new VMs are cloned from."""

from __future__ import annotations

from volant.model import BuildTemplate, Permission, TemplateView

from ._context import Context
from ._table import TABLE


@TABLE.operation(
    "GET /api/v1/templates",
    permission=Permission.VIEW,
    answer="All, also those that are being built or could not be",
    errors=(503,),
)
async def list_templates(context: Context) -> list[TemplateView]:
    """List the templates that new VMs are cloned from.

    With a project, those for plugins that it has.
    """
    templates = await context.deps.vms.templates.list()
    if context.seen is None:
        return list(templates)
    plugins = {plugin.name for plugin in context.deps.store.projection.plugins_of(context.seen)}
    return [template for template in templates if template.plugin in plugins]


@TABLE.operation(
    "POST /api/v1/templates",
    permission=Permission.CONTROL,
    status=201,
    answer="It is there",
    errors=(404, 409, 422, 503),
    client_timeout_s=600,
    examples={"A size": {"memory_mb": 128}},
)
async def build_template(context: Context, *, body: BuildTemplate) -> TemplateView:
    """Build the template of a kind of VM, and wait for it.

    One that is there is returned at once; one that is being built is waited for. A client that leaves cancels nothing.
    For the limits of the project a build counts as the creation of such a VM.
    """
    return await context.deps.vms.templates.build(body, context.project)


@TABLE.operation("DELETE /api/v1/templates/{digest}", permission=Permission.ADMIN, answer="Deleted", errors=(404, 503))
async def delete_template(context: Context, digest: str) -> None:
    """Delete a template; its clones keep running."""
    await context.deps.vms.templates.remove(digest)
