//! CRI v1 and the keeper protocol, with the code generated from `api.proto` and `keeper.proto`.
//!
//! [`cri`] is the kubelet's interface to the letter; [`keeper`] is what the daemon, the zygote and the
//! keepers say to each other. [`wire`] has what lists are encoded with without making their objects first.
#![forbid(unsafe_code)]

pub mod wire;

/// Container Runtime Interface v1 (`runtime.v1`).
// The comments stand in api.proto; fields and generated services carry none of their own.
#[allow(missing_docs, clippy::all)]
pub mod cri {
    tonic::include_proto!("runtime.v1");

    pub use crate::wire::{
        ListContainerStatsResponse, ListContainersResponse, ListPodSandboxStatsResponse,
    };

    impl std::fmt::Debug for AuthConfig {
        /// Prints who and where, and only whether there are secrets.
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            let secret = |s: &str| if s.is_empty() { "" } else { "[redacted]" };
            f.debug_struct("AuthConfig")
                .field("username", &self.username)
                .field("password", &secret(&self.password))
                .field("auth", &secret(&self.auth))
                .field("server_address", &self.server_address)
                .field("identity_token", &secret(&self.identity_token))
                .field("registry_token", &secret(&self.registry_token))
                .finish()
        }
    }
}

/// The keeper protocol (`slipway.keeper.v1`).
#[allow(missing_docs, clippy::all)]
pub mod keeper {
    tonic::include_proto!("slipway.keeper.v1");
}

/// What the command line asks of a running daemon beyond the CRI (`slipway.admin.v1`).
#[allow(missing_docs, clippy::all)]
pub mod admin {
    tonic::include_proto!("slipway.admin.v1");
}

/// The Node Resource Interface (`nri.pkg.api.v1alpha1`).
#[allow(missing_docs, clippy::all)]
pub mod nri {
    tonic::include_proto!("nri.pkg.api.v1alpha1");
}

/// The compiled CRI descriptor set (`google.protobuf.FileDescriptorSet`), for reflection and tests.
pub const CRI_DESCRIPTOR: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cri.binpb"));
