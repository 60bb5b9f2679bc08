use super::*;
use crate::frame;
use crate::rpc::{self, Message, Response};
use parking_lot::Mutex;
use slipway_proto::nri::{ConfigureResponse, SynchronizeRequest, SynchronizeResponse};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const SOON: Duration = Duration::from_secs(10);

/// A node with so many containers of about a kilobyte.
struct Containers(usize);

impl Runtime for Containers {
    fn inventory(&self) -> BoxFuture<'static, (Vec<PodSandbox>, Vec<Container>)> {
        let all = (0..self.0).map(|n| Container {
            id: format!("{n:01000}"),
            ..Default::default()
        });
        let all = all.collect();
        async move { (Vec::new(), all) }.boxed()
    }

    fn update(&self, updates: Vec<ContainerUpdate>) -> BoxFuture<'static, Vec<ContainerUpdate>> {
        async move { updates }.boxed()
    }

    fn evict(&self, _: Vec<ContainerEviction>) -> BoxFuture<'static, ()> {
        async {}.boxed()
    }
}

fn hub(patience: Duration) -> Arc<Nri> {
    Nri::new(Settings {
        runtime: ("test".into(), "1".into()),
        socket: None,
        plugin_dir: "/nonexistent".into(),
        config_dir: "/nonexistent".into(),
        registration_timeout: patience,
        request_timeout: patience,
        validator: ValidatorSettings::default(),
    })
}

type Calls = Arc<Mutex<Vec<(String, Bytes)>>>;

/// A plugin that registers, answers everything, and notes what it was called with. It says that it can take
/// parts, if `parts`.
fn plugin(index: &str, name: &str, parts: bool) -> (UnixStream, Calls) {
    let (theirs, mut ours) = UnixStream::pair().unwrap();
    let calls = Calls::default();
    let noted = calls.clone();
    let register = RegisterPluginRequest {
        plugin_name: name.into(),
        plugin_idx: index.into(),
        ..Default::default()
    };
    let register = Message::Request(
        1,
        rpc::Request {
            service: rpc::RUNTIME_SERVICE.into(),
            method: "RegisterPlugin".into(),
            payload: register.encode_to_vec().into(),
            timeout_nano: 0,
        },
    );
    tokio::spawn(async move {
        let mut out = bytes::BytesMut::new();
        frame::write(&mut out, frame::RUNTIME, &register.encode().unwrap());
        ours.write_all(&out).await.unwrap();
        let (mut frames, mut messages) = (frame::Reader::default(), rpc::Reader::default());
        while ours.read_buf(frames.buffer()).await.is_ok_and(|n| n > 0) {
            while let Some((connection, payload)) = frames.next().unwrap() {
                if connection == frame::PLUGIN {
                    messages.feed(&payload);
                }
            }
            while let Some(Message::Request(stream, request)) = messages.next().unwrap() {
                let payload = match request.method.as_str() {
                    "Configure" => ConfigureResponse { events: 0 }.encode_to_vec(),
                    "Synchronize" => {
                        let asked = SynchronizeRequest::decode(request.payload.clone()).unwrap();
                        let more = asked.more && parts;
                        let update = Vec::new();
                        SynchronizeResponse { update, more }.encode_to_vec()
                    }
                    _ => Vec::new(),
                };
                noted.lock().push((request.method, request.payload));
                let response = Response {
                    status: None,
                    payload: payload.into(),
                };
                let mut out = bytes::BytesMut::new();
                let message = Message::Response(stream, response).encode().unwrap();
                frame::write(&mut out, frame::PLUGIN, &message);
                if ours.write_all(&out).await.is_err() {
                    return;
                }
            }
        }
    });
    (theirs, calls)
}

fn runtime(containers: usize) -> Arc<dyn Runtime> {
    Arc::new(Containers(containers))
}

#[tokio::test]
async fn a_long_list_comes_in_parts() {
    let hub = hub(SOON);
    let (socket, calls) = plugin("10", "parts", true);
    hub.join(socket, None, &runtime(10_000)).await.unwrap();
    let parts: Vec<_> = (calls.lock().iter())
        .filter(|(method, _)| method == "Synchronize")
        .map(|(_, payload)| SynchronizeRequest::decode(payload.clone()).unwrap())
        .collect();
    assert!(parts.len() > 2, "{}", parts.len());
    assert_eq!(
        parts.iter().map(|p| p.containers.len()).sum::<usize>(),
        10_000
    );
    // Who can't take parts is told so, and stays out.
    let (socket, _) = plugin("20", "whole", false);
    let (error, name) = hub.join(socket, None, &runtime(10_000)).await.unwrap_err();
    assert!(error.to_string().contains("in parts"), "{error}");
    assert_eq!(name, "20-whole");
    assert_eq!(hub.turn().await.plugins.len(), 1);
}

#[tokio::test]
async fn the_order_is_that_of_the_indices() {
    let hub = hub(SOON);
    for (index, name) in [("20", "b"), ("10", "c"), ("10", "a")] {
        let (socket, _) = plugin(index, name, true);
        hub.join(socket, None, &runtime(0)).await.unwrap();
    }
    let turn = hub.turn().await;
    let order: Vec<_> = turn.plugins.iter().map(|p| p.shown()).collect();
    assert_eq!(order, ["10-c", "10-a", "20-b"]);
    assert!(turn.wants(Event::StartContainer));
    drop(turn);
    hub.stop().await;
}

#[tokio::test]
async fn nobody_joins_during_a_turn() {
    let hub = hub(Duration::from_millis(200));
    let turn = hub.turn().await;
    assert!(!turn.wants(Event::StartContainer) && !turn.wants(Event::CreateContainer));
    let (socket, calls) = plugin("10", "late", true);
    let (error, _) = hub.join(socket, None, &runtime(0)).await.unwrap_err();
    assert!(matches!(error, NriError::Busy(_)), "{error}");
    assert!(
        calls
            .lock()
            .iter()
            .all(|(method, _)| method != "Synchronize")
    );
    drop(turn);
    let (socket, _) = plugin("10", "late", true);
    hub.join(socket, None, &runtime(0)).await.unwrap();
}

#[tokio::test]
async fn one_that_reads_nothing_is_given_up() {
    let hub = hub(Duration::from_millis(300));
    let (theirs, mut ours) = UnixStream::pair().unwrap();
    // It registers, and never reads what it is told.
    let register = RegisterPluginRequest {
        plugin_name: "deaf".into(),
        plugin_idx: "10".into(),
        ..Default::default()
    };
    let request = rpc::Request {
        service: rpc::RUNTIME_SERVICE.into(),
        method: "RegisterPlugin".into(),
        payload: register.encode_to_vec().into(),
        timeout_nano: 0,
    };
    let mut out = bytes::BytesMut::new();
    let message = Message::Request(1, request).encode().unwrap();
    frame::write(&mut out, frame::RUNTIME, &message);
    ours.write_all(&out).await.unwrap();
    let (error, name) = hub.join(theirs, None, &runtime(0)).await.unwrap_err();
    assert!(
        matches!(
            error,
            NriError::Timeout {
                method: "Configure",
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(name, "10-deaf");
    let read = ours.read_to_end(&mut Vec::new()).await;
    assert!(read.is_ok(), "the connection is closed");
}

#[tokio::test]
async fn who_floods_with_calls_is_answered_no_faster_than_it_reads() {
    let hub = hub(SOON);
    let (theirs, mut ours) = UnixStream::pair().unwrap();
    let joining = tokio::spawn(async move {
        let _ = hub.join(theirs, None, &runtime(0)).await;
    });
    let mut out = bytes::BytesMut::new();
    for n in 0..20_000u32 {
        let request = rpc::Request {
            service: rpc::RUNTIME_SERVICE.into(),
            method: "Nonsense".into(),
            ..Default::default()
        };
        let message = Message::Request(2 * n + 1, request).encode().unwrap();
        frame::write(&mut out, frame::RUNTIME, &message);
    }
    // Nothing is read, so at some point nothing more is taken.
    let written = tokio::time::timeout(Duration::from_millis(500), ours.write_all(&out)).await;
    assert!(
        written.is_err(),
        "20000 calls are taken and none of their answers read"
    );
    joining.abort();
}

#[test]
fn the_socket_is_roots_and_replaces_only_a_dead_one() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let _inside = runtime.enter();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sub/nri.sock");
    let first = listen(&path).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
    assert!(matches!(listen(&path), Err(NriError::Taken { .. })));
    drop(first);
    listen(&path).unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(listen(&file), Err(NriError::NoSocket { .. })));
    assert!(file.exists());
}
