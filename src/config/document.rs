//! Writing a configuration down, with what each key means.

use crate::keys::{KEYS, value};
use crate::{Config, ConfigError};
use std::fmt::Write as _;
use toml::Value;

const HEAD: &str = "\
# Configuration of Slipway. Every key is optional; what stands here commented out is the default, or an
# example where the default is nothing.
# Files in config.d/ beside this one, named *.toml, are merged over it in name order.
# \"slipway config check\" finds mistakes. SIGHUP applies changed keys that are marked [reload];
# the others wait for a restart of the daemon, which leaves pods running.
";

impl Config {
    /// The configuration as a TOML file with comments. Keys that have their default value are commented
    /// out, so the file of a default configuration changes nothing, now or with a later version.
    ///
    /// # Errors
    /// [`ConfigError::Write`] for paths that are not UTF-8.
    pub fn to_toml_with_docs(&self) -> Result<String, ConfigError> {
        let own = Value::try_from(self).map_err(ConfigError::Write)?;
        let default = Value::try_from(Self::default()).map_err(ConfigError::Write)?;
        let mut text = HEAD.to_owned();
        let mut table = "";
        for key in KEYS {
            let (head, name) = key.path.rsplit_once('.').unwrap_or(("", key.path));
            // The one key without a table that is not at the top: its entries are tables themselves.
            let (head, name) = if key.path == "runtimes" {
                ("runtimes", "")
            } else {
                (head, name)
            };
            text.push('\n');
            if head != table {
                table = head;
                if name.is_empty() {
                    comment(&mut text, key.doc, key.reloads);
                }
                let _ = writeln!(text, "[{head}]");
                if !name.is_empty() {
                    text.push('\n');
                }
            }
            let (mine, usual) = (value(Some(&own), key.path), value(Some(&default), key.path));
            if name.is_empty() {
                for (name, entry) in mine.and_then(Value::as_table).into_iter().flatten() {
                    let same = usual.and_then(|u| u.get(name)) == Some(entry);
                    let off = if same { "# " } else { "" };
                    let _ = writeln!(text, "{off}{name} = {entry}");
                }
                if let Some(example) = key.example {
                    let _ = writeln!(text, "# {example}");
                }
                continue;
            }
            comment(&mut text, key.doc, key.reloads);
            match (mine, key.example) {
                (Some(mine), _) if Some(mine) != usual => {
                    let _ = writeln!(text, "{name} = {mine}");
                }
                (_, Some(example)) => {
                    let _ = writeln!(text, "# {name} = {example}");
                }
                (Some(mine), None) => {
                    let _ = writeln!(text, "# {name} = {mine}");
                }
                (None, None) => {}
            }
        }
        Ok(text)
    }
}

fn comment(text: &mut String, doc: &str, reloads: bool) {
    let mark = if reloads { " [reload]" } else { "" };
    for line in format!("{doc}{mark}").lines() {
        let _ = writeln!(text, "# {line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LogLevel, Size};

    #[test]
    fn the_default_file_changes_nothing() {
        let text = Config::default().to_toml_with_docs().expect("writes");
        let back: Config = toml::from_str(&text).expect(&text);
        let mut expected = Config::default();
        // The empty table; loading puts "native" back in.
        expected.runtimes.clear();
        assert_eq!(back, expected);
        for key in KEYS {
            let name = key.path.rsplit('.').next().unwrap_or_default();
            assert!(text.contains(name), "{} is missing", key.path);
        }
    }

    #[test]
    fn its_commented_values_are_right() {
        let text = Config::default().to_toml_with_docs().expect("writes");
        let lines = text.lines().map(|line| match line.strip_prefix("# ") {
            // Values only: prose has no " = " after its first word.
            Some(rest) if rest.split_whitespace().nth(1) == Some("=") => rest,
            _ => line,
        });
        let text = lines.collect::<Vec<_>>().join("\n");
        let back: Config = toml::from_str(&text).expect(&text);
        assert_eq!(back.validate(), Ok(()));
        let examples = [
            "images.insecure_registries",
            "images.ca_files",
            "images.mirrors",
            "pod.default_sysctls",
            "pod.seccomp_profile",
            "pod.blockio_config_file",
            "runtimes",
        ];
        let changes = crate::diff_reloadable(&Config::default(), &back);
        assert_eq!(changes.reloadable, examples);
        let fixed = [
            "images.pinned",
            "stream.base_url",
            "stream.tls_certificate",
            "stream.tls_key",
            "nri.required_plugins",
        ];
        assert_eq!(changes.restart, fixed);
    }

    #[test]
    fn changed_values_are_written() {
        let mut config = Config::default();
        config.log.level = LogLevel::Debug;
        config
            .images
            .mirrors
            .insert("docker.io".into(), vec!["m".into()]);
        config.pod.shm_size = Size(12345);
        config
            .runtimes
            .insert("more".into(), crate::Runtime::default());
        let text = config.to_toml_with_docs().expect("writes");
        let mut back: Config = toml::from_str(&text).expect(&text);
        back.runtimes.entry("native".into()).or_default();
        assert_eq!(back, config);
    }
}
