//! ExecSync.

use std::time::{Duration, Instant};

use tonic::Code;

use crate::harness::*;

tests![
    output_and_code_come_back,
    commands_that_cannot_run,
    streams_are_told_apart_and_binary,
    a_timeout_ends_the_whole_exec,
    a_child_that_keeps_the_pipe_does_not_hang_the_call,
    ended_by_a_signal,
    only_in_running_containers,
    it_runs_where_the_container_does,
    the_environment_is_the_containers,
    a_command_is_needed,
    a_process_that_leaves_its_group_is_ended_too,
];
tests![alone:
    output_is_capped,
    fifty_at_once,
    a_stopped_container_ends_its_execs,
    many_in_a_row_leave_nothing,
    a_thousand_in_a_row_take_no_memory,
];

async fn output_and_code_come_back(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    for code in [0, 1, 42, 255] {
        let exec = container
            .exec(&["sh", "-c", &format!("echo out; echo err >&2; exit {code}")])
            .await?;
        assert_eq!(
            (exec.stdout.as_str(), exec.stderr.as_str(), exec.code),
            ("out\n", "err\n", code)
        );
    }
    let exec = container.exec(&["echo", "a b", "", "ü", "$HOME"]).await?;
    assert_eq!(exec.stdout, "a b  ü $HOME\n");
    Ok(())
}

async fn commands_that_cannot_run(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    // The exit code is in the answer, as the shell would give it: probes depend on that.
    for (command, code) in [
        ("/no/such/program", 127),
        ("no-such-program", 127),
        ("/bin/not-executable", 126),
        ("/etc", 126),
        ("/bin/bad-format", 126),
    ] {
        if handler() != "native" && command == "/bin/bad-format" {
            // Only the kernel can refuse it, and other runtimes have said by then that it runs.
            continue;
        }
        let exec = container.exec(&[command]).await?;
        assert_eq!(exec.code, code, "{command}: {exec:?}");
        // youki's exec has ended when the process finds out, and leaves nothing but the code.
        assert!(
            exec.stderr.contains(command) || youki(),
            "{command}: {exec:?}"
        );
    }
    Ok(())
}

async fn streams_are_told_apart_and_binary(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    let answer = container
        .exec_limited(
            &[
                "sh",
                "-c",
                "printf '\\377\\000\\n\\001'; printf '\\376' >&2",
            ],
            10,
        )
        .await?;
    assert_eq!(
        (answer.stdout, answer.stderr),
        (vec![255, 0, 10, 1], vec![254])
    );
    // Both pipes full at once.
    let script = "{ dd if=/dev/zero bs=1k count=900 2>/dev/null; } & { dd if=/dev/zero bs=1k count=900 2>/dev/null; } >&2; wait";
    let answer = container.exec_limited(&["sh", "-c", script], 30).await?;
    assert_eq!(
        (answer.stdout.len(), answer.stderr.len()),
        (900 << 10, 900 << 10)
    );
    Ok(())
}

/// The command lines that run in a container.
pub async fn running(container: &Container) -> Result<String> {
    container.exec_output(&["ps", "-o", "args"]).await
}

async fn a_timeout_ends_the_whole_exec(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    let began = Instant::now();
    let script = "trap '' TERM; setsid sleep 2001 & sleep 2002 & echo begun; sleep 2003";
    let answer = container.exec_limited(&["sh", "-c", script], 1).await;
    refused(answer, Code::DeadlineExceeded, &[&container.id[..8]]);
    let took = began.elapsed();
    assert!(
        took >= Duration::from_millis(900) && took < seconds(5),
        "{took:?}"
    );
    let left = running(&container).await?;
    assert!(
        !left.contains("sleep 200"),
        "left after the timeout: {left}"
    );
    assert!(left.contains("sleep 1000"), "the container itself goes on");
    Ok(())
}

async fn a_process_that_leaves_its_group_is_ended_too(env: Env) -> Result<()> {
    not_in_gvisor("who is whose parent is all that its command line tells of processes")?;
    if handler().starts_with("shim-") {
        return skip("a shim's commands have no cgroup of their own");
    }
    let daemon = env.daemon().await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    // Forked twice, in a session of its own, its parent gone: and still of this exec.
    let script = "probe leave 2001; (probe leave 2002 &); sleep 2003";
    refused(
        container.exec_limited(&["sh", "-c", script], 1).await,
        Code::DeadlineExceeded,
        &[],
    );
    let left = running(&container).await?;
    assert!(
        !left.contains("sleep 200"),
        "left after the timeout: {left}"
    );
    Ok(())
}

async fn a_child_that_keeps_the_pipe_does_not_hang_the_call(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    let began = Instant::now();
    let exec = container
        .exec(&["sh", "-c", "sleep 2001 & echo begun"])
        .await?;
    assert_eq!((exec.stdout.as_str(), exec.code), ("begun\n", 0));
    let exec = container.exec(&["probe", "leave", "2002"]).await?;
    assert!(
        exec.stdout.starts_with("left ") && exec.code == 0,
        "{exec:?}"
    );
    assert!(began.elapsed() < seconds(5), "{:?}", began.elapsed());
    Ok(())
}

async fn ended_by_a_signal(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    let exec = container
        .exec(&["sh", "-c", "echo before; kill -9 $$"])
        .await?;
    assert_eq!((exec.stdout.as_str(), exec.code), ("before\n", 137));
    assert_eq!(
        container.exec(&["sh", "-c", "kill -TERM $$"]).await?.code,
        143
    );
    Ok(())
}

async fn only_in_running_containers(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.create(&["sleep", "1000"], |_| {}).await?;
    refused(
        container.exec_limited(&["true"], 5).await,
        Code::FailedPrecondition,
        &[&container.id[..8]],
    );
    container.start().await?;
    assert_eq!(container.exec(&["true"]).await?.code, 0);
    container.stop(0).await?;
    refused(
        container.exec_limited(&["true"], 5).await,
        Code::FailedPrecondition,
        &[&container.id[..8]],
    );
    let nobody = Container {
        id: "nothing".into(),
        ..container.clone()
    };
    refused(
        nobody.exec_limited(&["true"], 5).await,
        Code::NotFound,
        &["nothing"],
    );
    Ok(())
}

async fn it_runs_where_the_container_does(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod
        .run(
            &[
                "sh",
                "-c",
                "echo mark >/tmp/mark; cat /proc/self/cgroup; echo end; exec sleep 1000",
            ],
            |_| {},
        )
        .await?;
    container.says("end").await?;
    assert_eq!(container.exec_output(&["cat", "/tmp/mark"]).await?, "mark");
    if gvisor() {
        // None of its processes is in a cgroup of the host's by itself.
        return Ok(());
    }
    let init = container.stdout()?;
    let exec = container.exec_output(&["cat", "/proc/self/cgroup"]).await?;
    // The container's cgroups, or cgroups below them that make the exec one thing to kill.
    for (exec, init) in exec.lines().zip(init.lines().filter(|l| *l != "end")) {
        assert!(
            exec == init || exec.starts_with(&format!("{}/", init.trim_end_matches('/'))),
            "{exec} is not in {init}"
        );
    }
    // Its processes count as the container's in every hierarchy that has the container.
    let exec = tokio::spawn({
        let container = container.clone();
        async move { container.exec_limited(&["sleep", "3"], 10).await }
    });
    eventually("the exec in every cgroup", seconds(3), || async {
        let count = |dir: &std::path::PathBuf| -> usize {
            let all = stage::tree(dir)
                .into_iter()
                .filter_map(|d| std::fs::read_to_string(d.join("cgroup.procs")).ok());
            all.map(|t| t.lines().count()).sum()
        };
        // youki puts nobody into hierarchies without controllers.
        let named = |d: &std::path::Path| d.starts_with("/sys/fs/cgroup/systemd");
        Ok(container
            .cgroup_dirs()
            .iter()
            .filter(|d| !(youki() && named(d)))
            .all(|d| count(d) >= 2)
            .then_some(()))
    })
    .await?;
    assert_eq!(exec.await??.exit_code, 0);
    Ok(())
}

async fn the_environment_is_the_containers(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let set = |key: &str, value: &str| cri::KeyValue {
        key: key.into(),
        value: value.into(),
    };
    let [init, exec] = pod
        .probes(|c| c.envs = vec![set("A", "1"), set("PATH", "/bin")])
        .await?;
    let sorted = |report: &probe::Report| {
        let mut env: Vec<_> = report
            .env
            .iter()
            .filter(|v| {
                !v.starts_with("SHLVL=")
                    && !v.starts_with("_=")
                    && !v.starts_with("PWD=")
                    && !v.starts_with("OLDPWD=")
            })
            .cloned()
            .collect();
        env.sort();
        env
    };
    assert_eq!(sorted(&init), sorted(&exec));
    Ok(())
}

async fn a_command_is_needed(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    refused(
        container.exec_limited(&[], 5).await,
        Code::InvalidArgument,
        &[],
    );
    refused(
        container.exec_limited(&["true"], -1).await,
        Code::InvalidArgument,
        &[],
    );
    Ok(())
}

async fn output_is_capped(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    let script = "dd if=/dev/zero bs=1M count=40 2>/dev/null; { dd if=/dev/zero bs=1M count=17 2>/dev/null; } >&2; exit 7";
    let answer = container.exec_limited(&["sh", "-c", script], 60).await?;
    assert_eq!(
        (answer.stdout.len(), answer.stderr.len()),
        (16 << 20, 16 << 20)
    );
    assert_eq!(
        answer.exit_code, 7,
        "what is over the cap is read and dropped, not a broken pipe"
    );
    Ok(())
}

async fn fifty_at_once(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..50 {
        let container = container.clone();
        tasks.spawn(async move {
            let exec = container
                .exec(&["sh", "-c", &format!("echo {n}; exit {n}")])
                .await?;
            ensure!(
                exec.stdout == format!("{n}\n") && exec.code == n,
                "{n}: {exec:?}"
            );
            Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    assert_eq!(
        running(&container).await?.lines().count(),
        3,
        "heading, sleep, ps"
    );
    Ok(())
}

async fn a_stopped_container_ends_its_execs(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    let exec = tokio::spawn({
        let container = container.clone();
        async move {
            container
                .exec_limited(&["sh", "-c", "echo in; sleep 2001"], 0)
                .await
        }
    });
    eventually("the exec", seconds(5), || async {
        Ok(running(&container)
            .await?
            .contains("sleep 2001")
            .then_some(()))
    })
    .await?;
    container.stop(0).await?;
    let answer = tokio::time::timeout(seconds(10), exec)
        .await
        .context("the exec outlives its container")??;
    if let Ok(answer) = answer {
        assert_eq!(answer.exit_code, 137);
    }
    container.gone().await?;
    Ok(())
}

async fn many_in_a_row_leave_nothing(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.run(&["sleep", "1000"], |_| {}).await?;
    container.exec(&["true"]).await?;
    let files = |pid: i32| daemon::names(std::path::Path::new(&format!("/proc/{pid}/fd"))).len();
    let own = daemon.pid()?.as_raw();
    let keeper = pod.keeper(&env)?;
    let before = (files(own), files(keeper));
    for _ in 0..200 {
        assert_eq!(container.exec(&["true"]).await?.code, 0);
    }
    eventually("as few descriptors as before", seconds(5), || async {
        Ok((files(own) <= before.0 + 2 && files(keeper) <= before.1).then_some(()))
    })
    .await
    .with_context(|| format!("before {before:?}, after {:?}", (files(own), files(keeper))))?;
    let zombies = output(
        "ps",
        &["-o", "pid,stat,args", "--ppid", &keeper.to_string()],
    )
    .await?;
    assert!(!zombies.contains(" Z"), "{zombies}");
    Ok(())
}

/// Memory of its own that a process has, in KiB.
fn memory(pid: i32) -> Result<u64> {
    let text = read(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|l| l.strip_prefix("Anonymous:"));
    let kib = line.context("Anonymous")?.trim().trim_end_matches(" kB");
    Ok(kib.parse()?)
}

async fn a_thousand_in_a_row_take_no_memory(env: Env) -> Result<()> {
    /// What allocators may do with what they have: a leak of a few hundred bytes for each exec is more.
    const SLACK: u64 = 256;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.run(&["sleep", "1000"], |_| {}).await?;
    let (own, keeper) = (daemon.pid()?.as_raw(), pod.keeper(&env)?);
    let run = async |times: usize| -> Result<(u64, u64)> {
        for _ in 0..times {
            assert_eq!(container.exec(&["true"]).await?.code, 0);
        }
        Ok((memory(own)?, memory(keeper)?))
    };
    // What grows once, to its size, has done so after some hundreds. A shim, or gVisor, takes ten times as long for each.
    let (some, many) = match handler().starts_with("shim-") || gvisor() {
        true => (100, 400),
        false => (500, 1000),
    };
    let mut measured = vec![run(some).await?];
    // An allocator takes a large piece now and then, as when another thread has its first exec. A leak grows each time.
    for _ in 0..3 {
        let (before, after) = (measured[measured.len() - 1], run(many).await?);
        println!("KiB of daemon and keeper: {before:?} before, {after:?} after {many} execs");
        if after.0 <= before.0 + SLACK && after.1 <= before.1 + SLACK / 4 {
            return Ok(());
        }
        measured.push(after);
    }
    bail!("the memory of daemon and keeper grows with every {many} execs: {measured:?} KiB")
}
