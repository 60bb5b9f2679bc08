//! SELinux labels: of a container's processes, of its files, and of what it is given.

use std::path::Path;

use crate::harness::*;

tests![
    init_and_exec_have_a_level_of_their_pods_own,
    options_name_the_label,
    who_is_not_to_be_kept_from_the_host_has_none,
    its_files_have_its_level,
    volumes_are_relabelled_if_asked,
    labels_can_be_switched_off,
];

/// User, role and type that the policy has for containers (`process`) and their files (`file`).
fn context(key: &str) -> Result<String> {
    let config = read("/etc/selinux/config")?;
    let kind = config
        .lines()
        .find_map(|l| l.strip_prefix("SELINUXTYPE="))
        .context("SELINUXTYPE")?;
    let contexts = read(format!("/etc/selinux/{kind}/contexts/lxc_contexts"))?;
    let line = contexts
        .lines()
        .find_map(|l| l.strip_prefix(key)?.trim_start().strip_prefix('='));
    let context = line.context("lxc_contexts")?.trim().trim_matches('"');
    Ok(context.strip_suffix(":s0").context("level")?.to_owned())
}

fn needs_selinux() -> Result<()> {
    match Path::new("/sys/fs/selinux/enforce").exists() {
        true => Ok(()),
        false => skip(
            "SELinux is off on this host; hack/vm test --guest selinux runs a machine where it is on",
        ),
    }
}

/// The labels of a container's first process and of an exec session.
async fn labels(pod: &Pod, change: impl FnOnce(&mut cri::ContainerConfig)) -> Result<[String; 2]> {
    let script = [
        "sh",
        "-c",
        "cat /proc/self/attr/current; echo; echo done; exec sleep 1000",
    ];
    let container = pod.run(&script, change).await?;
    container.says("done").await?;
    let init = container.stdout()?;
    let exec = container
        .exec_output(&["cat", "/proc/self/attr/current"])
        .await?;
    let first = |text: &str| {
        text.lines()
            .next()
            .unwrap_or_default()
            .trim_end_matches('\0')
            .to_owned()
    };
    Ok([first(&init), first(&exec)])
}

fn options(kind: &str, level: &str) -> Option<cri::SeLinuxOption> {
    Some(cri::SeLinuxOption {
        r#type: kind.into(),
        level: level.into(),
        ..Default::default()
    })
}

/// A file's label, as the kernel tells it.
fn label_of(path: &Path) -> Result<String> {
    let mut found = [0u8; 512];
    let length = rustix::fs::getxattr(path, "security.selinux", &mut found[..])
        .with_context(|| format!("the label of {}", path.display()))?;
    let text = String::from_utf8_lossy(&found[..length]).into_owned();
    Ok(text.trim_end_matches('\0').to_owned())
}

async fn init_and_exec_have_a_level_of_their_pods_own(env: Env) -> Result<()> {
    needs_selinux()?;
    let daemon = env.daemon().await?;
    let (pod, other) = (daemon.pod(|_| {}).await?, daemon.pod(|_| {}).await?);
    let found = labels(&pod, |_| {}).await?;
    assert_eq!(found[0], found[1]);
    assert!(
        found[0].starts_with(&format!("{}:s0:c", context("process")?)),
        "{found:?}"
    );
    assert_eq!(
        labels(&pod, |_| {}).await?,
        found,
        "a container of the same pod"
    );
    assert_ne!(labels(&other, |_| {}).await?, found, "one of another");
    daemon.kill(nix::sys::signal::Signal::SIGKILL).await?;
    daemon.launch().await?;
    assert_eq!(
        labels(&pod, |_| {}).await?,
        found,
        "one that another daemon made"
    );
    Ok(())
}

async fn options_name_the_label(env: Env) -> Result<()> {
    needs_selinux()?;
    let daemon = env.daemon().await?;
    let pod = daemon
        .pod(|p| pod_security(p).selinux_options = options("", "s0:c3,c4"))
        .await?;
    let of_pod = [
        format!("{}:s0:c3,c4", context("process")?),
        format!("{}:s0:c3,c4", context("process")?),
    ];
    assert_eq!(labels(&pod, |_| {}).await?, of_pod);
    let own = |c: &mut cri::ContainerConfig| {
        container_security(c).selinux_options = options("initrc_t", "s0:c5");
    };
    let found = labels(&pod, own).await?;
    let unknown = |c: &mut cri::ContainerConfig| {
        container_security(c).selinux_options = options("no_such_t", "s0");
    };
    let error = pod.try_create(unknown).await.expect_err("unknown");
    assert_eq!(error.code(), tonic::Code::FailedPrecondition);
    assert!(error.message().contains("no_such_t"), "{error}");
    assert_eq!(
        found,
        ["system_u:system_r:initrc_t:s0:c5"; 2].map(str::to_owned)
    );
    Ok(())
}

async fn who_is_not_to_be_kept_from_the_host_has_none(env: Env) -> Result<()> {
    needs_selinux()?;
    let daemon = env.daemon().await?;
    let own = read("/proc/self/attr/current")?;
    let own = [own.trim_end_matches('\0'); 2].map(str::to_owned);
    let privileged = daemon.pod(|p| pod_security(p).privileged = true).await?;
    let found = labels(&privileged, |c| container_security(c).privileged = true).await?;
    assert_eq!(found, own);
    let host_pid = daemon
        .pod(|p| {
            let options = pod_security(p).namespace_options.get_or_insert_default();
            options.pid = cri::NamespaceMode::Node.into();
        })
        .await?;
    let found = labels(&host_pid, |c| {
        let options = container_security(c)
            .namespace_options
            .get_or_insert_default();
        options.pid = cri::NamespaceMode::Node.into();
    });
    assert_eq!(found.await?, own);
    Ok(())
}

async fn its_files_have_its_level(env: Env) -> Result<()> {
    needs_selinux()?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(config::own_network).await?;
    let container = pod.sleeper().await?;
    let process = container
        .exec_output(&["cat", "/proc/1/attr/current"])
        .await?;
    let level = process
        .trim_end_matches(['\0', '\n'])
        .splitn(4, ':')
        .last()
        .context("level")?
        .to_owned();
    container
        .exec_output(&["sh", "-c", "echo x >/new; echo x >/dev/shm/new"])
        .await?;
    let root = format!("/proc/{}/root", container.pid()?);
    for file in [
        "",
        "/new",
        "/bin",
        "/dev",
        "/dev/shm",
        "/dev/shm/new",
        "/etc/hosts",
        "/etc/resolv.conf",
        "/dev/pts",
        "/dev/mqueue",
    ] {
        let label = label_of(Path::new(&format!("{root}{file}")))?;
        assert_eq!(label, format!("{}:{level}", context("file")?), "of {file}");
    }
    Ok(())
}

async fn volumes_are_relabelled_if_asked(env: Env) -> Result<()> {
    needs_selinux()?;
    let daemon = env.daemon().await?;
    let pod = daemon
        .pod(|p| pod_security(p).selinux_options = options("", "s0:c3,c4"))
        .await?;
    let (given, kept) = (env.dir("given")?, env.dir("kept")?);
    std::fs::create_dir(given.join("deep"))?;
    std::fs::write(given.join("deep/file"), "x")?;
    std::os::unix::fs::symlink(&kept, given.join("link"))?;
    let before = label_of(&kept)?;
    let mount = |path: &Path, place: &str, relabel| cri::Mount {
        host_path: path.display().to_string(),
        container_path: place.to_owned(),
        selinux_relabel: relabel,
        ..Default::default()
    };
    let change = |c: &mut cri::ContainerConfig| {
        c.mounts.push(mount(&given, "/given", true));
        c.mounts.push(mount(&kept, "/kept", false));
    };
    pod.run(&["sleep", "1000"], change).await?;
    for path in [given.clone(), given.join("deep"), given.join("deep/file")] {
        assert_eq!(
            label_of(&path)?,
            format!("{}:s0:c3,c4", context("file")?),
            "{}",
            path.display()
        );
    }
    assert_eq!(label_of(&kept)?, before);
    let hosts_own =
        |c: &mut cri::ContainerConfig| c.mounts.push(mount(Path::new("/etc"), "/host", true));
    let error = pod.try_create(hosts_own).await.expect_err("the host's own");
    assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error}");
    Ok(())
}

async fn labels_can_be_switched_off(env: Env) -> Result<()> {
    needs_selinux()?;
    let daemon = env.daemon_with(|s| s.set("pod.selinux", "false")).await?;
    daemon.pull("test").await?;
    let pod = daemon.pod(|_| {}).await?;
    let own = read("/proc/self/attr/current")?;
    let own = [own.trim_end_matches('\0'); 2].map(str::to_owned);
    assert_eq!(labels(&pod, |_| {}).await?, own);
    Ok(())
}
