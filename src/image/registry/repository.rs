//! Requests to one repository: documents that are verified as a whole, and the beginning of blobs
//! that are verified while they arrive.

use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Response, StatusCode, Url};

use crate::credentials::Secret;
use crate::digest::Digest;
use crate::error::ImageError;
use crate::manifest;
use crate::registry::{Access, Registry, challenge, header, is_passing, token, unreachable};

/// Attempts for a small document when the registry answers with a passing failure.
const ATTEMPTS: u32 = 3;
/// How much of an error's body is read.
const MAX_ERROR_BODY: u64 = 64 << 10;

/// One repository at one endpoint: the registry itself or a mirror of it.
pub(crate) struct Repository {
    pub(super) registry: Arc<Registry>,
    /// The endpoint's host, as a person knows it.
    pub(crate) host: String,
    pub(super) base: Url,
    pub(super) path: String,
    /// The registry whose mirror this is.
    pub(super) mirror_of: Option<String>,
    pub(super) secret: Secret,
}

/// A document and what was said about it.
pub(crate) struct Fetched {
    pub(crate) bytes: Vec<u8>,
    pub(crate) digest: Digest,
    pub(crate) content_type: Option<String>,
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

    /// How long a transfer may take to make progress.
    pub(crate) fn progress_timeout(&self) -> Duration {
        self.registry.progress
    }

    /// Fetches a manifest or index by tag or digest, and verifies its digest and size, where they are
    /// known.
    pub(crate) async fn manifest(
        &self,
        version: &str,
        expected: Option<&Digest>,
        size: Option<u64>,
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
        if let Some(size) = size
            && size != bytes.len() as u64
        {
            let what = format!("the manifest of {what}");
            return Err(size_mismatch(&what, size, bytes.len() as u64));
        }
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

    pub(super) async fn body(
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
            let mut value =
                HeaderValue::from_str(authorization).map_err(|_| ImageError::BadCredentials {
                    host: self.host.clone(),
                    reason: "they hold characters that can't be sent in a header".to_owned(),
                })?;
            // Keeps it out of any library's logs.
            value.set_sensitive(true);
            builder = builder.header(AUTHORIZATION, value);
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

    pub(super) async fn refused(&self, what: &str, response: Response) -> ImageError {
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
    pub(super) async fn reason(&self, response: Response) -> String {
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
        // A transfer's request has no deadline as a whole, but what is wrong must not take long to say.
        let body = self.body("an error", response, MAX_ERROR_BODY);
        let limit = self.registry.config.request_timeout;
        let Ok(Ok((_, bytes))) = tokio::time::timeout(limit, body).await else {
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

    pub(super) fn bad(&self, what: &str, reason: impl Into<String>) -> ImageError {
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

fn size_mismatch(what: &str, expected: u64, actual: u64) -> ImageError {
    ImageError::SizeMismatch {
        what: what.to_owned(),
        expected,
        actual,
    }
}
