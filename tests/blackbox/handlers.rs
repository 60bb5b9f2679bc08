//! Runtime handlers: pods of several side by side, handlers that come and go, runtimes that misbehave.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tonic::Code;

use crate::harness::*;

tests![
    side_by_side_over_a_restart,
    a_removed_handler_still_ends_its_pods,
    two_files_may_not_describe_one_handler,
    a_missing_runtime_is_told,
    a_runtime_that_comes_later,
    settings_of_a_handler,
    user_namespaces_by_what_a_runtime_says,
    a_runtime_that_ignores_user_namespaces,
    everything_of_a_container,
    commands_that_cannot_run,
    a_runtime_that_hangs,
    a_runtime_that_crashes,
    a_runtime_that_prints_no_json,
    a_runtime_that_leaves_its_container,
    a_runtime_that_lies_about_the_process,
    a_runtime_whose_containers_are_elsewhere,
];

/// The command-line runtimes that this machine has.
pub fn runtimes() -> Result<Vec<&'static str>> {
    if stage::systemd() {
        return skip(stage::NO_PROCESS_IDS);
    }
    let found: Vec<_> = ["crun", "runc"]
        .into_iter()
        .filter(|name| program(name).is_some())
        .collect();
    match found.is_empty() {
        true => skip("needs runc or crun"),
        false => Ok(found),
    }
}

fn program(name: &str) -> Option<PathBuf> {
    let dirs = [
        "/usr/local/sbin",
        "/usr/local/bin",
        "/usr/sbin",
        "/usr/bin",
        "/sbin",
        "/bin",
    ];
    let paths = dirs.iter().map(|dir| Path::new(dir).join(name));
    paths.into_iter().find(|path| path.is_file())
}

pub fn describe(setup: &mut Setup, name: &str, path: &str) {
    setup.set(&format!("runtimes.{name}.type"), "\"oci\"");
    setup.set(&format!("runtimes.{name}.path"), &format!("{path:?}"));
}

async fn with_all(env: &Env) -> Result<(Daemon, Vec<&'static str>)> {
    let all = runtimes()?;
    let daemon = env
        .daemon_with(|s| {
            for name in &all {
                describe(s, name, name);
            }
        })
        .await?;
    daemon.pull("test").await?;
    Ok((daemon, all))
}

/// Takes a handler out of the configuration, by the drop-in that describes it.
async fn reload(daemon: &Daemon) -> Result<()> {
    let skip = std::fs::metadata(daemon.log_file())?.len();
    daemon.signal(Signal::SIGHUP)?;
    daemon
        .logged(usize::try_from(skip)?, &["configuration"])
        .await
}

/// What Status says of a handler.
async fn report(daemon: &Daemon, handler: &str) -> Result<serde_json::Value> {
    let request = cri::StatusRequest { verbose: true };
    let status = daemon.runtime().status(request).await?.into_inner();
    let all: serde_json::Value =
        serde_json::from_str(status.info.get("runtimes").context("info of runtimes")?)?;
    Ok(all[handler].clone())
}

async fn side_by_side_over_a_restart(env: Env) -> Result<()> {
    let (daemon, mut all) = with_all(&env).await?;
    all.push("native");
    let mut running = Vec::new();
    for handler in &all {
        let pod = daemon.pod_under(handler).await?;
        let sleeper = pod.sleeper().await?;
        let created = pod.create(&["echo", "later"], |_| {}).await?;
        let gate = Gate::new(&env, &format!("gate-{handler}"))?;
        let ends = gate.behind(&pod, "echo unseen; exit 23").await?;
        running.push((*handler, pod, sleeper, created, ends, gate));
    }
    let pids: Vec<_> = running.iter().map(|r| r.2.pid()).collect::<Result<_>>()?;
    daemon.kill(Signal::SIGKILL).await?;
    for (.., gate) in &running {
        gate.open()?;
    }
    daemon.launch().await?;
    for ((handler, pod, sleeper, created, ends, _), pid) in running.iter().zip(pids) {
        let what = || format!("under {handler}");
        assert_eq!(sleeper.pid()?, pid, "{handler}");
        assert_eq!(pod.status().await?.runtime_handler, *handler);
        let said = sleeper.exec_output(&["echo", "well"]).await;
        assert_eq!(said.with_context(what)?, "well");
        let status = ends.exited().await.with_context(what)?;
        assert_eq!(
            (status.exit_code, ends.stdout()?),
            (23, "unseen\n".to_owned())
        );
        created.start().await.with_context(what)?;
        created.exited().await?;
        assert_eq!(created.stdout()?, "later\n");
        sleeper.stop(1).await.with_context(what)?;
        pod.stop().await.with_context(what)?;
        pod.remove().await.with_context(what)?;
    }
    Ok(())
}

async fn a_removed_handler_still_ends_its_pods(env: Env) -> Result<()> {
    let name = runtimes()?[0];
    let drop_ins = env.dir("config.d")?;
    let file = drop_ins.join("50-extra.toml");
    let text = format!("[runtimes.extra]\ntype = \"oci\"\npath = \"{name}\"\n");
    std::fs::write(&file, text)?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod_under("extra").await?;
    let running = pod.sleeper().await?;
    let other = daemon.pod_under("extra").await?;
    other.sleeper().await?;
    std::fs::remove_file(&file)?;
    reload(&daemon).await?;
    let known = ["\"extra\"", "\"native\""];
    refused(
        daemon.pod_under("extra").await.map(|p| p.id),
        Code::InvalidArgument,
        &known,
    );
    // What lives goes on, also what is made anew in it.
    assert_eq!(running.exec_output(&["echo", "well"]).await?, "well");
    let restarted = pod.run(&["sh", "-c", "exit 3"], |_| {}).await?;
    assert_eq!(restarted.exited().await?.exit_code, 3);
    pod.stop().await?;
    pod.remove().await?;
    // Likewise for a daemon that has never heard of it.
    daemon.kill(Signal::SIGTERM).await?;
    daemon.launch().await?;
    other.stop().await?;
    other.remove().await?;
    Ok(())
}

async fn two_files_may_not_describe_one_handler(env: Env) -> Result<()> {
    let drop_ins = env.dir("config.d")?;
    let daemon = env.bare_daemon().await?;
    for name in ["10-a.toml", "20-b.toml"] {
        std::fs::write(drop_ins.join(name), "[runtimes.extra]\ntype = \"oci\"\n")?;
    }
    let config = env.root.join("config.toml").display().to_string();
    let (code, out, error) = daemon
        .command(&["config", "check", "--config", &config])
        .await?;
    let said = out + &error;
    assert_ne!(code, 0, "{said}");
    for part in ["10-a.toml", "20-b.toml", "runtimes.extra"] {
        assert!(said.contains(part), "{said}");
    }
    // The running daemon keeps what it has.
    let skip = std::fs::metadata(daemon.log_file())?.len();
    daemon.signal(Signal::SIGHUP)?;
    let words = ["configuration not reloaded", "10-a.toml", "20-b.toml"];
    daemon.logged(usize::try_from(skip)?, &words).await
}

async fn a_missing_runtime_is_told(env: Env) -> Result<()> {
    let nowhere = env.root.join("nowhere").display().to_string();
    let daemon = env
        .daemon_with(|s| {
            describe(s, "absent", &nowhere);
            s.set("runtimes.nameless.type", "\"oci\"");
        })
        .await?;
    daemon.pull("test").await?;
    for (handler, word) in [("absent", nowhere.as_str()), ("nameless", "nameless")] {
        let refusal = daemon.pod_under(handler).await.map(|p| p.id);
        refused(
            refusal,
            Code::FailedPrecondition,
            &[handler, word, "slipway check"],
        );
        let report = report(&daemon, handler).await?;
        assert_eq!(report["usable"], false, "{report}");
        assert!(
            report["reason"].as_str().is_some_and(|r| r.contains(word)),
            "{report}"
        );
    }
    // The others work.
    let container = daemon
        .pod_under("native")
        .await?
        .run(&["true"], |_| {})
        .await?;
    assert_eq!(container.exited().await?.exit_code, 0);
    let config = env.root.join("config.toml").display().to_string();
    let (_, out, _) = daemon
        .command(&["check", "--config", &config, "--output", "json"])
        .await?;
    let found: serde_json::Value = serde_json::from_str(&out)?;
    let findings = found["findings"].as_array().context("findings")?;
    let finding = findings.iter().find(|f| f["id"] == "runtime-absent");
    let finding = finding.context("a finding of the handler")?;
    assert_eq!(finding["status"], "warn", "{finding}");
    assert!(
        finding["found"]
            .as_str()
            .is_some_and(|f| f.contains(&nowhere)),
        "{finding}"
    );
    Ok(())
}

async fn a_runtime_that_comes_later(env: Env) -> Result<()> {
    let real = program(runtimes()?[0]).context("its path")?;
    let path = env.root.join("runtime");
    let daemon = env
        .daemon_with(|s| describe(s, "late", &path.display().to_string()))
        .await?;
    daemon.pull("test").await?;
    refused(
        daemon.pod_under("late").await.map(|p| p.id),
        Code::FailedPrecondition,
        &["late"],
    );
    std::os::unix::fs::symlink(&real, &path)?;
    let container = daemon
        .pod_under("late")
        .await?
        .run(&["true"], |_| {})
        .await?;
    assert_eq!(container.exited().await?.exit_code, 0);
    let report = report(&daemon, "late").await?;
    assert_eq!(report["usable"], true, "{report}");
    let version = report["version"].as_str().unwrap_or_default();
    assert!(version.contains("version"), "{report}");
    Ok(())
}

async fn settings_of_a_handler(env: Env) -> Result<()> {
    let name = runtimes()?[0];
    let state = env.root.join("of-the-runtime");
    let profile = env.root.join("seccomp.json");
    let text = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
        {"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":95}]}"#;
    std::fs::write(&profile, text)?;
    let daemon = env
        .daemon_with(|s| {
            describe(s, "tuned", name);
            s.set(
                "runtimes.tuned.root",
                &format!("{:?}", state.display().to_string()),
            );
            s.set("runtimes.tuned.allowed_annotations", "[\"org.example.\"]");
            s.set("runtimes.tuned.minimum_memory", "\"32MiB\"");
            s.set(
                "runtimes.tuned.seccomp_profile",
                &format!("{:?}", profile.display().to_string()),
            );
        })
        .await?;
    daemon.pull("test").await?;
    let mut config = config::pod(&daemon);
    for key in ["org.example.one", "com.example.two"] {
        config.annotations.insert(key.into(), "yes".into());
    }
    let pod = daemon.run_pod_under("tuned", config).await?;
    let container = pod.sleeper().await?;
    assert!(state.join(&container.id).is_dir(), "its state is elsewhere");
    let bundle = env
        .root
        .join(format!("r/pods/{}/containers/{}", pod.id, container.id));
    let spec: serde_json::Value = serde_json::from_str(&read(bundle.join("config.json"))?)?;
    assert_eq!(spec["annotations"]["org.example.one"], "yes");
    assert!(spec["annotations"]["com.example.two"].is_null());
    let refusal = container.exec(&["mkdir", "/tmp/x"]).await?;
    assert_ne!(
        refusal.code, 0,
        "the handler's seccomp profile does not hold"
    );
    let small = pod
        .try_create(|c| {
            let resources = c
                .linux
                .get_or_insert_default()
                .resources
                .get_or_insert_default();
            resources.memory_limit_in_bytes = 16 << 20;
        })
        .await;
    refused(
        small,
        Code::InvalidArgument,
        &["tuned", "minimum_memory", "16777216"],
    );
    let update = cri::LinuxContainerResources {
        memory_limit_in_bytes: 16 << 20,
        ..Default::default()
    };
    refused(
        container.update(update).await,
        Code::InvalidArgument,
        &["minimum_memory"],
    );
    Ok(())
}

/// What Status says of a handler's user namespaces, once its program has been asked.
async fn told_user_namespaces(daemon: &Daemon, handler: &str) -> Result<bool> {
    eventually("the program's answer", seconds(20), || async {
        Ok((!report(daemon, handler).await?["usable"].is_null()).then_some(()))
    })
    .await?;
    let request = cri::StatusRequest::default();
    let status = daemon.runtime().status(request).await?;
    let handlers = status.into_inner().runtime_handlers;
    let told = handlers.iter().find(|h| h.name == handler);
    let features = told.and_then(|told| told.features).context("in Status")?;
    assert!(features.recursive_read_only_mounts, "{handler}");
    Ok(features.user_namespaces)
}

async fn mapped_pod(daemon: &Daemon, handler: &str) -> Result<Pod, tonic::Status> {
    let mut config = config::pod(daemon);
    crate::userns::mapped(&mut config);
    daemon.run_pod_under(handler, config).await
}

async fn user_namespaces_by_what_a_runtime_says(env: Env) -> Result<()> {
    let all = runtimes()?;
    let flag = env.root.join("old");
    let answer = r#"{"ociVersionMax":"1.2.0","linux":{"namespaces":["pid","network"]}}"#;
    let script = format!("if [ $command = features ]; then echo '{answer}'; exit 0; fi");
    let daemon = fake(&env, &script, |s| {
        for name in &all {
            describe(s, name, name);
        }
        describe(s, "late", &flag.display().to_string());
    })
    .await?;
    let here = told_user_namespaces(&daemon, "native").await?;
    for handler in all {
        assert_eq!(told_user_namespaces(&daemon, handler).await?, here);
        let report = report(&daemon, handler).await?;
        assert_eq!(report["user_namespaces"], true, "{report}");
    }
    // One that does not know them, and one that is not there.
    for handler in ["fake", "late"] {
        assert!(!told_user_namespaces(&daemon, handler).await?);
    }
    let notes = report(&daemon, "fake").await?["notes"].to_string();
    assert!(notes.contains("user namespaces"), "{notes}");
    let refusal = mapped_pod(&daemon, "fake").await.map(|p| p.id);
    refused(
        refusal,
        Code::FailedPrecondition,
        &["fake", "user namespaces", "does not say", "hostUsers"],
    );
    assert_eq!(daemon.pod_dirs(), Vec::<String>::new());
    // Another pod of it has what it needs.
    daemon.pod_under("fake").await?.sleeper().await?;
    Ok(())
}

async fn a_runtime_that_ignores_user_namespaces(env: Env) -> Result<()> {
    // By the word of an old one that knows them.
    let old = "if [ $command = features ]; then exit 1; fi
        if [ $command = --version ]; then echo crun version 1.0; exit 0; fi";
    let flag = env.root.join("ignores");
    let words = |name: &str| {
        format!("word=; for next in \"$@\"; do [ \"$word\" = {name} ] && break; word=$next; done")
    };
    let script = format!(
        "{old}
         [ -e {flag} ] && case $command in
           create) {bundle}; sed -i -e 's/{{\"type\":\"user\",\"path\":\"[^\"]*\"}},//' \
               -e 's/\"[ug]idMappings\":\\[[^]]*\\],//g' $next/config.json;;
           exec) {file}; sleep 1000 & echo $! >$next; echo $! >{flag}; exit 0;;
         esac",
        flag = flag.display(),
        bundle = words("--bundle"),
        file = words("--pid-file"),
    );
    let daemon = fake(&env, &script, |_| {}).await?;
    if !told_user_namespaces(&daemon, "fake").await? {
        return skip("no user namespaces or no idmapped mounts here; see slipway check");
    }
    let pod = mapped_pod(&daemon, "fake").await?;
    let container = pod.sleeper().await?;
    assert_eq!(container.exec_output(&["id", "-u"]).await?, "0");
    std::fs::write(&flag, "")?;
    let refusal = container
        .exec_limited(&["true"], 30)
        .await
        .map(|e| e.exit_code);
    refused(
        refusal,
        Code::Internal,
        &["fake", "not in the pod's user namespace", "killed"],
    );
    let outside = format!("/proc/{}", read(&flag)?.trim());
    eventually("the end of what was outside", seconds(10), || async {
        Ok((!Path::new(&outside).exists()).then_some(()))
    })
    .await?;
    container.remove().await?;
    refused(
        pod.try_create(|_| {}).await,
        Code::Internal,
        &["fake", "not in the pod's user namespace"],
    );
    // Nothing of it is left.
    let left = leaks::settle(&env, |env| {
        let tops = stage::cgroup_dirs(&env.cgroup);
        let dirs = tops.iter().flat_map(|top| stage::tree(top));
        let held = |dir: &PathBuf| std::fs::read_to_string(dir.join("cgroup.procs"));
        dirs.filter(|dir| held(dir).is_ok_and(|t| !t.is_empty()))
            .map(|dir| dir.display().to_string())
            .collect()
    });
    assert!(left.await.is_empty(), "processes are left");
    pod.stop().await?;
    pod.remove().await?;
    Ok(())
}

/// A pod of each handler, and one more in a user namespace where that can be had.
async fn with_and_without_users(
    daemon: &Daemon,
    handlers: Vec<&'static str>,
) -> Result<Vec<(String, Pod)>> {
    let mut pods = Vec::new();
    for handler in handlers {
        pods.push((handler.to_owned(), daemon.pod_under(handler).await?));
        if told_user_namespaces(daemon, handler).await? {
            let pod = mapped_pod(daemon, handler).await?;
            pods.push((format!("{handler}, with a user namespace"), pod));
        }
    }
    Ok(pods)
}

/// What a user of the container sees must not depend on who made it.
async fn everything_of_a_container(env: Env) -> Result<()> {
    let (daemon, all) = with_all(&env).await?;
    for (handler, pod) in with_and_without_users(&daemon, all).await? {
        let what = || format!("under {handler}");
        let container = pod
            .run(
                &["sh", "-c", "echo out; echo err >&2; exec sleep 1000"],
                |c| {
                    let resources = c
                        .linux
                        .get_or_insert_default()
                        .resources
                        .get_or_insert_default();
                    resources.memory_limit_in_bytes = 64 << 20;
                    c.working_dir = "/made/for/it".into();
                    container_security(c).run_as_user = Some(cri::Int64Value { value: 1000 });
                },
            )
            .await
            .with_context(what)?;
        container.says("out").await?;
        assert_eq!(container.stderr()?, "err\n", "{handler}");
        assert_eq!(container.exec_output(&["pwd"]).await?, "/made/for/it");
        assert_eq!(container.exec_output(&["id", "-u"]).await?, "1000");
        let exec = container
            .exec(&["sh", "-c", "echo o; echo e >&2; exit 9"])
            .await?;
        assert_eq!(
            (exec.stdout.as_str(), exec.stderr.as_str(), exec.code),
            ("o\n", "e\n", 9)
        );
        let late = container.exec_limited(&["sleep", "100"], 1).await;
        let late = late.err().context("an exec outlived its limit")?;
        assert_eq!(late.code(), Code::DeadlineExceeded, "{handler}: {late}");
        let update = cri::LinuxContainerResources {
            memory_limit_in_bytes: 96 << 20,
            ..Default::default()
        };
        container.update(update).await.with_context(what)?;
        let limit = match stage::unified() {
            true => container.cgroup_file("memory.max")?,
            false => container.cgroup_file("memory.limit_in_bytes")?,
        };
        assert_eq!(limit, (96 << 20).to_string(), "{handler}");
        let began = Instant::now();
        container.stop(1).await.with_context(what)?;
        // The sleep has no handler for SIGTERM, and as process 1 of its namespace does not get it.
        assert!(began.elapsed() < seconds(15), "{handler}");
        let status = container.status().await?;
        assert!(
            [137, 143].contains(&status.exit_code),
            "{handler}: {status:?}"
        );
        container.remove().await.with_context(what)?;
        pod.stop().await?;
        pod.remove().await?;
    }
    Ok(())
}

async fn commands_that_cannot_run(env: Env) -> Result<()> {
    let (daemon, all) = with_all(&env).await?;
    for (handler, pod) in with_and_without_users(&daemon, all).await? {
        for (command, code) in [
            ("/no/such/program", 127),
            ("no-such-program", 127),
            ("/etc/passwd", 126),
        ] {
            let container = pod.create(&[command], |_| {}).await?;
            let failure = container.start().await.err().context("it started")?;
            assert_eq!(
                failure.code(),
                Code::FailedPrecondition,
                "{handler}: {failure}"
            );
            let status = container.status().await?;
            assert_eq!(status.exit_code, code, "{handler} {command}: {status:?}");
            assert_eq!(
                status.reason, "ContainerCannotRun",
                "{handler} {command}: {status:?}"
            );
            container.remove().await?;
        }
        let running = pod.sleeper().await?;
        let exec = running.exec(&["/no/such/program"]).await?;
        assert_eq!(exec.code, 127, "{handler}: {exec:?}");
        assert!(
            exec.stderr.contains("/no/such/program"),
            "{handler}: {exec:?}"
        );
        // One that is killed before it was started, and known not to be able to.
        let never = pod.create(&["/no/such/program"], |_| {}).await?;
        let began = Instant::now();
        never.stop(10).await?;
        never.remove().await?;
        assert!(began.elapsed() < Duration::from_secs(5), "{handler}");
    }
    Ok(())
}

/// A runtime in front of a real one: `script` may act on `$command` and its arguments before that does.
async fn fake(env: &Env, script: &str, change: impl FnOnce(&mut Setup)) -> Result<Daemon> {
    let real = program(runtimes()?[0]).context("its path")?;
    let path = env.root.join("fake");
    let text = format!(
        "#!/bin/sh\nreal={}\ncommand=\nfor word in \"$@\"; do\n  case $word in\n    \
         create|start|state|kill|delete|exec|update|features|--version) command=$word; break;;\n  esac\ndone\n\
         {script}\nexec \"$real\" \"$@\"\n",
        real.display()
    );
    let draft = env.root.join("fake.draft");
    std::fs::write(&draft, text)?;
    std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o755))?;
    // Not by this process, whose children may hold it open for writing.
    output(
        "cp",
        &[&draft.display().to_string(), &path.display().to_string()],
    )
    .await?;
    let daemon = env
        .daemon_with(|s| {
            describe(s, "fake", &path.display().to_string());
            change(s);
        })
        .await?;
    daemon.pull("test").await?;
    Ok(daemon)
}

async fn a_runtime_that_hangs(env: Env) -> Result<()> {
    // Enough for those that don't hang, on an emulated machine, too.
    let limit = format!("{}s", seconds(2).as_secs());
    for command in ["create", "start", "kill", "delete", "exec", "update"] {
        let at = env.dir(&format!("h-{command}"))?;
        let flag = at.join("hang");
        // The first and the last have children that would live on.
        let script = format!(
            "if [ \"$command\" = {command} ] && [ -e {} ]; then echo stuck in {command} >&2; trap '' TERM; \
             sleep 1000 & while :; do sleep 1; done; fi",
            flag.display()
        );
        std::fs::write(env.root.join("script"), script)?;
        let daemon = match env.daemons_now().first() {
            Some(daemon) => daemon.clone(),
            None => {
                let script = format!(". {}", env.root.join("script").display());
                fake(&env, &script, |s| {
                    s.set("runtimes.fake.create_timeout", &format!("\"{limit}\""));
                })
                .await?
            }
        };
        let pod = daemon.pod_under("fake").await?;
        std::fs::write(&flag, "")?;
        let began = Instant::now();
        let within = |limit: u64, what: &str| {
            let took = began.elapsed();
            assert!(took < seconds(limit), "{command}: {what} took {took:?}");
        };
        match command {
            "create" => {
                let refusal = pod.try_create(|_| {}).await;
                refused(
                    refusal,
                    Code::DeadlineExceeded,
                    &["create", "stuck in create", &limit],
                );
                within(20, "CreateContainer");
            }
            "start" => {
                let container = pod.create(&["sleep", "1000"], |_| {}).await?;
                refused(container.start().await, Code::DeadlineExceeded, &["start"]);
                within(60, "StartContainer");
                assert_eq!(
                    container.exited().await?.state(),
                    cri::ContainerState::ContainerExited
                );
            }
            "exec" => {
                let container = pod.sleeper().await?;
                let late = container.exec_limited(&["true"], 1).await;
                let late = late.err().context("the exec ended")?;
                assert_eq!(late.code(), Code::DeadlineExceeded, "{late}");
                within(20, "ExecSync");
            }
            "update" => {
                let container = pod.sleeper().await?;
                let update = cri::LinuxContainerResources {
                    memory_limit_in_bytes: 96 << 20,
                    ..Default::default()
                };
                let refusal = container.update(update).await;
                refused(
                    refusal,
                    Code::DeadlineExceeded,
                    &["update", "nothing was changed"],
                );
                within(60, "UpdateContainerResources");
            }
            _ => {
                let container = pod.sleeper().await?;
                container.stop(1).await?;
                within(30, "StopContainer");
            }
        }
        // By force, whatever the runtime does.
        let began = Instant::now();
        pod.stop()
            .await
            .with_context(|| format!("{command}: StopPodSandbox"))?;
        pod.remove()
            .await
            .with_context(|| format!("{command}: RemovePodSandbox"))?;
        let took = began.elapsed();
        assert!(took < seconds(45), "{command}: the pod's end took {took:?}");
        std::fs::remove_file(&flag)?;
    }
    Ok(())
}

async fn a_runtime_that_crashes(env: Env) -> Result<()> {
    // Half way: the real one has made the container, and nobody has said so.
    let script = "if [ \"$command\" = create ]; then \"$real\" \"$@\"; kill -SEGV $$; fi";
    let daemon = fake(&env, script, |_| {}).await?;
    let pod = daemon.pod_under("fake").await?;
    let refusal = pod.try_create(|_| {}).await;
    refused(refusal, Code::Internal, &["fake", "signal 11"]);
    let left = leaks::settle(&env, |env| {
        stage::cgroup_dirs(&env.cgroup)
            .iter()
            .flat_map(|top| stage::tree(top))
            .filter(|dir| {
                std::fs::read_to_string(dir.join("cgroup.procs")).is_ok_and(|t| !t.is_empty())
            })
            .map(|dir| dir.display().to_string())
            .collect()
    });
    assert!(left.await.is_empty(), "processes are left");
    pod.stop().await?;
    pod.remove().await?;
    Ok(())
}

async fn a_runtime_that_prints_no_json(env: Env) -> Result<()> {
    let script = "if [ \"$command\" = create ]; then echo '<html>no can do</html>' >&2; exit 4; fi
        if [ \"$command\" = features ]; then echo certainly; exit 0; fi";
    let daemon = fake(&env, script, |_| {}).await?;
    let pod = daemon.pod_under("fake").await?;
    let refusal = pod.try_create(|_| {}).await;
    refused(
        refusal,
        Code::Internal,
        &["fake", "create", "<html>no can do</html>"],
    );
    // On a terminal its words have another way.
    let refusal = pod.try_create(|c| c.tty = true).await;
    refused(
        refusal,
        Code::Internal,
        &["fake", "create", "<html>no can do</html>"],
    );
    Ok(())
}

async fn a_runtime_that_leaves_its_container(env: Env) -> Result<()> {
    let script = "if [ \"$command\" = delete ]; then echo not me >&2; exit 1; fi";
    let daemon = fake(&env, script, |_| {}).await?;
    let pod = daemon.pod_under("fake").await?;
    let container = pod.sleeper().await?;
    container.remove().await?;
    pod.sleeper().await?;
    pod.create(&["true"], |_| {}).await?;
    pod.stop().await?;
    pod.remove().await?;
    // The runner looks for what is left, its state included.
    Ok(())
}

async fn a_runtime_that_lies_about_the_process(env: Env) -> Result<()> {
    let script = "if [ \"$command\" = create ]; then
          file=; for word in \"$@\"; do [ \"$file\" = next ] && file=$word; [ \"$word\" = --pid-file ] && file=next; done
          case $file in next|'') ;; *) [ -e ${0}.pid ] && cat ${0}.pid > $file;; esac; exit 0; fi";
    let daemon = fake(&env, script, |_| {}).await?;
    let pod = daemon.pod_under("fake").await?;
    refused(
        pod.try_create(|_| {}).await,
        Code::Internal,
        &["no process id"],
    );
    let mut bystander = tokio::process::Command::new("sleep")
        .arg("1000")
        .kill_on_drop(true)
        .spawn()?;
    let pid = bystander.id().context("its process id")?;
    std::fs::write(env.root.join("fake.pid"), pid.to_string())?;
    let refusal = pod.try_create(|_| {}).await;
    refused(
        refusal,
        Code::Internal,
        &[&pid.to_string(), "none of the pod's"],
    );
    pod.stop().await?;
    pod.remove().await?;
    assert!(
        bystander.try_wait()?.is_none(),
        "a process of somebody else was killed"
    );
    bystander.kill().await?;
    Ok(())
}

/// As one with virtual machines: the process that it names is of the host's.
async fn a_runtime_whose_containers_are_elsewhere(env: Env) -> Result<()> {
    let criu = crate::checkpoint::script(&env, "exit 1")?;
    let script = r#"if [ "$command" = create ]; then
          file=; for word in "$@"; do [ "$file" = next ] && file=$word; [ "$word" = --pid-file ] && file=next; done
          sleep 1000 </dev/null >/dev/null 2>&1 & echo $! > $file
          # On pure v2 what stays where the runtime was born is ended.
          procs=/sys/fs/cgroup$(sed -n 's/.*"cgroupsPath":"\([^"]*\)".*/\1/p' config.json)/cgroup.procs
          [ ! -e $procs ] || echo $! > $procs; fi
          [ "$command" = create ] || [ "$command" = start ] && exit 0"#;
    let change = |s: &mut Setup| s.set("checkpoint.criu", &format!("{criu:?}"));
    let daemon = fake(&env, script, change).await?;
    let pod = daemon.pod_under("fake").await?;
    let container = pod.run(&["sleep", "1000"], |_| {}).await?;
    let location = env.root.join("c.tar");
    let answer = crate::checkpoint::checkpoint(&container, &location, 0).await;
    refused(
        answer,
        Code::Unimplemented,
        &[&container.id, "virtual machine"],
    );
    crate::checkpoint::nothing_left(&daemon, &location).await
}
