//! The server as its clients see it, with a backend that needs no container.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod command;
mod forward;
mod hostile;
mod http;
mod support;
mod tls;
