//! URLs, tokens, and the way from HTTP to a stream.

use crate::support::{http, request, spdy, start, start_with, ws};
use slipway_stream::{Config, StreamError};
use std::time::Duration;
use tokio_tungstenite::tungstenite::Error;

const SPDY: &str =
    "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n";

async fn status(url: &str, method: &str, headers: &str) -> u16 {
    let (head, _) = http(url, method, headers).await;
    head[9..12].parse().unwrap()
}

#[tokio::test]
async fn a_token_works_once_and_for_its_own_method() {
    let server = start().await;
    let url = server.exec(&["cat"]);
    assert!(url.starts_with(&format!("http://{}/exec/", server.server.address())));
    assert!(url.rsplit('/').next().unwrap().len() >= 22);
    assert_eq!(status(&url, "POST", SPDY).await, 101);
    assert_eq!(status(&url, "POST", SPDY).await, 404);
    let url = server.exec(&["cat"]).replace("/exec/", "/attach/");
    assert_eq!(status(&url, "POST", SPDY).await, 404);
    let url = server.exec(&["cat"]);
    assert_eq!(status(&format!("{url}x"), "POST", SPDY).await, 404);
    // Another method does not use it up; a bad upgrade does.
    assert_eq!(status(&url, "PUT", SPDY).await, 405);
    assert_eq!(status(&url, "GET", "").await, 400);
    assert_eq!(status(&url, "GET", SPDY).await, 404);
    let root = format!("http://{}", server.server.address());
    for path in ["/", "/exec", "/exec/", "/healthz", "/nonsense/x", "//"] {
        assert_eq!(status(&format!("{root}{path}"), "GET", SPDY).await, 404);
    }
}

#[tokio::test]
async fn a_token_lapses() {
    let config = Config {
        token_ttl: Duration::from_millis(100),
        max_in_flight: 2,
        ..Config::default()
    };
    let server = start_with(config).await;
    let url = server.exec(&["cat"]);
    server.exec(&["cat"]);
    let full = server.server.exec_url(request(&["cat"]));
    assert!(matches!(full, Err(StreamError::TooManyInFlight(2))));
    tokio::time::sleep(Duration::from_millis(150)).await;
    assert_eq!(status(&url, "POST", SPDY).await, 404);
    server.exec(&["cat"]);
}

#[tokio::test]
async fn bad_upgrades_are_refused_as_go_servers_do() {
    let server = start().await;
    let url = || server.exec(&["cat"]);
    let version = "X-Stream-Protocol-Version: v4.channel.k8s.io\r\n";
    assert_eq!(status(&url(), "POST", version).await, 400);
    let upgrade = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n";
    assert_eq!(status(&url(), "POST", upgrade).await, 400);
    let (head, _) = spdy::upgrade(&url(), "v9.channel.k8s.io").await;
    assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
    assert!(head.contains("\r\nX-Accepted-Stream-Protocol-Versions: v4.channel.k8s.io\r\n"));
    let (head, _) = spdy::upgrade(&url(), "v9.channel.k8s.io, v3.channel.k8s.io").await;
    assert!(head.contains("\r\nX-Stream-Protocol-Version: v3.channel.k8s.io\r\n"));
    let websocket = "Connection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let good = format!("{websocket}Sec-WebSocket-Version: 13\r\n");
    let (head, _) = http(&url(), "GET", &good).await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    // The example of RFC 6455, section 1.3.
    assert!(
        head.contains("\r\nSec-Websocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"),
        "{head}"
    );
    assert_eq!(status(&url(), "POST", &good).await, 405);
    assert_eq!(status(&url(), "GET", websocket).await, 400);
    let old = format!("{websocket}Sec-WebSocket-Version: 8\r\n");
    assert_eq!(status(&url(), "GET", &old).await, 400);
    match ws::try_connect(&url(), "v9.channel.k8s.io").await {
        Err(Error::Http(answer)) => assert_eq!(answer.status(), 403),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("there is no such protocol"),
    }
    let forward = server.server.port_forward_url("p", vec![]).unwrap();
    match ws::try_connect(&forward, "v4.channel.k8s.io").await {
        Err(Error::Http(answer)) => assert_eq!(answer.status(), 400),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("no port was named"),
    }
}

#[tokio::test]
async fn urls_can_name_a_proxy() {
    let config = Config {
        base_url: Some("https://node-1.example:10250/cri/".into()),
        ..Config::default()
    };
    let server = start_with(config).await;
    for path in ["/cri", ""] {
        let url = server.exec(&["exit", "0"]);
        let rest = url
            .strip_prefix("https://node-1.example:10250/cri/")
            .unwrap();
        let direct = format!("http://{}{path}/{rest}", server.server.address());
        assert_eq!(status(&direct, "POST", SPDY).await, 101);
    }
}

#[tokio::test]
async fn requests_that_contradict_themselves_get_no_url() {
    let server = start().await.server;
    let invalid = |mut change: Box<dyn FnMut(&mut slipway_stream::ExecRequest)>| {
        let mut request = request(&["cat"]);
        change(&mut request);
        matches!(
            server.exec_url(request),
            Err(StreamError::InvalidRequest(_))
        )
    };
    assert!(invalid(Box::new(|r| r.tty = true)));
    assert!(invalid(Box::new(|r| r.container_id.clear())));
    assert!(invalid(Box::new(|r| r.command.clear())));
    assert!(invalid(Box::new(
        |r| (r.stdin, r.stdout, r.stderr) = (false, false, false)
    )));
    assert!(!invalid(Box::new(|_| ())));
    assert!(server.port_forward_url("", vec![]).is_err());
    assert!(server.port_forward_url("p", vec![0]).is_err());
    assert!(server.port_forward_url("p", vec![1; 128]).is_err());
}
