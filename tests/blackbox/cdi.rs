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
