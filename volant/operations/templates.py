"""Templates, which new VMs are cloned from."""

from __future__ import annotations

from volant.model import BuildTemplate, Permission, TemplateView

from ._context import Context
from ._table import TABLE


@TABLE.operation(
    "GET /api/v1/templates",
    permission=Permission.VIEW,
    answer="The templates, including those that are being built or failed",
    errors=(503,),
)
async def list_templates(context: Context) -> list[TemplateView]:
    """List the templates that new VMs are cloned from.

    If the request is for a project, only templates for its plugins.
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
    answer="The template",
    errors=(404, 409, 422, 503),
    client_timeout_s=600,
    examples={"A size": {"memory_mb": 128}},
)
async def build_template(context: Context, *, body: BuildTemplate) -> TemplateView:
    """Build the template for a plugin and a VM size, and wait for it.

    An existing template is returned at once; the request waits for one that is being built. The build continues if the
    client disconnects. For the limits of the project, a build counts as the creation of such a VM.
    """
    return await context.deps.vms.templates.build(body, context.project)


@TABLE.operation("DELETE /api/v1/templates/{digest}", permission=Permission.ADMIN, answer="Deleted", errors=(404, 503))
async def delete_template(context: Context, digest: str) -> None:
    """Delete a template; its clones keep running."""
    await context.deps.vms.templates.remove(digest)
