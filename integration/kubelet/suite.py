"""Runs the tests of this directory against one node; integration/test-kubelet starts it."""
import importlib, os, subprocess, sys, time, traceback

# Where each Python file's tests are kept; the imports below fill it.
from manifest import TESTS
from node import SLOWNESS, Failed, Node, Skipped, need, wait

# In this order: the later ones disturb the daemon and the kubelet.
for module in ("lifecycle", "volumes", "confinement", "streams", "upkeep", "shutdown"):
    importlib.import_module(module)


def leftovers(node):
    """What is left once no static pod is wanted any more; nothing should be."""
    left = []
    if node.client("pods", "--quiet").strip() or node.client("ps", "--all", "--quiet").strip():
        left.append("pods or containers: " + node.client("pods") + node.client("ps", "--all"))
    left += [f"run directory {n}" for n in os.listdir("/run/slipway/pods")]
    left += [f"writable layer {n}" for n in os.listdir(node.path("state", "containers"))]
    for hierarchy in node.hierarchies():
        left += [f"cgroup {dir}" for dir in node.pod_cgroups(hierarchy)]
    links = subprocess.run(["ip", "-o", "link", "show", "type", "veth"], stdout=subprocess.PIPE, text=True).stdout
    left += [f"link {line}" for line in links.splitlines()]
    with open("/proc/self/mountinfo") as f:
        left += [f"mount {line.split()[4]}" for line in f if "/run/slipway/pods" in line or "/run/netns/" in line]
    addresses = "/run/cni-addresses/node"
    left += [f"address {n}" for n in os.listdir(addresses) if n[0].isdigit()] if os.path.isdir(addresses) else []
    need(not left, "left behind: " + "; ".join(left))
    return True


def complaints(node):
    """Lines of Slipway's log that no test provokes."""
    with open(os.path.join(node.logs, "slipway.log"), errors="replace") as f:
        lines = [l for l in f if (" ERROR " in l or "panicked" in l) and "the keeper of the pod died" not in l]
    need(not lines, f"{len(lines)} errors in Slipway's log: {''.join(lines[:5])}")


def name(manifest):
    """Of a static pod's file."""
    return manifest["metadata"]["name"] + ".json"


def main(arguments):
    keep = "--keep" in arguments
    filters = [a for a in arguments if a != "--keep"]
    chosen = [t for t in TESTS if not filters or any(f in t.name for f in filters)]
    if not chosen:
        sys.exit(f"no test has one of these in its name: {' '.join(filters)}")
    environment = os.environ
    node = Node(environment["SLIPWAY_KUBELET_PLACE"], environment["SLIPWAY_KUBELET_GROUP"], environment["SLIPWAY_KUBELET_LOGS"],
                environment["SLIPWAY"], environment["SLIPWAY_KUBELET"])
    passed = failed = skipped = 0

    def one(what, do):
        nonlocal passed, failed, skipped
        began = time.monotonic()
        try:
            do()
        except Skipped as e:
            skipped += 1
            print(f"SKIPPED kubelet::{what}: {e}", flush=True)
        except Exception as e:  # a test that stumbles over an answer has failed, and the others go on
            failed += 1
            told = str(e) if isinstance(e, Failed) else traceback.format_exc()
            print(f"failed  kubelet::{what} ({time.monotonic() - began:.1f} s)\n{told}\nFAILED  kubelet::{what}", flush=True)
        else:
            passed += 1
            print(f"ok      kubelet::{what} ({time.monotonic() - began:.1f} s)", flush=True)

    try:
        node.prepare()
        node.start_registry()
        node.start_slipway()
        node.start_kubelet()
        # All at once, as on a node that boots; where that would take all the time, each test has its own alone.
        together = SLOWNESS <= 2
        for test in chosen if together else ():
            for manifest in test.pods:
                node.put(manifest)
        for n, test in enumerate(chosen):
            for manifest in () if together else test.pods:
                node.put(manifest)
            one(test.name, lambda: test.run(node))
            wanted = {name(m) for later in chosen[n + 1:] for m in later.pods}
            for manifest in () if together else test.pods:
                if name(manifest) in os.listdir(node.manifests) and name(manifest) not in wanted:
                    os.unlink(os.path.join(node.manifests, name(manifest)))
        if keep:
            subprocess.run([environment.get("SHELL", "/bin/bash")], env={**environment, "CONTAINER_RUNTIME_ENDPOINT": node.cri})
        for file in os.listdir(node.manifests):
            os.unlink(os.path.join(node.manifests, file))
        # The kubelet removes dead sandboxes once a minute.
        one("nothing_is_left", lambda: wait("nothing is left", lambda: leftovers(node), 150, 1))
        one("the_kubelet_and_the_daemon_are_alive", lambda: node.alive(node.kubelet, "kubelet") and node.alive(node.slipway, "slipway"))
        one("no_error_in_the_log", lambda: complaints(node))
    except (Failed, OSError, RuntimeError) as e:
        failed += 1
        print(f"FAILED  kubelet::node: {e}", flush=True)
    finally:
        node.shut()
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return failed == 0


if __name__ == "__main__":
    sys.exit(0 if main(sys.argv[1:]) else 1)
