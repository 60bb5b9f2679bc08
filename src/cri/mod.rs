//! The gRPC face of the daemon: request in, domain call, response out. What a message means, which code an
//! error has, nothing else.

mod call;
mod code;
mod containers;
mod exec;
mod filter;
mod images;
mod info;
mod pods;
mod runtime_service;
mod signal;
mod unimplemented;

pub use images::Images;
pub use runtime_service::Runtime;
