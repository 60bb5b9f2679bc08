//! Why a configuration can't be used.

use std::io;
use std::path::PathBuf;

/// Why a configuration can't be used. The text names the file and the key, and says what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file, or the directory of drop-ins, can't be read.
    #[error("can't read {}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// What reading said.
        #[source]
        source: io::Error,
    },
    /// The file is not TOML.
    #[error("{}{}: {reason}", path.display(), at(*line))]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Its line, counted from 1, when it is known.
        line: Option<usize>,
        /// What the parser says.
        reason: String,
    },
    /// A key that there isn't, or a value of the wrong kind.
    #[error("{}{}: {key}: {reason}", path.display(), at(*line))]
    Key {
        /// The file.
        path: PathBuf,
        /// Its line, counted from 1, when it is known.
        line: Option<usize>,
        /// The key, dotted.
        key: String,
        /// What is wrong, and what is allowed.
        reason: String,
    },
    /// Values that are of the right kind but can't work.
    #[error("{}", list(.0))]
    Values(Vec<(Option<PathBuf>, crate::Problem)>),
    /// A configuration can't be written down; a defect of ours.
    #[error("can't write the configuration as TOML")]
    Write(#[source] toml::ser::Error),
}

fn at(line: Option<usize>) -> String {
    line.map(|line| format!(":{line}")).unwrap_or_default()
}

fn list(problems: &[(Option<PathBuf>, crate::Problem)]) -> String {
    let lines: Vec<String> = problems
        .iter()
        .map(|(file, problem)| match file {
            Some(file) => format!("{}: {problem}", file.display()),
            None => problem.to_string(),
        })
        .collect();
    lines.join("\n")
}
