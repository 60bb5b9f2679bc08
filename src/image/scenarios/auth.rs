//! Authentication: anonymous, basic, bearer tokens, identity tokens; and that no secret leaks.

use super::*;
use crate::Credentials;
use crate::testing::registry::Request;

/// A registry that wants `Authorization: <wanted>`, and challenges with `challenge`.
fn guard(
    registry: &FakeRegistry,
    wanted: &'static str,
    challenge: String,
    token: impl Fn(&Request) -> Reply + Send + Sync + 'static,
) {
    registry.bend(move |request| {
        if request.path.starts_with("/token") {
            return Some(token(request));
        }
        if request.path == "/v2/"
            || request.headers.get("authorization").map(String::as_str) == Some(wanted)
        {
            return None;
        }
        let body = r#"{"errors":[{"code":"UNAUTHORIZED","message":"who are you"}]}"#;
        Some(Reply::new(401, body).header("www-authenticate", &challenge))
    });
}

fn bearer(registry: &FakeRegistry) -> String {
    format!(
        r#"Bearer realm="http://{}/token",service="the registry",scope="repository:a:pull""#,
        registry.address
    )
}

fn basic(username: &str, password: &str) -> Credentials {
    Credentials {
        username: username.into(),
        password: password.into(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn basic_credentials() {
    let registry = FakeRegistry::start().await;
    let name = registry.add("a", "t", &TestImage::small("basic"));
    guard(&registry, "Basic dTpw", r#"Basic realm="x""#.into(), |_| {
        Reply::new(404, "")
    });
    let fixture = Fixture::new();
    let store = &fixture.store;
    let error = fixture.pull(&name).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthenticated);
    assert!(error.to_string().contains("who are you"), "{error}");
    assert!(error.to_string().contains("no credentials"), "{error}");
    let error = store
        .pull(&name, Some(basic("u", "wrong-secret")), None)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthenticated);
    assert!(!error.chain().contains("wrong-secret"));
    fixture.assert_clean().await;
    store
        .pull(&name, Some(basic("u", "p")), None)
        .await
        .unwrap();
    // Remembered: one refusal, then every request is authorized.
    let refused = registry
        .requests()
        .iter()
        .rev()
        .filter(|r| !r.headers.contains_key("authorization"))
        .count();
    assert!(refused <= 3, "{refused}");
    let auth = Credentials {
        auth: "dTpw".into(),
        ..Default::default()
    };
    store.pull(&name, Some(auth), None).await.unwrap();
    // For another registry only.
    let other = Credentials {
        server_address: "other.example".into(),
        ..basic("u", "p")
    };
    let error = store.pull(&name, Some(other), None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthenticated);
}

#[tokio::test(flavor = "multi_thread")]
async fn bearer_tokens() {
    let registry = FakeRegistry::start().await;
    let name = registry.add("a", "t", &TestImage::small("bearer"));
    let fixture = Fixture::new();
    // Anonymous.
    guard(&registry, "Bearer tok", bearer(&registry), |request| {
        assert_eq!(request.method, "GET");
        assert!(
            request.path.contains("service=the+registry"),
            "{}",
            request.path
        );
        assert!(
            request.path.contains("scope=repository%3Aa%3Apull"),
            "{}",
            request.path
        );
        match request.headers.get("authorization").map(String::as_str) {
            None => Reply::new(200, r#"{"token":"tok","expires_in":300}"#),
            Some("Basic dTpw") => Reply::new(200, r#"{"access_token":"tok"}"#),
            Some(_) => Reply::new(401, ""),
        }
    });
    fixture.pull(&name).await.unwrap();
    assert_eq!(registry.count("/token"), 1, "one token for all requests");
    fixture
        .store
        .pull(&name, Some(basic("u", "p")), None)
        .await
        .unwrap();
    assert_eq!(registry.count("/token"), 2);
    let error = fixture
        .store
        .pull(&name, Some(basic("u", "no")), None)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthenticated);
    // As it is.
    let token = Credentials {
        registry_token: "tok".into(),
        ..Default::default()
    };
    fixture.store.pull(&name, Some(token), None).await.unwrap();
    let token = Credentials {
        registry_token: "other".into(),
        ..Default::default()
    };
    let error = fixture
        .store
        .pull(&name, Some(token), None)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthenticated);
    assert_eq!(registry.count("/token"), 3);
    let token = Credentials {
        registry_token: "a\r\nHost: evil".into(),
        ..Default::default()
    };
    let error = fixture
        .store
        .pull(&name, Some(token), None)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn identity_tokens() {
    let registry = FakeRegistry::start().await;
    let name = registry.add("a", "t", &TestImage::small("identity"));
    let fixture = Fixture::new();
    guard(&registry, "Bearer tok", bearer(&registry), |request| {
        assert_eq!(request.method, "POST");
        assert!(
            request.body.contains("grant_type=refresh_token"),
            "{}",
            request.body
        );
        assert!(
            request.body.contains("scope=repository%3Aa%3Apull"),
            "{}",
            request.body
        );
        if request.body.contains("refresh_token=re%2Ffresh") {
            Reply::new(200, r#"{"access_token":"tok"}"#)
        } else {
            Reply::new(400, r#"{"error":"invalid_grant"}"#)
        }
    });
    let identity = |token: &str| {
        Some(Credentials {
            identity_token: token.into(),
            ..Default::default()
        })
    };
    fixture
        .store
        .pull(&name, identity("re/fresh"), None)
        .await
        .unwrap();
    let error = fixture
        .store
        .pull(&name, identity("stale-secret"), None)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthenticated);
    assert!(!error.chain().contains("stale-secret"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_identity_token_is_not_carried_elsewhere() {
    let (registry, thief) = (FakeRegistry::start().await, FakeRegistry::start().await);
    let name = registry.add("a", "t", &TestImage::small("redirected"));
    thief.bend(|_| Some(Reply::new(200, r#"{"access_token":"tok"}"#)));
    for status in [301, 302, 307, 308] {
        let elsewhere = format!("http://{}/token", thief.address);
        guard(&registry, "Bearer tok", bearer(&registry), move |_| {
            Reply::new(status, "").header("location", &elsewhere)
        });
        let credentials = Credentials {
            identity_token: "refresh".into(),
            ..Default::default()
        };
        let fixture = Fixture::new();
        let error = fixture
            .store
            .pull(&name, Some(credentials), None)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", error.chain());
        assert!(
            error.chain().contains(&status.to_string()),
            "{}",
            error.chain()
        );
    }
    assert!(thief.requests().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn token_servers_that_lie() {
    let registry = FakeRegistry::start().await;
    let name = registry.add("a", "t", &TestImage::small("liar"));
    let fixture = Fixture::new();
    for (reply, kind) in [
        (Reply::new(200, "<html>"), ErrorKind::Unavailable),
        (Reply::new(200, "{}"), ErrorKind::Unavailable),
        (
            Reply::new(200, r#"{"token":"a\r\nb"}"#),
            ErrorKind::Unavailable,
        ),
        (
            Reply::new(200, r#"{"token":"useless"}"#),
            ErrorKind::Unauthenticated,
        ),
        (Reply::new(403, ""), ErrorKind::PermissionDenied),
        (Reply::new(500, ""), ErrorKind::Unavailable),
        (
            Reply {
                endless: true,
                ..Reply::new(200, "x".repeat(9999))
            },
            ErrorKind::ResourceExhausted,
        ),
    ] {
        let body = String::from_utf8_lossy(&reply.body[..reply.body.len().min(30)]).into_owned();
        guard(&registry, "Bearer tok", bearer(&registry), move |_| {
            reply.clone()
        });
        let error = fixture.pull(&name).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{body}: {}", error.chain());
    }
    for challenge in [
        "Bearer",
        r#"Bearer realm="file:///etc/passwd""#,
        r#"Bearer realm="http://""#,
        "Digest x=y",
        "",
    ] {
        guard(&registry, "Bearer tok", challenge.into(), |_| {
            Reply::new(200, "")
        });
        let error = fixture.pull(&name).await.unwrap_err();
        assert!(
            matches!(
                error.kind(),
                ErrorKind::Unavailable | ErrorKind::Unauthenticated
            ),
            "{challenge}: {error}"
        );
    }
    fixture.assert_clean().await;
}
