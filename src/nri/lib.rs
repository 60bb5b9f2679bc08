//! The Node Resource Interface (NRI 0.12): plugins hear of what happens to pods and containers, and may change a
//! container that is being created and the limits of those that there are.
//!
//! ```text
//! frame   logical connections over one Unix socket
//! rpc     ttrpc messages over one of them
//! link    both together: calls to a plugin, and calls from it
//! plugin  one that has registered: what it wants to hear, and what becomes of it when it does not answer
//! hub     all of them: who joins, in which order they are asked, what they agree on
//! ```
//!
//! What plugins wish is merged in [`merge`](self), with an error for two that want different things; what is
//! done about it is the caller's.
#![forbid(unsafe_code)]

mod error;
mod events;
mod frame;
mod hub;
mod launch;
mod link;
mod merge;
mod name;
mod owners;
mod plugin;
mod resources;
mod rpc;
mod validator;

pub use error::{NriError, NriErrorKind};
pub use events::Events;
pub use hub::{Created, Nri, Runtime, Settings, Turn, Updated};
pub use name::{PluginName, is_removal, removal};
pub use slipway_proto::nri as api;
pub use validator::{VALIDATOR, ValidatorSettings};

/// The NRI version whose protocol this is.
pub const VERSION: &str = "v0.12.0";
