"""Runs each test with the fixture `namespace` in a process and a network namespace of its own.

So they can't change the host's networks, and what they create disappears with the process. It forks instead of calling
`setns`, which would not affect threads that other tests left.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import warnings

import pytest
from _pytest.runner import runtestprotocol

_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_TEST_S = 300
_libc = ctypes.CDLL(None, use_errno=True)


def _obstacle() -> str | None:
    if os.geteuid() != 0:
        return "network namespaces, bridges and nftables need root; CI is root"
    if shutil.which("nft", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
        return "nft is not installed: .ci/system-packages network"
    if not os.path.exists("/dev/net/tun"):  # noqa: PTH110 - a device, not a path of ours
        return "there is no /dev/net/tun"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = _obstacle()
    for item in items:
        if "namespace" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.kernel)
            if why is not None:
                item.add_marker(pytest.mark.skip(why))


@pytest.fixture
def namespace() -> None:
    """Marks a test that needs a network namespace."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if "namespace" not in getattr(item, "fixturenames", ()) or _obstacle() is not None:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.session._setupstate.teardown_exact(nextitem)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _reports(item: pytest.Item) -> list[pytest.TestReport]:
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # The child does not need the threads of other tests.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if _libc.unshare(_CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "unshare")
            signal.alarm(_TEST_S)
            # What is set up for this test is taken down here, and nothing of what the other process has set up.
            reports = runtestprotocol(item, log=False, nextitem=item.parent)  # type: ignore[arg-type]
            hook = item.config.hook
            data = [hook.pytest_report_to_serializable(config=item.config, report=report) for report in reports]
            with os.fdopen(writer, "w") as file:
                json.dump(data, file)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    _, ended = os.waitpid(pid, 0)
    if not text:
        said = f"the process of this test ended with {os.waitstatus_to_exitcode(ended)}"
        return [pytest.TestReport(item.nodeid, item.location, {}, "failed", said, "call")]
    hook = item.config.hook
    return [hook.pytest_report_from_serializable(config=item.config, data=data) for data in json.loads(text)]
