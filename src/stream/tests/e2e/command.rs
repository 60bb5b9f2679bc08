//! Exec and attach.

use crate::support::{LIMIT, noise, spdy, start, start_with, ws};
use slipway_stream::wire::{Frame, goaway};
use slipway_stream::{AttachRequest, Config};
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

const SUCCESS: &str = r#"{"status":"Success"}"#;
const V4: &str = "v4.channel.k8s.io";
const V5: &str = "v5.channel.k8s.io";
const ALL: [&str; 4] = ["error", "stdin", "stdout", "stderr"];

#[tokio::test]
async fn stdin_is_echoed_until_its_end() {
    let server = start().await;
    let (mut client, [error, stdin, stdout, stderr]) =
        spdy::Client::session(&server.exec(&["cat"]), V4, ALL).await;
    client.data(stdin, b"hello ", false).await;
    client.until(|c| c.text(stdout) == "hello ").await;
    client.send(Frame::Ping(1)).await;
    client.until(|c| c.pings == [1]).await;
    client.data(stdin, b"again", true).await;
    client.finish().await;
    assert_eq!(client.text(stdout), "hello again");
    assert_eq!(client.text(error), SUCCESS);
    assert_eq!(client.goaway, Some(goaway::OK));
    // The status comes after all output has ended.
    let at = |id| client.ended.iter().position(|e| *e == (id, false)).unwrap();
    assert!(at(error) > at(stdout) && at(error) > at(stderr));

    let mut client = ws::Client::connect(&server.exec(&["cat"]), V5).await;
    client.send(0, b"hello ").await;
    while client.text(1) != "hello " {
        assert!(client.step().await);
    }
    client.send(0, b"again").await;
    client.send(255, &[0]).await;
    client.finish().await;
    assert_eq!(client.text(1), "hello again");
    assert_eq!(client.text(3), SUCCESS);
    assert_eq!(client.close, Some(1000));
}

#[tokio::test]
async fn every_byte_of_large_output_arrives() {
    let server = start().await;
    let size = 32 << 20;
    let expected = noise(size);
    let command = ["produce", &size.to_string()];
    let (mut client, [error, _, stdout, _]) =
        spdy::Client::session(&server.exec(&command), V4, ALL).await;
    client.finish().await;
    assert!(client.got[&stdout] == expected);
    assert_eq!(client.text(error), SUCCESS);
    let mut client = ws::Client::connect(&server.exec(&command), V4).await;
    client.finish().await;
    assert!(client.got[1] == expected);
    assert_eq!(client.text(3), SUCCESS);
}

#[tokio::test]
async fn exit_codes_and_errors_are_told() {
    let server = start().await;
    let exit = r#"{"status":"Failure","message":"command terminated with non-zero exit code: exit status 7","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"7"}]}}"#;
    let (mut client, [error, ..]) =
        spdy::Client::session(&server.exec(&["exit", "7"]), V4, ALL).await;
    client.finish().await;
    assert_eq!(client.text(error), exit);
    for protocol in [V4, V5] {
        let mut client = ws::Client::connect(&server.exec(&["exit", "7"]), protocol).await;
        client.finish().await;
        assert_eq!(client.text(3), exit);
    }
    let failure = r#"{"status":"Failure","message":"Internal error occurred: error executing command in container: no command \"nonsense\"","reason":"InternalError","code":500}"#;
    let (mut client, [error, ..]) =
        spdy::Client::session(&server.exec(&["nonsense"]), V4, ALL).await;
    client.finish().await;
    assert_eq!(client.text(error), failure);
    let mut client = ws::Client::connect(&server.exec(&["nonsense"]), V5).await;
    client.finish().await;
    assert_eq!(client.text(3), failure);
}

#[tokio::test]
async fn old_protocols_tell_failures_as_text_and_successes_not_at_all() {
    let server = start().await;
    let text = "command terminated with non-zero exit code: exit status 7";
    for protocol in ["channel.k8s.io", "v2.channel.k8s.io", "v3.channel.k8s.io"] {
        for (command, expected) in [("7", text), ("0", "")] {
            let url = server.exec(&["exit", command]);
            let (mut client, [error, ..]) = spdy::Client::session(&url, protocol, ALL).await;
            client.finish().await;
            assert_eq!(client.text(error), expected, "{protocol}");
            let url = server.exec(&["exit", command]);
            let mut client = ws::Client::connect(&url, protocol).await;
            client.finish().await;
            assert_eq!(client.text(3), expected, "{protocol}");
        }
    }
    let mut client = ws::Client::connect(&server.exec(&["exit", "7"]), "").await;
    client.finish().await;
    assert_eq!(client.text(3), text);
}

#[tokio::test]
async fn base64_is_spoken_in_both_directions() {
    use futures_util::{SinkExt, StreamExt};
    use tokio_tungstenite::tungstenite::Message;
    let server = start().await;
    let url = server.exec(&["cat"]);
    let mut client = ws::Client::connect(&url, "v4.base64.channel.k8s.io").await;
    client
        .socket
        .send(Message::Text("0aGVsbG8=".into()))
        .await
        .unwrap();
    let mut texts = Vec::new();
    while texts.len() < 2 {
        texts.push(client.socket.next().await.unwrap().unwrap());
    }
    assert_eq!(
        texts,
        [Message::Text("1".into()), Message::Text("1aGVsbG8=".into())]
    );
}

#[tokio::test]
async fn terminal_sizes_and_merged_output() {
    let server = start().await;
    let kinds = ["error", "stdin", "stdout", "resize"];
    let (mut client, [_, _, stdout, resize]) =
        spdy::Client::session(&server.tty(&["sizes"]), V4, kinds).await;
    client
        .data(resize, br#"{"Width":80,"Height":24}"#, false)
        .await;
    client.until(|c| c.text(stdout) == "80x24\n").await;
    client.data(resize, br#"{"Width":0,"Hei"#, false).await;
    client.data(resize, br#"ght":9}"#, false).await;
    client.finish().await;
    assert_eq!(client.text(stdout), "80x24\n0x9\n");
    let mut client = ws::Client::connect(&server.tty(&["sizes"]), V4).await;
    client.send(4, br#"{"Width":81,"Height":24}"#).await;
    while client.text(1) != "81x24\n" {
        assert!(client.step().await);
    }
    for _ in 0..1000 {
        client.send(4, br#"{"Width":1,"Height":1}"#).await;
    }
    client.send(4, br#"{"Width":0,"Height":0}"#).await;
    client.finish().await;
    assert!(client.text(1).ends_with("0x0\n"));

    let (mut client, [error, _, stdout, _]) =
        spdy::Client::session(&server.tty(&["both"]), V4, kinds).await;
    client.finish().await;
    assert_eq!(client.text(stdout), "to stdout, to stderr");
    assert_eq!(client.text(error), SUCCESS);
    let mut client = ws::Client::connect(&server.exec(&["both"]), V5).await;
    client.finish().await;
    assert_eq!(
        (&*client.text(1), &*client.text(2)),
        ("to stdout", "to stderr")
    );
}

#[tokio::test]
async fn attaching_sends_and_receives_and_tells_errors() {
    let server = start().await;
    let attach = |id: &str, stdin| {
        let request = AttachRequest {
            container_id: id.into(),
            stdin,
            stdout: true,
            ..AttachRequest::default()
        };
        server.server.attach_url(request).unwrap()
    };
    let kinds = ["error", "stdin", "stdout"];
    let (mut client, [error, stdin, stdout]) =
        spdy::Client::session(&attach("c", true), V4, kinds).await;
    client.data(stdin, b"hi", true).await;
    client.finish().await;
    assert_eq!(client.text(stdout), "attached: hi");
    assert_eq!(client.text(error), SUCCESS);
    let mut client = ws::Client::connect(&attach("c", false), V5).await;
    client.finish().await;
    assert_eq!(client.text(1), "attached: ");
    let mut client = ws::Client::connect(&attach("gone", false), V5).await;
    client.finish().await;
    assert!(
        client
            .text(3)
            .contains("error attaching to container: container gone has ended")
    );
}

#[tokio::test]
async fn a_client_that_goes_cancels_its_session() {
    let server = start().await;
    let (client, _) = spdy::Client::session(&server.exec(&["hang"]), V4, ALL).await;
    drop(client);
    timeout(LIMIT, server.fake.gone.notified()).await.unwrap();
    let client = ws::Client::connect(&server.exec(&["hang"]), V5).await;
    drop(client);
    timeout(LIMIT, server.fake.gone.notified()).await.unwrap();
}

/// "hang" doesn't read stdin, so the connection isn't read to its end.
#[tokio::test]
async fn a_client_that_goes_behind_unread_stdin_cancels_its_session() {
    let server = start().await;
    let url = server.exec(&["hang"]);
    let (mut client, [_, stdin, ..]) = spdy::Client::session(&url, V4, ALL).await;
    client.data(stdin, &[0; 200_000], false).await;
    drop(client);
    timeout(LIMIT, server.fake.gone.notified()).await.unwrap();
    let mut client = ws::Client::connect(&server.exec(&["hang"]), V5).await;
    for _ in 0..20 {
        client.send(0, &[0; 10_000]).await;
    }
    drop(client);
    timeout(LIMIT, server.fake.gone.notified()).await.unwrap();
}

#[tokio::test]
async fn a_slow_client_holds_up_nobody_but_its_command() {
    let server = start().await;
    let size: usize = 64 << 20;
    let command = ["produce", &size.to_string()];
    let (mut slow, [_, _, stdout, _]) =
        spdy::Client::session(&server.exec(&command), V4, ALL).await;
    // Until the buffers of both kernels' ends are full.
    let mut produced = 0;
    let until = Instant::now() + LIMIT;
    loop {
        sleep(Duration::from_millis(300)).await;
        let now = server.fake.produced.load(Ordering::Relaxed);
        if now == produced && now > 0 {
            break;
        }
        produced = now;
        assert!(Instant::now() < until);
    }
    assert!(produced < size / 2, "{produced} bytes went nowhere");
    let mut other = ws::Client::connect(&server.exec(&["both"]), V5).await;
    other.finish().await;
    assert_eq!(other.text(1), "to stdout");
    slow.finish().await;
    assert!(slow.got[&stdout] == noise(size));
}

#[tokio::test]
async fn windows_are_heeded_once_a_client_has_some() {
    let server = start().await;
    let url = server.exec(&["produce", "200000"]);
    let mut client = spdy::Client::connect(&url, V4).await;
    client.send(Frame::Settings(vec![(7, 1000)])).await;
    let error = client.open(&[("streamType", "error")]).await;
    client.open(&[("streamType", "stdin")]).await;
    client.open(&[("streamType", "stderr")]).await;
    let stdout = client.open(&[("streamType", "stdout")]).await;
    let length = move |c: &spdy::Client| c.got.get(&stdout).map_or(0, Vec::len);
    client.until(move |c| length(c) == 1000).await;
    assert!(
        timeout(Duration::from_millis(200), client.step())
            .await
            .is_err()
    );
    client
        .send(Frame::WindowUpdate {
            id: stdout,
            delta: 500,
        })
        .await;
    client.until(move |c| length(c) == 1500).await;
    assert!(
        timeout(Duration::from_millis(200), client.step())
            .await
            .is_err()
    );
    client
        .send(Frame::WindowUpdate {
            id: stdout,
            delta: 1 << 20,
        })
        .await;
    client.finish().await;
    assert!(client.got[&stdout] == noise(200_000));
    assert_eq!(client.text(error), SUCCESS);
}

#[tokio::test]
async fn nothing_follows_the_status() {
    let server = start().await;
    let (mut client, [error, _, stdout, _]) =
        spdy::Client::session(&server.exec(&["leave"]), V4, ALL).await;
    client.finish().await;
    assert!(client.text(stdout).starts_with("before"));
    assert_eq!(client.text(error), SUCCESS);
    let mut client = ws::Client::connect(&server.exec(&["leave"]), V4).await;
    client.finish().await;
    assert!(client.text(1).starts_with("before"));
    assert_eq!(client.text(3), SUCCESS);
}

#[tokio::test]
async fn an_idle_session_ends() {
    let config = Config {
        idle_timeout: Duration::from_millis(300),
        ..Config::default()
    };
    let server = start_with(config).await;
    let (mut client, _) = spdy::Client::session(&server.exec(&["hang"]), V4, ALL).await;
    client.finish().await;
    assert!(client.goaway.is_some());
    timeout(LIMIT, server.fake.gone.notified()).await.unwrap();
    let mut client = ws::Client::connect(&server.exec(&["hang"]), V5).await;
    client.finish().await;
    assert_eq!(client.close, Some(1001));
    timeout(LIMIT, server.fake.gone.notified()).await.unwrap();
}

#[tokio::test]
async fn a_client_has_limited_time_to_open_its_streams() {
    let config = Config {
        creation_timeout: Duration::from_millis(300),
        ..Config::default()
    };
    let server = start_with(config).await;
    let kinds = ["error", "stdin"];
    let (mut client, [error, _]) = spdy::Client::session(&server.exec(&["cat"]), V4, kinds).await;
    client.finish().await;
    assert!(
        client
            .text(error)
            .contains("timed out waiting for client to create streams")
    );
}

#[tokio::test]
async fn shutting_down_ends_sessions_even_stuck_ones() {
    let config = Config {
        cancel_grace: Duration::from_millis(300),
        ..Config::default()
    };
    let server = start_with(config).await;
    let (mut stuck, [error, ..]) = spdy::Client::session(&server.exec(&["stuck"]), V4, ALL).await;
    let mut hanging = ws::Client::connect(&server.exec(&["hang"]), V5).await;
    assert!(hanging.step().await);
    server.shutdown.cancel();
    stuck.finish().await;
    hanging.finish().await;
    assert!(stuck.text(error).contains("the session was cut off"));
    timeout(LIMIT, server.serving).await.unwrap().unwrap();
}
