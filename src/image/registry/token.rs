//! Answers to a registry's challenge: basic credentials, or a bearer token from its token server
//! (Docker's "Token Authentication Specification" and its OAuth2 form).

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE};
use reqwest::{StatusCode, Url};
use serde::Deserialize;

use crate::credentials::Secret;
use crate::error::ImageError;
use crate::registry::challenge::Challenge;
use crate::registry::{Authorization, Repository, unreachable};

/// A larger answer of a token server is refused.
const MAX_TOKEN: u64 = 1 << 20;
/// The specification's validity when the server doesn't say.
const DEFAULT_VALIDITY: Duration = Duration::from_secs(60);
/// Tokens are renewed this much before their end.
const LEEWAY: Duration = Duration::from_secs(10);
/// No token and no password is kept longer.
const MAX_VALIDITY: Duration = Duration::from_secs(3600);

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

/// The authorization that one of the challenges asks for; `None` when there's nothing to answer with.
pub(super) async fn answer(
    repository: &Repository,
    challenges: &[Challenge],
    what: &str,
) -> Result<Option<Authorization>, ImageError> {
    // A bearer token that came with the pull was sent already.
    if matches!(repository.secret, Secret::Bearer { .. }) {
        return Ok(None);
    }
    if let Some(challenge) = challenges
        .iter()
        .find(|challenge| challenge.scheme == "bearer")
    {
        return fetch(repository, challenge, what).await.map(Some);
    }
    let basic = challenges
        .iter()
        .any(|challenge| challenge.scheme == "basic");
    match &repository.secret {
        Secret::Basic { username, password } if basic => Ok(Some(Authorization {
            header: basic_header(username, password),
            until: Instant::now() + MAX_VALIDITY,
        })),
        _ => Ok(None),
    }
}

fn basic_header(username: &str, password: &str) -> String {
    format!(
        "Basic {}",
        STANDARD.encode(format!("{username}:{password}"))
    )
}

/// Asks the token server that the challenge names.
async fn fetch(
    repository: &Repository,
    challenge: &Challenge,
    what: &str,
) -> Result<Authorization, ImageError> {
    let realm = challenge
        .parameters
        .get("realm")
        .map(String::as_str)
        .unwrap_or_default();
    let mut url = Url::parse(realm)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
        .ok_or_else(|| {
            repository.bad(
                what,
                format!("its challenge names no token server, but {realm:?}"),
            )
        })?;
    if repository.base.scheme() == "https" && url.scheme() == "http" {
        return Err(repository.bad(
            what,
            "its token server is not reached over HTTPS; credentials are not sent there",
        ));
    }
    let scope = match challenge.parameters.get("scope") {
        Some(scope) => scope.clone(),
        None => format!("repository:{}:pull", repository.path),
    };
    let mut parameters = vec![("scope", scope.as_str())];
    if let Some(service) = challenge.parameters.get("service") {
        parameters.push(("service", service));
    }
    let host = url.host_str().unwrap_or_default();
    let client = match &repository.secret {
        // A redirected POST would carry the refresh token to whatever host the answer names.
        Secret::Identity { .. } => repository.registry.faithful_client(host),
        _ => repository.registry.client(host),
    };
    let timeout = repository.registry.config.request_timeout;
    let what_token = format!("a token for {what}");
    let request = match &repository.secret {
        Secret::Identity { token } => {
            parameters.extend([
                ("grant_type", "refresh_token"),
                ("client_id", "slipway"),
                ("refresh_token", token),
            ]);
            client
                .post(url)
                .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(encode(&parameters))
        }
        secret => {
            url.query_pairs_mut().extend_pairs(&parameters);
            match secret {
                Secret::Basic { username, password } => client
                    .get(url)
                    .header(AUTHORIZATION, basic_header(username, password)),
                _ => client.get(url),
            }
        }
    };
    let response = request
        .timeout(timeout)
        .send()
        .await
        .map_err(|error| unreachable(&repository.host, &what_token, error))?;
    match response.status() {
        StatusCode::OK => {}
        // 400 is OAuth2's answer to a refresh token that is no longer good (RFC 6749, section 5.2).
        StatusCode::UNAUTHORIZED | StatusCode::BAD_REQUEST => {
            return Err(repository.refused(what, response).await);
        }
        StatusCode::FORBIDDEN => {
            return Err(ImageError::Denied {
                host: repository.host.clone(),
                what: what.to_owned(),
                reason: repository.reason(response).await,
            });
        }
        status => {
            return Err(repository.bad(&what_token, format!("status {status} of its token server")));
        }
    }
    let (_, bytes) = repository.body(&what_token, response, MAX_TOKEN).await?;
    let parsed: TokenAnswer = serde_json::from_slice(&bytes)
        // The error's text could quote the token.
        .map_err(|_| {
            repository.bad(
                &what_token,
                "its token server's answer is not a token document",
            )
        })?;
    let token = parsed
        .token
        .filter(|token| !token.is_empty())
        .or(parsed.access_token)
        .filter(|token| !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic()))
        .ok_or_else(|| {
            repository.bad(
                &what_token,
                "its token server's answer holds no usable token",
            )
        })?;
    let validity = parsed
        .expires_in
        .map_or(DEFAULT_VALIDITY, Duration::from_secs)
        .min(MAX_VALIDITY)
        .saturating_sub(LEEWAY);
    Ok(Authorization {
        header: format!("Bearer {token}"),
        until: Instant::now() + validity,
    })
}

/// Form encoding, which is also that of a URL's query.
fn encode(parameters: &[(&str, &str)]) -> String {
    let Ok(mut url) = Url::parse("http://localhost/") else {
        return String::new();
    };
    url.query_pairs_mut().extend_pairs(parameters);
    url.query().unwrap_or_default().to_owned()
}
