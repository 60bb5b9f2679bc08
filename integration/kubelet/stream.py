"""A client of the kubelet's streams: WebSocket (RFC 6455) with Kubernetes' channels."""
import base64, json, os, socket, struct, urllib.parse

from node import Failed, SLOWNESS, need

STDIN, STDOUT, STDERR, ERROR, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255


class Stream:
    """One connection to the kubelet's port."""

    def __init__(self, node, path, query, protocol):
        raw = socket.create_connection(("127.0.0.1", 10250), timeout=30 * SLOWNESS)
        self.socket = node.tls.wrap_socket(raw, server_hostname="node")
        self.buffer = b""
        key = base64.b64encode(os.urandom(16)).decode()
        target = path + "?" + urllib.parse.urlencode(query, doseq=True)
        self.socket.sendall((f"GET {target} HTTP/1.1\r\nHost: node\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                             f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
                             f"Sec-WebSocket-Protocol: {protocol}\r\n\r\n").encode())
        while b"\r\n\r\n" not in self.buffer:
            self.more()
        head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
        need(head.startswith(b"HTTP/1.1 101 "), f"{target}: no upgrade: {(head + b' ' + self.buffer).decode(errors='replace')}")
        need(protocol.encode() in head, f"{target}: the protocol is not {protocol}: {head.decode()}")

    def more(self):
        got = self.socket.recv(65536)
        need(got, "the connection was closed without a word")
        self.buffer += got

    def take(self, count):
        while len(self.buffer) < count:
            self.more()
        taken, self.buffer = self.buffer[:count], self.buffer[count:]
        return taken

    def send(self, channel, data, opcode=2):
        payload = bytes([channel]) + data if opcode == 2 else data
        mask = os.urandom(4)
        size = len(payload)
        head = bytes([0x80 | opcode])
        head += bytes([0x80 | size]) if size < 126 else bytes([0x80 | 126]) + struct.pack(">H", size)
        self.socket.sendall(head + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(payload)))

    def receive(self):
        """The next message, as (channel, bytes); None at the end."""
        message = b""
        while True:
            first, size = self.take(2)
            size &= 0x7F
            if size == 126:
                size = struct.unpack(">H", self.take(2))[0]
            elif size == 127:
                size = struct.unpack(">Q", self.take(8))[0]
            data, opcode = self.take(size), first & 0x0F
            if opcode == 8:
                return None
            if opcode == 9:
                self.send(0, data, 10)
            elif opcode in (0, 1, 2):
                message += data
                if first & 0x80:
                    if message:
                        return message[0], message[1:]
                    message = b""

    def until(self, text):
        """Reads standard output until the text is in it; what came so far."""
        seen = b""
        while text.encode() not in seen:
            try:
                got = self.receive()
            except TimeoutError as e:
                raise Failed(f"no {text!r} in time, but {seen!r}") from e
            need(got, f"no {text!r} in {seen!r} before the end")
            need(got[0] != ERROR, f"no {text!r} in {seen!r}: {got[1]!r}")
            if got[0] in (STDOUT, STDERR):
                seen += got[1]
        return seen.decode(errors="replace")

    def rest(self):
        """(stdout, stderr, exit code) at the end."""
        out = {STDOUT: b"", STDERR: b"", ERROR: b""}
        while (got := self.receive()) is not None:
            out[got[0]] = out.get(got[0], b"") + got[1]
            if got[0] == ERROR and got[1]:
                break
        need(out[ERROR], f"no status came: {out}")
        status = json.loads(out[ERROR])
        code = 0
        if status["status"] != "Success":
            causes = {c.get("reason"): c.get("message") for c in (status.get("details") or {}).get("causes", [])}
            if "ExitCode" not in causes:
                raise Failed(f"the stream ended with {status}")
            code = int(causes["ExitCode"])
        return out[STDOUT].decode(errors="replace"), out[STDERR].decode(errors="replace"), code

    def close(self):
        self.socket.close()


# Version 5 is turned into SPDY by a kubelet that can (1.36 does), version 4 reaches Slipway as it is.
V4, V5 = "v4.channel.k8s.io", "v5.channel.k8s.io"


def start(node, verb, pod, container, protocol=V4, command=(), stdin=False, tty=False):
    """Begins an exec or attach."""
    from node import full
    query = [("output", "1")] + ([("error", "1")] if not tty else []) + [("command", c) for c in command]
    query += [("input", "1")] if stdin else []
    query += [("tty", "1")] if tty else []
    return Stream(node, f"/{verb}/default/{full(pod)}/{container}", query, protocol)


def execute(node, pod, container, *command, protocol=V4, stdin=None):
    """Runs a command in a container over the kubelet; (stdout, stderr, exit code)."""
    stream = start(node, "exec", pod, container, protocol, command, stdin is not None)
    if stdin is not None:
        stream.send(STDIN, stdin.encode())
        if protocol == V5:
            stream.send(CLOSE, bytes([STDIN]))
    try:
        return stream.rest()
    finally:
        stream.close()


def shell(node, pod, container, script):
    """Output of a shell script in a container, which must succeed."""
    out, err, code = execute(node, pod, container, "sh", "-c", script)
    need(code == 0, f"in {pod}/{container}: {script}: exit {code}: {err or out}")
    return out
