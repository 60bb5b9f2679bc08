//! What a specification says, seen from inside.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use serde_json::json;

use crate::Test;
use crate::bundle::Bundle;

pub const TESTS: &[Test] = &[
    (
        "confinement::user_groups_and_directory",
        user_groups_and_directory,
    ),
    (
        "confinement::capabilities_and_no_new_privileges",
        capabilities_and_no_new_privileges,
    ),
    ("confinement::seccomp", seccomp),
    ("confinement::limits_on_resources", limits_on_resources),
    (
        "confinement::paths_that_are_masked_or_read_only",
        paths_that_are_masked_or_read_only,
    ),
    ("confinement::mounts", mounts),
    (
        "confinement::a_tmpfs_that_begins_with_a_copy",
        a_tmpfs_that_begins_with_a_copy,
    ),
    ("confinement::devices", devices),
    (
        "confinement::namespaces_and_sysctls",
        namespaces_and_sysctls,
    ),
    (
        "confinement::a_namespace_that_is_bound_to_a_file",
        a_namespace_that_is_bound_to_a_file,
    ),
    (
        "confinement::a_user_namespace_of_its_own",
        a_user_namespace_of_its_own,
    ),
    (
        "confinement::a_user_namespace_that_is_joined",
        a_user_namespace_that_is_joined,
    ),
    (
        "confinement::a_time_namespace_of_its_own",
        a_time_namespace_of_its_own,
    ),
    (
        "confinement::the_callers_mount_namespace",
        the_callers_mount_namespace,
    ),
    (
        "confinement::a_mount_namespace_that_is_joined",
        a_mount_namespace_that_is_joined,
    ),
];

#[track_caller]
fn output(bundle: &Bundle) -> String {
    let said = bundle.run();
    assert_eq!(said.code, 0, "{said:?}");
    said.out
}

fn user_groups_and_directory() {
    let mut bundle = Bundle::new("id -u; id -g; id -G; pwd; umask; echo $HOME; echo $X");
    let process = &mut bundle.spec["process"];
    process["user"] = json!({"uid": 33, "gid": 44, "additionalGids": [55, 66], "umask": 0o027});
    process["cwd"] = "/made/for/it".into();
    process["env"] = json!(["PATH=/bin", "X=a=b"]);
    let out = output(&bundle);
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(
        lines,
        [
            "33",
            "44",
            "44 55 66",
            "/made/for/it",
            "0027",
            "/srv/web",
            "a=b"
        ],
        "{out}"
    );
}

fn capabilities_and_no_new_privileges() {
    let mut bundle = Bundle::new("grep -E '^(Cap|NoNew)' /proc/self/status");
    let process = &mut bundle.spec["process"];
    process["capabilities"] = json!({
        "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW"], "permitted": ["CAP_CHOWN", "CAP_KILL"],
        "effective": ["CAP_CHOWN"], "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"],
    });
    process["noNewPrivileges"] = false.into();
    process["user"] = json!({"uid": 5, "gid": 5});
    let out = output(&bundle);
    // CAP_CHOWN is 0, CAP_KILL 5, CAP_NET_RAW 13. After an execve as this user only the ambient one is left.
    for line in [
        "CapInh:\t0000000000000020",
        "CapPrm:\t0000000000000020",
        "CapEff:\t0000000000000020",
        "CapBnd:\t0000000000002021",
        "CapAmb:\t0000000000000020",
        "NoNewPrivs:\t0",
    ] {
        assert!(out.contains(line), "{line}: {out}");
    }
}

fn seccomp() {
    let mut bundle = Bundle::new("mkdir /tmp/x; echo $?; grep Seccomp: /proc/self/status");
    bundle.spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}],
    });
    let said = bundle.run();
    assert!(said.out.contains("1\nSeccomp:\t2"), "{said:?}");
    assert!(said.err.contains("No space left"), "{said:?}");
}

fn limits_on_resources() {
    let mut bundle = Bundle::new("ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj");
    let process = &mut bundle.spec["process"];
    process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 88}]);
    process["oomScoreAdj"] = 321.into();
    assert_eq!(output(&bundle), "77\n88\n321\n");
}

fn paths_that_are_masked_or_read_only() {
    let mut bundle = Bundle::new(
        "cat /secret; ls /hidden; touch /fixed/x; echo x > /proc/sys/kernel/hostname; touch /root/x || echo end",
    );
    fs::write(bundle.inside("secret"), "secret").unwrap();
    fs::create_dir_all(bundle.inside("hidden")).unwrap();
    fs::write(bundle.inside("hidden/x"), "").unwrap();
    fs::create_dir_all(bundle.inside("fixed")).unwrap();
    bundle.spec["linux"]["maskedPaths"] = json!(["/secret", "/hidden", "/not/there"]);
    bundle.spec["linux"]["readonlyPaths"] = json!(["/fixed", "/proc/sys", "/not/there"]);
    bundle.spec["root"]["readonly"] = true.into();
    let said = bundle.run();
    assert_eq!(said.out, "end\n", "{said:?}");
    assert_eq!(
        said.err.matches("Read-only file system").count(),
        3,
        "{said:?}"
    );
    assert!(!bundle.inside("fixed/x").exists() && !bundle.inside("root/x").exists());
}

fn mounts() {
    let mut bundle = Bundle::new(
        "cat /bound/file; touch /bound/new; cat /relative/file; grep ' /made/tmp ' /proc/mounts",
    );
    let source = bundle.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "text\n").unwrap();
    let mounts = bundle.spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/bound", "type": "bind", "source": source, "options": ["rbind", "ro"]}));
    // Of the bundle; and a destination as old specifications had them.
    mounts.push(json!({"destination": "relative", "source": "source", "options": ["bind"]}));
    mounts.push(
        json!({"destination": "/made/tmp", "type": "tmpfs", "options": ["size=1m", "noexec"]}),
    );
    let said = bundle.run();
    assert!(
        said.out.starts_with("text\ntext\ntmpfs /made/tmp tmpfs"),
        "{said:?}"
    );
    assert!(
        said.out.contains("noexec") && said.out.contains("size=1024k"),
        "{said:?}"
    );
    assert!(said.err.contains("Read-only"), "{said:?}");
}

fn a_tmpfs_that_begins_with_a_copy() {
    let mut bundle =
        Bundle::new("cat /etc/passwd | head -c 4; echo; touch /etc/new && echo writable");
    let mounts = bundle.spec["mounts"].as_array_mut().unwrap();
    let options = ["rw", "nosuid", "tmpcopyup"];
    mounts.push(
        json!({"destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": options}),
    );
    bundle.spec["root"]["readonly"] = true.into();
    assert_eq!(output(&bundle), "root\nwritable\n");
    assert!(!bundle.inside("etc/new").exists());
}

fn devices() {
    let mut bundle = Bundle::new(
        "stat -c '%n %a %u %g %t %T' /dev/mine /dev/null; head -c 1 /dev/mine > /dev/null && echo read; \
         mknod /dev/other c 1 8 && head -c 1 /dev/other > /dev/null && echo zero; mknod /dev/kmsg2 c 1 11 && head -c 1 /dev/kmsg2 > /dev/null || echo denied",
    );
    bundle.spec["process"]["capabilities"] =
        json!({"bounding": ["CAP_MKNOD"], "effective": ["CAP_MKNOD"], "permitted": ["CAP_MKNOD"]});
    bundle.spec["linux"]["devices"] = json!([
        {"path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 0, "gid": 7},
    ]);
    // Without any rule of the specification's: what is not allowed is denied.
    let out = bundle.run().out;
    assert!(out.contains("/dev/mine 640 0 7 1 5"), "{out}");
    assert!(out.contains("/dev/null 666 0 0 1 3"), "{out}");
    assert!(out.contains("read\n") && out.ends_with("denied\n"), "{out}");
}

fn namespaces_and_sysctls() {
    let mut bundle = Bundle::new(
        "hostname; cat /proc/sys/net/ipv4/ip_forward; ip addr show lo; readlink /proc/self/ns/uts",
    );
    bundle.spec["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1"});
    let out = output(&bundle);
    assert!(out.starts_with("inside\n1\n"), "{out}");
    assert!(out.contains("LOOPBACK,UP"), "{out}");
    let own = fs::read_link("/proc/self/ns/uts").unwrap();
    assert!(!out.contains(own.to_str().unwrap()), "{out}");
    // A namespace that is not listed is the caller's, one with a path is that one.
    let mut bundle = Bundle::new("readlink /proc/self/ns/uts; readlink /proc/self/ns/net");
    bundle.spec["hostname"] = serde_json::Value::Null;
    bundle.spec["linux"]["namespaces"] = json!([
        {"type": "mount"}, {"type": "pid"}, {"type": "network", "path": "/proc/self/ns/net"},
    ]);
    let net = fs::read_link("/proc/self/ns/net").unwrap();
    assert_eq!(
        output(&bundle),
        format!("{}\n{}\n", own.display(), net.display())
    );
}

/// As ip-netns(8), podman and CNI keep them: bound to a file.
fn a_namespace_that_is_bound_to_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("net");
    fs::write(&file, "").unwrap();
    let bind = "mount --bind /proc/self/ns/net \"$1\" && readlink /proc/self/ns/net";
    let mut command = std::process::Command::new("unshare");
    let made = command
        .args(["--net", "sh", "-c", bind, "sh"])
        .arg(&file)
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let mut bundle = Bundle::new("readlink /proc/self/ns/net");
    let namespaces = bundle.spec["linux"]["namespaces"].as_array_mut().unwrap();
    let network = namespaces
        .iter_mut()
        .find(|n| n["type"] == "network")
        .unwrap();
    network["path"] = file.to_str().unwrap().into();
    assert_eq!(output(&bundle), String::from_utf8(made.stdout).unwrap());
    // Another kind is another kind, also there.
    bundle.spec["linux"]["namespaces"][2]["path"] = file.to_str().unwrap().into();
    let path = bundle.path().to_str().unwrap();
    let error = bundle.refused(&["create", "-b", path, &bundle.id]);
    assert!(error.contains("no namespace of type ipc"), "{error}");
    let unmounted = std::process::Command::new("umount").arg(&file).status();
    assert!(unmounted.unwrap().success());
}

fn users(bundle: &mut Bundle) {
    let linux = &mut bundle.spec["linux"];
    linux["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "user"}));
    let ranges = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}, {"containerID": 1000, "hostID": 200_000, "size": 1}]);
    linux["uidMappings"] = ranges.clone();
    linux["gidMappings"] = ranges;
    // As an image for these users has it.
    let status = std::process::Command::new("chown")
        .args(["-R", "100000:100000"])
        .arg(bundle.inside(""))
        .status();
    assert!(status.unwrap().success());
}

fn a_user_namespace_of_its_own() {
    let mut bundle =
        Bundle::new("cat /proc/self/uid_map; id -u; touch /made; echo x > /dev/null && echo null");
    users(&mut bundle);
    let out = output(&bundle);
    let words: Vec<&str> = out.split_whitespace().collect();
    assert_eq!(
        words,
        ["0", "100000", "1000", "1000", "200000", "1", "0", "null"],
        "{out}"
    );
    assert_eq!(fs::metadata(bundle.inside("made")).unwrap().uid(), 100_000);
    bundle.nothing_left();
}

fn a_user_namespace_that_is_joined() {
    let mut first = Bundle::new("sleep 1000");
    users(&mut first);
    first.create_and_start();
    let own = first.done(&["exec", &first.id, "readlink", "/proc/self/ns/user"]);
    let said = first.oci(&[
        "exec",
        &first.id,
        "sh",
        "-c",
        "id -u; cat /proc/self/uid_map",
    ]);
    assert!(
        said.out.starts_with("0\n") && said.out.contains("200000"),
        "{said:?}"
    );
    let mut second = Bundle::new("readlink /proc/self/ns/user; touch /made");
    users(&mut second);
    let path = format!("/proc/{}/ns/user", first.state()["pid"]);
    let linux = &mut second.spec["linux"];
    for namespace in linux["namespaces"].as_array_mut().unwrap() {
        if namespace["type"] == "user" {
            namespace["path"] = path.clone().into();
        }
    }
    // The namespace knows its ids.
    linux["uidMappings"] = serde_json::Value::Null;
    linux["gidMappings"] = serde_json::Value::Null;
    assert_eq!(output(&second), own);
    assert_eq!(fs::metadata(second.inside("made")).unwrap().uid(), 100_000);
}

fn a_time_namespace_of_its_own() {
    for with_users in [false, true] {
        let mut bundle = Bundle::new("cat /proc/self/timens_offsets");
        if with_users {
            users(&mut bundle);
        }
        let linux = &mut bundle.spec["linux"];
        linux["namespaces"]
            .as_array_mut()
            .unwrap()
            .push(json!({"type": "time"}));
        linux["timeOffsets"] =
            json!({"boottime": {"secs": 4711}, "monotonic": {"secs": 815, "nanosecs": 7}});
        let out = output(&bundle);
        let words: Vec<&str> = out.split_whitespace().collect();
        assert_eq!(
            words,
            ["monotonic", "815", "7", "boottime", "4711", "0"],
            "{with_users}: {out}"
        );
        bundle.nothing_left();
    }
}

const LOOK: &str = "readlink /proc/self/ns/mnt; cat /etc/passwd; touch /dev/pts/../made && ls /dev/made; cat /secret";

/// A container without a mount namespace of its own, which waits.
fn sharing(path: Option<&str>) -> Bundle {
    let mut bundle = Bundle::new(&format!("{{ {LOOK}; }} >/said; sleep 1000"));
    fs::write(bundle.inside("secret"), "secret").unwrap();
    bundle.spec["linux"]["maskedPaths"] = json!(["/secret"]);
    let mut namespaces = vec![json!({"type": "pid"}), json!({"type": "uts"})];
    namespaces.extend(path.map(|path| json!({"type": "mount", "path": path})));
    bundle.spec["linux"]["namespaces"] = namespaces.into();
    bundle
}

fn mounts_of(process: &str) -> String {
    fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap()
}

/// What such a container sees, and an exec in it.
#[track_caller]
fn looks_at_its_root(bundle: &Bundle, namespace: &str) {
    let said = || fs::read_to_string(bundle.inside("said")).unwrap_or_default();
    crate::bundle::until(
        || said().ends_with("/dev/made\n"),
        "the container looks around",
    );
    assert!(said().starts_with(namespace), "{}", said());
    assert!(
        said().contains("/srv/web") && !said().contains("secret"),
        "{}",
        said()
    );
    assert_eq!(bundle.done(&["exec", &bundle.id, "sh", "-c", LOOK]), said());
    // The tree was complete when it came: devices are in a file system that is only there.
    assert!(!bundle.inside("dev/made").exists() || namespace == own_namespace());
}

fn own_namespace() -> String {
    let link = fs::read_link("/proc/self/ns/mnt").unwrap();
    link.to_str().unwrap().to_owned()
}

fn the_callers_mount_namespace() {
    let before = mounts_of("self");
    let bundle = sharing(None);
    bundle.create_and_start();
    looks_at_its_root(&bundle, &own_namespace());
    // Others see it there, and their own mounts are as they were.
    let now = mounts_of("self");
    let rootfs = bundle.inside("");
    let rootfs = rootfs.to_str().unwrap().trim_end_matches('/').to_owned();
    assert!(
        now.contains(&format!(" {rootfs} ")) && now.contains(&format!(" {rootfs}/proc ")),
        "{now}"
    );
    let others = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|l| !l.contains(&rootfs));
        lines.map(str::to_owned).collect()
    };
    assert_eq!(others(&now), others(&before));
    bundle.done(&["delete", "--force", &bundle.id]);
    assert_eq!(mounts_of("self"), before);
    bundle.nothing_left();
    // A create that fails late leaves nothing, either.
    let mut bundle = sharing(None);
    bundle.spec["process"]["args"] = json!(["/no/where"]);
    let path = bundle.path().to_str().unwrap();
    bundle.refused(&["create", "-b", path, &bundle.id]);
    assert_eq!(mounts_of("self"), before);
    bundle.nothing_left();
}

fn a_mount_namespace_that_is_joined() {
    let mut other = std::process::Command::new("unshare");
    let mut other = other
        .args(["--mount", "--propagation", "private", "sleep", "1000"])
        .spawn()
        .unwrap();
    let path = format!("/proc/{}/ns/mnt", other.id());
    let link = || fs::read_link(&path).unwrap().to_str().unwrap().to_owned();
    crate::bundle::until(|| link() != own_namespace(), "unshare(1) makes a namespace");
    let (before, theirs) = (mounts_of("self"), mounts_of(&other.id().to_string()));
    let bundle = sharing(Some(&path));
    bundle.create_and_start();
    looks_at_its_root(&bundle, &link());
    assert_eq!(mounts_of("self"), before);
    assert_ne!(mounts_of(&other.id().to_string()), theirs);
    bundle.done(&["delete", "--force", &bundle.id]);
    assert_eq!(mounts_of(&other.id().to_string()), theirs);
    bundle.nothing_left();
    // A namespace that has gone takes the container's root along.
    let bundle = sharing(Some(&path));
    bundle.create_and_start();
    bundle.done(&["kill", &bundle.id, "KILL"]);
    bundle.wait_for("stopped");
    other.kill().unwrap();
    other.wait().unwrap();
    bundle.done(&["delete", &bundle.id]);
    bundle.nothing_left();
}
