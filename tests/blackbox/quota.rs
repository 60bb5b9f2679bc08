//! Writable layers that their file system accounts for by projects. Each test has a file system of its own in a loop
//! device; the kernel must have quotas for it.

use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;
use slipway_observe::quota::{Entry, Projects, RANGE};

use crate::harness::*;
use crate::stats::{counted_layer, value};
use crate::userns::mapped;

tests![
    ext4_accounts_for_layers,
    xfs_accounts_for_layers,
    files_stay_on_the_account,
    a_restored_layer_has_an_account,
    layers_that_have_no_account,
    the_account_of_somebody_else,
];

/// A file system where the state of the test's daemon will be.
struct FileSystem {
    at: PathBuf,
    _image: tempfile::NamedTempFile,
}

impl FileSystem {
    fn ext4(env: &Env) -> Result<Self> {
        // The accounting goes on whatever it is mounted with.
        let make = "mkfs.ext4 -Fq -O quota,project -E quotatype=prjquota";
        Self::new(env, make, "ext4", "loop")
    }

    fn xfs(env: &Env) -> Result<Self> {
        Self::new(env, "mkfs.xfs -fq", "xfs", "loop,pquota")
    }

    fn new(env: &Env, make: &str, kind: &str, options: &str) -> Result<Self> {
        let image = tempfile::NamedTempFile::new()?;
        image.as_file().set_len(512 << 20)?;
        let run = |line: &str, paths: [&Path; 1]| {
            let mut words = line.split(' ');
            let program = words.next().expect("a program");
            let output = Command::new(program).args(words).args(paths).output();
            match output {
                Ok(output) if output.status.success() => Ok(()),
                Ok(output) => {
                    let text = String::from_utf8_lossy(&output.stderr);
                    Err(text.lines().next().unwrap_or_default().to_owned())
                }
                Err(e) => Err(format!("{program}: {e}")),
            }
        };
        if let Err(why) = run(make, [image.path()]) {
            return skip(format!("no {kind} can be made here: {why}"));
        }
        let at = env.dir("state")?;
        let line = format!("mount -t {kind} -o {options} {}", image.path().display());
        if let Err(why) = run(&line, [&at]) {
            return skip(format!(
                "this kernel mounts no {kind} with project quotas (its CONFIG_QFMT_V2 or CONFIG_XFS_QUOTA; hack/vm \
                 test runs one that does): {why}"
            ));
        }
        Ok(Self { at, _image: image })
    }

    fn layer(&self, container: &Container) -> PathBuf {
        self.at.join("containers").join(&container.id)
    }

    fn projects(&self) -> Result<Projects> {
        Ok(Projects::on(&self.at.join("containers"))?)
    }

    /// Removes what the daemon has, ends it, and unmounts.
    async fn end(self, daemon: &Daemon) -> Result<()> {
        daemon.remove_everything().await?;
        daemon.end().await
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        nix::mount::umount2(&self.at, nix::mount::MntFlags::MNT_DETACH).ok();
    }
}

/// The project of a file, as e2fsprogs sees it.
async fn project(path: &Path) -> Result<u32> {
    let path = path.to_str().context("a path")?;
    let text = output("lsattr", &["-pd", path]).await?;
    let number = text.split_whitespace().next().context("no project")?;
    Ok(number.parse()?)
}

/// Bytes and inodes of directories, as du(1) counts them.
async fn count(dirs: &[PathBuf]) -> Result<[u64; 2]> {
    let mut found = [0; 2];
    for (found, how) in found.iter_mut().zip(["-B1", "--inodes"]) {
        let paths = dirs.iter().map(|d| d.to_str().expect("a path"));
        let args: Vec<&str> = ["-sc", how].into_iter().chain(paths).collect();
        let text = output("du", &args).await?;
        let total = text.lines().last().and_then(|l| l.split('\t').next());
        *found = total.context("no total")?.parse()?;
    }
    Ok(found)
}

/// What statistics say of a layer now: when, bytes, inodes.
async fn told(container: &Container) -> Result<(i64, [u64; 2])> {
    let layer = counted_layer(container).await?;
    let usage = [value(layer.used_bytes), value(layer.inodes_used)];
    Ok((layer.timestamp, usage))
}

/// Expects that a layer has an account, and that it is what is there at this moment.
async fn is_accounted(files: &FileSystem, container: &Container, what: &str) -> Result<[u64; 2]> {
    let layer = files.layer(container);
    let (at, [bytes, inodes]) = told(container).await?;
    let [real, real_inodes] = count(&["upper", "work"].map(|d| layer.join(d))).await?;
    assert_eq!(inodes, real_inodes, "inodes after {what}");
    assert!(
        bytes.abs_diff(real) <= 64 << 10,
        "after {what}: {bytes} bytes, and du says {real}"
    );
    let (later, _) = told(container).await?;
    assert!(later > at, "an old answer after {what}");
    Ok([bytes, inodes])
}

/// Expects that a layer is walked: one answer is good for a while.
async fn is_walked(files: &FileSystem, container: &Container, what: &str) -> Result<()> {
    let first = told(container).await?;
    let upper = files.layer(container).join("upper");
    assert_eq!(first.1, count(&[upper]).await?, "{what}");
    assert_eq!(told(container).await?, first, "{what}: fresh");
    Ok(())
}

async fn ext4_accounts_for_layers(env: Env) -> Result<()> {
    let files = FileSystem::ext4(&env)?;
    accounts_for_layers(env, files).await
}

async fn xfs_accounts_for_layers(env: Env) -> Result<()> {
    let files = FileSystem::xfs(&env)?;
    accounts_for_layers(env, files).await
}

async fn accounts_for_layers(env: Env, files: FileSystem) -> Result<()> {
    let daemon = env.daemon().await?;
    daemon.logged(0, &["accounts for writable layers"]).await?;
    let pod = daemon.pod(|_| {}).await?;
    let [first, second] = [pod.sleeper().await?, pod.sleeper().await?];
    let mut own = Vec::new();
    for container in [&first, &second] {
        let layer = files.layer(container);
        let number = project(&layer.join("upper")).await?;
        assert!(RANGE.contains(&number), "{number}");
        assert_eq!(project(&layer.join("work")).await?, number);
        own.push(number);
    }
    assert_ne!(own[0], own[1]);
    let empty = is_accounted(&files, &first, "nothing").await?;
    assert!(empty[1] < 12, "{empty:?}");
    let script = |line: &'static str| ["sh", "-c", line];
    for line in [
        "head -c 8388608 /dev/zero > /f",
        "ln /f /g",
        "mkdir /d; for n in $(seq 100); do : > /d/$n; done",
        "mv /d /e; mv /g /e",
        "rm /f",
        // What the image has: copied up, renamed, hidden.
        "echo more >> /etc/passwd; mv /etc/passwd /etc/users; rm /bin/cat",
    ] {
        first.exec_output(&script(line)).await?;
        let [bytes, inodes] = is_accounted(&files, &first, line).await?;
        assert!(bytes >= 8 << 20, "{line}");
        let few = matches!(line, "head -c 8388608 /dev/zero > /f" | "ln /f /g");
        assert_eq!(inodes < 100, few, "{line}: {inodes}");
    }
    let [before, _] = is_accounted(&files, &first, "all that").await?;
    first.exec_output(&["rm", "-r", "/e"]).await?;
    let [bytes, _] = is_accounted(&files, &first, "a removal").await?;
    assert!(before - bytes >= 8 << 20, "{before}, then {bytes}");
    // A file that is open is there, though no walk would find it.
    let line = "exec 3>/h; head -c 8388608 /dev/zero >&3; rm /h; sleep 1000";
    let holder = pod.run(&script(line), |_| {}).await?;
    eventually("its use", seconds(10), || async {
        let (_, [bytes, _]) = told(&holder).await?;
        Ok((bytes >= 8 << 20).then_some(()))
    })
    .await?;
    holder.stop(0).await?;
    eventually("its end", seconds(10), || async {
        let (_, [bytes, _]) = told(&holder).await?;
        Ok((bytes < 1 << 20).then_some(()))
    })
    .await?;
    // Nothing of this is in the daemon's memory.
    daemon.kill(Signal::SIGKILL).await?;
    daemon.launch().await?;
    is_accounted(&files, &first, "a restart").await?;
    first.exec_output(&script("echo x > /after")).await?;
    is_accounted(&files, &first, "a write after that").await?;
    assert_eq!(project(&files.layer(&first).join("upper")).await?, own[0]);
    is_accounted(&files, &second, "a restart").await?;
    // A layer that goes gives its project back, and takes nothing from others.
    let projects = files.projects()?;
    assert!(projects.entry(own[0])?.inodes > 0);
    first.remove().await?;
    eventually("the project to be free", seconds(10), || async {
        Ok((projects.entry(own[0])? == Entry::default()).then_some(()))
    })
    .await?;
    is_accounted(&files, &second, "the end of another").await?;
    files.end(&daemon).await
}

async fn files_stay_on_the_account(env: Env) -> Result<()> {
    let files = FileSystem::ext4(&env)?;
    let daemon = crate::userns::daemon(&env).await?;
    let pod = daemon.pod(mapped).await?;
    let container = pod.sleeper().await?;
    let empty = is_accounted(&files, &container, "nothing").await?;
    let line = "head -c 8388608 /dev/zero > /f; mkdir /d; cp /f /d/g; chown 7:7 /d/g";
    container.exec_output(&["sh", "-c", line]).await?;
    let full = is_accounted(&files, &container, line).await?;
    assert!(full[0] - empty[0] >= 16 << 20, "{empty:?}, then {full:?}");
    // Nobody leaves it who is in a user namespace.
    for path in ["/f", "/d", "/"] {
        container.exec(&["chattr", "-p", "0", path]).await?;
        container.exec(&["chattr", "-P", path]).await?;
    }
    container.exec_output(&["cp", "/f", "/h"]).await?;
    let upper = files.layer(&container).join("upper");
    for path in ["f", "d", ".", "h"] {
        let number = project(&upper.join(path)).await?;
        assert!(RANGE.contains(&number), "{path}: {number}");
    }
    is_accounted(&files, &container, "all that").await?;
    files.end(&daemon).await
}

async fn a_restored_layer_has_an_account(env: Env) -> Result<()> {
    let criu = crate::checkpoint::criu()?;
    let files = FileSystem::ext4(&env)?;
    let daemon = crate::restore::daemon_with(&env, &criu).await?;
    let pod = daemon.pod(|_| {}).await?;
    let script = "head -c 8388608 /dev/zero > /f; mkdir -p /d/e; echo x > /d/e/g; rm /bin/cat; echo ready; sleep 1000";
    let first = pod.run(&["sh", "-c", script], |_| {}).await?;
    first.says("ready").await?;
    let saved = env.root.join("c.tar");
    crate::checkpoint::checkpoint(&first, &saved, 0).await?;
    let [full, _] = is_accounted(&files, &first, "a checkpoint").await?;
    let container = crate::restore::created(&pod, &saved, |_| {}).await?;
    let layer = files.layer(&container);
    let number = project(&layer.join("work")).await?;
    assert!(RANGE.contains(&number), "{number}");
    assert_ne!(number, project(&files.layer(&first).join("work")).await?);
    let all = || async {
        for path in [
            "upper",
            "upper/f",
            "upper/d",
            "upper/d/e",
            "upper/d/e/g",
            "upper/bin",
        ] {
            assert_eq!(project(&layer.join(path)).await?, number, "{path}");
        }
        anyhow::Ok(())
    };
    all().await?;
    container.start().await?;
    all().await?;
    let [bytes, _] = is_accounted(&files, &container, "a restore").await?;
    assert!(bytes.abs_diff(full) <= 1 << 20, "{full}, then {bytes}");
    container
        .exec_output(&[
            "sh",
            "-c",
            "cp /f /d/e/h; mv /d/e /moved; echo more >> /etc/passwd",
        ])
        .await?;
    let [more, _] = is_accounted(&files, &container, "changes").await?;
    assert!(more - bytes >= 8 << 20, "{bytes}, then {more}");
    // The checkpoint's files, which lie beside it until the start, were on nobody's account.
    let projects = files.projects()?;
    container.stop(0).await?;
    container.remove().await?;
    eventually("the project to be free", seconds(10), || async {
        Ok((projects.entry(number)? == Entry::default()).then_some(()))
    })
    .await?;
    files.end(&daemon).await
}

async fn layers_that_have_no_account(env: Env) -> Result<()> {
    let files = FileSystem::ext4(&env)?;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let [older, turned] = [pod.sleeper().await?, pod.sleeper().await?];
    daemon.end().await?;
    let off = |dirs: &'static [&str], container: &Container| {
        let layer = files.layer(container);
        async move {
            for dir in dirs {
                let path = layer.join(dir).display().to_string();
                output("chattr", &["-p", "0", "-P", &path]).await?;
            }
            anyhow::Ok(())
        }
    };
    // One as if it was made before the accounting was on; one whose container has given its root another project.
    off(&["upper", "work"], &older).await?;
    off(&["upper"], &turned).await?;
    daemon.launch().await?;
    let newer = pod.sleeper().await?;
    is_walked(&files, &older, "one from before").await?;
    is_walked(&files, &turned, "one that has left its account").await?;
    is_accounted(&files, &newer, "nothing").await?;
    older
        .exec_output(&["sh", "-c", "mkdir /d; echo x > /d/f; mv /d /e; rm /bin/cat"])
        .await?;
    files.end(&daemon).await
}

async fn the_account_of_somebody_else(env: Env) -> Result<()> {
    let files = FileSystem::ext4(&env)?;
    let at = files.at.display().to_string();
    output("chattr", &["-p", "7", "+P", &at]).await?;
    let daemon = env.daemon().await?;
    daemon.logged(0, &["belongs to project 7"]).await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    container.exec_output(&["cp", "/bin/probe", "/f"]).await?;
    is_walked(&files, &container, "one of a project").await?;
    let upper = files.layer(&container).join("upper");
    for path in [upper.clone(), upper.join("f")] {
        assert_eq!(project(&path).await?, 7);
    }
    files.end(&daemon).await
}
