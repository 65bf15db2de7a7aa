"""DNS messages: queries of guests, answers to them, and questions to the host's DNS servers and their answers.

dnspython reads and writes the wire format. It is imported when the first VM has an egress policy.
"""

from __future__ import annotations

import re
import secrets
from importlib.util import find_spec
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from dns.message import Message
    from dns.rdtypes.IN.A import A

_PAYLOAD = 1232
"""Size of a UDP message that no common network has to split, from the DNS flag day of 2020."""
MAX_ADDRESSES = 24
"""Maximum addresses in an answer. Others are left out, as programs only try a few."""
_PLAIN = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\Z")


class MalformedMessage(Exception):
    """The received data is no DNS message, or not the expected one."""


def dns_obstacle() -> str | None:
    """Returns why no resolver can run and what to do, or None."""
    if find_spec("dns") is None:
        return "dnspython is not installed: run `pip install 'volant[egress]'` and restart the daemon"
    return None


class Query(msgspec.Struct, frozen=True):
    """A query of a guest."""

    message: Message
    name: str
    """The name in lower case and without a final dot. It may contain escapes of dnspython, if it is not plain."""
    is_plain: bool
    """Whether the name has only letters, digits, hyphens and underscores. A dot inside of a label is written as an
    escape, and must not match a rule."""
    kind: str
    """The record type: `A`, `AAAA`, …"""


class Answer(msgspec.Struct, frozen=True):
    """A DNS server's answer about the addresses of a name."""

    addresses: tuple[str, ...] = ()
    ttl_s: int = 0
    """The smallest TTL of the chain that leads to the addresses."""
    continues_at: str | None = None
    """The end of a chain of CNAMEs without addresses."""
    exists: bool = True


class Truncated(Exception):
    """The answer did not fit; ask again over TCP."""


def read_query(data: bytes) -> Query:
    """Parses a query. :raises MalformedMessage: it is no query for one internet name."""
    from dns import exception, flags, message, opcode, rdataclass, rdatatype

    try:
        found = message.from_wire(data)
    except (exception.DNSException, ValueError, IndexError) as error:
        raise MalformedMessage(str(error)) from error
    if found.flags & flags.QR or found.opcode() != opcode.QUERY or len(found.question) != 1:
        raise MalformedMessage("it is not a query for one name")
    (question,) = found.question
    if question.rdclass != rdataclass.IN:
        raise MalformedMessage("it is not a query about the internet")
    name = question.name.to_text(omit_final_dot=True).lower()
    return Query(found, name, _PLAIN.match(name) is not None, rdatatype.to_text(question.rdtype))


def denial(query: Query, why: str) -> bytes:
    """Returns the answer for a name that the VM may not resolve: it does not exist, and it is blocked.

    REFUSED would be more exact, but glibc reports it as a temporary failure, and programs retry for minutes.
    """
    from dns import rcode

    return _reply(query, rcode.NXDOMAIN, why)


def failure(query: Query, why: str) -> bytes:
    """Returns the answer to a query that can't be answered now."""
    from dns import rcode

    return _reply(query, rcode.SERVFAIL, why)


def answer(query: Query, found: Answer, *, tcp: bool) -> bytes:
    """Returns the answer with these addresses, and none for another type of record. A chain of CNAMEs is left out.

    An answer that is too long for UDP tells the guest to use TCP.
    """
    from dns import exception, flags, rcode, rdatatype, rrset
    from dns.message import make_response

    reply = make_response(query.message, recursion_available=True)
    if not found.exists:
        reply.set_rcode(rcode.NXDOMAIN)
    name = query.message.question[0].name
    if query.kind == "A" and found.addresses:
        reply.answer.append(rrset.from_text(name, found.ttl_s, "IN", rdatatype.A, *found.addresses[:MAX_ADDRESSES]))
    try:
        return reply.to_wire(max_size=65535 if tcp else min(_PAYLOAD, max(512, query.message.payload)))
    except exception.TooBig:
        reply.answer.clear()
        reply.flags |= flags.TC
        return reply.to_wire()


def question(name: str) -> bytes:
    """Returns the question for the addresses of a name, with a random id."""
    from dns import message, rdatatype

    made = message.make_query(name, rdatatype.A, use_edns=0, payload=_PAYLOAD, id=secrets.randbits(16))
    return made.to_wire()


def read_answer(asked: bytes, data: bytes) -> Answer:
    """Returns a DNS server's answer to a question.

    :raises MalformedMessage: it is no answer to that question, or no valid message.
    :raises Truncated:
    """
    from dns import exception, flags, message, rcode

    if data[:2] != asked[:2]:
        raise MalformedMessage("it has another id")
    try:
        sent, found = message.from_wire(asked), message.from_wire(data)
        if not sent.is_response(found) or not isinstance(found, message.QueryMessage):
            raise MalformedMessage("it is not an answer to the question")
        if found.flags & flags.TC:
            raise Truncated
        code = found.rcode()
        if code == rcode.NXDOMAIN:
            return Answer(exists=False)
        if code != rcode.NOERROR:
            raise MalformedMessage(f"the server answers {rcode.to_text(code)}")
        # Follows the chain from the question; other records of the answer don't count.
        chain = found.resolve_chaining()
    except (exception.DNSException, ValueError, IndexError) as error:
        raise MalformedMessage(str(error)) from error
    if chain.answer is not None:
        records: list[A] = list(chain.answer)
        return Answer(tuple(record.address for record in records), chain.minimum_ttl)
    if chain.cnames:
        return Answer((), chain.minimum_ttl, chain.canonical_name.to_text(omit_final_dot=True))
    return Answer((), 0)


def _reply(query: Query, code: int, why: str) -> bytes:
    from dns import edns, rcode
    from dns.message import make_response

    reply = make_response(query.message, recursion_available=True)
    reply.set_rcode(rcode.Rcode(code))
    if query.message.edns >= 0:
        # RFC 8914: why, for people who use `dig`.
        reason = edns.EDECode.BLOCKED if code == rcode.NXDOMAIN else edns.EDECode.OTHER
        reply.use_edns(edns=0, payload=_PAYLOAD, options=[edns.EDEOption(reason, why)])
    return reply.to_wire()
