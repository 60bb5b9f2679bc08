//! A client for registries (OCI distribution specification 1.1, and Docker's registry API v2 that it
//! comes from): manifests and blobs, with authentication, bounds and verification.

use std::collections::HashMap;
use std::fs;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, RANGE};
use reqwest::{Client, Response, StatusCode, Url};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use crate::config::RegistryConfig;
use crate::credentials::Secret;
use crate::digest::Digest;
use crate::error::ImageError;
use crate::manifest;
use crate::reference::ImageName;

mod challenge;
mod token;

/// Attempts for a small document when the registry answers with a passing failure.
const ATTEMPTS: u32 = 3;
/// How much of an error's body is read.
const MAX_ERROR_BODY: u64 = 64 << 10;
/// How long it may take to find out whether a host speaks TLS.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

/// The client for all registries.
pub(crate) struct Registry {
    config: RegistryConfig,
    /// Through the environment's proxies.
    client: Client,
    /// For loopback addresses, which no proxy can reach for us.
    direct: Client,
    /// `Authorization` headers that worked, with their end.
    authorizations: Mutex<HashMap<Access, Authorization>>,
    /// Whether a host that may speak plain HTTP does.
    plain: Mutex<HashMap<String, bool>>,
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
    until: Option<Instant>,
}

/// One repository at one endpoint: the registry itself or a mirror of it.
pub(crate) struct Repository {
    registry: Arc<Registry>,
    /// The endpoint's host, as a person knows it.
    pub(crate) host: String,
    base: Url,
    path: String,
    /// The registry whose mirror this is.
    mirror_of: Option<String>,
    secret: Secret,
}

/// A document and what was said about it.
pub(crate) struct Fetched {
    pub(crate) bytes: Vec<u8>,
    pub(crate) digest: Digest,
    pub(crate) content_type: Option<String>,
}

impl Registry {
    /// Makes the client; reads certificate authorities.
    pub(crate) fn new(config: RegistryConfig, progress: Duration) -> Result<Self, ImageError> {
        let tls = tls(&config)?;
        let client = |proxies: bool| -> Result<Client, ImageError> {
            let builder = Client::builder()
                .tls_backend_preconfigured(tls.clone())
                .user_agent(concat!("slipway/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(config.connect_timeout)
                .read_timeout(progress)
                .redirect(redirects(config.insecure.clone()));
            let builder = if proxies { builder } else { builder.no_proxy() };
            builder.build().map_err(|error| ImageError::Config {
                reason: format!("the HTTP client can't be set up: {}", chain(&error)),
            })
        };
        Ok(Self {
            client: client(true)?,
            direct: client(false)?,
            config,
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
        if is_loopback(host) {
            &self.direct
        } else {
            &self.client
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
        match found.until {
            Some(until) if until <= Instant::now() => None,
            _ => Some(found.header.clone()),
        }
    }

    fn remember(&self, access: Access, authorization: Authorization) {
        let mut map = self
            .authorizations
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        map.retain(|_, known| known.until.is_none_or(|until| until > now));
        map.insert(access, authorization);
    }
}

/// What a request is for.
struct Request<'a> {
    /// In messages.
    what: &'a str,
    /// Below the repository: `manifests/latest`.
    path: String,
    accept: Option<&'static str>,
    /// Start of the wanted range.
    from: u64,
    /// For everything including the body.
    timeout: Option<Duration>,
}

impl Repository {
    /// How often in a row a transfer is resumed without progress.
    pub(crate) fn retries(&self) -> u32 {
        self.registry.retries()
    }

    /// Fetches a manifest or index by tag or digest, and verifies its digest.
    pub(crate) async fn manifest(
        &self,
        version: &str,
        expected: Option<&Digest>,
        what: &str,
    ) -> Result<Fetched, ImageError> {
        let request = Request {
            what,
            path: format!("manifests/{version}"),
            accept: Some(manifest::ACCEPT),
            from: 0,
            timeout: Some(self.registry.config.request_timeout),
        };
        let (headers, bytes) = self.document(&request, manifest::MAX_MANIFEST).await?;
        let content_type = header(&headers, CONTENT_TYPE.as_str());
        self.refuse_html(what, content_type.as_deref(), &bytes)?;
        let announced =
            header(&headers, "docker-content-digest").and_then(|text| Digest::parse(&text).ok());
        let digest = expected
            .cloned()
            .or(announced)
            .unwrap_or_else(|| Digest::of(&bytes));
        digest
            .check(&bytes)
            .map_err(|actual| ImageError::DigestMismatch {
                what: format!("the manifest of {what}"),
                expected: digest.to_string(),
                actual: actual.to_string(),
            })?;
        Ok(Fetched {
            bytes,
            digest,
            content_type,
        })
    }

    /// Fetches a small blob as a whole and verifies it.
    pub(crate) async fn small_blob(
        &self,
        digest: &Digest,
        size: u64,
        limit: u64,
        what: &str,
    ) -> Result<Vec<u8>, ImageError> {
        if size > limit {
            return Err(ImageError::TooLarge {
                what: what.to_owned(),
                limit,
            });
        }
        let request = Request {
            what,
            path: format!("blobs/{digest}"),
            accept: None,
            from: 0,
            timeout: Some(self.registry.config.request_timeout),
        };
        // One byte more than announced is enough to tell that it is too long.
        let (headers, bytes) =
            self.document(&request, size + 1)
                .await
                .map_err(|error| match error {
                    ImageError::TooLarge { .. } => size_mismatch(what, size, size + 1),
                    other => other,
                })?;
        if digest.check(&bytes).is_err() {
            self.refuse_html(
                what,
                header(&headers, CONTENT_TYPE.as_str()).as_deref(),
                &bytes,
            )?;
        }
        if bytes.len() as u64 != size {
            return Err(size_mismatch(what, size, bytes.len() as u64));
        }
        digest
            .check(&bytes)
            .map_err(|actual| ImageError::DigestMismatch {
                what: what.to_owned(),
                expected: digest.to_string(),
                actual: actual.to_string(),
            })?;
        Ok(bytes)
    }

    /// Begins to fetch a blob from byte `from` on.
    pub(crate) async fn blob(&self, digest: &Digest, from: u64) -> Result<Response, ImageError> {
        let what = format!("layer {digest}");
        self.send(&Request {
            what: &what,
            path: format!("blobs/{digest}"),
            accept: None,
            from,
            timeout: None,
        })
        .await
    }

    fn refuse_html(
        &self,
        what: &str,
        content_type: Option<&str>,
        bytes: &[u8],
    ) -> Result<(), ImageError> {
        let start = bytes.trim_ascii_start();
        if content_type.is_some_and(|text| text.starts_with("text/html")) || start.starts_with(b"<")
        {
            return Err(self.bad(what, "it is a web page instead of a registry's document; is there a proxy or a login page in between?"));
        }
        Ok(())
    }

    /// Fetches a body of at most `limit` bytes; passing failures are tried again.
    async fn document(
        &self,
        request: &Request<'_>,
        limit: u64,
    ) -> Result<(HeaderMap, Vec<u8>), ImageError> {
        let mut attempt = 1;
        loop {
            let result = match self.send(request).await {
                Ok(response) => self.body(request.what, response, limit).await,
                Err(error) => Err(error),
            };
            match result {
                Err(error) if attempt < ATTEMPTS && is_passing(&error) => {
                    tracing::debug!(
                        host = self.host,
                        error = error.chain(),
                        attempt,
                        "trying again"
                    );
                    tokio::time::sleep(Duration::from_millis(200) * attempt).await;
                    attempt += 1;
                }
                result => return result,
            }
        }
    }

    async fn body(
        &self,
        what: &str,
        mut response: Response,
        limit: u64,
    ) -> Result<(HeaderMap, Vec<u8>), ImageError> {
        let headers = response.headers().clone();
        let mut bytes = Vec::new();
        while let Some(chunk) = response
            .chunk()
            .await
            .map_err(|error| unreachable(&self.host, what, error))?
        {
            if (bytes.len() + chunk.len()) as u64 > limit {
                return Err(ImageError::TooLarge {
                    what: format!("{what} from {}", self.host),
                    limit,
                });
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok((headers, bytes))
    }

    /// Sends a request with what authorization there is, and once more after a challenge.
    async fn send(&self, request: &Request<'_>) -> Result<Response, ImageError> {
        let access = Access {
            host: self.host.clone(),
            repository: self.path.clone(),
            secret: self.secret.clone(),
        };
        let mut authorization = self.registry.authorization(&access);
        if authorization.is_none()
            && let Secret::Bearer { token } = &self.secret
        {
            authorization = Some(format!("Bearer {token}"));
        }
        let mut challenged = false;
        loop {
            let response = self.send_once(request, authorization.as_deref()).await?;
            if response.status() != StatusCode::UNAUTHORIZED {
                return self.check(request, response).await;
            }
            if challenged {
                return Err(self.refused(request.what, response).await);
            }
            challenged = true;
            let challenges = challenge::parse(response.headers());
            let fresh = token::answer(self, &challenges, request.what).await?;
            match fresh {
                Some(fresh) => {
                    authorization = Some(fresh.header.clone());
                    self.registry.remember(access.clone(), fresh);
                }
                None => return Err(self.refused(request.what, response).await),
            }
        }
    }

    async fn send_once(
        &self,
        request: &Request<'_>,
        authorization: Option<&str>,
    ) -> Result<Response, ImageError> {
        let mut url = self.base.clone();
        url.set_path(&format!("/v2/{}/{}", self.path, request.path));
        if let Some(registry) = &self.mirror_of {
            url.query_pairs_mut().append_pair("ns", registry);
        }
        let client = self
            .registry
            .client(self.base.host_str().unwrap_or_default());
        let mut builder = client.get(url);
        if let Some(accept) = request.accept {
            builder = builder.header(ACCEPT, accept);
        }
        if request.from > 0 {
            builder = builder.header(RANGE, format!("bytes={}-", request.from));
        }
        if let Some(timeout) = request.timeout {
            builder = builder.timeout(timeout);
        }
        if let Some(authorization) = authorization {
            builder = builder.header(AUTHORIZATION, authorization);
        }
        builder
            .send()
            .await
            .map_err(|error| unreachable(&self.host, request.what, error))
    }

    async fn check(
        &self,
        request: &Request<'_>,
        response: Response,
    ) -> Result<Response, ImageError> {
        let status = response.status();
        match status {
            StatusCode::OK => Ok(response),
            StatusCode::PARTIAL_CONTENT if request.from > 0 => Ok(response),
            StatusCode::NOT_FOUND => Err(ImageError::Absent {
                host: self.host.clone(),
                what: request.what.to_owned(),
            }),
            StatusCode::FORBIDDEN => Err(ImageError::Denied {
                host: self.host.clone(),
                what: request.what.to_owned(),
                reason: self.reason(response).await,
            }),
            StatusCode::TOO_MANY_REQUESTS => {
                let wait = header(response.headers(), "retry-after")
                    .unwrap_or_else(|| "a while".to_owned());
                Err(self.bad(request.what, format!("too many requests; try again after {wait} (seconds or date), or use an account with a higher limit")))
            }
            _ => {
                let reason = self.reason(response).await;
                Err(ImageError::BadResponse {
                    host: self.host.clone(),
                    what: request.what.to_owned(),
                    reason: format!("status {status}: {reason}"),
                    status: Some(status.as_u16()),
                })
            }
        }
    }

    async fn refused(&self, what: &str, response: Response) -> ImageError {
        let anonymous = self.secret == Secret::Anonymous;
        let reason = self.reason(response).await;
        ImageError::Unauthorized {
            host: self.host.clone(),
            what: what.to_owned(),
            reason: if anonymous {
                format!("{reason} (no credentials were given)")
            } else {
                reason
            },
        }
    }

    /// The registry's words on an error (distribution specification, "Error Codes").
    async fn reason(&self, response: Response) -> String {
        #[derive(serde::Deserialize)]
        struct Errors {
            errors: Vec<One>,
        }
        #[derive(serde::Deserialize)]
        struct One {
            #[serde(default)]
            code: String,
            message: Option<String>,
        }
        let status = response.status();
        let Ok((_, bytes)) = self.body("an error", response, MAX_ERROR_BODY).await else {
            return format!("status {status}");
        };
        match serde_json::from_slice::<Errors>(&bytes) {
            Ok(Errors { errors }) if !errors.is_empty() => {
                let words: Vec<String> = errors
                    .into_iter()
                    .map(
                        |error| match error.message.filter(|message| !message.is_empty()) {
                            Some(message) => format!("{}: {message}", error.code),
                            None => error.code,
                        },
                    )
                    .collect();
                printable(&words.join("; "))
            }
            _ => format!("status {status}"),
        }
    }

    fn bad(&self, what: &str, reason: impl Into<String>) -> ImageError {
        ImageError::BadResponse {
            host: self.host.clone(),
            what: what.to_owned(),
            reason: reason.into(),
            status: None,
        }
    }
}

/// Foreign text for a message: one line, not long.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(300)
        .collect()
}

pub(crate) fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

fn size_mismatch(what: &str, expected: u64, actual: u64) -> ImageError {
    ImageError::SizeMismatch {
        what: what.to_owned(),
        expected,
        actual,
    }
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
fn redirects(insecure: Vec<String>) -> reqwest::redirect::Policy {
    reqwest::redirect::Policy::custom(move |attempt| {
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
