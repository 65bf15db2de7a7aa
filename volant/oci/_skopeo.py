"""Runs skopeo: reads manifests, and copies an image into an OCI layout."""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import trio

from volant.concurrency import Backoff, open_helpers
from volant.host import PROGRAM_ENVIRONMENT, Host, as_user
from volant.store import check_space

from ._errors import OciError
from ._isolation import Isolation, open_theirs
from ._layers import PROGRAM_MEMORY
from ._manifest import MAX_DOCUMENT_BYTES, Platform
from ._proxy import Resolve, open_proxy, resolve_anywhere
from ._reference import Reference

_logger = logging.getLogger("volant.oci")

PROGRAM = "skopeo"
PROGRAM_HINT = "on Debian: `sudo apt install skopeo`"
_ANSWER_S = 120.0
"""Maximum time for one document, including the pauses that a busy registry requests."""
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 15.0
"""The shortest and the longest delay between attempts."""
_WATCH_S = 0.5
"""The interval of checks of a copy."""
_OTHER_BYTES = 16 * 1024 * 1024
"""Maximum size of a copy besides its layers."""
_CLEAR_S = 10.0
"""Maximum time for the removal of credentials. The next start removes the rest."""
_MAX_COMPLAINT = 400
_MAX_SAID = 16384
_MAX_AUTH_BYTES = 1024 * 1024
_BLOCK = 512
"""The unit of `ulimit -f`."""
_MOST_OTHER_BYTES = 1024 * 1024 * 1024
"""Maximum size of a file of skopeo other than a layer, enforced by the kernel in case the watch fails, which ends
skopeo much earlier."""
_LIMITS = f"ulimit -c 0; ulimit -n 1024; ulimit -v {PROGRAM_MEMORY // 1024};"
_NO_CREDENTIALS = b'{"auths":{}}'
_NOT_INSTALLED = 127
"""The shell's exit status for a program that it does not find."""

_MESSAGE = re.compile(r'msg="((?:[^"\\]|\\.)*)"')
_QUERY = re.compile(r'\?[^\s"]+')
"""The query of a URL, which may contain signatures of blobs."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

_REASONS: tuple[tuple[str, str, str, str], ...] = (
    (
        r"credential file is not accessible",
        "auth_file_unreadable",
        "the auth file can't be read",
        "check the setting oci_auth_file",
    ),
    (
        r"\b429\b|too ?many ?requests",
        "registry_busy",
        "the registry is busy (429)",
        "wait a while, or give credentials: registries allow more requests with them",
    ),
    (
        r"dial tcp \S+ connect: (permission denied|operation not permitted)",
        "registry_not_allowed",
        "it leads to a service of this host",
        "an administrator can name a registry of this host in oci_plain_http",
    ),
    (
        r"authentication required|unauthorized|denied|\b40[13]\b|invalid username/password|authorization",
        "image_unauthorized",
        "the registry wants other credentials",
        "give credentials that may read it, as `docker login` and `skopeo login` store them; check the name",
    ),
    (
        r"rejected by policy|signature",
        "image_rejected",
        "a policy of this host rejects it",
        "see /etc/containers/policy.json",
    ),
    (r"no space left|quota exceeded", "cache_full", "the cache is full", "make room on the cache's file system"),
    (
        r"did not match|does not match|doesn't match",
        "image_mismatch",
        "something has other content than its digest says",
        "fetch it again; if it stays, the registry or a mirror has a damaged copy",
    ),
    (
        r"gave HTTP response to HTTPS",
        "registry_unreachable",
        "the registry speaks plain HTTP",
        "an administrator can allow that for it by name: oci_plain_http",
    ),
    (
        r"x509|certificate|tls:",
        "registry_unreachable",
        "the registry's certificate is not trusted",
        "put the registry's CA into /etc/containers/certs.d/REGISTRY/ca.crt, or into the directory of oci_ca_dir",
    ),
    (
        r"no such host|connection refused|timeout|unreachable|server misbehaving|\b50[0-9]\b|pinging",
        "registry_unreachable",
        "the registry can't be reached",
        "check the name of the registry and this host's network",
    ),
    (
        r"manifest unknown|name unknown|not found|no such file|no descriptor found|\b404\b|does not exist",
        "image_not_found",
        "there is no such image",
        "check name and tag",
    ),
    (
        r"unexpected EOF|connection reset|broken pipe|blob unknown|fetching blob|reading blob|happened during read",
        "fetch_interrupted",
        "the connection broke",
        "try again; if it stays, push the image again",
    ),
)
"""Patterns in skopeo's messages, the daemon's code and text for each, and what to do. The first match counts."""


class Rights(NamedTuple):
    """The rights of a fetch."""

    auth: Path
    """An auth file."""
    resolve: Resolve
    """The check of addresses to connect to."""


def _anywhere(is_admin: bool) -> Resolve:
    del is_admin
    return resolve_anywhere


class Skopeo:
    """Runs skopeo for one daemon."""

    def __init__(
        self,
        host: Host,
        private_dir: Path,
        *,
        plain_http: frozenset[str] = frozenset(),
        environment: Mapping[str, str] | None = None,
        stalled_s: float = 60.0,
        retries: int = 2,
        certificates: Path | None = None,
        auth_file: Path | None = None,
        isolation: Isolation | None = None,
        registries: Callable[[bool], Resolve] | None = None,
    ) -> None:
        """
        :param private_dir: for credentials, on a file system in memory
        :param plain_http: registries that may be used without TLS, with their ports, and named at any address
        :param environment: with the variables of the operator's proxies
        :param stalled_s: a copy that does not grow for this time is ended
        :param retries: the number of retries after temporary failures, with growing delays
        :param certificates: a directory of CA certificates for registries, in addition to those of the host
        :param auth_file: an auth file for fetches without credentials of their own
        :param isolation: the isolation of skopeo and of the converting process; None for no sandbox
        :param registries: returns the resolver for administrators (True) or others (False); None if everyone may use
            all registries
        """
        self._host = host
        self._private_dir = private_dir
        self._plain_http = plain_http
        self._environment = environment or {}
        self._registries = registries or _anywhere
        self._stalled_s = stalled_s
        self._retries = retries
        self._certificates = certificates
        self._auth_file = auth_file
        self.isolation = isolation
        self._retry_option = f"--retry-times={retries}"

    @property
    def user(self) -> int | None:
        """The user that owns files in working directories; None for the daemon's."""
        return None if self.isolation is None else self.isolation.user

    async def share(self, work: Path) -> None:
        """Lets that user use a new directory. :raises OSError: it failed."""
        if self.isolation is not None:
            await self.isolation.share(self._host, work)

    @asynccontextmanager
    async def rights(self, auth: bytes | None, *, is_admin: bool) -> AsyncIterator[Rights]:
        """Writes the content of an auth file to a file for the block; with None that of the daemon's file, if it has
        one.

        :param is_admin: whether the fetch may connect to hosts without a public address
        """
        if auth is None and self._auth_file is not None:
            auth = await self._own_credentials(self._auth_file)
        directory = self._private_dir / secrets.token_hex(8)
        await self._host.files.mkdir(directory)
        try:
            path = directory / "auth.json"
            await self._host.files.write(path, _NO_CREDENTIALS if auth is None else auth)
            if self.isolation is not None:
                await self.isolation.let_read(self._host, path)
            yield Rights(path, self._registries(is_admin))
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEAR_S):
                await self._host.files.remove_tree(directory)

    async def _own_credentials(self, path: Path) -> bytes:
        """Returns the content of the daemon's auth file, which only its user may be able to read."""
        try:
            return await self._host.files.read(path, _MAX_AUTH_BYTES)
        except OSError as error:
            raise OciError(
                "auth_file_unreadable", f"the auth file {path} can't be read: {error.strerror}",
                "check the setting oci_auth_file",
            ) from error  # fmt: skip

    async def forget_credentials(self) -> None:
        """Removes credentials that a killed daemon left. :raises OSError: it failed."""
        await self._host.files.remove_tree(self._private_dir)

    async def inspect(self, reference: Reference, work: Path, rights: Rights, *, config: bool = False) -> bytes:
        """Returns a manifest, an index or, with `config`, a configuration, unchanged from the registry and unchecked.

        :raises OciError: it failed.
        """
        arguments = ["inspect", "--raw", *(["--config"] if config else []), "--authfile", str(rights.auth)]
        arguments += [self._retry_option, *self._tls("", reference), source(reference)]
        try:
            return await self._run(arguments, reference, work, rights, _ANSWER_S, MAX_DOCUMENT_BYTES, 0)
        except trio.TooSlowError:
            raise OciError(
                "registry_unreachable", f"{reference.registry or reference}: no answer within {_ANSWER_S:g} s",
                "check this host's network, and whether the registry works",
            ) from None  # fmt: skip

    async def copy(
        self,
        reference: Reference,
        layout: Path,
        rights: Rights,
        *,
        platform: Platform,
        max_bytes: int,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Copies an image into an OCI layout, as image `image`. Present layers are not fetched.

        The caller sets the deadline. A broken connection is retried; layers that have arrived are kept.

        :param max_bytes: the maximum size that it may write
        :param progress: called with the bytes written so far
        :raises OciError: it failed.
        """
        arguments = [f"--override-os={platform.os}", f"--override-arch={platform.architecture}", "copy", "--quiet"]
        arguments += ["--src-authfile", str(rights.auth), self._retry_option, "--dest-oci-accept-uncompressed-layers"]
        arguments += [*self._tls("src-", reference), source(reference), f"oci:{layout}:image"]
        pauses = Backoff(_PAUSE_S, _LONGEST_PAUSE_S)
        for left in reversed(range(self._retries + 1)):
            try:
                return await self._copy(arguments, reference, layout.parent, rights, max_bytes, progress)
            except OciError as error:
                # skopeo itself tries again when it was not connected yet.
                if error.code != "fetch_interrupted" or not left:
                    raise
            await pauses.pause()

    async def _copy(
        self,
        arguments: Sequence[str],
        reference: Reference,
        work: Path,
        rights: Rights,
        max_bytes: int,
        progress: Callable[[int], None],
    ) -> None:
        failures: list[OciError] = []
        async with open_helpers() as nursery:

            async def watch() -> None:
                failures.append(await self._watch(reference, work, max_bytes, progress))
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            await self._run(arguments, reference, work, rights, float("inf"), 65536, max_bytes)
        if failures:
            raise failures[0]

    async def _watch(
        self, reference: Reference, work: Path, max_bytes: int, progress: Callable[[int], None]
    ) -> OciError:
        """Watches a copy, and returns the reason when it must end."""
        before, since = -1, trio.current_time()
        while True:
            written = await trio.to_thread.run_sync(used_bytes, work)
            if written != before:
                before, since = written, trio.current_time()
                progress(written)
            if written > max_bytes + _OTHER_BYTES:
                return OciError(
                    "image_too_large", f"{reference}: the registry sends more than {max_bytes // 2**20} MiB, as the "
                    "manifest or the limit says", "an administrator can allow more: oci_max_mb",
                )  # fmt: skip
            try:
                check_space(work, 0, OciError)
            except OciError as error:
                return error
            if trio.current_time() - since >= self._stalled_s:
                return OciError(
                    "fetch_stalled", f"{reference}: nothing has arrived for {self._stalled_s:g} s",
                    "try again; check the registry and this host's network",
                )  # fmt: skip
            await trio.sleep(_WATCH_S)

    def _tls(self, prefix: str, reference: Reference) -> list[str]:
        if reference.registry in self._plain_http:
            return [f"--{prefix}tls-verify=false"]
        return [f"--{prefix}cert-dir={self._certificates}"] if self._certificates and reference.registry else []

    async def _run(
        self,
        arguments: Sequence[str],
        reference: Reference,
        work: Path,
        rights: Rights,
        timeout_s: float,
        limit: int,
        max_bytes: int,
    ) -> bytes:
        errors = work / "errors"
        # Warnings must not end up in a document.
        shell = f'{_LIMITS} ulimit -f {(max_bytes + _MOST_OTHER_BYTES) // _BLOCK}; exec "$@" 2>errors'
        command = ["sh", "-c", shell, "sh", PROGRAM, "--tmpdir", str(work), *arguments]
        files = [rights.auth, *([self._certificates] if self._certificates else [])]
        env = {**PROGRAM_ENVIRONMENT, "HOME": str(work)}

        async def run(env: Mapping[str, str], files: Sequence[Path], ports: Collection[int]) -> tuple[int, bytes]:
            isolation = self.isolation
            sandbox = None if isolation is None else isolation.skopeo(work, reference.transport, files, ports)
            return await self._host.processes.run(
                command, env=env, cwd=work, timeout_s=timeout_s, output_limit=limit, sandbox=sandbox
            )

        refused = None
        try:
            if reference.registry:
                async with open_proxy(reference, self._plain_http, rights.resolve, self._environment) as proxy:
                    status, output = await run({**env, **proxy.environment}, files, proxy.ports)
                    refused = proxy.failure
            else:
                status, output = await run(env, [*files, Path(reference.name)], ())
        except OSError as error:
            raise OciError(
                "sandbox_failed", f"{PROGRAM} can't be started in a sandbox: {error}",
                "see the sandbox in `volar setup --check`, or turn it off with VOLANT_SANDBOX=off",
            ) from error  # fmt: skip
        if status == 0:
            return output
        # With its rights: the name may lead anywhere.
        said = await trio.to_thread.run_sync(as_user, self.user, partial(_read_end, errors))
        if status == _NOT_INSTALLED:
            raise OciError("program_missing", f"{PROGRAM} is not installed", PROGRAM_HINT)
        if len(output) >= limit:
            raise OciError(
                "image_invalid", f"{reference}: a document has more than {limit // 2**20} MiB", "build the image again"
            )
        raise refused or failure(reference, said)


def _read_end(path: Path) -> str:
    """Returns the end of a text; empty if there is none."""
    try:
        with open_theirs(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _MAX_SAID))
            return file.read(_MAX_SAID).decode(errors="replace")
    except OSError:
        return ""


def source(reference: Reference) -> str:
    """Returns a reference in skopeo's notation."""
    if reference.transport == "docker":
        return f"docker://{reference}"
    return f"{reference.transport}:{reference.name}{reference.tag and f':{reference.tag}'}"


def failure(reference: Reference, said: str) -> OciError:
    """Returns the error for skopeo's message. The message is only logged, as a redirect may have led to a service of
    this host's network, whose answer or its digest is in the message."""
    lines = said.strip().splitlines() or ["it does not say why"]
    match = _MESSAGE.search(lines[-1])
    text = match[1].replace('\\"', '"') if match else lines[-1]
    text = _CONTROL.sub(" ", _QUERY.sub("?…", text))
    shown = text if len(text) <= _MAX_COMPLAINT else f"{text[:_MAX_COMPLAINT]}…"
    # Names and digests may contain the words and numbers of a reason.
    named = (f"manifest {reference.tag or reference.digest} ", reference.name)
    reason = re.sub("|".join(map(re.escape, named)), "", _DIGEST.sub("", text))
    _logger.info("%s can't be fetched: %s", reference, shown)
    for pattern, code, why, hint in _REASONS:
        if re.search(pattern, reason, re.IGNORECASE):
            return OciError(code, f"{reference} can't be fetched: {why}", hint)
    return OciError("fetch_failed", f"{reference} can't be fetched: skopeo failed", "the daemon's log has its output")


def used_bytes(directory: Path) -> int:
    """Returns the space on the disk of the files below a directory. Blocks."""
    total = 0
    for path, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_blocks * 512  # noqa: PTH118
            except OSError:
                continue
    return total
