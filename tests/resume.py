"""A plugin of pytest, `-p tests.resume`: a run that was interrupted goes on with what has not passed yet.

What has passed is in the cache of pytest, in a file named after the Git tree that it passed on: after any change all
tests run again, and so they do once all have passed.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from xdist.workermanage import WorkerController


class Resume:
    """Notes the tests that pass; `before` has those of earlier runs."""

    def __init__(self, config: pytest.Config) -> None:
        assert config.cache is not None, "-p no:cacheprovider leaves nothing to go on from"
        self._file = config.cache.mkdir("passed") / _tree(config.rootpath)
        self._failed = set[str]()
        self.before = self._file.read_text().splitlines() if self._file.exists() else []

    def pytest_configure_node(self, node: WorkerController) -> None:
        # All workers have to collect the same, and so has one that replaces another later.
        node.workerinput["passed"] = self.before

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.add(report.nodeid)
        elif report.when == "teardown" and report.nodeid not in self._failed:
            with self._file.open("a") as file:
                file.write(f"{report.nodeid}\n")

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.OK:
            self._file.unlink(missing_ok=True)

    def pytest_report_header(self) -> str:
        return f"passed before, on the same files: {len(self.before)} tests"


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Resume(config), "resume")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    resume = config.pluginmanager.get_plugin("resume")
    before = set(resume.before if resume else config.workerinput["passed"])  # type: ignore[attr-defined]
    if passed := [item for item in items if item.nodeid in before]:
        config.hook.pytest_deselected(items=passed)
        items[:] = [item for item in items if item.nodeid not in before]


def _tree(root: Path) -> str:
    """Returns the Git tree of the files as they are now, committed or not."""
    with tempfile.TemporaryDirectory() as directory:
        environ = {**os.environ, "GIT_INDEX_FILE": f"{directory}/index"}
        subprocess.run(["git", "add", "--all"], cwd=root, env=environ, check=True, timeout=60)
        asked = subprocess.run(
            ["git", "write-tree"], cwd=root, env=environ, check=True, timeout=60, capture_output=True, text=True
        )
    return asked.stdout.strip()
