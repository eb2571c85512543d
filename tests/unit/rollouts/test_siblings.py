"""Requests that differ in their seed alone leave as one, and each gets the reply it would get alone."""

from __future__ import annotations

import asyncio

import pytest

import lockstep as ls
from fake_server import FakeServer
from lockstep.backends.base import Endpoint
from lockstep.model import open_client
from lockstep_wire import siblings

SIBLINGS = b"/lockstep/siblings"


def completion(seed: int | None) -> dict:
    message = {"role": "assistant", "content": f"seed {seed}"}
    choice = {"index": 0, "finish_reason": "stop", "message": message, "logprobs": None}
    return {"id": f"c{seed}", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


class Answering(FakeServer):
    """Answers a request by its seed.

    cut: lines of siblings after which it closes the connection.
    waiting: positions whose reply comes when `release` is set.
    """

    def __init__(self, cut: int | None = None, waiting: tuple[int, ...] = (), status: int = 200):
        self.cut, self.waiting, self.status = cut, waiting, status
        self.release, self.left = asyncio.Event(), asyncio.Event()
        self.requests: list[tuple[bytes, dict]] = []

    async def __aexit__(self, *_):
        self.release.set()
        await super().__aexit__()

    def paths(self) -> list[bytes]:
        return [path for path, _ in self.requests]

    def gone(self):
        self.left.set()

    async def answer(self, path, body):
        return self.status if path == SIBLINGS else 200, completion(body.get("seed"))

    async def respond(self, path, body, reader, writer):
        self.requests.append((path, body))
        if path == SIBLINGS and self.status == 200:
            await self._lines(reader, writer, body["seeds"])
        else:
            await super().respond(path, body, reader, writer)

    async def _lines(self, reader, writer, seeds):
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n")
        order = [position for position in range(len(seeds)) if position not in self.waiting] + list(self.waiting)
        for number, position in enumerate(order):
            if number == self.cut:
                raise ConnectionError
            if position in self.waiting:
                await self._released(reader)
            line = siblings.line(position, completion(seeds[position]))
            writer.write(b"%x\r\n%s\r\n" % (len(line), line))
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    async def _released(self, reader):
        """Until `release` is set. Raises ConnectionError for a client that leaves before."""
        leaves, released = asyncio.create_task(reader.read(1)), asyncio.create_task(self.release.wait())
        await asyncio.wait({leaves, released}, return_when=asyncio.FIRST_COMPLETED)
        if not released.done():
            released.cancel()
            raise ConnectionError
        leaves.cancel()


def client_of(server: Answering, seeds, slots: int = 8):
    return open_client(Endpoint(server.base_url, "key", slots, 512, siblings=True), iter(seeds).__next__)


async def rollout(client, text: str = "q", said: list | None = None, **fields) -> ls.Trajectory:
    messages = [{"role": "user", "content": text}]
    reply = await client.chat.completions.create(model="m", messages=messages, max_tokens=4, **fields)
    if said is not None:
        said.append(reply.choices[0].message.content)
    return ls.Trajectory(messages_and_choices=messages, reward=0.0)


async def gathered(groups) -> list[ls.TrajectoryGroup]:
    return await ls.gather_trajectory_groups(groups, progress=False)


async def test_a_group_leaves_as_one_and_each_gets_its_own_reply():
    said: list[str] = []
    async with Answering() as server, client_of(server, range(100, 116)) as client:
        await gathered([[rollout(client, text, said) for _ in range(8)] for text in ("a", "b")])
    assert server.paths() == [SIBLINGS] * 2
    assert [body["seeds"] for _, body in server.requests] == [list(range(100, 108)), list(range(108, 116))]
    assert sorted(said) == [f"seed {seed}" for seed in range(100, 116)]
    assert all("seed" not in body["request"] for _, body in server.requests)


async def test_what_differs_or_streams_or_has_choices_goes_alone():
    async with Answering() as server, client_of(server, range(20)) as client:
        await gathered([[rollout(client, f"q{number}") for number in range(4)]])
        await gathered([[rollout(client, n=2), rollout(client, n=2)]])
        await gathered([[rollout(client, extra_headers={"x-one": "1"}) for _ in range(2)]])
        outside = {"role": "user", "content": "q"}
        await asyncio.gather(*(client.chat.completions.create(model="m", messages=[outside]) for _ in range(2)))
    assert SIBLINGS not in server.paths()
    assert len(server.requests) == 10


@pytest.mark.parametrize("broken", [{"cut": 3}, {"status": 400}, {"status": 500}])
async def test_whoever_gets_no_reply_asks_alone_with_its_seed(broken):
    said: list[str] = []
    async with Answering(**broken) as server, client_of(server, range(6)) as client:
        await gathered([[rollout(client, said=said) for _ in range(6)]])
    assert sorted(said) == [f"seed {seed}" for seed in range(6)]
    alone = [body["seed"] for path, body in server.requests if path != SIBLINGS]
    assert sorted(alone) == list(range(broken.get("cut", 0), 6))
    assert server.paths().count(SIBLINGS) == 1


async def test_a_reply_is_there_before_its_siblings_and_frees_its_place():
    said: list[str] = []
    async with Answering(waiting=(0,)) as server, client_of(server, range(6), slots=4) as client:
        running = asyncio.create_task(gathered([[rollout(client, t, said) for _ in range(3)] for t in ("a", "b")]))  # noqa: RUF006 (held below)
        while len(said) < 2:
            await asyncio.sleep(0.01)
        assert not running.done()
        while len(server.requests) < 2:  # three places for the second group: of four, one is still taken
            await asyncio.sleep(0.01)
        server.release.set()
        await running
    assert sorted(said) == [f"seed {seed}" for seed in range(6)]
    assert server.paths() == [SIBLINGS] * 2


async def test_more_siblings_than_places_leave_in_several():
    async with Answering() as server, client_of(server, range(10), slots=4) as client:
        await gathered([[rollout(client) for _ in range(10)]])
    assert [len(body["seeds"]) for _, body in server.requests] == [4, 4, 2]


async def test_cancelled_siblings_end_their_request():
    async with Answering(waiting=(0, 1)) as server, client_of(server, range(2)) as client:
        running = asyncio.create_task(gathered([[rollout(client) for _ in range(2)]]))  # noqa: RUF006 (held below)
        while not server.requests:
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await asyncio.wait_for(server.left.wait(), 5.0)


async def test_a_request_ends_when_the_rest_of_its_siblings_are_cancelled():
    said: list[str] = []
    async with Answering(waiting=(1,)) as server, client_of(server, range(2)) as client:
        running = asyncio.create_task(gathered([[rollout(client, said=said) for _ in range(2)]]))  # noqa: RUF006 (held below)
        while not said:
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await asyncio.wait_for(server.left.wait(), 5.0)
