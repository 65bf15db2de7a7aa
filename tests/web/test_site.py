"""The files of the console: small, complete, from this origin alone, and what its vendor pinned."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.api.kit import Api, api
from volant.cli._volar import volar
from volant.web._site import load_site

STATIC = Path(__file__).resolve().parents[2] / "volant/web/static"
FIRST_LOAD_BYTES = 150_000
_IMPORT = re.compile(r"""(?:^import [^;"]*?from ?|^import|[;}]from)"([^"]+)"[;}]?""", re.MULTILINE)
"""Of modules as people write them, and of minified ones. `import()` is none of these."""


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Api]:
    async with api(tmp_path) as at:
        yield at


def imported(name: str, names: dict[str, str]) -> set[str]:
    """Returns the modules that a browser loads with one, itself included."""
    found: set[str] = set()
    wanted = [name]
    while wanted:
        module = wanted.pop()
        if module in found:
            continue
        found.add(module)
        text = (STATIC / module).read_text()
        for target in _IMPORT.findall(text):
            place = names.get(target) or str((STATIC / module).parent.joinpath(target).resolve().relative_to(STATIC))
            wanted.append(place)
    return found


def import_map() -> dict[str, str]:
    found = re.search(r'<script type="importmap">(.*?)</script>', (STATIC / "index.html").read_text(), re.DOTALL)
    assert found is not None
    return {name: place.removeprefix("./console/{digest}/") for name, place in json.loads(found[1])["imports"].items()}


def test_the_first_load_is_small() -> None:
    site = load_site()
    modules = imported("app.js", import_map())
    assert "vendor/preact.js" in modules
    assert not modules & {"vendor/xterm.js", "vendor/uplot.js"}, "these are loaded when they are needed"
    first = len(site.pages["/"].compressed) + sum(
        len(site.files[name].compressed) for name in (*modules, "app.css", "icon.svg")
    )
    # With charts, as the overview has them.
    with_charts = first + sum(len(site.files[f"vendor/uplot.{kind}"].compressed) for kind in ("js", "css"))
    assert first < with_charts <= FIRST_LOAD_BYTES, (first, with_charts)


def test_the_documentation_loads_nothing_that_it_does_not_use() -> None:
    modules = imported("docs.js", import_map())
    assert "views/operation.js" in modules
    assert not modules & {"app.js", "store.js", "tabs.js", "views/vm.js", "vendor/xterm.js", "vendor/uplot.js"}
    assert not {"docs.js", "schemas.js", "views/operation.js"} & imported("app.js", import_map())


def test_vendored_files_are_as_pinned_and_keep_their_licences() -> None:
    pins = json.loads((STATIC / "vendor/vendor.json").read_text())
    files = {kept["to"]: kept["sha256"] for pin in pins.values() for kept in pin["files"]}
    assert {path.name for path in (STATIC / "vendor").iterdir()} == {*files, "vendor.json"}
    for name, digest in files.items():
        assert hashlib.sha256((STATIC / "vendor" / name).read_bytes()).hexdigest() == digest, name
    for name, pin in pins.items():
        assert any(kept["to"].endswith(".LICENSE") for kept in pin["files"]), name
        assert pin["integrity"].startswith("sha512-"), name


def test_the_page_names_no_other_origin() -> None:
    for path in STATIC.rglob("*"):
        if path.suffix in (".js", ".css", ".html") and path.parent.name != "vendor":
            found = re.findall(r"https?://[^\s\"'`)]+", path.read_text())
            assert found == [], path


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_files_are_kept_by_digest_and_the_page_is_checked_each_time(served: Api, path: str) -> None:
    page = await served.client.get(path)
    assert (page.status_code, page.headers["cache-control"]) == (200, "no-cache")
    again = await served.client.get(path, headers={"If-None-Match": page.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    places = re.findall(r'"(?:\./)?(console/[0-9a-f]{16}/[^"]+)"', page.text)
    assert len(places) > 10
    for place in places:
        file = await served.client.get(f"/{place}")
        assert (file.status_code, file.headers["cache-control"]) == (200, "public, max-age=31536000, immutable")
    for tags, status in ((page.headers["etag"][:-1], 200), (f'"x", W/{page.headers["etag"]}', 304), ("*", 304)):
        assert (await served.client.get(path, headers={"If-None-Match": tags})).status_code == status, tags
    plain = await served.server.get(f"/{places[0]}")
    for accepted in ("gzip;q=0, *", "x-gzip", "identity"):
        assert (await served.server.get(f"/{places[0]}", Accept_Encoding=accepted)).body == plain.body, accepted
    packed = await served.server.get(f"/{places[0]}", Accept_Encoding="gzip")
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body) == plain.body
    digest = places[0].split("/")[1]
    for wrong in ("vendor/vendor.json", "index.html", "../_site.py", "vendor/preact.LICENSE", "none.js"):
        assert (await served.client.get(f"/console/{digest}/{wrong}")).status_code == 404, wrong
    assert (await served.client.get(f"/{places[0].replace(digest, '0' * 16)}")).status_code == 404


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_the_policy_allows_the_files_of_the_console_and_nothing_inline(served: Api, path: str) -> None:
    page = await served.client.get(path)
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    digest = re.search(r"console/([0-9a-f]{16})/", page.text)
    assert digest is not None
    ours = f"127.0.0.1:{served.server.port}/console/{digest[1]}/"
    assert policy["default-src"] == "'none'"
    assert policy["style-src"] == ours
    assert re.fullmatch(rf"{re.escape(ours)} 'sha256-[A-Za-z0-9+/]{{43}}='", policy["script-src"])
    assert policy["frame-ancestors"] == policy["form-action"] == policy["base-uri"] == "'none'"
    assert "unsafe" not in page.headers["content-security-policy"]


def test_a_daemon_reads_nothing_of_the_console_before_it_is_asked_for() -> None:
    code = "import sys, volant.daemon, volant.api; print(sorted(name for name in sys.modules if 'volant.web' in name))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "['volant.web', 'volant.web._route']"


def test_the_commands_that_the_page_teaches_exist() -> None:
    text = "\n".join(path.read_text() for path in sorted(STATIC.glob("**/*.js")) if path.parent.name != "vendor")
    found = [*re.findall(r'command: "(volar [^"]+)"', text), *re.findall(r"<pre>(volar [^<]+)</pre>", text)]
    commands = [line for one in found for line in re.sub(r"\\n|\$\{.*?\}", "\n", one).splitlines()]
    assert len(commands) > 8
    for command in commands:
        words = shlex.split(command.partition("<")[0])[1:]
        # The last option is answered first, but not before the others are understood.
        asked = [*words[:2], "--help"] if "--" in words else [*words, "--help"]
        done = CliRunner().invoke(volar, asked)
        assert done.exit_code == 0, (command, done.output)
