"""Types of the JSON bodies of `volant.model.agent`, for type checkers and for the OpenAPI document.

Not in that module, as `typing` is slow to import in a guest.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from ._workload_state import WorkloadState


class WorkloadStatus(TypedDict):
    """The state of the workload in answers of `/healthz` and `/v1/daemon/workload`."""

    state: WorkloadState
    """`none`: there is no workload. `starting`: it has not been healthy since it was started, or waits for a restart.
    `healthy`: its check passes, or it runs and has no check. `unhealthy`: its check failed `retries` times in a row.
    `exited`: it exited with 0 and stays so. `failed`: it failed or can't be started, and stays so."""
    pid: int | None
    restarts: int
    exit_code: NotRequired[int]
    """The exit code of the last run, if it ended by itself."""
    signal: NotRequired[int]
    """The number of the signal that ended the last run."""
    error: NotRequired[str]
    """Why it could not be started, or the output of the last failing check. For people."""
    since_s: NotRequired[float]
    """Seconds since `state` last changed."""


class Healthz(TypedDict):
    """The answer of `GET /healthz`."""

    status: Literal["ok"]
    protocol: int
    agent: str
    uptime_s: float
    workload: WorkloadStatus


class ProtocolRange(TypedDict):
    """The versions of this protocol that a side speaks, both ends included."""

    min: int
    max: int


class Memory(TypedDict):
    """The guest's own figures for its memory, in MiB."""

    total_mb: int
    available_mb: int


class PluginInfo(TypedDict):
    """The VM's plugin."""

    name: str
    version: str
    labels: dict[str, str]
    actions: list[str]
    """The names of its actions."""


class Info(TypedDict):
    """The answer of `GET /v1/info`."""

    agent: str
    protocol: ProtocolRange
    kernel: str
    hostname: str
    boot_id: str
    instance_id: NotRequired[str]
    """An id that only this boot or clone has."""
    uptime_s: float
    cpus: int
    memory: Memory
    disk: NotRequired[Memory | None]
    """The root filesystem; null without one."""
    workload: WorkloadStatus
    plugin: NotRequired[PluginInfo]


class ExecRequest(TypedDict):
    """The body of `POST /v1/exec`. The answer is NDJSON: output as it arrives, then exactly one last line."""

    command: list[str]
    env: NotRequired[dict[str, str]]
    """Variables added to the agent's own small environment and to the `env` of the manifest's `exec`. They override
    both."""
    cwd: NotRequired[str]
    """The working directory. Defaults to the `workdir` of the manifest's `exec`, otherwise to `/`."""
    user: NotRequired[str | None]
    """A name or a number, optionally `:` and a group. Null for the `user` of the manifest's `exec`, otherwise root."""
    timeout_s: NotRequired[float | None]
    """The whole process group is killed after that many seconds. Null for no limit."""
    stdin: NotRequired[str | None]
    """The standard input in base64; null for an empty one."""


class ExecStart(ExecRequest):
    """The first message of a WebSocket to `GET /v1/exec`."""

    tty: NotRequired[bool]
    """Whether the command gets a terminal. All its output is then standard output."""
    rows: NotRequired[int]
    cols: NotRequired[int]


class WorkloadStart(TypedDict):
    """The first message of a WebSocket to `GET /v1/exec?workload=true`."""

    env: NotRequired[dict[str, str]]
    """Variables added to the workload's environment, such as `TERM`."""
    tty: NotRequired[bool]
    """See `ExecStart`."""
    rows: NotRequired[int]
    cols: NotRequired[int]


class ExecHello(TypedDict):
    """The first message to a client of a detached command."""

    id: str
    """The id for `?attach=`."""
    tty: bool
    position: int
    """The number of earlier bytes of output, of both channels together."""


class ExecGap(TypedDict):
    """A message to a client that attaches: these bytes of output have expired."""

    gap: dict[Literal["from", "to"], int]
    """Positions, both included."""


class ExecOutput(TypedDict):
    """A line of the answer while the command runs."""

    stream: Literal["stdout", "stderr"]
    data: str
    """The output in base64."""


class ExecEnd(TypedDict):
    """The last line of the answer: one of `exit_code`, `signal` and `error`."""

    exit_code: NotRequired[int]
    signal: NotRequired[int]
    error: NotRequired[str]
    code: NotRequired[str]
    """Beside `error`: `timeout`, `not_found`, `not_executable`, `no_such_directory`, `no_such_user`,
    `spawn_failed` or `agent_error`; over a WebSocket also `invalid_request`."""
    field: NotRequired[str]
    """With `invalid_request`: the wrong field of the request."""


class ExecSession(TypedDict):
    """A detached command."""

    id: str
    command: list[str]
    """The command, shortened if it is long."""
    tty: bool
    user: str | None
    attached: bool
    age_s: float
    position: int
    """The number of bytes that it has written, to both channels together."""
    pid: int | None
    """The process id while it runs."""
    end: ExecEnd | None
    ended_s: NotRequired[float]
    """Seconds since its end."""


class ExecSessions(TypedDict):
    """The answer of `GET /v1/exec/sessions`."""

    sessions: list[ExecSession]


class HealthCheckSpec(TypedDict):
    """Either `path`, fetched from `port`, or `command`, which must exit 0."""

    path: NotRequired[str | None]
    port: NotRequired[int | None]
    """Null for the workload's port."""
    command: NotRequired[list[str]]
    interval_s: NotRequired[float]
    timeout_s: NotRequired[float]
    retries: NotRequired[int]
    start_period_s: NotRequired[float]
    """An agent that does not know this member refuses the request."""


class WorkloadSpec(TypedDict):
    """The body of `PUT /v1/daemon/workload`: the workload of the manifest and the environment of the VM."""

    entrypoint: list[str]
    env: NotRequired[dict[str, str]]
    workdir: NotRequired[str]
    """The working directory, created if it does not exist."""
    user: NotRequired[str | None]
    """A name or a number, optionally `:` and a group. Null for root. An agent that does not know this member or the
    next refuses the request."""
    stop_signal: NotRequired[str]
    """A signal in a form that `signal_number` accepts."""
    port: NotRequired[int | None]
    restart: NotRequired[Literal["never", "on-failure", "always"]]
    health_check: NotRequired[HealthCheckSpec | None]
    attach: NotRequired[bool]
    """Whether its first run waits for a client, which decides whether it has a terminal."""


class GuestNetwork(TypedDict):
    """Settings of a guest's NIC."""

    mac: str
    """Six pairs of hexadecimal digits, separated by colons."""
    address: str
    """An IPv4 address."""
    prefix: int
    gateway: str
    nameservers: NotRequired[list[str]]
    """Addresses of DNS servers. If missing, `/etc/resolv.conf` stays as it is."""
    hosts: NotRequired[dict[str, str]]
    """The hosts entries, as in `PUT /v1/daemon/hosts`."""


class GuestSecretFile(TypedDict):
    """A file with the value of a secret."""

    path: str
    """A path in a directory that is in memory."""
    data: str
    """The value in base64."""


class GuestSecrets(TypedDict):
    """The body of `PUT /v1/daemon/secrets`."""

    boot: str
    """The boot and the VM for which the values are. The agent returns it."""
    env: dict[str, str]
    """The values in base64, by environment variable."""
    files: list[GuestSecretFile]
    user: NotRequired[str | None]
    """The owner of the files, as in `WorkloadSpec`. Null for root."""


class GuestVolume(TypedDict):
    """A volume or a directory of the host to mount; it has either `serial` or `tag`."""

    serial: NotRequired[str]
    """The serial number of the volume's disk."""
    tag: NotRequired[str]
    """The tag of the directory's virtiofs device."""
    path: str
    """An absolute path, with the VM's root as `/`."""
    read_only: bool
    nocopy: NotRequired[bool]
    """Whether an empty volume stays empty. If missing or false, the files at the path are copied to it."""
    bytes: NotRequired[int]
    """The size of the disk after the growth that is under way."""


class Volumes(TypedDict):
    """The body of `PUT /v1/daemon/volumes`."""

    volumes: list[GuestVolume]


class Hosts(TypedDict):
    """The body of `PUT /v1/daemon/hosts`."""

    hosts: dict[str, str]
    """Addresses by name. They replace all earlier names."""


class Identity(TypedDict):
    """The body of `PUT /v1/daemon/identity`."""

    hostname: str
    machine_id: str
    """32 hexadecimal digits."""
    entropy: str
    """64 to 512 random bytes in base64."""
    time_ns: int
    """Nanoseconds since 1970."""
    vm_id: int
    signal: NotRequired[Literal["SIGHUP", "SIGUSR1", "SIGUSR2"] | None]
    """The signal for a running workload."""
    manifest: NotRequired[dict[str, Any]]
    """See `PUT /v1/daemon/manifest`. It and `workload` exist since `IDENTITY_WORKLOAD_SINCE`."""
    workload: NotRequired[WorkloadSpec]
    """See `PUT /v1/daemon/workload`."""
    network: NotRequired[GuestNetwork]
    """New settings of the NIC. If missing, the NIC stays as it is. Since `IDENTITY_NETWORK_SINCE`."""
    as_it_is: NotRequired[bool]
    """Whether to skip the health check of the workload. Since `IDENTITY_AS_IT_IS_SINCE`."""
