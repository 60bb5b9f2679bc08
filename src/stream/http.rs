//! What clients ask for over HTTP, and the answers that turn a connection into a stream.

use crate::protocol::{ACCEPTED_HEADER, VERSION_HEADER, negotiate};
use http::header::{
    ALLOW, CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_VERSION, UPGRADE,
};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

/// An answer. None has more than a line to say.
pub(crate) type Answer = Response<String>;

/// An answer that is an error.
pub(crate) fn refuse(status: StatusCode, text: &str) -> Answer {
    let mut answer = Response::new(format!("{text}\n"));
    *answer.status_mut() = status;
    answer.headers_mut().insert(
        "content-type",
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    answer
}

/// What a Go server says of a path that it doesn't know.
pub(crate) fn not_found() -> Answer {
    refuse(StatusCode::NOT_FOUND, "404 page not found")
}

pub(crate) fn method_not_allowed() -> Answer {
    let mut answer = refuse(StatusCode::METHOD_NOT_ALLOWED, "405: Method Not Allowed");
    answer
        .headers_mut()
        .insert(ALLOW, HeaderValue::from_static("GET, POST"));
    answer
}

/// Whether a client wants to speak WebSocket.
pub(crate) fn is_websocket(headers: &HeaderMap) -> bool {
    let upgrade = headers.get(UPGRADE).and_then(|value| value.to_str().ok());
    upgrade.is_some_and(|value| value.eq_ignore_ascii_case("websocket"))
        && contains(headers, CONNECTION.as_str(), "upgrade")
}

/// Whether a header's values contain a word, whatever its case.
fn contains(headers: &HeaderMap, name: &str, word: &str) -> bool {
    let mut values = headers.get_all(name).iter();
    values.any(|value| {
        let value = value.to_str().unwrap_or_default();
        value.to_ascii_lowercase().contains(word)
    })
}

/// The items of a header that may come several times, each with several items.
fn items(headers: &HeaderMap, name: &str) -> Vec<String> {
    let values = headers.get_all(name).iter();
    values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|item| item.trim().to_owned())
        .filter(|item| !item.is_empty())
        .collect()
}

fn switch(upgrade: &'static str) -> Answer {
    let mut answer = Response::new(String::new());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(upgrade));
    answer
}

/// Agrees to speak SPDY, if the client does it as it should and there is a common protocol.
pub(crate) fn accept_spdy<T: Copy>(
    headers: &HeaderMap,
    known: &[(&'static str, T)],
) -> Result<(T, Answer), Box<Answer>> {
    let bad = |text: &str| {
        Box::new(refuse(
            StatusCode::BAD_REQUEST,
            &format!("unable to upgrade: {text}"),
        ))
    };
    if !headers.contains_key(VERSION_HEADER) {
        return Err(bad(
            "header X-Stream-Protocol-Version does not exist in request",
        ));
    }
    let client = items(headers, VERSION_HEADER);
    if client.is_empty() {
        return Err(bad("header X-Stream-Protocol-Version names no protocol"));
    }
    let Some((name, protocol)) = negotiate(&client, known) else {
        let names: Vec<_> = known.iter().map(|(name, _)| *name).collect();
        let text = format!(
            "unable to upgrade: unable to negotiate protocol: client supports {client:?}, server accepts {names:?}"
        );
        let mut answer = refuse(StatusCode::FORBIDDEN, &text);
        for name in names {
            let value = HeaderValue::from_static(name);
            answer.headers_mut().append(ACCEPTED_HEADER, value);
        }
        return Err(Box::new(answer));
    };
    if !contains(headers, CONNECTION.as_str(), "upgrade")
        || !contains(headers, UPGRADE.as_str(), "spdy/3.1")
    {
        return Err(bad("missing upgrade headers in request"));
    }
    let mut answer = switch("SPDY/3.1");
    let value = HeaderValue::from_static(name);
    answer.headers_mut().insert(VERSION_HEADER, value);
    Ok((protocol, answer))
}

/// Agrees to speak WebSocket (RFC 6455, section 4.2), if the client does it as it should and there
/// is a common protocol.
pub(crate) fn accept_ws<T: Copy>(
    method: &Method,
    headers: &HeaderMap,
    known: &[(&'static str, T)],
) -> Result<(T, Answer), Box<Answer>> {
    if method != Method::GET {
        return Err(Box::new(method_not_allowed()));
    }
    if headers
        .get(SEC_WEBSOCKET_VERSION)
        .is_none_or(|version| version != "13")
    {
        let mut answer = refuse(StatusCode::BAD_REQUEST, "missing or bad WebSocket Version");
        answer
            .headers_mut()
            .insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        return Err(Box::new(answer));
    }
    let Some(key) = headers.get(SEC_WEBSOCKET_KEY) else {
        return Err(Box::new(refuse(
            StatusCode::BAD_REQUEST,
            "missing Sec-WebSocket-Key",
        )));
    };
    let mut client = items(headers, SEC_WEBSOCKET_PROTOCOL.as_str());
    if client.is_empty() {
        client.push(String::new());
    }
    let Some((name, protocol)) = negotiate(&client, known) else {
        let names: Vec<_> = known.iter().map(|(name, _)| *name).collect();
        let text =
            format!("requested protocol(s) are not supported: {client:?}; supports {names:?}");
        return Err(Box::new(refuse(StatusCode::FORBIDDEN, &text)));
    };
    let Ok(accept) = HeaderValue::from_str(&derive_accept_key(key.as_bytes())) else {
        return Err(Box::new(refuse(
            StatusCode::BAD_REQUEST,
            "bad Sec-WebSocket-Key",
        )));
    };
    let mut answer = switch("websocket");
    answer.headers_mut().insert(SEC_WEBSOCKET_ACCEPT, accept);
    if !name.is_empty() {
        let value = HeaderValue::from_static(name);
        answer.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, value);
    }
    Ok((protocol, answer))
}
