"""A node of its own: registry, Slipway and a kubelet without an API server, in the namespaces that
integration/test-kubelet has made."""
import json, os, re, signal, socket, ssl, subprocess, time, urllib.error, urllib.request

REPO = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
ADDRESS = "192.0.2.1"
NAME = "node"
REGISTRY = "127.0.0.1:5000"
# What a slow machine, or one that is emulated, multiplies every patience by.
SLOWNESS = float(os.environ.get("SLIPWAY_TEST_SLOWNESS", "1"))


# Of the kubelet and of Slipway; integration/test-kubelet has checked that it can be.
DRIVER = os.environ.get("SLIPWAY_TEST_CGROUP_DRIVER", "cgroupfs")


class Failed(Exception):
    """What a test found; the text says what was expected and what there was."""


class Skipped(Exception):
    """What this machine lacks for a test."""


def need(condition, what):
    if not condition:
        raise Failed(what)


def run(*command, **more):
    """Runs a command of the node's own making; its output."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)
    if done.returncode:
        raise Failed(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def write(path, text):
    with open(path, "w") as f:
        f.write(text)


def wait(what, probe, patience=30, every=0.1):
    """Polls until the probe gives something true, which is returned. It may raise Failed or OSError meanwhile."""
    until, last = time.monotonic() + patience * SLOWNESS, None
    while True:
        try:
            found = probe()
            if found:
                return found
            last = None
        except (Failed, OSError, KeyError, ValueError) as e:
            last = e
        if time.monotonic() > until:
            raise Failed(f"not within {patience * SLOWNESS:g} s: {what}" + (f" ({last!r})" if last else ""))
        time.sleep(every)


def systemctl(*arguments):
    """Over the bus: systemd's own socket is not for clients in another PID namespace."""
    return run("env", "SYSTEMCTL_FORCE_BUS=1", "systemctl", *arguments)


class Node:
    """The place, the processes and the kubelet's port."""

    def __init__(self, place, group, logs, slipway, kubelet):
        self.place, self.group, self.logs, self.slipway_path, self.kubelet_path = place, group, logs, slipway, kubelet
        self.manifests, self.evidence = self.path("manifests"), "/run/evidence"
        self.cri = "unix:///run/slipway/slipway.sock"
        self.registry = self.slipway = self.kubelet = None
        self.tls = ssl.create_default_context()
        self.tls.check_hostname, self.tls.verify_mode = False, ssl.CERT_NONE  # the kubelet signs its own

    def path(self, *parts):
        return os.path.join(self.place, *parts)

    def prepare(self):
        """Mounts, interfaces and settings, all of them gone with the namespaces."""
        for name in ("manifests", "cni", "kubelet", "logs", "plugins", "tunables"):
            os.makedirs(self.path(name), exist_ok=True)
        kept = [d for d in ("systemd", "dbus") if DRIVER == "systemd" and os.path.isdir("/run/" + d)]
        for name in kept:
            os.makedirs(self.path("run", name))
            run("mount", "--rbind", "/run/" + name, self.path("run", name))
        run("mount", "-t", "tmpfs", "-o", "mode=755", "slipway-kubelet", "/run")
        for name in kept:
            os.makedirs("/run/" + name)
            run("mount", "--move", self.path("run", name), "/run/" + name)
        os.makedirs("/run/lock")
        os.makedirs(self.evidence)
        # Small, so that a test can fill it; the kubelet knows file systems by their mounts.
        os.makedirs(self.path("state"))
        run("mount", "-t", "tmpfs", "-o", "mode=755,size=1G", "slipway-state", self.path("state"))
        run("mount", "--make-rshared", "/")
        # The kubelet sets these for the whole machine: here it sets files.
        for name in ("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
                     "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes"):
            with open("/proc/sys/" + name) as f:
                write(self.path("tunables", name.replace("/", "-")), f.read())
            run("mount", "--bind", self.path("tunables", name.replace("/", "-")), "/proc/sys/" + name)
        write(self.path("resolv.conf"), "nameserver 192.0.2.53\nsearch node.test\n")
        socket.sethostname(NAME)
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "node0", "type", "bridge")
        run("ip", "addr", "add", ADDRESS + "/24", "dev", "node0")
        run("ip", "link", "set", "node0", "up")
        run("ip", "route", "add", "default", "dev", "node0")
        for name in ("ip_forward", "conf/all/route_localnet"):
            write("/proc/sys/net/ipv4/" + name, "1")
        for hierarchy in self.hierarchies():
            os.makedirs(hierarchy + self.group, exist_ok=True)
            for name in ("cpuset.cpus", "cpuset.mems"):
                # Version 1 wants these filled before a process may come in.
                if os.path.exists(hierarchy + "/" + name) and not self.pure_v2():
                    with open(hierarchy + "/" + name) as f:
                        write(f"{hierarchy}{self.group}/{name}", f.read())
        write(self.path("cni", "10-node.conflist"), json.dumps({
            "cniVersion": "1.0.0", "name": "node", "plugins": [
                {"type": "bridge", "bridge": "slipway0", "isGateway": True, "ipMasq": True, "hairpinMode": True,
                 "ipam": {"type": "host-local", "dataDir": "/run/cni-addresses", "ranges": [[{"subnet": "10.91.0.0/16"}]],
                          "routes": [{"dst": "0.0.0.0/0"}]}},
                {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True}]}))

    @staticmethod
    def pure_v2():
        return os.path.exists("/sys/fs/cgroup/cgroup.controllers")

    def hierarchies(self):
        """Mount points of all cgroup hierarchies."""
        top = "/sys/fs/cgroup"
        return [top] if self.pure_v2() else [os.path.join(top, n) for n in sorted(os.listdir(top))]

    def start_registry(self):
        log = open(os.path.join(self.logs, "registry.log"), "w")
        self.registry = subprocess.Popen(
            [os.path.join(REPO, "hack/test-image"), "serve", "--port", REGISTRY.split(":")[1], "--data", self.path("registry"),
             os.environ.get("SLIPWAY_TEST_IMAGES") or self.path("images"), "test", "big", "entrypoint", "user-name"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        need(self.registry.stdout.readline().strip() == "ready", "the registry did not come up; see registry.log")

    def start_slipway(self):
        config = f"""listen = "/run/slipway/slipway.sock"
run_root = "/run/slipway"
state_root = {json.dumps(self.path("state"))}
[log]
level = "debug"
[cgroup]
driver = "{DRIVER}"
[images]
insecure_registries = ["{REGISTRY}"]
[network]
conf_dir = {json.dumps(self.path("cni"))}
bin_dirs = ["/usr/lib/cni", "/opt/cni/bin"]
cache_dir = "/run/cni-results"
timeout = "{60 * SLOWNESS:g}s"
"""
        write(self.path("slipway.toml"), config)
        log = open(os.path.join(self.logs, "slipway.log"), "a")
        self.slipway = subprocess.Popen([self.slipway_path, "serve", "--config", self.path("slipway.toml")],
                                        stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait("slipway answers", lambda: self.alive(self.slipway, "slipway") and self.client("version") and self.client("pods") is not None)

    def start_kubelet(self, **changes):
        gates = {"KubeletCrashLoopBackOffMax": True, "EventedPLEG": False, "PodAndContainerStatsFromCRI": False,
                 **changes.pop("featureGates", {})}
        config = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
            "staticPodPath": self.manifests, "fileCheckFrequency": "1s", "syncFrequency": "2s",
            "containerRuntimeEndpoint": self.cri, "imageServiceEndpoint": self.cri,
            "address": "0.0.0.0", "port": 10250, "readOnlyPort": 10255, "enableServer": True,
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupDriver": DRIVER, "cgroupRoot": self.group or "/", "cgroupsPerQOS": True, "enforceNodeAllocatable": ["pods"],
            "failCgroupV1": False, "failSwapOn": False, "makeIPTablesUtilChains": False, "oomScoreAdj": 0, "maxOpenFiles": 65536,
            "runtimeRequestTimeout": f"{120 * SLOWNESS:g}s", "podLogsDir": self.path("logs"), "resolvConf": self.path("resolv.conf"),
            "clusterDNS": ["192.0.2.54"], "clusterDomain": "cluster.test",
            "volumePluginDir": self.path("plugins"), "allowedUnsafeSysctls": ["net.core.*", "kernel.msg*"],
            "containerLogMaxSize": "16Ki", "containerLogMaxFiles": 3, "containerLogMonitorInterval": "3s",
            "crashLoopBackOff": {"maxContainerRestartPeriod": f"{min(2 * SLOWNESS, 10):g}s"},
            "imageMinimumGCAge": "1s", "evictionHard": {"imagefs.available": "100Mi", "memory.available": "1Mi"},
            "evictionPressureTransitionPeriod": "5s", "featureGates": gates, **changes,
        }
        write(self.path("kubelet.json"), json.dumps(config, indent=1))
        log = open(os.path.join(self.logs, "kubelet.log"), "a")
        self.kubelet = subprocess.Popen(
            [self.kubelet_path, "--config", self.path("kubelet.json"), "--root-dir", self.path("kubelet"),
             "--cert-dir", self.path("kubelet", "pki"), "--hostname-override", NAME, "--node-ip", ADDRESS, "-v", "2"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait("the kubelet answers", lambda: self.alive(self.kubelet, "kubelet") and self.get("/healthz") == "ok", 60)

    @staticmethod
    def alive(process, name):
        if process.poll() is not None:
            # Not Failed: no patience helps.
            raise RuntimeError(f"{name} ended with {process.returncode}; see {name}.log")
        return True

    @staticmethod
    def stop(process, sig=signal.SIGTERM):
        if process and process.poll() is None:
            process.send_signal(sig)
            try:
                process.wait(40 * SLOWNESS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def client(self, *arguments):
        """Slipway's own CRI client."""
        return run(self.slipway_path, "--runtime-endpoint", self.cri, "--timeout", "10s", *arguments)

    # The kubelet's port.

    def open(self, path, method="GET", timeout=30):
        request = urllib.request.Request(f"https://127.0.0.1:10250{path}", method=method)
        try:
            return urllib.request.urlopen(request, context=self.tls, timeout=timeout * SLOWNESS)
        except urllib.error.HTTPError as e:
            raise Failed(f"{method} {path}: {e.code}: {e.read().decode(errors='replace').strip()}") from e

    def get(self, path, **more):
        with self.open(path, **more) as answer:
            return answer.read().decode(errors="replace")

    def logs_of(self, pod, container, query=""):
        return self.get(f"/containerLogs/default/{full(pod)}/{container}{query}")

    def pods(self):
        """All that the kubelet tells of its pods, by name without the node's."""
        items = json.loads(self.get("/pods")).get("items") or []
        return {p["metadata"]["name"].removesuffix("-" + NAME): p for p in items}

    def pod(self, name):
        found = self.pods().get(name)
        need(found, f"the kubelet knows no pod {name}")
        return found

    def put(self, manifest):
        """Hands a static pod to the kubelet. The rename is one event for its watch."""
        name = manifest["metadata"]["name"]
        new = os.path.join(self.manifests, "." + name)
        write(new, json.dumps(manifest))
        os.rename(new, os.path.join(self.manifests, name + ".json"))

    def take(self, name):
        os.unlink(os.path.join(self.manifests, name + ".json"))

    def gone(self, name, patience=60):
        """Takes a pod away, and waits until nothing of it runs; how many seconds that took."""
        began = time.monotonic()
        self.take(name)

        def probe():
            items = json.loads(self.get("/runningpods/")).get("items") or []
            return full(name) not in [p["metadata"]["name"] for p in items]
        wait(f"pod {name} is gone", probe, patience, 0.05)
        return time.monotonic() - began

    def status(self, pod, container):
        """The status of a container, whatever its kind."""
        status = self.pod(pod)["status"]
        for kind in ("containerStatuses", "initContainerStatuses"):
            for found in status.get(kind, []):
                if found["name"] == container:
                    return found
        raise Failed(f"pod {pod} has no status of container {container}: {json.dumps(status)}")

    def ready(self, name, patience=60):
        def probe():
            pod = self.pod(name)
            conditions = {c["type"]: c["status"] for c in pod["status"].get("conditions", [])}
            need(conditions.get("Ready") == "True", f"{name} is not ready: {brief(pod)}")
            return pod
        return wait(f"pod {name} is ready", probe, patience)

    def phase(self, name, phase, patience=60):
        def probe():
            pod = self.pod(name)
            need(pod["status"].get("phase") == phase, f"{name} is not {phase}: {brief(pod)}")
            return pod
        return wait(f"pod {name} is {phase}", probe, patience)

    def seen(self, *parts):
        """What a pod left in the evidence directory."""
        with open(os.path.join(self.evidence, *parts)) as f:
            return f.read()

    def cgroup_of(self, pod, controller):
        """The directory of a pod's cgroup in the hierarchy that has the controller."""
        uid = self.pod(pod)["metadata"]["uid"]
        top = "/sys/fs/cgroup" if self.pure_v2() else f"/sys/fs/cgroup/{controller}"
        for dir in self.pod_cgroups(top):
            if pod_of(os.path.basename(dir)) == uid:
                return dir
        raise Failed(f"no cgroup of pod {pod} ({uid}) below {top}{self.group}")

    def pod_cgroups(self, hierarchy):
        """Directories of all pods' cgroups in a hierarchy. With the systemd driver a kubelet's slice is at the top, which has
        all controllers."""
        return [os.path.join(dir, n) for dir, names, _ in os.walk(hierarchy + self.group) for n in names if pod_of(n)]

    def shut(self):
        for process in (self.kubelet, self.slipway):
            self.stop(process)
        if self.registry:
            self.registry.stdin.close()
            try:
                self.registry.wait(10)
            except subprocess.TimeoutExpired:
                self.registry.kill()


def pod_of(cgroup):
    """The uid of the pod whose cgroup has this name with either driver: podUID, or ...-podUID.slice with _ for -."""
    found = re.fullmatch(r"(?:.*-)?pod([0-9a-f][0-9a-f_-]{30,})(?:\.slice)?", cgroup)
    return found and found[1].replace("_", "-")


def full(pod):
    """Name of a static pod as the kubelet has it."""
    return f"{pod}-{NAME}"


def brief(pod):
    """The part of a pod's status that says what is wrong."""
    status = pod["status"]
    told = [status.get("phase", "?"), status.get("reason", ""), status.get("message", "")]
    for one in status.get("initContainerStatuses", []) + status.get("containerStatuses", []):
        told.append(f"{one['name']}({one['restartCount']}): {json.dumps(one['state'])}")
    return "; ".join(t for t in told if t)
