//! Ids of a user namespace: which of the host's its users and groups are.
//!
//! A pod's user namespace owns the pod's other namespaces. It is made with them ([`crate::sandbox`]), and joined
//! by path, by containers and exec sessions alike; libcontainer, which could make one for each container, never
//! does. Besides, the owners of mounts are mapped as a user namespace says ([`crate::mapped`]). A pod has one range of
//! users and one of groups; a bundle of the OCI command line may have several ([`crate::bundle`]).

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use oci_spec::runtime::{LinuxIdMapping, Mount, Spec};
use slipway_proto::keeper::{IdRange, UserNamespace};

use crate::sys;
use crate::user::{Resolved, UserError};

/// Ranges of users and of groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMaps {
    uids: Vec<IdRange>,
    gids: Vec<IdRange>,
}

impl IdMaps {
    /// Of the pod's user namespace, as the keeper was told.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] when a range is missing: a namespace without ids is of no use.
    pub fn of_pod(asked: &UserNamespace) -> io::Result<Self> {
        match (asked.uids, asked.gids) {
            (Some(uids), Some(gids)) => Ok(Self {
                uids: vec![uids],
                gids: vec![gids],
            }),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a range of ids is missing",
            )),
        }
    }

    /// Of the user namespace that a container is in; `None`: the host's.
    pub fn of_spec(spec: &Spec) -> Option<Self> {
        let linux = spec.linux().as_ref()?;
        Self::of_lists(linux.uid_mappings(), linux.gid_mappings())
    }

    /// Of a mount whose owners are mapped.
    pub fn of_mount(mount: &Mount) -> Option<Self> {
        Self::of_lists(mount.uid_mappings(), mount.gid_mappings())
    }

    fn of_lists(
        uids: &Option<Vec<LinuxIdMapping>>,
        gids: &Option<Vec<LinuxIdMapping>>,
    ) -> Option<Self> {
        let ranges = |list: &Option<Vec<LinuxIdMapping>>| {
            let list = list.as_ref().filter(|list| !list.is_empty())?;
            let range = |ids: &LinuxIdMapping| IdRange {
                container: ids.container_id(),
                host: ids.host_id(),
                length: ids.size(),
            };
            Some(list.iter().map(range).collect())
        };
        Some(Self {
            uids: ranges(uids)?,
            gids: ranges(gids)?,
        })
    }

    /// The host's id of a user in the namespace; `None`: there is no such user.
    pub fn host_uid(&self, uid: u32) -> Option<u32> {
        outside(&self.uids, uid)
    }

    /// The host's id of a group in the namespace; `None`: there is no such group.
    pub fn host_gid(&self, gid: u32) -> Option<u32> {
        outside(&self.gids, gid)
    }

    /// The host's ids of the namespace's root.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for a namespace without one.
    pub fn root(&self) -> io::Result<(u32, u32)> {
        let root = self.host_uid(0).zip(self.host_gid(0));
        root.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "id 0 is not mapped"))
    }

    /// Gives a container's pipe to a user of the namespace, who could not open `/dev/stdout` otherwise, and to its root's
    /// group.
    pub fn own_pipe(&self, fd: &OwnedFd, uid: u32) {
        let uid = self.host_uid(uid).map(rustix::fs::Uid::from_raw);
        let gid = self.host_gid(0).map(rustix::fs::Gid::from_raw);
        let _ = rustix::fs::fchown(fd, uid, gid);
    }

    /// Refuses a user that does not exist in the namespace, before the kernel does with nothing but EINVAL.
    ///
    /// # Errors
    /// [`UserError::Unmapped`].
    pub fn check(&self, user: &Resolved) -> Result<(), UserError> {
        let unmapped = |kind, id, ranges: &[IdRange]| {
            let end = |range: &IdRange| range.container.saturating_add(range.length);
            UserError::Unmapped {
                kind,
                id,
                last: ranges.iter().map(end).max().unwrap_or(0).saturating_sub(1),
            }
        };
        if self.host_uid(user.uid).is_none() {
            return Err(unmapped("user", user.uid, &self.uids));
        }
        for gid in user.groups.iter().chain([&user.gid]) {
            if self.host_gid(*gid).is_none() {
                return Err(unmapped("group", *gid, &self.gids));
            }
        }
        Ok(())
    }

    /// Whether a process is in a user namespace with these ids, as seen from this process's. One that is gone is.
    ///
    /// # Errors
    /// What reading says.
    pub fn are_of(&self, pid: i32) -> io::Result<bool> {
        for (file, ranges) in [("uid_map", &self.uids), ("gid_map", &self.gids)] {
            let text = match fs::read_to_string(format!("/proc/{pid}/{file}")) {
                Ok(text) => text,
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(true),
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(true),
                Err(e) => return Err(e),
            };
            let held = text.split_whitespace().map(str::to_owned);
            let own = ranges
                .iter()
                .flat_map(|range| [range.container, range.host, range.length]);
            if !held.eq(own.map(|number| number.to_string())) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Gives the ids to the user namespace of a process, which must be new.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn give(&self, pid: i32) -> io::Result<()> {
        for (file, ranges) in [("uid_map", &self.uids), ("gid_map", &self.gids)] {
            // In one write: there is no second.
            let line =
                |range: &IdRange| format!("{} {} {}\n", range.container, range.host, range.length);
            let lines: String = ranges.iter().map(line).collect();
            fs::write(format!("/proc/{pid}/{file}"), lines)?;
        }
        Ok(())
    }
}

fn outside(ranges: &[IdRange], id: u32) -> Option<u32> {
    ranges.iter().find_map(|range| {
        let within = id.checked_sub(range.container)?;
        (within < range.length).then(|| range.host.checked_add(within))?
    })
}

/// A user namespace with these ids that nobody is in.
///
/// # Errors
/// What the kernel says.
pub fn namespace(ids: &IdMaps) -> io::Result<OwnedFd> {
    let parent = std::process::id().cast_signed();
    let options = sys::CloneOptions {
        new_namespaces: libc::CLONE_NEWUSER as u64,
        ..Default::default()
    };
    // It lasts as long as somebody is in it, or holds it.
    let pid = match sys::clone_process(&options)? {
        sys::Forked::Parent(pid) => pid,
        sys::Forked::Child => {
            sys::close_all_but(&[]);
            if sys::die_with(parent).is_err() {
                sys::exit_now(1);
            }
            loop {
                nix::unistd::pause();
            }
        }
    };
    let opened = ids
        .give(pid)
        .and_then(|()| fs::File::open(format!("/proc/{pid}/ns/user")));
    sys::kill_child(pid);
    let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None);
    Ok(opened?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maps(length: u32) -> IdMaps {
        let range = |host| IdRange {
            container: 0,
            host,
            length,
        };
        IdMaps {
            uids: vec![range(100_000)],
            gids: vec![range(200_000)],
        }
    }

    #[test]
    fn ids_are_translated() {
        let ids = maps(1000);
        assert_eq!(
            (ids.host_uid(0), ids.host_gid(0)),
            (Some(100_000), Some(200_000))
        );
        assert_eq!(
            (ids.host_uid(999), ids.host_uid(1000)),
            (Some(100_999), None)
        );
        assert_eq!(ids.host_uid(u32::MAX), None);
        assert_eq!(ids.root().unwrap(), (100_000, 200_000));
        let beyond = IdRange {
            container: 0,
            host: u32::MAX,
            length: 10,
        };
        assert_eq!(outside(&[beyond], 5), None);
        let second = IdRange {
            container: 1000,
            host: 7,
            length: 1,
        };
        assert_eq!(outside(&[beyond, second], 1000), Some(7));
    }

    #[test]
    fn processes_in_other_namespaces_are_told_apart() {
        let own = std::process::id().cast_signed();
        assert!(!maps(1000).are_of(own).unwrap());
        assert!(maps(1000).are_of(i32::MAX).unwrap());
        let text = fs::read_to_string("/proc/self/uid_map").unwrap();
        let numbers = text.split_whitespace().map(|n| n.parse().unwrap());
        let numbers: Vec<u32> = numbers.collect();
        let range = |n: &[u32]| IdRange {
            container: n[0],
            host: n[1],
            length: n[2],
        };
        let ranges: Vec<_> = numbers.chunks(3).map(range).collect();
        let own_ids = IdMaps {
            uids: ranges.clone(),
            gids: ranges,
        };
        assert!(own_ids.are_of(own).unwrap());
    }

    #[test]
    fn users_that_are_not_there_are_refused() {
        let user = |uid, gid, groups: &[u32]| Resolved {
            uid,
            gid,
            groups: groups.to_vec(),
            home: "/".into(),
        };
        let ids = maps(1000);
        assert!(ids.check(&user(999, 999, &[1, 2])).is_ok());
        for (bad, text) in [
            (user(1000, 0, &[]), "user 1000"),
            (user(0, 65534, &[]), "group 65534"),
            (user(0, 0, &[5, 70_000]), "group 70000"),
        ] {
            let error = ids.check(&bad).unwrap_err().to_string();
            assert!(error.contains(text) && error.contains("999"), "{error}");
        }
    }

    #[test]
    fn a_namespace_that_nobody_is_in() {
        use std::os::fd::AsRawFd;
        let namespace = match namespace(&maps(1000)) {
            Ok(namespace) => namespace,
            Err(e) => return println!("SKIPPED: {e}"),
        };
        let place = format!("/proc/self/fd/{}", namespace.as_raw_fd());
        let theirs = fs::read_link(place).unwrap();
        assert!(theirs.to_string_lossy().starts_with("user:["), "{theirs:?}");
        assert_ne!(theirs, fs::read_link("/proc/self/ns/user").unwrap());
    }
}
