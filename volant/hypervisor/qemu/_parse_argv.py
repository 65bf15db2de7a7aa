"""Parses a command line of `build_argv`, for processes that no VM owns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import dropwhile, pairwise
from pathlib import Path

from volant.hypervisor._interface import Disk, Nic, ParsedMachine
from volant.model.agent import IMAGE_PARAMETER, NAMESERVERS_PARAMETER, NETWORK_PARAMETER, ROOT_PARAMETER

from ._argv import CMDLINE, HOSTNAME_PARAMETER, TRUST_TSC, TSC_RATE
from ._volume_disks import count_directories, parse_volumes

_PARAMETERS = (HOSTNAME_PARAMETER, ROOT_PARAMETER, IMAGE_PARAMETER, NETWORK_PARAMETER, NAMESERVERS_PARAMETER)
_DAEMONS_WORDS = frozenset((*CMDLINE.split(), TRUST_TSC))


def parse_argv(argv: Sequence[str]) -> ParsedMachine | None:
    """Returns the machine of a command line; None if this or an earlier `build_argv` did not build it."""
    try:
        return _parse(argv)
    except (KeyError, StopIteration, ValueError):
        return None


def _parse(argv: Sequence[str]) -> ParsedMachine:
    options = list(pairwise(argv))
    given = dict(options)
    # Nodes in JSON have no file of their own.
    blocks = [_fields(text) for name, text in options if name == "-blockdev" and not text.startswith("{")]
    nodes = {fields["node-name"]: fields for fields in blocks}
    memory = next(_fields(text) for name, text in options if name == "-object" and "mem-path=" in text)
    # Earlier versions of the daemon gave a part of these words.
    words = list(dropwhile(_is_daemons, given["-append"].split()))
    parameters = dict(word.partition("=")[::2] for word in words)
    ours = tuple(f"{name}=" for name in _PARAMETERS)
    is_clone = memory["share"] == "off"
    root = None
    if "root-layer-file" in nodes:
        layer = Path(nodes["root-layer-file"]["filename"])
        root = Disk(_file(nodes, "root-base-file"), layer, image=_file(nodes, "image-file"))
    devices = [text for name, text in options if name == "-device"]
    return ParsedMachine(
        name=parameters.get(HOSTNAME_PARAMETER, "") if is_clone else parameters[HOSTNAME_PARAMETER],
        cpu_cores=int(given["-smp"]),
        memory_mb=int(given["-m"].removesuffix("M")),
        accelerator="kvm" if given["-accel"] == "kvm" else "tcg",
        kernel=Path(given["-kernel"]),
        initramfs=Path(given["-initrd"]),
        cmdline=" ".join(word for word in words if not word.startswith(ours)),
        memory_file=None if is_clone else Path(memory["mem-path"]),
        root=root,
        template=Path(memory["mem-path"]).parent if is_clone else None,
        balloon=any(text.startswith("virtio-balloon-") for text in devices),
        nic=_nic(options, parameters),
        volumes=tuple(parse_volumes(nodes, [_fields(text) for text in devices])),
        directory_count=count_directories(devices),
    )


def _is_daemons(word: str) -> bool:
    return word in _DAEMONS_WORDS or word.startswith(TSC_RATE)


def _nic(options: Sequence[tuple[str, str]], parameters: Mapping[str, str]) -> Nic | None:
    devices = [_fields(text) for name, text in options if name == "-device" and text.startswith("virtio-net-")]
    if not devices:
        return None
    behind = _fields(next(text for name, text in options if name == "-netdev"))
    # Earlier versions of the daemon let QEMU connect to the socket itself.
    socket = behind.get("addr.path")
    network, nameservers = parameters.get(NETWORK_PARAMETER), parameters.get(NAMESERVERS_PARAMETER)
    address, gateway, _ = network.split(",") if network else ("", "", "")
    return Nic(
        mac=devices[0]["mac"],
        tap=behind["id"] if "tap" in behind else None,
        socket=None if socket is None else Path(socket),
        address=address,
        gateway=gateway,
        nameservers=tuple(nameservers.split(",")) if nameservers else (),
    )


def _file(nodes: Mapping[str, Mapping[str, str]], name: str) -> Path | None:
    """Returns the file of a block node; None if there is no such node."""
    node = nodes.get(name)
    return None if node is None else Path(node["filename"])


def _fields(text: str) -> dict[str, str]:
    """Returns the fields of an option, in which a comma is written twice."""
    parts = text.replace(",,", "\0").split(",")
    return {name: value.replace("\0", ",") for name, _, value in (part.partition("=") for part in parts)}
