//! Clients as they are found on nodes, beyond those that do everything right.

use loona_hpack::{Decoder, Encoder};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::harness::*;

tests![
    an_authority_that_is_none_is_taken,
    garbage_ends_only_its_own_connection,
];

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// Calls Version as a client does that puts `authority` into its requests; what `grpc-status` says, if the server says
/// it at all.
async fn version(stream: &mut UnixStream, authority: &str, id: u32) -> Result<Option<String>> {
    let mut encoder = Encoder::new();
    // Each time anew: the entries of an earlier block are not referred to.
    let block = encoder.encode(vec![
        (&b":method"[..], &b"POST"[..]),
        (b":scheme", b"http"),
        (b":path", b"/runtime.v1.RuntimeService/Version"),
        (b":authority", authority.as_bytes()),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
    ]);
    let mut bytes = frame(1, 0x4, id, &block);
    // An empty message.
    bytes.extend(frame(0, 0x1, id, &[0; 5]));
    stream.write_all(&bytes).await?;
    let mut decoder = Decoder::new();
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload).await?;
        let of = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        match head[3] {
            1 if of == id => {
                let headers = decoder
                    .decode(&payload)
                    .map_err(|e| anyhow::anyhow!("headers: {e}"))?;
                let status = headers.into_iter().find(|(name, _)| name == b"grpc-status");
                if let Some((_, value)) = status {
                    return Ok(Some(String::from_utf8(value)?));
                }
            }
            // RST_STREAM, GOAWAY.
            3 | 7 => return Ok(None),
            _ => {}
        }
    }
}

async fn connect(daemon: &Daemon) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(daemon.socket()).await?;
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[]));
    stream.write_all(&bytes).await?;
    Ok(stream)
}

async fn an_authority_that_is_none_is_taken(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    for authority in [
        "localhost",
        "/run/slipway/slipway.sock",
        "%2Frun%2Fslipway%2Fslipway.sock",
        "unix:///run/slipway/slipway.sock",
    ] {
        let mut stream = connect(&daemon).await?;
        let said = version(&mut stream, authority, 1).await?;
        assert_eq!(said.as_deref(), Some("0"), "{authority}");
    }
    Ok(())
}

async fn garbage_ends_only_its_own_connection(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    let mut good = connect(&daemon).await?;
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0xff; 4096],
        // HEADERS whose block refers to what is in no table.
        &[
            &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..],
            &[0, 0, 1, 1, 4, 0, 0, 0, 1, 0xff],
        ]
        .concat(),
    ] {
        let mut bad = UnixStream::connect(daemon.socket()).await?;
        bad.write_all(garbage).await?;
        bad.shutdown().await?;
        // The server hangs up, whatever it says before.
        let mut rest = Vec::new();
        let _ = bad.read_to_end(&mut rest).await;
    }
    assert_eq!(
        version(&mut good, "localhost", 1).await?.as_deref(),
        Some("0")
    );
    Ok(())
}
