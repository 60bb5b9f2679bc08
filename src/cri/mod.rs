//! The gRPC face of the daemon: request in, domain call, response out. What a message means, which code an
//! error has, nothing else.

mod call;
mod code;
mod containers;
mod events;
mod exec;
mod filter;
mod images;
mod info;
mod metrics;
mod pods;
mod runtime_service;
mod session;
mod signal;
mod stats;
mod stream;

pub use code::status;
pub use images::Images;
pub use runtime_service::Runtime;
pub use session::Streams;
