//! A container in its pod's user namespace: what its creator has to do otherwise, whoever makes the container.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::creator::CreateError;
use crate::detach::Kept;
use crate::ids::IdMaps;

/// What is different for a container in a user namespace.
pub struct Users {
    /// Its ids.
    pub ids: IdMaps,
    /// The host's ids of its root.
    pub root: (u32, u32),
    /// Itself.
    pub namespace: OwnedFd,
}

impl Users {
    /// Opens the namespaces that the container joins: from within the first of them, their paths lead nowhere. And
    /// sees to it that nothing that is mounted here gets out.
    ///
    /// # Errors
    /// [`CreateError`], for a spec without a user namespace, or for what opening says.
    pub fn prepare(
        spec: &mut Spec,
        ids: IdMaps,
        kept: &mut Kept,
        mut pid_namespace: Option<PathBuf>,
    ) -> Result<Self, CreateError> {
        let linux = spec.linux_mut().as_mut();
        let namespaces = linux.and_then(|l| l.namespaces_mut().as_mut());
        let mut own = None;
        for namespace in namespaces.into_iter().flatten() {
            if namespace.typ() == LinuxNamespaceType::Pid
                && let Some(path) = pid_namespace.take()
            {
                namespace.set_path(Some(path));
            }
            if namespace.path().is_none() {
                continue;
            }
            let fd = kept.open(namespace).map_err(CreateError::Namespace)?;
            if namespace.typ() == LinuxNamespaceType::User {
                own = Some(fd.try_clone_to_owned().map_err(CreateError::Namespace)?);
            }
        }
        let namespace = own.ok_or(CreateError::Incomplete("linux.namespaces of type user"))?;
        let slave = MsFlags::MS_SLAVE | MsFlags::MS_REC;
        mount(None::<&str>, "/", None::<&str>, slave, None::<&str>)
            .map_err(|e| CreateError::Namespace(e.into()))?;
        Ok(Self {
            root: ids.root().map_err(CreateError::Namespace)?,
            ids,
            namespace,
        })
    }

    /// Gives the pod's own files (hosts, resolv.conf, hostname) to the pod's root, who may write them elsewhere, too.
    ///
    /// # Errors
    /// [`CreateError::Bundle`].
    pub fn own_pod_files(&self, spec: &Spec, container_dir: &Path) -> Result<(), CreateError> {
        // <run root>/pods/<id>/containers/<id>
        let Some(pod_dir) = container_dir.ancestors().nth(2) else {
            return Ok(());
        };
        let sources = spec
            .mounts()
            .iter()
            .flatten()
            .filter_map(|m| m.source().as_ref());
        for file in sources.filter(|s| s.parent() == Some(pod_dir) && s.is_file()) {
            let (uid, gid) = self.root;
            std::os::unix::fs::lchown(file, Some(uid), Some(gid)).map_err(|source| {
                CreateError::Bundle {
                    path: file.clone(),
                    source,
                }
            })?;
        }
        Ok(())
    }
}
