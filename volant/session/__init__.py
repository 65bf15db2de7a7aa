"""The session with one guest: its agent, clock, names, secrets, workload, output and serial console."""

from ._console import ConsolePump as ConsolePump, console_source as console_source
from ._peers import Peers as Peers
from ._secrets import SecretsFailed as SecretsFailed, guest_secrets as guest_secrets
from ._serial import (
    Keyboard as Keyboard,
    KeyboardTaken as KeyboardTaken,
    Missed as Missed,
    NotTyped as NotTyped,
    Reader as Reader,
    SerialConsole as SerialConsole,
)
from ._session import (
    AgentSession as AgentSession,
    GuestLimits as GuestLimits,
    RootFailed as RootFailed,
    VolumesFailed as VolumesFailed,
)
