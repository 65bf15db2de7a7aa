"""Performs each action on a page."""

from __future__ import annotations

import base64
import json
import threading
from dataclasses import dataclass
from typing import Any

from ._catalogue import MAX_PIXELS
from ._cdp import Connection, Deadline, Ended, Late, Refused, Session
from ._chromium import Chromium

_PAPER_CM = {
    "a3": (29.7, 42.0),
    "a4": (21.0, 29.7),
    "a5": (14.8, 21.0),
    "letter": (21.59, 27.94),
    "legal": (21.59, 35.56),
}
_CM_PER_INCH = 2.54
_LIFECYCLE = {"domcontentloaded": "DOMContentLoaded", "load": "load", "networkidle": "networkIdle"}
_HTML = """(() => {
    const type = document.doctype ? new XMLSerializer().serializeToString(document.doctype) + "\\n" : "";
    return [location.href, document.title, type + (document.documentElement?.outerHTML ?? "")];
})()"""
_DIALOG_S = 5.0


@dataclass(frozen=True)
class Answer:
    """The answer to the caller."""

    media_type: str
    body: bytes


class Failed(Exception):
    """The page cannot do this. `status` is an HTTP status, `hint` says what to do."""

    def __init__(self, status: int, detail: str, *, field: str = "", hint: str = "") -> None:
        super().__init__(detail)
        self.status = status
        self.field = field
        self.hint = hint


def perform(chromium: Chromium, action: str, fields: dict[str, Any]) -> Answer:
    """Performs an action. :raises Failed, Ended, Late, Refused, TooLarge: if it fails"""
    deadline = Deadline(fields["timeout_s"])
    connection = chromium.connection(deadline)
    with _attach(chromium, connection, fields["target"], deadline) as page:
        return _PERFORM[action](page, fields, deadline)


def _attach(chromium: Chromium, connection: Connection, target: str | None, deadline: Deadline) -> Session:
    try:
        return connection.attach(chromium.page(connection, target, deadline), deadline)
    except LookupError:
        hint = "leave it out for the current page, or take an id from DevTools' json/list"
        raise Failed(404, f"there is no page {target}", field="target", hint=hint) from None
    except Refused:
        # The page was closed before the session attached to it.
        raise Ended("the page was closed") from None


def _navigate(page: Session, fields: dict[str, Any], deadline: Deadline) -> Answer:
    statuses: dict[str, int] = {}
    reached: set[str] = set()
    frame = page.call("Page.getFrameTree", deadline)["frameTree"]["frame"]

    def lifecycle(event: dict[str, Any]) -> None:
        if event["frameId"] == frame["id"] and event["loaderId"] != frame["loaderId"]:
            reached.add(event["name"])

    def response(event: dict[str, Any]) -> None:
        # Each redirection by a script loads a document of its own.
        # Chromium reports 200 for data: and file:, too.
        told = event["response"]
        if event["type"] == "Document" and event.get("frameId") == frame["id"] and told["url"].startswith("http"):
            statuses[event["loaderId"]] = told["status"]

    def dialog(event: dict[str, Any]) -> None:
        # An unanswered dialog blocks the page for ever. This is the reader's thread, which must not wait.
        leave = event["type"] == "beforeunload"
        threading.Thread(target=_close_dialog, args=(page, leave), name="dialog", daemon=True).start()

    page.on("Page.javascriptDialogOpening", dialog)
    page.on("Page.lifecycleEvent", lifecycle)
    page.on("Network.responseReceived", response)
    page.call("Page.enable", deadline)
    page.call("Page.setLifecycleEventsEnabled", deadline, enabled=True)
    page.call("Network.enable", deadline, maxTotalBufferSize=0, maxResourceBufferSize=0)
    url = fields["url"]
    try:
        opened = page.call("Page.navigate", deadline, url=url)
    except Refused as error:
        hint = "give it with its scheme, such as http://localhost:8000/"
        raise Failed(400, f"{url[:200]!r} is no address: {error}", field="url", hint=hint) from None
    if opened.get("isDownload"):
        raise Failed(422, f"{url[:200]} is a download, and no page", field="url")
    if opened.get("errorText"):
        hint = "see that the server runs, and that the guest has a way to it"
        raise Failed(422, f"{url[:200]} can't be opened: {opened['errorText']}", field="url", hint=hint)
    # Without a loader, the page moved within the same document, and has already done so.
    if "loaderId" in opened and fields["wait_until"] != "commit":
        page.wait_for(lambda: _LIFECYCLE[fields["wait_until"]] in reached, deadline)
    where, title, _ = _evaluate_own(page, deadline)
    loader = page.call("Page.getFrameTree", deadline)["frameTree"]["frame"]["loaderId"]
    return _json(url=where, title=title, target=page.target, status=statuses.get(loader) or None)


def _close_dialog(page: Session, accept: bool) -> None:
    try:
        page.call("Page.handleJavaScriptDialog", Deadline(_DIALOG_S), accept=accept)
    except (Ended, Late, Refused):
        # Another client has the dialog open too, or it is closed.
        pass


def _screenshot(page: Session, fields: dict[str, Any], deadline: Deadline) -> Answer:
    if fields["quality"] is not None and fields["format"] == "png":
        raise Failed(400, "a PNG has no quality", field="quality", hint="take the format jpeg or webp")
    metrics = page.call("Page.getLayoutMetrics", deadline)
    width = fields["width"] or metrics["cssLayoutViewport"]["clientWidth"]
    height = fields["height"] or metrics["cssLayoutViewport"]["clientHeight"]
    if fields["width"] or fields["height"]:
        page.call(
            "Emulation.setDeviceMetricsOverride",
            deadline,
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        metrics = page.call("Page.getLayoutMetrics", deadline)
    options: dict[str, Any] = {"format": fields["format"]}
    if fields["quality"] is not None:
        options["quality"] = fields["quality"]
    if fields["full_page"]:
        size = metrics["cssContentSize"]
        width, height = max(size["width"], 1), max(size["height"], 1)
        options |= {
            "captureBeyondViewport": True,
            "clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1},
        }
    if width * height > MAX_PIXELS:
        raise Failed(
            422,
            f"the picture would have {width:.0f} x {height:.0f} pixels, and may have {MAX_PIXELS}",
            field="full_page" if fields["full_page"] else "width",
            hint="give a smaller width and height, or leave out full_page",
        )
    data = page.call("Page.captureScreenshot", deadline, **options)["data"]
    return Answer(f"image/{fields['format']}", base64.b64decode(data))


def _pdf(page: Session, fields: dict[str, Any], deadline: Deadline) -> Answer:
    width, height = (side / _CM_PER_INCH for side in _PAPER_CM[fields["paper"]])
    margin = fields["margin_cm"] / _CM_PER_INCH
    try:
        data = page.call(
            "Page.printToPDF",
            deadline,
            paperWidth=width,
            paperHeight=height,
            marginTop=margin,
            marginBottom=margin,
            marginLeft=margin,
            marginRight=margin,
            landscape=fields["landscape"],
            printBackground=fields["print_background"],
            scale=fields["scale"],
            pageRanges=fields["pages"] or "",
        )["data"]
    except Refused as error:
        raise Failed(422, f"the page can't be printed: {error}", field="pages" if fields["pages"] else "") from None
    return Answer("application/pdf", base64.b64decode(data))


def _evaluate(page: Session, fields: dict[str, Any], deadline: Deadline) -> Answer:
    try:
        answer = page.call(
            "Runtime.evaluate",
            deadline,
            expression=fields["expression"],
            returnByValue=True,
            awaitPromise=True,
            userGesture=True,
            # Chromium also stops an endless loop then.
            timeout=fields["timeout_s"] * 1000,
        )
    except Refused as error:
        raise Failed(422, f"the value can't be had: {error}", field="expression", hint="return less of it") from None
    thrown = answer.get("exceptionDetails")
    if thrown is not None:
        what = thrown.get("exception", {})
        text = str(what.get("description") or what.get("value") or thrown.get("text"))
        place = f"line {thrown['lineNumber'] + 1}, column {thrown['columnNumber'] + 1}"
        raise Failed(422, f"the script threw: {text[:2000]} ({place})", field="expression")
    result = answer["result"]
    return _json(value=result.get("value"), type=result["type"])


def _content(page: Session, fields: dict[str, Any], deadline: Deadline) -> Answer:
    del fields
    url, title, html = _evaluate_own(page, deadline)
    return _json(url=url, title=title, target=page.target, html=html)


def _evaluate_own(page: Session, deadline: Deadline) -> list[str]:
    # In an isolated world: the page may have replaced the functions that this calls.
    frame = page.call("Page.getFrameTree", deadline)["frameTree"]["frame"]["id"]
    world = page.call("Page.createIsolatedWorld", deadline, frameId=frame, worldName="actions")["executionContextId"]
    answer = page.call("Runtime.evaluate", deadline, expression=_HTML, returnByValue=True, contextId=world)
    values: list[str] = answer["result"]["value"]
    return values


def _json(**values: object) -> Answer:
    return Answer("application/json", json.dumps(values).encode() + b"\n")


_PERFORM = {
    "navigate": _navigate,
    "screenshot": _screenshot,
    "pdf": _pdf,
    "evaluate": _evaluate,
    "content": _content,
}
