//! Container logs: the CRI's form, to the letter, whatever the container writes and whenever it is rotated.

use std::time::Duration;

use tonic::Code;

use crate::harness::*;

tests![
    lines_are_in_the_form,
    long_lines_are_split,
    a_last_line_without_newline,
    binary_output_is_kept,
    reopened_while_running,
    reopened_in_every_state,
    a_removed_file_is_made_again,
    no_log_path_no_log,
    a_writer_is_not_held_up_by_a_stop,
    the_mode_is_not_for_everybody,
];
tests![alone: nothing_is_lost_or_doubled_over_rotations, a_flood_is_written_whole];

async fn lines_are_in_the_form(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let before = chrono::Utc::now();
    let container = daemon
        .run(&[
            "sh",
            "-c",
            "echo one; echo two >&2; echo; echo ' three  spaced '",
        ])
        .await?;
    container.exited().await?;
    let lines = container.lines()?;
    let of = |stream: &str| {
        let lines = lines.iter().filter(|l| l.stream == stream);
        lines
            .map(|l| String::from_utf8_lossy(&l.content).into_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(of("stdout"), ["one", "", " three  spaced "]);
    assert_eq!(of("stderr"), ["two"]);
    assert!(lines.iter().all(|l| !l.partial));
    for line in &lines {
        let time = line.time.to_utc();
        assert!(time >= before && time <= chrono::Utc::now(), "{time}");
    }
    assert!(lines.is_sorted_by_key(|l| l.time));
    // Exactly one space between the parts, nanoseconds in the time. Which of two pipes is read first is anybody's guess.
    let raw = std::fs::read_to_string(&container.log)?;
    assert!(raw.lines().any(|l| l.ends_with(" stdout F one")), "{raw}");
    assert!(raw.contains(" stdout F \n"), "an empty line: {raw:?}");
    assert!(
        raw.lines().any(|l| l.find('.').is_some_and(|p| l[p + 1..]
            .chars()
            .take_while(char::is_ascii_digit)
            .count()
            > 6)),
        "{raw}"
    );
    Ok(())
}

async fn long_lines_are_split(env: Env) -> Result<()> {
    const PART: usize = 16 << 10;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    for (length, parts) in [
        (PART - 1, 1),
        (PART, 1),
        (PART + 1, 2),
        (3 * PART, 3),
        (100_000, 7),
    ] {
        // A newline in a write of its own comes later than the rest.
        let script = format!("dd if=/dev/zero bs={length} count=1 2>/dev/null | tr '\\0' x; echo");
        let container = pod.run(&["sh", "-c", &script], |_| {}).await?;
        container.exited().await?;
        let lines = container.lines()?;
        let text = log::bytes(&lines, "stdout");
        assert_eq!(text.len(), length + 1, "of {length}");
        assert!(text[..length].iter().all(|b| *b == b'x') && text[length] == b'\n');
        assert!(
            lines.iter().all(|l| l.content.len() <= PART),
            "longer than 16 KiB"
        );
        assert!(
            !lines.last().unwrap().partial,
            "the last part of a line is F"
        );
        assert!(
            lines[..lines.len() - 1].iter().all(|l| l.partial),
            "all but the last are P"
        );
        assert!(
            lines.len() >= parts && lines.len() <= parts + 1,
            "{length}: {} entries",
            lines.len()
        );
    }
    Ok(())
}

async fn a_last_line_without_newline(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon.run(&["printf", "one\ntwo"]).await?;
    container.exited().await?;
    let lines = container.lines()?;
    assert_eq!(
        lines
            .iter()
            .map(|l| l.content.as_slice())
            .collect::<Vec<_>>(),
        [b"one", b"two"]
    );
    assert!(!lines[0].partial);
    // The peers write P, for the line has not ended: a reader must not add a newline.
    assert!(lines[1].partial, "{lines:?}");
    // A prompt is seen while the process goes on.
    let container = daemon
        .run(&["sh", "-c", "printf 'login: '; exec sleep 1000"])
        .await?;
    let _ = container;
    Ok(())
}

async fn binary_output_is_kept(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon.run(&["printf", "\\377\\376\\000x\\r\\n"]).await?;
    container.exited().await?;
    assert_eq!(container.lines()?[0].content, [0xff, 0xfe, 0, b'x', b'\r']);
    Ok(())
}

async fn reopened_while_running(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let script = "trap 'echo second' USR1; echo first; while :; do sleep 0.1; done";
    let container = pod.run(&["sh", "-c", script], |_| {}).await?;
    container.says("first").await?;
    let old = container.log.with_extension("old");
    std::fs::rename(&container.log, &old)?;
    container.reopen_log().await?;
    assert!(
        container.log.exists(),
        "the new file is there when the call returns"
    );
    container.signal(nix::sys::signal::Signal::SIGUSR1).await?;
    container.says("second").await?;
    assert_eq!(log::text(&log::read(&old)?, "stdout"), "first\n");
    assert_eq!(container.stdout()?, "second\n");
    Ok(())
}

async fn reopened_in_every_state(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.create(&["echo", "said"], |_| {}).await?;
    let moved = |n: u32| container.log.with_extension(format!("{n}"));
    std::fs::rename(&container.log, moved(1)).ok();
    container.reopen_log().await?;
    container.start().await?;
    container.exited().await?;
    assert_eq!(container.stdout()?, "said\n");
    std::fs::rename(&container.log, moved(2))?;
    // CRI-O refused this; the kubelet rotates logs of containers that have ended as well.
    container.reopen_log().await?;
    assert!(container.log.exists());
    assert_eq!(container.lines()?, []);
    let nobody = Container {
        id: "nothing".into(),
        ..container.clone()
    };
    refused(nobody.reopen_log().await, Code::NotFound, &["nothing"]);
    Ok(())
}

async fn a_removed_file_is_made_again(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon
        .run(&[
            "sh",
            "-c",
            "trap 'echo again' USR1; echo up; while :; do sleep 0.1; done",
        ])
        .await?;
    container.says("up").await?;
    std::fs::remove_file(&container.log)?;
    container.reopen_log().await?;
    container.signal(nix::sys::signal::Signal::SIGUSR1).await?;
    container.says("again").await
}

async fn no_log_path_no_log(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod
        .run(
            &[
                "sh",
                "-c",
                "dd if=/dev/zero bs=1M count=8 2>/dev/null; exit 3",
            ],
            |c| c.log_path.clear(),
        )
        .await?;
    assert_eq!(
        container.exited().await?.exit_code,
        3,
        "output that nobody keeps must not block"
    );
    assert_eq!(
        daemon::names(std::path::Path::new(&pod.config.log_directory)),
        Vec::<String>::new()
    );
    Ok(())
}

async fn a_writer_is_not_held_up_by_a_stop(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod
        .run(
            &[
                "sh",
                "-c",
                "trap '' TERM; echo up; while :; do sleep 0.1; done",
            ],
            |_| {},
        )
        .await?;
    container.says("up").await?;
    let stop = tokio::spawn({
        let container = container.clone();
        async move { container.stop(4).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    // CRI-O 6297: rotation waited for the stop.
    let began = std::time::Instant::now();
    std::fs::rename(&container.log, container.log.with_extension("old"))?;
    container.reopen_log().await?;
    container.status().await?;
    assert!(began.elapsed() < seconds(2), "{:?}", began.elapsed());
    assert!(!stop.is_finished(), "the stop was to go on meanwhile");
    stop.await??;
    Ok(())
}

async fn the_mode_is_not_for_everybody(env: Env) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let daemon = env.daemon().await?;
    let container = daemon.run(&["echo", "x"]).await?;
    container.exited().await?;
    let mode = std::fs::metadata(&container.log)?.permissions().mode() & 0o777;
    assert!(mode == 0o640 || mode == 0o600, "{mode:o}");
    Ok(())
}

async fn nothing_is_lost_or_doubled_over_rotations(env: Env) -> Result<()> {
    const LINES: usize = 300_000;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod
        .run(&["probe", "flood", &LINES.to_string(), "60"], |_| {})
        .await?;
    let mut files = Vec::new();
    while container.status().await?.state() == cri::ContainerState::ContainerRunning
        && files.len() < 200
    {
        let to = container.log.with_extension(format!("{}", files.len()));
        std::fs::rename(&container.log, &to)?;
        container.reopen_log().await?;
        files.push(to);
    }
    assert!(files.len() >= 2, "the writer was done before a rotation");
    assert_eq!(container.exited().await?.exit_code, 0);
    files.push(container.log.clone());
    let mut next = 0;
    let mut partial = Vec::new();
    for file in &files {
        for line in log::read(file)? {
            partial.extend_from_slice(&line.content);
            if line.partial {
                continue;
            }
            let text = String::from_utf8(std::mem::take(&mut partial))?;
            let number: usize = text
                .split(' ')
                .next()
                .unwrap_or_default()
                .parse()
                .with_context(|| text.clone())?;
            assert_eq!(number, next, "after line {next}, in {}", file.display());
            assert_eq!(text.len(), number.to_string().len() + 61, "{text:?}");
            next += 1;
        }
    }
    assert_eq!(next, LINES, "over {} files", files.len());
    Ok(())
}

async fn a_flood_is_written_whole(env: Env) -> Result<()> {
    const LINES: usize = 200_000;
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let script = format!("probe flood {LINES} 200 & probe flood {LINES} 200 >&2; wait");
    let container = pod.run(&["sh", "-c", &script], |_| {}).await?;
    container.exited().await?;
    let lines = container.lines()?;
    for stream in ["stdout", "stderr"] {
        let text = log::text(&lines, stream);
        assert_eq!(text.lines().count(), LINES, "{stream}");
        assert!(
            text.lines()
                .enumerate()
                .all(|(n, l)| l.starts_with(&format!("{n} x")) && l.ends_with("xxx")),
            "{stream}"
        );
    }
    Ok(())
}
