"""The client's connections: many requests at once, each connection used again, all closed at the end."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from lockstep.rollouts.connections import connections_for

REPLY = b'{"id": "1", "object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "us"}]}'


class Counting:
    """A small HTTP server that counts its connections. `broken`: it ends every connection before it answers."""

    def __init__(self):
        self.opened = self.open = self.answered = 0
        self.broken = False
        self.answer = asyncio.Event()

    async def serve(self, reader, writer):
        self.opened += 1
        self.open += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                assert head.startswith(b"GET /v1/models")
                if self.broken:
                    return
                await self.answer.wait()
                self.answered += 1
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
                writer.write(b"content-length: %d\r\n\r\n%s" % (len(REPLY), REPLY))
        except asyncio.IncompleteReadError:
            pass  # the client has closed it
        finally:
            self.open -= 1
            writer.close()


@asynccontextmanager
async def talking():
    counting = Counting()
    server = await asyncio.start_server(counting.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    http = DefaultAsyncHttpxClient(trust_env=False, transport=connections_for(DefaultAsyncHttpxClient))
    async with (
        server,
        AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k", http_client=http, max_retries=0) as client,
    ):
        yield counting, client


async def ask(client):
    return (await client.models.list()).data[0].id


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_as_many_connections_as_requests_at_once_and_no_more():
    async with talking() as (counting, client):
        asked = [asyncio.create_task(ask(client)) for _ in range(30)]
        await until(lambda: counting.open == 30)
        counting.answer.set()
        assert await asyncio.gather(*asked) == ["m"] * 30
        for _ in range(3):
            assert await asyncio.gather(*(ask(client) for _ in range(20))) == ["m"] * 20
        assert counting.opened == 30
        assert counting.answered == 90
    await until(lambda: counting.open == 0)


async def test_a_cancelled_and_a_failed_request_leave_a_connection_that_works():
    async with talking() as (counting, client):
        waiting = asyncio.create_task(ask(client))
        await until(lambda: counting.open == 1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        counting.broken = True
        with pytest.raises(Exception, match="Connection error"):
            await ask(client)
        counting.broken = False
        counting.answer.set()
        assert [await ask(client) for _ in range(3)] == ["m"] * 3
        assert counting.opened == 3  # the cancelled one, the broken one, and the one that served all three
