//! Zygote, keeper and creator: how Slipway makes containers.
//!
//! ```text
//! daemon --- client ---> zygote --fork--> keeper (one per pod) --fork--> creator --libcontainer--> container init
//! ```
//!
//! [`client`] is the daemon's side (tokio); everything else runs in single-threaded processes that the
//! zygote forked and knows neither gRPC, nor images, nor CNI. The OCI command line (`slipway-oci`) has no keeper: it
//! calls [`creator`] itself, with a [`bundle`].

pub mod addresses;
mod block_io;
pub mod bundle;
pub mod cgroup;
mod cgroup_view;
pub mod checkpoint;
pub mod client;
pub mod confine;
pub mod creator;
pub mod criu;
pub mod descriptor;
mod detach;
mod device_filter;
pub mod freezer;
mod hook_output;
pub mod hooks;
pub mod ids;
mod image_volume;
mod init;
mod keeper;
mod labels;
pub mod limits;
mod limits_v2;
pub mod listener;
pub mod log;
pub mod loopback;
mod mapped;
pub mod mount_table;
mod oci;
mod own_dev;
pub mod placement;
mod places;
mod priorities;
mod propagation;
pub mod removal;
pub mod resize;
mod restore;
pub mod rootfs;
pub mod sandbox;
pub mod scope;
mod shim;
mod stage;
pub mod sys;
pub mod terminal;
pub mod user;
mod users;
mod volumes;
pub mod wire;
mod writable_layer;
pub mod zygote;

pub use creator::SPEC_FILE;
pub use keeper::{PID_FILE, descendants};
pub use shim::RECORD as SHIM_RECORD;
pub use stage::places as stage_places;
