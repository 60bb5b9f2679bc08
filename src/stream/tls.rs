//! TLS with files that may change while the server runs.

use crate::{StreamError, TlsFiles};
use parking_lot::Mutex;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use tokio_rustls::TlsAcceptor;
use tracing::{info, warn};

/// The current certificate, read again when its files change.
pub(crate) struct Certificate {
    files: TlsFiles,
    current: Mutex<Current>,
}

struct Current {
    /// What the files looked like when they were last read, with or without success.
    stamp: Stamp,
    config: Arc<ServerConfig>,
}

/// Device, inode, size and change time of both files. A file that can't be seen is `None`.
type Stamp = [Option<(u64, u64, u64, i64, i64)>; 2];

impl Certificate {
    pub(crate) fn load(files: TlsFiles) -> Result<Self, StreamError> {
        let stamp = stamp(&files);
        let config = read(&files)?;
        let current = Mutex::new(Current { stamp, config });
        Ok(Self { files, current })
    }

    /// What the next connection is served with. Looks at the files, which blocks for microseconds.
    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        let mut current = self.current.lock();
        let stamp = stamp(&self.files);
        if stamp != current.stamp {
            current.stamp = stamp;
            match read(&self.files) {
                Ok(config) => {
                    info!(certificate = %self.files.certificate.display(), "the streaming certificate was read again");
                    current.config = config;
                }
                Err(error) => {
                    warn!(%error, "the changed streaming certificate can't be used; the one before stays");
                }
            }
        }
        TlsAcceptor::from(current.config.clone())
    }
}

fn stamp(files: &TlsFiles) -> Stamp {
    [&files.certificate, &files.key].map(|path| {
        let meta = std::fs::metadata(path).ok()?;
        Some((
            meta.dev(),
            meta.ino(),
            meta.size(),
            meta.ctime(),
            meta.ctime_nsec(),
        ))
    })
}

fn read(files: &TlsFiles) -> Result<Arc<ServerConfig>, StreamError> {
    let error = |path: &Path, reason: String| StreamError::Tls {
        path: path.to_owned(),
        reason,
    };
    let chain = CertificateDer::pem_file_iter(&files.certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| error(&files.certificate, e.to_string()))?;
    if chain.is_empty() {
        return Err(error(
            &files.certificate,
            "there is no certificate in it".into(),
        ));
    }
    let key =
        PrivateKeyDer::from_pem_file(&files.key).map_err(|e| error(&files.key, e.to_string()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| error(&files.certificate, e.to_string()))?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|e| error(&files.certificate, e.to_string()))?;
    // Upgrades are a thing of HTTP/1.1.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
