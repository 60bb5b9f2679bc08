//! Whether what a checkpoint's processes may is within what the container's configuration gives: criu restores users,
//! capabilities, filters and the like as its images say, and the images may be of anybody's making.

use std::path::Path;

use crate::confine::Bounds;
use crate::criu::image::{self, Core, Creds, Filters, OpenFile, Process, Thread};

use super::{ImagesError, refused};

/// `SECBIT_KEEP_CAPS`, which everybody may set.
const KEEP_CAPS: u32 = 1 << 4;
const CAP_SETGID: u64 = 1 << 6;
const CAP_SETUID: u64 = 1 << 7;
const CAP_SETPCAP: u64 = 1 << 8;
const CAP_NET_RAW: u64 = 1 << 13;
const CAP_SYS_NICE: u64 = 1 << 23;
/// `SCHED_OTHER`, `SCHED_BATCH`, `SCHED_IDLE`.
const ORDINARY_POLICIES: [u32; 3] = [0, 3, 5];
/// `fd_types` that stand for more than a file, a socket or the like: packet sockets, tunnels, external files, BPF maps.
const PACKET_SOCKET: u32 = 11;
const NEVER_OPEN: [(u32, &str); 3] = [
    (15, "a tunnel"),
    (16, "an external file"),
    (19, "a BPF map"),
];
const SOCK_RAW: u32 = 3;

/// Checks every thread of every process, and what is open.
///
/// # Errors
/// [`ImagesError`], which names the process and what it has more.
pub fn check(images: &Path, processes: &[Process], bounds: &Bounds<'_>) -> Result<(), ImagesError> {
    let path = images.join("seccomp.img");
    let filters = match path.exists() {
        true => image::read_one::<Filters>(&path)?,
        false => Filters::default(),
    };
    for process in processes {
        let core = |id: u32| image::read_one::<Core>(&images.join(format!("core-{id}.img")));
        let first = core(process.pid)?;
        let task = first.task.clone().unwrap_or_default();
        if task.state == image::DEAD {
            continue;
        }
        let name = format!("process {} ({:?})", process.pid, task.comm);
        check_thread(&name, first.thread.as_ref(), &filters, bounds)?;
        for id in process.threads.iter().filter(|id| **id != process.pid) {
            let thread = core(*id)?.thread;
            check_thread(
                &format!("thread {id} of {name}"),
                thread.as_ref(),
                &filters,
                bounds,
            )?;
        }
    }
    let path = images.join("files.img");
    for file in image::read::<OpenFile>(&path)? {
        check_file(&file, bounds)?;
    }
    Ok(())
}

fn check_thread(
    name: &str,
    thread: Option<&Thread>,
    filters: &Filters,
    bounds: &Bounds<'_>,
) -> Result<(), ImagesError> {
    let no = |what: String| {
        Err(refused(format!(
            "{name} {what}; restore it with a configuration that gives it that"
        )))
    };
    let (Some(thread), Some(creds)) = (thread, thread.and_then(|t| t.creds.as_ref())) else {
        return Err(refused(format!(
            "{name} has no credentials in criu's images"
        )));
    };
    if let Some(more) = more_than(creds, bounds) {
        return no(more);
    }
    if bounds.no_new_privileges && creds.no_new_privs.unwrap_or(0) == 0 {
        return no("can get new privileges (allowPrivilegeEscalation)".to_owned());
    }
    if bounds.lsm.is_some() && creds.lsm_profile.as_deref().unwrap_or_default().is_empty() {
        return no("is confined by no AppArmor profile or SELinux label".to_owned());
    }
    if let Some(wanted) = bounds.seccomp {
        // `to_bytes` without its head is what the kernel keeps.
        let wanted = wanted.to_bytes();
        let program = wanted.get(12..).unwrap_or_default();
        let index = thread.seccomp_filter;
        let filtered = thread.seccomp_mode == Some(image::SECCOMP_FILTER);
        if !filtered || !chain_has(filters, index, program) {
            return no(match filtered {
                true => {
                    "has another seccomp filter than the configuration's profile makes".to_owned()
                }
                false => "has no seccomp filter".to_owned(),
            });
        }
    }
    let nice = bounds.held & CAP_SYS_NICE != 0;
    if !nice && !ORDINARY_POLICIES.contains(&thread.policy.unwrap_or(0)) {
        return no("is scheduled in real time".to_owned());
    }
    if !nice && thread.nice.unwrap_or(0) < 0 {
        return no("has a negative niceness".to_owned());
    }
    Ok(())
}

/// Whether a program is among a filter and those that were loaded before it.
fn chain_has(filters: &Filters, last: Option<u32>, program: &[u8]) -> bool {
    let mut next = last;
    // As many steps as there are filters: the list may lead in a circle.
    for _ in 0..filters.filters.len() {
        let Some(filter) = next.and_then(|at| filters.filters.get(at as usize)) else {
            return false;
        };
        if filter.program == program {
            return true;
        }
        next = filter.previous;
    }
    false
}

/// What a process has beyond its bounds, as what it does.
fn more_than(creds: &Creds, bounds: &Bounds<'_>) -> Option<String> {
    let user = bounds.user;
    let root_with = |cap: u64| user.uid == 0 && bounds.held & cap != 0;
    let uids = [creds.uid, creds.euid, creds.suid, creds.fsuid];
    if let Some(uid) = uids.iter().find(|uid| **uid != user.uid)
        && !root_with(CAP_SETUID)
    {
        return Some(format!(
            "runs as user {uid}, the configuration as {}",
            user.uid
        ));
    }
    let gids = [creds.gid, creds.egid, creds.sgid, creds.fsgid];
    let known = |gid: &u32| *gid == user.gid || user.groups.contains(gid);
    if let Some(gid) = gids.iter().chain(&creds.groups).find(|gid| !known(gid))
        && !root_with(CAP_SETGID)
    {
        return Some(format!(
            "is in group {gid}, which the configuration does not give"
        ));
    }
    let sets = [
        ("permitted", &creds.permitted, bounds.held),
        ("effective", &creds.effective, bounds.held),
        ("ambient", &creds.ambient, bounds.held),
        ("inheritable", &creds.inheritable, bounds.inheritable),
        ("bounding", &creds.bounding, bounds.bounding),
    ];
    for (name, words, allowed) in sets {
        let held = words
            .iter()
            .take(2)
            .rev()
            .fold(0u64, |all, word| (all << 32) | u64::from(*word));
        let more = held & !allowed;
        if more != 0 || words.len() > 2 {
            return Some(format!(
                "has capabilities ({}) in its {name} set",
                names(more)
            ));
        }
    }
    if creds.secbits & !KEEP_CAPS != 0 && bounds.held & CAP_SETPCAP == 0 {
        return Some("has changed its securebits".to_owned());
    }
    None
}

fn names(bits: u64) -> String {
    let known = caps::all();
    let named: Vec<_> = known
        .iter()
        .filter(|cap| cap.bitmask() & bits != 0)
        .map(ToString::to_string)
        .collect();
    match named.is_empty() {
        true => format!("{bits:#x}"),
        false => named.join(", "),
    }
}

fn check_file(file: &OpenFile, bounds: &Bounds<'_>) -> Result<(), ImagesError> {
    if let Some((_, what)) = NEVER_OPEN.iter().find(|(kind, _)| *kind == file.kind) {
        return Err(refused(format!(
            "a process has {what} open, which can't be restored"
        )));
    }
    let raw = file.kind == PACKET_SOCKET || file.inet.as_ref().is_some_and(|s| s.kind == SOCK_RAW);
    if raw && bounds.bounding & CAP_NET_RAW == 0 {
        return Err(refused(
            "a process has a raw socket; restore it with a configuration that gives it NET_RAW",
        ));
    }
    let unix = file.unix.as_ref();
    let paths = [
        file.file.as_ref().map(|f| f.name.as_bytes()),
        unix.map(|s| s.name.as_slice())
            .filter(|name| !name.starts_with(&[0])),
        unix.and_then(|s| s.dir.as_ref()).map(|dir| dir.as_bytes()),
    ];
    for path in paths.into_iter().flatten() {
        if path.split(|byte| *byte == b'/').any(|part| part == b"..") {
            return Err(refused(format!(
                "the path {:?} of an open file leads upwards",
                String::from_utf8_lossy(path)
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::user::Resolved;

    fn user(uid: u32) -> Resolved {
        Resolved {
            uid,
            gid: uid,
            groups: vec![7],
            home: "/".to_owned(),
        }
    }

    fn bounds(user: &Resolved, caps: u64) -> Bounds<'_> {
        Bounds {
            user,
            bounding: caps,
            held: if user.uid == 0 { caps } else { 0 },
            inheritable: 0,
            no_new_privileges: false,
            seccomp: None,
            lsm: None,
        }
    }

    fn creds(id: u32) -> Creds {
        Creds {
            uid: id,
            gid: id,
            euid: id,
            egid: id,
            suid: id,
            sgid: id,
            fsuid: id,
            fsgid: id,
            ..Creds::default()
        }
    }

    #[test]
    fn nobody_has_more_than_the_configuration_gives() {
        let (root, other) = (user(0), user(1000));
        let both = CAP_SETUID | CAP_SETGID;
        assert_eq!(more_than(&creds(0), &bounds(&root, both)), None);
        assert_eq!(more_than(&creds(33), &bounds(&root, both)), None);
        assert_eq!(more_than(&creds(1000), &bounds(&other, both)), None);
        for (who, caps, changed, word) in [
            (&root, 0, creds(33), "user 33"),
            (&root, CAP_SETUID, creds(33), "group 33"),
            (&other, both, creds(0), "user 0"),
            (
                &other,
                both,
                Creds {
                    groups: vec![7, 0],
                    ..creds(1000)
                },
                "group 0",
            ),
            (
                &other,
                both,
                Creds {
                    effective: vec![1 << 7],
                    ..creds(1000)
                },
                "effective",
            ),
            (
                &other,
                both,
                Creds {
                    ambient: vec![1 << 7],
                    ..creds(1000)
                },
                "ambient",
            ),
            (
                &other,
                both,
                Creds {
                    inheritable: vec![1 << 7],
                    ..creds(1000)
                },
                "inheritable",
            ),
            (
                &root,
                both,
                Creds {
                    permitted: vec![0, 1],
                    ..creds(0)
                },
                "permitted",
            ),
            (
                &root,
                both,
                Creds {
                    bounding: vec![1 << 21],
                    ..creds(0)
                },
                "CAP_SYS_ADMIN",
            ),
            (
                &root,
                both,
                Creds {
                    bounding: vec![0, 0, 1],
                    ..creds(0)
                },
                "bounding",
            ),
            (
                &root,
                both,
                Creds {
                    secbits: 1,
                    ..creds(0)
                },
                "securebits",
            ),
        ] {
            let more = more_than(&changed, &bounds(who, caps)).expect(word);
            assert!(more.contains(word), "{more}");
        }
        let held = Creds {
            bounding: vec![both as u32],
            permitted: vec![both as u32],
            secbits: KEEP_CAPS,
            ..creds(0)
        };
        assert_eq!(more_than(&held, &bounds(&root, both)), None);
    }

    #[test]
    fn threads_are_held_to_no_new_privs_filters_and_scheduling() {
        let root = user(0);
        let thread = |change: fn(&mut Thread)| {
            let mut thread = Thread {
                creds: Some(creds(0)),
                ..Thread::default()
            };
            change(&mut thread);
            thread
        };
        let check = |thread: &Thread, filters: &Filters, bounds: &Bounds<'_>| {
            check_thread("p", Some(thread), filters, bounds).map_err(|e| e.to_string())
        };
        let none = Filters::default();
        let free = bounds(&root, 0);
        check(&thread(|_| {}), &none, &free).unwrap();
        check(&thread(|t| t.creds = None), &none, &free).unwrap_err();
        check(&thread(|t| t.policy = Some(1)), &none, &free).unwrap_err();
        check(&thread(|t| t.nice = Some(-1)), &none, &free).unwrap_err();
        let strict = Bounds {
            no_new_privileges: true,
            ..bounds(&root, 0)
        };
        check(&thread(|_| {}), &none, &strict).unwrap_err();
        check(
            &thread(|t| t.creds.as_mut().unwrap().no_new_privs = Some(1)),
            &none,
            &strict,
        )
        .unwrap();
        let labelled = Bounds {
            lsm: Some("apparmor:x".to_owned()),
            ..bounds(&root, 0)
        };
        check(&thread(|_| {}), &none, &labelled).unwrap_err();

        let wanted = slipway_seccomp::Filter {
            instructions: vec![slipway_seccomp::Instruction {
                code: 6,
                jt: 0,
                jf: 0,
                k: 0x7fff_0000,
            }],
            flags: 0,
            unknown: Vec::new(),
            engine: slipway_seccomp::Engine::RangeTree,
        };
        let program = |k: u32, previous| image::Filter {
            program: [&[6, 0, 0, 0][..], &k.to_le_bytes()].concat(),
            previous,
        };
        let filtered = Bounds {
            seccomp: Some(&wanted),
            ..bounds(&root, 0)
        };
        let with = |at: u32| Thread {
            seccomp_mode: Some(2),
            seccomp_filter: Some(at),
            ..thread(|_| {})
        };
        // 0 is the wanted one, 1 was loaded after it, 2 and 3 lead in a circle.
        let filters = Filters {
            filters: vec![
                program(0x7fff_0000, None),
                program(1, Some(0)),
                program(2, Some(3)),
                program(3, Some(2)),
            ],
        };
        check(&with(0), &filters, &filtered).unwrap();
        check(&with(1), &filters, &filtered).unwrap();
        for at in [2, 3, 4] {
            check(&with(at), &filters, &filtered).unwrap_err();
        }
        check(&thread(|_| {}), &filters, &filtered).unwrap_err();
    }

    #[test]
    fn open_files_stay_where_they_are() {
        let root = user(0);
        let file = |name: &str| OpenFile {
            kind: 1,
            file: Some(image::PathFile {
                name: name.to_owned(),
            }),
            ..OpenFile::default()
        };
        check_file(&file("/etc/..passwd"), &bounds(&root, 0)).unwrap();
        for name in ["../etc/passwd", "/a/../../b", "/.."] {
            check_file(&file(name), &bounds(&root, 0)).unwrap_err();
        }
        let raw = OpenFile {
            kind: PACKET_SOCKET,
            ..OpenFile::default()
        };
        check_file(&raw, &bounds(&root, 0)).unwrap_err();
        check_file(&raw, &bounds(&root, CAP_NET_RAW)).unwrap();
        check_file(
            &OpenFile {
                kind: 15,
                ..OpenFile::default()
            },
            &bounds(&root, u64::MAX),
        )
        .unwrap_err();
    }
}
