//! What the probe (`tests/images/probe.c`) says.

use std::collections::BTreeMap;

/// Lines of the form `key value`.
#[derive(Debug, Clone)]
pub struct Report {
    values: BTreeMap<String, String>,
    /// Variables of the environment, in order.
    pub env: Vec<String>,
}

impl Report {
    /// Reads the output of `probe status` or `probe syscalls`.
    pub fn new(text: &str) -> Self {
        let mut report = Self {
            values: BTreeMap::new(),
            env: Vec::new(),
        };
        for line in text.lines() {
            let (key, value) = line.split_once(' ').unwrap_or((line, ""));
            if key == "env" {
                report.env.push(value.to_owned());
            } else {
                report
                    .values
                    .insert(key.to_owned(), value.trim().to_owned());
            }
        }
        report
    }

    /// The value of a key, which must be there.
    #[track_caller]
    pub fn get(&self, key: &str) -> &str {
        self.values
            .get(key)
            .unwrap_or_else(|| panic!("the probe did not report {key}: {:?}", self.values))
    }

    /// Numbers of a value.
    #[track_caller]
    pub fn numbers(&self, key: &str) -> Vec<u64> {
        let number = |word: &str| {
            word.parse()
                .unwrap_or_else(|_| panic!("{key}: {word} is no number"))
        };
        self.get(key).split_whitespace().map(number).collect()
    }

    /// Supplemental groups, sorted.
    #[track_caller]
    pub fn groups(&self) -> Vec<u64> {
        let mut groups = self.numbers("Groups");
        groups.sort_unstable();
        groups
    }

    /// A set of capabilities, as bits.
    #[track_caller]
    pub fn caps(&self, set: &str) -> u64 {
        u64::from_str_radix(self.get(set), 16).expect("a mask in hexadecimal")
    }

    /// Signals that are ignored, but for the two that glibc keeps for itself and lets nobody change.
    #[track_caller]
    pub fn ignored_signals(&self) -> u64 {
        self.caps("SigIgn") & !(1 << 31 | 1 << 32)
    }

    /// Keys that begin like this, with their values.
    pub fn starting(&self, prefix: &str) -> Vec<(&str, &str)> {
        self.values
            .iter()
            .filter(|(k, _)| k.starts_with(prefix))
            .map(|(k, v)| (k.as_str(), v.as_str()))
            .collect()
    }
}
