//! Pods and containers: their life, their records, what becomes of them when the daemon ends.
//!
//! [`Node`] has them all. What is asked is answered from memory; what changes something runs to its end in
//! a task of its own, ordered per pod ([`sandbox::Pod::shared`], [`sandbox::Pod::exclusive`]) and per
//! container ([`container::Container::turn`]). A stop that waits holds neither.

mod addresses;
mod assemble;
pub mod block_io;
mod cdi;
pub mod checkpoint;
pub mod container;
mod create;
mod detach;
pub mod error;
mod events;
mod exec;
pub mod feed;
mod files;
mod guests;
pub mod handlers;
mod hooks;
mod leftovers;
mod levels;
mod lifecycle;
pub mod names;
mod node;
pub mod phases;
mod plugins;
mod probe;
pub mod record;
mod recovery;
mod relabel;
mod resize;
mod restore;
mod run;
pub mod sandbox;
mod session;
mod shares;
mod shim;
pub mod state;
pub mod stats;
mod stop;
pub mod store;

pub use container::Container;
pub use error::{Class, PodError, chain};
pub use leftovers::is_mount_point;
pub use node::{Node, now};
pub use sandbox::Pod;
pub use session::Sessions;
