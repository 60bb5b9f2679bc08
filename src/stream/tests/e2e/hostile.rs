//! Clients that break the protocols.

use crate::support::{LIMIT, request, spdy, start, ws};
use bytes::BytesMut;
use flate2::{Compress, Compression, FlushCompress};
use futures_util::SinkExt;
use slipway_stream::wire::{Encoder, Frame, Headers, goaway};
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;

const V4: &str = "v4.channel.k8s.io";
const ALL: [&str; 4] = ["error", "stdin", "stdout", "stderr"];

fn syn_with_block(block: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x80, 3, 0, 1, 0];
    frame.extend_from_slice(&(block.len() as u32 + 10).to_be_bytes()[1..]);
    frame.extend_from_slice(&[0, 0, 0, 9, 0, 0, 0, 0, 0, 0]);
    frame.extend_from_slice(block);
    frame
}

/// A MiB of zeros in a KiB.
fn bomb() -> Vec<u8> {
    let mut block = Vec::with_capacity(1 << 16);
    let mut deflate = Compress::new(Compression::best(), true);
    deflate
        .compress_vec(&vec![0; 1 << 20], &mut block, FlushCompress::Sync)
        .unwrap();
    assert!(block.len() < 4096);
    block
}

#[tokio::test]
async fn what_is_not_spdy_ends_the_connection_with_goaway() {
    let server = start().await;
    for bytes in [
        vec![0x80, 2, 0, 1, 0, 0, 0, 10],
        vec![0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff],
        vec![0x80, 3, 0, 3, 0, 0, 0, 3, 1, 2, 3],
        syn_with_block(b"this is not compressed"),
        syn_with_block(&bomb()),
        syn_with_block(&[]),
        vec![0; 8],
    ] {
        let url = server.exec(&["hang"]);
        let (mut client, _) = spdy::Client::session(&url, V4, ALL).await;
        client.io.write_all(&bytes).await.unwrap();
        client.finish().await;
        let frame = &bytes[..bytes.len().min(12)];
        assert_eq!(client.goaway, Some(goaway::PROTOCOL_ERROR), "{frame:?}");
        timeout(LIMIT, server.fake.gone.notified()).await.unwrap();
    }
}

#[tokio::test]
async fn streams_are_limited() {
    let server = start().await;
    let url = server.exec(&["hang"]);
    let (mut client, _) = spdy::Client::session(&url, V4, ALL).await;
    let mut last = 0;
    for _ in 0..1000 {
        last = client.syn(&[("streamType", "stdout")]).await;
    }
    client.until(|c| c.ended.contains(&(last, true))).await;
    assert!(client.ended.len() >= 990);
    let url = server.server.port_forward_url("p", vec![]).unwrap();
    let mut client = spdy::Client::connect(&url, "portforward.k8s.io").await;
    for n in 0..600 {
        let request = n.to_string();
        let headers = [
            ("streamType", "error"),
            ("port", "1"),
            ("requestID", &*request),
        ];
        last = client.syn(&headers).await;
    }
    client
        .until(|c| c.ended.contains(&(last, true)) && c.replies.len() == 512)
        .await;
    assert_eq!(client.ended.len(), 88);
}

#[tokio::test]
async fn streams_that_nobody_can_open_are_reset() {
    let server = start().await;
    let url = server.exec(&["cat"]);
    let (mut client, [_, stdin, stdout, _]) = spdy::Client::session(&url, V4, ALL).await;
    let syn = |id| Frame::SynStream {
        id,
        headers: Headers::default().with("streamType", "stdin"),
        fin: false,
        unidirectional: false,
    };
    // An even number, one that was, and data for one that is not there.
    client.send(syn(2)).await;
    client.until(|c| c.ended.contains(&(2, true))).await;
    client.data(99, b"x", false).await;
    client.until(|c| c.ended.contains(&(99, true))).await;
    client.data(stdin, b"still here", true).await;
    client.until(|c| c.text(stdout) == "still here").await;
}

#[tokio::test]
async fn a_client_that_pings_and_never_reads_is_cut_off() {
    let server = start().await;
    let url = server.exec(&["hang"]);
    let (mut client, _) = spdy::Client::session(&url, V4, ALL).await;
    let mut pings = BytesMut::new();
    for _ in 0..10_000 {
        Encoder::default().encode(&Frame::Ping(1), &mut pings);
    }
    let flood = async { while client.io.write_all(&pings).await.is_ok() {} };
    timeout(LIMIT, flood).await.unwrap();
    timeout(LIMIT, server.fake.gone.notified()).await.unwrap();
}

#[tokio::test]
async fn what_is_not_websocket_ends_the_connection_with_a_code() {
    let server = start().await;
    let hang = || server.exec(&["hang"]);
    // A frame with a reserved opcode; one that isn't masked.
    for frame in [&[0x83, 0x80, 0, 0, 0, 0][..], &[0x82, 0x01, 0x00]] {
        let mut client = ws::Client::connect(&hang(), "v5.channel.k8s.io").await;
        client.socket.get_mut().write_all(frame).await.unwrap();
        client.finish().await;
        assert_eq!(client.close, Some(1002), "{frame:?}");
        timeout(LIMIT, server.fake.gone.notified()).await.unwrap();
    }
    for message in [&[255][..], &[255, 0, 0], &[255, 77]] {
        let mut client = ws::Client::connect(&hang(), "v5.channel.k8s.io").await;
        let message = Message::Binary(message.to_vec().into());
        client.socket.send(message).await.unwrap();
        client.finish().await;
        assert_eq!(client.close, Some(1002));
        timeout(LIMIT, server.fake.gone.notified()).await.unwrap();
    }
    // 17 MiB are announced.
    let mut client = ws::Client::connect(&hang(), "v5.channel.k8s.io").await;
    let mut frame = vec![0x82, 0xff];
    frame.extend_from_slice(&(17u64 << 20).to_be_bytes());
    frame.extend_from_slice(&[0; 4]);
    client.socket.get_mut().write_all(&frame).await.unwrap();
    client.finish().await;
    assert_eq!(client.close, Some(1009));
    timeout(LIMIT, server.fake.gone.notified()).await.unwrap();
}

#[tokio::test]
async fn data_where_none_belongs_is_dropped() {
    let server = start().await;
    let mut client = ws::Client::connect(&server.exec(&["cat"]), "v5.channel.k8s.io").await;
    for channel in [1, 2, 3, 77, 254] {
        client.send(channel, b"nonsense").await;
    }
    client.send(4, b"nonsense").await;
    client.send(0, b"sense").await;
    client.send(255, &[0]).await;
    client.send(0, b"late").await;
    client.finish().await;
    assert_eq!(client.text(1), "sense");
    let url = server.server.exec_url(request(&["cat"])).unwrap();
    let (mut client, [_, stdin, stdout, _]) = spdy::Client::session(&url, V4, ALL).await;
    client.data(stdout, &vec![7; 1 << 20], false).await;
    client.data(stdin, b"sense", true).await;
    client.data(stdin, b"late", true).await;
    client.finish().await;
    assert_eq!(client.text(stdout), "sense");
}
