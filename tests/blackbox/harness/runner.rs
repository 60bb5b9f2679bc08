//! Runs the tests, tells how they went, and looks for what they left behind.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{Driver, Env, Skipped, Test, leaks, seconds};

/// A test that takes longer has failed.
fn limit() -> Duration {
    seconds(180)
}

enum Outcome {
    Passed,
    Skipped(String),
    Failed(String),
}

/// Runs what the arguments select; true when nothing failed.
pub async fn run(tests: &[Test], root: &Path, cgroup: &str, driver: Driver) -> bool {
    let Arguments {
        filters,
        jobs,
        shard: (shard, shards),
    } = arguments();
    let selected = (1..)
        .zip(tests.iter().copied())
        .filter(|(_, t)| filters.is_empty() || filters.iter().any(|f| t.name.contains(f.as_str())));
    // By turns, so that each gets its part of every module.
    let selected: Vec<(u32, Test)> = selected.skip(shard - 1).step_by(shards).collect();
    let (alone, together): (VecDeque<_>, VecDeque<_>) =
        selected.into_iter().partition(|(_, t)| t.alone);
    let outcomes = Arc::new(Mutex::new(Vec::new()));
    for (queue, jobs) in [(together, jobs), (alone, 1)] {
        let queue = Arc::new(Mutex::new(queue));
        let mut workers = tokio::task::JoinSet::new();
        for _ in 0..jobs {
            let (queue, outcomes) = (queue.clone(), outcomes.clone());
            let (root, cgroup) = (root.to_owned(), cgroup.to_owned());
            workers.spawn(async move {
                loop {
                    let next = queue.lock().unwrap().pop_front();
                    let Some((number, test)) = next else { return };
                    let place = root.join(format!("t{number}"));
                    let env = Env::new(number, place, &cgroup, driver);
                    let outcome = one(test, env).await;
                    outcomes.lock().unwrap().push((test.name, outcome));
                }
            });
        }
        workers.join_all().await;
    }
    let outcomes = outcomes.lock().unwrap();
    let count = |wanted: fn(&Outcome) -> bool| outcomes.iter().filter(|(_, o)| wanted(o)).count();
    let failed = count(|o| matches!(o, Outcome::Failed(_)));
    println!();
    for (name, outcome) in outcomes.iter() {
        match outcome {
            Outcome::Skipped(why) => println!("SKIPPED {}: {why}", short(name)),
            Outcome::Failed(_) => println!("FAILED  {}", short(name)),
            Outcome::Passed => {}
        }
    }
    println!(
        "{} passed, {failed} failed, {} skipped",
        count(|o| matches!(o, Outcome::Passed)),
        count(|o| matches!(o, Outcome::Skipped(_))),
    );
    failed == 0
}

/// What the command line says.
struct Arguments {
    filters: Vec<String>,
    jobs: usize,
    /// This one, counted from 1, of so many.
    shard: (usize, usize),
}

fn arguments() -> Arguments {
    let (mut filters, mut jobs, mut shard) = (Vec::new(), 3, (1, 1));
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--jobs" | "--test-threads" => {
                jobs = args.next().and_then(|n| n.parse().ok()).unwrap_or(jobs)
            }
            "--shard" => {
                let text = args.next().unwrap_or_default();
                let parts = text.split_once('/').map(|(i, n)| (i.parse(), n.parse()));
                shard = match parts {
                    Some((Ok(i), Ok(n))) if (1..=n).contains(&i) => (i, n),
                    _ => panic!("--shard wants I/N, such as 1/2"),
                };
            }
            // Options of libtest that cargo and people pass.
            _ if arg.starts_with('-') => {}
            _ => filters.push(arg),
        }
    }
    Arguments {
        filters,
        jobs: jobs.max(1),
        shard,
    }
}

fn short(name: &str) -> &str {
    name.strip_prefix("blackbox::").unwrap_or(name)
}

async fn one(test: Test, env: Env) -> Outcome {
    let began = Instant::now();
    let outcome = watched(test, &env).await;
    let took = began.elapsed().as_secs_f64();
    match &outcome {
        Outcome::Passed => println!("ok      {} ({took:.1}s)", short(test.name)),
        Outcome::Skipped(why) => println!("skipped {} ({why})", short(test.name)),
        Outcome::Failed(why) => {
            println!("failed  {} ({took:.1}s)\n{}", short(test.name), indent(why));
            for daemon in env.daemons() {
                println!(
                    "    the daemon's last words ({}):\n{}",
                    keep_log(&test, &daemon),
                    indent(&daemon.last_words())
                );
            }
        }
    }
    std::fs::remove_dir_all(&env.root).ok();
    outcome
}

async fn watched(test: Test, env: &Env) -> Outcome {
    if let Err(error) = std::fs::create_dir_all(&env.root) {
        return Outcome::Failed(format!("making {}: {error}", env.root.display()));
    }
    // A task of its own, so that a panic is a failure of this test alone.
    let mut task = tokio::spawn((test.run)(env.clone()));
    let ended = tokio::time::timeout(limit(), &mut task).await;
    let outcome = match ended {
        Ok(Ok(Ok(()))) => Outcome::Passed,
        Ok(Ok(Err(error))) => match error.downcast_ref::<Skipped>() {
            Some(why) => Outcome::Skipped(why.to_string()),
            None => Outcome::Failed(format!("{error:#}")),
        },
        Ok(Err(panic)) => Outcome::Failed(match panic.try_into_panic() {
            Ok(words) => words
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| words.downcast_ref::<&str>().map(|s| (*s).to_owned()))
                .unwrap_or_default(),
            Err(error) => error.to_string(),
        }),
        Err(_) => {
            task.abort();
            Outcome::Failed(format!("not done after {:?}", limit()))
        }
    };
    // What is still there is removed through the CRI; then nothing may be left.
    let mut problems = Vec::new();
    for daemon in env.daemons() {
        if let Err(error) = daemon.remove_everything().await {
            problems.push(format!("removing what was left to remove: {error:#}"));
        }
        if let Err(error) = daemon.end().await {
            problems.push(format!("ending the daemon: {error:#}"));
        }
    }
    let found = leaks::settle(env, leaks::find).await;
    if !found.is_empty() {
        problems.push(format!("left behind:\n{}", found.join("\n")));
    }
    leaks::wipe(env).await;
    match outcome {
        Outcome::Passed if !problems.is_empty() => Outcome::Failed(problems.join("\n")),
        Outcome::Failed(why) if !problems.is_empty() => {
            Outcome::Failed(format!("{why}\nand {}", problems.join("\n")))
        }
        outcome => outcome,
    }
}

/// Copies the log of a failed test's daemon to where it outlives the run; where that is.
fn keep_log(test: &Test, daemon: &super::Daemon) -> String {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("failed");
    let to = dir.join(format!("{}.log", short(test.name)));
    match std::fs::create_dir_all(&dir).and_then(|()| std::fs::copy(daemon.log_file(), &to)) {
        Ok(_) => format!("all of them: {}", to.display()),
        Err(error) => format!("all of them are lost: {error}"),
    }
}

fn indent(text: &str) -> String {
    text.lines().map(|l| format!("    {l}\n")).collect()
}
