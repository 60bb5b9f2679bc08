"""The end of the node: logind tells the kubelet, which ends its pods before the machine goes on."""
import json, os, time

from manifest import EVIDENCE, SEEN, container, pod, test
from node import SLOWNESS, Failed, Skipped, need, run, systemctl, wait

LOGIND = ("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager")
# Of systemd's own directories, which are the machine's (see Node.prepare).
TARGET, SETTINGS = "/run/systemd/system/poweroff.target", "/run/systemd/logind.conf.d/slipway-test.conf"
SERVICE = "/run/systemd/system/slipway-test-off.service"


def busctl(verb, *arguments):
    return run("busctl", "--json=short", verb, *arguments)


def delay():
    """How long logind waits for those who inhibit a shutdown, in seconds."""
    return json.loads(busctl("get-property", *LOGIND, "InhibitDelayMaxUSec"))["data"] / 1e6


def inhibitors():
    return [entry[1] for entry in json.loads(busctl("call", *LOGIND, "ListInhibitors"))["data"][0]]


def words(name, seconds):
    """A container that needs some time to end, and notes when it has."""
    return container("main", f"trap 'sleep {seconds}; echo {name} >>/evidence/ends; exit 0' TERM; while :; do sleep 0.2; done",
                     volumeMounts=[SEEN])


# Ordinary ones end before those that the node needs.
@test(pod("ordinary", words("ordinary", 2), volumes=[EVIDENCE], priority=0, terminationGracePeriodSeconds=600),
      pod("needed", words("needed", 0), volumes=[EVIDENCE], priority=2000001000, terminationGracePeriodSeconds=600))
def a_graceful_node_shutdown(node):
    try:
        delay()
    except (Failed, OSError) as e:
        raise Skipped(f"no systemd-logind answers on a system bus ({e})") from e
    grace = int(20 * SLOWNESS)
    off = node.path("off")
    # What logind starts in the end is this, instead of the end of the machine that the test runs on.
    for path, text in ((TARGET, "[Unit]\nDescription=No end of the machine\nDefaultDependencies=no\nWants=slipway-test-off.service\n"),
                       (SERVICE, f"[Unit]\nDefaultDependencies=no\n[Service]\nType=oneshot\nExecStart=/bin/touch {off}\n"),
                       (SETTINGS, f"[Login]\nInhibitDelayMaxSec={grace + 60}\n")):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as f:
            f.write(text)
    try:
        systemctl("daemon-reload")
        systemctl("kill", "--signal=HUP", "systemd-logind.service")
        wait("logind has the longer delay", lambda: delay() > grace)
        node.stop(node.kubelet)
        node.start_kubelet(shutdownGracePeriod=f"{grace}s", shutdownGracePeriodCriticalPods=f"{grace // 2}s")
        for name in ("ordinary", "needed"):
            node.ready(name)
        wait("the kubelet inhibits a shutdown", lambda: "kubelet" in inhibitors())
        began = time.time()
        busctl("call", *LOGIND, "PowerOff", "b", "false")
        wait("the machine would be off", lambda: os.path.exists(off), 60)
        need(os.stat(off).st_mtime - began < grace, "the shutdown waited as long as it could")
        need(node.seen("ends").split() == ["ordinary", "needed"], f"the pods ended in this order: {node.seen('ends').split()}")
        need(os.stat(node.evidence + "/ends").st_mtime <= os.stat(off).st_mtime, "the machine was off before the pods")
        left = node.client("ps", "--quiet").split()
        need(not left, f"containers that run at the end: {node.client('ps')}")
        for name in ("ordinary", "needed"):
            status = node.phase(name, "Failed")["status"]
            need(status["reason"] == "Terminated" and "shutdown" in status["message"], f"{name} is told of as {status}")
            ended = node.status(name, "main")["state"]["terminated"]
            need((ended["exitCode"], ended["reason"]) == (0, "Completed"), f"the end of {name}: {ended}")
    finally:
        for path in (TARGET, SERVICE, SETTINGS):
            os.unlink(path)
        systemctl("daemon-reload")
        # The pods of a node that was to go down come again with the next kubelet only.
        node.stop(node.kubelet)
        node.start_kubelet()
