"""A hostile web page in a real browser, which tries every kind of request to a daemon on loopback."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler

from tests.web_server import WebServer, answer_html

SAME_SITE, CROSS_SITE = "127.0.0.1", "attacker.localhost"
"""Hosts of the page. Ports do not count for a site; Chromium knows that names below `localhost` are loopback."""

ATTACK = """<!doctype html><title>attack</title><body><script>
const base = %s, socket = base.replace("http", "ws");
const results = {};
const patience = new Promise((resolve) => setTimeout(resolve, 20000, "nothing happened"));
const element = (tag, member, url) => new Promise((resolve) => {
  const made = document.createElement(tag);
  made.onload = () => resolve("loaded");
  made.onerror = () => resolve("refused");
  made[member] = url;
  if (tag === "link") made.rel = "stylesheet";
  document.body.append(made);
});
const asked = (url, options) => fetch(url, options).then((answer) => "loaded " + answer.type, () => "refused");
const opened = (made) => new Promise((resolve) => {
  made.onopen = made.onmessage = () => resolve("loaded");
  made.onerror = () => resolve("refused");
});
const frame = (start) => new Promise((resolve) => {
  // Whether it has loaded is not for us to see: the daemon's log tells.
  const made = document.createElement("iframe");
  made.name = "frame" + Math.random();
  document.body.append(made);
  made.onload = () => resolve("unknown");
  start(made);
});
const form = (method, url) => frame((target) => {
  const made = document.createElement("form");
  Object.assign(made, { method, action: url, target: target.name, enctype: "text/plain" });
  document.body.append(made);
  made.submit();
});
const attempts = {
  image: () => element("img", "src", base + "/api/v1/vms?as=image"),
  script: () => element("script", "src", base + "/api/v1/vms?as=script"),
  style: () => element("link", "href", base + "/api/v1/vms?as=style"),
  health: () => element("img", "src", base + "/healthz?as=image"),
  guest: () => element("img", "src", base + "/api/v1/vms/demo/agent/picture.svg"),
  opaque: () => asked(base + "/api/v1/vms?as=fetch", { mode: "no-cors" }),
  cors: () => asked(base + "/api/v1/vms?as=cors"),
  docs: () => asked(base + "/docs", { mode: "no-cors" }),
  old_backup: () => asked(base + "/api/v1/system/backup", { mode: "no-cors" }),
  backup: () => asked(base + "/api/v1/system/backup", { mode: "no-cors", method: "POST", body: "" }),
  deletion: () => asked(base + "/api/v1/vms/demo", { method: "DELETE" }),
  drain: () => form("post", base + "/api/v1/system/drain"),
  get_form: () => form("get", base + "/api/v1/vms/demo/logs"),
  inner: () => frame((made) => { made.src = base + "/api/v1/vms"; }),
  events: () => opened(new EventSource(base + "/api/v1/events/vms")),
  logs: () => opened(new WebSocket(socket + "/ws/v1/vms/demo/logs")),
  beacon: async () => navigator.sendBeacon(base + "/api/v1/mcp", "{}") ? "unknown" : "refused",
};
(async () => {
  for (const [name, attempt] of Object.entries(attempts)) results[name] = await Promise.race([attempt(), patience]);
  await fetch("/results", { method: "POST", body: JSON.stringify(results) });
})();
</script>"""


class Site(WebServer):
    """Serves the attacker's page at `/`, and at `/go?ADDRESS` a page that redirects its visitor."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.results: dict[str, str] = {}
        """Returns what the page found out, when it is done."""
        self._attack = (ATTACK % json.dumps(target)).encode()

    def get(self, request: BaseHTTPRequestHandler) -> None:
        path, _, address = request.path.partition("?")
        go = f"<!doctype html><script>location.href = {json.dumps(address)};</script>".encode()
        answer_html(request, 200, {"/": self._attack, "/go": go}.get(path, b""))

    def post(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        self.results = json.loads(body)
        answer_html(request, 200)
