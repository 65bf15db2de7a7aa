"""`python -m volant.images`: builds and lists images, fetches artifacts. The daemon runs it as a child process.

With `--json-progress`, each line on standard output is a JSON object: `{"phase","message","done","total","unit"}` while
it works, then `{"image":{…}}`, `{"artifact":{…}}`, `{"stock":{…}}` or `{"error":{"code","message","hint"}}`.
Exit codes: 0 success, 1 failure, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from msgspec import structs

from . import Archive, ImageError, Origins, Progress, build, build_stock, fetch, list_images, parse_networks


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m volant.images")
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build", help="build the image, unless the cache has it")
    lister = commands.add_parser("list", help="print the images of a cache, one JSON object a line")
    fetcher = commands.add_parser("fetch", help="fetch an artifact, unless the cache has it")
    fetcher.add_argument("--url", required=True, help="an absolute path, or a file, http or https URL")
    fetcher.add_argument("--sha256", required=True, metavar="DIGEST")
    fetcher.add_argument("--max-bytes", type=int, required=True, metavar="N")
    fetcher.add_argument("--allow-directory", type=Path, action="append", default=[], metavar="DIR")
    fetcher.add_argument("--allow-network", action="append", default=[], metavar="CIDR")
    stock = commands.add_parser("stock", help="write an OCI archive with a stock image")
    stock.add_argument("name", help="debian, python or node")
    stock.add_argument("--output", type=Path, required=True, metavar="FILE")
    for command in (builder, lister, fetcher, stock):
        command.add_argument("--cache", type=Path, required=True, metavar="DIR")
    for command in (builder, stock):
        command.add_argument("--mirror", metavar="URL", help="a Debian mirror, instead of this host's apt sources")
        command.add_argument("--security-mirror", metavar="URL", help="with --mirror: where security updates come from")
        command.add_argument("--keyring", type=Path, metavar="FILE", help="the keys that must have signed the mirror")
        command.add_argument("--offline", action="store_true", help="take the packages of the last build")
    for command in (builder, fetcher, stock):
        command.add_argument("--json-progress", action="store_true", help="output for programs")
    options = parser.parse_args(arguments)
    if options.command == "list":
        for image in list_images(options.cache):
            _print(image.as_json())
        return 0
    report = _report_json if options.json_progress else _report_text
    try:
        if options.command == "fetch":
            artifact = fetch(
                options.cache,
                options.url,
                options.sha256,
                max_bytes=options.max_bytes,
                origins=Origins(tuple(options.allow_directory), parse_networks(options.allow_network)),
                tell=lambda done, total: report(Progress("fetch", "Fetching", done, total, "bytes")),
            )
            _print({"artifact": artifact.as_json()})
            return 0
        if options.security_mirror and not options.mirror:
            parser.error("--security-mirror goes with --mirror")
        archive = Archive(options.mirror, options.security_mirror, options.keyring, options.offline)
        if options.command == "stock":
            # mmdebstrap sends it to its whole process group if it can't write its tar.
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            built = build_stock(
                options.name, options.output.absolute(), options.cache, archive=archive, progress=report
            )
            _print({"stock": structs.asdict(built)})
            return 0
        image = build(options.cache, archive=archive, progress=report)
    except ImageError as error:
        if options.json_progress:
            _print({"error": {"code": error.code, "message": error.message, "hint": error.hint}})
        else:
            sys.stderr.write(f"{error}\n")
        return 1
    _print({"image": image.as_json()})
    return 0


def _report_json(progress: Progress) -> None:
    _print(
        {
            "phase": progress.phase,
            "message": progress.message,
            "done": progress.done,
            "total": progress.total,
            "unit": progress.unit,
        }
    )


def _report_text(progress: Progress) -> None:
    sys.stderr.write(f"{progress.phase}: {progress.message}\n")


def _print(value: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
