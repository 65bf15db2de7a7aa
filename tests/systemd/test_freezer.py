"""Under systemd VMs that may move are in one scope, which the daemon and its watchdog freeze from their sandbox."""

from __future__ import annotations

import json
import re
import sys
import uuid
from pathlib import Path
from typing import Any

from tests.systemd.kit import Box
from volant.cli._setup import rendered

DAEMON = """
import json, os, sys, trio
from pathlib import Path
from volant.daemon._systemd import Notifier
from volant.host import Freezer, Host, ResourceLimits
from volant.host._watchdog import boottime

INSTANCE = sys.argv[1]

async def start(host, runtime, tag):
    argv = [sys.executable, "-c", "import time; time.sleep(600)", tag]
    vm = await host.processes.spawn(argv, tag=tag, env={}, cwd=runtime, stdout_path=runtime / "log")
    await host.limits.apply(vm, "a VM", expendable=True)
    return vm

async def main():
    notifier = Notifier.from_environment(os.environ)
    runtime = Path("/run/volant")
    host = Host(notifier.scopes())
    freezer = Freezer(host, runtime / "freezer", instance=INSTANCE, scopes=notifier.scopes())
    if (runtime / "leaves").exists():
        await freezer.close()
    else:
        await freezer.open()
        found, frozen = freezer.until, freezer.is_frozen
        vm = await host.processes.find(f"volant-{INSTANCE}-1.1")
        if vm is None:
            vm = await start(host, runtime, f"volant-{INSTANCE}-1.1")
            await freezer.enclose(await start(host, runtime, f"volant-{INSTANCE}-2.1"), "VM two", None)
        await freezer.enclose(vm, "VM one", ResourceLimits(memory_mb=640, cpus=3, weight=200, tasks=258))
        await host.limits.apply(vm, "VM one", ResourceLimits(memory_mb=650, cpus=3, weight=200, tasks=259))
        freezer.last(boottime() + 4)
        await freezer.thaw()
        state = {"found": found, "frozen": frozen, "vm": vm.pid, "limits": host.limits.of(vm)}
        (runtime / "state").write_text(json.dumps(state))
    notifier.notify(READY=1)
    await trio.sleep_forever()

trio.run(main)
"""


def test_vms_that_may_move_are_frozen_in_a_scope(box: Box) -> None:
    # Its host has the hierarchy of this machine, with what is left there.
    instance = uuid.uuid4().hex[:10]
    unit = f"volant-{instance}-movable.scope"
    inside = Path(f"/proc/{box.init}/root")
    units = rendered()
    service = units["volantd.service"]
    for line, instead in {
        "ExecStart=.*": f"ExecStart={sys.executable} -P /run/daemon.py {instance}",
        "Requires=.*": "",
        "Wants=.*": "Wants=volant.slice",
        "WatchdogSec=.*": "",
        "Restart=.*": "Restart=no",
    }.items():
        service = re.sub(f"(?m)^{line}$", instead, service)
    (inside / "run" / "daemon.py").write_text(DAEMON)
    (inside / "etc/systemd/system/volantd.service").write_text(service)
    (inside / "etc/systemd/system/volant.slice").write_text(units["volant.slice"])
    box.systemctl("daemon-reload")
    scope = f"/volant.slice/{unit}"

    def start() -> dict[str, Any]:
        done = box.systemctl("start", "volantd.service")
        assert done.returncode == 0, box.tail()
        state: dict[str, Any] = json.loads((inside / "run/volant/state").read_text())
        return state

    def events() -> str:
        return box.run("cat", f"/sys/fs/cgroup{scope}/vms/cgroup.events").stdout

    first = start()
    assert "frozen 0" in events()
    assert (first["found"], first["frozen"]) == (0, True)
    assert first["limits"].items() <= {"memory.max": str(650 * 2**20), "pids.max": "259", "cpu.weight": "200",
                                       "cpu.max": "300000 100000", "io.weight": "default 200"}.items()  # fmt: skip
    assert box.processes(f"volant-{instance}-1.1") == {first["vm"]: f"{scope}/vms/volant-{instance}-1.1"}
    watchdog = box.processes("_watchdog.py")
    assert list(watchdog.values()) == [f"{scope}/watchdog"]
    assert box.scopes() == [unit]
    assert box.show(unit, "Delegate") == "yes"
    # Else systemd would end all of them when one needs too much memory.
    assert box.show(unit, "OOMPolicy") in ("continue", "")
    assert box.show(unit, "TasksMax") == "infinity"
    assert box.show(unit, "CPUWeight") == "200"
    box.systemctl("kill", "--signal=KILL", "volantd.service")
    box.until(lambda: "frozen 1" in events(), 20)

    box.systemctl("daemon-reload")
    box.systemctl("daemon-reexec")
    assert "frozen 1" in events()
    second = start()
    assert "frozen 0" in events()
    assert second["found"] > 0
    assert (second["frozen"], second["vm"]) == (True, first["vm"])
    assert box.processes("_watchdog.py") == watchdog
    box.systemctl("stop", "volantd.service")
    (inside / "run/volant/leaves").touch()
    vms = box.processes(f"volant-{instance}-")
    box.run("kill", "-9", *(str(pid) for pid, group in vms.items() if "/vms/" in group))
    start()
    box.until(lambda: box.scopes() == [], 10)
    assert box.processes("_watchdog.py") == {}
