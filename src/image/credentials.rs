//! Credentials for a registry, in the four forms of the CRI's `AuthConfig`.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};

use crate::error::ImageError;

/// Credentials for a registry. Empty strings mean "not given"; the first form that is given counts,
/// in the order identity token, registry token, user name and password, `auth`.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Credentials {
    /// User name; goes with `password`.
    pub username: String,
    /// Password of `username`.
    pub password: String,
    /// Base64 of `username:password`.
    pub auth: String,
    /// An OAuth2 refresh token, exchanged for a bearer token at the registry's token server.
    pub identity_token: String,
    /// A bearer token, sent to the registry as it is.
    pub registry_token: String,
    /// The registry that these are for; when given, no other one sees them.
    pub server_address: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hide = |secret: &str| if secret.is_empty() { "" } else { "[redacted]" };
        f.debug_struct("Credentials")
            .field("username", &hide(&self.username))
            .field("password", &hide(&self.password))
            .field("auth", &hide(&self.auth))
            .field("identity_token", &hide(&self.identity_token))
            .field("registry_token", &hide(&self.registry_token))
            .field("server_address", &self.server_address)
            .finish()
    }
}

/// Credentials in the one form that will be used.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(crate) enum Secret {
    #[default]
    Anonymous,
    Basic {
        username: String,
        password: String,
    },
    Identity {
        token: String,
    },
    Bearer {
        token: String,
    },
}

impl Credentials {
    /// Picks the form to use for `host`, or anonymity when these are another registry's.
    pub(crate) fn for_host(&self, host: &str) -> Result<Secret, ImageError> {
        if !self.server_address.is_empty() && hub(server_host(&self.server_address)) != hub(host) {
            return Ok(Secret::Anonymous);
        }
        if !self.identity_token.is_empty() {
            return Ok(Secret::Identity {
                token: self.identity_token.clone(),
            });
        }
        if !self.registry_token.is_empty() {
            return Ok(Secret::Bearer {
                token: self.registry_token.clone(),
            });
        }
        if !self.username.is_empty() {
            return Ok(Secret::Basic {
                username: self.username.clone(),
                password: self.password.clone(),
            });
        }
        if self.auth.is_empty() {
            return Ok(Secret::Anonymous);
        }
        let bad = |reason: &str| ImageError::BadCredentials {
            host: host.to_owned(),
            reason: reason.to_owned(),
        };
        let text = self.auth.trim();
        let decoded = STANDARD
            .decode(text)
            .or_else(|_| STANDARD_NO_PAD.decode(text))
            .map_err(|_| bad("the `auth` field is not base64"))?;
        let decoded = String::from_utf8(decoded)
            .map_err(|_| bad("the `auth` field does not decode to text"))?;
        let (username, password) = decoded
            .split_once(':')
            .ok_or_else(|| bad("the `auth` field does not decode to `user:password`"))?;
        Ok(Secret::Basic {
            username: username.to_owned(),
            // Docker pads the decoded text with NUL.
            password: password.trim_end_matches('\0').to_owned(),
        })
    }
}

/// The host of a server address, which may be a URL (`https://index.docker.io/v1/`).
fn server_host(address: &str) -> &str {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    rest.split('/').next().unwrap_or(rest)
}

/// The Docker Hub has several names.
fn hub(host: &str) -> &str {
    match host {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_no_secret() {
        let credentials = Credentials {
            username: "u-secret".into(),
            password: "p-secret".into(),
            auth: "a-secret".into(),
            identity_token: "i-secret".into(),
            registry_token: "r-secret".into(),
            server_address: "registry.example".into(),
        };
        let text = format!("{credentials:?}");
        assert!(!text.contains("secret"), "{text}");
        assert!(text.contains("registry.example"));
    }

    #[test]
    fn auth_field_is_decoded() {
        let decode = |auth: &str| {
            Credentials {
                auth: auth.into(),
                ..Default::default()
            }
            .for_host("h")
        };
        match decode("dXNlcjpwYTpzcw==") {
            Ok(Secret::Basic { username, password }) => {
                assert_eq!((username.as_str(), password.as_str()), ("user", "pa:ss"));
            }
            _ => panic!("not basic"),
        }
        for wrong in ["***", "dXNlcg==", "gIA="] {
            let error = decode(wrong).err().map(|e| e.kind());
            assert_eq!(error, Some(crate::ErrorKind::InvalidArgument), "{wrong}");
        }
    }

    #[test]
    fn server_address_limits_who_sees_them() {
        let credentials = Credentials {
            username: "u".into(),
            server_address: "https://index.docker.io/v1/".into(),
            ..Default::default()
        };
        assert!(credentials.for_host("docker.io").unwrap() != Secret::Anonymous);
        assert!(credentials.for_host("evil.example").unwrap() == Secret::Anonymous);
    }
}
