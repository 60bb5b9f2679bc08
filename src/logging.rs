//! The daemon's own log: `tracing` events on standard error, as text or JSON.

use std::io::IsTerminal as _;

use slipway_config::{LogFormat, LogLevel};
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer as _, Registry};

/// Changes the level of a running log.
#[derive(Clone)]
pub struct Level(reload::Handle<EnvFilter, Registry>);

impl Level {
    /// Sets the least important level that is written.
    pub fn set(&self, level: LogLevel) {
        if let Err(error) = self.0.reload(filter(level)) {
            tracing::error!(%error, "can't change the log level");
        }
    }
}

/// Starts the log. Only the first call in a process has an effect.
pub fn start(format: LogFormat, level: LogLevel) -> Level {
    let (filter, handle) = reload::Layer::new(filter(level));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match format {
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
    };
    let started = tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .try_init();
    if started.is_err() {
        eprintln!("slipway: the log was started before");
    }
    Level(handle)
}

/// Our own events at the level; what libraries do step by step only matters to who debugs them.
fn filter(level: LogLevel) -> EnvFilter {
    let quiet = level.min(LogLevel::Warn).as_str();
    let mut directives = level.as_str().to_owned();
    if level != LogLevel::Trace {
        for library in [
            "h2",
            "hyper",
            "hyper_util",
            "loona_hpack",
            "tower",
            "tonic",
            "rustls",
            "reqwest",
        ] {
            directives.push_str(&format!(",{library}={quiet}"));
        }
    }
    EnvFilter::new(directives)
}
