"""Makers of static pods, and the list of tests."""
import collections, math

from node import REGISTRY, SLOWNESS

IMAGE = f"{REGISTRY}/slipway/test:latest"
# Runs until it is told to end, and then ends at once.
FOREVER = "trap 'exit 0' TERM; sleep 100000 & wait"
# Seconds of a pod that names none.
GRACE = math.ceil(min(2 * SLOWNESS, 10))
TESTS = []
Test = collections.namedtuple("Test", "name pods run")


def test(*pods):
    """Registers a test, and the pods that are there before it runs."""
    def register(function):
        TESTS.append(Test(f"{function.__module__}::{function.__name__}", pods, function))
        return function
    return register


def container(name, script=FOREVER, **fields):
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        if kind in fields:
            # A second by default, which is not much on an emulated machine.
            fields[kind] = {"timeoutSeconds": math.ceil(SLOWNESS), **fields[kind]}
    return {"name": name, "image": IMAGE, "imagePullPolicy": "IfNotPresent", "command": ["sh", "-c", script], **fields}


def pod(name, *containers, labels=None, annotations=None, **spec):
    return {"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "labels": labels or {}, "annotations": annotations or {}},
            "spec": {"terminationGracePeriodSeconds": GRACE, **spec,
                     "containers": [c if isinstance(c, dict) else container(c) for c in containers]}}


def host_path(name, path, kind=""):
    return {"name": name, "hostPath": {"path": path, "type": kind}}


def mount(name, path, **fields):
    return {"name": name, "mountPath": path, **fields}


EVIDENCE = host_path("evidence", "/run/evidence", "Directory")
SEEN = mount("evidence", "/evidence")
