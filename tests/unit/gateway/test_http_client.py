"""The gateway's client against h11's server: whatever the pieces in which an answer arrives."""

from __future__ import annotations

import asyncio
import itertools

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.gateway.http_client import BrokenError, Connections


def answer_of(body: list[bytes], chunked: bool) -> bytes:
    """What h11 writes for a request: status, head, body."""
    server = h11.Connection(h11.SERVER)
    server.receive_data(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n")
    while server.next_event() not in (h11.NEED_DATA, h11.PAUSED):
        pass
    length = [("transfer-encoding", "chunked")] if chunked else [("content-length", str(sum(map(len, body))))]
    events = [h11.Response(status_code=201, headers=[("X-Any", "a: b"), *length])]
    events += [h11.Data(data=part) for part in body if part]
    return b"".join(server.send(event) or b"" for event in [*events, h11.EndOfMessage()])


async def served(answers: list[list[bytes]], requests: list[bytes]):
    """A server whose connections each take these answers in turn, piece by piece; a connection ends after the last."""

    async def answer(reader, writer):
        for pieces in answers:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
            requests.append(await reader.readexactly(int(length.split(b":")[1])))
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/x"


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


async def post(connections: Connections, url: str, body: bytes = b"{}"):
    return await connections.post(url, {"a": "b"}, body, connect_s=5, silence_s=5)


@settings(max_examples=60, deadline=None)
@given(
    bodies=st.lists(st.tuples(st.lists(st.binary(max_size=40), max_size=6), st.booleans()), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 1000), max_size=6),
)
def test_answers_come_whole_in_whatever_pieces(bodies, cuts):
    async def run():
        requests: list[bytes] = []
        answers = [pieces_of(answer_of(body, chunked), cuts) for body, chunked in bodies]
        server, url = await served(answers, requests)
        connections = Connections()
        async with server:
            for number, (body, _) in enumerate(bodies):
                answer = await post(connections, url, b"%d" % number)
                assert (answer.status, await answer.body()) == (201, b"".join(body))
            connections.close()
        assert requests == [b"%d" % number for number in range(len(bodies))]  # in one connection

    asyncio.run(run())


@pytest.mark.parametrize("chunked", [False, True])
async def test_an_answer_that_ends_too_early_is_broken_and_its_connection_is_not_kept(chunked):
    sent = answer_of([b"one", b"two"], chunked)
    requests: list[bytes] = []
    server, url = await served([[sent[:-2]]], requests)
    connections = Connections()
    async with server:
        for _ in range(2):
            with pytest.raises(BrokenError, match="ended before its answer did"):
                await (await post(connections, url)).body()
        assert len(requests) == 2
        connections.close()


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", "neither its length"),
        (b"nonsense\r\n\r\n", "begins no answer"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n\r\n", "no length of a chunk"),
        (b"x" * 70_000, "no end of a line"),
    ],
)
async def test_what_is_not_http_is_named(head, said):
    server, url = await served([[head]], [])
    connections = Connections()
    async with server:
        with pytest.raises(BrokenError, match=said):
            await (await post(connections, url)).body()
        connections.close()


async def test_a_server_that_says_nothing_is_given_up():
    server, url = await served([[]] * 2, [])
    connections = Connections()
    async with server:
        with pytest.raises(TimeoutError, match="nothing came in time"):
            await connections.post(url, {}, b"", connect_s=5, silence_s=0.05)
        connections.close()
