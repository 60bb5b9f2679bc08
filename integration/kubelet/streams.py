"""Exec, attach, port-forward and logs over the kubelet's port."""
import json, re

from manifest import FOREVER, container, pod, test
from node import full, need, wait
from stream import RESIZE, STDIN, V4, V5, Stream, execute, shell, start

PODS = pod("talking", "main",
           container("echo", "while read line; do echo \"heard $line\"; done; " + FOREVER, stdin=True),
           container("terminal", "stty -echo 2>/dev/null; while read line; do echo \"tty $line $(stty size)\"; done", stdin=True, tty=True),
           container("web", "mkdir /www; head -c 300000 /dev/zero | tr '\\0' x >/www/big; exec httpd -f -p 8080 -h /www",
                     readinessProbe={"tcpSocket": {"port": 8080}, "periodSeconds": 1}))


@test(PODS)
def exec_with_output_input_and_exit_code(node):
    node.ready("talking")
    for protocol in (V4, V5):
        out, err, code = execute(node, "talking", "main", "sh", "-c", "echo out; echo err >&2; exit 7", protocol=protocol)
        need((out, err, code) == ("out\n", "err\n", 7), f"{protocol}: {(out, err, code)}")
        out, _, code = execute(node, "talking", "main", "sh", "-c", "head -n1", protocol=protocol, stdin="to be read\n")
        need((out, code) == ("to be read\n", 0), f"{protocol}: {(out, code)}")
        out, _, _ = execute(node, "talking", "main", "sh", "-c", "head -c 1000000 /dev/zero | tr '\\0' y", protocol=protocol)
        need(out == "y" * 1000000, f"{protocol}: {len(out)} bytes of a million came")
    out, _, _ = execute(node, "talking", "main", "cat", protocol=V5, stdin="until it closes")
    need(out == "until it closes", f"cat gave {out!r}")
    _, _, code = execute(node, "talking", "main", "sh", "-c", "kill -9 $$")
    need(code == 137, f"the exit code of a killed command is {code}")
    _, err, code = execute(node, "talking", "main", "/no/such/command")
    need(code == 127 and "/no/such/command" in err, f"a command that is not there: exit code {code}, {err!r}")


@test(PODS)
def exec_with_a_terminal(node):
    node.ready("talking")
    for protocol in (V4, V5):
        s = start(node, "exec", "talking", "main", protocol, ["sh"], stdin=True, tty=True)
        s.send(RESIZE, json.dumps({"Width": 123, "Height": 45}).encode())
        s.send(STDIN, b"stty size; tty\n")
        said = s.until("/dev/")
        need("45 123" in said, f"{protocol}: the terminal's size is another: {said!r}")
        s.send(STDIN, b"exit 3\n")
        _, _, code = s.rest()
        need(code == 3, f"{protocol}: the shell ended with {code}")
        s.close()


@test(PODS)
def attach(node):
    node.ready("talking")
    for protocol in (V4, V5):
        s = start(node, "attach", "talking", "echo", protocol, stdin=True)
        s.send(STDIN, b"you\n")
        s.until("heard you")
        s.close()
        s = start(node, "attach", "talking", "terminal", protocol, stdin=True, tty=True)
        s.send(RESIZE, json.dumps({"Width": 99, "Height": 33}).encode())
        s.send(STDIN, b"me\n")
        s.until("tty me 33 99")
        s.close()
    wait("what was said is in the log", lambda: "heard you" in node.logs_of("talking", "echo"))
    need(node.status("talking", "echo")["restartCount"] == 0, "a client that left ended the container")


@test(PODS)
def port_forward(node):
    node.ready("talking")
    s = Stream(node, f"/portForward/default/{full('talking')}", [("port", "8080")], V4)
    s.send(0, b"GET /big HTTP/1.0\r\n\r\n")
    body = b""
    while (got := s.receive()) is not None:
        need(got[0] == 0 or len(got[1]) <= 2, f"an error came: {got[1]!r}")
        if got[0] == 0:
            body += got[1]
        if body.endswith(b"x") and body.count(b"x") >= 300000:
            break
    need(b"200 OK" in body and body.count(b"x") >= 300000, f"{len(body)} bytes came: {body[:80]!r}")
    s.close()


@test(PODS)
def the_old_way_to_run(node):
    node.ready("talking")
    got = node.get(f"/run/default/{full('talking')}/main?cmd=hostname", method="POST")
    need(got.strip() == full("talking"), f"/run gives {got!r}")


@test(pod("writing", container("main", "i=0; while :; do i=$((i+1)); echo line $i; echo error $i >&2; sleep 0.1; done")))
def logs_are_followed(node):
    node.ready("writing")
    seen = []
    with node.open(f"/containerLogs/default/{full('writing')}/main?follow=true&tailLines=1&timestamps=true") as answer:
        while len(seen) < 20:
            seen.append(answer.readline().decode())
    need(all(re.match(r"\d{4}-\d\d-\d\dT\S+ (line|error) \d+$", l.strip()) for l in seen), f"the lines are {seen}")
    tail = node.logs_of("writing", "main", "?tailLines=3").splitlines()
    need(len(tail) == 3, f"the last three lines are {tail}")
    need(node.logs_of("writing", "main", "?limitBytes=10") != "", "limitBytes gives nothing")


@test(PODS)
def a_follower_sees_the_end(node):
    node.ready("talking")
    with node.open(f"/containerLogs/default/{full('talking')}/main?follow=true") as answer:
        execute(node, "talking", "main", "kill", "1")  # may be killed with the container, before it tells its exit code
        need(answer.read() == b"", "the log of a silent container has something in it")
    wait("it was restarted", lambda: node.status("talking", "main")["restartCount"] == 1)
