//! Port forwarding.

use crate::support::{LIMIT, noise, spdy, start, ws};
use slipway_stream::wire::Frame;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, copy_bidirectional};
use tokio::net::TcpListener;
use tokio::time::timeout;

const V1: &str = "portforward.k8s.io";

/// A server that reads to the end, and only then answers with what it read.
async fn echo_at_end() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut all = Vec::new();
                socket.read_to_end(&mut all).await.unwrap();
                socket.write_all(&all).await.unwrap();
            });
        }
    });
    port
}

async fn pair(client: &mut spdy::Client, port: &str, request: &str) -> (u32, u32) {
    let headers = |kind| [("streamType", kind), ("port", port), ("requestID", request)];
    let error = client.open(&headers("error")).await;
    client.data(error, b"", true).await;
    (client.open(&headers("data")).await, error)
}

async fn many_with_half_close(mut client: spdy::Client, port: u16) {
    let port = port.to_string();
    let mut pairs = Vec::new();
    for n in 0..40 {
        pairs.push(pair(&mut client, &port, &n.to_string()).await);
    }
    for (n, (data, _)) in pairs.iter().enumerate() {
        client.data(*data, &noise(1000 * n + 1), true).await;
    }
    client.until(|c| c.ended.len() == 80).await;
    for (n, (data, error)) in pairs.iter().enumerate() {
        assert!(client.got[data] == noise(1000 * n + 1));
        assert_eq!(client.text(*error), "");
    }
    // And the connection is still good for more.
    let (data, _) = pair(&mut client, &port, "more").await;
    client.data(data, b"more", true).await;
    client.until(|c| c.text(data) == "more").await;
}

#[tokio::test]
async fn many_connections_with_half_close() {
    let (server, port) = (start().await, echo_at_end().await);
    let url = server.server.port_forward_url("p", vec![]).unwrap();
    many_with_half_close(spdy::Client::connect(&url, V1).await, port).await;
}

/// A SPDY client over a WebSocket's messages.
async fn tunnel(url: &str) -> spdy::Client {
    use futures_util::{SinkExt, StreamExt};
    use tokio_tungstenite::tungstenite::Message;
    let client = ws::Client::connect(url, "SPDY/3.1+portforward.k8s.io").await;
    let (near, far): (DuplexStream, DuplexStream) = tokio::io::duplex(1 << 16);
    let (mut sink, mut stream) = client.socket.split();
    let (mut from, mut to) = tokio::io::split(far);
    tokio::spawn(async move {
        let mut buffer = vec![0; 1000];
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            let message = Message::Binary(buffer[..length].to_vec().into());
            sink.send(message).await.unwrap();
        }
    });
    tokio::spawn(async move {
        while let Some(Ok(Message::Binary(bytes))) = stream.next().await {
            to.write_all(&bytes).await.unwrap();
        }
    });
    spdy::Client::over(near)
}

#[tokio::test]
async fn many_connections_through_a_tunnel() {
    let (server, port) = (start().await, echo_at_end().await);
    let url = server.server.port_forward_url("p", vec![]).unwrap();
    many_with_half_close(tunnel(&url).await, port).await;
}

#[tokio::test]
async fn a_refused_connection_is_told_and_the_others_go_on() {
    let (server, port) = (start().await, echo_at_end().await);
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed = free.local_addr().unwrap().port();
    drop(free);
    let url = server.server.port_forward_url("p", vec![]).unwrap();
    let mut client = spdy::Client::connect(&url, V1).await;
    let (_, error) = pair(&mut client, &closed.to_string(), "1").await;
    client.until(|c| c.ended.contains(&(error, false))).await;
    let text = client.text(error);
    assert!(
        text.starts_with(&format!("error forwarding port {closed} to pod p, uid : ")),
        "{text}"
    );
    let (data, _) = pair(&mut client, &port.to_string(), "2").await;
    client.data(data, b"fine", true).await;
    client.until(|c| c.text(data) == "fine").await;
}

#[tokio::test]
async fn bad_streams_are_refused() {
    let server = start().await;
    let url = server.server.port_forward_url("p", vec![]).unwrap();
    let mut client = spdy::Client::connect(&url, V1).await;
    for headers in [
        &[("streamType", "data"), ("port", "0")][..],
        &[("streamType", "data"), ("port", "70000")],
        &[("streamType", "data")],
        &[("streamType", "stdout"), ("port", "80")],
        &[("port", "80")],
    ] {
        let id = client.syn(headers).await;
        client.until(|c| c.ended.contains(&(id, true))).await;
    }
}

#[tokio::test]
async fn a_reset_stream_closes_its_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let server = start().await;
    let url = server.server.port_forward_url("p", vec![]).unwrap();
    let mut client = spdy::Client::connect(&url, V1).await;
    let (data, _) = pair(&mut client, &port, "1").await;
    let (mut socket, _) = listener.accept().await.unwrap();
    client
        .send(Frame::RstStream {
            id: data,
            status: 5,
        })
        .await;
    let end = timeout(LIMIT, socket.read(&mut [0; 1])).await.unwrap();
    assert!(matches!(end, Ok(0) | Err(_)));
    // So does a client that goes.
    pair(&mut client, &port, "2").await;
    let (mut socket, _) = listener.accept().await.unwrap();
    drop(client);
    let end = timeout(LIMIT, socket.read(&mut [0; 1])).await.unwrap();
    assert!(matches!(end, Ok(0) | Err(_)));
}

#[tokio::test]
async fn ports_over_channels() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut five = [0; 5];
        socket.read_exact(&mut five).await.unwrap();
        socket.write_all(&five).await.unwrap();
    });
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed = free.local_addr().unwrap().port();
    drop(free);
    let server = start().await;
    let url = server
        .server
        .port_forward_url("p", vec![port, closed])
        .unwrap();
    let mut client = ws::Client::connect(&url, "v4.channel.k8s.io").await;
    client.send(0, b"hello").await;
    client.finish().await;
    assert_eq!(client.got[0], [&port.to_le_bytes()[..], b"hello"].concat());
    assert_eq!(client.got[1], port.to_le_bytes());
    assert_eq!(client.got[2], closed.to_le_bytes());
    let error = String::from_utf8_lossy(&client.got[3][2..]).into_owned();
    assert!(error.contains("refused"), "{error}");
    assert_eq!(client.close, Some(1000));
}

#[tokio::test]
async fn a_download_does_not_wait_for_a_client_that_sends_nothing_more() {
    // The other direction stays open, both ends at work at once.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let (mut near, mut far) = tokio::io::duplex(1024);
        tokio::spawn(async move { copy_bidirectional(&mut socket, &mut far).await });
        near.write_all(&noise(1 << 20)).await.unwrap();
        near.shutdown().await.unwrap();
        let mut rest = Vec::new();
        near.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"late");
    });
    let server = start().await;
    let url = server.server.port_forward_url("p", vec![]).unwrap();
    let mut client = spdy::Client::connect(&url, V1).await;
    let (data, error) = pair(&mut client, &port, "1").await;
    client.until(|c| c.ended.contains(&(data, false))).await;
    assert!(client.got[&data] == noise(1 << 20));
    client.data(data, b"late", true).await;
    client.until(|c| c.ended.contains(&(error, false))).await;
    assert_eq!(client.text(error), "");
}
