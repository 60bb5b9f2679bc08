//! OCI hooks that the node's directories give to containers.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use tonic::Code;

use crate::harness::*;

tests![
    hooks_apply_where_they_say,
    a_broken_file_does_not_keep_the_others,
    a_hook_that_fails_fails_the_container,
    hooks_after_the_start_and_the_end,
];

/// A program that appends a word and the state's id to a file.
async fn recorder(env: &Env) -> Result<(PathBuf, PathBuf)> {
    let (program, record) = (env.root.join("record"), env.root.join("recorded"));
    let text = format!(
        "#!/bin/sh\nid=$(sed 's/.*\"id\": *\"\\([0-9a-f]*\\)\".*/\\1/' | tr -d '\\n')\n\
         echo \"$1 $id\" >> {}\nexit ${{2:-0}}\n",
        record.display()
    );
    let draft = env.root.join("record.draft");
    std::fs::write(&draft, text)?;
    std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o755))?;
    output(
        "cp",
        &[&draft.display().to_string(), &program.display().to_string()],
    )
    .await?;
    Ok((program, record))
}

fn write(dir: &Path, name: &str, hook: serde_json::Value) -> Result<()> {
    Ok(std::fs::write(dir.join(name), hook.to_string())?)
}

async fn daemon(env: &Env) -> Result<(Daemon, PathBuf)> {
    let dir = env.dir("hooks.d")?;
    let shown = dir.display().to_string();
    let daemon = env
        .daemon_with(|s| s.set("pod.hooks_dirs", &format!("[{shown:?}]")))
        .await?;
    daemon.pull("test").await?;
    Ok((daemon, dir))
}

fn recorded(file: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

async fn hooks_apply_where_they_say(env: Env) -> Result<()> {
    let (program, record) = recorder(&env).await?;
    let (daemon, dir) = daemon(&env).await?;
    let hook = |word: &str, when: serde_json::Value| {
        serde_json::json!({
            "version": "1.0.0",
            "hook": {"path": program, "args": ["record", word]},
            "when": when,
            "stages": ["createRuntime"],
        })
    };
    // Written while it runs: the next container has them.
    write(
        &dir,
        "20-all.json",
        hook("all", serde_json::json!({"always": true})),
    )?;
    write(
        &dir,
        "10-mounts.json",
        hook("mounts", serde_json::json!({"hasBindMounts": true})),
    )?;
    write(
        &dir,
        "30-sleep.json",
        hook("sleep", serde_json::json!({"commands": ["^sleep$"]})),
    )?;
    let annotated = serde_json::json!({"annotations": {"^org\\.example\\.gpu$": "^[12]$"}});
    write(&dir, "40-gpu.json", hook("gpu", annotated))?;
    let pod = daemon
        .pod(|c| drop(c.annotations.insert("org.example.gpu".into(), "2".into())))
        .await?;
    let mount = cri::Mount {
        host_path: env.dir("data")?.display().to_string(),
        container_path: "/data".into(),
        ..Default::default()
    };
    let all = pod
        .run(&["sleep", "1000"], |c| c.mounts = vec![mount])
        .await?;
    let expected: Vec<_> = ["mounts", "all", "sleep", "gpu"]
        .map(|word| format!("{word} {}", all.id))
        .to_vec();
    assert_eq!(recorded(&record), expected);
    std::fs::remove_file(&record)?;
    let other = daemon.pod(|_| {}).await?;
    let one = other.run(&["true"], |_| {}).await?;
    assert_eq!(recorded(&record), [format!("all {}", one.id)]);
    Ok(())
}

async fn a_broken_file_does_not_keep_the_others(env: Env) -> Result<()> {
    let (program, record) = recorder(&env).await?;
    let (daemon, dir) = daemon(&env).await?;
    std::fs::write(dir.join("10-broken.json"), "{\"version\": \"1.0.0\", ")?;
    write(
        &dir,
        "20-good.json",
        serde_json::json!({
            "version": "1.0.0", "hook": {"path": program, "args": ["record", "good"]},
            "when": {"always": true}, "stages": ["prestart"],
        }),
    )?;
    let container = daemon.pod(|_| {}).await?.run(&["true"], |_| {}).await?;
    assert_eq!(recorded(&record), [format!("good {}", container.id)]);
    daemon
        .logged(0, &["10-broken.json", "can't be used"])
        .await?;
    let request = cri::StatusRequest { verbose: true };
    let status = daemon.runtime().status(request).await?.into_inner();
    let hooks: serde_json::Value =
        serde_json::from_str(status.info.get("hooks").context("info of hooks")?)?;
    let rejected = hooks["rejected"][0]["path"].as_str().unwrap_or_default();
    assert!(rejected.ends_with("10-broken.json"), "{hooks}");
    Ok(())
}

async fn a_hook_that_fails_fails_the_container(env: Env) -> Result<()> {
    let (program, record) = recorder(&env).await?;
    let (daemon, dir) = daemon(&env).await?;
    write(
        &dir,
        "10-fails.json",
        serde_json::json!({
            "version": "1.0.0", "hook": {"path": program, "args": ["record", "fails", "7"]},
            "when": {"always": true}, "stages": ["createRuntime"],
        }),
    )?;
    let pod = daemon.pod(|_| {}).await?;
    let refusal = pod.try_create(|_| {}).await;
    refused(refusal, Code::Internal, &["hook"]);
    assert_eq!(recorded(&record).len(), 1);
    std::fs::remove_file(dir.join("10-fails.json"))?;
    let container = pod.run(&["true"], |_| {}).await?;
    assert_eq!(container.exited().await?.exit_code, 0);
    Ok(())
}

async fn hooks_after_the_start_and_the_end(env: Env) -> Result<()> {
    let (program, record) = recorder(&env).await?;
    let (daemon, dir) = daemon(&env).await?;
    write(
        &dir,
        "10-late.json",
        serde_json::json!({
            "version": "1.0.0", "hook": {"path": program, "args": ["record", "late"]},
            "when": {"always": true}, "stages": ["poststart", "poststop"],
        }),
    )?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.run(&["sleep", "1000"], |_| {}).await?;
    assert_eq!(recorded(&record).len(), 1, "after the start");
    container.stop(0).await?;
    container.remove().await?;
    assert_eq!(recorded(&record).len(), 2, "after the end");
    Ok(())
}
