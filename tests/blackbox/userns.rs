//! Pods in user namespaces (KEP-127): ids, owners of everything that a container sees, sessions, restarts.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use nix::mount::MsFlags;
use nix::sys::signal::Signal;
use tonic::Code;

use crate::harness::*;

tests![
    ids,
    mappings_that_are_refused,
    containers_have_the_pods_namespace,
    the_namespaces_belong_to_the_pod,
    owners_of_what_a_container_sees,
    the_root_file_system_is_not_chowned,
    volumes,
    images_as_volumes,
    volumes_of_other_mappings,
    a_file_system_without_idmapped_mounts,
    users_and_groups,
    sessions_are_as_confined,
    capabilities_end_at_the_namespace,
    setuid_and_no_new_privs,
    a_shared_pid_namespace,
    the_network_of_the_node,
    sysctls_of_the_pod,
    devices_are_bound,
    privileged_containers,
    a_working_directory_and_a_read_only_root,
    volumes_of_the_image,
    over_a_restart,
    a_keeper_that_died,
    mount_options,
    what_the_status_says,
];

const HOST_ID: u32 = 131_072;
const LENGTH: u32 = 65_536;

fn ids_at(host_id: u32) -> cri::IdMapping {
    cri::IdMapping {
        host_id,
        container_id: 0,
        length: LENGTH,
    }
}

fn namespace(uids: &[cri::IdMapping], gids: &[cri::IdMapping]) -> cri::UserNamespace {
    cri::UserNamespace {
        mode: cri::NamespaceMode::Pod.into(),
        uids: uids.to_vec(),
        gids: gids.to_vec(),
    }
}

fn options(config: &mut cri::PodSandboxConfig) -> &mut cri::NamespaceOption {
    pod_security(config)
        .namespace_options
        .get_or_insert_default()
}

/// Puts a pod into a user namespace, with a network of its own.
pub fn mapped(config: &mut cri::PodSandboxConfig) {
    config::own_network(config);
    let ids = [ids_at(HOST_ID)];
    options(config).userns_options = Some(namespace(&ids, &ids));
}

/// Whether pods of a handler can have user namespaces; the empty name is the default's, which this run's pods have.
async fn told(daemon: &Daemon, name: &str) -> Result<bool> {
    let request = cri::StatusRequest::default();
    let status = daemon.runtime().status(request).await?.into_inner();
    let able = |h: &cri::RuntimeHandler| h.features.is_some_and(|f| f.user_namespaces);
    let mut all = status.runtime_handlers.iter();
    Ok(all.any(|h| h.name == name && able(h)))
}

/// Handlers that have none, whatever the machine has.
fn never() -> bool {
    ["shim-runc", "runsc"].contains(&handler())
}

/// Waits until this run's handler is known to have user namespaces: its program is asked while the daemon starts, and
/// once more should it have been too slow.
async fn known(daemon: &Daemon) -> Result<()> {
    eventually("user namespaces of the handler", seconds(20), || async {
        Ok(told(daemon, "").await?.then_some(()))
    })
    .await
}

/// A daemon on a machine that has user namespaces.
pub async fn daemon(env: &Env) -> Result<Daemon> {
    if never() {
        return skip(format!("under handler {}: no user namespaces", handler()));
    }
    let daemon = env.daemon().await?;
    if !told(&daemon, "native").await? {
        return skip("no user namespaces or no idmapped mounts here; see slipway check");
    }
    known(&daemon).await?;
    Ok(daemon)
}

/// The user namespace of a container's first process.
async fn of_init(container: &Container) -> Result<String> {
    container
        .exec_output(&["readlink", "/proc/1/ns/user"])
        .await
}

fn bind(host: &Path, container: &str) -> cri::Mount {
    cri::Mount {
        host_path: host.display().to_string(),
        container_path: container.into(),
        ..Default::default()
    }
}

fn bind_mapped(host: &Path, container: &str, host_id: u32) -> cri::Mount {
    cri::Mount {
        uid_mappings: vec![ids_at(host_id)],
        gid_mappings: vec![ids_at(host_id)],
        ..bind(host, container)
    }
}

async fn ids(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    // Users and groups need not be the same ones.
    let own = |c: &mut cri::PodSandboxConfig| {
        mapped(c);
        options(c).userns_options = Some(namespace(&[ids_at(HOST_ID)], &[ids_at(300_000)]));
    };
    let container = daemon.pod(own).await?.sleeper().await?;
    for (file, host_id) in [("uid_map", "131072"), ("gid_map", "300000")] {
        let map = container
            .exec_output(&["cat", &format!("/proc/self/{file}")])
            .await?;
        let map: Vec<_> = map.split_whitespace().collect();
        assert_eq!(map, ["0", host_id, "65536"]);
    }
    let id = container.exec_output(&["id"]).await?;
    assert_eq!(id, "uid=0(root) gid=0(root) groups=0(root)");
    // The creator, which is the host's root, may still be about to end.
    eventually("the init's owner", seconds(10), || async {
        let init = std::fs::metadata(format!("/proc/{}", container.pid()?))?;
        Ok(((init.uid(), init.gid()) == (HOST_ID, 300_000)).then_some(()))
    })
    .await?;
    Ok(())
}

async fn mappings_that_are_refused(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let good = ids_at(HOST_ID);
    let with = |change: fn(&mut cri::IdMapping)| {
        let mut ids = good;
        change(&mut ids);
        vec![ids]
    };
    let many: Vec<_> = (0..400)
        .map(|n| cri::IdMapping {
            container_id: n,
            host_id: HOST_ID + n,
            length: 1,
        })
        .collect();
    for (what, uids, gids) in [
        ("none", vec![], vec![good]),
        ("two", vec![good, ids_at(300_000)], vec![good]),
        ("more than the kernel takes", vec![good], many),
        ("no root", with(|m| m.container_id = 1), vec![good]),
        ("nothing", vec![good], with(|m| m.length = 0)),
        ("the host's root", with(|m| m.host_id = 0), vec![good]),
        ("beyond the end", vec![good], with(|m| m.length = u32::MAX)),
    ] {
        let mut config = config::pod(&daemon);
        options(&mut config).userns_options = Some(namespace(&uids, &gids));
        let answer = daemon.run_pod(config).await.map(|p| p.id);
        refused(answer, Code::InvalidArgument, &["userns_options"]);
        assert_eq!(daemon.pod_dirs(), Vec::<String>::new(), "{what}");
    }
    for mode in [cri::NamespaceMode::Container, cri::NamespaceMode::Target] {
        let mut config = config::pod(&daemon);
        options(&mut config).userns_options = Some(cri::UserNamespace {
            mode: mode.into(),
            ..Default::default()
        });
        let answer = daemon.run_pod(config).await.map(|p| p.id);
        refused(
            answer,
            Code::InvalidArgument,
            &["userns_options", mode.as_str_name()],
        );
    }
    let mut config = config::pod(&daemon);
    options(&mut config).userns_options = Some(cri::UserNamespace {
        mode: cri::NamespaceMode::Node.into(),
        uids: vec![good],
        gids: vec![good],
    });
    let answer = daemon.run_pod(config).await.map(|p| p.id);
    refused(answer, Code::InvalidArgument, &["userns_options", "NODE"]);
    for change in [
        (|o| o.pid = cri::NamespaceMode::Node.into()) as fn(&mut cri::NamespaceOption),
        |o| o.ipc = cri::NamespaceMode::Node.into(),
    ] {
        let mut config = config::pod(&daemon);
        mapped(&mut config);
        change(options(&mut config));
        let answer = daemon.run_pod(config).await.map(|p| p.id);
        refused(answer, Code::InvalidArgument, &["NODE", "user namespace"]);
    }
    Ok(())
}

async fn containers_have_the_pods_namespace(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = daemon.pod(mapped).await?;
    let without = |c: &mut cri::ContainerConfig| {
        let options = container_security(c).namespace_options.as_mut();
        options.unwrap().userns_options = None;
    };
    let (one, two) = (
        pod.sleeper().await?,
        pod.run(&["sleep", "1000"], without).await?,
    );
    let theirs = of_init(&one).await?;
    assert_eq!(theirs, of_init(&two).await?);
    let own = std::fs::read_link("/proc/self/ns/user")?;
    assert_ne!(theirs, own.display().to_string());
    for other in [
        namespace(&[ids_at(300_000)], &[ids_at(300_000)]),
        cri::UserNamespace {
            mode: cri::NamespaceMode::Node.into(),
            ..Default::default()
        },
    ] {
        let change = |c: &mut cri::ContainerConfig| {
            let options = container_security(c).namespace_options.as_mut();
            options.unwrap().userns_options = Some(other);
        };
        let answer = pod.try_create(change).await;
        refused(answer, Code::InvalidArgument, &["userns_options"]);
    }
    Ok(())
}

async fn the_namespaces_belong_to_the_pod(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = daemon.pod(mapped).await?;
    let able = |c: &mut cri::ContainerConfig| {
        container_security(c).capabilities = Some(cri::Capability {
            add_capabilities: vec!["SYS_ADMIN".into(), "NET_ADMIN".into()],
            ..Default::default()
        });
        let unconfined = Some(cri::SecurityProfile {
            profile_type: cri::security_profile::ProfileType::Unconfined.into(),
            ..Default::default()
        });
        // AppArmor's default profile has no mounts, whoever owns the namespace.
        container_security(c).apparmor.clone_from(&unconfined);
        container_security(c).seccomp = unconfined;
    };
    let container = pod.run(&["sleep", "1000"], able).await?;
    for script in [
        "hostname changed && [ $(hostname) = changed ]",
        "ip link set lo down && ip link set lo up",
        "mkdir -p /tmp/q && mount -t mqueue q /tmp/q && touch /tmp/q/x",
        "mkdir -p /tmp/p && mount -t proc p /tmp/p && ls /tmp/p/self >/dev/null",
        "mkdir -p /tmp/t && mount -t tmpfs t /tmp/t && touch /tmp/t/x",
    ] {
        let exec = container.exec(&["sh", "-c", script]).await?;
        assert_eq!(exec.code, 0, "{script}: {exec:?}");
    }
    let text = container
        .exec_output(&["ip", "addr", "show", "eth0"])
        .await?;
    let told = pod.status().await?.network.context("a network")?.ip;
    assert!(text.contains(&format!(" {told}/")), "{told}: {text}");
    Ok(())
}

async fn owners_of_what_a_container_sees(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = daemon.pod(mapped).await?;
    let container = pod
        .run(
            &["sh", "-c", "echo out; echo err >&2; exec sleep 1000"],
            |_| {},
        )
        .await?;
    container.says("out").await?;
    let places = [
        "/",
        "/etc",
        "/bin/sh",
        "/proc/1",
        "/sys/class/net/lo/ifalias",
        "/dev",
        "/dev/shm",
        "/dev/mqueue",
        "/dev/pts",
        "/etc/hosts",
        "/etc/hostname",
        "/etc/resolv.conf",
        "/proc/sys/net/ipv4/ip_forward",
        "/proc/self/fd/1",
    ];
    for place in places {
        let owner = container
            .exec_output(&["stat", "-L", "-c", "%u:%g", place])
            .await?;
        assert_eq!(owner, "0:0", "{place}");
    }
    // The multiplexer's terminals belong to their user and to group tty.
    let terminal = "stat -c %g /dev/pts/ptmx; cat /etc/hostname /etc/resolv.conf /etc/hosts >/dev/null && \
                    echo '#' >>/etc/hosts && touch /dev/shm/x && echo x >/dev/null && echo fine";
    assert_eq!(
        container.exec_output(&["sh", "-c", terminal]).await?,
        "0\nfine"
    );
    let gid = |o: &str| o.split(',').any(|o| o == format!("gid={}", HOST_ID + 5));
    let mounts = container.exec_output(&["cat", "/proc/mounts"]).await?;
    let pts = mounts
        .lines()
        .find(|l| l.contains(" /dev/pts "))
        .context("devpts")?;
    assert!(pts.split_whitespace().any(gid), "{pts}");
    // Another user's standard streams are its own, of init and of sessions.
    let user = |c: &mut cri::ContainerConfig| {
        container_security(c).run_as_user = Some(cri::Int64Value { value: 1000 });
    };
    let script = "echo to >/dev/stdout && exec sleep 1000";
    let other = pod.run(&["sh", "-c", script], user).await?;
    other.says("to").await?;
    let exec = other
        .exec(&["sh", "-c", "echo to >/dev/stdout && echo fro >/dev/stderr"])
        .await?;
    assert_eq!(
        (exec.stdout.as_str(), exec.stderr.as_str()),
        ("to\n", "fro\n")
    );
    // Masked and read-only paths are so for the namespace's root, too.
    for script in [
        "[ -z \"$(cat /proc/kcore)\" ]",
        "! echo 1 >/proc/sys/net/ipv4/ip_forward",
        "! touch /sys/x",
    ] {
        assert_eq!(
            container.exec(&["sh", "-c", script]).await?.code,
            0,
            "{script}"
        );
    }
    Ok(())
}

async fn the_root_file_system_is_not_chowned(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let plain = daemon.pod(|_| {}).await?.sleeper().await?;
    let container = daemon.pod(mapped).await?.sleeper().await?;
    let script =
        "stat -c %u /bin/sh; echo x >/made; chown 5:6 /made; stat -c %u:%g /made; rm /etc/passwd";
    assert_eq!(
        container.exec_output(&["sh", "-c", script]).await?,
        "0\n5:6"
    );
    // The image's files are what they were, for others of the same layers.
    let seen = plain
        .exec_output(&["sh", "-c", "stat -c %u:%g /bin/sh /etc/passwd"])
        .await?;
    assert_eq!(seen, "0:0\n0:0");
    let root = format!("/proc/{}/root", container.pid()?);
    let owner =
        |name: &str| std::fs::metadata(format!("{root}/{name}")).map(|m| (m.uid(), m.gid()));
    assert_eq!(owner("made")?, (HOST_ID + 5, HOST_ID + 6));
    assert_eq!(
        (owner("")?, owner("bin/sh")?),
        ((HOST_ID, HOST_ID), (HOST_ID, HOST_ID))
    );
    Ok(())
}

async fn volumes(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let dir = env.dir("volume")?;
    std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o755))?;
    std::fs::write(dir.join("root's"), "r\n")?;
    std::fs::write(dir.join("user's"), "u\n")?;
    chown(dir.join("user's"), Some(1000), Some(1001))?;
    std::fs::set_permissions(dir.join("root's"), PermissionsExt::from_mode(0o600))?;
    let _below = Tmpfs::new(dir.join("below"), MsFlags::MS_PRIVATE)?;
    std::fs::write(dir.join("below/deep"), "d\n")?;
    let pod = daemon.pod(mapped).await?;
    let mounts = vec![
        bind_mapped(&dir, "/mapped", HOST_ID),
        bind(&dir, "/plain"),
        bind_mapped(&dir.join("user's"), "/single", HOST_ID),
        cri::Mount {
            readonly: true,
            ..bind_mapped(&dir, "/fixed", HOST_ID)
        },
        cri::Mount {
            readonly: true,
            recursive_read_only: true,
            ..bind_mapped(&dir, "/fixed-all", HOST_ID)
        },
    ];
    let container = pod.run(&["sleep", "1000"], |c| c.mounts = mounts).await?;
    let owners = |place: &str| {
        let script = format!("cd {place} && stat -c %u:%g . \"root's\" \"user's\" below/deep");
        let container = container.clone();
        async move { container.exec_output(&["sh", "-c", &script]).await }
    };
    assert_eq!(owners("/mapped").await?, "0:0\n0:0\n1000:1001\n0:0");
    let nobody = "65534:65534";
    assert_eq!(owners("/plain").await?, [nobody; 4].join("\n"));
    assert_eq!(
        container
            .exec_output(&["stat", "-c", "%u:%g", "/single"])
            .await?,
        "1000:1001"
    );
    let script = "cat \"/mapped/root's\" && echo n >/mapped/new && chown 7:8 /mapped/new && echo d >/mapped/below/new";
    assert_eq!(container.exec_output(&["sh", "-c", script]).await?, "r");
    // On the volume it is the container's ids that count, whatever the namespace is.
    let owner = |name: &str| std::fs::metadata(dir.join(name)).map(|m| (m.uid(), m.gid()));
    assert_eq!((owner("new")?, owner("below/new")?), ((7, 8), (0, 0)));
    for script in [
        "touch /plain/x",
        "cat \"/plain/root's\"",
        "touch /fixed/x",
        "touch /fixed-all/below/x",
    ] {
        assert_ne!(
            container.exec(&["sh", "-c", script]).await?.code,
            0,
            "{script}"
        );
    }
    Ok(())
}

async fn images_as_volumes(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    daemon.pull("schema2").await?;
    let pod = daemon.pod(mapped).await?;
    // The container's own image, whose layers are mapped already; another one; the same once more, in part.
    let volumes = [
        ("/own", "test", ""),
        ("/other", "schema2", ""),
        ("/part", "schema2", "etc"),
    ];
    let container = pod
        .run(&["sleep", "1000"], |c| {
            let mount = |(place, name, sub_path): (&str, &str, &str)| cri::Mount {
                container_path: place.into(),
                readonly: true,
                image: config::of_image(name),
                image_sub_path: sub_path.into(),
                uid_mappings: vec![ids_at(HOST_ID)],
                gid_mappings: vec![ids_at(HOST_ID)],
                ..Default::default()
            };
            c.mounts = volumes.map(mount).to_vec();
        })
        .await?;
    for file in [
        "/own/etc/probe-image",
        "/other/etc/probe-image",
        "/part/probe-image",
    ] {
        let owner = container
            .exec_output(&["stat", "-c", "%u:%g", file])
            .await?;
        assert_eq!(owner, "0:0", "{file}");
        let touched = container.exec(&["touch", file]).await?;
        assert!(
            touched.stderr.contains("Read-only file system"),
            "{touched:?}"
        );
    }
    Ok(())
}

async fn volumes_of_other_mappings(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let dir = env.dir("volume")?;
    std::fs::write(dir.join("file"), "")?;
    // In a pod without a user namespace: root's files are those of 131072 in there.
    let plain = daemon.pod(|_| {}).await?;
    let mounts = vec![bind_mapped(&dir, "/data", HOST_ID)];
    let text = plain
        .output(&["stat", "-c", "%u", "/data/file"], |c| c.mounts = mounts)
        .await?;
    assert_eq!(text, "131072\n");
    // And in one whose own are others.
    let pod = daemon.pod(mapped).await?;
    let mounts = vec![bind_mapped(&dir, "/data", HOST_ID + 10)];
    let text = pod
        .output(&["stat", "-c", "%u", "/data/file"], |c| c.mounts = mounts)
        .await?;
    assert_eq!(text, "10\n");
    let mut bad = bind_mapped(&dir, "/data", HOST_ID);
    bad.gid_mappings.clear();
    let answer = pod.try_create(|c| c.mounts = vec![bad]).await;
    refused(answer, Code::InvalidArgument, &["mounts[0].gidMappings"]);
    Ok(())
}

async fn a_file_system_without_idmapped_mounts(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = daemon.pod(mapped).await?;
    let mount = bind_mapped(Path::new("/sys/kernel"), "/data", HOST_ID);
    let status = pod
        .try_create(|c| c.mounts = vec![mount])
        .await
        .expect_err("sysfs has no idmapped mounts");
    for word in ["/sys/kernel", "/data", "sysfs", "idmapped mounts"] {
        assert!(status.message().contains(word), "{word}: {status}");
    }
    assert_eq!(status.code(), Code::Unimplemented);
    // Nothing is left of it, and the pod is none the worse.
    let list = daemon
        .runtime()
        .list_containers(cri::ListContainersRequest::default())
        .await?
        .into_inner();
    assert_eq!(list.containers.len(), 0);
    pod.sleeper().await?;
    Ok(())
}

async fn users_and_groups(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = daemon.pod(mapped).await?;
    let who = |uid: i64, gid: i64, more: &[i64]| {
        let more = more.to_vec();
        move |c: &mut cri::ContainerConfig| {
            let security = container_security(c);
            security.run_as_user = Some(cri::Int64Value { value: uid });
            security.run_as_group = Some(cri::Int64Value { value: gid });
            security.supplemental_groups = more;
        }
    };
    for report in pod.probes(who(1000, 1001, &[4000, 65_535])).await? {
        assert_eq!(report.numbers("ids"), [1000, 1000, 1001, 1001]);
        assert_eq!(report.groups(), [1001, 4000, 65_535]);
    }
    for (change, text) in [
        (who(70_000, 0, &[]), "user 70000"),
        (who(0, 65_536, &[]), "group 65536"),
        (who(0, 0, &[3, 100_000]), "group 100000"),
    ] {
        let answer = pod.try_create(change).await;
        refused(answer, Code::InvalidArgument, &[text, "user namespace"]);
    }
    Ok(())
}

async fn sessions_are_as_confined(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let [init, exec] = daemon.pod(mapped).await?.probes(|_| {}).await?;
    for key in [
        "ids",
        "Groups",
        "CapEff",
        "CapBnd",
        "CapPrm",
        "CapInh",
        "CapAmb",
        "Seccomp",
        "NoNewPrivs",
    ] {
        assert_eq!(init.get(key), exec.get(key), "{key}");
    }
    for kind in ["user", "mnt", "net", "ipc", "uts", "pid"] {
        let key = format!("ns.{kind}");
        assert_eq!(init.get(&key), exec.get(&key), "{key}");
    }
    assert_eq!(init.get("Seccomp"), "2");
    Ok(())
}

async fn capabilities_end_at_the_namespace(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let dir = env.dir("hosts")?;
    std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o700))?;
    std::fs::write(dir.join("secret"), "s")?;
    let all = |c: &mut cri::ContainerConfig| {
        c.mounts = vec![bind(&dir, "/hosts")];
        container_security(c).capabilities = Some(cri::Capability {
            add_capabilities: vec!["ALL".into()],
            ..Default::default()
        });
        container_security(c).seccomp = Some(cri::SecurityProfile {
            profile_type: cri::security_profile::ProfileType::Unconfined.into(),
            ..Default::default()
        });
    };
    let container = daemon
        .pod(mapped)
        .await?
        .run(&["sleep", "1000"], all)
        .await?;
    for script in [
        "cat /hosts/secret",
        "touch /hosts/new",
        "mknod /tmp/node b 8 0",
        "echo 1 >/proc/sys/kernel/panic",
        "mount -o remount,bind,exec,dev /dev/mqueue && false",
        "chown 70000 /tmp",
    ] {
        let exec = container.exec(&["sh", "-c", script]).await?;
        assert_ne!(exec.code, 0, "{script}: {exec:?}");
    }
    Ok(())
}

async fn setuid_and_no_new_privs(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = daemon.pod(mapped).await?;
    let dir = env.dir("volume")?;
    let first = pod.sleeper().await?;
    let program = format!("/proc/{}/root/bin/probe", first.pid()?);
    std::fs::copy(program, dir.join("probe"))?;
    std::fs::set_permissions(dir.join("probe"), PermissionsExt::from_mode(0o4755))?;
    for (no_new_privs, euid) in [(false, 0), (true, 1000)] {
        let change = |c: &mut cri::ContainerConfig| {
            c.mounts = vec![bind_mapped(&dir, "/data", HOST_ID)];
            let security = container_security(c);
            security.no_new_privs = no_new_privs;
            security.run_as_user = Some(cri::Int64Value { value: 1000 });
        };
        let container = pod.run(&["sleep", "1000"], change).await?;
        let report = container.exec_output(&["/data/probe", "status"]).await?;
        let report = probe::Report::new(&report);
        let ids = report.numbers("ids");
        assert_eq!(ids[..2], [1000, euid], "no_new_privs={no_new_privs}");
    }
    Ok(())
}

async fn a_shared_pid_namespace(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let shared = |c: &mut cri::PodSandboxConfig| {
        mapped(c);
        options(c).pid = cri::NamespaceMode::Pod.into();
    };
    let pod = daemon.pod(shared).await?;
    let (one, two) = (pod.sleeper().await?, pod.sleeper().await?);
    let text = one.exec_output(&["ps", "-o", "pid,comm"]).await?;
    assert!(text.contains("1 slipway-init"), "{text}");
    assert_eq!(text.matches("sleep").count(), 2, "{text}");
    // An orphan is reaped by the init.
    one.exec_output(&["sh", "-c", "(sleep 0.1 &) ; true"])
        .await?;
    eventually("no zombie", seconds(10), || async {
        let text = two.exec_output(&["ps", "-o", "stat,comm"]).await?;
        Ok((!text.contains('Z')).then_some(()))
    })
    .await?;
    // One more joins another's.
    let target = |c: &mut cri::ContainerConfig| {
        let options = container_security(c).namespace_options.as_mut().unwrap();
        options.pid = cri::NamespaceMode::Target.into();
        options.target_id = one.id.clone();
    };
    let third = pod.run(&["sleep", "1000"], target).await?;
    assert!(
        third
            .exec_output(&["ps", "-o", "comm"])
            .await?
            .contains("slipway-init")
    );
    pod.stop().await?;
    pod.remove().await?;
    Ok(())
}

async fn the_network_of_the_node(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let node = |c: &mut cri::PodSandboxConfig| {
        let ids = [ids_at(HOST_ID)];
        options(c).userns_options = Some(namespace(&ids, &ids));
    };
    let container = daemon.pod(node).await?.sleeper().await?;
    let own = std::fs::read_link("/proc/self/ns/net")?;
    let link = std::fs::read_link(format!("/proc/{}/ns/net", container.pid()?))?;
    assert_eq!(link, own);
    let script = "ls /sys/class/net/lo >/dev/null && ls /sys/fs/cgroup >/dev/null && \
                  ! touch /sys/x 2>/dev/null && ! hostname x 2>/dev/null && ! ip link set lo down 2>/dev/null && \
                  ! ls /sys/kernel/debug/* 2>/dev/null && echo fine";
    assert_eq!(container.exec_output(&["sh", "-c", script]).await?, "fine");
    let mounts = container.exec_output(&["cat", "/proc/mounts"]).await?;
    let sys = mounts
        .lines()
        .find(|l| l.contains(" /sys "))
        .context("/sys")?;
    assert!(sys.contains("ro,"), "{sys}");
    Ok(())
}

async fn sysctls_of_the_pod(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let before = read("/proc/sys/kernel/msgmax")?;
    let own = |c: &mut cri::PodSandboxConfig| {
        mapped(c);
        let pairs = [
            ("net.ipv4.ip_local_port_range", "40000 50000"),
            ("net.ipv4.ping_group_range", "0 100"),
            ("kernel.shm_rmid_forced", "1"),
            ("kernel.msgmax", "9000"),
            ("fs.mqueue.queues_max", "200"),
        ];
        c.linux.get_or_insert_default().sysctls =
            pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    };
    let text = daemon
        .pod(own)
        .await?
        .output(&["sh", "-c", "cd /proc/sys; cat net/ipv4/ip_local_port_range net/ipv4/ping_group_range kernel/shm_rmid_forced kernel/msgmax fs/mqueue/queues_max"], |_| {})
        .await?;
    let words: Vec<&str> = text.split_whitespace().collect();
    assert_eq!(words, ["40000", "50000", "0", "100", "1", "9000", "200"]);
    assert_eq!(read("/proc/sys/kernel/msgmax")?, before);
    // A group that the namespace has not.
    let bad = |c: &mut cri::PodSandboxConfig| {
        mapped(c);
        let sysctl = (
            "net.ipv4.ping_group_range".to_owned(),
            "0 2147483647".to_owned(),
        );
        c.linux.get_or_insert_default().sysctls = [sysctl].into();
    };
    let mut config = config::pod(&daemon);
    bad(&mut config);
    let before = daemon.pod_dirs();
    let answer = daemon.run_pod(config).await.map(|p| p.id);
    refused(
        answer,
        Code::InvalidArgument,
        &["net.ipv4.ping_group_range"],
    );
    assert_eq!(daemon.pod_dirs(), before);
    Ok(())
}

async fn devices_are_bound(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = daemon.pod(mapped).await?;
    let devices = vec![cri::Device {
        container_path: "/dev/nothing".into(),
        host_path: "/dev/null".into(),
        permissions: "rw".into(),
    }];
    let container = pod.run(&["sleep", "1000"], |c| c.devices = devices).await?;
    let script = "echo x >/dev/nothing && echo x >/dev/null && head -c 1 /dev/zero >/dev/full; \
                  stat -c %t:%T /dev/nothing";
    assert_eq!(container.exec_output(&["sh", "-c", script]).await?, "1:3");
    Ok(())
}

async fn privileged_containers(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let allowed = |c: &mut cri::PodSandboxConfig| {
        mapped(c);
        pod_security(c).privileged = true;
    };
    let privileged = |c: &mut cri::ContainerConfig| container_security(c).privileged = true;
    let container = daemon
        .pod(allowed)
        .await?
        .run(&["sleep", "1000"], privileged)
        .await?;
    let map = container
        .exec_output(&["cat", "/proc/self/uid_map"])
        .await?;
    assert!(map.contains("131072"), "{map}");
    // All of its pod, and nothing of the host.
    let script = "mkdir -p /tmp/t && mount -t tmpfs t /tmp/t && ip link add dummy0 type dummy; \
                  ! dd if=/dev/mem of=/dev/null bs=1 count=1 2>/dev/null && \
                  ! echo 1 >/proc/sys/kernel/panic 2>/dev/null && echo fine";
    assert_eq!(container.exec_output(&["sh", "-c", script]).await?, "fine");
    Ok(())
}

async fn a_working_directory_and_a_read_only_root(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = daemon.pod(mapped).await?;
    let dir = env.dir("volume")?;
    let change = |c: &mut cri::ContainerConfig| {
        c.working_dir = "/code/src".into();
        container_security(c).readonly_rootfs = true;
        c.mounts = vec![bind_mapped(&dir, "/code", HOST_ID)];
    };
    let script = "pwd; stat -c %u .; touch x && ! touch /x 2>/dev/null && echo fine";
    let text = pod.output(&["sh", "-c", script], change).await?;
    assert_eq!(text, "/code/src\n0\nfine\n");
    assert_eq!(std::fs::metadata(dir.join("src/x"))?.uid(), 0);
    let made = pod
        .output(&["stat", "-c", "%u", "."], |c| {
            c.working_dir = "/some/where".into()
        })
        .await?;
    assert_eq!(made, "0\n");
    Ok(())
}

async fn volumes_of_the_image(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    daemon.pull("volumes").await?;
    let pod = daemon.pod(mapped).await?;
    let script = "set -e; stat -c %u:%g /data /data/store /cache; echo x >/data/store/x; echo y >>/mail/group; \
                  ! touch /x 2>/dev/null && echo fine";
    let said = pod
        .output(&["sh", "-c", script], |c| {
            c.image = config::of_image("volumes");
            container_security(c).readonly_rootfs = true;
        })
        .await?;
    assert_eq!(said, "0:0\n0:0\n0:0\nfine\n");
    Ok(())
}

async fn over_a_restart(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let pod = daemon.pod(mapped).await?;
    let container = pod.sleeper().await?;
    daemon.kill(Signal::SIGKILL).await?;
    daemon.launch().await?;
    let map = container
        .exec_output(&["cat", "/proc/self/uid_map"])
        .await?;
    assert!(map.contains("131072"), "{map}");
    // A container that the next daemon makes is in the same namespace.
    let another = pod.sleeper().await?;
    assert_eq!(of_init(&container).await?, of_init(&another).await?);
    let request = cri::UpdateContainerResourcesRequest {
        container_id: another.id.clone(),
        linux: Some(cri::LinuxContainerResources {
            memory_limit_in_bytes: 64 << 20,
            ..Default::default()
        }),
        ..Default::default()
    };
    daemon.runtime().update_container_resources(request).await?;
    let request = cri::ContainerStatsRequest {
        container_id: another.id.clone(),
    };
    let stats = daemon
        .runtime()
        .container_stats(request)
        .await?
        .into_inner();
    assert!(stats.stats.and_then(|s| s.cpu).is_some());
    container.stop(0).await?;
    container.remove().await?;
    Ok(())
}

async fn a_keeper_that_died(env: Env) -> Result<()> {
    let daemon = daemon(&env).await?;
    let shared = |c: &mut cri::PodSandboxConfig| {
        mapped(c);
        options(c).pid = cri::NamespaceMode::Pod.into();
    };
    let pod = daemon.pod(shared).await?;
    let container = pod.sleeper().await?;
    let init = container.pid()?;
    nix::sys::signal::kill(crate::restart::keeper(&container)?, Signal::SIGKILL)?;
    eventually("the pod's end", seconds(20), || async {
        let state = pod.status().await?.state();
        Ok((state == cri::PodSandboxState::SandboxNotready).then_some(()))
    })
    .await?;
    pod.stop().await?;
    pod.remove().await?;
    assert!(!Path::new(&format!("/proc/{init}")).exists());
    let mounts = read("/proc/self/mountinfo")?;
    assert!(!mounts.contains(&pod.id), "{mounts}");
    Ok(())
}

async fn mount_options(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let dir = env.dir("volume")?;
    std::fs::write(dir.join("script"), "#!/bin/sh\necho ran\n")?;
    std::fs::set_permissions(dir.join("script"), PermissionsExt::from_mode(0o755))?;
    let _below = Tmpfs::new(dir.join("below"), MsFlags::MS_PRIVATE)?;
    std::fs::copy(dir.join("script"), dir.join("below/script"))?;
    let with = |mount: cri::Mount, options: &[&str]| cri::Mount {
        mount_options: options.iter().map(|o| (*o).to_owned()).collect(),
        ..mount
    };
    let mut pods = vec![(daemon.pod(|_| {}).await?, bind(&dir, "/tight"))];
    if told(&daemon, "").await? {
        let mount = bind_mapped(&dir, "/tight", HOST_ID);
        pods.push((daemon.pod(mapped).await?, mount));
    }
    for (pod, mount) in pods {
        let mounts = vec![
            with(mount, &["noexec", "nosuid", "nodev", "noexec"]),
            bind(&dir, "/loose"),
        ];
        let container = pod.run(&["sleep", "1000"], |c| c.mounts = mounts).await?;
        for place in ["/tight/script", "/tight/below/script"] {
            assert_eq!(container.exec(&[place]).await?.code, 126, "{place}");
        }
        assert_eq!(
            container.exec_output(&["/loose/below/script"]).await?,
            "ran"
        );
        let text = container.exec_output(&["cat", "/proc/mounts"]).await?;
        for place in [" /tight ", " /tight/below "] {
            let line = text
                .lines()
                .find(|l| l.contains(place))
                .context("the mount")?;
            for option in ["nosuid", "nodev", "noexec"] {
                assert!(line.contains(option), "{option}: {line}");
            }
        }
        let mount = with(bind(&dir, "/data"), &["nosuid", "uid=0"]);
        let answer = pod.try_create(|c| c.mounts = vec![mount]).await;
        refused(
            answer,
            Code::InvalidArgument,
            &["mounts[0].mount_options[1]", "uid=0"],
        );
    }
    Ok(())
}

async fn what_the_status_says(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    if told(&daemon, "native").await? && !never() {
        known(&daemon).await?;
    }
    let status = daemon
        .runtime()
        .status(cri::StatusRequest::default())
        .await?
        .into_inner();
    let config = env.root.join("config.toml").display().to_string();
    let (code, report, _) = daemon
        .command(&["check", "-o", "json", "--config", &config])
        .await?;
    let report: serde_json::Value =
        serde_json::from_str(&report).with_context(|| format!("code {code}: {report}"))?;
    let ok = |id: &str| {
        let all = report["findings"].as_array().into_iter().flatten();
        all.clone().any(|f| f["id"] == id && f["status"] == "ok")
    };
    let users = ok("user-namespaces") && ok("idmapped-mounts");
    for told in status.runtime_handlers {
        let features = told.features.context("features")?;
        let able = told.name == "native" || !never();
        assert_eq!(features.user_namespaces, users && able, "{:?}", told.name);
        assert_eq!(
            features.recursive_read_only_mounts,
            ok("recursive-read-only")
        );
    }
    let features = status.features.context("features")?;
    assert!(features.supplemental_groups_policy);
    assert_eq!(features.user_namespaces_host_network, users);
    assert_eq!(features.mount_options, ok("recursive-read-only"));
    Ok(())
}
