"""grpc.health.v1.Health for a kubelet's probe, which says SERVING to whoever asks. Just enough of HTTP/2
(RFC 9113): headers go out as literals, and what comes in need not be understood."""
import contextlib, socket, struct, threading

DATA, HEADERS, SETTINGS, PING = 0, 1, 4, 6
END_STREAM, END_HEADERS, ACK = 1, 4, 1


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def literal(name, value):
    """A header field without indexing (RFC 7541, 6.2.2), both parts below 127 bytes."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def serve(connection):
    reader = connection.makefile("rb")
    with connection, reader:
        reader.read(24)  # the client's preface
        connection.sendall(frame(SETTINGS, 0, 0))
        while len(head := reader.read(9)) == 9:
            size, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
            stream = int.from_bytes(head[5:], "big") & 0x7FFFFFFF
            payload = reader.read(size)
            if kind in (SETTINGS, PING) and not flags & ACK:
                connection.sendall(frame(kind, ACK, 0, payload if kind == PING else b""))
            if kind == DATA and flags & END_STREAM:
                serving = b"\x08\x01"  # HealthCheckResponse.status
                connection.sendall(
                    frame(HEADERS, END_HEADERS, stream, literal(b":status", b"200") + literal(b"content-type", b"application/grpc"))
                    + frame(DATA, 0, stream, b"\0" + struct.pack(">I", len(serving)) + serving)
                    + frame(HEADERS, END_HEADERS | END_STREAM, stream, literal(b"grpc-status", b"0")))


@contextlib.contextmanager
def serving(port):
    """Serves on every address of the node."""
    listener = socket.create_server(("0.0.0.0", port))

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=quietly, args=(listener.accept()[0],), daemon=True).start()

    def quietly(connection):
        with contextlib.suppress(OSError):
            serve(connection)

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
