//! AppArmor profiles: which one the first process and exec sessions of a container are under, and what that
//! keeps them from.

use std::io::Write as _;
use std::process::{Command, Stdio};

use cri::security_profile::ProfileType;
use tonic::Code;

use crate::harness::*;

tests![
    who_says_nothing_gets_the_default,
    the_default_keeps_from_what_capabilities_would_allow,
    localhost_profiles_bind_init_and_exec,
    what_is_not_loaded_is_refused,
    privileged_and_unconfined_have_none,
    another_default_by_configuration,
];

/// Skips the test where there is no AppArmor, or nothing to load profiles with.
fn needs_apparmor() -> Result<()> {
    let enabled = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    if !enabled.is_ok_and(|text| text.starts_with('Y')) {
        return skip("AppArmor is off on this host; hack/vm test runs a machine where it is on");
    }
    if Command::new("apparmor_parser")
        .arg("--version")
        .output()
        .is_err()
    {
        return skip("apparmor_parser is not installed");
    }
    Ok(())
}

/// A profile of the test's own, unloaded when dropped.
struct Loaded {
    name: String,
    text: String,
}

impl Loaded {
    fn new(env: &Env, rules: &str) -> Result<Self> {
        let name = format!("slipway-test-{}-{}", std::process::id(), env.fresh());
        let text =
            format!("profile {name} flags=(attach_disconnected) {{ file, signal, {rules} }}\n");
        let profile = Self { name, text };
        ensure!(
            profile.parser("--replace")?,
            "{} can't be loaded",
            profile.text
        );
        Ok(profile)
    }

    fn parser(&self, action: &str) -> Result<bool> {
        let mut parser = Command::new("apparmor_parser")
            .args([action, "--skip-cache"])
            .stdin(Stdio::piped())
            .spawn()?;
        parser
            .stdin
            .take()
            .context("stdin")?
            .write_all(self.text.as_bytes())?;
        Ok(parser.wait()?.success())
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        let _ = self.parser("--remove");
    }
}

fn profile(kind: ProfileType, name: &str) -> Option<cri::SecurityProfile> {
    Some(cri::SecurityProfile {
        profile_type: kind.into(),
        localhost_ref: name.into(),
    })
}

/// The profiles of a container's first process and of an exec session.
async fn profiles(
    pod: &Pod,
    change: impl FnOnce(&mut cri::ContainerConfig),
) -> Result<[String; 2]> {
    let show = ["cat", "/proc/self/attr/current"];
    let script = [
        "sh",
        "-c",
        "cat /proc/self/attr/current; echo done; exec sleep 1000",
    ];
    let container = pod.run(&script, change).await?;
    container.says("done").await?;
    let init = container
        .stdout()?
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned();
    let exec = container.exec_output(&show).await?.trim().to_owned();
    Ok([init, exec])
}

async fn who_says_nothing_gets_the_default(env: Env) -> Result<()> {
    needs_apparmor()?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let default = || ["slipway-default (enforce)"; 2].map(str::to_owned);
    assert_eq!(profiles(&pod, |_| {}).await?, default());
    let asked = |c: &mut cri::ContainerConfig| {
        container_security(c).apparmor = profile(ProfileType::RuntimeDefault, "");
    };
    assert_eq!(profiles(&pod, asked).await?, default());
    Ok(())
}

async fn the_default_keeps_from_what_capabilities_would_allow(env: Env) -> Result<()> {
    needs_apparmor()?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    // All that other walls are down, and the profile stands alone.
    let open = |kind| {
        move |c: &mut cri::ContainerConfig| {
            let security = container_security(c);
            security.capabilities = Some(cri::Capability {
                add_capabilities: vec!["ALL".into()],
                ..Default::default()
            });
            security.seccomp = profile(ProfileType::Unconfined, "");
            security.apparmor = profile(kind, "");
            security.masked_paths.clear();
            security.readonly_paths.clear();
        }
    };
    let attempts = [
        "mount -t tmpfs none /mnt",
        "echo 1 >/proc/sys/vm/drop_caches",
        "true 2>/dev/null </proc/kcore",
        "echo h >/proc/sysrq-trigger",
    ];
    let allowed = [
        "echo 1 >/proc/self/oom_score_adj",
        "echo x >/tmp/x",
        "kill -0 1",
        "echo 0 >/proc/sys/kernel/shm_rmid_forced",
    ];
    for (kind, refused) in [
        (ProfileType::RuntimeDefault, true),
        (ProfileType::Unconfined, false),
    ] {
        let container = pod.run(&["sleep", "1000"], open(kind)).await?;
        container.exec_output(&["mkdir", "-p", "/mnt"]).await?;
        for attempt in attempts {
            let done = container.exec(&["sh", "-c", attempt]).await?;
            assert_eq!(
                done.code != 0,
                refused,
                "{attempt} under {kind:?}: {}{}",
                done.stdout,
                done.stderr
            );
        }
        for attempt in allowed {
            let done = container.exec(&["sh", "-c", attempt]).await?;
            assert_eq!(
                done.code, 0,
                "{attempt} under {kind:?}: {}{}",
                done.stdout, done.stderr
            );
        }
    }
    Ok(())
}

async fn localhost_profiles_bind_init_and_exec(env: Env) -> Result<()> {
    needs_apparmor()?;
    let daemon = env.daemon().await?;
    let loaded = Loaded::new(&env, "deny /** w,")?;
    let pod = daemon.pod(|_| {}).await?;
    let expected = [
        format!("{} (enforce)", loaded.name),
        format!("{} (enforce)", loaded.name),
    ];
    let new = |c: &mut cri::ContainerConfig| {
        container_security(c).apparmor = profile(ProfileType::Localhost, &loaded.name);
    };
    #[allow(deprecated)]
    let old = |c: &mut cri::ContainerConfig| {
        container_security(c).apparmor_profile = format!("localhost/{}", loaded.name);
    };
    // The new field goes before the old one.
    #[allow(deprecated)]
    let both = |c: &mut cri::ContainerConfig| {
        new(c);
        container_security(c).apparmor_profile = "localhost/not-there".into();
    };
    let found = profiles(&pod, new).await?;
    assert_eq!(found, expected);
    assert_eq!(profiles(&pod, old).await?, expected);
    assert_eq!(profiles(&pod, both).await?, expected);
    let touch = pod.run(&["touch", "/x"], new).await?;
    assert_ne!(touch.exited().await?.exit_code, 0);
    let container = pod.run(&["sleep", "1000"], new).await?;
    assert_ne!(container.exec(&["touch", "/x"]).await?.code, 0);
    // Can be stopped, too: the runtime is nobody that a profile would keep out.
    container.stop(0).await?;
    Ok(())
}

async fn what_is_not_loaded_is_refused(env: Env) -> Result<()> {
    needs_apparmor()?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let missing = |c: &mut cri::ContainerConfig| {
        container_security(c).apparmor = profile(ProfileType::Localhost, "localhost/not-there");
    };
    let error = pod.try_create(missing).await.expect_err("not loaded");
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(
        error.message().contains("not-there") && error.message().contains("apparmor_parser"),
        "{error}"
    );
    Ok(())
}

async fn privileged_and_unconfined_have_none(env: Env) -> Result<()> {
    needs_apparmor()?;
    let daemon = env.daemon().await?;
    let none = ["unconfined"; 2].map(str::to_owned);
    let pod = daemon.pod(|_| {}).await?;
    let unconfined = |c: &mut cri::ContainerConfig| {
        container_security(c).apparmor = profile(ProfileType::Unconfined, "");
    };
    assert_eq!(profiles(&pod, unconfined).await?, none);
    let pod = daemon.pod(|p| pod_security(p).privileged = true).await?;
    let privileged = |c: &mut cri::ContainerConfig| {
        let security = container_security(c);
        security.privileged = true;
        security.apparmor = profile(ProfileType::RuntimeDefault, "");
    };
    assert_eq!(profiles(&pod, privileged).await?, none);
    Ok(())
}

async fn another_default_by_configuration(env: Env) -> Result<()> {
    needs_apparmor()?;
    let loaded = Loaded::new(&env, "")?;
    let name = format!("\"{}\"", loaded.name);
    let daemon = env
        .daemon_with(|s| s.set("pod.apparmor_profile", &name))
        .await?;
    daemon.pull("test").await?;
    let pod = daemon.pod(|_| {}).await?;
    let expected = [
        format!("{} (enforce)", loaded.name),
        format!("{} (enforce)", loaded.name),
    ];
    assert_eq!(profiles(&pod, |_| {}).await?, expected);
    drop(loaded);
    // Now it is gone: who asks for it is refused, who says nothing runs without.
    let asked = |c: &mut cri::ContainerConfig| {
        container_security(c).apparmor = profile(ProfileType::RuntimeDefault, "");
    };
    let error = pod.try_create(asked).await.expect_err("not loaded");
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(error.message().contains("pod.apparmor_profile"), "{error}");
    assert_eq!(
        profiles(&pod, |_| {}).await?,
        ["unconfined"; 2].map(str::to_owned)
    );
    Ok(())
}
