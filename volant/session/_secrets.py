"""Sends the values of a VM's secrets to its guest."""

from __future__ import annotations

import base64

import msgspec

from volant.channel import AgentProtocolError
from volant.model import VmRow
from volant.secrets import SecretFailed, Secrets


class SecretsFailed(AgentProtocolError):
    """The guest can't receive its secrets. The text is for people, and contains no part of a value."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class GuestSecrets(msgspec.Struct, frozen=True):
    """The secrets of one boot of a VM."""

    secrets: Secrets
    row: VmRow
    boot: str
    """The id of the boot, for the agent: a boot's values do not change."""

    async def body(self) -> dict[str, object]:
        """Returns the body of `PUT /v1/daemon/secrets`, with the present values. :raises SecretsFailed:"""
        try:
            values = await self.secrets.values_for(self.row)
        except SecretFailed as error:
            raise SecretsFailed(error.code, str(error)) from None
        manifest = self.row.manifest
        owner = manifest.workload or manifest.exec
        return {
            "boot": self.boot,
            "env": {name: _encoded(value) for name, value in values.env.items()},
            "files": [{"path": path, "data": _encoded(value)} for path, value in values.files.items()],
            "user": None if owner is None else owner.user,
        }


def guest_secrets(secrets: Secrets, row: VmRow, instance: str) -> GuestSecrets | None:
    """Returns the secrets of a VM's present boot; None if it has none.

    :param instance: the name of this daemon
    """
    if not row.secret_env and not row.secrets:
        return None
    return GuestSecrets(secrets, row, f"{instance}.{row.boot_key}")


def _encoded(value: bytes) -> str:
    return base64.b64encode(value).decode()
