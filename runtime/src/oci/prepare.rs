//! From the keeper's call to a root file system that is mounted and a specification that is whole: what the containers of
//! command-line runtimes and of shims have in common.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use oci_spec::runtime::Spec;
use slipway_proto::keeper::{CreateContainer, ErrorKind};

use super::bundle::{self, BundleError, Known};
use crate::creator::{self, CreateError, SPEC_FILE, set_oom_score};
use crate::image_volume::{self, ImageVolumeError};
use crate::mapped::{self, MappedError};
use crate::places::{self, PlaceError};
use crate::rootfs::{self, RootfsError};
use crate::user::{self, Resolved, UserError};
use crate::users::Users;
use crate::{stage, sys, volumes};

/// Why a container could not be made ready for its runtime.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// A step that is as in native containers.
    #[error(transparent)]
    Creator(#[from] CreateError),
    /// The specification.
    #[error(transparent)]
    Bundle(#[from] BundleError),
}

/// Makes an error of the creator's of what the shared steps say.
macro_rules! shared {
    ($($kind:ty),*) => {$(
        impl From<$kind> for PrepareError {
            fn from(error: $kind) -> Self {
                Self::Creator(error.into())
            }
        }
    )*};
}
shared!(
    RootfsError,
    UserError,
    PlaceError,
    ImageVolumeError,
    MappedError
);

impl PrepareError {
    /// The class of the failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Creator(error) => error.kind(),
            Self::Bundle(BundleError::Environment { .. } | BundleError::Hooks { .. }) => {
                ErrorKind::Invalid
            }
            Self::Bundle(_) => ErrorKind::Internal,
        }
    }
}

/// Reads the specification of a call, and leaves it in the container's directory for people to look at.
///
/// # Errors
/// [`PrepareError`].
pub fn read(create: &CreateContainer) -> Result<Spec, PrepareError> {
    let spec = serde_json::from_slice(&create.spec).map_err(CreateError::Spec)?;
    creator::write_private(&Path::new(&create.dir).join(SPEC_FILE), &create.spec)?;
    Ok(spec)
}

/// Mounts the root file system in this process's mount namespace, finds the user in it, and completes the specification
/// for the runtime of this handler. `users`: the pod's user namespace, whose namespaces the spec has as descriptors by now.
/// `of_process`: this process gets the container's score for the OOM killer, which what the runtime makes inherits.
///
/// # Errors
/// [`PrepareError`].
pub fn prepare(
    spec: &mut Spec,
    handler: &str,
    create: &CreateContainer,
    pid_namespace: Option<&Path>,
    users: Option<&Users>,
    of_process: bool,
) -> Result<Resolved, PrepareError> {
    let dir = Path::new(&create.dir);
    let target = dir.join("rootfs");
    fs::create_dir_all(&target).map_err(|source| CreateError::Bundle {
        path: target.clone(),
        source,
    })?;
    if let Some(overlay) = &create.overlay {
        let users = users.map(|u| (u.namespace.as_fd(), u.root));
        rootfs::mount_overlay(overlay, &target, users)?;
    }
    let owner = users.map(|users| users.root);
    let namespace = users.map(|users| users.namespace.as_fd());
    image_volume::mount_all(create, dir, namespace)?;
    let root = rootfs::open_root(&target)?;
    let user = user::resolve(
        root.as_fd(),
        create.user.as_ref().unwrap_or(&Default::default()),
    )?;
    if let Some(users) = users {
        users.ids.check(&user)?;
        users.own_pod_files(spec, dir)?;
    }
    if !create.working_dir.is_empty() {
        rootfs::make_dir(&root, Path::new(&create.working_dir), owner)?;
    }
    volumes::arrange(&root, &target, &create.volumes, spec, owner)?;
    places::secure(&root, spec, owner)?;
    drop(root);
    let pod = users.map(|users| (&users.ids, users.namespace.as_fd()));
    mapped::arrange(spec, &dir.join("mapped"), pod)?;
    bundle::arrange_recursive(spec, &dir.join("recursive"))?;
    if users.is_some() {
        let staged = stage::places().and_then(|[place, top]| {
            stage::set(spec, &target, &top, Some(&place))?;
            stage::single_out(spec, &top)
        });
        staged.map_err(CreateError::Stage)?;
        bundle::keep_locked(spec)?;
        // In there nobody may raise them.
        for limit in spec
            .process()
            .iter()
            .flat_map(|p| p.rlimits().iter().flatten())
        {
            sys::raise_hard_limit(limit.typ() as u32, limit.hard());
        }
    }
    let oom_score_adj = match of_process {
        true => {
            set_oom_score(create.oom_score_adj);
            own_oom_score()
        }
        // What is lower than the own one, only who may lower it can set for others.
        false => own_oom_score().map(|own| own.max(create.oom_score_adj)),
    };
    let known = Known {
        handler,
        create,
        user: &user,
        rootfs: users.is_none().then_some(&*target),
        pid_namespace,
        oom_score_adj,
    };
    bundle::complete(spec, &known)?;
    Ok(user)
}

/// What the kernel lets this process have: what it inherits, its children may set again.
fn own_oom_score() -> Option<i32> {
    let text = fs::read_to_string("/proc/self/oom_score_adj").ok()?;
    text.trim().parse().ok()
}
