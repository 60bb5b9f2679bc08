"""What goes on over days: statistics, logs that grow, disks that fill, daemons that come and go."""
import gzip, json, os, re, signal

from manifest import container, pod, test
from node import REGISTRY, Failed, full, need, wait
from stream import execute, shell

STEADY = pod("steady", container("main", "while :; do i=$((i+1)); [ $i = 200 ] && i=0 && sleep 0.05; done"),
             container("web", "echo up; exec httpd -f -p 8080 -h /", readinessProbe={"tcpSocket": {"port": 8080}, "periodSeconds": 1}))


def summary(node, pod):
    for found in json.loads(node.get("/stats/summary"))["pods"]:
        if found["podRef"]["name"] == full(pod):
            return found
    raise Failed(f"the summary has no pod {pod}")


def whole(node, from_cri=False):
    found = summary(node, "steady")
    if from_cri:  # else the kubelet has these from cAdvisor, for containerd's and CRI-O's pods only
        need(found["network"]["rxBytes"] > 0 and found["process_stats"]["process_count"] > 0, f"no network or processes in {found}")
    for what, value in (("cpu of the pod", found["cpu"]["usageNanoCores"]), ("memory of the pod", found["memory"]["workingSetBytes"])):
        need(value > 0, f"{what}: {value}")
    need({c["name"] for c in found["containers"]} == {"main", "web"}, f"containers: {found['containers']}")
    for one in found["containers"]:
        need(one["memory"]["workingSetBytes"] > 0 and one["cpu"]["usageCoreNanoSeconds"] > 0, f"statistics of {one['name']}: {one}")
        need(one["rootfs"]["usedBytes"] >= 0 and one["rootfs"]["capacityBytes"] > 0, f"the file system of {one['name']}: {one.get('rootfs')}")
        need(one["logs"]["capacityBytes"] > 0, f"the log of {one['name']}: {one['logs']}")
    return found


@test(STEADY)
def the_summary_is_whole(node):
    node.ready("steady")
    wait("the summary is whole", lambda: whole(node), 40, 1)
    runtime = json.loads(node.get("/stats/summary"))["node"]["runtime"]
    images = runtime["imageFs"]
    need(images["capacityBytes"] == 1 << 30, f"the image file system is the small one: {images}")
    need(0 < images["usedBytes"] < 1 << 30, f"what images use: {images}")
    metrics = node.get("/metrics/resource")
    need('container_memory_working_set_bytes{container="main",namespace="default",pod="steady-node"}' in metrics, "no resource metrics of a container")


@test(pod("chatty", container("main", "while :; do for i in 1 2 3 4 5 6 7 8 9 10; do echo \"line $((n+=1)) $(printf %0100d 0)\"; done; sleep 0.05; done")))
def logs_are_rotated(node):
    uid = node.ready("chatty")["metadata"]["uid"]
    place = node.path("logs", f"default_{full('chatty')}_{uid}", "main")
    wait("the log was rotated more than once", lambda: len(os.listdir(place)) >= 3, 60)
    # The kubelet keeps so many, and the runtime goes on in the file that it is told to open again.
    size = os.path.getsize(place + "/0.log")
    wait("the new file grows", lambda: os.path.getsize(place + "/0.log") != size)
    zipped = wait("an old one is compressed", lambda: [n for n in os.listdir(place) if n.endswith(".gz")])
    with gzip.open(os.path.join(place, zipped[0]), "rt") as f:
        lines = list(f)
    strange = [l for l in lines if not re.match(r"\S+ stdout F line \d+ 0{100}$", l)]
    need(not strange, f"{len(strange)} of {len(lines)} lines of {zipped[0]} are not whole: {strange[:3]}")
    numbers = [int(l.split()[4]) for l in lines]
    need(numbers == list(range(numbers[0], numbers[0] + len(numbers))), "lines are missing within a rotated file")
    node.gone("chatty")


@test(STEADY)
def a_full_disk_frees_unused_images(node):
    big = f"{REGISTRY}/slipway/big:latest"
    node.client("pull", big)
    need(big.split(":latest")[0] in node.client("images"), "the image is not there")
    filler = node.path("state", "filler")
    space = os.statvfs(node.path("state"))
    with open(filler, "wb") as f:
        f.truncate(0)
        left = space.f_bavail * space.f_frsize - (60 << 20)
        block = bytes(1 << 20)
        for _ in range(left >> 20):
            f.write(block)
    try:
        wait("the image was removed", lambda: "slipway/big" not in node.client("images"), 90, 1)
        need("slipway/test" in node.client("images"), "an image in use was removed")
    finally:
        os.unlink(filler)
    need(node.status("steady", "web")["restartCount"] == 0, "a pod was disturbed")
    wait("pressure is over and new pods come in", lambda: "has disk pressure" not in node.get("/healthz"))


def life(node, pods):
    """Identity of each container that should not notice."""
    return {(p, s["name"]): (s["containerID"], s["restartCount"]) for p in pods for s in node.pod(p)["status"]["containerStatuses"]}


STAYING = ["steady", "staying"]


STAYING_POD = pod("staying", container("main", "echo began; while :; do echo $((n+=1)); sleep 0.1; done"))


@test(STEADY, STAYING_POD)
def pods_outlive_the_daemon(node):
    for name in STAYING:
        node.ready(name)
    before = life(node, STAYING)
    node.stop(node.slipway)
    node.start_slipway()
    # The kubelet connects again when it sees fit.
    last = wait("the log can be read", lambda: int(node.logs_of("staying", "main", "?tailLines=1")))
    node.slipway.send_signal(signal.SIGKILL)
    node.slipway.wait()
    node.start_slipway()
    wait("exec works again", lambda: shell(node, "staying", "main", "echo again") == "again\n")
    wait("the log went on", lambda: int(node.logs_of("staying", "main", "?tailLines=1")) > last)
    numbers = [int(n) for n in node.logs_of("staying", "main", "?tailLines=100").split() if n != "began"]
    need(numbers[0] < last, f"the log before the kill can't be seen: {numbers[0]}, {last}")
    need(numbers == list(range(numbers[0], numbers[0] + len(numbers))), f"lines of the log are missing: {numbers}")
    for name in STAYING:
        node.ready(name)
    need(life(node, STAYING) == before, f"containers changed: {before} {life(node, STAYING)}")


@test(STEADY, STAYING_POD)
def pods_outlive_the_kubelet_and_its_feature_gates(node):
    before = life(node, STAYING)
    node.stop(node.kubelet)
    node.start_kubelet(featureGates={"EventedPLEG": True, "PodAndContainerStatsFromCRI": True})
    for name in STAYING:
        node.ready(name)
    need(life(node, STAYING) == before, f"containers changed: {before} {life(node, STAYING)}")
    wait("the summary is whole", lambda: whole(node, from_cri=True), 40, 1)

    def metrics():
        text = node.get("/metrics/cadvisor")
        for name in ("container_cpu_usage_seconds_total", "container_memory_working_set_bytes", "container_network_receive_bytes_total",
                     "container_fs_usage_bytes", "container_processes"):
            need(re.search(name + r'{[^}]*pod="steady-node"', text), f"/metrics/cadvisor has no {name} of the pod")
        return text
    wait("/metrics/cadvisor has what CRI tells", metrics, 30, 1)
    # One pod that has been stopped and is not removed yet: statistics of it have no interface.
    node.put(pod("short", "main"))
    node.ready("short")
    node.gone("short")
    wait("the summary is whole beside it", lambda: whole(node, from_cri=True), 40, 1)


@test(pod("ending", "main"))
def events_tell_of_an_end(node):
    # With EventedPLEG the kubelet lists only every five minutes: nothing but an event can tell it.
    metrics = node.get("/metrics")
    if "kubelet_evented_pleg_connection_success_count" in metrics:
        need(re.search(r"kubelet_evented_pleg_connection_success_count(_total)? [1-9]", metrics), "the kubelet gets no events")
    node.ready("ending")
    execute(node, "ending", "main", "kill", "1")
    wait("it was restarted", lambda: node.status("ending", "main")["restartCount"] == 1, 10)


@test(pod("kept", "main"))
def a_killed_keeper_ends_its_pod_which_comes_anew(node):
    node.ready("kept")
    before = life(node, ["kept"])
    id = node.client("pods", "--quiet", "--name", full("kept")).split()[0]
    keepers = [p for p in os.listdir("/proc") if p.isdigit() and keeps(p, id)]
    need(len(keepers) == 1, f"keepers of pod {id}: {keepers}")
    os.kill(int(keepers[0]), signal.SIGKILL)
    wait("the pod is another", lambda: life(node, ["kept"]) != before)
    node.ready("kept")
    need(shell(node, "kept", "main", "echo here") == "here\n", "the new pod does not work")


def keeps(pid, id):
    """A keeper's name begins with "slipway:" and goes on with the pod's id, as far as there is room."""
    try:
        with open(f"/proc/{pid}/comm") as f:
            name = f.read().strip().removeprefix("slipway:")
    except OSError:
        return False
    return len(name) >= 6 and id.startswith(name)
