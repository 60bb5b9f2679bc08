//! The fuzzers' targets on stable: the corpus, and mutations of it for a bounded time.
//!
//! `SLIPWAY_FUZZ_SECONDS` says how long; 2 seconds for each target otherwise.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../fuzz/targets.rs"]
mod targets;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(name);
    let mut files: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(files.len() >= 5, "where is the corpus?");
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// A few changes such as fuzzers make.
fn mutate(random: &mut fastrand::Rng, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut input = random.choice(corpus).unwrap().clone();
    for _ in 0..random.usize(1..8) {
        let at = random.usize(..=input.len());
        match random.u8(..6) {
            0 if at < input.len() => input[at] ^= 1 << random.u8(..8),
            1 if at < input.len() => input[at] = *random.choice(&[0, 1, 0x7f, 0x80, 0xff]).unwrap(),
            2 if at < input.len() => drop(input.remove(at)),
            3 => input.insert(at, random.u8(..)),
            4 => input.truncate(at),
            _ => {
                let other = random.choice(corpus).unwrap();
                let from = random.usize(..=other.len());
                input.extend_from_slice(&other[from..]);
            }
        }
    }
    input
}

fn run(name: &str, target: fn(&[u8])) {
    let corpus = corpus(name);
    corpus.iter().for_each(|input| target(input));
    let seconds = std::env::var("SLIPWAY_FUZZ_SECONDS").ok();
    let seconds = seconds
        .and_then(|seconds| seconds.parse().ok())
        .unwrap_or(2);
    let until = Instant::now() + Duration::from_secs(seconds);
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    let mut runs = 0u64;
    while Instant::now() < until {
        let input = mutate(&mut random, &corpus);
        let result = std::panic::catch_unwind(|| target(&input));
        assert!(
            result.is_ok(),
            "{name} failed with seed {seed} after {runs} runs on {input:02x?}"
        );
        runs += 1;
    }
    println!("{name}: {runs} mutations");
}

#[test]
fn spdy() {
    run("spdy", targets::spdy);
}

#[test]
fn channel() {
    run("channel", targets::channel);
}
