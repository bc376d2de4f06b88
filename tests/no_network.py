"""Code for a process of its own that closes every way to an address and notes each attempt."""

# To be run before anything else is imported; `attempts` is the list.
FORBIDDEN = """
import socket

attempts = []

def refuse(name):
    def call(*address, **_):
        attempts.append(f"{name} {address}")
        raise OSError("the network is forbidden here")
    return call

for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
    setattr(socket, name, refuse(name))

class Socket(socket.socket):  # made freely (urllib3 asks whether there is IPv6), never used
    connect = connect_ex = sendto = refuse("connect")

socket.socket = Socket
"""
