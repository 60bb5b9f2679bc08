//! Compiled filters, kept.
//!
//! Compiling takes a few hundred microseconds and the pods of a node use a handful of profiles, so a
//! filter is made once for each profile and set of capabilities.

use crate::{
    CompileOptions, Filter, SeccompError, Subject, compile, default_profile, native_arch,
    parse_profile, running_kernel,
};
use oci_spec::runtime::{Arch, Capabilities, LinuxSeccomp};
use sha2::{Digest, Sha256};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Where a container's profile comes from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// The runtime's own profile.
    RuntimeDefault,
    /// The content of a Localhost profile, in either format (see [`parse_profile`]).
    Localhost(&'a [u8]),
    /// A profile in the OCI's form, its conditions resolved.
    Oci(&'a LinuxSeccomp),
}

#[derive(PartialEq, Eq, Hash, Clone)]
struct Key {
    /// SHA-256 of the profile: its author may be hostile, and must not get another's filter.
    profile: [u8; 32],
    /// A bit for each capability.
    capabilities: u64,
    arch: u32,
    kernel: (u32, u32),
}

/// A thread-safe cache of compiled filters. Share one per daemon.
#[derive(Debug, Default)]
pub struct ProfileCache {
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    filters: HashMap<Key, (u64, Arc<Filter>)>,
    /// Counts look-ups, to know which filter was used least recently.
    clock: u64,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:02x}{:02x}…/{:x}",
            self.profile[0], self.profile[1], self.capabilities
        )
    }
}

/// More than a node's profiles times their sets of capabilities; a filter is about 2 kB.
const CAPACITY: usize = 512;

impl ProfileCache {
    /// An empty cache.
    pub fn new() -> ProfileCache {
        ProfileCache::default()
    }

    /// The filter of `source` for a container with this bounding set, on this machine and kernel.
    /// Compiled by the caller's thread at the first call, shared afterwards.
    ///
    /// # Errors
    /// What [`parse_profile`] and [`compile`] say of the profile. Errors are not kept.
    pub fn get(
        &self,
        source: Source<'_>,
        capabilities: &Capabilities,
    ) -> Result<Arc<Filter>, SeccompError> {
        let arch = native_arch();
        let kernel = running_kernel();
        let key = key(source, capabilities, arch, kernel)?;
        if let Some(filter) = self.lock().find(&key) {
            return Ok(filter);
        }
        // Not under the lock: two threads may both compile a new profile, which is only wasteful.
        let subject = Subject {
            capabilities,
            arch,
            kernel,
        };
        let options = CompileOptions::default();
        let filter = Arc::new(match source {
            Source::RuntimeDefault => {
                compile(&default_profile(capabilities, arch, kernel), &options)?
            }
            Source::Localhost(json) => compile(&parse_profile(json, subject)?, &options)?,
            Source::Oci(profile) => compile(profile, &options)?,
        });
        Ok(self.lock().keep(key, filter))
    }

    /// How many filters are kept.
    pub fn len(&self) -> usize {
        self.lock().filters.len()
    }

    /// Whether none is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        // Every change to the map is one call: a panic elsewhere leaves nothing half done.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The profile of `source` in the OCI's form, for a container with this bounding set on this machine and kernel: for
/// runtimes that compile it themselves.
///
/// # Errors
/// What [`parse_profile`] says of the profile.
pub fn resolve(
    source: Source<'_>,
    capabilities: &Capabilities,
) -> Result<LinuxSeccomp, SeccompError> {
    let (arch, kernel) = (native_arch(), running_kernel());
    match source {
        Source::RuntimeDefault => Ok(default_profile(capabilities, arch, kernel)),
        Source::Localhost(json) => parse_profile(
            json,
            Subject {
                capabilities,
                arch,
                kernel,
            },
        ),
        Source::Oci(profile) => Ok(profile.clone()),
    }
}

impl Entries {
    fn find(&mut self, key: &Key) -> Option<Arc<Filter>> {
        self.clock += 1;
        let (used, filter) = self.filters.get_mut(key)?;
        *used = self.clock;
        Some(filter.clone())
    }

    fn keep(&mut self, key: Key, filter: Arc<Filter>) -> Arc<Filter> {
        if let Some(first) = self.find(&key) {
            return first;
        }
        if self.filters.len() >= CAPACITY {
            let oldest = self
                .filters
                .iter()
                .min_by_key(|(_, (used, _))| *used)
                .map(|(k, _)| k.clone());
            if let Some(oldest) = oldest {
                self.filters.remove(&oldest);
            }
        }
        self.filters.insert(key, (self.clock, filter.clone()));
        filter
    }
}

fn key(
    source: Source<'_>,
    capabilities: &Capabilities,
    arch: Arch,
    kernel: (u32, u32),
) -> Result<Key, SeccompError> {
    let mut hash = Sha256::new();
    match source {
        Source::RuntimeDefault => hash.update(b"default"),
        Source::Localhost(json) => {
            hash.update(b"localhost\0");
            hash.update(json);
        }
        Source::Oci(profile) => {
            hash.update(b"oci\0");
            hash.update(serde_json::to_vec(profile).map_err(SeccompError::Json)?);
        }
    }
    let capabilities = capabilities
        .iter()
        .fold(0, |bits, c| bits | 1u64 << (*c as u8));
    Ok(Key {
        profile: hash.finalize().into(),
        capabilities,
        arch: arch as u32,
        kernel,
    })
}
