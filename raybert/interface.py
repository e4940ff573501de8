"""The network interface through which the workers of several hosts reach each other."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import suppress

import ray.util

SIOCGIFADDR = 0x8915  # Linux's request for an interface's address


def choose() -> None:
    """Let gloo use the interface that has this node's address, if the user has not chosen another.

    Left to itself it uses the address that the host's name resolves to. Where that is loopback, as Debian's /etc/hosts
    has it, or where the name is unknown, workers on different hosts cannot connect. Runs in every worker process.
    """
    node = ray.util.get_node_ip_address()
    for _, name in socket.if_nameindex():
        if _address(name) == node:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _address(name: str) -> str | None:
    """The IPv4 address of an interface, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket, suppress(OSError):
        request = struct.pack("256s", name.encode())
        return socket.inet_ntoa(fcntl.ioctl(any_socket, SIOCGIFADDR, request)[20:24])
    return None
