"""Access to the daemon by keys, tokens, certificates and addresses. A reload replaces all of them, or none."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import trio

from actors import Child
from volant.host import Host
from volant.http import Access, ApiSettings, CallerLimits, Tls
from volant.identity import IssuerTokens, NamedKeys
from volant.journal import JournalRef, Store

from ._protection import Protection
from ._settings import RELOADED, Settings, SettingsError, check, check_service, oidc_of, split, subjects_of
from ._sockets import address_of, is_reached_from_outside
from ._tls import RENEW, Certificate, load_certificate

_logger = logging.getLogger("volant.daemon")
_RELOAD_S = 10.0
_WARN_S = 86400.0
"""The interval of warnings about a certificate that expires."""

Reload = Callable[[], tuple[Settings, list[str]]]
"""Loads the settings again. Returns them and the warnings to log."""


class Checked(msgspec.Struct, frozen=True):
    """Valid settings for the daemon, and the content of files that they name."""

    settings: Settings
    protection: Protection
    certificate: Certificate | None
    """The certificate of the API; None without TLS."""


def checked(settings: Settings, *, as_service: bool) -> Checked:
    """Returns settings with the content of files that they name. :raises SettingsError: the daemon must not run with
    them.

    :param as_service: whether a service manager runs the daemon
    """
    protection = check(settings)
    if as_service and os.geteuid() == 0:
        check_service(settings, protection)
    return Checked(settings, protection, load_certificate(settings))


class Admission:
    """Decides about access, by the current settings and the keys in the journal.

    :param sockets: the sockets of the API
    :param load: loads the settings again; None if they never change
    :param journal: receives changes of keys
    """

    def __init__(
        self,
        given: Checked,
        sockets: Sequence[socket.socket],
        load: Reload | None,
        host: Host,
        store: Store,
        journal: JournalRef,
        *,
        as_service: bool,
    ) -> None:
        self._given = given
        self._sockets = sockets
        self._load = load
        self._host = host
        self._as_service = as_service
        self.keys = NamedKeys(host, store, journal)
        self._tokens = IssuerTokens(host, oidc_of(given.settings))
        self.access = Access(self._api_settings(given), self.keys, self._tokens)
        self.tls: Tls | None = None
        if given.certificate is not None:
            self.tls = Tls(given.certificate.credentials, lambda: self.access.asks_for_certificate)

    @property
    def settings(self) -> Settings:
        """The current settings."""
        return self._given.settings

    @property
    def certificate(self) -> Certificate | None:
        return self._given.certificate

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses at which clients reach the API."""
        return self._addresses(self.settings)

    @property
    def is_open(self) -> bool:
        """Whether access to another address of this host than loopback is enough to control the daemon, without a
        key."""
        if self.access.asks_for_key:
            return False
        return bool(self._given.protection.allow_cidr) or any(is_reached_from_outside(sock) for sock in self._sockets)

    def children(self, changed: Callable[[], None]) -> list[Child[Any]]:
        """Returns the children that apply keys and tokens as they are created and expire. `changed` is called after
        changes of keys."""

        def recheck() -> None:
            self.access.recheck()
            changed()

        return [
            Child("keys", partial(self.keys.keep, recheck)),
            Child("tokens", partial(self._tokens.keep, self.access.recheck)),
        ]

    async def reload(self, changed: Callable[[], None]) -> None:
        """Applies reloaded keys, certificates, networks, hosts and origins: all of them, or none if one is invalid.

        :param changed: is called once they are in force
        """
        if self._load is None:
            return
        try:
            with trio.fail_after(_RELOAD_S):
                settings, warnings = await trio.to_thread.run_sync(self._load, abandon_on_cancel=True)
                # The daemon still listens on the old addresses.
                new = {name: getattr(settings, name) for name in RELOADED}
                taken = msgspec.structs.replace(self.settings, **new)
                fresh = await trio.to_thread.run_sync(
                    partial(checked, taken, as_service=self._as_service), abandon_on_cancel=True
                )
                if (fresh.certificate is None) != (self.tls is None):
                    raise SettingsError("TLS can't be switched on or off by a reload; restart the daemon for that")
        except (SettingsError, OSError, trio.TooSlowError) as error:
            _logger.error(
                "the old settings stay, as the new ones can't be loaded: %s", str(error) or "reading took too long"
            )
            return
        for warning in warnings:
            _logger.warning("%s", warning)
        self._tokens.replace(oidc_of(taken))
        self.access.replace(self._api_settings(fresh))
        self._given = fresh
        if fresh.certificate is not None and self.tls is not None:
            cut = self.tls.replace(fresh.certificate.credentials)
            if cut:
                _logger.info("%d connections were cut, as the authority of their certificates was removed", cut)
            self._warn_of_certificate()
        changed()
        what = "" if fresh.certificate is None else ", certificates"
        _logger.info("reloaded keys, networks, hosts and origins%s", what)
        left = [name for name in Settings.__struct_fields__ if getattr(settings, name) != getattr(taken, name)]
        if left:
            _logger.warning("restart the daemon to apply these changed settings: %s", ", ".join(left))

    async def watch_certificate(self) -> None:
        """Warns of a certificate that expires, each day."""
        while self.certificate is not None:
            self._warn_of_certificate()
            await trio.sleep(_WARN_S)

    def _warn_of_certificate(self) -> None:
        trouble = self.certificate and self.certificate.trouble(self._host.clock.now())
        if trouble:
            _logger.warning("%s; %s", trouble, RENEW)

    def _api_settings(self, given: Checked) -> ApiSettings:
        settings, protection = given.settings, given.protection
        return ApiSettings(
            addresses=self._addresses(settings),
            allowed_hosts=tuple(split(settings.allowed_hosts)),
            cors_origins=tuple(split(settings.cors_origins)),
            api_keys=tuple(key.reveal() for key in protection.keys),
            subjects=subjects_of(settings),
            allow_cidr=protection.allow_cidr,
            trusted_proxies=protection.trusted_proxies,
            caller_limits=CallerLimits(
                settings.key_requests_per_s, settings.key_requests_at_once, settings.key_body_kb * 1024
            ),
        )

    def _addresses(self, settings: Settings) -> tuple[str, ...]:
        return tuple(address_of(sock, tls=settings.uses_tls) for sock in self._sockets)
