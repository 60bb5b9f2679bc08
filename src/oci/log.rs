//! Where errors and warnings go: standard error, and the file of `--log`, in the format that callers of runc read
//! (`level`, `msg` and `time`, as logrus writes them).

use std::fs::File;
use std::io::Write;

use chrono::{SecondsFormat, Utc};
use liboci_cli::GlobalOpts;

use crate::{OciError, Result};

/// The log.
#[derive(Debug)]
pub struct Log {
    file: Option<File>,
    json: bool,
}

impl Log {
    /// Opens what the options name.
    ///
    /// # Errors
    /// For a format that is neither `text` nor `json`, and a file that can't be written.
    pub fn open(options: &GlobalOpts) -> Result<Self> {
        let json = match options.log_format.as_deref() {
            None | Some("text" | "") => false,
            Some("json") => true,
            Some(other) => {
                return Err(OciError::Argument {
                    option: "--log-format",
                    reason: format!("{other:?} is neither text nor json"),
                });
            }
        };
        let path = options.log.as_ref().filter(|p| !p.as_os_str().is_empty());
        let open = |path| {
            let mut options = File::options();
            let file = options.append(true).create(true).open(path);
            file.map_err(OciError::file("open the log", path))
        };
        Ok(Self {
            file: path.map(open).transpose()?,
            json,
        })
    }

    /// Tells why the command failed.
    pub fn error(&self, text: &str) {
        self.write("error", text);
    }

    /// Tells what went wrong without failing the command.
    pub fn warning(&self, text: &str) {
        self.write("warning", text);
    }

    fn write(&self, level: &str, text: &str) {
        let line = self.line(level, text);
        // One write for each, so that lines of two commands stay whole.
        if let Some(mut file) = self.file.as_ref() {
            let _ = file.write_all(line.as_bytes());
        }
        let said = match (&self.file, self.json) {
            (None, true) => line,
            _ => format!("slipway oci: {level}: {text}\n"),
        };
        let _ = std::io::stderr().write_all(said.as_bytes());
    }

    fn line(&self, level: &str, text: &str) -> String {
        let time = Utc::now().to_rfc3339_opts(SecondsFormat::Secs, true);
        match self.json {
            true => {
                let entry = serde_json::json!({"level": level, "msg": text, "time": time});
                format!("{entry}\n")
            }
            false => format!("time=\"{time}\" level={level} msg={text:?}\n"),
        }
    }
}
