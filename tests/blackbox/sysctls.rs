//! Sysctls of a pod: set in its namespaces, and nothing else.

use tonic::Code;

use crate::harness::*;

tests![
    set_in_the_pods_namespaces,
    what_is_not_the_pods_is_refused,
    what_is_smuggled_is_refused,
    what_the_kernel_refuses,
    the_nodes_defaults
];

fn with(pairs: &[(&str, &str)]) -> impl FnOnce(&mut cri::PodSandboxConfig) + use<> {
    let sysctls = pairs
        .iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect();
    move |c| {
        config::own_network(c);
        c.linux.get_or_insert_default().sysctls = sysctls;
    }
}

async fn set_in_the_pods_namespaces(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let before = read("/proc/sys/net/ipv4/ip_local_port_range")?;
    let pod = daemon
        .pod(with(&[
            ("net.ipv4.ip_local_port_range", "40000 50000"),
            // Slashes are another way to write dots.
            ("net/ipv4/tcp_syncookies", "0"),
            ("kernel.shm_rmid_forced", "1"),
            ("kernel.msgmax", "9000"),
            ("fs.mqueue.queues_max", "200"),
        ]))
        .await?;
    let text = pod
        .output(&["sh", "-c", "cd /proc/sys; cat net/ipv4/ip_local_port_range net/ipv4/tcp_syncookies kernel/shm_rmid_forced kernel/msgmax fs/mqueue/queues_max"], |_| {})
        .await?;
    let words: Vec<&str> = text.split_whitespace().collect();
    assert_eq!(words, ["40000", "50000", "0", "1", "9000", "200"]);
    assert_eq!(
        read("/proc/sys/net/ipv4/ip_local_port_range")?,
        before,
        "the host's was changed"
    );
    Ok(())
}

async fn refuses(daemon: &Daemon, pairs: &[(&str, &str)], names: &[&str]) {
    let mut config = config::pod(daemon);
    with(pairs)(&mut config);
    refused(
        daemon.run_pod(config).await.map(|p| p.id),
        Code::InvalidArgument,
        names,
    );
}

async fn what_is_not_the_pods_is_refused(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let before = read("/proc/sys/vm/swappiness")?;
    for name in [
        "vm.swappiness",
        "kernel.panic",
        "kernel.hostname",
        "fs.file-max",
        "user.max_user_namespaces",
        "abi.x",
    ] {
        refuses(&daemon, &[(name, "1")], &[name]).await;
    }
    assert_eq!(read("/proc/sys/vm/swappiness")?, before);
    // A namespace that is the node's: its sysctls are the node's.
    let mut config = config::pod(&daemon);
    config
        .linux
        .as_mut()
        .unwrap()
        .sysctls
        .insert("net.ipv4.ip_forward".into(), "0".into());
    refused(
        daemon.run_pod(config).await.map(|p| p.id),
        Code::InvalidArgument,
        &["net.ipv4.ip_forward"],
    );
    assert_eq!(read("/proc/sys/net/ipv4/ip_forward")?, "1");
    let mut config = config::pod(&daemon);
    config::pod_namespaces(&mut config).ipc = cri::NamespaceMode::Node.into();
    config
        .linux
        .as_mut()
        .unwrap()
        .sysctls
        .insert("kernel.msgmax".into(), "9000".into());
    refused(
        daemon.run_pod(config).await.map(|p| p.id),
        Code::InvalidArgument,
        &["kernel.msgmax"],
    );
    Ok(())
}

async fn what_is_smuggled_is_refused(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let before = read("/proc/sys/kernel/core_pattern")?;
    // CVE-2022-0811 (cr8escape): a "+" joined several sysctls into one.
    refuses(
        &daemon,
        &[("kernel.shm_rmid_forced", "1+kernel.core_pattern=|/evil #")],
        &["kernel.shm_rmid_forced"],
    )
    .await;
    refuses(
        &daemon,
        &[("kernel.shm_rmid_forced", "1\nkernel.core_pattern=|/evil")],
        &["kernel.shm_rmid_forced"],
    )
    .await;
    refuses(
        &daemon,
        &[("net.ipv4.ip_forward+kernel.core_pattern", "1")],
        &[],
    )
    .await;
    for name in [
        "net.ipv4/../../kernel/core_pattern",
        "net/../kernel/core_pattern",
        "net..core",
        "/proc/sys/net.x",
        "net",
        "",
        "net.ipv4.\nx",
        "net.a=b",
    ] {
        refuses(&daemon, &[(name, "1")], &[]).await;
    }
    assert_eq!(read("/proc/sys/kernel/core_pattern")?, before);
    Ok(())
}

async fn what_the_kernel_refuses(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    refuses(
        &daemon,
        &[("net.ipv4.no_such_thing", "1")],
        &["net.ipv4.no_such_thing"],
    )
    .await;
    refuses(
        &daemon,
        &[("net.ipv4.ip_local_port_range", "no numbers")],
        &["net.ipv4.ip_local_port_range"],
    )
    .await;
    Ok(())
}

async fn the_nodes_defaults(env: Env) -> Result<()> {
    let daemon = env
        .daemon_with(|s| s.set("pod.default_sysctls", "{ \"net.ipv4.ip_unprivileged_port_start\" = \"0\", \"net.ipv4.tcp_syncookies\" = \"0\" }"))
        .await?;
    daemon.pull("test").await?;
    let pod = daemon
        .pod(with(&[("net.ipv4.tcp_syncookies", "1")]))
        .await?;
    let text = pod
        .output(
            &[
                "sh",
                "-c",
                "cd /proc/sys/net/ipv4; cat ip_unprivileged_port_start tcp_syncookies",
            ],
            |_| {},
        )
        .await?;
    assert_eq!(text, "0\n1\n");
    // On the node's network they don't apply, and must not be in the way.
    let pod = daemon.pod(|_| {}).await?;
    pod.output(&["true"], |_| {}).await?;
    assert_ne!(read("/proc/sys/net/ipv4/ip_unprivileged_port_start")?, "0");
    Ok(())
}
