//! Devices that vendors describe (Container Device Interface).

use std::path::PathBuf;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use tonic::Code;

use crate::harness::*;

tests![
    every_kind_of_edit,
    files_are_read_again,
    hooks_are_run_with_the_state,
    a_failing_hook_is_told,
    hooks_around_the_life_of_a_container,
    hooks_that_fail_after_the_start,
    a_slow_hook_stops_nobody_else,
    hooks_after_the_end_of_a_keeper,
    bad_cdi_requests_are_refused,
    privileged_without_host_devices,
];

/// A daemon whose CDI files are in two directories of the test's own.
async fn daemon(env: &Env) -> Result<(Daemon, [PathBuf; 2])> {
    let dirs = [env.dir("cdi.low")?, env.dir("cdi.high")?];
    let daemon = env
        .daemon_with(|s| s.set("pod.cdi_dirs", &format!("{dirs:?}")))
        .await?;
    daemon.pull("test").await?;
    Ok((daemon, dirs))
}

fn file(edits: &str) -> String {
    format!(
        r#"{{"cdiVersion":"0.6.0","kind":"vendor.com/gpu","devices":[{{"name":"0","containerEdits":{edits}}}]}}"#
    )
}

fn gpu(c: &mut cri::ContainerConfig) {
    c.cdi_devices = vec![cri::CdiDevice {
        name: "vendor.com/gpu=0".into(),
    }];
}

async fn every_kind_of_edit(env: Env) -> Result<()> {
    let (daemon, [low, _]) = daemon(&env).await?;
    // kmsg: 1:11, which no container has by itself.
    let node = env.dir("devices")?.join("kmsg");
    let mode = Mode::from_bits_truncate(0o660);
    mknod(&node, SFlag::S_IFCHR, mode, makedev(1, 11)).context("mknod")?;
    std::fs::set_permissions(&node, std::os::unix::fs::PermissionsExt::from_mode(0o660))?;
    let lib = env.dir("lib")?;
    std::fs::write(lib.join("libgpu"), "from the vendor")?;
    let edits = format!(
        r#"{{"env":["GPU=0"],"additionalGids":[4242],
            "deviceNodes":[{{"path":"/dev/gpu/0","hostPath":{node:?},"permissions":"rw"}},{{"path":"/dev/gpu/ro","hostPath":{node:?},"permissions":"r","type":"c"}}],
            "mounts":[{{"hostPath":{lib:?},"containerPath":"/usr/lib/gpu","options":["ro","nosuid","nodev","bind"]}}]}}"#
    );
    std::fs::write(low.join("gpu.json"), file(&edits))?;
    let pod = daemon.pod(|_| {}).await?;
    // By the field, and by an annotation.
    let asks: [fn(&mut cri::ContainerConfig); 2] = [gpu, |c| {
        let value = "vendor.com/gpu=0".to_owned();
        c.annotations.insert("cdi.k8s.io/plugin_0".into(), value);
    }];
    for (attempt, ask) in asks.into_iter().enumerate() {
        let container = pod
            .run(&["sleep", "1000"], |c| {
                c.metadata.get_or_insert_default().attempt = u32::try_from(attempt).unwrap_or(0);
                ask(c);
            })
            .await?;
        let output = async |command: &[&str]| container.exec_output(command).await;
        let node = output(&["stat", "-c", "%F %t:%T %a", "/dev/gpu/0"]).await?;
        assert_eq!(node, "character special file 1:b 660");
        let probe = output(&["probe", "writable", "/dev/gpu/0"]).await?;
        assert_eq!(probe.trim_end(), "/dev/gpu/0 OK");
        assert_eq!(
            output(&["cat", "/usr/lib/gpu/libgpu"]).await?,
            "from the vendor"
        );
        assert_eq!(output(&["sh", "-c", "echo $GPU"]).await?, "0");
        let groups = output(&["grep", "Groups", "/proc/self/status"]).await?;
        assert!(groups.contains("4242"), "{groups}");
        container.remove().await?;
    }
    // Nobody else has the device.
    let other = pod.sleeper().await?;
    other
        .exec_output(&["mknod", "/tmp/kmsg", "c", "1", "11"])
        .await?;
    let probe = other.exec(&["probe", "writable", "/tmp/kmsg"]).await?;
    assert_eq!(probe.stdout.trim_end(), "/tmp/kmsg EPERM");
    Ok(())
}

async fn files_are_read_again(env: Env) -> Result<()> {
    let (daemon, [low, high]) = daemon(&env).await?;
    let pod = daemon.pod(|_| {}).await?;
    let names = ["vendor.com/gpu=0", "cdi.low", "cdi.high"];
    refused(pod.try_create(gpu).await, Code::FailedPrecondition, &names);
    let value = async || pod.output(&["sh", "-c", "echo $GPU"], gpu).await;
    std::fs::write(low.join("gpu.json"), file(r#"{"env":["GPU=low"]}"#))?;
    std::fs::write(low.join("broken.yaml"), "devices: [")?;
    assert_eq!(value().await?, "low\n");
    std::fs::write(high.join("gpu.json"), file(r#"{"env":["GPU=high"]}"#))?;
    assert_eq!(value().await?, "high\n");
    std::fs::write(high.join("again.json"), file(r#"{"env":["GPU=again"]}"#))?;
    let names = ["gpu.json", "again.json", "vendor.com/gpu=0"];
    refused(pod.try_create(gpu).await, Code::FailedPrecondition, &names);
    std::fs::remove_file(high.join("gpu.json"))?;
    assert_eq!(value().await?, "again\n");
    let request = cri::StatusRequest { verbose: true };
    let info = daemon.runtime().status(request).await?.into_inner().info;
    assert!(info["cdi"].contains("vendor.com/gpu=0"), "{info:?}");
    assert!(info["cdi"].contains("broken.yaml"), "{info:?}");
    Ok(())
}

async fn hooks_are_run_with_the_state(env: Env) -> Result<()> {
    let (daemon, [low, _]) = daemon(&env).await?;
    let out = env.dir("hooks")?;
    let hook = |name: &str| {
        let script = format!("cat >{}/{name}; echo $WHO $0 >>{0}/order", out.display());
        format!(
            r#"{{"hookName":"{name}","path":"/bin/sh","args":["sh","-c",{script:?},"{name}"],"env":["WHO=vendor","PATH=/bin:/usr/bin"],"timeout":20}}"#
        )
    };
    let hooks = ["prestart", "createRuntime", "createContainer"]
        .map(hook)
        .join(",");
    std::fs::write(
        low.join("gpu.json"),
        file(&format!(r#"{{"hooks":[{hooks}]}}"#)),
    )?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.create(&["true"], gpu).await?;
    let order = read(out.join("order"))?;
    assert_eq!(
        order,
        "vendor prestart\nvendor createRuntime\nvendor createContainer"
    );
    for name in ["prestart", "createRuntime", "createContainer"] {
        let state: serde_json::Value = serde_json::from_str(&read(out.join(name))?)?;
        assert_eq!(state["id"], container.id.as_str(), "{state}");
        let bundle = state["bundle"].as_str().unwrap_or_default();
        let config = read(PathBuf::from(bundle).join("config.json"))?;
        assert!(config.contains("\"root\""), "{state}");
    }
    container.start().await?;
    assert_eq!(container.exited().await?.exit_code, 0);
    Ok(())
}

async fn a_failing_hook_is_told(env: Env) -> Result<()> {
    if handler() == "crun" {
        return skip("crun drops what hooks write");
    }
    let (daemon, [low, _]) = daemon(&env).await?;
    let pod = daemon.pod(|_| {}).await?;
    let hook = |script: &str| {
        file(&format!(
            r#"{{"hooks":[{{"hookName":"createRuntime","path":"/bin/sh","args":["sh","-c",{script:?}],"timeout":1}}]}}"#
        ))
    };
    std::fs::write(
        low.join("gpu.json"),
        hook("echo no driver here >&2; exit 3"),
    )?;
    let made = pod.try_create(gpu).await;
    refused(made, Code::Internal, &["hook", "3", "no driver here"]);
    std::fs::write(low.join("gpu.json"), hook("exec /bin/sleep 1000"))?;
    refused(
        pod.try_create(gpu).await,
        Code::Internal,
        &["hook", "timeout"],
    );
    // Those that the container's own init runs.
    let other =
        |name: &str| hook("echo $0 has no driver >&2; exit 4").replace("createRuntime", name);
    std::fs::write(low.join("gpu.json"), other("createContainer"))?;
    let made = pod.try_create(gpu).await;
    refused(made, Code::Internal, &["hook", "has no driver"]);
    std::fs::write(low.join("gpu.json"), other("startContainer"))?;
    let container = pod.create(&["echo", "never"], gpu).await?;
    let started = container.start().await;
    refused(
        started,
        Code::FailedPrecondition,
        &["startContainer", "/bin/sh", "4", "has no driver"],
    );
    let status = container.exited().await?;
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (128, "ContainerCannotRun")
    );
    assert_eq!(container.stdout()?, "");
    // A hook that succeeds leaves the container's own standard error in its place.
    let fine = hook("echo whispered >&2").replace("createRuntime", "createContainer");
    std::fs::write(low.join("gpu.json"), fine)?;
    let container = pod.run(&["sh", "-c", "echo mine >&2"], gpu).await?;
    container.exited().await?;
    assert_eq!(container.stderr()?, "mine\n");
    Ok(())
}

/// Hooks that write their state to files in `out`, called like them.
fn noting(out: &std::path::Path, names: &[&str], then: &str) -> String {
    let hook = |name: &&str| {
        let script = format!(
            "cat >{0}/{name}.new; mv {0}/{name}.new {0}/{name}; {then}",
            out.display()
        );
        format!(
            r#"{{"hookName":"{name}","path":"/bin/sh","args":["sh","-c",{script:?}],"env":["PATH=/bin:/usr/bin"],"timeout":20}}"#
        )
    };
    let hooks: Vec<_> = names.iter().map(hook).collect();
    file(&format!(r#"{{"hooks":[{}]}}"#, hooks.join(",")))
}

const LATE: [&str; 2] = ["poststart", "poststop"];

async fn hooks_around_the_life_of_a_container(env: Env) -> Result<()> {
    let (daemon, [low, _]) = daemon(&env).await?;
    let out = env.dir("hooks")?;
    let state = |name: &str| -> Result<serde_json::Value> {
        Ok(serde_json::from_str(&read(out.join(name))?)?)
    };
    std::fs::write(low.join("gpu.json"), noting(&out, &LATE, "true"))?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.create(&["sleep", "1000"], gpu).await?;
    assert!(!out.join("poststart").exists());
    container.start().await?;
    let told = state("poststart")?;
    assert_eq!(
        (&told["status"], &told["id"]),
        (&"running".into(), &container.id.as_str().into())
    );
    assert_eq!(told["pid"], container.pid()?);
    container.stop(0).await?;
    assert!(!out.join("poststop").exists(), "it is not deleted yet");
    // Over a restart of the daemon, too.
    daemon.kill(nix::sys::signal::Signal::SIGKILL).await?;
    daemon.launch().await?;
    container.remove().await?;
    let told = state("poststop")?;
    assert_eq!(
        (&told["status"], &told["id"]),
        (&"stopped".into(), &container.id.as_str().into())
    );
    assert!(told.get("pid").is_none(), "{told}");
    std::fs::remove_file(out.join("poststop"))?;
    // With its pod; and once.
    pod.run(&["sleep", "1000"], gpu).await?;
    pod.stop().await?;
    assert_eq!(state("poststop")?["status"], "stopped");
    std::fs::remove_file(out.join("poststop"))?;
    pod.remove().await?;
    assert!(!out.join("poststop").exists(), "it ran twice");
    // After a create that failed.
    let pod = daemon.pod(|_| {}).await?;
    let text = noting(&out, &["poststop"], "true").replace(
        "\"hooks\":[",
        r#""hooks":[{"hookName":"createRuntime","path":"/bin/false"},"#,
    );
    std::fs::write(low.join("gpu.json"), text)?;
    refused(pod.try_create(gpu).await, Code::Internal, &["hook"]);
    assert_eq!(state("poststop")?["status"], "stopped");
    Ok(())
}

async fn hooks_that_fail_after_the_start(env: Env) -> Result<()> {
    let (daemon, [low, _]) = daemon(&env).await?;
    let out = env.dir("hooks")?;
    let text = noting(&out, &LATE, "echo lost the device >&2; exit 5");
    std::fs::write(low.join("gpu.json"), text)?;
    let pod = daemon.pod(|_| {}).await?;
    // A warning, as the specification has it.
    let container = pod.run(&["sleep", "1000"], gpu).await?;
    let words = ["poststart", "exited with 5", "lost the device"];
    daemon.logged(0, &words).await?;
    assert_eq!(container.exec_output(&["echo", "well"]).await?, "well");
    container.remove().await?;
    daemon
        .logged(0, &["poststop", "exited with 5", "lost the device"])
        .await?;
    let hang = noting(&out, &LATE, "exec sleep 1000").replace("\"timeout\":20", "\"timeout\":1");
    std::fs::write(low.join("gpu.json"), hang)?;
    let container = pod.run(&["sleep", "1000"], gpu).await?;
    daemon.logged(0, &["poststart", "within 1s"]).await?;
    container.remove().await?;
    daemon.logged(0, &["poststop", "within 1s"]).await?;
    Ok(())
}

async fn a_slow_hook_stops_nobody_else(env: Env) -> Result<()> {
    let (daemon, [low, _]) = daemon(&env).await?;
    let out = env.dir("hooks")?;
    let wait = format!("until [ -e {}/go ]; do sleep 0.05; done", out.display());
    std::fs::write(low.join("gpu.json"), noting(&out, &LATE, &wait))?;
    let pod = daemon.pod(|_| {}).await?;
    let other = pod
        .run(&["sh", "-c", "while sleep 0.1; do echo tick; done"], |_| {})
        .await?;
    let slow = pod.create(&["sleep", "1000"], gpu).await?;
    let ticks = || -> Result<usize> { Ok(other.stdout()?.len()) };
    for (name, call) in [("poststart", true), ("poststop", false)] {
        let container = slow.clone();
        let task = tokio::spawn(async move {
            match call {
                true => container.start().await,
                false => container.remove().await,
            }
        });
        eventually("the hook", seconds(10), || async {
            Ok(out.join(name).exists().then_some(()))
        })
        .await?;
        let before = ticks()?;
        eventually("output of another container", seconds(10), || async {
            Ok((ticks()? > before + 10).then_some(()))
        })
        .await?;
        assert_eq!(other.exec_output(&["echo", "well"]).await?, "well");
        assert!(
            !task.is_finished(),
            "{name}: the call must wait for its hooks"
        );
        std::fs::write(out.join("go"), "")?;
        task.await??;
        std::fs::remove_file(out.join("go"))?;
    }
    Ok(())
}

async fn hooks_after_the_end_of_a_keeper(env: Env) -> Result<()> {
    let (daemon, [low, _]) = daemon(&env).await?;
    let out = env.dir("hooks")?;
    std::fs::write(low.join("gpu.json"), noting(&out, &LATE, "true"))?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.run(&["sleep", "1000"], gpu).await?;
    let (keeper, _) = container.keeper()?;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(keeper),
        nix::sys::signal::Signal::SIGKILL,
    )?;
    container.exited().await?;
    assert!(!out.join("poststop").exists());
    pod.stop().await?;
    pod.remove().await?;
    assert!(read(out.join("poststop"))?.contains(&container.id));
    Ok(())
}

async fn bad_cdi_requests_are_refused(env: Env) -> Result<()> {
    let (daemon, [low, _]) = daemon(&env).await?;
    let pod = daemon.pod(|_| {}).await?;
    for name in ["", "gpu", "vendor.com/gpu", "vendor.com/gpu=", "../x/y=z"] {
        let made = pod.try_create(|c| c.cdi_devices = vec![cri::CdiDevice { name: name.into() }]);
        refused(made.await, Code::InvalidArgument, &[name]);
    }
    let made = pod.try_create(|c| drop(c.annotations.insert("cdi.k8s.io/x".into(), "junk".into())));
    refused(made.await, Code::InvalidArgument, &["junk"]);
    let missing = r#"{"deviceNodes":[{"path":"/dev/no-such-gpu"}]}"#;
    std::fs::write(low.join("gpu.json"), file(missing))?;
    let names = ["/dev/no-such-gpu", "vendor.com/gpu=0", "gpu.json"];
    refused(pod.try_create(gpu).await, Code::FailedPrecondition, &names);
    Ok(())
}

async fn privileged_without_host_devices(env: Env) -> Result<()> {
    native_only("it has handlers of its own")?;
    let daemon = env
        .daemon_with(|s| {
            let handlers = "{ native = { type = \"native\" }, \
                            tight = { type = \"native\", privileged_without_host_devices = true } }";
            s.set("runtimes", handlers);
            s.set("default_runtime", "\"tight\"");
        })
        .await?;
    daemon.pull("test").await?;
    let pod = daemon.pod(|c| pod_security(c).privileged = true).await?;
    let container = pod
        .run(&["sleep", "1000"], |c| {
            container_security(c).privileged = true
        })
        .await?;
    container
        .exec_output(&["mknod", "/tmp/kmsg", "c", "1", "11"])
        .await?;
    let probe = container.exec(&["probe", "writable", "/tmp/kmsg"]).await?;
    assert_eq!(probe.stdout.trim_end(), "/tmp/kmsg EPERM");
    assert_ne!(container.exec(&["test", "-e", "/dev/kmsg"]).await?.code, 0);
    Ok(())
}
