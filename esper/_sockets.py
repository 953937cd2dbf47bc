"""What the servers share: a socket that listens."""

import errno
import socket

from esper.errors import InputError


def listening(host: str, port: int, *, backlog: int) -> socket.socket:
    """A socket that listens already: the address that is told can be asked at once.

    Args:
        host: an address or a name of this machine; empty for all of its addresses.
        port: 0 for one that is free.
        backlog: how many connections may wait to be accepted.

    Raises:
        InputError: where the address is not this machine's, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError, OverflowError) as error:
        raise InputError(f"the address {host!r} is none of this machine: {error}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {port} of {host} is in use: give another by --port, or --port 0 to have a"
                " free one chosen"
            ) from error
        raise InputError(
            f"cannot listen at {host}, port {port}: {error.strerror or error}; give another --host"
            " or --port"
        ) from error
    return listener
