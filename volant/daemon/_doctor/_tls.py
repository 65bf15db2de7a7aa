"""Checks the TLS certificate of the daemon, if it has one."""

from __future__ import annotations

from collections.abc import Sequence

from volant.model.doctor import Finding

from .._settings import SettingsError
from .._tls import RENEW, load_certificate
from ._context import Context


def tls(context: Context) -> Sequence[Finding]:
    """Checks that the certificate can be used, and how long."""
    settings = context.settings
    if not settings.uses_tls:
        return []
    if settings.tls_self_signed and not (settings.state_dir / "tls.pem").exists():
        return [Finding(check="tls", level="ok", found="the self-signed certificate is made at the first start")]
    try:
        certificate = load_certificate(settings)
    except SettingsError as error:
        return [Finding(check="tls", level="fails", found=str(error), means="volantd does not start")]
    assert certificate is not None
    trouble = certificate.trouble(context.host.clock.now())
    if trouble is not None:
        return [
            Finding(
                check="tls", level="less", found=trouble, means="clients refuse a certificate outside of its time",
                advice=RENEW,
            )
        ]  # fmt: skip
    return [Finding(check="tls", level="ok", found=f"a certificate until {certificate.expires_at:%Y-%m-%d}")]
