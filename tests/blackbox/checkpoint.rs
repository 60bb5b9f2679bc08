//! CheckpointContainer and CheckpointPod. What goes wrong is tested with a criu of ours that hangs or fails; what
//! goes right needs a criu that works on this kernel (`SLIPWAY_TEST_CRIU` names one, or else that of PATH).

use std::collections::BTreeMap;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use tonic::{Code, Status};

use crate::harness::*;
use crate::stream::{STDIN, STDOUT, exec};

tests![
    a_checkpoint_is_whole_and_the_container_goes_on,
    a_pod_is_one_checkpoint,
    sessions_are_no_part_of_it,
    what_cannot_be_checkpointed,
    no_criu,
    a_criu_that_fails,
    a_criu_that_hangs,
    commands_wait_for_its_end,
    the_daemon_is_killed_in_the_middle,
    the_caller_gives_up,
];

/// Counts in memory, and says so.
pub const COUNTER: &[&str] = &[
    "sh",
    "-c",
    "echo new > /made; rm /etc/group; i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done",
];

/// A criu that works here.
pub fn criu() -> Result<String> {
    let name = std::env::var("SLIPWAY_TEST_CRIU").unwrap_or_else(|_| "criu".to_owned());
    match std::process::Command::new(&name).arg("check").output() {
        Ok(output) if output.status.success() => Ok(name),
        Ok(output) => skip(format!(
            "{name} check: {}",
            String::from_utf8_lossy(&output.stderr)
                .lines()
                .next()
                .unwrap_or_default()
        )),
        Err(e) => skip(format!("{name} can't be run: {e}")),
    }
}

/// A daemon with this criu.
pub async fn daemon_with(env: &Env, criu: &str) -> Result<Daemon> {
    if gvisor() || handler().starts_with("shim-") {
        return skip(format!("handler {} refuses checkpoints by name", handler()));
    }
    let daemon = env
        .daemon_with(|s| s.set("checkpoint.criu", &format!("{criu:?}")))
        .await?;
    daemon.pull("test").await?;
    Ok(daemon)
}

/// A criu that passes the check and then does as `then` says; it takes the place of one that is there.
pub fn script(env: &Env, then: &str) -> Result<String> {
    let path = env.root.join("criu");
    let draft = env.root.join("criu.new");
    let text = format!("#!/bin/sh\n[ \"$1\" = check ] && exit 0\n{then}\n");
    std::fs::write(&draft, text)?;
    std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o755))?;
    std::fs::rename(&draft, &path)?;
    Ok(path.display().to_string())
}

async fn with_script(env: &Env, then: &str) -> Result<Daemon> {
    daemon_with(env, &script(env, then)?).await
}

/// A container of such a handler is refused, and nothing happens to it.
pub async fn is_refused(daemon: &Daemon, handler: &str, why: &str) -> Result<()> {
    let pod = daemon.pod_under(handler).await?;
    let container = pod.sleeper().await?;
    let location = daemon.env().root.join("c.tar");
    let answer = checkpoint(&container, &location, 0).await;
    refused(answer, Code::Unimplemented, &[&container.id, why]);
    container.exec_output(&["true"]).await?;
    nothing_left(daemon, &location).await
}

async fn with_criu(env: &Env) -> Result<Daemon> {
    daemon_with(env, &criu()?).await
}

pub async fn checkpoint(
    container: &Container,
    location: &Path,
    timeout: i64,
) -> Result<(), Status> {
    let request = cri::CheckpointContainerRequest {
        container_id: container.id.clone(),
        location: location.display().to_string(),
        timeout,
    };
    let mut client = container.daemon.runtime();
    client.checkpoint_container(request).await.map(drop)
}

pub async fn counter(daemon: &Daemon) -> Result<Container> {
    let container = daemon.run(COUNTER).await?;
    container.says("3").await?;
    Ok(container)
}

pub fn count(container: &Container) -> Result<u64> {
    let text = container.stdout()?;
    text.lines()
        .last()
        .unwrap_or_default()
        .parse()
        .context("a number")
}

/// It counts further than it has now, without having begun anew.
async fn goes_on(container: &Container) -> Result<()> {
    let before = count(container)?;
    container.says(&(before + 3).to_string()).await?;
    assert!(!is_frozen(container)?);
    let text = container.stdout()?;
    assert_eq!(text.lines().filter(|line| *line == "1").count(), 1);
    Ok(())
}

fn is_frozen(container: &Container) -> Result<bool> {
    match container.cgroup_file("freezer.state") {
        Ok(state) => Ok(state.trim() != "THAWED"),
        Err(_) => Ok(container.cgroup_file("cgroup.freeze")?.trim() == "1"),
    }
}

async fn frozen(container: &Container) -> Result<()> {
    eventually("a frozen container", seconds(20), || async {
        Ok(is_frozen(container)?.then_some(()))
    })
    .await
}

async fn thawed(container: &Container) -> Result<()> {
    eventually("a thawed container", seconds(20), || async {
        Ok((!is_frozen(container)?).then_some(()))
    })
    .await
}

/// Nothing is left of a checkpoint that came to nothing.
pub async fn nothing_left(daemon: &Daemon, location: &Path) -> Result<()> {
    assert!(!location.exists());
    let dir = daemon.env().root.join("state/checkpoints");
    eventually("an empty directory of checkpoints", seconds(20), || async {
        let mut left = std::fs::read_dir(&dir).into_iter().flatten();
        Ok(left.next().is_none().then_some(()))
    })
    .await
}

pub fn files(archive: impl std::io::Read) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
    let mut found = BTreeMap::new();
    for entry in tar::Archive::new(archive).entries()? {
        let mut entry = entry?;
        let mut content = Vec::new();
        entry.read_to_end(&mut content)?;
        found.insert(entry.path()?.into_owned(), content);
    }
    Ok(found)
}

async fn a_checkpoint_is_whole_and_the_container_goes_on(env: Env) -> Result<()> {
    let daemon = with_criu(&env).await?;
    let container = counter(&daemon).await?;
    let process = container.pid()?;
    let location = env.root.join("c.tar");
    // Twice: a checkpoint leaves nothing behind that would be in the way of another.
    for _ in 0..2 {
        let _ = std::fs::remove_file(&location);
        checkpoint(&container, &location, 0).await?;
        assert_eq!(container.pid()?, process);
        goes_on(&container).await?;
    }
    assert_eq!(
        std::fs::metadata(&location)?.permissions().mode() & 0o777,
        0o600
    );
    let found = files(std::fs::File::open(&location)?)?;
    let file = |name: &str| {
        let content = found.get(Path::new(name));
        content.with_context(|| format!("no {name} in {:?}", found.keys()))
    };
    for name in [
        "checkpoint/inventory.img",
        "checkpoint/pstree.img",
        "checkpoint/descriptors.json",
        "dump.log",
        "stats-dump",
        "io.kubernetes.cri-o.LogPath",
    ] {
        ensure!(!file(name)?.is_empty(), "{name} is empty");
    }
    let config: serde_json::Value = serde_json::from_slice(file("config.dump")?)?;
    assert_eq!(config["id"], container.id);
    let spec: serde_json::Value = serde_json::from_slice(file("spec.dump")?)?;
    assert_eq!(spec["annotations"]["io.container.manager"], "cri-o");
    let deleted: Vec<String> = serde_json::from_slice(file("deleted.files")?)?;
    assert_eq!(deleted, ["/etc/group"]);
    let layer = files(file("rootfs-diff.tar")?.as_slice())?;
    assert_eq!(
        layer.get(Path::new("made")).map(Vec::as_slice),
        Some(&b"new\n"[..])
    );
    assert!(!layer.contains_key(Path::new("etc/group")));
    // What it still does: exec, stop, exit code.
    assert_eq!(container.exec(&["cat", "/made"]).await?.stdout, "new\n");
    container.stop(0).await?;
    assert_eq!(container.exited().await?.exit_code, 137);
    nothing_left(&daemon, &env.root.join("none")).await
}

async fn sessions_are_no_part_of_it(env: Env) -> Result<()> {
    let daemon = with_criu(&env).await?;
    let container = counter(&daemon).await?;
    for tty in [false, true] {
        let mut client = exec(
            &container,
            "echo here; while read a; do echo got $a; done",
            tty,
        )
        .await?;
        client.until(STDOUT, "here").await?;
        let location = env.root.join(format!("{tty}.tar"));
        checkpoint(&container, &location, 0).await?;
        client.send(STDIN, b"words\n").await?;
        client.until(STDOUT, "got words").await?;
        let found = files(std::fs::File::open(&location)?)?;
        let names = found.keys().filter_map(|path| path.to_str());
        let threads = names.filter(|n| n.starts_with("checkpoint/core-")).count();
        // The counter, and its sleep.
        assert!((1..=2).contains(&threads), "{threads}");
        goes_on(&container).await?;
    }
    Ok(())
}

async fn a_pod_is_one_checkpoint(env: Env) -> Result<()> {
    let daemon = with_criu(&env).await?;
    let pod = daemon.pod(|_| {}).await?;
    let name = |name: &'static str| {
        move |c: &mut cri::ContainerConfig| {
            c.metadata.get_or_insert_default().name = name.to_owned();
            c.log_path = format!("{name}.log");
        }
    };
    let first = pod.run(COUNTER, name("first")).await?;
    let second = pod.run(COUNTER, name("second")).await?;
    let created = pod.create(COUNTER, name("created")).await?;
    first.says("3").await?;
    second.says("3").await?;
    let path = env.root.join("pod");
    let ask = |ids: Vec<String>| {
        let request = cri::CheckpointPodRequest {
            pod_sandbox_id: pod.id.clone(),
            output_path: path.display().to_string(),
            container_ids: ids,
            ..Default::default()
        };
        let mut client = daemon.runtime();
        async move { client.checkpoint_pod(request).await.map(drop) }
    };
    let wrong = ask(vec![first.id.clone(), created.id.clone()]).await;
    refused(wrong, Code::FailedPrecondition, &[&created.id]);
    assert!(!path.exists());
    ask(Vec::new()).await?;
    goes_on(&first).await?;
    goes_on(&second).await?;
    let options: serde_json::Value =
        serde_json::from_slice(&std::fs::read(path.join("pod.options"))?)?;
    let listed = options["containers"].as_object().context("containers")?;
    assert_eq!(listed.len(), 2, "{listed:?}");
    for container in [&first, &second] {
        let archive = path.join(format!("{}.tar", container.id));
        let found = files(std::fs::File::open(archive)?)?;
        assert!(found.contains_key(Path::new("checkpoint/inventory.img")));
    }
    assert!(path.join("pod.dump").exists());
    refused(ask(Vec::new()).await, Code::InvalidArgument, &["not empty"]);
    Ok(())
}

async fn what_cannot_be_checkpointed(env: Env) -> Result<()> {
    let daemon = with_script(&env, "exit 1").await?;
    let pod = daemon.pod(|_| {}).await?;
    let created = pod.create(COUNTER, |_| {}).await?;
    let location = env.root.join("c.tar");
    let answer = checkpoint(&created, &location, 0).await;
    refused(answer, Code::FailedPrecondition, &[&created.id, "created"]);
    let unknown = Container {
        id: "f".repeat(64),
        ..created.clone()
    };
    refused(
        checkpoint(&unknown, &location, 0).await,
        Code::NotFound,
        &[],
    );
    created.start().await?;
    std::fs::write(&location, "kept")?;
    for (place, word) in [
        (location.clone(), "exists"),
        (env.root.join("none/c.tar"), "does not exist"),
        (PathBuf::from("c.tar"), "absolute"),
    ] {
        let answer = checkpoint(&created, &place, 0).await;
        refused(answer, Code::InvalidArgument, &[word]);
    }
    assert_eq!(std::fs::read_to_string(&location)?, "kept");
    let answer = checkpoint(&created, &env.root.join("d.tar"), -1).await;
    refused(answer, Code::InvalidArgument, &["-1"]);
    Ok(())
}

async fn no_criu(env: Env) -> Result<()> {
    let daemon = daemon_with(&env, "/nonexistent/criu").await?;
    let container = counter(&daemon).await?;
    let answer = checkpoint(&container, &env.root.join("c.tar"), 0).await;
    refused(answer, Code::Unimplemented, &["/nonexistent/criu"]);
    goes_on(&container).await
}

async fn a_criu_that_fails(env: Env) -> Result<()> {
    let daemon = with_script(&env, "exit 1").await?;
    let container = counter(&daemon).await?;
    let location = env.root.join("c.tar");
    let answer = checkpoint(&container, &location, 0).await;
    refused(answer, Code::FailedPrecondition, &["criu"]);
    goes_on(&container).await?;
    nothing_left(&daemon, &location).await
}

async fn a_criu_that_hangs(env: Env) -> Result<()> {
    let daemon = with_script(&env, "exec sleep 1000").await?;
    let container = counter(&daemon).await?;
    let location = env.root.join("c.tar");
    let (answer, seen) = tokio::join!(checkpoint(&container, &location, 3), frozen(&container));
    seen?;
    refused(answer, Code::DeadlineExceeded, &["in time"]);
    goes_on(&container).await?;
    nothing_left(&daemon, &location).await
}

async fn commands_wait_for_its_end(env: Env) -> Result<()> {
    let daemon = with_script(&env, "exec sleep 1000").await?;
    let container = counter(&daemon).await?;
    let location = env.root.join("c.tar");
    let exec = async {
        frozen(&container).await?;
        Ok::<_, anyhow::Error>(container.exec_output(&["echo", "well"]).await)
    };
    let (answer, output) = tokio::join!(checkpoint(&container, &location, 3), exec);
    refused(answer, Code::DeadlineExceeded, &["in time"]);
    assert_eq!(output??, "well");
    goes_on(&container).await
}

async fn the_daemon_is_killed_in_the_middle(env: Env) -> Result<()> {
    let daemon = with_script(&env, "exec sleep 1000").await?;
    let container = counter(&daemon).await?;
    let location = env.root.join("c.tar");
    let call = tokio::spawn({
        let (container, location) = (container.clone(), location.clone());
        async move { checkpoint(&container, &location, 0).await }
    });
    frozen(&container).await?;
    daemon.kill(Signal::SIGKILL).await?;
    assert!(call.await?.is_err());
    thawed(&container).await?;
    daemon.launch().await?;
    goes_on(&container).await?;
    nothing_left(&daemon, &location).await
}

async fn the_caller_gives_up(env: Env) -> Result<()> {
    let daemon = with_script(&env, "exec sleep 1000").await?;
    let container = counter(&daemon).await?;
    let location = env.root.join("c.tar");
    let call = checkpoint(&container, &location, 0);
    tokio::select! {
        answer = call => bail!("answered: {answer:?}"),
        seen = frozen(&container) => seen?,
    }
    thawed(&container).await?;
    goes_on(&container).await?;
    nothing_left(&daemon, &location).await
}
