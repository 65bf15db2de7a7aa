"""The console: a page that shows the daemon's activity live. See docs/explanation/console.md."""

from ._route import routes as routes
