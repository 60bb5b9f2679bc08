//! What a runtime says: its log in JSON, its standard error, and what that means.

use std::path::Path;

use crate::confine::{NOT_EXECUTABLE, NOT_FOUND};

/// Most bytes of a runtime's log that are read: the last ones.
const LONGEST_LOG: u64 = 64 << 10;
/// Most bytes of a message.
const LONGEST: usize = 2048;

/// What a failed runtime has to say: the errors of its log, or, of one that kept no such log, the end of what it
/// wrote to its standard error.
pub fn of(log: &str, stderr: &str) -> String {
    let mut said: Vec<String> = Vec::new();
    for (level, message) in log.lines().flat_map(entries) {
        // Several layers of one runtime may tell of one error.
        if is_error(&level) && !message.is_empty() && !said.contains(&message) {
            said.push(message);
        }
    }
    if said.is_empty() {
        said.extend(tail(stderr));
    }
    cut(&said.join("; "))
}

/// The entries of a line of a log (`--log-format json`): runsc puts them side by side.
fn entries(line: &str) -> Vec<(String, String)> {
    let values = serde_json::Deserializer::from_str(line).into_iter::<serde_json::Value>();
    let entries = values.map_while(Result::ok);
    entries.filter_map(|value| entry_of(&value)).collect()
}

/// The entry that a line is.
fn entry(line: &str) -> Option<(String, String)> {
    entry_of(&serde_json::from_str(line.trim()).ok()?)
}

/// Level and message.
fn entry_of(value: &serde_json::Value) -> Option<(String, String)> {
    let text = |key: &str| value.get(key).and_then(|v| v.as_str());
    // "message" is tracing's, youki's.
    let message = text("msg").or_else(|| text("message")).or_else(|| {
        let fields = value.get("fields")?;
        fields.get("message")?.as_str()
    })?;
    Some((
        text("level").unwrap_or("error").to_ascii_lowercase(),
        message.trim().to_owned(),
    ))
}

fn is_error(level: &str) -> bool {
    ["error", "fatal", "panic"].contains(&level)
}

/// The last lines of what stands on a standard error. Some runtimes write JSON there, too.
fn tail(stderr: &str) -> Option<String> {
    let lines = stderr
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty());
    let lines: Vec<String> = lines
        .map(|line| entry(line).map_or_else(|| line.to_owned(), |(_, message)| message))
        .collect();
    let last = lines.len().saturating_sub(4);
    let text = lines[last..].join("; ");
    Some(text).filter(|text| !text.is_empty())
}

fn cut(text: &str) -> String {
    if text.len() <= LONGEST {
        return text.to_owned();
    }
    let mut end = LONGEST;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &text[..end])
}

/// The end of a runtime's log file; one that is missing says nothing.
pub fn read_log(path: &Path) -> String {
    use std::io::{Read, Seek, SeekFrom};
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = std::fs::File::open(path)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(LONGEST_LOG)))?;
        let mut bytes = Vec::new();
        file.take(LONGEST_LOG).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

/// Whether a runtime's words say that it executes nothing in a container that is frozen: runc's, crun's.
pub fn says_paused(said: &str) -> bool {
    said.contains("cannot exec in a paused container") || said.ends_with("` is paused")
}

/// Whether a runtime's words say that the container's command can't be executed, and the exit code that shells give
/// that. runc, crun and youki look for the command when the container is created; by themselves they tell it apart
/// from nothing else that can go wrong there.
pub fn command_failure(said: &str) -> Option<i32> {
    let lower = said.to_lowercase();
    // gVisor's kernel names the whole command first, which may have any words.
    let loading = ["failed to load ", "error finding executable "];
    let loading = loading.iter().find_map(|part| lower.rfind(part));
    let about = &lower[loading.unwrap_or(0)..];
    let has = |part: &str| about.contains(part);
    // runc: exec: "x": …; crun: executable file `x` not found…, open executable: …; youki: executable 'x' for
    // container not found…
    let of_command = [
        "exec: \"",
        "process: exec ",
        "executable",
        "exec user process",
        // runc, of a file that can't be executed where it is mounted.
        "eaccess ",
    ];
    let of_command = loading.is_some() || of_command.iter().any(|part| has(part));
    if !of_command {
        return None;
    }
    if has("not found") || has("no such file") {
        return Some(NOT_FOUND);
    }
    let denied = [
        "permission",
        "not permitted",
        "is a directory",
        "too many levels",
        // gVisor's kernel, of symbolic links.
        "too many symbolic",
        "exec format error",
    ];
    let denied = denied.iter().any(|part| has(part));
    denied.then_some(NOT_EXECUTABLE)
}

/// What stands on a standard error beyond a message, such as what a hook has written there.
pub fn beyond(message: &str, stderr: &str) -> String {
    let more: Vec<String> = tail(stderr)
        .iter()
        .flat_map(|text| text.split("; "))
        .filter(|line| !message.contains(line))
        .map(str::to_owned)
        .collect();
    cut(&more.join("; "))
}

/// Such words with the command in them, which crun does not always name.
pub fn of_command(command: &str, said: &str) -> String {
    match said.contains(command) {
        true => said.to_owned(),
        false => format!("can't execute {command:?}: {said}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_paused_container_is_told_from_a_command_of_that_name() {
        assert!(says_paused(
            "exec failed: cannot exec in a paused container (use --ignore-paused to override)"
        ));
        assert!(says_paused("the container `c` is paused"));
        assert!(!says_paused(
            "exec failed: unable to start container process: exec: \"paused\": executable file not found in $PATH"
        ));
    }

    #[test]
    fn errors_of_the_log_are_told_once() {
        let log = concat!(
            "{\"level\":\"warning\",\"msg\":\"DEPRECATED: x\",\"time\":\"t\"}\n",
            "not JSON\n",
            "{\"msg\":\"no room\",\"level\":\"error\",\"time\":\"t\"}\n",
            "{\"level\":\"error\",\"msg\":\"no room\"}\n",
            "{\"level\":\"fatal\",\"msg\":\"giving up\"}{\"msg\":\"of runsc\",\"level\":\"error\"}\n",
            "{\"timestamp\":\"t\",\"level\":\"ERROR\",\"fields\":{\"message\":\"of youki\"},\"target\":\"x\"}\n",
        );
        assert_eq!(of(log, "ignored"), "no room; giving up; of runsc; of youki");
    }

    #[test]
    fn without_a_log_the_standard_error_speaks() {
        assert_eq!(of("", "one\n\n two \n"), "one; two");
        assert_eq!(
            of("garbage", "{\"msg\":\"no\",\"level\":\"error\"}\n"),
            "no"
        );
        assert_eq!(of("", "1\n2\n3\n4\n5\n"), "2; 3; 4; 5");
        assert_eq!(of("", ""), "");
        let long = of("", &"ä".repeat(LONGEST));
        assert!(long.ends_with('…') && long.len() < LONGEST + 8);
    }

    #[test]
    fn what_a_hook_has_written_is_told_too() {
        let message = "crun (crun) create: error executing hook `/bin/sh` (exit code: 3)";
        let stderr = "no driver here\n{\"msg\":\"error executing hook `/bin/sh` (exit code: 3)\",\"level\":\"error\"}\n";
        assert_eq!(beyond(message, stderr), "no driver here");
        assert_eq!(beyond(message, ""), "");
    }

    #[test]
    fn commands_that_can_not_be_executed_are_known() {
        let create = "runc create failed: unable to start container process: ";
        for (said, code) in [
            (
                format!("{create}exec: \"nosuch\": executable file not found in $PATH"),
                127,
            ),
            (
                format!("{create}exec: \"/nosuch\": stat /nosuch: no such file or directory"),
                127,
            ),
            (format!("{create}exec: \"/noexec\": permission denied"), 126),
            (
                "exec failed: unable to start container process: exec: \"/bin\": permission denied"
                    .into(),
                126,
            ),
            (
                "executable file `nosuch` not found in $PATH: No such file or directory".into(),
                127,
            ),
            ("open executable: Permission denied".into(), 126),
            (
                "exec failed: unable to start container process: eaccess /noexec/x: permission denied".into(),
                126,
            ),
            (
                format!("{create}exec /bin/probe-root: permission denied"),
                126,
            ),
            ("open executable: Operation not permitted".into(), 126),
            (
                "open executable: Too many levels of symbolic links".into(),
                126,
            ),
            (
                "executable 'nosuch' for container not found in $PATH".into(),
                127,
            ),
            (
                "starting sub-container [/bin/not found]: creating process: failed to load /bin/not: permission denied"
                    .into(),
                126,
            ),
            (
                "executing command \"/nosuch -c\" in sandbox: failed to load /nosuch: no such file or directory".into(),
                127,
            ),
        ] {
            assert_eq!(command_failure(&said), Some(code), "{said}");
        }
        for said in [
            "container does not exist",
            "error opening file `/run/x/status`: No such file or directory",
            "mount `/nosuch` to `data`: No such file or directory",
            "runc create failed: unable to apply cgroup configuration: mkdir x: permission denied",
            "",
        ] {
            assert_eq!(command_failure(said), None, "{said}");
        }
    }
}
