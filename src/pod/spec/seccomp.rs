//! Which seccomp profile a container gets.

use crate::error::{Result, SpecError, quoted, quoted_path};
use crate::{SeccompChoice, SpecOptions, paths};
use rustix::fs::{Mode, OFlags};
use slipway_proto::cri;
use slipway_proto::cri::security_profile::ProfileType;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Profiles are some tens of kilobytes.
const LARGEST: u64 = 4 << 20;

enum Wanted {
    Unconfined,
    RuntimeDefault,
    Localhost(String),
}

/// The profile that the security context names, read from its file.
///
/// No profile at all means unconfined, as the CRI has it, and so does `privileged`. The deprecated
/// `seccomp_profile_path` counts where `seccomp` is absent.
pub(crate) fn resolve(
    security: Option<&cri::LinuxContainerSecurityContext>,
    options: &SpecOptions,
) -> Result<SeccompChoice> {
    let Some(security) = security.filter(|s| !s.privileged) else {
        return Ok(SeccompChoice::Unconfined);
    };
    match wanted(security)? {
        Wanted::Unconfined => Ok(SeccompChoice::Unconfined),
        Wanted::RuntimeDefault => match &options.seccomp_profile {
            None => Ok(SeccompChoice::RuntimeDefault),
            Some(path) => read(path.clone()),
        },
        Wanted::Localhost(name) => {
            let name = name.strip_prefix("localhost/").unwrap_or(&name);
            if Path::new(name).is_absolute() {
                paths::absolute(FIELD, name)?;
                read(name.into())
            } else {
                paths::relative(FIELD, name)?;
                read(options.seccomp_dir.join(name))
            }
        }
    }
}

const FIELD: &str = "linux.security_context.seccomp";

fn wanted(security: &cri::LinuxContainerSecurityContext) -> Result<Wanted> {
    if let Some(profile) = &security.seccomp {
        return match ProfileType::try_from(profile.profile_type) {
            Ok(ProfileType::RuntimeDefault) => Ok(Wanted::RuntimeDefault),
            Ok(ProfileType::Unconfined) => Ok(Wanted::Unconfined),
            Ok(ProfileType::Localhost) => Ok(Wanted::Localhost(profile.localhost_ref.clone())),
            Err(_) => {
                let what = format!("there is no profile type {}", profile.profile_type);
                Err(SpecError::invalid(FIELD, what))
            }
        };
    }
    #[allow(deprecated)]
    let path = security.seccomp_profile_path.as_str();
    match path {
        "" | "unconfined" => Ok(Wanted::Unconfined),
        "runtime/default" | "docker/default" => Ok(Wanted::RuntimeDefault),
        _ => match path.strip_prefix("localhost/") {
            Some(name) => Ok(Wanted::Localhost(name.to_owned())),
            None => {
                let what = format!(
                    "{} is not a profile; write runtime/default, unconfined or localhost/<file>",
                    quoted(path)
                );
                Err(SpecError::invalid(
                    "linux.security_context.seccomp_profile_path",
                    what,
                ))
            }
        },
    }
}

fn read(path: PathBuf) -> Result<SeccompChoice> {
    let failed = |what: String| {
        let what = format!("the profile {} {what}", quoted_path(&path));
        SpecError::precondition(FIELD, what)
    };
    let json = (|| -> io::Result<Option<Vec<u8>>> {
        // Not to wait for ever on what isn't a file.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = File::from(rustix::fs::open(&path, flags, Mode::empty())?);
        if !file.metadata()?.is_file() {
            return Ok(None);
        }
        let mut json = Vec::new();
        file.take(LARGEST + 1).read_to_end(&mut json)?;
        Ok(Some(json))
    })();
    match json {
        Ok(Some(json)) if json.len() as u64 > LARGEST => {
            Err(failed(format!("is larger than {LARGEST} bytes")))
        }
        Ok(Some(json)) => Ok(SeccompChoice::Localhost { path, json }),
        Ok(None) => Err(failed("is not a regular file".to_owned())),
        Err(e) => Err(failed(format!("can't be read on this host: {e}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SpecErrorKind;

    fn profile(kind: ProfileType, file: &str) -> cri::LinuxContainerSecurityContext {
        cri::LinuxContainerSecurityContext {
            seccomp: Some(cri::SecurityProfile {
                profile_type: kind.into(),
                localhost_ref: file.into(),
            }),
            ..Default::default()
        }
    }

    #[allow(deprecated)]
    fn deprecated(path: &str) -> cri::LinuxContainerSecurityContext {
        cri::LinuxContainerSecurityContext {
            seccomp_profile_path: path.into(),
            ..Default::default()
        }
    }

    #[test]
    fn types_and_the_old_names() {
        let options = SpecOptions::default();
        let default = Some(SeccompChoice::RuntimeDefault);
        let none = Some(SeccompChoice::Unconfined);
        let cases = [
            (cri::LinuxContainerSecurityContext::default(), none.clone()),
            (profile(ProfileType::RuntimeDefault, ""), default.clone()),
            (profile(ProfileType::Unconfined, ""), none.clone()),
            (deprecated("runtime/default"), default.clone()),
            (deprecated("docker/default"), default),
            (deprecated("unconfined"), none.clone()),
            (deprecated("default"), None),
        ];
        for (security, expected) in cases {
            assert_eq!(
                resolve(Some(&security), &options).ok(),
                expected,
                "{security:?}"
            );
        }
        assert_eq!(resolve(None, &options).ok(), none);
    }

    #[test]
    fn a_privileged_container_is_unconfined() {
        let security = cri::LinuxContainerSecurityContext {
            privileged: true,
            ..profile(ProfileType::Localhost, "/does/not/exist")
        };
        let choice = resolve(Some(&security), &SpecOptions::default());
        assert_eq!(choice, Ok(SeccompChoice::Unconfined));
    }

    #[test]
    fn files_are_read() {
        let dir = tempfile::tempdir().expect("directory");
        let file = dir.path().join("p.json");
        std::fs::write(&file, "{}").expect("file");
        let options = SpecOptions {
            seccomp_dir: dir.path().to_owned(),
            ..SpecOptions::default()
        };
        let absolute = file.to_string_lossy().into_owned();
        let expected = SeccompChoice::Localhost {
            path: file.clone(),
            json: b"{}".to_vec(),
        };
        let mut names = vec![
            profile(ProfileType::Localhost, &absolute),
            profile(ProfileType::Localhost, "p.json"),
            profile(ProfileType::Localhost, "localhost/p.json"),
            deprecated("localhost/p.json"),
            deprecated(&format!("localhost/{absolute}")),
        ];
        for security in &names {
            assert_eq!(
                resolve(Some(security), &options),
                Ok(expected.clone()),
                "{security:?}"
            );
        }
        names = vec![profile(ProfileType::RuntimeDefault, "")];
        let options = SpecOptions {
            seccomp_profile: Some(file),
            ..options
        };
        assert_eq!(resolve(Some(&names[0]), &options), Ok(expected));
    }

    #[test]
    fn bad_files_are_named() {
        let options = SpecOptions::default();
        let cases = [
            (
                "/does/not/exist",
                SpecErrorKind::FailedPrecondition,
                "/does/not/exist",
            ),
            (
                "/dev/null",
                SpecErrorKind::FailedPrecondition,
                "regular file",
            ),
            ("/etc", SpecErrorKind::FailedPrecondition, "regular file"),
            ("", SpecErrorKind::Invalid, "empty"),
            ("../x", SpecErrorKind::Invalid, ".."),
            ("/a/../x", SpecErrorKind::Invalid, ".."),
        ];
        for (file, kind, text) in cases {
            let error = resolve(Some(&profile(ProfileType::Localhost, file)), &options);
            let error = error.expect_err(file);
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
    }
}
