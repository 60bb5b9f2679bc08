//! Reading a Localhost profile.
//!
//! Two formats are in use, and a file says by its keys which one it is: the runtime-spec's own
//! `LinuxSeccomp`, and the one of Docker, Podman and CRI-O, which in addition has `archMap` (ABIs by
//! machine), conditions per entry (`includes`, `excludes`), `name` for a single name, and names of error
//! numbers. The second is resolved here for one container on one machine; what comes out is always the first.

use crate::{SeccompError, errno, kernel::parse_release};
use oci_spec::runtime::{
    Arch, Capabilities, LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg,
    LinuxSeccompFilterFlag, LinuxSyscall,
};
use serde::Deserialize;
use std::path::PathBuf;

/// A profile as written, in either format.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    default_action: Action,
    default_errno_ret: Option<u32>,
    default_errno: Option<String>,
    architectures: Option<Vec<Arch>>,
    arch_map: Option<Vec<Machine>>,
    flags: Option<Vec<LinuxSeccompFilterFlag>>,
    listener_path: Option<PathBuf>,
    listener_metadata: Option<String>,
    syscalls: Option<Vec<Entry>>,
}

/// The ABIs of one machine.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Machine {
    architecture: Arch,
    sub_architectures: Option<Vec<Arch>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    name: Option<String>,
    names: Option<Vec<String>>,
    action: Action,
    errno_ret: Option<u32>,
    errno: Option<String>,
    args: Option<Vec<LinuxSeccompArg>>,
    includes: Option<Conditions>,
    excludes: Option<Conditions>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Conditions {
    caps: Option<Vec<String>>,
    arches: Option<Vec<String>>,
    min_kernel: Option<String>,
}

/// What a profile's conditions are about.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The container's bounding set.
    pub capabilities: &'a Capabilities,
    /// The machine, see [`crate::native_arch`].
    pub arch: Arch,
    /// The kernel, see [`crate::running_kernel`].
    pub kernel: (u32, u32),
}

/// Reads a profile in either format and resolves its conditions for `subject`.
///
/// Keys that neither format has are passed over, as containerd and CRI-O do; a capability or machine
/// that we don't know counts as not held and not this one.
///
/// # Errors
/// [`SeccompError::Json`] with line and column, for what is not JSON and for values no format knows;
/// [`SeccompError::Profile`] with the entry, for what contradicts itself.
pub fn parse_profile(json: &[u8], subject: Subject<'_>) -> Result<LinuxSeccomp, SeccompError> {
    let profile: Profile = serde_json::from_slice(json).map_err(SeccompError::Json)?;
    if profile
        .architectures
        .as_ref()
        .is_some_and(|a| !a.is_empty())
        && profile.arch_map.as_ref().is_some_and(|a| !a.is_empty())
    {
        return Err(wrong(
            "top level",
            "it has both architectures and archMap; delete one",
        ));
    }
    let architectures = match profile.arch_map {
        Some(map) if !map.is_empty() => map
            .into_iter()
            .find(|m| m.architecture == subject.arch)
            .map(|m| {
                [
                    vec![m.architecture],
                    m.sub_architectures.unwrap_or_default(),
                ]
                .concat()
            }),
        _ => profile.architectures,
    };
    let mut calls = Vec::new();
    for (i, entry) in profile.syscalls.into_iter().flatten().enumerate() {
        if let Some(call) = entry.resolve(&format!("syscalls[{i}]"), subject)? {
            calls.push(call);
        }
    }
    let mut out = LinuxSeccomp::default();
    out.set_default_action(profile.default_action);
    out.set_default_errno_ret(number(
        profile.default_errno,
        profile.default_errno_ret,
        "defaultErrno",
    )?);
    out.set_architectures(architectures);
    out.set_flags(profile.flags);
    out.set_listener_path(profile.listener_path);
    out.set_listener_metadata(profile.listener_metadata);
    out.set_syscalls(Some(calls));
    Ok(out)
}

impl Entry {
    /// The entry in the OCI's form, unless its conditions leave it out.
    fn resolve(
        self,
        place: &str,
        subject: Subject<'_>,
    ) -> Result<Option<LinuxSyscall>, SeccompError> {
        let names = match (self.name, self.names) {
            (Some(name), None) if !name.is_empty() => vec![name],
            (None, Some(names)) if !names.is_empty() => names,
            (Some(name), Some(names)) if name.is_empty() && !names.is_empty() => names,
            (Some(name), Some(names)) if names.is_empty() && !name.is_empty() => vec![name],
            (Some(_), Some(names)) if !names.is_empty() => {
                return Err(wrong(
                    place,
                    "it has both name and names; put all into names",
                ));
            }
            _ => return Err(wrong(place, "it names no system call; add names")),
        };
        // Judged before the conditions, so that an error does not depend on who runs.
        let errno_ret = number(self.errno, self.errno_ret, place)?;
        if let Some(excludes) = self.excludes {
            let excludes = excludes.judge(&format!("{place}.excludes"), subject)?;
            if excludes.any_cap || excludes.arch == Some(true) || excludes.kernel == Some(true) {
                return Ok(None);
            }
        }
        if let Some(includes) = self.includes {
            let includes = includes.judge(&format!("{place}.includes"), subject)?;
            if !includes.all_caps || includes.arch == Some(false) || includes.kernel == Some(false)
            {
                return Ok(None);
            }
        }
        let mut call = LinuxSyscall::default();
        call.set_names(names);
        call.set_action(self.action);
        call.set_errno_ret(errno_ret);
        call.set_args(self.args.filter(|a| !a.is_empty()));
        Ok(Some(call))
    }
}

/// How conditions stand for a subject; `None` where nothing is said.
struct Verdict {
    any_cap: bool,
    all_caps: bool,
    arch: Option<bool>,
    kernel: Option<bool>,
}

impl Conditions {
    fn judge(self, place: &str, subject: Subject<'_>) -> Result<Verdict, SeccompError> {
        let held = |name: &String| {
            let name = name.strip_prefix("CAP_").unwrap_or(name);
            subject.capabilities.iter().any(|c| c.to_string() == name)
        };
        let caps = self.caps.unwrap_or_default();
        let kernel = match self.min_kernel.filter(|k| !k.is_empty()) {
            Some(text) => {
                let min = parse_release(&text).ok_or_else(|| {
                    wrong(
                        place,
                        format!("minKernel {text:?} is not major.minor, for example \"4.8\""),
                    )
                })?;
                Some(subject.kernel >= min)
            }
            None => None,
        };
        Ok(Verdict {
            any_cap: caps.iter().any(held),
            all_caps: caps.iter().all(held),
            arch: self.arches.filter(|a| !a.is_empty()).map(|a| {
                a.iter()
                    .any(|name| Some(name.as_str()) == go_name(subject.arch))
            }),
            kernel,
        })
    }
}

/// What Go, and so the Docker format, calls a machine.
fn go_name(arch: Arch) -> Option<&'static str> {
    Some(match arch {
        Arch::ScmpArchX86_64 => "amd64",
        Arch::ScmpArchX86 => "x86",
        Arch::ScmpArchX32 => "x32",
        Arch::ScmpArchAarch64 => "arm64",
        Arch::ScmpArchArm => "arm",
        Arch::ScmpArchPpc64le => "ppc64le",
        Arch::ScmpArchPpc64 => "ppc64",
        Arch::ScmpArchS390x => "s390x",
        Arch::ScmpArchS390 => "s390",
        Arch::ScmpArchRiscv64 => "riscv64",
        Arch::ScmpArchLoongarch64 => "loong64",
        Arch::ScmpArchMips => "mips",
        Arch::ScmpArchMips64 => "mips64",
        Arch::ScmpArchMips64n32 => "mips64n32",
        Arch::ScmpArchMipsel => "mipsel",
        Arch::ScmpArchMipsel64 => "mipsel64",
        Arch::ScmpArchMipsel64n32 => "mipsel64n32",
        _ => return None,
    })
}

/// An error number given by name, by number or both; the name counts.
fn number(
    name: Option<String>,
    number: Option<u32>,
    place: &str,
) -> Result<Option<u32>, SeccompError> {
    match name.filter(|n| !n.is_empty()) {
        None => Ok(number),
        Some(name) => errno::by_name(&name)
            .or_else(|| name.parse().ok())
            .map(Some)
            .ok_or_else(|| {
                wrong(
                    place,
                    format!("{name:?} is not the name of an error; use errnoRet with its number"),
                )
            }),
    }
}

fn wrong(place: &str, problem: impl Into<String>) -> SeccompError {
    SeccompError::Profile {
        place: place.to_owned(),
        problem: problem.into(),
    }
}
