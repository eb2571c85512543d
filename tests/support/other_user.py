"""What a process of another user gets of a running system: run as a program, by that user, with standard library only.

Standard input: {"pids", "ports", "paths", "sockets"}. Standard output: what could be read, and what could be done.
"""

import contextlib
import json
import os
import socket
import sys

PROC = (
    "environ",
    "mem",
    "maps",
    "smaps",
    "auxv",
    "syscall",
    "stack",
    "cmdline",
    "comm",
    "status",
    "stat",
    "io",
    "limits",
)
LINKS = ("cwd", "exe", "root")
GREETINGS = (
    b"GET /lockstep/version HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer guess\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
    b'{"id": 1, "verb": "shutdown", "args": {}}\n',
    b"\x00\xce\xf7\x85\x3c\x0a",  # torch's TCPStore: its greeting, then how many keys there are
)


def read(path):
    with open(path, "rb") as file:
        return file.read(1 << 20).decode(errors="replace")


def tried(action, *arguments):
    """What an action gives, or None where it is refused."""
    with contextlib.suppress(OSError):
        return action(*arguments)
    return None


def spoken(family, address):
    """What a socket answers to each greeting; None where it can't be entered."""
    answers = []
    for greeting in GREETINGS:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.settimeout(1.0)
            connection.connect(address)
            answers.append("")
            connection.sendall(greeting)
            answers[-1] = connection.recv(4096).decode(errors="replace")
    return answers or None


def written(path):
    """Whether a file can be changed, or a folder be given one."""
    if os.path.isdir(path):
        target = os.path.join(path, "planted")
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        os.unlink(target)
    else:
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
    return True


def probed(asked):
    read_of, done = {}, []
    for pid in asked["pids"]:
        folder = f"/proc/{pid}"
        for name in PROC:
            read_of[f"{folder}/{name}"] = tried(read, f"{folder}/{name}")
        for name in LINKS:
            read_of[f"{folder}/{name}"] = tried(os.readlink, f"{folder}/{name}")
        for name in tried(os.listdir, f"{folder}/fd") or ():
            read_of[f"{folder}/fd/{name}"] = tried(os.readlink, f"{folder}/fd/{name}")
        with contextlib.suppress(OSError):
            os.kill(pid, 0)
            done.append(f"signal {pid}")
    for path in asked["paths"]:
        if not os.path.isdir(path):
            read_of[path] = tried(read, path)
        elif (names := tried(os.listdir, path)) is not None:
            read_of[path] = " ".join(names)
        if tried(written, path):
            done.append(f"write {path}")
    for port in asked["ports"]:
        read_of[f"port {port}"] = tried(spoken, socket.AF_INET, ("127.0.0.1", port))
    for path in asked["sockets"]:
        read_of[f"socket {path}"] = tried(spoken, socket.AF_UNIX, "\0" + path[1:] if path.startswith("@") else path)
    return {"read": {name: value for name, value in read_of.items() if value is not None}, "done": done}


if __name__ == "__main__":
    json.dump(probed(json.load(sys.stdin)), sys.stdout)
