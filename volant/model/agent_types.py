"""Types of the JSON bodies of `volant.model.agent`, for type checkers and for the OpenAPI document.

Not in that module, as `typing` is slow to import in a guest.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from ._workload_state import WorkloadState


class WorkloadStatus(TypedDict):
    """What `/healthz` and `/v1/daemon/workload` tell of the workload."""

    state: WorkloadState
    """`none`: there is none. `starting`: it has not been healthy since it was started, or waits for a restart.
    `healthy`: its check passes, or it runs and has no check. `unhealthy`: its check failed `retries` times
    in a row. `exited`: it ended with 0 and stays so. `failed`: it ended otherwise or can't be started, and stays
    so."""
    pid: int | None
    restarts: int
    exit_code: NotRequired[int]
    """Of the last run, when it ended by itself."""
    signal: NotRequired[int]
    """The number of the signal that ended the last run."""
    error: NotRequired[str]
    """Why it could not be started, or what the last failing check said. For people."""
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
    """The guest's own view of its memory, in MiB."""

    total_mb: int
    available_mb: int


class PluginInfo(TypedDict):
    """Of which plugin the VM is."""

    name: str
    version: str
    labels: dict[str, str]
    actions: list[str]
    """Their names."""


class Info(TypedDict):
    """The answer of `GET /v1/info`."""

    agent: str
    protocol: ProtocolRange
    kernel: str
    hostname: str
    boot_id: str
    instance_id: NotRequired[str]
    """Of this boot or clone, and of no other."""
    uptime_s: float
    cpus: int
    memory: Memory
    disk: NotRequired[Memory | None]
    """The root filesystem; None without one."""
    workload: WorkloadStatus
    plugin: NotRequired[PluginInfo]


class ExecRequest(TypedDict):
    """The body of `POST /v1/exec`. Answered by NDJSON: output as it comes, then exactly one last line."""

    command: list[str]
    env: NotRequired[dict[str, str]]
    """Added to the agent's own small environment and to the `env` of the manifest's `exec`, and overrides both."""
    cwd: NotRequired[str]
    """Default: the `workdir` of the manifest's `exec`, else `/`."""
    user: NotRequired[str | None]
    """A name or a number, optionally `:` and a group. None: the `user` of the manifest's `exec`, else root."""
    timeout_s: NotRequired[float | None]
    """The whole process group is killed after that many seconds. None: no limit."""
    stdin: NotRequired[str | None]
    """Base64. None: an empty standard input."""


class ExecStart(ExecRequest):
    """The first message of a WebSocket to `GET /v1/exec`."""

    tty: NotRequired[bool]
    """Whether the command gets a terminal: then all its output comes as standard output."""
    rows: NotRequired[int]
    cols: NotRequired[int]


class WorkloadStart(TypedDict):
    """The first message of a WebSocket to `GET /v1/exec?workload=true`."""

    env: NotRequired[dict[str, str]]
    """Added to the workload's, such as `TERM`."""
    tty: NotRequired[bool]
    """As in `ExecStart`."""
    rows: NotRequired[int]
    cols: NotRequired[int]


class ExecHello(TypedDict):
    """The first message to a client of a detached command."""

    id: str
    """For `?attach=`."""
    tty: bool
    position: int
    """How many bytes of output, of both channels together, came before what follows."""


class ExecGap(TypedDict):
    """A message to a client that attaches: these bytes of output are not kept any more."""

    gap: dict[Literal["from", "to"], int]
    """Positions, both included."""


class ExecOutput(TypedDict):
    """A line of the answer while the command runs."""

    stream: Literal["stdout", "stderr"]
    data: str
    """Base64."""


class ExecEnd(TypedDict):
    """The last line of the answer: one of `exit_code`, `signal` and `error`."""

    exit_code: NotRequired[int]
    signal: NotRequired[int]
    error: NotRequired[str]
    code: NotRequired[str]
    """Beside `error`: `timeout`, `not_found`, `not_executable`, `no_such_directory`, `no_such_user`,
    `spawn_failed` or `agent_error`; over a WebSocket also `invalid_request`."""
    field: NotRequired[str]
    """With `invalid_request`: which field of the request is wrong."""


class ExecSession(TypedDict):
    """A detached command."""

    id: str
    command: list[str]
    """Shortened, when it is long."""
    tty: bool
    user: str | None
    attached: bool
    age_s: float
    position: int
    """How many bytes it has written, to both channels together."""
    pid: int | None
    """While it runs."""
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
    """None: the workload's."""
    command: NotRequired[list[str]]
    interval_s: NotRequired[float]
    timeout_s: NotRequired[float]
    retries: NotRequired[int]
    start_period_s: NotRequired[float]
    """An agent without this member refuses the request."""


class WorkloadSpec(TypedDict):
    """The body of `PUT /v1/daemon/workload`: the workload of the manifest and the environment of the VM."""

    entrypoint: list[str]
    env: NotRequired[dict[str, str]]
    workdir: NotRequired[str]
    """Made if it does not exist."""
    user: NotRequired[str | None]
    """A name or a number, optionally `:` and a group. None: root. An agent without this member or the next refuses
    the request."""
    stop_signal: NotRequired[str]
    """What `signal_number` takes."""
    port: NotRequired[int | None]
    restart: NotRequired[Literal["never", "on-failure", "always"]]
    health_check: NotRequired[HealthCheckSpec | None]
    attach: NotRequired[bool]
    """Whether its first run waits for a client, who decides whether it has a terminal."""


class GuestNetwork(TypedDict):
    """Settings of a guest's NIC."""

    mac: str
    """Six pairs of hexadecimal digits, with colons in between."""
    address: str
    """IPv4."""
    prefix: int
    gateway: str
    nameservers: NotRequired[list[str]]
    """Addresses of DNS servers. Missing: `/etc/resolv.conf` stays."""
    hosts: NotRequired[dict[str, str]]
    """As by `PUT /v1/daemon/hosts`."""


class GuestSecretFile(TypedDict):
    """A file with the value of a secret."""

    path: str
    """In a directory that is in memory."""
    data: str
    """Base64."""


class GuestSecrets(TypedDict):
    """The body of `PUT /v1/daemon/secrets`."""

    boot: str
    """For which boot of which VM the values are; the agent returns it."""
    env: dict[str, str]
    """The base64 of values by environment variable."""
    files: list[GuestSecretFile]
    user: NotRequired[str | None]
    """The owner of the files, as in `WorkloadSpec`. None: root."""


class GuestVolume(TypedDict):
    """A volume or a directory of the host to mount; it has either `serial` or `tag`."""

    serial: NotRequired[str]
    """Of the volume's disk."""
    tag: NotRequired[str]
    """Of the directory's virtiofs device."""
    path: str
    """Absolute, with the VM's root as `/`."""
    read_only: bool
    nocopy: NotRequired[bool]
    """An empty volume stays empty. Missing or false: it receives what the root has at the path."""
    bytes: NotRequired[int]
    """The size that the disk will have in a moment, as it was grown."""


class Volumes(TypedDict):
    """The body of `PUT /v1/daemon/volumes`."""

    volumes: list[GuestVolume]


class Hosts(TypedDict):
    """The body of `PUT /v1/daemon/hosts`."""

    hosts: dict[str, str]
    """Addresses by name. They replace all names from before."""


class Identity(TypedDict):
    """The body of `PUT /v1/daemon/identity`."""

    hostname: str
    machine_id: str
    """32 hexadecimal digits."""
    entropy: str
    """Base64 of 64 to 512 bytes."""
    time_ns: int
    """Nanoseconds since 1970."""
    vm_id: int
    signal: NotRequired[Literal["SIGHUP", "SIGUSR1", "SIGUSR2"] | None]
    """The signal for a running workload."""
    manifest: NotRequired[dict[str, Any]]
    """As by `PUT /v1/daemon/manifest`. It and `workload` since `IDENTITY_WORKLOAD_SINCE`."""
    workload: NotRequired[WorkloadSpec]
    """As by `PUT /v1/daemon/workload`."""
    network: NotRequired[GuestNetwork]
    """New settings of the NIC; missing: the NIC stays as it is. Since `IDENTITY_NETWORK_SINCE`."""
    as_it_is: NotRequired[bool]
    """Do not check the health of the workload. Since `IDENTITY_AS_IT_IS_SINCE`."""
