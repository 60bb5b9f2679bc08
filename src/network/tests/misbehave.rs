//! Plugins that hang, print rubbish or fail in their own ways: each is told by name, within bounds.
// Helpers are not `#[test]` functions, which alone clippy.toml lets unwrap.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod fake;

use fake::{LONG, Node, eventually, pod, words};
use slipway_network::{NetworkError, PluginError};
use std::fs;
use std::time::{Duration, Instant};
use tokio::time::timeout;

/// What ADD says when plugin `two` does this; every trace must be gone afterwards.
async fn add_fails(node: &Node) -> (PluginError, String) {
    let error = timeout(LONG, node.cni().add(&pod("pod1")))
        .await
        .expect("no hang")
        .unwrap_err();
    let text = words(&error);
    for part in ["\"two\"", "\"net\"", "10-net.conflist", "pod1"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(node.records().is_empty(), "{:?}", node.records());
    assert!(
        node.calls()
            .ends_with(&["DEL three", "DEL two", "DEL one"].map(str::to_owned))
    );
    match error {
        NetworkError::Attach {
            source,
            cleanup: None,
            ..
        } => (source.source, text),
        other => panic!("{other:?}"),
    }
}

async fn add_with(script: &str) -> (PluginError, String) {
    let node = Node::with_chain("1.0.0");
    node.hook("two", "ADD", script);
    add_fails(&node).await
}

fn gone(pid: &str) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat
            .rsplit(')')
            .next()
            .is_some_and(|rest| rest.trim_start().starts_with('Z')),
        Err(_) => true,
    }
}

#[tokio::test]
async fn a_plugin_that_hangs_is_killed_with_its_children() {
    let mut node = Node::with_chain("1.0.0");
    node.config.timeout = Duration::from_millis(700);
    let pids = node.path("pids");
    let script = format!(
        "sleep 1000 & echo $! >> {0}; sh -c 'echo $$ >> {0}; sleep 1000; :' & echo $$ >> {0}; wait",
        pids.display()
    );
    node.hook("two", "ADD", &script);
    let begun = Instant::now();
    let (error, text) = add_fails(&node).await;
    assert!(begun.elapsed() >= node.config.timeout);
    assert!(
        matches!(error, PluginError::Timeout(d) if d == node.config.timeout),
        "{text}"
    );
    assert!(text.contains("0.7 s"), "{text}");
    let pids = fs::read_to_string(pids).unwrap();
    assert_eq!(pids.lines().count(), 3, "{pids}");
    for pid in pids.lines() {
        eventually("the plugin's processes are gone", || gone(pid)).await;
    }
}

#[tokio::test]
async fn a_plugin_that_closes_its_output_and_hangs_is_killed() {
    let mut node = Node::with_chain("1.0.0");
    node.config.timeout = Duration::from_millis(700);
    node.hook("two", "ADD", "echo '{}'; exec >&- 2>&-; sleep 1000");
    let (error, text) = add_fails(&node).await;
    assert!(matches!(error, PluginError::Timeout(_)), "{text}");
}

#[tokio::test]
async fn a_child_that_keeps_the_pipe_open_does_not_hang_the_pod() {
    let node = Node::with_chain("1.0.0");
    let pid = node.path("pid");
    let script = format!(
        r#"sleep 1000 & echo $! > {}; echo '{{"ips":[{{"address":"10.9.0.3/24"}}]}}'"#,
        pid.display()
    );
    node.hook("three", "ADD", &script);
    let result = timeout(LONG / 2, node.cni().add(&pod("pod1")))
        .await
        .expect("no hang")
        .unwrap();
    assert_eq!(result.ips[0].to_string(), "10.9.0.3");
    // The plugin meant it to stay; the test does not.
    let pid: i32 = fs::read_to_string(pid).unwrap().trim().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL).unwrap();
}

#[tokio::test]
async fn rubbish_is_shown_in_short() {
    for script in [
        "echo '<html>not json</html>'",
        "printf '{\"ips\":[{\"address\":'",
        "printf '\\377\\376\\000'",
        "true",
        "echo '{} {}'",
    ] {
        let (error, text) = add_with(script).await;
        assert!(
            matches!(error, PluginError::Output { .. }),
            "{script}: {text}"
        );
    }
    let (_, text) = add_with("echo '<html>not json</html>'").await;
    assert!(text.contains("<html>"), "{text}");
    let (_, text) = add_with("yes rubbish | head -c 100000").await;
    assert!(text.len() < 2000, "{}", text.len());
}

#[tokio::test]
async fn a_result_that_makes_no_sense_is_refused() {
    for (result, part) in [
        (r#"[]"#, "not a JSON object"),
        (r#"{"ips":[{"address":"999.1.1.1/24"}]}"#, "999.1.1.1"),
        (
            r#"{"ips":[{"address":"10.0.0.1/24","interface":5}]}"#,
            "interface 5",
        ),
        (r#"{"cniVersion":"7.0.0"}"#, "7.0.0"),
    ] {
        let (error, text) = add_with(&format!("echo '{result}'")).await;
        assert!(matches!(error, PluginError::Result(_)), "{text}");
        assert!(text.contains(part), "{text}");
    }
    // Nested deeper than any parser should follow.
    let (error, text) = add_with("head -c 500000 /dev/zero | tr '\\0' '['").await;
    assert!(matches!(error, PluginError::Output { .. }), "{text}");
}

#[tokio::test]
async fn endless_output_is_cut_off() {
    let (error, text) = add_with("yes").await;
    assert!(matches!(error, PluginError::TooMuchOutput), "{text}");
    // One that ignores the broken pipe.
    let (error, text) = add_with("trap '' PIPE; while :; do yes 2>/dev/null; done").await;
    assert!(matches!(error, PluginError::TooMuchOutput), "{text}");
    // Endless complaints are read, so that the plugin gets on, but not kept.
    let (error, text) = add_with("yes complaint | head -c 5000000 >&2; exit 4").await;
    assert!(matches!(error, PluginError::Failed { .. }), "{text}");
    assert!(text.contains("complaint") && text.len() < 2000, "{text}");
}

#[tokio::test]
async fn a_failure_is_told_in_the_plugins_words() {
    let (error, text) =
        add_with(r#"echo '{"code":7,"msg":"bad subnet","details":"10.1/99"}'; exit 1"#).await;
    assert!(
        matches!(error, PluginError::Reported { code: 7, .. }),
        "{text}"
    );
    assert!(
        text.contains("bad subnet") && text.contains("10.1/99"),
        "{text}"
    );
    // Some print an error and exit as if nothing were.
    let (error, text) = add_with(r#"echo '{"code":7,"msg":"bad subnet"}'"#).await;
    assert!(matches!(error, PluginError::Reported { .. }), "{text}");
    let (_, text) = add_with("echo 'panic: nil' >&2; exit 2").await;
    assert!(
        text.contains("panic: nil") && text.contains("exit status: 2"),
        "{text}"
    );
    let (_, text) = add_with("exit 2").await;
    assert!(text.contains("said nothing"), "{text}");
    let (_, text) = add_with("kill -SEGV $$").await;
    assert!(text.contains("signal: 11"), "{text}");
    let (_, text) = add_with("printf 'a\\nb\\033[31mc' >&2; exit 2").await;
    assert!(!text.contains(['\n', '\u{1b}']), "{text}");
}

#[tokio::test]
async fn a_plugin_that_is_missing_or_no_program_is_named_with_where_it_was_sought() {
    let node = Node::with_chain("1.0.0");
    fs::remove_file(node.path("bin/two")).unwrap();
    let sought = node.path("bin").display().to_string();
    let error = node.cni().add(&pod("pod1")).await.unwrap_err();
    let text = words(&error);
    assert!(text.contains("\"two\"") && text.contains(&sought), "{text}");
    // It is missed before the first plugin runs, so there is nothing to be undone.
    assert!(matches!(error, NetworkError::Attach { cleanup: None, .. }));
    assert!(node.records().is_empty());
    node.plugin("two");
    node.cni().add(&pod("pod1")).await.unwrap();
    node.cni().del("pod1", None).await.unwrap();

    fs::remove_file(node.path("bin/two")).unwrap();
    fs::create_dir(node.path("bin/two")).unwrap();
    let text = words(&node.cni().add(&pod("pod2")).await.unwrap_err());
    assert!(text.contains(&sought), "{text}");
}

#[tokio::test]
async fn a_plugin_may_leave_its_input_unread_and_its_input_may_be_large() {
    let node = Node::with_chain("1.0.0");
    let filler = "x".repeat(400_000);
    let list = format!(
        r#"{{"cniVersion":"1.0.0","name":"net","plugins":[{{"type":"deaf","filler":"{filler}"}},
            {{"type":"one","filler":"{filler}"}}]}}"#
    );
    node.network("10-net.conflist", &list);
    let deaf = node.path("bin/deaf");
    fs::copy(node.path("bin/one"), &deaf).unwrap();
    let script = fs::read_to_string(&deaf).unwrap();
    fs::write(
        node.path("deaf.new"),
        script.replace("cat >", "echo '{}' >"),
    )
    .unwrap();
    fs::set_permissions(
        node.path("deaf.new"),
        fs::metadata(&deaf).unwrap().permissions(),
    )
    .unwrap();
    fs::rename(node.path("deaf.new"), &deaf).unwrap();
    let cni = node.cni();
    timeout(LONG, cni.add(&pod("pod1")))
        .await
        .expect("no hang")
        .unwrap();
    assert_eq!(
        node.input("one", "ADD")["filler"].as_str().map(str::len),
        Some(400_000)
    );
}
