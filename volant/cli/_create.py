"""`volar vms create`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from volant.client import Waited
from volant.model import BASE, MAX_REPLICAS, READY, CreateVm, Egress, Failover, Placement, Replicate, RestoreVm

from ._complete import network_choices, plugin_names, snapshot_names
from ._image_options import image_members, image_options, registry_options
from ._options import Size, egress_option, volume_option
from ._run import Pair, Session, command
from ._variables import env_file_option, env_option, env_secret_option, secret_option, variables, with_secrets
from ._vm_output import done, warn
from ._vms_group import name_argument, timeout_option, wait_for_outcome, wait_option


class _Text(click.ParamType[Replicate]):
    """`5m`, or `5m:2` for two hosts. The daemon parses the duration."""

    name = "every[:hosts]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Replicate:
        if isinstance(value, Replicate):
            return value
        every, colon, hosts = str(value).partition(":")
        if colon and not (hosts.isascii() and hosts.isdecimal() and 1 <= int(hosts) <= MAX_REPLICAS):
            self.fail(f"{hosts!r} is no number of hosts from 1 to {MAX_REPLICAS}; write it like 5m or 5m:2", param, ctx)
        return Replicate(every=every, to=int(hosts) if colon else 1)


def replicate_option(function: F) -> F:
    """Adds the option `--replicate` to a command, as the parameter `replicate`."""
    return click.option(
        "--replicate",
        type=_Text(),
        metavar="EVERY[:HOSTS]",
        help="For --failover restore: how often to copy it to another host, such as 5m; 5m:2 for two hosts.",
    )(function)


_ADJECTIVES = """
able agile amber brave brief bright brisk broad calm clever cosy crisp curious deft eager early easy even fair fast
fine firm fond fresh gentle glad golden grand green happy hardy honest humble jolly keen kind light lively lucky
mellow merry mild modest neat nimble noble open patient plain polite prompt proud quick quiet rapid ready royal shy
silent silver simple sleek smart smooth snug sober solid steady still stout sunny swift tidy tiny vivid warm wise
witty young
"""
_NOUNS = """
acorn alder ant badger bay beaver bee birch bison brook canyon cedar cliff clover comet coral crane creek cricket
delta dune eagle elm falcon fern finch fjord forest fox garden gecko glade grove gull harbor hare hawk hazel heron
hill ibis island ivy jay koala lagoon lake lark lemur lily linden lotus lynx magpie maple marten meadow mole moose
moss newt oak ocean olive orchid osprey otter owl panda pebble pine plover pond poplar puffin quail rabbit raven reef
ridge river robin rook sage seal shore sparrow spruce stone stork swan swift thrush tiger toad trout tulip valley
walrus willow wolf wren
"""


def generated_name() -> str:
    """Returns a name of two words."""
    return f"{random.choice(_ADJECTIVES.split())}-{random.choice(_NOUNS.split())}"


if TYPE_CHECKING:
    from volant.client import Client

F = TypeVar("F", bound=Callable[..., Any])


def _choice(option: str, values: Sequence[str], text: str) -> Callable[[F], F]:
    """Returns an option with a choice of values; the first is the default."""
    return click.option(option, type=click.Choice(values), default=values[0], show_default=True, help=text)


@command(None, "create")
@name_argument
@click.argument("words", metavar="[COMMAND]...", nargs=-1, type=click.UNPROCESSED)
@click.option("--image", help="An OCI image in place of a plugin. COMMAND replaces the image's command.")
@image_options
@click.option("--no-start", is_flag=True, help="With --image: do not start its program with the VM.")
@registry_options
@click.option("--cpus", "--cpu", "cpu_cores", type=click.IntRange(min=1), help="vCPUs.  [default: the plugin's]")
@click.option(
    "-m",
    "--memory",
    "memory_mb",
    type=Size(64),
    metavar="SIZE",
    help="Memory: 512M, 2G, or a number of MiB.  [default: the plugin's]",
)
@click.option(
    "--plugin", show_default="base", shell_complete=plugin_names, help="The plugin, which defines what the VM runs."
)
@env_option
@env_file_option
@env_secret_option
@secret_option
@click.option("-l", "--label", "labels", type=Pair(), multiple=True, help="KEY=VALUE; may be repeated.")
@click.option("--runtime", help="The boot image, if not the plugin's.")
@click.option("--cmdline", "kernel_cmdline", default="", help="Appended to the kernel's command line.")
@_choice("--restart-policy", ["never", "on-failure", "always"], "When the daemon restarts the VM.")
@_choice(
    "--failover",
    ["never", "restart", "restore"],
    "If its host fails, another host of the fleet boots it (restart) or continues it (restore).",
)
@replicate_option
@click.option("--zone", help="Only on hosts of a fleet in this zone.")
@click.option("--host-label", "host_labels", type=Pair(), multiple=True, help="Only on hosts with KEY=VALUE.")
@click.option("--affinity", type=Pair(), multiple=True, help="Only on hosts with a VM that has the label KEY=VALUE.")
@click.option("--anti-affinity", type=Pair(), multiple=True, help="Only on hosts without a VM that has KEY=VALUE.")
@_choice("--boot", ["auto", "cold", "template"], "How to boot: auto clones a template if there is one.")
@click.option(
    "--from-snapshot",
    shell_complete=snapshot_names,
    help="Restore this snapshot; vCPUs, memory and plugin come from it.",
)
@click.option(
    "--network",
    shell_complete=network_choices,
    help="none, bridge, user, or a network's name.  [default: the daemon's setting]",
)
@click.option(
    "-p",
    "--publish",
    "ports",
    multiple=True,
    metavar="[HOST:]PORT:GUEST_PORT[/udp]",
    help="Publish a port of the VM on the host, on 127.0.0.1 without HOST; may be repeated.",
)
@click.option(
    "--disk",
    "--disk-mb",
    "disk_mb",
    type=Size(),
    metavar="SIZE",
    help="Size of the disk: 10G, or a number of MiB; default: the size of the plugin's root filesystem.",
)
@egress_option("the VM", default="the project's policy")
@volume_option
@click.option("--disk-iops", type=click.IntRange(min=10), help="Maximum reads and writes per second, of all its disks.")
@click.option("--disk-mbps", type=click.IntRange(min=1), help="Maximum MiB per second, of all its disks.")
@click.option("--ttl", help="Delete the VM after this time: 30m, 2h, …")
@click.option(
    "--idempotency-key",
    metavar="WORD",
    help="A repetition with the same word within a day returns the VM that was created.",
)
@wait_option
@timeout_option
async def create(
    session: Session,
    /,
    name: str,
    words: tuple[str, ...],
    image: str | None,
    no_start: bool,
    authfile: Path | None,
    registry_secret: str | None,
    cpu_cores: int | None,
    memory_mb: int | None,
    plugin: str | None,
    env: tuple[str, ...],
    env_files: tuple[Path, ...],
    env_secrets: tuple[tuple[str, str], ...],
    secrets: tuple[str, ...],
    labels: tuple[tuple[str, str], ...],
    runtime: str | None,
    kernel_cmdline: str,
    restart_policy: Literal["never", "on-failure", "always"],
    failover: Failover,
    replicate: Replicate | None,
    zone: str | None,
    host_labels: tuple[tuple[str, str], ...],
    affinity: tuple[tuple[str, str], ...],
    anti_affinity: tuple[tuple[str, str], ...],
    boot: Literal["auto", "cold", "template"],
    from_snapshot: str | None,
    network: str | None,
    ports: tuple[str, ...],
    egress: Egress | None,
    disk_mb: int | None,
    volumes: tuple[str, ...],
    disk_iops: int | None,
    disk_mbps: int | None,
    ttl: str | None,
    idempotency_key: str | None,
    wait: bool,
    timeout: float,
    **program: Any,
) -> int:
    """Create a VM and boot it, or restore it from a snapshot.

    With --image it runs the program of an OCI image; `volar run` is a shorter form. Put -- before a COMMAND with
    options.
    """
    members = image_members(words, **program)
    if image is None and (no_start or authfile or registry_secret or any(members.values())):
        raise click.UsageError("COMMAND and the options of an image's program are only for --image")
    if image is not None and (plugin or from_snapshot):
        raise click.UsageError("--image excludes --plugin and --from-snapshot")
    common: dict[str, Any] = {
        "name": name,
        "cpu_cores": cpu_cores,
        "memory_mb": memory_mb,
        "labels": dict(labels),
        "restart_policy": restart_policy,
        "boot": boot,
        "ttl": ttl,
    }
    request: CreateVm | RestoreVm
    if from_snapshot is not None:
        if env or env_files or runtime or kernel_cmdline:
            raise click.UsageError("--env, --runtime and --cmdline are the snapshot's, with --from-snapshot")
        if env_secrets or secrets:
            raise click.UsageError("--env-secret and --secret are the snapshot's, with --from-snapshot")
        if zone or host_labels or affinity or anti_affinity:
            raise click.UsageError("--from-snapshot makes the VM on the host that has the snapshot")
        if failover != "never" or replicate is not None:
            raise click.UsageError("--failover is not for a VM that continues from a snapshot, which one host has")
        if disk_mb is not None:
            raise click.UsageError("--disk is the snapshot's, with --from-snapshot")
        if volumes or disk_iops or disk_mbps:
            raise click.UsageError("--volume and the limits of disks are the snapshot's, with --from-snapshot")
        if network or ports or egress:
            raise click.UsageError(
                "--network and --egress are the snapshot's, with --from-snapshot, and no ports are published"
            )
        request = RestoreVm(from_snapshot=from_snapshot, plugin=plugin, **common)
    else:
        request = CreateVm(
            plugin=plugin or BASE.name,
            failover=failover,
            replicate=replicate,
            placement=_placement(zone, host_labels, affinity, anti_affinity),
            image=image,
            registry_secret=registry_secret,
            start_workload=not no_start,
            env=with_secrets(variables(env, env_files), env_secrets),
            secrets=secrets,
            **members,
            runtime=runtime,
            kernel_cmdline=kernel_cmdline,
            network=network,
            ports=ports,
            egress=egress,
            disk_mb=disk_mb,
            volumes=volumes,
            disk_iops=disk_iops,
            disk_mbps=disk_mbps,
            **common,
        )
    auth = None if image is None else _registry_auth(image, authfile, registry_secret)
    if wait:

        async def create_and_wait(client: Client) -> Waited:
            vm = await client.vms.create(request, idempotency_key=idempotency_key, registry_auth=auth)
            return await client.vms.wait(vm.name, (READY,), timeout_s=timeout)

        return wait_for_outcome(session, name, create_and_wait, READY, timeout)
    vm = await session.client.vms.create(request, idempotency_key=idempotency_key, registry_auth=auth)
    done(session.out, vm, "is created")
    warn(session.out, vm)
    return 0


def _registry_auth(image: str, authfile: Path | None, registry_secret: str | None) -> str | None:
    # It takes a while to import, and only images need it.
    from ._registry_auth import registry_auth

    return registry_auth(image, authfile, registry_secret)


def _placement(
    zone: str | None,
    labels: tuple[tuple[str, str], ...],
    affinity: tuple[tuple[str, str], ...],
    anti_affinity: tuple[tuple[str, str], ...],
) -> Placement | None:
    wanted = Placement(zone=zone, labels=dict(labels), affinity=dict(affinity), anti_affinity=dict(anti_affinity))
    return None if wanted == Placement() else wanted
