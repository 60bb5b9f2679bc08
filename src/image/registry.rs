//! A client for registries (OCI distribution specification 1.1, and Docker's registry API v2 that it
//! comes from): manifests and blobs, with authentication, bounds and verification.

use std::collections::HashMap;
use std::fs;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use reqwest::header::HeaderMap;
use reqwest::redirect::Policy;
use reqwest::{Client, StatusCode, Url};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use crate::config::RegistryConfig;
use crate::credentials::Secret;
use crate::error::ImageError;
use crate::reference::ImageName;

mod challenge;
mod repository;
mod token;

pub(crate) use repository::Repository;

/// How long it may take to find out whether a host speaks TLS.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

/// As many authorizations are remembered; any one can be had again.
const MAX_AUTHORIZATIONS: usize = 500;

/// The client for all registries.
pub(crate) struct Registry {
    config: RegistryConfig,
    /// Through the environment's proxies.
    proxied: Clients,
    /// For loopback addresses, which no proxy can reach for us.
    direct: Clients,
    /// How long a transfer may take to make progress.
    progress: Duration,
    /// `Authorization` headers that worked, with their end.
    authorizations: Mutex<HashMap<Access, Authorization>>,
    /// Whether a host that may speak plain HTTP does.
    plain: Mutex<HashMap<String, bool>>,
}

/// Clients that differ in the redirects they follow.
struct Clients {
    any: Client,
    /// For requests with a secret in their body, which stays with the host it is for.
    faithful: Client,
}

/// What an authorization is good for.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Access {
    host: String,
    repository: String,
    secret: Secret,
}

#[derive(Clone)]
struct Authorization {
    header: String,
    until: Instant,
}

impl Registry {
    /// Makes the client; reads certificate authorities.
    pub(crate) fn new(config: RegistryConfig, progress: Duration) -> Result<Self, ImageError> {
        let tls = tls(&config)?;
        let client = |proxies: bool, policy: Policy| -> Result<Client, ImageError> {
            let builder = Client::builder()
                .tls_backend_preconfigured(tls.clone())
                .user_agent(concat!("slipway/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(config.connect_timeout)
                .read_timeout(progress)
                .redirect(policy);
            let builder = if proxies { builder } else { builder.no_proxy() };
            builder.build().map_err(|error| ImageError::Config {
                reason: format!("the HTTP client can't be set up: {}", chain(&error)),
            })
        };
        let clients = |proxies: bool| -> Result<Clients, ImageError> {
            Ok(Clients {
                any: client(proxies, redirects(config.insecure.clone()))?,
                faithful: client(proxies, same_origin())?,
            })
        };
        Ok(Self {
            proxied: clients(true)?,
            direct: clients(false)?,
            config,
            progress,
            authorizations: Mutex::default(),
            plain: Mutex::default(),
        })
    }

    /// How often in a row a transfer is resumed without progress.
    pub(crate) fn retries(&self) -> u32 {
        self.config.retries
    }

    /// The hosts to ask for an image: its registry's mirrors, then the registry itself.
    pub(crate) fn endpoints(&self, name: &ImageName) -> Vec<String> {
        let mirrors = self
            .config
            .mirrors
            .get(name.registry())
            .cloned()
            .unwrap_or_default();
        mirrors
            .into_iter()
            .chain([name.registry().to_owned()])
            .collect()
    }

    /// The image's repository at one of its endpoints.
    pub(crate) async fn repository(
        self: &Arc<Self>,
        name: &ImageName,
        endpoint: &str,
        secret: &Secret,
    ) -> Result<Repository, ImageError> {
        let is_mirror = endpoint != name.registry();
        let address = match endpoint {
            "docker.io" => "registry-1.docker.io",
            other => other,
        };
        let scheme = self.scheme(address).await?;
        let base = Url::parse(&format!("{scheme}://{address}")).map_err(|error| {
            ImageError::InvalidReference {
                reference: name.to_string(),
                reason: format!("{endpoint:?} is no host name: {error}"),
            }
        })?;
        Ok(Repository {
            registry: Arc::clone(self),
            host: endpoint.to_owned(),
            base,
            path: name.repository().to_owned(),
            mirror_of: is_mirror.then(|| name.registry().to_owned()),
            // The registry's credentials are none of its mirrors' business.
            secret: if is_mirror {
                Secret::Anonymous
            } else {
                secret.clone()
            },
        })
    }

    fn client(&self, host: &str) -> &Client {
        &self.clients(host).any
    }

    /// A client that carries what it sends nowhere else.
    fn faithful_client(&self, host: &str) -> &Client {
        &self.clients(host).faithful
    }

    fn clients(&self, host: &str) -> &Clients {
        if is_loopback(host) {
            &self.direct
        } else {
            &self.proxied
        }
    }

    /// `https`, or `http` for a host that may and does speak plain HTTP only.
    async fn scheme(&self, address: &str) -> Result<&'static str, ImageError> {
        let loopback = is_loopback(address);
        let host = host_of(address);
        if !loopback
            && !self
                .config
                .insecure
                .iter()
                .any(|allowed| allowed == address || allowed == host)
        {
            return Ok("https");
        }
        let known = self
            .plain
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(address)
            .copied();
        if let Some(plain) = known {
            return Ok(if plain { "http" } else { "https" });
        }
        let order = if loopback {
            ["http", "https"]
        } else {
            ["https", "http"]
        };
        let mut failure: Option<reqwest::Error> = None;
        for scheme in order {
            let request = self
                .client(address)
                .get(format!("{scheme}://{address}/v2/"))
                .timeout(PROBE_TIMEOUT);
            match request.send().await {
                // A TLS port answers plain HTTP with 400, if at all.
                Ok(answer) if scheme == "http" && answer.status() == StatusCode::BAD_REQUEST => {}
                Ok(_) => {
                    let plain = scheme == "http";
                    self.plain
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .insert(address.to_owned(), plain);
                    return Ok(scheme);
                }
                // Nobody listens: the first error says so. Otherwise the later one says more.
                Err(error) if failure.as_ref().is_none_or(|first| !first.is_connect()) => {
                    failure = Some(error)
                }
                Err(_) => {}
            }
        }
        match failure {
            Some(error) => Err(unreachable(address, "its API", error)),
            None => Err(ImageError::BadResponse {
                host: address.to_owned(),
                what: "its API".to_owned(),
                reason: "neither HTTP nor HTTPS gets a usable answer".to_owned(),
                status: None,
            }),
        }
    }

    fn authorization(&self, access: &Access) -> Option<String> {
        let map = self
            .authorizations
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let found = map.get(access)?;
        (found.until > Instant::now()).then(|| found.header.clone())
    }

    fn remember(&self, access: Access, authorization: Authorization) {
        let mut map = self
            .authorizations
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        map.retain(|_, known| known.until > now);
        if map.len() >= MAX_AUTHORIZATIONS
            && let Some(first) = map.iter().min_by_key(|(_, known)| known.until)
        {
            let first = first.0.clone();
            map.remove(&first);
        }
        map.insert(access, authorization);
    }
}

pub(crate) fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// The URL is left out: after a redirect it may carry a signature.
pub(crate) fn unreachable(host: &str, what: &str, error: reqwest::Error) -> ImageError {
    ImageError::Unreachable {
        host: host.to_owned(),
        what: what.to_owned(),
        source: Arc::new(error.without_url()),
    }
}

/// Whether a later attempt may succeed. A connection that can't be made at all is for the caller to
/// try again, who knows how long it wants to wait.
pub(crate) fn is_passing(error: &ImageError) -> bool {
    match error {
        ImageError::Unreachable { source, .. } => !source.is_connect() && !source.is_redirect(),
        ImageError::BadResponse { status, .. } => status.is_some_and(|status| status >= 500),
        _ => false,
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// A host without its port.
fn host_of(address: &str) -> &str {
    if let Some(rest) = address.strip_prefix('[') {
        return rest.split(']').next().unwrap_or(rest);
    }
    match address.rsplit_once(':') {
        // More than one colon: an IPv6 address without brackets.
        Some((host, _)) if !host.contains(':') => host,
        _ => address,
    }
}

fn is_loopback(address: &str) -> bool {
    let host = host_of(address);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// The system's certificate authorities and the configured ones; HTTP/1.1, whose parallel
/// connections carry parallel layers better than one of HTTP/2.
fn tls(config: &RegistryConfig) -> Result<rustls::ClientConfig, ImageError> {
    let mut roots = rustls::RootCertStore::empty();
    let native = rustls_native_certs::load_native_certs();
    for error in &native.errors {
        tracing::warn!(%error, "can't load all of the system's certificate authorities");
    }
    roots.add_parsable_certificates(native.certs);
    for file in &config.ca_files {
        let bad = |reason: String| ImageError::Config {
            reason: format!("certificate authorities in {}: {reason}", file.display()),
        };
        let text = fs::read(file).map_err(|error| bad(error.to_string()))?;
        let mut count = 0;
        for certificate in CertificateDer::pem_slice_iter(&text) {
            let certificate = certificate.map_err(|error| bad(error.to_string()))?;
            roots
                .add(certificate)
                .map_err(|error| bad(error.to_string()))?;
            count += 1;
        }
        if count == 0 {
            return Err(bad("no certificate in PEM form is in it".to_owned()));
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| ImageError::Config {
            reason: format!("TLS can't be set up: {error}"),
        })?
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(tls)
}

/// Follows redirects (blobs are often kept elsewhere), but never from TLS to plain HTTP.
fn redirects(insecure: Vec<String>) -> Policy {
    Policy::custom(move |attempt| {
        if attempt.previous().len() > 10 {
            return attempt.error("more than 10 redirects");
        }
        let was_tls = attempt.previous().iter().any(|url| url.scheme() == "https");
        let host = attempt.url().host_str().unwrap_or_default();
        if was_tls
            && attempt.url().scheme() != "https"
            && !insecure.iter().any(|allowed| allowed == host)
        {
            return attempt.error("a redirect from HTTPS to HTTP");
        }
        attempt.follow()
    })
}

/// Follows redirects that stay with their host and port; any other is the answer.
fn same_origin() -> Policy {
    Policy::custom(|attempt| {
        let stays = attempt
            .previous()
            .last()
            .is_some_and(|from| from.origin() == attempt.url().origin());
        if stays && attempt.previous().len() <= 10 {
            attempt.follow()
        } else {
            attempt.stop()
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_told_apart() {
        for address in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:80",
            "127.9.9.9",
            "[::1]:5000",
            "::1",
        ] {
            assert!(is_loopback(address), "{address}");
        }
        for address in [
            "localhost.example",
            "registry.example:5000",
            "10.0.0.1",
            "[::2]:1",
            "128.0.0.1",
        ] {
            assert!(!is_loopback(address), "{address}");
        }
    }

    #[test]
    fn authorizations_are_forgotten() {
        let registry = Registry::new(RegistryConfig::default(), Duration::from_secs(1)).unwrap();
        let access = |n: usize| Access {
            host: "r.example".into(),
            repository: n.to_string(),
            secret: Secret::Anonymous,
        };
        let remember = |n: usize, seconds| {
            let authorization = Authorization {
                header: n.to_string(),
                until: Instant::now() + Duration::from_secs(seconds),
            };
            registry.remember(access(n), authorization);
        };
        remember(0, 0);
        assert_eq!(registry.authorization(&access(0)), None, "it has ended");
        for n in 0..3 * MAX_AUTHORIZATIONS {
            remember(n, 1000 + n as u64);
        }
        assert_eq!(
            registry.authorizations.lock().unwrap().len(),
            MAX_AUTHORIZATIONS
        );
        let last = 3 * MAX_AUTHORIZATIONS - 1;
        assert_eq!(
            registry.authorization(&access(last)),
            Some(last.to_string())
        );
        assert_eq!(registry.authorization(&access(0)), None);
    }

    #[test]
    fn a_file_without_certificates_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ca.pem");
        for text in [None, Some("no certificate")] {
            if let Some(text) = text {
                fs::write(&file, text).unwrap();
            }
            let config = RegistryConfig {
                ca_files: vec![file.clone()],
                ..Default::default()
            };
            let error = Registry::new(config, Duration::from_secs(1)).err().unwrap();
            assert!(error.to_string().contains("ca.pem"), "{error}");
        }
    }
}
