"""All operations × all roles × all ways to call them, made from the table, with real keys on the real API.

`LEAST` says who may do what. It is written by hand: an operation that is added fails here until somebody has decided.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.api.kit import UPGRADE, Api, api, read_head, request
from tests.api.test_mcp import BOTH, message
from volant.images import PUBLIC, Origins
from volant.mcp._commands import COMMANDS
from volant.mcp._tools import tools
from volant.model import Role
from volant.operations import TABLE, Operation

_NAMES: Mapping[Role | None, str] = {
    None: "healthz docs get_auth console console_file sign_in begin_sign_in take_issuer_answer finish_sign_in",
    Role.VIEWER: """
        list_vms get_vm inspect_vm vm_memory vm_stats list_vm_snapshots list_snapshots get_snapshot list_forks
        list_transfers vm_events
        image_events list_plugins get_plugin get_manifest list_networks get_network list_images list_pulls get_image
        list_secrets get_secret
        list_volumes get_volume list_templates system_status create_ticket metrics openapi agui agui_websocket mcp
        list_projects get_project get_fleet list_hosts get_host get_session sign_out
    """,
    Role.USER: """
        vm_logs vm_logs_websocket agent_healthz agent_info agent_exec agent_exec_websocket agent_exec_sessions
        agent_exec_session end_agent_exec_session read_file write_file delete_file vm_console vm_tcp
        get_agent post_agent put_agent patch_agent delete_agent get_port post_port put_port patch_port delete_port
        devtools_version devtools_list devtools_json devtools_new devtools_protocol devtools_activate devtools_close
        devtools_websocket devtools_browser_websocket devtools_page_websocket open_port call_action workload_openapi
    """,
    Role.OPERATOR: """
        create_vm delete_vm start_vm stop_vm restart_vm pause_vm resume_vm recover_vm fork_vm
        take_snapshot push_snapshot pull_snapshot delete_snapshot
        install_plugin delete_plugin enable_plugin put_artifact
        create_network delete_network pull_image put_image create_volume delete_volume resize_volume clone_volume
        build_template delete_image set_secret delete_secret
    """,
    Role.ADMIN: """
        audit create_project set_quota set_project_egress delete_project reencrypt_secrets
        prune_images delete_template list_keys create_key get_key delete_key rotate_key drain undrain
        drain_host host_moves undrain_host delete_host leave_fleet
        system_info list_orphans adopt_orphan kill_orphan system_tree disk_usage prune system_tasks backup
    """,
}
LEAST: Mapping[str, Role | None] = {name: role for role, names in _NAMES.items() for name in names.split()}
"""The least role that may do each operation; None: anybody."""
ORDER = list(Role)
NOBODY = "without a key"
FORBIDDEN = "urn:volant:error:forbidden"


def may(role: Role, operation: str) -> bool:
    least = LEAST[operation]
    return least is None or ORDER.index(role) >= ORDER.index(least)


@asynccontextmanager
async def with_keys(path: Path, origins: Origins = PUBLIC) -> AsyncIterator[tuple[Api, dict[Role, str]]]:
    """The API, and a key of each role."""
    async with api(path, origins=origins, checked=False) as served:
        keys: dict[Role, str] = {}
        for role in reversed(ORDER):
            headers = {"X-Volant-API-Key": keys[Role.ADMIN]} if keys else {}
            body = {"name": role.value, "role": role.value}
            made = await served.client.post("/api/v1/keys", json=body, headers=headers)
            assert made.status_code == 201, made.text
            keys[role] = made.json()["key"]
        yield served, keys


def path_of(operation: Operation) -> str:
    return re.sub(r"{(\w+)}", lambda found: "80" if found[1] == "port" else "none", operation.path)


def is_websocket(operation: Operation) -> bool:
    return 101 in operation.answers


async def answer(served: Api, operation: Operation, query: str = "", **headers: str) -> tuple[int, str]:
    """Asks for what does not exist, with an empty object as body; returns the status and the type of the problem."""
    sent = {**headers, **(UPGRADE if is_websocket(operation) else {"Connection": "close"})}
    body = None
    if operation.method not in ("GET", "DELETE"):
        body = b"{}"
        sent["Content-Type"] = "application/json"
    async with await served.server.connect() as stream:
        await stream.send_all(request(operation.method, path_of(operation) + query, body, **sent))
        head, rest = await read_head(stream)
        status = int(head.split()[1])
        if b"application/problem+json" not in head:
            return status, ""
        length = re.search(rb"content-length: (\d+)", head, re.I)
        assert length is not None
        while len(rest) < int(length[1]):
            rest += await stream.receive_some(65536)
        return status, str(msgspec.json.decode(rest)["type"])


def test_each_operation_is_in_the_matrix() -> None:
    assert LEAST.keys() == {operation.name for operation in TABLE}


async def test_each_operation_over_rest_and_websockets(tmp_path: Path) -> None:
    async with with_keys(tmp_path) as (served, keys):
        for operation in TABLE:
            for role in ORDER:
                status, kind = await answer(served, operation, X_Volant_API_Key=keys[role])
                refused = (status, kind) == (403, FORBIDDEN)
                assert refused is not may(role, operation.name), (operation.name, role, status, kind)
                assert status != 401, (operation.name, role)
            status, _ = await answer(served, operation)
            assert (status == 401) is (LEAST[operation.name] is not None or is_websocket(operation)), operation.name


async def test_each_stream_with_a_ticket(tmp_path: Path) -> None:
    async with with_keys(tmp_path) as (served, keys):
        streams = [each for each in TABLE if is_websocket(each) or each.credentials_in_query]
        assert len(streams) > 10
        for operation in streams:
            for role in ORDER:
                made = await served.client.post("/api/v1/tickets", headers={"X-Volant-API-Key": keys[role]})
                ticket = made.json()["ticket"]
                status, kind = await answer(served, operation, f"?ticket={ticket}", Accept="text/event-stream")
                refused = (status, kind) == (403, FORBIDDEN)
                assert refused is not may(role, operation.name), (operation.name, role, status, kind)
                assert status != 401, (operation.name, role)


async def rpc(served: Api, key: str, method: str, params: Mapping[str, Any]) -> Any:
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    return message(await served.client.post("/api/v1/mcp", json=body, headers={**BOTH, "X-Volant-API-Key": key}))


@pytest.mark.parametrize("role", Role)
async def test_each_tool_is_shown_to_those_who_may_call_it(tmp_path: Path, role: Role) -> None:
    async with with_keys(tmp_path) as (served, keys):
        listed = (await rpc(served, keys[role], "tools/list", {}))["result"]["tools"]
        allowed = {tool.name for tool in tools(TABLE) if may(role, tool.operation)}
        assert {tool["name"] for tool in listed} == allowed
        for tool in tools(TABLE):
            called = await rpc(served, keys[role], "tools/call", {"name": tool.name, "arguments": {"none": 1}})
            text = called["result"]["content"][0]["text"]
            assert ("needs the permission" in text) is (tool.name not in allowed), (tool.name, text)


@pytest.mark.parametrize("role", Role)
async def test_each_command_and_resource(tmp_path: Path, role: Role) -> None:
    async with with_keys(tmp_path) as (served, keys):
        headers = {"X-Volant-API-Key": keys[role]}
        for command, (operation, _) in COMMANDS.items():
            body = {"command": command, "params": {"none": 1}}
            error = (await served.client.post("/api/v1/mcp", json=body, headers=headers)).json()["error"]
            assert ("needs the permission" in error) is not may(role, operation), (command, error)
        for uri, operation in (("", "get_vm"), ("/logs", "vm_logs"), ("/files/x", "read_file")):
            read = await rpc(served, keys[role], "resources/read", {"uri": f"volant://vms/none{uri}"})
            text = read["error"]["message"]
            assert ("needs the permission" in text) is not may(role, operation), (uri, text)


def test_no_tool_manages_keys() -> None:
    assert not [tool.name for tool in tools(TABLE) if "key" in tool.operation]


# What no permission says: files and directories of the host belong to no project.


async def test_only_administrators_name_files_and_directories_of_the_host(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    kernel = {"url": str(tmp_path / "shared/kernel"), "sha256": "0" * 64}
    vm = {"name": "demo", "cpu_cores": 1, "memory_mb": 128}
    requests: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("/api/v1/vms", {**vm, "volumes": [f"{tmp_path}/shared:/d"]}, "host-directory-denied"),
        ("/api/v1/vms", {**vm, "image": f"oci-archive:{tmp_path}/shared/x.tar"}, "image-not-allowed"),
        ("/api/v1/images/pull", {"reference": f"oci-archive:{tmp_path}/shared/x.tar"}, "image-not-allowed"),
        ("/api/v1/plugins", {"name": "p", "boot": {"kernel": kernel, "initramfs": kernel}}, "artifact-not-allowed"),
    )
    origins = Origins((tmp_path / "shared",), ())
    async with with_keys(tmp_path, origins) as (served, keys):
        for path, body, code in requests:
            refused = await served.client.post(path, json=body, headers={"X-Volant-API-Key": keys[Role.OPERATOR]})
            assert (refused.status_code, refused.json()["type"]) == (403, f"urn:volant:error:{code}"), refused.text
            admitted = await served.client.post(path, json=body, headers={"X-Volant-API-Key": keys[Role.ADMIN]})
            assert admitted.status_code != 403, admitted.text


async def test_a_slash_at_the_end_of_a_path_of_a_stream_needs_no_other_permission(tmp_path: Path) -> None:
    async with with_keys(tmp_path) as (served, keys):
        headers = {"X-Volant-API-Key": keys[Role.USER]}
        for path in ("/api/v1/vms/none/logs", "/api/v1/vms/none/logs/"):
            assert (await served.client.get(path, headers=headers)).status_code == 404
        for path in ("/api/v1/audit", "/api/v1/audit/"):
            assert (await served.client.get(path, headers=headers)).status_code in (403, 404)
