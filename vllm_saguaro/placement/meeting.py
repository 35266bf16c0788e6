"""How a draft side that is not our child finds the target side: it knocks with a token that only it was given.

The target side listens (`Listener`), on an address of this node that other nodes reach, or on a nameless socket of this
machine; whoever places the draft side gives it the `Invitation`. The draft side connects and says

    hello    magic (4 bytes), version (16 bits), token (32 bytes), sizes of the mailbox (8 x 64 bits)

and is answered with magic, version and a digest that takes the token to make, so that neither talks to a stranger.
Whoever has not the token is hung up on. After the first who has it, nobody is listened to.
"""

from __future__ import annotations

import dataclasses
import hmac
import ipaddress
import os
import secrets
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_saguaro.placement.layout import MailboxShape

VERSION = 5
"""Of the hello and of all frames after it."""
TOKEN_BYTES = 32
_MAGIC = b"SGLK"
_PREFIX = struct.Struct(f"<4sH{TOKEN_BYTES}s")
_SHAPE = struct.Struct(f"<{len(dataclasses.fields(MailboxShape))}q")
_ANSWER_BYTES = _PREFIX.size
_HELLO_SECONDS = 5.0
"""Nobody without the token may keep others waiting longer than this."""
PATIENCE_SECONDS = 60.0
"""So long does either side wait for the other that has the token: strangers may be before it in the queue, and a busy
machine may let either stand still."""
_LOOK_SECONDS = 0.1
_LAST_LOOK_SECONDS = 0.001
"""At what has come already, after a time in which this process itself stood still."""
_BACKLOG = 16


class Refused(Exception):
    """The two sides cannot talk to each other; the message says why."""


class Stranger(Exception):
    """Somebody without the token, or who does not speak our language."""


@dataclass(frozen=True)
class Invitation:
    """What a draft side must know to be let in. It crosses as a plain dict (`to_dict`, `from_dict`).

    `port` 0: `address` is the name of a socket in Linux's abstract namespace, on this machine only.
    """

    address: str
    port: int
    token: bytes
    shape: MailboxShape

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, fit for JSON."""
        return {
            "address": self.address,
            "port": self.port,
            "token": self.token.hex(),
            **dataclasses.asdict(self.shape),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Invitation:
        """The inverse of `to_dict`."""
        shape = MailboxShape(**{field.name: values[field.name] for field in dataclasses.fields(MailboxShape)})
        return cls(values["address"], values["port"], bytes.fromhex(values["token"]), shape)


class Listener:
    """The target side's open door. It lets in one draft side, and then it is shut."""

    def __init__(self, shape: MailboxShape, address: str | None = None) -> None:
        """`address`: the IP address of this node to listen on, at a port that the system chooses; None: this machine
        only.

        Raises `ValueError` for an address that is no single one of this machine, `OSError` where the system refuses.
        """
        token = secrets.token_bytes(TOKEN_BYTES)
        if address is None:
            name = f"saguaro-{secrets.token_hex(16)}"
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            where: Any = "\0" + name
            self.invitation = Invitation(name, 0, token, shape)
        else:
            ip = ipaddress.ip_address(address)
            if ip.is_unspecified or ip.is_multicast:
                raise ValueError(f"{address} is no address of a node: write the one that other nodes reach this one by")
            self._socket = socket.socket(socket.AF_INET6 if ip.version == 6 else socket.AF_INET, socket.SOCK_STREAM)
            where = (address, 0)
        try:
            self._socket.bind(where)
            self._socket.listen(_BACKLOG)
        except OSError:
            self._socket.close()
            raise
        if address is not None:
            self.invitation = Invitation(address, self._socket.getsockname()[1], token, shape)
        self._socket.settimeout(_LOOK_SECONDS)
        self._stopped = False

    def accept(self) -> socket.socket | None:
        """The connection of the draft side that has the token, once there is one; None when `stop` came before it.

        To be called once. Raises `Refused` when one that has the token is of another version or shape.
        """
        with self._socket:
            while not self._stopped:
                try:
                    connection, _ = self._socket.accept()
                except TimeoutError:  # nobody yet
                    continue
                except OSError:  # a visitor that was gone before we looked; or no descriptor is left for one that waits
                    time.sleep(_LOOK_SECONDS)
                    continue
                try:
                    self._greet(connection)
                    return connection
                except (Stranger, OSError):
                    connection.close()
                except BaseException:
                    connection.close()
                    raise
        return None

    def stop(self) -> None:
        """Let `accept` return. May be called twice."""
        self._stopped = True

    def close(self) -> None:
        """Shut a door at which nobody was listened to."""
        self._socket.close()

    def _greet(self, connection: socket.socket) -> None:
        """Read the hello, and answer it. Raises `Stranger`, `Refused` or `OSError`."""
        began, expected = time.monotonic(), self.invitation
        magic, version, token = _PREFIX.unpack(_receive(connection, _PREFIX.size, began + _HELLO_SECONDS))
        if magic != _MAGIC or not hmac.compare_digest(token, expected.token):
            raise Stranger
        if version != VERSION:
            raise Refused(
                f"the draft side speaks version {version} of the link, this side version {VERSION}: "
                "install the same vllm_saguaro on all nodes"
            )
        sizes = _SHAPE.unpack(_receive(connection, _SHAPE.size, began + PATIENCE_SECONDS))
        if sizes != dataclasses.astuple(expected.shape):
            raise Refused(f"the draft side expects a mailbox of the sizes {sizes}, this side {expected.shape}")
        if connection.family == socket.AF_UNIX and peer(connection)[1] not in (0, os.geteuid()):
            raise Refused("the draft side runs as another user: start it as the one that this process runs as")
        connection.settimeout(PATIENCE_SECONDS)
        connection.sendall(_PREFIX.pack(_MAGIC, VERSION, _answer_to(expected.token)))


def knock(invitation: Invitation) -> socket.socket:
    """Draft side: connect and say hello. Raises `Refused` or `OSError` where we are not let in."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    if invitation.port:
        connection = socket.create_connection((invitation.address, invitation.port), PATIENCE_SECONDS)
    else:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not invitation.port:
            _connect_here(connection, invitation.address, deadline)
        shape = _SHAPE.pack(*dataclasses.astuple(invitation.shape))
        connection.sendall(_PREFIX.pack(_MAGIC, VERSION, invitation.token) + shape)
        magic, version, digest = _PREFIX.unpack(_receive(connection, _ANSWER_BYTES, deadline))
        expected = _answer_to(invitation.token)
        if (magic, version) != (_MAGIC, VERSION) or not hmac.compare_digest(digest, expected):
            raise Refused("the other end of the link is not the target that this draft was started for")
    except Stranger:
        connection.close()
        raise Refused("the target side hung up") from None
    except BaseException:
        connection.close()
        raise
    connection.settimeout(PATIENCE_SECONDS)
    return connection


def _connect_here(connection: socket.socket, name: str, deadline: float) -> None:
    """Where the queue at a door of this machine is full nobody waits at it: one is told so at once."""
    connection.settimeout(PATIENCE_SECONDS)
    while True:
        try:
            connection.connect("\0" + name)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_SECONDS)


def peer(connection: socket.socket) -> tuple[int, int]:
    """Process id and user id of the other end of a socket of this machine; the pid is 0 where it cannot be seen."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def _answer_to(token: bytes) -> bytes:
    return hmac.digest(token, b"come in", "sha256")


def _receive(connection: socket.socket, size: int, deadline: float) -> bytes:
    """So many bytes, in time. Raises `Stranger` otherwise."""
    data = b""
    while len(data) < size:
        connection.settimeout(max(deadline - time.monotonic(), _LAST_LOOK_SECONDS))
        try:
            piece = connection.recv(size - len(data))
        except TimeoutError:
            raise Stranger from None
        if not piece:
            raise Stranger
        data += piece
    return data
