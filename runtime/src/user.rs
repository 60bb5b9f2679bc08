//! Whom a container runs as: names and ids looked up in the image's own `/etc/passwd` and `/etc/group`,
//! never through the host's name service.

use std::io::Read;
use std::os::fd::BorrowedFd;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use slipway_proto::keeper::{CreateContainerResult, User};

/// Largest passwd or group file that is read, in bytes.
const MAX_FILE: u64 = 4 << 20;

/// Why a user can't be resolved; the text names the user and where it came from.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// No such name in the image.
    #[error("no {kind} {name:?} in the image's {file}: use a numeric id, or an image that has it")]
    Unknown {
        /// "user" or "group".
        kind: &'static str,
        /// What was looked up.
        name: String,
        /// Where.
        file: &'static str,
    },
    /// Not an id.
    #[error("{what} {value} is not a valid id: it must be between 0 and 4294967294")]
    Range {
        /// Which field.
        what: &'static str,
        /// Its value.
        value: String,
    },
    /// Outside the pod's user namespace.
    #[error(
        "{kind} {id} does not exist in the pod's user namespace, whose last one is {last}: use a lower id, or let \
         the kubelet give pods more of them (userNamespaces.idsPerPod)"
    )]
    Unmapped {
        /// "user" or "group".
        kind: &'static str,
        /// The id, in the container.
        id: u32,
        /// The last id that there is.
        last: u32,
    },
    /// A file of the image can't be read.
    #[error("can't read {file} of the image")]
    Read {
        /// The file.
        file: &'static str,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
}

/// A resolved user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// All groups of the process, the primary one among them; sorted.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
}

impl Resolved {
    /// The answer to a create whose init, if there is one, is `pid`.
    pub fn created(&self, pid: i32) -> CreateContainerResult {
        CreateContainerResult {
            pid,
            uid: self.uid,
            gid: self.gid,
            groups: self.groups.clone(),
            home: self.home.clone(),
            cannot_run: String::new(),
        }
    }
}

struct Passwd<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

/// Resolves a CRI user in a root file system.
///
/// # Errors
/// [`UserError`]; a missing passwd or group file counts as an empty one.
pub fn resolve(root: BorrowedFd<'_>, user: &User) -> Result<Resolved, UserError> {
    let passwd = read(root, "etc/passwd", "/etc/passwd")?;
    let group = read(root, "etc/group", "/etc/group")?;
    resolve_in(&passwd, &group, user)
}

fn resolve_in(passwd: &str, group: &str, user: &User) -> Result<Resolved, UserError> {
    let by_id = |uid: u32| passwd_entries(passwd).find(|p| p.uid == uid);
    // An image's USER may be "user:group"; the CRI's fields have their own for the group.
    let (name, image_group) = if user.run_as_user.is_some() || !user.run_as_username.is_empty() {
        (user.run_as_username.as_str(), "")
    } else {
        user.image_user
            .split_once(':')
            .unwrap_or((user.image_user.as_str(), ""))
    };
    let (uid, entry) = match user.run_as_user {
        Some(id) => {
            let uid = checked("run_as_user", id)?;
            (uid, by_id(uid))
        }
        None if name.is_empty() => (0, by_id(0)),
        // A name that looks like a number is a name first, as for useradd and runc.
        None => match passwd_entries(passwd).find(|p| p.name == name) {
            Some(entry) => (entry.uid, Some(entry)),
            None => {
                let unknown = || UserError::Unknown {
                    kind: "user",
                    name: name.into(),
                    file: "/etc/passwd",
                };
                let id: i64 = name.parse().map_err(|_| unknown())?;
                let uid = checked("user", id)?;
                (uid, by_id(uid))
            }
        },
    };
    let mut gid = entry.as_ref().map_or(0, |p| p.gid);
    if !image_group.is_empty() {
        gid = match group_entries(group).find(|g| g.name == image_group) {
            Some(entry) => entry.gid,
            None => {
                let unknown = || UserError::Unknown {
                    kind: "group",
                    name: image_group.into(),
                    file: "/etc/group",
                };
                checked("group", image_group.parse::<i64>().map_err(|_| unknown())?)?
            }
        };
    }
    if let Some(id) = user.run_as_group {
        gid = checked("run_as_group", id)?;
    }
    let mut groups = vec![gid];
    for id in &user.supplemental_groups {
        groups.push(checked("supplemental group", *id)?);
    }
    if !user.strict_groups
        && let Some(entry) = &entry
    {
        let member = |g: &Group<'_>| g.members.split(',').any(|m| m.trim() == entry.name);
        groups.extend(group_entries(group).filter(member).map(|g| g.gid));
    }
    groups.sort_unstable();
    groups.dedup();
    let home = entry
        .map(|p| p.home)
        .filter(|h| h.starts_with('/'))
        .unwrap_or("/")
        .to_owned();
    Ok(Resolved {
        uid,
        gid,
        groups,
        home,
    })
}

fn checked(what: &'static str, value: i64) -> Result<u32, UserError> {
    // u32::MAX is "no change" to the set*id calls.
    u32::try_from(value)
        .ok()
        .filter(|id| *id != u32::MAX)
        .ok_or_else(|| UserError::Range {
            what,
            value: value.to_string(),
        })
}

fn passwd_entries(text: &str) -> impl Iterator<Item = Passwd<'_>> {
    text.lines().filter_map(|line| {
        let mut f = line.split(':');
        let name = f.next().filter(|n| !n.is_empty() && !n.starts_with('#'))?;
        let uid = f.nth(1)?.trim().parse().ok()?;
        let gid = f.next()?.trim().parse().ok()?;
        let home = f.nth(1).unwrap_or_default();
        Some(Passwd {
            name,
            uid,
            gid,
            home,
        })
    })
}

fn group_entries(text: &str) -> impl Iterator<Item = Group<'_>> {
    text.lines().filter_map(|line| {
        let mut f = line.split(':');
        let name = f.next().filter(|n| !n.is_empty() && !n.starts_with('#'))?;
        let gid = f.nth(1)?.trim().parse().ok()?;
        Some(Group {
            name,
            gid,
            members: f.next().unwrap_or_default(),
        })
    })
}

fn read(root: BorrowedFd<'_>, path: &str, file: &'static str) -> Result<String, UserError> {
    let failed = |source| UserError::Read { file, source };
    let fd = match rustix::fs::openat2(
        root,
        path,
        // Not blocking: a hostile image may have a FIFO here.
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    ) {
        Ok(fd) => fd,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(String::new()),
        Err(e) => return Err(failed(e.into())),
    };
    let mut bytes = Vec::new();
    std::fs::File::from(fd)
        .take(MAX_FILE)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "# users\nroot:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/srv/web:/bin/sh\n\
        1001:x:77:78::/odd:\nbroken\n";
    const GROUP: &str = "root:x:0:root\nwww:x:34:\nextra:x:50000:other,web\nmore:x:60000:web\n";

    fn resolve(user: User) -> Result<Resolved, UserError> {
        resolve_in(PASSWD, GROUP, &user)
    }

    #[test]
    fn the_images_user_by_name_and_by_id() {
        let image = |u: &str| {
            resolve(User {
                image_user: u.into(),
                ..User::default()
            })
        };
        let root = image("").unwrap();
        assert_eq!((root.uid, root.gid, root.home.as_str()), (0, 0, "/root"));
        let web = image("web").unwrap();
        assert_eq!((web.uid, web.gid, web.home.as_str()), (33, 34, "/srv/web"));
        assert_eq!(web.groups, [34, 50000, 60000]);
        assert_eq!(image("33").unwrap(), web);
        assert_eq!(image("web:extra").unwrap().gid, 50000);
        assert_eq!(image("4242:4343").unwrap().groups, [4343]);
        assert_eq!(image("4242").unwrap().home, "/");
        // A name made of digits is still a name.
        assert_eq!(image("1001").unwrap().uid, 77);
        assert!(matches!(
            image("nobody-here"),
            Err(UserError::Unknown { .. })
        ));
        assert!(matches!(
            image("web:nogroup"),
            Err(UserError::Unknown { .. })
        ));
        assert!(matches!(image("-1"), Err(UserError::Range { .. })));
        assert!(matches!(image("4294967295"), Err(UserError::Range { .. })));
    }

    #[test]
    fn the_cris_user_wins_over_the_images() {
        let user = resolve(User {
            image_user: "web:extra".into(),
            run_as_user: Some(0),
            ..User::default()
        });
        assert_eq!(user.unwrap().gid, 0);
        let named = User {
            run_as_username: "web".into(),
            run_as_group: Some(5),
            supplemental_groups: vec![7, 7, 6],
            ..User::default()
        };
        assert_eq!(
            resolve(named.clone()).unwrap().groups,
            [5, 6, 7, 50000, 60000]
        );
        let strict = User {
            strict_groups: true,
            ..named
        };
        assert_eq!(resolve(strict).unwrap().groups, [5, 6, 7]);
        let negative = User {
            supplemental_groups: vec![-1],
            ..User::default()
        };
        assert!(matches!(resolve(negative), Err(UserError::Range { .. })));
    }
}
