"""Every deadline of a run, in seconds: who waits for whom, and for how long.

A trainer that works reports its progress, so deadlines of its requests bound a standstill and not
a long step.
"""

from __future__ import annotations

TRAINER_START_S = 600.0
"""The backend for the trainer, to start and load the model."""
SERVER_START_S = 900.0
"""The backend for the server, to start and make its first token."""
STEP_S = 600.0
"""The backend for the trainer: longest time without progress while it trains, scores, saves or
loads.

Progress is a micro-batch, a piece of a file, or another phase.
"""
SILENT_S = 60.0
"""The backend for any sign of life of trainer or server, where nothing is known of their speed yet
or a GPU compiles.
"""
HUNG_S = 8.0
"""The same on a CPU, once the speed is known: a silence of this length, and of ten times the longest
one before, means a hang.
"""
ENDED_S = 10.0
"""The backend for the end of a trainer that closed its connection."""
LOOK_S = 2.0
"""Between two looks at the trainer's processes; one that is stopped both times is lost."""
TRAINER_PAUSES_S = (1.0, 5.0, 25.0)
"""Before each new start of a trainer that was lost in one step; after the last the step fails."""
SYNC_S = 300.0
"""Trainer and server for each other in a weight sync: to join, for the receiver of a bucket, for
the swap.
"""
OFFLOAD_S = 600.0
"""The backend for the trainer, to move its memory before the server starts."""
IN_FLIGHT_S = 600.0
"""The backend for requests in flight, before a colocated server may sleep."""
CALL_S = 60.0
"""The backend for the server's answer to a short call."""
HEALTH_S = 10.0
"""The backend for the server to say that its engine lives."""
ADAPTER_S = 300.0
"""The backend for the server to load, unload or score with an adapter, or to wake."""
REQUEST_S = 600.0
"""A user's client for the reply to one request."""
REPLICA_RESTS_S = 10.0
"""A replica that broke off a request, before it gets another one; its watch has noticed its end by
then.
"""
CONNECT_S = 10.0
"""A user's client for a connection."""
DATABASE_S = 30.0
"""A transaction of the run's SQLite file for another process's."""
CANCEL_S = 60.0
"""Gathering for the rollouts that it cancelled."""
HEARTBEAT_S = 1.0
"""Between two signs of life of a trainer that works, and between two looks at a server's engine."""
SHUTDOWN_S = 10.0
"""Rank 0 for the other ranks, when the trainer ends."""
RANKS_S = 24 * 3600.0
"""Ranks for each other within one request that names no deadline."""
LOST_RANK_S = 15.0
"""A rank inside a verb, after another one failed in it."""
SCORING_S = 600.0
"""`lockstep score` and `lockstep validate` for the trainer."""
SINK_CLOSE_S = 10.0
"""The end of a run for all its metrics sinks, to flush."""
DOWNLOAD_S = 600.0
"""The download of a model from the package index."""
NVIDIA_SMI_S = 20.0
"""The driver's answer to `lockstep doctor`."""
INDEX_S = 5.0
"""`lockstep runtime install` for a package index, to learn whether it is there."""
PIP_S = 60.0
"""`lockstep runtime install` for pip, to say its settings."""
INSTALL_STEP_S = 3600.0
"""`lockstep runtime install` for one step of it, and for another installation of the same
environment.
"""
TINKER_CALL_S = 3600.0
"""TinkerBackend for the service's answer to a step."""
TINKER_SAMPLE_S = 600.0
"""TinkerBackend for the service's samples."""
TINKER_CLOSE_S = 30.0
"""TinkerBackend for the end of the service's session."""
ENDPOINT_START_S = 60.0
"""TinkerBackend for its own endpoint, to start."""
ENDPOINT_CLOSE_S = 10.0
"""TinkerBackend for its own endpoint, to end."""
SANDBOX_S = 30.0
"""A sandbox's own short commands."""
DOCKER_S = 1800.0
"""Docker, to build an image, to start a container, or to copy a folder."""
