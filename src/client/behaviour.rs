//! Whole commands against the fake runtime.
use std::fs;

use clap::Parser;
use tokio::sync::mpsc::UnboundedSender;
use tonic::Code;

use crate::fake::{Fake, Script};
use crate::interrupt::Interrupts;
use crate::{ClientError, Command, Global, bench, dispatch, run};

#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

fn parse(words: &[&str]) -> Command {
    let words = std::iter::once(&"slipway").chain(words);
    Cli::try_parse_from(words).unwrap().command
}

async fn command(fake: &Fake, words: &[&str]) -> Result<u8, ClientError> {
    dispatch(parse(words), &fake.global()).await
}

/// `slipway run` whose signals come from the test.
fn run_command(
    global: Global,
    words: &[&str],
) -> (
    UnboundedSender<&'static str>,
    impl Future<Output = Result<u8, ClientError>> + use<>,
) {
    let Command::Run(args) = parse(words) else {
        panic!("not run")
    };
    let (signals, mut interrupts) = Interrupts::fake();
    (signals, async move {
        run::run_interruptible(&args, &global, &mut interrupts).await
    })
}

fn log_dir(fake: &Fake) -> String {
    format!("--log-dir={}", fake.dir().join("logs").display())
}

const ENTRY: &str = "2016-10-06T00:17:09.669794202Z stderr F said by the fake container\n";

#[tokio::test]
async fn run_pulls_gives_the_exit_code_and_removes_all() {
    let fake = Fake::start(Script {
        exit_code: Some(42),
        log: ENTRY.into(),
        ..Script::default()
    });
    let logs = log_dir(&fake);
    let code = command(
        &fake,
        &["run", &logs, "--name", "web", "--timings", "img", "a", "-b"],
    )
    .await;
    assert_eq!(code.unwrap(), 42);
    assert!(fake.is_empty());
    assert_eq!(fake.state().images, ["img"]);
    let pulls = fake
        .state()
        .calls
        .iter()
        .filter(|c| **c == "PullImage")
        .count();
    assert_eq!(pulls, 1);
    assert_eq!(
        fs::read_to_string(fake.dir().join("logs/web/0.log")).unwrap(),
        ENTRY
    );
    // Present now: not pulled again.
    command(&fake, &["run", &logs, "img"]).await.unwrap();
    assert_eq!(
        fake.state()
            .calls
            .iter()
            .filter(|c| **c == "PullImage")
            .count(),
        1
    );
}

#[tokio::test]
async fn run_removes_all_whatever_fails() {
    for failing in [
        "RunPodSandbox",
        "CreateContainer",
        "StartContainer",
        "ContainerStatus",
    ] {
        let fake = Fake::start(Script {
            fail: [(failing, Code::Internal)].into(),
            ..Script::default()
        });
        let error = command(&fake, &["run", &log_dir(&fake), "img"])
            .await
            .unwrap_err();
        assert_eq!(error.code(), Some(Code::Internal), "{failing}: {error}");
        assert!(
            error
                .to_string()
                .starts_with(&format!("{failing}: Internal: ")),
            "{error}"
        );
        assert!(fake.is_empty(), "{failing}");
    }
}

#[tokio::test]
async fn run_removes_a_pod_whose_id_was_lost() {
    let fake = Fake::start(Script {
        lose_pod: true,
        ..Script::default()
    });
    let error = command(&fake, &["run", &log_dir(&fake), "img"])
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some(Code::DeadlineExceeded));
    assert!(fake.state().calls.contains(&"RemovePodSandbox"));
    assert!(fake.is_empty());
}

#[tokio::test]
async fn run_of_what_cannot_be_run_gives_its_code() {
    let fake = Fake::start(Script {
        exit_code: Some(127),
        fail: [("StartContainer", Code::Internal)].into(),
        ..Script::default()
    });
    assert_eq!(
        command(&fake, &["run", &log_dir(&fake), "img", "nope"])
            .await
            .unwrap(),
        127
    );
    assert!(fake.is_empty());
}

#[tokio::test]
async fn run_never_pulls_when_told_so() {
    let fake = Fake::start(Script::default());
    let error = command(&fake, &["run", "--pull", "never", "img"])
        .await
        .unwrap_err();
    assert!(matches!(error, ClientError::ImageAbsent(_)), "{error}");
    assert!(!fake.state().calls.contains(&"RunPodSandbox"));
}

#[tokio::test]
async fn an_interrupted_run_stops_and_removes() {
    let fake = Fake::start(Script::default());
    let (signals, run) = run_command(fake.global(), &["run", &log_dir(&fake), "img"]);
    let run = tokio::spawn(run);
    let running = async {
        while !fake.state().calls.contains(&"ContainerStatus") {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(fake.global().timeout, running)
        .await
        .unwrap();
    signals.send("SIGTERM").unwrap();
    let error = run.await.unwrap().unwrap_err();
    assert!(
        matches!(error, ClientError::Interrupted("SIGTERM")),
        "{error}"
    );
    assert!(fake.state().calls.contains(&"StopContainer"));
    assert!(fake.is_empty());
}

#[tokio::test]
async fn an_early_signal_removes_what_the_start_made() {
    let fake = Fake::start(Script::default());
    let (signals, run) = run_command(fake.global(), &["run", &log_dir(&fake), "img"]);
    // Already there when the pull begins.
    signals.send("SIGINT").unwrap();
    let error = run.await.unwrap_err();
    assert!(
        matches!(error, ClientError::Interrupted("SIGINT")),
        "{error}"
    );
    assert!(fake.is_empty());
}

#[tokio::test]
async fn a_detached_pod_stays_until_it_is_removed() {
    let fake = Fake::start(Script::default());
    let logs = log_dir(&fake);
    command(&fake, &["run", "-d", &logs, "--name", "web", "img"])
        .await
        .unwrap();
    let pod = fake.state().pods.keys().next().unwrap().clone();
    let container = fake.state().containers.keys().next().unwrap().clone();
    assert_eq!(
        command(&fake, &["exec", &container[..20], "true"])
            .await
            .unwrap(),
        0
    );
    assert_eq!(
        command(&fake, &["exec", &container[..20], "false"])
            .await
            .unwrap(),
        7
    );
    for words in [
        &["ps"][..],
        &["pods", "-o", "yaml"],
        &["ps", "-o", "json"],
        &["inspect", &pod],
    ] {
        command(&fake, words).await.unwrap();
    }
    assert!(command(&fake, &["rm", &container]).await.is_err());
    assert!(command(&fake, &["rmp", &pod]).await.is_err());
    assert_eq!(fake.state().containers.len(), 1);
    command(&fake, &["stop", &container]).await.unwrap();
    command(&fake, &["rm", &container]).await.unwrap();
    assert!(fake.state().containers.is_empty());
    assert!(command(&fake, &["rm", &container]).await.is_err());
    command(&fake, &["rmp", "-f", &pod]).await.unwrap();
    assert!(fake.is_empty());
}

#[tokio::test]
async fn images_come_and_go() {
    let fake = Fake::start(Script::default());
    command(&fake, &["pull", "a:1", "bb:2"]).await.unwrap();
    command(&fake, &["images"]).await.unwrap();
    command(&fake, &["inspect", "a:1"]).await.unwrap();
    assert!(command(&fake, &["rmi", "ccc:3", "a:1"]).await.is_err());
    assert_eq!(fake.state().images, ["bb:2"]);
    command(&fake, &["rmi", "--all"]).await.unwrap();
    assert!(fake.state().images.is_empty());
}

async fn bench_command(fake: &Fake, words: &[&str]) -> Result<(), ClientError> {
    let Command::Bench(args) = parse(words) else {
        panic!("not bench")
    };
    let (_signals, mut interrupts) = Interrupts::fake();
    bench::bench_interruptible(&args, &fake.global(), &mut interrupts).await
}

#[tokio::test]
async fn bench_compares_runtimes_and_leaves_nothing() {
    let (first, second) = (
        Fake::start(Script::default()),
        Fake::start(Script::default()),
    );
    let json = first.dir().join("results.json");
    let (one, two) = (
        format!("one={}", first.endpoint()),
        format!("two={}", second.endpoint()),
    );
    let json_option = format!("--json={}", json.display());
    let words = [
        "bench",
        "--endpoint",
        &one,
        "--endpoint",
        &two,
        "--image",
        "img",
        "--pods",
        "4",
        "--parallel",
        "2",
        "--network",
        "both",
        "--warmup",
        "1",
        "--exec",
        "2",
        "--containers-per-pod",
        "2",
        &json_option,
    ];
    bench_command(&first, &words).await.unwrap();
    assert!(first.is_empty() && second.is_empty());
    let text = fs::read_to_string(&json).unwrap();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    let groups = value["groups"].as_array().unwrap();
    assert_eq!(groups.len(), 4);
    assert_eq!(value["endpoints"][1]["runtime"], "fake");
    for group in groups {
        let results = group["results"].as_array().unwrap();
        assert_eq!(results.len(), 2);
        for result in results {
            let count = |name: &str| result["operations_ms"][name]["count"].as_u64().unwrap_or(0);
            assert_eq!((count("pod ready"), count("teardown")), (4, 4));
            assert_eq!((count("StartContainer"), count("RunPodSandbox")), (8, 4));
            let sequential = group["parallel"] == 1;
            assert_eq!(count("ExecSync"), if sequential { 8 } else { 0 });
            assert_eq!(result["pods_per_second"].is_number(), !sequential);
            assert!(result["ratio_to_first"]["pod ready"].as_f64().unwrap() > 0.0);
        }
    }
    // 1 + 4 pods one after the other, 2 + 4 at once, on two networks.
    let pods = first
        .state()
        .calls
        .iter()
        .filter(|call| **call == "RunPodSandbox")
        .count();
    assert_eq!(pods, 22);
}

#[tokio::test]
async fn bench_times_the_calls_of_a_full_node() {
    let fake = Fake::start(Script::default());
    let json = fake.dir().join("results.json");
    let json_option = format!("--json={}", json.display());
    let words = [
        "bench",
        "--image",
        "img",
        "--pods",
        "0",
        "--warmup",
        "0",
        "--containers",
        "5",
    ];
    let words = [
        &words[..],
        &[
            "--containers-per-pod",
            "2",
            "--apart",
            "0s",
            "--watch",
            "0s",
            &json_option,
        ],
    ]
    .concat();
    bench_command(&fake, &words).await.unwrap();
    assert!(fake.is_empty());
    let text = fs::read_to_string(&json).unwrap();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    let group = value["groups"].as_array().unwrap().last().unwrap();
    assert_eq!(group["containers"], 5);
    let result = &group["results"][0];
    for call in [
        "ListPodSandbox",
        "ListContainers",
        "ListContainerStats",
        "ListContainerStats, at once again",
    ] {
        assert_eq!(result["operations_ms"][call]["count"], 30, "{call}");
    }
    // The runtime has no such call, and is not asked again.
    assert!(result["operations_ms"]["ListPodSandboxStats"].is_null());
    assert!(result["cpu_percent"].is_number());
    let started = fake
        .state()
        .calls
        .iter()
        .filter(|call| **call == "StartContainer")
        .count();
    assert_eq!(started, 6);
}

#[tokio::test]
async fn an_interrupted_bench_ends_its_round_and_leaves_nothing() {
    let fake = Fake::start(Script::default());
    let Command::Bench(args) = parse(&["bench", "--image", "img", "--pods", "1000000"]) else {
        panic!("not bench")
    };
    let (signals, mut interrupts) = Interrupts::fake();
    let global = fake.global();
    let interrupt = async {
        while !fake.state().calls.contains(&"StartContainer") {
            tokio::task::yield_now().await;
        }
        signals.send("SIGINT").unwrap();
    };
    let bench = Box::pin(bench::bench_interruptible(&args, &global, &mut interrupts));
    let both = async { tokio::join!(bench, interrupt).0 };
    let error = tokio::time::timeout(global.timeout, both)
        .await
        .unwrap()
        .unwrap_err();
    assert!(
        matches!(error, ClientError::Interrupted("SIGINT")),
        "{error}"
    );
    assert!(fake.is_empty());
    // Each pod that was begun was also taken down in order.
    let count = |name| {
        fake.state()
            .calls
            .iter()
            .filter(|call| **call == name)
            .count()
    };
    assert_eq!(count("RunPodSandbox"), count("StopContainer"));
}

#[tokio::test]
async fn bench_reports_failures_and_leaves_nothing() {
    let fail = [("StartContainer", Code::Unavailable)];
    let fake = Fake::start(Script {
        fail: fail.into(),
        ..Script::default()
    });
    let error = bench_command(&fake, &["bench", "--image", "img", "--pods", "3"])
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some(Code::Unavailable), "{error}");
    assert!(fake.is_empty());
    let words = ["bench", "--image", "img", "--pods", "3", "--warmup", "0"];
    let error = bench_command(&fake, &words).await.unwrap_err();
    assert!(matches!(error, ClientError::Some(3, 3)), "{error}");
    assert!(fake.is_empty());
}
