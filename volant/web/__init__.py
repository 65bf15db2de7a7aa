"""The console: a page that shows what the daemon does, live. See docs/explanation/console.md."""

from ._route import routes as routes
