//! One file: a hook, when it applies, and at which stages.

use std::collections::BTreeMap;
use std::path::PathBuf;

use oci_spec::runtime::{Hook, Spec};
use regex::{Regex, RegexBuilder};
use serde::Deserialize;

/// The schema that is read.
const VERSION: &str = "1.0.0";
/// How large a compiled expression may become, in bytes: its author is an operator, but may err.
const LARGEST_EXPRESSION: usize = 1 << 20;

/// When the runtime runs a hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Stage {
    /// After the namespaces are there, in the host's.
    Prestart,
    /// The same, by its newer name.
    CreateRuntime,
    /// The same, in the container's mount namespace.
    CreateContainer,
    /// In the container, before its command.
    StartContainer,
    /// After that, in the host.
    Poststart,
    /// After the container's end, in the host.
    Poststop,
}

/// As it is written.
#[derive(Deserialize)]
struct Written {
    version: String,
    hook: WrittenHook,
    #[serde(default)]
    when: WrittenWhen,
    #[serde(default)]
    stages: Vec<Stage>,
}

#[derive(Deserialize)]
struct WrittenHook {
    path: PathBuf,
    args: Option<Vec<String>>,
    env: Option<Vec<String>>,
    timeout: Option<i64>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct WrittenWhen {
    always: Option<bool>,
    annotations: BTreeMap<String, String>,
    commands: Vec<String>,
    has_bind_mounts: Option<bool>,
}

/// What the conditions of hooks are about.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// Annotations of the container and its pod.
    pub annotations: &'a BTreeMap<String, String>,
    /// The container's command, without its arguments.
    pub command: &'a str,
    /// Whether mounts were asked for.
    pub has_bind_mounts: bool,
}

/// A hook that can be used.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    hook: Hook,
    always: Option<bool>,
    annotations: Vec<(Regex, Regex)>,
    commands: Vec<Regex>,
    has_bind_mounts: Option<bool>,
    stages: Vec<Stage>,
}

impl Entry {
    /// Reads a file's text.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Head {
            version: Option<String>,
        }
        let head: Head = serde_json::from_slice(text).map_err(|e| e.to_string())?;
        match head.version.as_deref() {
            Some(VERSION) => {}
            Some(other) => {
                return Err(format!("its version is {other:?}; write it as {VERSION:?}"));
            }
            None => return Err(format!("it has no version; write it as {VERSION:?}")),
        }
        let written: Written = serde_json::from_slice(text).map_err(|e| e.to_string())?;
        debug_assert_eq!(written.version, VERSION);
        if written.stages.is_empty() {
            return Err("it names no stages".to_owned());
        }
        let path = &written.hook.path;
        if !path.is_absolute() {
            return Err(format!("hook.path {} is not absolute", path.display()));
        }
        match std::fs::metadata(path) {
            Ok(found) if found.is_file() => {}
            Ok(_) => return Err(format!("hook.path {} is no file", path.display())),
            Err(e) => return Err(format!("hook.path {}: {e}", path.display())),
        }
        if written.hook.timeout.is_some_and(|timeout| timeout <= 0) {
            return Err("hook.timeout must be above 0 (seconds)".to_owned());
        }
        let mut hook = Hook::default();
        hook.set_path(written.hook.path)
            .set_args(written.hook.args)
            .set_env(written.hook.env)
            .set_timeout(written.hook.timeout);
        let when = written.when;
        let pair = |(key, value): (&String, &String)| Ok((expression(key)?, expression(value)?));
        Ok(Self {
            hook,
            always: when.always,
            annotations: when
                .annotations
                .iter()
                .map(pair)
                .collect::<Result<_, String>>()?,
            commands: when
                .commands
                .iter()
                .map(|c| expression(c))
                .collect::<Result<_, _>>()?,
            has_bind_mounts: when.has_bind_mounts,
            stages: written.stages,
        })
    }

    /// Whether the hook applies: there is a condition, and all of them hold.
    pub fn applies(&self, subject: Subject<'_>) -> bool {
        let mut held = 0;
        for (asked, is) in [
            (self.always, true),
            (self.has_bind_mounts, subject.has_bind_mounts),
        ] {
            match asked {
                None => {}
                Some(true) if is => held += 1,
                Some(_) => return false,
            }
        }
        for (key, value) in &self.annotations {
            let mut all = subject.annotations.iter();
            if !all.any(|(k, v)| key.is_match(k) && value.is_match(v)) {
                return false;
            }
            held += 1;
        }
        if !self.commands.is_empty() {
            if !self.commands.iter().any(|c| c.is_match(subject.command)) {
                return false;
            }
            held += 1;
        }
        held > 0
    }

    /// Adds the hook to a specification, at each of its stages.
    pub fn add_to(&self, spec: &mut Spec) {
        let mut all = spec.hooks().clone().unwrap_or_default();
        for stage in &self.stages {
            #[allow(deprecated)]
            let list = match stage {
                Stage::Prestart => all.prestart_mut(),
                Stage::CreateRuntime => all.create_runtime_mut(),
                Stage::CreateContainer => all.create_container_mut(),
                Stage::StartContainer => all.start_container_mut(),
                Stage::Poststart => all.poststart_mut(),
                Stage::Poststop => all.poststop_mut(),
            };
            list.get_or_insert_default().push(self.hook.clone());
        }
        spec.set_hooks(Some(all));
    }
}

fn expression(text: &str) -> Result<Regex, String> {
    let built = RegexBuilder::new(text)
        .size_limit(LARGEST_EXPRESSION)
        .build();
    built.map_err(|e| format!("{text:?} is no regular expression: {}", first_line(&e)))
}

fn first_line(error: &regex::Error) -> String {
    let text = error.to_string();
    let last = text.lines().rfind(|line| !line.trim().is_empty());
    last.unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(when: &str) -> Entry {
        let text = format!(
            r#"{{"version":"1.0.0","hook":{{"path":"/bin/sh","args":["sh","-c","x"]}},"when":{when},
                "stages":["prestart","poststop"]}}"#
        );
        Entry::parse(text.as_bytes()).expect(when)
    }

    #[test]
    fn conditions_must_all_hold_and_there_must_be_one() {
        let annotations = BTreeMap::from([
            ("com.example.gpu".to_owned(), "yes".to_owned()),
            ("other".to_owned(), "no".to_owned()),
        ]);
        let subject = Subject {
            annotations: &annotations,
            command: "/usr/bin/python3",
            has_bind_mounts: false,
        };
        for (when, applies) in [
            (r#"{}"#, false),
            (r#"{"always":true}"#, true),
            (r#"{"always":false}"#, false),
            (r#"{"hasBindMounts":true}"#, false),
            (r#"{"commands":["python"]}"#, true),
            (r#"{"commands":["^python","^/bin/sh$"]}"#, false),
            (r#"{"annotations":{"^com\\.example\\.":"^yes$"}}"#, true),
            // Key and value of one annotation, not of two.
            (r#"{"annotations":{"^com\\.":"no"}}"#, false),
            (r#"{"always":true,"commands":["ruby"]}"#, false),
            (
                r#"{"always":true,"commands":["python"],"annotations":{"gpu":""}}"#,
                true,
            ),
        ] {
            assert_eq!(entry(when).applies(subject), applies, "{when}");
        }
        let bound = Subject {
            has_bind_mounts: true,
            ..subject
        };
        assert!(entry(r#"{"hasBindMounts":true}"#).applies(bound));
    }

    #[test]
    fn hooks_go_where_they_say() {
        let mut spec = Spec::default();
        entry(r#"{"always":true}"#).add_to(&mut spec);
        entry(r#"{"always":true}"#).add_to(&mut spec);
        let hooks = spec.hooks().clone().unwrap();
        #[allow(deprecated)]
        let prestart = hooks.prestart().clone().unwrap();
        assert_eq!(prestart.len(), 2);
        assert_eq!(prestart[0].args().clone().unwrap(), ["sh", "-c", "x"]);
        assert_eq!(hooks.poststop().clone().unwrap().len(), 2);
        assert_eq!(*hooks.poststart(), None);
    }

    #[test]
    fn broken_files_say_what_is_wrong() {
        let full = |hook: &str, rest: &str| format!(r#"{{"version":"1.0.0","hook":{hook}{rest}}}"#);
        let sh = r#"{"path":"/bin/sh"}"#;
        for (text, part) in [
            ("{".to_owned(), "EOF"),
            (
                r#"{"hook":"/bin/sh","stages":["prestart"]}"#.to_owned(),
                "1.0.0",
            ),
            (r#"{"version":"0.1.0"}"#.to_owned(), "0.1.0"),
            (full(sh, ""), "stages"),
            (full(sh, r#","stages":["sometime"]"#), "sometime"),
            (
                full(r#"{"path":"bin/sh"}"#, r#","stages":["prestart"]"#),
                "absolute",
            ),
            (
                full(r#"{"path":"/no/such"}"#, r#","stages":["prestart"]"#),
                "/no/such",
            ),
            (
                full(r#"{"path":"/bin"}"#, r#","stages":["prestart"]"#),
                "no file",
            ),
            (
                full(
                    r#"{"path":"/bin/sh","timeout":0}"#,
                    r#","stages":["prestart"]"#,
                ),
                "timeout",
            ),
            (
                full(sh, r#","when":{"commands":["("]},"stages":["prestart"]"#),
                "regular expression",
            ),
            (
                full(sh, r#","when":{"never":true},"stages":["prestart"]"#),
                "never",
            ),
        ] {
            let error = Entry::parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics(text in "[\\[\\]{}\":,a-z0-9. ]*") {
            let _ = Entry::parse(text.as_bytes());
        }
    }
}
