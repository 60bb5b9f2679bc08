//! An NRI plugin, with an encoding of its own: what it says and hears is put together byte by byte.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use prost::Message;
use slipway_proto::nri;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::{Context, Daemon, Result, ensure, eventually, seconds};

/// What a plugin does when it is called.
pub enum Reply {
    /// Answers so.
    Answer(Vec<u8>),
    /// Fails with this text.
    Fail(&'static str),
    /// Knows no such method.
    Unknown,
    /// Answers after a while.
    Later(Duration, Vec<u8>),
    /// Never answers.
    Hang,
    /// Is gone.
    Crash,
}

/// Answers with this message.
pub fn answer(message: &impl Message) -> Reply {
    Reply::Answer(message.encode_to_vec())
}

type Behaviour = Arc<dyn Fn(&str, &[u8]) -> Reply + Send + Sync>;

/// What it was called with: methods and messages.
type Heard = Arc<Mutex<Vec<(String, Vec<u8>)>>>;

/// A plugin that is connected.
pub struct Plugin {
    heard: Heard,
    calls: mpsc::Sender<(&'static str, Vec<u8>)>,
    answers: tokio::sync::Mutex<mpsc::Receiver<Vec<u8>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Plugin {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn bytes(field: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![field << 3 | 2];
    prost::encoding::encode_varint(content.len() as u64, &mut out);
    out.extend_from_slice(content);
    out
}

/// Field 1, 2 or 3 of a message of bytes and numbers.
fn field(mut message: &[u8], wanted: u8) -> Vec<u8> {
    let varint = |from: &mut &[u8]| prost::encoding::decode_varint(from).expect("a number");
    while !message.is_empty() {
        let tag = varint(&mut message);
        let content = if tag & 7 == 2 {
            let length = varint(&mut message) as usize;
            let (content, rest) = message.split_at(length);
            message = rest;
            content
        } else {
            varint(&mut message);
            &[]
        };
        if tag >> 3 == u64::from(wanted) {
            return content.to_vec();
        }
    }
    Vec::new()
}

fn frame(connection: u32, stream: u32, kind: u8, data: &[u8]) -> Vec<u8> {
    let length = |n: usize| u32::try_from(n).unwrap().to_be_bytes();
    let head = [length(data.len()), stream.to_be_bytes()].concat();
    let message = [&head[..], &[kind, 0], data].concat();
    [
        &connection.to_be_bytes()[..],
        &length(message.len()),
        &message,
    ]
    .concat()
}

/// Reads one frame.
async fn next(from: &mut (impl AsyncReadExt + Unpin)) -> Option<(u32, Vec<u8>)> {
    let connection = from.read_u32().await.ok()?;
    let length = from.read_u32().await.ok()?;
    let mut payload = vec![0; length as usize];
    from.read_exact(&mut payload).await.ok()?;
    Some((connection, payload))
}

impl Plugin {
    /// Connects, registers, and waits until it has been shown everything.
    pub async fn join(
        daemon: &Daemon,
        name: &str,
        behaviour: impl Fn(&str, &[u8]) -> Reply + Send + Sync + 'static,
    ) -> Result<Self> {
        let plugin = Self::connect(&daemon.env().root.join("nri.sock"), name, behaviour).await?;
        plugin.heard_of("Synchronize").await?;
        // It takes part when its answer to that has been read.
        daemon.logged(0, &["takes part", name]).await?;
        Ok(plugin)
    }

    /// Connects and registers.
    pub async fn connect(
        socket: &Path,
        name: &str,
        behaviour: impl Fn(&str, &[u8]) -> Reply + Send + Sync + 'static,
    ) -> Result<Self> {
        let socket = UnixStream::connect(socket)
            .await
            .context("connecting a plugin")?;
        Ok(Self::over(socket, name, Arc::new(behaviour)))
    }

    fn over(socket: UnixStream, name: &str, behaviour: Behaviour) -> Self {
        let (index, base) = name.split_once('-').expect("NN-name");
        let register = [bytes(1, base.as_bytes()), bytes(2, index.as_bytes())].concat();
        let heard = Heard::default();
        let (calls, queue) = mpsc::channel(8);
        let (told, answers) = mpsc::channel(8);
        calls.try_send(("RegisterPlugin", register)).unwrap();
        let task = tokio::spawn(speak(socket, behaviour, heard.clone(), queue, told));
        let answers = tokio::sync::Mutex::new(answers);
        Self {
            heard,
            calls,
            answers,
            task,
        }
    }

    /// Calls the runtime; the answer's status and message.
    pub async fn call(
        &self,
        method: &'static str,
        message: &impl Message,
    ) -> Result<(Vec<u8>, Vec<u8>)> {
        self.calls.send((method, message.encode_to_vec())).await?;
        let answer = tokio::time::timeout(seconds(10), async {
            self.answers.lock().await.recv().await
        });
        let answer = answer.await.context("no answer")?.context("gone")?;
        Ok((field(&answer, 1), field(&answer, 2)))
    }

    /// Whether the runtime has closed the connection.
    pub fn is_closed(&self) -> bool {
        self.task.is_finished()
    }

    /// The methods that were called, but for those of joining.
    pub fn methods(&self) -> Vec<String> {
        let heard = self.heard.lock().unwrap();
        let events = heard.iter().map(|(method, _)| method.clone());
        events
            .filter(|m| m != "Configure" && m != "Synchronize")
            .collect()
    }

    /// The first message of this method.
    pub async fn heard_of(&self, method: &str) -> Result<Vec<u8>> {
        eventually(&format!("a call of {method}"), seconds(10), || async {
            let heard = self.heard.lock().unwrap();
            let found = heard.iter().find(|(name, _)| name == method);
            ensure!(found.is_some() || !self.is_closed(), "the plugin is closed");
            Ok(found.map(|(_, message)| message.clone()))
        })
        .await
    }

    /// All messages of this method, decoded.
    pub fn all<M: Message + Default>(&self, method: &str) -> Result<Vec<M>> {
        let heard = self.heard.lock().unwrap();
        let ours = heard.iter().filter(|(name, _)| name == method);
        let decoded: Result<_, _> = ours
            .map(|(_, message)| M::decode(message.as_slice()))
            .collect();
        Ok(decoded?)
    }

    /// The first message of this method, decoded.
    pub async fn message<M: Message + Default>(&self, method: &str) -> Result<M> {
        Ok(M::decode(self.heard_of(method).await?.as_slice())?)
    }
}

async fn speak(
    socket: UnixStream,
    behaviour: Behaviour,
    heard: Heard,
    mut queue: mpsc::Receiver<(&'static str, Vec<u8>)>,
    told: mpsc::Sender<Vec<u8>>,
) {
    let (mut read, mut write) = socket.into_split();
    let (out, mut ready) = mpsc::channel::<Vec<u8>>(16);
    let writer = async move {
        while let Some(frame) = ready.recv().await {
            if write.write_all(&frame).await.is_err() {
                return;
            }
        }
    };
    let caller = {
        let out = out.clone();
        async move {
            let mut stream = 1;
            while let Some((method, message)) = queue.recv().await {
                let parts = [
                    bytes(1, b"nri.pkg.api.v1alpha1.Runtime"),
                    bytes(2, method.as_bytes()),
                    bytes(3, &message),
                ];
                let _ = out.send(frame(2, stream, 1, &parts.concat())).await;
                stream += 2;
            }
            std::future::pending::<()>().await;
        }
    };
    let reader = async move {
        let mut streams = [Vec::new(), Vec::new()];
        while let Some((connection, payload)) = next(&mut read).await {
            let stream = &mut streams[connection as usize - 1];
            stream.extend(payload);
            while let Some(head) = stream.first_chunk::<10>() {
                let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
                let (length, id) = (number(0) as usize, number(4));
                if stream.len() < 10 + length {
                    break;
                }
                let data: Vec<u8> = stream.drain(..10 + length).skip(10).collect();
                if connection == 2 {
                    // The answer to the registration is nobody's.
                    if id != 1 {
                        let _ = told.send(data).await;
                    }
                    continue;
                }
                assert_eq!(field(&data, 1), b"nri.pkg.api.v1alpha1.Plugin");
                let method = String::from_utf8(field(&data, 2)).unwrap();
                let message = field(&data, 3);
                heard
                    .lock()
                    .unwrap()
                    .push((method.clone(), message.clone()));
                let failure = |code: u8, text: &str| {
                    bytes(1, &[vec![1 << 3, code], bytes(2, text.as_bytes())].concat())
                };
                let response = match behaviour(&method, &message) {
                    Reply::Answer(message) => bytes(2, &message),
                    Reply::Fail(text) => failure(2, text),
                    Reply::Unknown => failure(12, "no such method"),
                    Reply::Later(wait, message) => {
                        tokio::time::sleep(wait).await;
                        bytes(2, &message)
                    }
                    Reply::Hang => continue,
                    Reply::Crash => return,
                };
                let _ = out.send(frame(1, id, 2, &response)).await;
            }
        }
    };
    tokio::select! {
        () = reader => {}
        () = writer => {}
        () = caller => {}
    }
}

/// The program is a plugin that a daemon has started, with its connection as standard input: it gives every
/// container a variable with its own name and configuration.
pub fn run_installed() -> std::process::ExitCode {
    use std::os::fd::AsFd;
    let socket = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .expect("a connection");
    let socket = std::os::unix::net::UnixStream::from(socket);
    socket.set_nonblocking(true).expect("a socket");
    let variable = |name: &str| std::env::var(name).expect(name);
    let name = format!(
        "{}-{}",
        variable("NRI_PLUGIN_IDX"),
        variable("NRI_PLUGIN_NAME")
    );
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.expect("a runtime").block_on(async move {
        let config = Mutex::new(String::new());
        let own = name.clone();
        let plugin = Plugin::over(
            UnixStream::from_std(socket).expect("a socket"),
            &name,
            Arc::new(move |method: &str, message: &[u8]| match method {
                "Configure" => {
                    let request = nri::ConfigureRequest::decode(message).expect("a request");
                    *config.lock().unwrap() = request.config;
                    answer(&nri::ConfigureResponse { events: 1 << 3 })
                }
                "CreateContainer" => answer(&nri::CreateContainerResponse {
                    adjust: Some(nri::ContainerAdjustment {
                        env: vec![nri::KeyValue {
                            key: "INSTALLED".to_owned(),
                            value: format!("{own} {}", config.lock().unwrap().trim()),
                        }],
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                _ => Reply::Answer(Vec::new()),
            }),
        );
        let mut plugin = plugin;
        let _ = (&mut plugin.task).await;
    });
    std::process::ExitCode::SUCCESS
}
