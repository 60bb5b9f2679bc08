//! Reading the files.

use crate::{Config, ConfigError, Problem};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// The file that is read when none is named; it need not exist.
pub const DEFAULT_FILE: &str = "/etc/slipway/config.toml";
/// Name of the directory of drop-ins, beside the file.
pub const DROP_IN_DIR: &str = "config.d";

impl Config {
    /// Reads the configuration: `path`, or [`DEFAULT_FILE`] if there is one, then the `*.toml` of the
    /// directory [`DROP_IN_DIR`] beside it in name order. Tables are merged key by key, anything else is
    /// replaced. Says which files were read.
    ///
    /// # Errors
    /// [`ConfigError`]: a named file that is missing, a file that can't be read or understood, an unknown
    /// key, a value that can't work.
    pub fn load(path: Option<&Path>) -> Result<(Self, Vec<PathBuf>), ConfigError> {
        let (main, named) = match path {
            Some(path) => (path, true),
            None => (Path::new(DEFAULT_FILE), false),
        };
        let mut sources = Vec::new();
        match std::fs::read_to_string(main) {
            Ok(text) => sources.push(Source::parse(main, &text)?),
            Err(e) if e.kind() == io::ErrorKind::NotFound && !named => {}
            Err(source) => {
                return Err(ConfigError::Read {
                    path: main.to_owned(),
                    source,
                });
            }
        }
        let dir = main.parent().unwrap_or(Path::new("/")).join(DROP_IN_DIR);
        for path in drop_ins(&dir)? {
            let text = std::fs::read_to_string(&path).map_err(|source| ConfigError::Read {
                path: path.clone(),
                source,
            })?;
            sources.push(Source::parse(&path, &text)?);
        }
        let config = merged(&sources)?;
        config.validate().map_err(|problems| {
            let placed = |problem: Problem| (origin(&sources, &problem.key), problem);
            ConfigError::Values(problems.into_iter().map(placed).collect())
        })?;
        Ok((config, sources.into_iter().map(|s| s.path).collect()))
    }
}

/// One file, known to be a configuration by itself.
#[derive(Debug)]
struct Source {
    path: PathBuf,
    table: Table,
}

impl Source {
    fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let syntax = |e: &toml::de::Error| ConfigError::Syntax {
            path: path.to_owned(),
            line: line(text, e),
            reason: one_line(e.message()),
        };
        let table: Table = toml::from_str(text).map_err(|e| syntax(&e))?;
        // Every key is optional, so each file is checked alone: only here are its lines known.
        let parser = toml::de::Deserializer::parse(text).map_err(|e| syntax(&e))?;
        match serde_path_to_error::deserialize::<_, Config>(parser) {
            Ok(_) => Ok(Self {
                path: path.to_owned(),
                table,
            }),
            Err(e) => Err(ConfigError::Key {
                path: path.to_owned(),
                line: line(text, e.inner()),
                key: e.path().to_string(),
                reason: one_line(e.inner().message()),
            }),
        }
    }
}

fn drop_ins(dir: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let failed = |source| ConfigError::Read {
        path: dir.to_owned(),
        source,
    };
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(Vec::new());
        }
        Err(e) => return Err(failed(e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let hidden = path
            .file_name()
            .is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
        if path.extension() == Some(OsStr::new("toml")) && !hidden {
            names.push(path);
        }
    }
    names.sort();
    Ok(names)
}

/// A handler is what one file says of it: two that each describe one of this name mean two, and neither's author would
/// know what came of both.
fn one_file_each(sources: &[Source]) -> Result<(), ConfigError> {
    let mut first: BTreeMap<&str, &Path> = BTreeMap::new();
    for source in sources {
        let handlers = source.table.get("runtimes").and_then(Value::as_table);
        for name in handlers.into_iter().flat_map(Table::keys) {
            if let Some(other) = first.insert(name, &source.path) {
                return Err(ConfigError::Key {
                    path: source.path.clone(),
                    line: None,
                    key: format!("runtimes.{name}"),
                    reason: format!(
                        "{} describes a runtime handler of this name, too; keep one of them, or rename one",
                        other.display()
                    ),
                });
            }
        }
    }
    Ok(())
}

fn merged(sources: &[Source]) -> Result<Config, ConfigError> {
    one_file_each(sources)?;
    let mut all = Table::new();
    for source in sources {
        merge(&mut all, source.table.clone());
    }
    // Each file was accepted by itself, so this fails only where two of them don't fit together.
    let mut config: Config = serde_path_to_error::deserialize(Value::Table(all)).map_err(|e| {
        let key = e.path().to_string();
        let path = origin(sources, &key).unwrap_or_else(|| PathBuf::from(DEFAULT_FILE));
        ConfigError::Key {
            path,
            line: None,
            key,
            reason: one_line(e.inner().message()),
        }
    })?;
    config.runtimes.entry("native".to_owned()).or_default();
    Ok(config)
}

fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => merge(old, new),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

/// The last file that sets `key`.
fn origin(sources: &[Source], key: &str) -> Option<PathBuf> {
    let sets = |table: &Table| {
        let mut steps = key.split('.');
        let first = steps.next().and_then(|step| table.get(step));
        steps
            .try_fold(first?, |value, step| value.as_table()?.get(step))
            .map(|_| ())
    };
    let source = sources
        .iter()
        .rev()
        .find(|source| sets(&source.table).is_some());
    source.map(|source| source.path.clone())
}

fn line(text: &str, error: &toml::de::Error) -> Option<usize> {
    let start = error.span()?.start;
    Some(
        text.as_bytes()
            .get(..start)?
            .iter()
            .filter(|b| **b == b'\n')
            .count()
            + 1,
    )
}

fn one_line(message: &str) -> String {
    message.trim().replace('\n', ", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LogFormat, LogLevel, Size};
    use std::fs;
    use std::time::Duration;

    fn write(dir: &Path, files: &[(&str, &str)]) -> PathBuf {
        fs::create_dir_all(dir.join(DROP_IN_DIR)).expect("directory");
        for (name, text) in files {
            fs::write(dir.join(name), text).expect("file");
        }
        dir.join("config.toml")
    }

    fn failure(files: &[(&str, &str)]) -> String {
        let dir = tempfile::tempdir().expect("directory");
        let main = write(dir.path(), files);
        let error = Config::load(Some(&main)).expect_err("must fail");
        error
            .to_string()
            .replace(&format!("{}/", dir.path().display()), "")
    }

    #[test]
    fn drop_ins_win_in_name_order() {
        let dir = tempfile::tempdir().expect("directory");
        let files = [
            (
                "config.toml",
                "listen = '/a.sock'\n[log]\nlevel = 'debug'\n[images]\nretries = 2\n",
            ),
            (
                "config.d/20-b.toml",
                "log.format = 'json'\nlog.level = 'warn'\n",
            ),
            (
                "config.d/10-a.toml",
                "log.level = 'trace'\n[images]\npull_progress_timeout = '5m'\n",
            ),
            (
                "config.d/30-c.toml",
                "[images.mirrors]\n'docker.io' = ['m:5000']\n[limits]\nexec_output = '1MiB'\n",
            ),
            ("config.d/notes.txt", "no toml"),
            ("config.d/.40.toml.swp", "no toml"),
            ("config.d/.50.toml", "no toml"),
        ];
        let main = write(dir.path(), &files);
        let (config, read) = Config::load(Some(&main)).expect("loads");
        assert_eq!(config.log.level, LogLevel::Warn);
        assert_eq!(config.log.format, LogFormat::Json);
        assert_eq!(config.listen, Path::new("/a.sock"));
        assert_eq!(config.images.retries, 2);
        assert_eq!(
            config.images.pull_progress_timeout,
            Duration::from_secs(300)
        );
        assert_eq!(config.images.mirrors["docker.io"], ["m:5000"]);
        assert_eq!(config.limits.exec_output, Size::mib(1));
        assert_eq!(config.network, Config::default().network);
        assert!(config.runtimes.contains_key("native"));
        let names: Vec<_> = read.iter().filter_map(|p| p.file_name()).collect();
        assert_eq!(
            names,
            ["config.toml", "10-a.toml", "20-b.toml", "30-c.toml"]
        );
    }

    #[test]
    fn further_runtimes_do_not_push_native_out() {
        let dir = tempfile::tempdir().expect("directory");
        let text = "default_runtime = 'native'\n[runtimes.fast]\ntype = 'native'\n";
        let main = write(dir.path(), &[("config.toml", text)]);
        let (config, _) = Config::load(Some(&main)).expect("loads");
        assert_eq!(
            config.runtimes.keys().collect::<Vec<_>>(),
            ["fast", "native"]
        );
    }

    #[test]
    fn a_handler_is_described_in_one_file() {
        let text = "[runtimes.crun]\ntype = 'oci'\n";
        let message = failure(&[
            ("config.toml", ""),
            ("config.d/1.toml", text),
            (
                "config.d/2.toml",
                "[runtimes.crun]\ntype = 'oci'\npath = '/opt/crun'\n",
            ),
        ]);
        for part in ["config.d/1.toml", "config.d/2.toml: ", "runtimes.crun"] {
            assert!(message.contains(part), "{message}");
        }
        let dir = tempfile::tempdir().expect("directory");
        let main = write(
            dir.path(),
            &[("config.toml", ""), ("config.d/1.toml", text)],
        );
        let (config, _) = Config::load(Some(&main)).expect("loads");
        assert_eq!(config.runtimes.len(), 2);
    }

    #[test]
    fn a_named_file_must_exist() {
        let dir = tempfile::tempdir().expect("directory");
        let error = Config::load(Some(&dir.path().join("nothing"))).expect_err("must fail");
        assert!(matches!(error, ConfigError::Read { .. }), "{error}");
    }

    #[test]
    fn errors_name_file_line_key_and_what_is_allowed() {
        let cases: &[(&str, &[&str])] = &[
            ("\nlisten = ", &["config.d/1.toml:2: "]),
            (
                "[log]\n\nlevle = 'info'",
                &["config.d/1.toml:3: log", "levle", "`format` or `level`"],
            ),
            (
                "log.level = 'loud'",
                &[
                    "config.d/1.toml:1: log.level: ",
                    "`loud`",
                    "`error`, `warn`",
                ],
            ),
            (
                "listening = 1",
                &["config.d/1.toml:1: ", "listening", "`listen`"],
            ),
            (
                "[images]\nretries = 'x'",
                &["config.d/1.toml:2: images.retries: ", "u32"],
            ),
            (
                "[images]\nconnect_timeout = 3",
                &["config.d/1.toml:2: images.connect_timeout: ", "duration"],
            ),
            (
                "[limits]\nmax_message = '1MB'",
                &[":2: limits.max_message: ", "64MiB"],
            ),
            (
                "[runtimes.x]\ntype = 'vm'",
                &["runtimes.x.type: ", "`vm`", "`native`", "`oci`"],
            ),
            ("[runtimes.x]\n", &["runtimes.x: ", "type"]),
            (
                "[pod.default_sysctls]\n'net.x' = 1",
                &["pod.default_sysctls", "string"],
            ),
            ("[pod]\nshm_size = 1", &["config.d/1.toml: pod.shm_size: "]),
            (
                "log.level = 'info'\nlog.level = 'warn'",
                &["config.d/1.toml:2: "],
            ),
        ];
        for (text, parts) in cases {
            let message = failure(&[("config.toml", "[pod]\n"), ("config.d/1.toml", text)]);
            for part in *parts {
                assert!(
                    message.contains(part),
                    "{text:?}: {message:?} lacks {part:?}"
                );
            }
            assert!(!message.contains('\n'), "{message:?}");
        }
    }

    #[test]
    fn all_bad_values_are_listed() {
        let message = failure(&[
            ("config.toml", "[pod]\nshm_size = 1\n"),
            ("config.d/1.toml", "images.retries = 999\n"),
        ]);
        assert!(
            message.contains("config.d/1.toml: images.retries: "),
            "{message}"
        );
        assert!(message.contains("config.toml: pod.shm_size: "), "{message}");
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics(text in "[a-z.=\\[\\]'\" \n0-9#{}]*") {
            let _ = Source::parse(Path::new("x"), &text);
        }
    }
}
