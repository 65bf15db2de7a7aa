"""Parsing of requests: malformed ones are refused, and no input makes the agent hang, grow or crash."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from tests.guest.conftest import Answer, Asker
from volant.guest._http import BodyFilter, Framing, Problem, framing_of, parse_request
from volant.model import agent as wire


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: a", 200),
        (b"GET /healthz HTTP/1.1", 200),
        (b"GET  /healthz HTTP/1.1\r\nHost: a", 400),
        (b"GET /healthz", 400),
        (b"GET /heal thz HTTP/1.1\r\nHost: a", 400),
        (b"GET /\x00 HTTP/1.1\r\nHost: a", 400),
        (b"GET /\xc3\xa4 HTTP/1.1\r\nHost: a", 400),
        (b"GET http://a/healthz HTTP/1.1\r\nHost: a", 400),
        (b"G(T /healthz HTTP/1.1\r\nHost: a", 400),
        (b"GET /healthz HTTP/1.0\r\nHost: a", 505),
        (b"GET /healthz HTTP/2.0\r\nHost: a", 505),
        (b"GET /healthz http/1.1\r\nHost: a", 400),
        (b"GET /healthz HTTP/1.1\nHost: a", 400),
        (b"GET /healthz HTTP/1.1\r\nHost : a", 400),
        (b"GET /healthz HTTP/1.1\r\n folded: a", 400),
        (b"GET /healthz HTTP/1.1\r\nX: a\r\n b", 400),
        (b"GET /healthz HTTP/1.1\r\nX: a\rb", 400),
        (b"GET /healthz HTTP/1.1\r\n: a", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b", 400),
        (b"POST /v1/exec HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1", 400),
        (b"POST /v1/exec HTTP/1.1\r\nContent-Length: +1", 400),
        (b"POST /v1/exec HTTP/1.1\r\nContent-Length: 1, 1", 400),
        (b"POST /v1/exec HTTP/1.1\r\nContent-Length: 9999999999999999999", 400),
        (b"POST /v1/exec HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked", 400),
        (b"POST /v1/exec HTTP/1.1\r\nTransfer-Encoding: gzip, chunked", 400),
        (b"POST /v1/exec HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked", 400),
        (b"POST /v1/exec HTTP/1.1\r\nContent-Length: 1048577", 413),
        (b"POST /v1/exec HTTP/1.1\r\nExpect: miracles\r\nContent-Length: 1", 417),
        (b"GET /healthz HTTP/1.1" + b"\r\nX: a" * 300, 400),
        (b"GET /healthz HTTP/1.1\r\nX: " + b"a" * wire.MAX_HEAD_BYTES, 431),
        (b"DELETE /healthz HTTP/1.1\r\nHost: a", 405),
        (b"GET /v1/nothing HTTP/1.1\r\nHost: a", 404),
        (b"GET /v1/exec HTTP/1.1\r\nHost: a", 426),
        (b"GET / HTTP/1.1\r\nHost: a", 404),
        (b"CONNECT 127.0.0.1 HTTP/1.1\r\nHost: a", 400),
        (b"CONNECT 127.0.0.1:0 HTTP/1.1\r\nHost: a", 400),
        (b"CONNECT 127.0.0.1:99999 HTTP/1.1\r\nHost: a", 400),
        (b"CONNECT 10.0.0.1:80 HTTP/1.1\r\nHost: a", 403),
        (b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: a", 502),
    ],
)
def test_each_head_gets_its_status(agent: Asker, head: bytes, status: int) -> None:
    answer = Answer(agent.raw(head + b"\r\n\r\n"))
    assert answer.status == status
    assert answer.headers["connection"] == "close"
    if status >= 400:
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert problem["status"] == status
        assert problem["detail"] == problem["error"] != ""


def test_a_stream_that_ends_in_its_head_gets_no_answer(agent: Asker) -> None:
    assert agent.raw(b"GET /healthz HT") == b""
    assert agent.raw(b"") == b""


def test_deep_nesting_is_a_400(agent: Asker) -> None:
    answer = agent.ask("POST", "/v1/exec", b"[" * 200_000)
    assert answer.status == 400


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"command": ["true"], "command2": 1}'],
)
def test_a_malformed_body_is_a_400(agent: Asker, body: bytes) -> None:
    assert agent.ask("POST", "/v1/exec", body).status == 400


def test_a_chunked_body_is_read_and_a_malformed_one_refused(agent: Asker) -> None:
    head = b"POST /v1/exec HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    good = Answer(agent.raw(head + b'10;x=y\r\n{"command": ["tr\r\n5\r\nue"]}\r\n0\r\nT: 1\r\n\r\n'))
    assert good.lines() == [{"exit_code": 0}]
    for bad in (b"zz\r\n", b"5\r\nabcdefg\r\n", b"-1\r\n", b"5\nabcde\r\n", b"0x5\r\nabcde\r\n", b"\r\n", b"F" * 300):
        assert Answer(agent.raw(head + bad)).status == 400, bad
    assert Answer(agent.raw(head + b"0\r\n" + b"a: b\r\n" * 4000)).status == 400


def test_a_client_that_expects_100_continue_gets_it(agent: Asker) -> None:
    body = b'{"command": ["true"]}'
    head = b"POST /v1/exec HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body)
    sock = agent.open(head)
    assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
    sock.sendall(body)
    assert b" 200 " in sock.recv(1000)


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_no_head_raises_anything_but_a_problem(data: bytes) -> None:
    for head in (data, b"GET / HTTP/1.1\r\n" + data):
        problem = None
        try:
            parse_request(head)
        except Problem as found:
            problem = found
        assert problem is None or problem.status in (400, 505)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_chunks_are_parsed_the_same_however_they_are_cut(pieces: list[bytes], step: int) -> None:
    wire_bytes = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    for raw in (False, True):
        follow = BodyFilter(Framing(None, chunked=True), raw=raw)
        out = bytearray()
        for start in range(0, len(wire_bytes), step):
            follow.feed(wire_bytes[start : start + step], out)
        assert follow.done
        assert bytes(out) == (wire_bytes if raw else b"".join(pieces))
        assert follow.feed(b"GET / HTTP/1.1", out) == 0


def test_a_body_without_any_length_ends_with_the_stream() -> None:
    assert framing_of([]) is None
    assert BodyFilter(Framing(None)).until_close
