"""Security contexts, namespaces, networks, sysctls and limits of pods."""
import json, re, urllib.request

from manifest import container, mount, pod, test
from node import DRIVER, NAME, SLOWNESS, need, wait
from stream import shell


def lines(text):
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


@test(pod("secured", container("main", securityContext={
    "runAsUser": 1000, "runAsGroup": 3000, "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}}, volumeMounts=[mount("tmp", "/tmp")]),
    securityContext={"runAsNonRoot": True, "supplementalGroups": [5000], "fsGroup": 6000, "seccompProfile": {"type": "RuntimeDefault"}},
    volumes=[{"name": "tmp", "emptyDir": {}}]))
def a_restricted_pod(node):
    node.ready("secured")
    got = shell(node, "secured", "main", "id -u; id -g; id -G; touch /x 2>&1; touch /tmp/x && stat -c %g /tmp/x; cat /proc/self/status")
    need(got.split("\n")[:2] == ["1000", "3000"], f"user and group: {got[:40]!r}")
    need({"5000", "6000"} <= set(got.split("\n")[2].split()), f"groups: {got.splitlines()[2]}")
    need("Read-only file system" in got, "the root is writable")
    status = lines(got)
    need(status["NoNewPrivs"].strip() == "1" and status["Seccomp"].strip() == "2", "no_new_privs or seccomp is missing")
    need(int(status["CapBnd"], 16) == 1 << 10 and int(status["CapEff"], 16) == 0, f"capabilities: {status['CapBnd']} {status['CapEff']}")
    user = node.status("secured", "main").get("user", {}).get("linux", {})
    need(user.get("uid") == 1000 and user.get("gid") == 3000, f"the status tells of the user: {user}")


@test(pod("root-image", container("main", securityContext={"runAsNonRoot": True})),
      pod("named-user", {"name": "main", "image": "127.0.0.1:5000/slipway/user-name:latest", "command": ["sleep", "1000"],
                         "securityContext": {"runAsNonRoot": True}}))
def run_as_non_root_is_checked_against_the_image(node):
    for name, word in (("root-image", "will run as root"), ("named-user", "non-numeric user")):
        waiting = wait(f"{name} is refused", lambda: node.status(name, "main")["state"].get("waiting", {}).get("message"))
        need(word in waiting, f"{name}: {waiting}")


@test(pod("privileged", container("main", securityContext={"privileged": True}), hostPID=True, hostIPC=True, hostNetwork=True))
def a_privileged_pod_in_the_hosts_namespaces(node):
    node.ready("privileged")
    got = shell(node, "privileged", "main", "for n in pid ipc net; do readlink /proc/self/ns/$n; readlink /proc/1/ns/$n; done; "
                "grep CapEff /proc/self/status; ls /dev/kmsg; mount -t tmpfs none /mnt 2>/dev/null || mkdir -p /m && mount -t tmpfs none /m && echo mounted; hostname")
    names = got.split()
    need(names[0] == names[1] and names[2] == names[3] and names[4] == names[5], f"namespaces are not the host's: {names[:6]}")
    need("/dev/kmsg" in got and "mounted" in got, f"not privileged: {got}")
    need(names[-1] == NAME, f"the host name is {names[-1]}")


@test(pod("family", container("one", "sleep 4321 & wait"), container("two", securityContext={"capabilities": {"add": ["SYS_PTRACE"]}}),
          shareProcessNamespace=True))
def a_shared_process_namespace(node):
    node.ready("family")
    need("sleep 4321" in shell(node, "family", "two", "ps"), "the processes of the other container are not seen")
    shell(node, "family", "two", "kill $(pidof sleep | tr ' ' '\\n' | while read p; do tr '\\0' ' ' </proc/$p/cmdline | grep -q 4321 && echo $p; done)")
    wait("it was restarted when its process was killed", lambda: node.status("family", "one")["restartCount"] == 1)
    need(node.status("family", "two")["restartCount"] == 0, "the other was restarted, too")


@test(pod("named", "main", hostname="chosen", subdomain="sub", setHostnameAsFQDN=True,
          hostAliases=[{"ip": "192.0.2.77", "hostnames": ["alias.test"]}], dnsPolicy="None",
          dnsConfig={"nameservers": ["192.0.2.88"], "searches": ["a.test"], "options": [{"name": "ndots", "value": "3"}]}),
      pod("default-dns", "main", dnsPolicy="Default"), pod("cluster-dns", "main"))
def names_and_resolvers(node):
    for name in ("named", "default-dns", "cluster-dns"):
        node.ready(name)
    got = shell(node, "named", "main", "hostname; cat /etc/hosts /etc/resolv.conf")
    need(got.startswith("chosen.sub.default.svc.cluster.test"), f"the host name: {got[:60]!r}")
    for word in ("alias.test", "192.0.2.88", "a.test", "ndots:3"):
        need(word in got, f"no {word} in {got}")
    need("192.0.2.53" in shell(node, "default-dns", "main", "cat /etc/resolv.conf"), "dnsPolicy Default is not the node's")
    got = shell(node, "cluster-dns", "main", "cat /etc/resolv.conf")
    need("192.0.2.54" in got and "default.svc.cluster.test" in got, f"dnsPolicy ClusterFirst: {got}")


@test(pod("tuned", "main", securityContext={"sysctls": [
    {"name": "net.ipv4.ip_unprivileged_port_start", "value": "99"}, {"name": "net.core.somaxconn", "value": "321"},
    {"name": "kernel.msgmax", "value": "12345"}]}))
def sysctls(node):
    node.ready("tuned")
    got = shell(node, "tuned", "main", "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/core/somaxconn /proc/sys/kernel/msgmax")
    need(got.split() == ["99", "321", "12345"], f"the sysctls are {got.split()}")


@test(pod("served", container("main", "mkdir /www; echo from-the-pod >/www/index.html; exec httpd -f -p 80 -h /www",
                              ports=[{"containerPort": 80, "hostPort": 18080}],
                              readinessProbe={"httpGet": {"path": "/", "port": 80}, "periodSeconds": 1})))
def host_ports(node):
    found = node.ready("served")
    for host in ("127.0.0.1:18080", "192.0.2.1:18080", found["status"]["podIP"] + ":80"):
        with urllib.request.urlopen(f"http://{host}/", timeout=10 * SLOWNESS) as answer:
            need(answer.read() == b"from-the-pod\n", f"{host} does not lead to the pod")


@test(pod("limited", container("main", resources={"requests": {"cpu": "100m", "memory": "16Mi"}, "limits": {"cpu": "200m", "memory": "48Mi"}})),
      pod("burst", container("main", resources={"requests": {"cpu": "50m"}})),
      pod("sure", container("main", resources={"limits": {"cpu": "100m", "memory": "32Mi"}})))
def limits_are_in_the_cgroups_of_their_class(node):
    for name, kind in (("limited", "burstable"), ("burst", "burstable"), ("sure", "")):
        node.ready(name)
        place = node.cgroup_of(name, "memory")
        need(("burstable" in place) == (kind == "burstable"), f"{name} is in {place}")
    id = re.sub(".*//", "", node.status("limited", "main")["containerID"])
    if node.pure_v2():
        files = {"memory.max": str(48 << 20), "cpu.max": "20000 100000"}
    else:
        files = {"memory.limit_in_bytes": str(48 << 20), "cpu.cfs_quota_us": "20000", "cpu.shares": "102"}
    for file, want in files.items():
        own = f"slipway-{id}.scope" if DRIVER == "systemd" else id
        with open(f"{node.cgroup_of('limited', file.split('.')[0])}/{own}/{file}") as f:
            got = f.read().strip()
        need(got == want, f"{file} of the container is {got}, not {want}")
    told = node.status("limited", "main").get("resources")
    need(told and told["limits"] == {"cpu": "200m", "memory": "48Mi"}, f"the status tells of the limits: {json.dumps(told)}")
