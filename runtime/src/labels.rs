//! SELinux labels of what a container mounts.
//!
//! libcontainer 0.7 gives the label to every mount as an option, bind mounts and shared file systems included,
//! which refuse it. Here only file systems that are the container's own get it.

use std::io;
use std::path::Path;

use oci_spec::runtime::Spec;

/// The kernel's name of the label as an extended attribute.
const ATTRIBUTE: &str = "security.selinux";
const QUEUES: &str = "/dev/mqueue";

/// The label of the container's files, for those that only its init can reach.
#[derive(Debug, Clone)]
pub struct Label(String);

/// Takes the mount label out of the spec, and puts it into the options of the mounts that take it.
pub fn take(spec: &mut Spec) -> Option<Label> {
    let linux = spec.linux_mut().as_mut()?;
    let label = linux
        .mount_label()
        .clone()
        .filter(|label| !label.is_empty());
    linux.set_mount_label(None);
    let label = label?;
    for mount in spec.mounts_mut().iter_mut().flatten() {
        if matches!(mount.typ().as_deref(), Some("tmpfs" | "devpts")) {
            let mut options = mount.options().clone().unwrap_or_default();
            options.push(format!("context={label}"));
            mount.set_options(Some(options));
        }
    }
    Some(Label(label))
}

impl Label {
    /// In the container's root: labels the message queues' directory. It is one file system for the whole pod,
    /// mounted before any container, so no option could.
    ///
    /// # Errors
    /// What the kernel says; a `/dev` without message queues is none.
    pub fn queues(&self) -> io::Result<()> {
        let path = Path::new(QUEUES);
        let mqueue = rustix::fs::statfs(path).is_ok_and(|fs| fs.f_type as u64 == MQUEUE_MAGIC);
        if !mqueue {
            return Ok(());
        }
        let value = [self.0.as_bytes(), b"\0"].concat();
        let flags = rustix::fs::XattrFlags::empty();
        match rustix::fs::lsetxattr(path, ATTRIBUTE, &value, flags) {
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

/// Type of the message queues' file system (statfs(2)).
const MQUEUE_MAGIC: u64 = 0x1980_0202;

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::{Linux, Mount};

    #[test]
    fn only_file_systems_of_its_own_are_labelled() {
        let label = "system_u:object_r:container_file_t:s0:c1,c2";
        let mut linux = Linux::default();
        linux.set_mount_label(Some(label.to_owned()));
        let mut spec = Spec::default();
        let mount = |kind: &str| {
            let mut mount = Mount::default();
            mount.set_typ(Some(kind.to_owned())).set_options(None);
            mount
        };
        let kinds = [
            "proc", "tmpfs", "devpts", "mqueue", "bind", "sysfs", "cgroup",
        ];
        spec.set_mounts(Some(kinds.map(mount).into()))
            .set_linux(Some(linux));
        assert!(take(&mut spec).is_some());
        let labelled = spec
            .mounts()
            .iter()
            .flatten()
            .filter(|m| m.options().is_some());
        let labelled: Vec<_> = labelled.filter_map(|m| m.typ().clone()).collect();
        assert_eq!(labelled, ["tmpfs", "devpts"]);
        assert_eq!(
            spec.linux().as_ref().and_then(|l| l.mount_label().clone()),
            None
        );
        assert!(take(&mut spec).is_none());
    }
}
