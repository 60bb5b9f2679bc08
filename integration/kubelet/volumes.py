"""Volumes that need no API server (projected ones do): emptyDir, hostPath, downwardAPI; their mounts and owners."""
import os

from manifest import EVIDENCE, SEEN, container, host_path, mount, pod, test
from node import need, run, wait
from stream import shell


@test(pod("volumes",
          container("main", volumeMounts=[
              mount("disk", "/disk"), mount("memory", "/memory"), mount("disk", "/sub", subPath="a/b"),
              mount("disk", "/named", subPathExpr="$(NAME)"), mount("disk", "/read-only", readOnly=True),
              mount("file", "/etc/one-file"), mount("made", "/made")], env=[{"name": "NAME", "value": "by-name"}]),
          container("other", volumeMounts=[mount("disk", "/disk"), mount("memory", "/memory")]),
          securityContext={"fsGroup": 4242},
          volumes=[{"name": "disk", "emptyDir": {}}, {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "8Mi"}},
                   host_path("file", "/etc/hostname", "File"), host_path("made", "/run/evidence/made/for/it", "DirectoryOrCreate")]))
def empty_dirs_host_paths_and_sub_paths(node):
    node.ready("volumes")
    shell(node, "volumes", "main", "echo one >/disk/x; echo two >/memory/y; echo three >/sub/z; echo four >/named/n; echo five >/made/f")
    seen = shell(node, "volumes", "other", "cat /disk/x /memory/y /disk/a/b/z /disk/by-name/n")
    need(seen.split() == ["one", "two", "three", "four"], f"the other container sees {seen!r}")
    need(node.seen("made/for/it/f") == "five\n", "the host does not see what was written")
    mounts = {line.split()[1]: line.split()[2:4] for line in shell(node, "volumes", "main", "cat /proc/mounts").splitlines()}
    need(mounts["/memory"][0] == "tmpfs" and "size=8192k" in mounts["/memory"][1], f"/memory is {mounts['/memory']}")
    need(mounts["/read-only"][1].split(",")[0] == "ro", f"/read-only is {mounts['/read-only']}")
    need(shell(node, "volumes", "main", "touch /read-only/x 2>&1; stat -c %g /disk /memory").split()[-2:] == ["4242", "4242"],
         "fsGroup owns neither")
    with open("/etc/hostname") as f:
        need(shell(node, "volumes", "main", "cat /etc/one-file") == f.read(), "the file is another")


@test(pod("told", container("main", env=[
    {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
    {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    {"name": "LIMIT", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "containerName": "main"}}}],
    resources={"limits": {"memory": "64Mi", "cpu": "100m"}}, volumeMounts=[mount("down", "/down")]),
    labels={"colour": "blue"},
    volumes=[{"name": "down", "downwardAPI": {"defaultMode": 0o440, "items": [
        {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
        {"path": "deep/name", "fieldRef": {"fieldPath": "metadata.name"}},
        {"path": "cpu", "resourceFieldRef": {"resource": "limits.cpu", "containerName": "main", "divisor": "1m"}}]}}]))
def the_downward_api(node):
    found = node.ready("told")
    got = shell(node, "told", "main", "echo $POD $POD_IP $LIMIT; cat /down/labels; echo; cat /down/deep/name; echo; "
                "cat /down/cpu; echo; stat -L -c %a /down/cpu").split()
    want = ["told-node", found["status"]["podIP"], str(64 << 20), 'colour="blue"', "told-node", "100", "440"]
    need(got == want, f"the container is told {got}, not {want}")


@test(pod("propagated", container("both", securityContext={"privileged": True},
                                  volumeMounts=[mount("shared", "/shared", mountPropagation="Bidirectional")]),
          container("into", volumeMounts=[mount("shared", "/shared", mountPropagation="HostToContainer")]),
          container("none", volumeMounts=[mount("shared", "/shared")]),
          volumes=[host_path("shared", "/run/evidence/shared", "DirectoryOrCreate")]))
def mounts_propagate_as_asked(node):
    node.ready("propagated")
    shell(node, "propagated", "both", "mkdir /shared/inner && mount -t tmpfs inner /shared/inner && echo within >/shared/inner/file")
    try:
        need(node.seen("shared/inner/file") == "within\n", "the host does not see a mount of the container")
        need(shell(node, "propagated", "into", "cat /shared/inner/file") == "within\n", "HostToContainer does not see it")
        need("no" in shell(node, "propagated", "none", "cat /shared/inner/file 2>/dev/null || echo no"), "None sees it")
    finally:
        run("umount", "/run/evidence/shared/inner")


@test(pod("tree", container("main", volumeMounts=[mount("tree", "/tree", readOnly=True)]),
          volumes=[host_path("tree", "/run/evidence", "Directory")]))
def a_read_only_host_path(node):
    node.ready("tree")
    need("Read-only" in shell(node, "tree", "main", "touch /tree/x 2>&1 || true"), "the mount can be written to")
    need(not os.path.exists("/run/evidence/x"), "something was written")


@test(pod("missing-source", container("main", volumeMounts=[mount("gone", "/gone")]), "other",
          volumes=[host_path("gone", "/run/evidence/not-there-yet")]))
def a_host_path_that_comes_late(node):
    def named():
        state = node.status("missing-source", "main")["state"]
        need("/run/evidence/not-there-yet" in state.get("waiting", {}).get("message", ""), f"no message names it: {state}")
        return True
    wait("the message names it", named)
    os.makedirs("/run/evidence/not-there-yet")
    node.ready("missing-source")
