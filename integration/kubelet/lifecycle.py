"""Init containers, sidecars, probes, hooks, restarts and the end of pods."""
import time

import health
from manifest import EVIDENCE, FOREVER, SEEN, container, pod, test
from node import ADDRESS, REGISTRY, brief, need, wait
from stream import shell

ANSWERS = "mkdir -p /www && echo well >/www/ok && exec httpd -f -p 8080 -h /www"


def note(word, file="order"):
    return f"echo {word} >>/evidence/{file}; "


@test(pod("ordered", container("main", note("main") + "exit 0", volumeMounts=[SEEN]),
          initContainers=[
              container("first", "sleep 0.3; " + note("first"), volumeMounts=[SEEN]),
              container("sidecar", "trap 'echo sidecar-ends >>/evidence/order; exit 0' TERM; sleep 0.5; " + note("sidecar") +
                        "touch /up; sleep 100000 & wait", restartPolicy="Always", volumeMounts=[SEEN],
                        startupProbe={"exec": {"command": ["test", "-e", "/up"]}, "periodSeconds": 1}),
              container("second", note("second"), volumeMounts=[SEEN])],
          restartPolicy="Never", volumes=[EVIDENCE]))
def init_containers_and_sidecars_run_in_order(node):
    found = node.phase("ordered", "Succeeded", 60)
    order = node.seen("order").split()
    need(order == ["first", "sidecar", "second", "main", "sidecar-ends"], f"the order was {order}")
    states = {s["name"]: s["state"]["terminated"]["exitCode"] for s in found["status"]["initContainerStatuses"]}
    need(states == {"first": 0, "sidecar": 0, "second": 0}, f"exit codes of init containers: {states}")


@test(pod("initless", "main", initContainers=[container("never", "echo no luck >&2; exit 4")], restartPolicy="Never"))
def a_failed_init_container_fails_the_pod(node):
    found = node.phase("initless", "Failed")
    ended = found["status"]["initContainerStatuses"][0]["state"]["terminated"]
    need((ended["exitCode"], ended["reason"]) == (4, "Error"), f"the init container's end: {ended}")
    need("waiting" in found["status"]["containerStatuses"][0]["state"], f"main was started: {brief(found)}")


@test(pod("probed", container(
    "main", "touch /alive; " + ANSWERS,
    startupProbe={"exec": {"command": ["test", "-e", "/alive"]}, "periodSeconds": 1},
    livenessProbe={"tcpSocket": {"port": 8080}, "periodSeconds": 1},
    readinessProbe={"httpGet": {"path": "/ok", "port": 8080}, "periodSeconds": 1})))
def probes_by_exec_tcp_and_http(node):
    node.ready("probed")
    shell(node, "probed", "main", "rm /www/ok")
    wait("the pod is not ready when its probe fails", lambda: not node.status("probed", "main")["ready"])
    shell(node, "probed", "main", "echo again >/www/ok")
    node.ready("probed")
    need(node.status("probed", "main")["restartCount"] == 0, "a healthy container was restarted")


@test(pod("unhealthy", container("main", "touch /alive; sleep 1; rm /alive; " + FOREVER,
                                 livenessProbe={"exec": {"command": ["cat", "/alive"]}, "periodSeconds": 1, "failureThreshold": 2},
                                 lifecycle={"preStop": {"exec": {"command": ["sh", "-c", note("asked", "unhealthy")]}}},
                                 volumeMounts=[SEEN]), volumes=[EVIDENCE]))
def a_liveness_probe_that_fails_restarts(node):
    wait("the container was restarted", lambda: node.status("unhealthy", "main")["restartCount"] >= 1)
    need("asked" in node.seen("unhealthy"), "the preStop hook did not run before the restart")


@test(pod("slow-probe", container("main", readinessProbe={"exec": {"command": ["sleep", "100"]}, "periodSeconds": 1,
                                                        "timeoutSeconds": 1})))
def an_exec_probe_has_a_timeout(node):
    wait("the container runs", lambda: node.status("slow-probe", "main")["state"].get("running"))
    time.sleep(3)  # what is looked for must not come: some probes have run out of time by then
    need(not node.status("slow-probe", "main")["ready"], "a probe that hangs counts as passed")
    left = shell(node, "slow-probe", "main", "ps | grep -c '[s]leep 100$' || true").strip()
    need(int(left) <= 1, f"{left} probes are left in the container")


@test(pod("grpc", container("main", readinessProbe={"grpc": {"port": 9090, "service": "node"}, "periodSeconds": 1}), hostNetwork=True))
def a_grpc_probe_on_the_host_network(node):
    wait("the container runs", lambda: node.status("grpc", "main")["state"].get("running"))
    need(not node.status("grpc", "main")["ready"], "ready without a server")
    with health.serving(9090):
        node.ready("grpc")
    need(ADDRESS in shell(node, "grpc", "main", "ip addr"), "the pod is not on the host's network")


@test(pod("hooked", container("main", "until [ -e /evidence/started ]; do sleep 0.1; done; " + ANSWERS, volumeMounts=[SEEN], lifecycle={
    "postStart": {"exec": {"command": ["sh", "-c", note("yes", "started")]}},
    "preStop": {"httpGet": {"path": "/cgi-bin/stop", "port": 8080}}}),
    container("other", note("no", "other") + "trap 'echo term >>/evidence/other; exit 0' TERM; sleep 100000 & wait", volumeMounts=[SEEN],
              lifecycle={"preStop": {"sleep": {"seconds": 1}}}),
    volumes=[EVIDENCE], terminationGracePeriodSeconds=10))
def hooks_run_after_the_start_and_before_the_stop(node):
    node.ready("hooked")
    need(node.seen("started") == "yes\n", "postStart did not run once")
    shell(node, "hooked", "main", "mkdir -p /www/cgi-bin; printf '#!/bin/sh\\necho; echo stop >>/evidence/stopped\\n' >/www/cgi-bin/stop; "
          "chmod 755 /www/cgi-bin/stop")
    took = node.gone("hooked")
    need(node.seen("stopped") == "stop\n", "the preStop request did not arrive")
    need("term" in node.seen("other"), "the container got no SIGTERM")
    need(took >= 1, "the preStop sleep was cut short")


@test(pod("bad-hook", container("main", lifecycle={"postStart": {"exec": {"command": ["sh", "-c", "exit 5"]}}})))
def a_post_start_hook_that_fails_restarts(node):
    wait("the container was restarted", lambda: node.status("bad-hook", "main")["restartCount"] >= 1)


@test(pod("crashing", container("main", "echo told >/dev/termination-log; exit 3"),
          container("silent", "echo last words; exit 4", terminationMessagePolicy="FallbackToLogsOnError"),
          container("elsewhere", "echo there >/tmp/end; exit 5", terminationMessagePath="/tmp/end")))
def a_crash_loop_backs_off_and_tells(node):
    def crashed(name, code, text):
        status = node.status("crashing", name)
        need(status["restartCount"] >= 2, f"{name} was restarted {status['restartCount']} times")
        last = status["lastState"]["terminated"]
        need((last["exitCode"], last["reason"], last.get("message", "").strip()) == (code, "Error", text), f"the last end of {name}: {last}")
        return True
    for name, code, text in (("main", 3, "told"), ("silent", 4, "last words"), ("elsewhere", 5, "there")):
        wait(f"{name} crashes again and again", lambda: crashed(name, code, text), 60)
    wait("it backs off", lambda: node.status("crashing", "main")["state"].get("waiting", {}).get("reason") == "CrashLoopBackOff", 30, 0.02)
    # The one before changes while it is asked for: the kubelet removes older ones.
    wait("there is a log of the one before", lambda: "last words" in node.logs_of("crashing", "silent", "?previous=true"), 30)


@test(pod("once", container("good", "exit 0"), container("bad", "[ -e /evidence/tried ] && exit 0; touch /evidence/tried; exit 1",
                                                        volumeMounts=[SEEN]), restartPolicy="OnFailure", volumes=[EVIDENCE]))
def on_failure_restarts_only_what_failed(node):
    node.phase("once", "Succeeded")
    counts = (node.status("once", "good")["restartCount"], node.status("once", "bad")["restartCount"])
    need(counts == (0, 1), f"restarts of the good and the bad: {counts}")


@test(pod("greedy", container("main", "sleep 1; x=a; while :; do x=$x$x; done", resources={"limits": {"memory": "32Mi"}}),
          restartPolicy="Never"))
def out_of_memory_is_told(node):
    ended = node.phase("greedy", "Failed")["status"]["containerStatuses"][0]["state"]["terminated"]
    need((ended["exitCode"], ended["reason"]) == (137, "OOMKilled"), f"the end: {ended}")


@test(pod("stubborn", container("main", "trap '' TERM; while :; do sleep 1; done"), terminationGracePeriodSeconds=3))
def the_grace_period_ends_with_a_kill(node):
    node.ready("stubborn")
    took = node.gone("stubborn")
    need(took >= 2.9, f"killed after {took:.1f} s of 3")


@test(pod("by-command", container("missing", command=["/no/such/program"]), container("bad", command=["/bin/not-executable"]),
          container("nowhere", image=f"{REGISTRY}/slipway/nothing:latest"),
          container("never", image=f"{REGISTRY}/slipway/test:none", imagePullPolicy="Never"), "good"))
def what_cannot_start_says_why(node):
    def last(name):
        status = node.status("by-command", name)
        return status["state"].get("terminated") or status.get("lastState", {}).get("terminated") or \
            need(False, f"{name} has not ended: {status}")
    missing = wait("the missing command is told of", lambda: last("missing"))
    need(missing["exitCode"] in (127, 128) and "/no/such/program" in missing["message"], f"missing: {missing}")
    bad = wait("the bad file is told of", lambda: last("bad"))
    need(bad["exitCode"] in (126, 128) and "not-executable" in bad["message"], f"bad: {bad}")
    reasons = ("ErrImagePull", "ImagePullBackOff")
    waiting = wait("the missing image is told of", lambda: (w := node.status("by-command", "nowhere")["state"]["waiting"])["reason"] in reasons and w)
    need("slipway/nothing" in waiting["message"], f"nowhere: {waiting}")
    need(node.status("by-command", "never")["state"]["waiting"]["reason"] == "ErrImageNeverPull", "an image was pulled that never should be")
    need(node.status("by-command", "good")["state"].get("running"), "the good container does not run")


@test(pod("image", {"name": "main", "image": f"{REGISTRY}/slipway/entrypoint:latest", "imagePullPolicy": "Always",
                    "args": ["status", "from-args"], "env": [{"name": "A", "value": "pod"}]},
          restartPolicy="Never"))
def the_images_settings_hold_unless_overridden(node):
    node.phase("image", "Succeeded")
    log = node.logs_of("image", "main")
    need("from-args" in log or "A=pod" in log or "pod" in log, f"the probe printed: {log[:400]}")
    status = node.status("image", "main")
    need("@sha256:" in status["imageID"] and status["containerID"].startswith("slipway://"), f"ids: {status}")
