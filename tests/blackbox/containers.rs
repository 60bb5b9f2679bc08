//! What a container's process gets: command, arguments, environment, directory, files, standard streams.

use tonic::Code;

use crate::harness::*;

tests![
    command_and_arguments_meet_the_image,
    environment_of_image_and_config,
    environment_is_bytes,
    the_working_directory_is_made,
    home_is_the_users,
    standard_input_is_empty,
    etc_files_are_there,
    the_image_by_every_name,
    a_scratch_image_runs,
    a_layer_that_stands_twice,
    an_image_without_layers,
    what_later_issues_bring_is_refused,
    no_command_is_refused,
    the_next_attempt_fails_with_the_same_words,
    absent_images_are_refused,
    log_paths_do_not_climb_out,
    status_tells_about_the_container,
    lists_are_filtered,
];

async fn probe_of(
    daemon: &Daemon,
    change: impl FnOnce(&mut cri::ContainerConfig),
) -> Result<probe::Report> {
    let pod = daemon.pod(|_| {}).await?;
    Ok(probe::Report::new(&pod.output(&[], change).await?))
}

async fn command_and_arguments_meet_the_image(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    daemon.pull("entrypoint").await?;
    let run = async |command: &[&str], args: &[&str]| -> Result<Vec<String>> {
        let words = |w: &[&str]| w.iter().map(|w| (*w).to_owned()).collect();
        let (command, args) = (words(command), words(args));
        let report = probe_of(&daemon, |c| {
            c.image = config::of_image("entrypoint");
            (c.command, c.args) = (command, args);
        })
        .await?;
        Ok(report
            .starting("arg.")
            .into_iter()
            .map(|(_, v)| v.to_owned())
            .collect())
    };
    // The table of Kubernetes' documentation.
    assert_eq!(run(&[], &[]).await?, ["/bin/probe", "status", "from-cmd"]);
    assert_eq!(
        run(&[], &["status", "mine"]).await?,
        ["/bin/probe", "status", "mine"]
    );
    assert_eq!(
        run(&["probe"], &[]).await?,
        ["probe"],
        "a command drops the image's arguments"
    );
    assert_eq!(
        run(&["probe"], &["status", "x y", ""]).await?,
        ["probe", "status", "x y", ""]
    );
    Ok(())
}

async fn environment_of_image_and_config(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    daemon.pull("entrypoint").await?;
    let set = |key: &str, value: &str| cri::KeyValue {
        key: key.into(),
        value: value.into(),
    };
    let report = probe_of(&daemon, |c| {
        c.image = config::of_image("entrypoint");
        c.envs = vec![
            set("B", "config"),
            set("C", "with = and spaces"),
            set("EMPTY", ""),
        ];
    })
    .await?;
    let mut env = report.env.clone();
    env.sort();
    let count = |name: &str| {
        env.iter()
            .filter(|v| v.starts_with(&format!("{name}=")))
            .count()
    };
    for wanted in ["A=image", "B=config", "C=with = and spaces", "EMPTY="] {
        assert!(
            env.iter().any(|v| v == wanted),
            "{wanted} is not in {env:?}"
        );
    }
    assert_eq!(count("B"), 1, "{env:?}");
    assert_eq!(count("PATH"), 1, "{env:?}");
    // Nothing of the daemon's.
    assert!(
        !env.iter()
            .any(|v| v.starts_with("SLIPWAY") || v.starts_with("CARGO")),
        "{env:?}"
    );
    Ok(())
}

async fn environment_is_bytes(env: Env) -> Result<()> {
    native_only("its configuration is text")?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let value = vec![0xff, 0xfe, b'\n', b'x'];
    let container = pod
        .run(
            &[
                "sh",
                "-c",
                "printf %s \"$RAW\" | od -An -tx1; exec sleep 1000",
            ],
            |c| {
                c.envs = vec![cri::KeyValue {
                    key: "RAW".into(),
                    value: value.clone(),
                }];
            },
        )
        .await?;
    container.says(" ff fe 0a 78").await?;
    let exec = container
        .exec_output(&["sh", "-c", "printf %s \"$RAW\" | od -An -tx1"])
        .await?;
    assert_eq!(exec, " ff fe 0a 78");
    for bad in ["", "A=B", "A\0B"] {
        let answer = pod
            .try_create(|c| {
                c.envs = vec![cri::KeyValue {
                    key: bad.into(),
                    value: b"x".to_vec(),
                }]
            })
            .await;
        refused(answer, Code::InvalidArgument, &[]);
    }
    Ok(())
}

async fn the_working_directory_is_made(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    daemon.pull("entrypoint").await?;
    let pod = daemon.pod(|_| {}).await?;
    let [init, exec] = pod
        .probes(|c| {
            c.image = config::of_image("entrypoint");
        })
        .await?;
    assert_eq!(
        (init.get("cwd"), exec.get("cwd")),
        ("/made/for/image", "/made/for/image")
    );
    let [init, exec] = pod
        .probes(|c| c.working_dir = "/not/there/yet".into())
        .await?;
    assert_eq!(
        (init.get("cwd"), exec.get("cwd")),
        ("/not/there/yet", "/not/there/yet")
    );
    let answer = pod.try_create(|c| c.working_dir = "relative".into()).await;
    refused(answer, Code::InvalidArgument, &["relative"]);
    // A symlink of the image does not lead out of it.
    let text = pod
        .output(&["pwd"], |c| c.working_dir = "/bin/../../../../tmp".into())
        .await;
    if let Ok(text) = text {
        assert_eq!(text, "/tmp\n");
    }
    Ok(())
}

async fn home_is_the_users(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let home = |report: &probe::Report| report.env.iter().find(|v| v.starts_with("HOME=")).cloned();
    let [init, exec] = pod.probes(|_| {}).await?;
    assert_eq!(home(&init).as_deref(), Some("HOME=/root"));
    assert_eq!(home(&exec).as_deref(), Some("HOME=/root"));
    let [init, exec] = pod
        .probes(|c| container_security(c).run_as_username = "app".into())
        .await?;
    assert_eq!(home(&init).as_deref(), Some("HOME=/home/app"));
    assert_eq!(home(&exec).as_deref(), Some("HOME=/home/app"));
    let [init, _] = pod
        .probes(|c| {
            c.envs = vec![cri::KeyValue {
                key: "HOME".into(),
                value: b"/mine".to_vec(),
            }]
        })
        .await?;
    assert_eq!(home(&init).as_deref(), Some("HOME=/mine"));
    let [init, _] = pod
        .probes(|c| container_security(c).run_as_user = Some(cri::Int64Value { value: 7777 }))
        .await?;
    assert_eq!(home(&init).as_deref(), Some("HOME=/"));
    Ok(())
}

async fn standard_input_is_empty(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon
        .run(&["sh", "-c", "cat; echo end; exec sleep 1000"])
        .await?;
    container.says("end").await?;
    assert_eq!(
        container
            .exec_output(&["sh", "-c", "cat; echo end"])
            .await?,
        "end"
    );
    Ok(())
}

async fn etc_files_are_there(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon
        .pod(|c| {
            config::own_network(c);
            c.dns_config = Some(cri::DnsConfig {
                servers: vec!["10.0.0.10".into(), "fd00::10".into()],
                searches: vec!["ns.svc.cluster.local".into(), "cluster.local".into()],
                options: vec!["ndots:5".into()],
            });
        })
        .await?;
    let text = pod.output(&["cat", "/etc/resolv.conf"], |_| {}).await?;
    for wanted in [
        "nameserver 10.0.0.10\n",
        "nameserver fd00::10\n",
        "search ns.svc.cluster.local cluster.local\n",
        "options ndots:5\n",
    ] {
        assert!(text.contains(wanted), "{wanted:?} is not in {text:?}");
    }
    let hosts = pod.output(&["cat", "/etc/hosts"], |_| {}).await?;
    assert!(
        hosts.contains("127.0.0.1") && hosts.contains("localhost"),
        "{hosts}"
    );
    let ip = pod.status().await?.network.context("no address")?.ip;
    assert!(hosts.contains(&ip), "{ip} is not in {hosts}");
    // A file that the kubelet mounts there wins.
    let own = env.root.join("hosts");
    std::fs::write(&own, "1.2.3.4 mine\n")?;
    let mine = cri::Mount {
        container_path: "/etc/hosts".into(),
        host_path: own.display().to_string(),
        ..Default::default()
    };
    assert_eq!(
        pod.output(&["cat", "/etc/hosts"], |c| c.mounts = vec![mine])
            .await?,
        "1.2.3.4 mine\n"
    );
    for bad in [
        vec!["10.0.0.1\nnameserver 6.6.6.6".to_owned()],
        vec!["not an address".to_owned()],
    ] {
        let mut config = config::pod(&daemon);
        config.dns_config = Some(cri::DnsConfig {
            servers: bad,
            ..Default::default()
        });
        refused(
            daemon.run_pod(config).await.map(|p| p.id),
            Code::InvalidArgument,
            &[],
        );
    }
    Ok(())
}

async fn the_image_by_every_name(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let id = daemon.pull("test").await?;
    let request = cri::ListImagesRequest::default();
    let images = daemon
        .images()
        .list_images(request)
        .await?
        .into_inner()
        .images;
    let by_digest = images[0].repo_digests[0].clone();
    let pod = daemon.pod(|_| {}).await?;
    let plain = id.strip_prefix("sha256:").unwrap_or(&id).to_owned();
    let tagless = image("test").replace(":latest", "");
    for name in [
        id.clone(),
        plain.clone(),
        plain[..12].to_owned(),
        by_digest.clone(),
        image("test"),
        tagless,
    ] {
        let container = pod
            .create(&["true"], |c| {
                c.image = Some(cri::ImageSpec {
                    image: name.clone(),
                    ..Default::default()
                })
            })
            .await
            .with_context(|| format!("image {name}"))?;
        let status = container.status().await?;
        assert_eq!(status.image_id, images[0].id, "one image id everywhere");
        assert!(
            status.image_ref == by_digest || status.image_ref == images[0].id,
            "image_ref {}",
            status.image_ref
        );
    }
    Ok(())
}

async fn a_scratch_image_runs(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    daemon.pull("scratch").await?;
    let report = probe_of(&daemon, |c| c.image = config::of_image("scratch")).await?;
    assert_eq!(report.get("ids"), "0 0 0 0");
    assert_eq!(report.get("arg.0"), "/probe");
    Ok(())
}

async fn a_layer_that_stands_twice(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    daemon.pull("repeated").await?;
    let report = probe_of(&daemon, |c| {
        c.image = config::of_image("repeated");
        c.command = vec!["/bin/probe".into(), "status".into()];
    })
    .await?;
    assert_eq!(report.get("ids"), "0 0 0 0");
    Ok(())
}

async fn an_image_without_layers(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    daemon.pull("no-layers").await?;
    let pod = daemon.pod(|_| {}).await?;
    // Its command comes from the host.
    let busybox = ["/bin/busybox", "/usr/bin/busybox"];
    let busybox = busybox
        .into_iter()
        .find(|p| std::path::Path::new(p).exists());
    let Some(busybox) = busybox else {
        return skip("busybox-static is not installed");
    };
    let container = pod
        .run(&["/busybox", "echo", "mounted"], |c| {
            c.image = config::of_image("no-layers");
            c.mounts = vec![cri::Mount {
                container_path: "/busybox".into(),
                host_path: busybox.into(),
                readonly: true,
                ..Default::default()
            }];
        })
        .await?;
    assert_eq!(container.exited().await?.exit_code, 0);
    Ok(())
}

async fn what_later_issues_bring_is_refused(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let changes: &[Change<cri::ContainerConfig>] = &[("user namespace", |c| {
        let modes = container_security(c)
            .namespace_options
            .get_or_insert_default();
        modes.userns_options = Some(cri::UserNamespace {
            mode: cri::NamespaceMode::Pod.into(),
            uids: vec![cri::IdMapping {
                host_id: 65536,
                container_id: 0,
                length: 65536,
            }],
            gids: vec![cri::IdMapping {
                host_id: 65536,
                container_id: 0,
                length: 65536,
            }],
        });
    })];
    for (what, change) in changes {
        let status = pod.try_create(change).await.expect_err(what);
        assert!(
            matches!(
                status.code(),
                Code::Unimplemented | Code::InvalidArgument | Code::FailedPrecondition
            ),
            "{what}: {status}"
        );
        assert!(
            status
                .message()
                .to_lowercase()
                .contains(&what.to_lowercase()),
            "{what}: {status}"
        );
    }
    Ok(())
}

async fn no_command_is_refused(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    daemon.pull("no-command").await?;
    let pod = daemon.pod(|_| {}).await?;
    let answer = pod
        .try_create(|c| {
            c.image = config::of_image("no-command");
            c.command.clear();
        })
        .await;
    refused(answer, Code::InvalidArgument, &["command"]);
    Ok(())
}

async fn absent_images_are_refused(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    refused(
        pod.try_create(|_| {}).await,
        Code::NotFound,
        &["slipway/test"],
    );
    let bad = pod
        .try_create(|c| c.image.as_mut().unwrap().image = "UPPER CASE//".into())
        .await;
    assert!(matches!(
        bad.unwrap_err().code(),
        Code::InvalidArgument | Code::NotFound
    ));
    refused(
        pod.try_create(|c| c.image = None).await,
        Code::InvalidArgument,
        &["image"],
    );
    Ok(())
}

async fn log_paths_do_not_climb_out(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    for bad in [
        "../out.log",
        "a/../../out.log",
        "/etc/out.log",
        "a\nb",
        "..",
        ".",
    ] {
        refused(
            pod.try_create(|c| c.log_path = bad.into()).await,
            Code::InvalidArgument,
            &["log_path"],
        );
    }
    assert!(!daemon.logs().join("out.log").exists());
    // A directory below is made.
    let container = pod
        .run(&["echo", "deep"], |c| c.log_path = "deep/er/0.log".into())
        .await?;
    container.exited().await?;
    assert_eq!(container.stdout()?, "deep\n");
    Ok(())
}

async fn status_tells_about_the_container(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let source = env.dir("volume")?;
    let container = pod
        .create(&["sleep", "1000"], |c| {
            c.labels.insert("l".into(), "v".into());
            c.annotations.insert("a".into(), "w".into());
            c.metadata.as_mut().unwrap().attempt = 2;
            c.mounts = vec![cri::Mount {
                container_path: "/volume".into(),
                host_path: source.display().to_string(),
                readonly: true,
                ..Default::default()
            }];
            let linux = c
                .linux
                .get_or_insert_default()
                .resources
                .get_or_insert_default();
            linux.memory_limit_in_bytes = 64 << 20;
        })
        .await?;
    let status = container.status().await?;
    assert_eq!(status.state(), cri::ContainerState::ContainerCreated);
    assert_eq!(status.metadata, container.config.metadata);
    assert_eq!(
        (&status.labels, &status.annotations),
        (&container.config.labels, &container.config.annotations)
    );
    assert_eq!(
        status
            .mounts
            .iter()
            .find(|m| m.container_path == "/volume")
            .map(|m| m.readonly),
        Some(true)
    );
    assert_eq!(status.log_path, container.log.display().to_string());
    assert_eq!(status.image.as_ref().unwrap().image, image("test"));
    assert_eq!(
        status
            .resources
            .unwrap()
            .linux
            .unwrap()
            .memory_limit_in_bytes,
        64 << 20
    );
    assert!(status.created_at > 0 && status.started_at == 0 && status.finished_at == 0);
    container.start().await?;
    let status = container.status().await?;
    assert_eq!(status.state(), cri::ContainerState::ContainerRunning);
    assert!(status.started_at >= status.created_at);
    assert_eq!(status.user.unwrap().linux.unwrap().uid, 0);
    Ok(())
}

async fn lists_are_filtered(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let (one, two) = (daemon.pod(|_| {}).await?, daemon.pod(|_| {}).await?);
    let a = one
        .create(&["sleep", "1000"], |c| {
            drop(c.labels.insert("k".into(), "a".into()))
        })
        .await?;
    let b = one
        .run(&["sleep", "1000"], |c| {
            drop(c.labels.insert("k".into(), "b".into()))
        })
        .await?;
    let c = two.run(&["true"], |_| {}).await?;
    c.exited().await?;
    let listed = async |filter: cri::ContainerFilter| -> Result<Vec<String>> {
        let request = cri::ListContainersRequest {
            filter: Some(filter),
        };
        let all = daemon
            .runtime()
            .list_containers(request)
            .await?
            .into_inner()
            .containers;
        let mut ids: Vec<_> = all.into_iter().map(|c| c.id).collect();
        ids.sort();
        Ok(ids)
    };
    let sorted = |containers: &[&Container]| {
        let mut ids: Vec<_> = containers.iter().map(|c| c.id.clone()).collect();
        ids.sort();
        ids
    };
    let filter = cri::ContainerFilter::default;
    assert_eq!(listed(filter()).await?, sorted(&[&a, &b, &c]));
    assert_eq!(
        listed(cri::ContainerFilter {
            pod_sandbox_id: one.id.clone(),
            ..filter()
        })
        .await?,
        sorted(&[&a, &b])
    );
    assert_eq!(
        listed(cri::ContainerFilter {
            id: b.id[..13].to_owned(),
            ..filter()
        })
        .await?,
        sorted(&[&b])
    );
    let label_selector = [("k".to_owned(), "a".to_owned())].into();
    assert_eq!(
        listed(cri::ContainerFilter {
            label_selector,
            ..filter()
        })
        .await?,
        sorted(&[&a])
    );
    for (state, wanted) in [
        (cri::ContainerState::ContainerCreated, &a),
        (cri::ContainerState::ContainerRunning, &b),
        (cri::ContainerState::ContainerExited, &c),
    ] {
        let state = Some(cri::ContainerStateValue {
            state: state.into(),
        });
        assert_eq!(
            listed(cri::ContainerFilter { state, ..filter() }).await?,
            sorted(&[wanted])
        );
    }
    Ok(())
}

/// The kubelet takes each new text for a new event.
async fn the_next_attempt_fails_with_the_same_words(env: Env) -> Result<()> {
    type Change = fn(&mut cri::ContainerConfig);
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let attempt = async |number: u32, change: Change| -> Result<(String, String)> {
        let mut config = config::container(&daemon, &pod.config, &["no-such-command"]);
        config.metadata.get_or_insert_default().name = "web".into();
        config.metadata.get_or_insert_default().attempt = number;
        change(&mut config);
        let container = match pod.create_exactly(config).await {
            Err(status) => return Ok((String::new(), status.message().to_owned())),
            Ok(container) => container,
        };
        let status = container.start().await.expect_err("it started");
        Ok((
            container.exited().await?.message,
            status.message().to_owned(),
        ))
    };
    let cases: [(Change, &str); 5] = [
        (|_| {}, "no-such-command"),
        (|c| c.command = vec!["/etc".into()], "/etc"),
        (|c| c.working_dir = "/etc/passwd/x".into(), "/etc/passwd"),
        (
            |c| container_security(c).run_as_username = "nobody-here".into(),
            "nobody-here",
        ),
        (
            |c| {
                c.cdi_devices = vec![cri::CdiDevice {
                    name: "vendor.com/gpu=0".into(),
                }]
            },
            "vendor.com/gpu=0",
        ),
    ];
    for (at, (change, word)) in (0..).zip(cases) {
        let first = attempt(2 * at, change).await?;
        assert_eq!(first, attempt(2 * at + 1, change).await?);
        assert!(
            first.1.contains(word) && first.1.contains("\"web\""),
            "{first:?}"
        );
    }
    Ok(())
}
