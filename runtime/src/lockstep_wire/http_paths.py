"""Paths of the server's HTTP API: OpenAI's that both sides name, and Lockstep's own below
`/lockstep`.
"""

from __future__ import annotations

CHAT_COMPLETIONS = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

SIBLINGS = "/lockstep/siblings"
STATUS = "/lockstep/status"
VERSION = "/lockstep/version"
ALIVE = "/lockstep/alive"
MEMORY = "/lockstep/memory"
SLEEP = "/lockstep/sleep"
WAKE = "/lockstep/wake"
SERVED_NAME = "/lockstep/served_name"
KEPT_NAMES = "/lockstep/kept_names"

SYNC = "/lockstep/sync"
SYNC_CONNECT = "/lockstep/sync/connect"
SYNC_PLAN = "/lockstep/sync/plan"
SYNC_RECEIVE = "/lockstep/sync/receive"
SYNC_COMMIT = "/lockstep/sync/commit"
SYNC_COMMIT_ADAPTER = "/lockstep/sync/commit_adapter"
SYNC_FORGET_ADAPTER = "/lockstep/sync/forget_adapter"
SYNC_VERIFY_FOLDER = "/lockstep/sync/verify_folder"
SYNC_ABORT = "/lockstep/sync/abort"
