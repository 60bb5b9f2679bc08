//! The daemon's configuration.
//!
//! `/etc/slipway/config.toml`, then `/etc/slipway/config.d/*.toml` in name order, merged key by key; no
//! file at all is a working configuration. An unknown key or a bad value is an error that names the file,
//! the line, the key and what is allowed there.
//!
//! ```no_run
//! let (config, files) = slipway_config::Config::load(None)?;
//! println!("{} from {files:?}", config.listen.display());
//! # Ok::<(), slipway_config::ConfigError>(())
//! ```
#![forbid(unsafe_code)]

mod document;
mod error;
mod keys;
mod load;
mod settings;
mod size;
mod validate;

pub use error::ConfigError;
pub use keys::{Changes, diff_reloadable};
pub use load::{DEFAULT_FILE, DROP_IN_DIR};
pub use settings::{
    Cgroup, CgroupDriver, Checkpoint, Config, Images, Limits, Log, LogFormat, LogLevel,
    MissingMountSource, MonitorCgroup, Network, Nri, Pod, Runtime, RuntimeKind, RuntimeOptions,
    Stream,
};
pub use size::Size;
pub use validate::Problem;
