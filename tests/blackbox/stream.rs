//! Exec, Attach and PortForward, as a client of the streaming server sees them.

use futures_util::{SinkExt as _, StreamExt as _};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tonic::Code;

use crate::harness::*;

tests![
    exec_with_all_streams,
    exec_on_a_terminal,
    sizes_and_words_keep_their_order,
    an_exec_ends_with_its_client,
    attach_and_the_end_of_input,
    attach_to_a_terminal,
    attach_after_another,
    ports_are_forwarded,
    in_a_user_namespace,
    refusals,
];

/// Channels of `v5.channel.k8s.io`; 2 is stderr, 3 the status.
pub const STDIN: u8 = 0;
pub const STDOUT: u8 = 1;
pub const RESIZE: u8 = 4;
const CLOSE: u8 = 255;

/// A client's connection.
pub struct Client(WebSocketStream<TcpStream>);

impl Client {
    async fn connect(url: &str, protocol: &str) -> Result<Self> {
        let address = url.strip_prefix("http://").context("an http URL")?;
        let address = address.split('/').next().context("an address")?;
        let stream = TcpStream::connect(address).await?;
        let mut request = url.replacen("http://", "ws://", 1).into_client_request()?;
        let headers = request.headers_mut();
        headers.insert("Sec-WebSocket-Protocol", protocol.parse()?);
        let (socket, _) = tokio_tungstenite::client_async(request, stream).await?;
        Ok(Self(socket))
    }

    pub async fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        let message = [&[channel], bytes].concat();
        Ok(self.0.send(Message::Binary(message.into())).await?)
    }

    /// The next message's channel and bytes; `None` at the end.
    async fn next(&mut self) -> Result<Option<(u8, Vec<u8>)>> {
        while let Some(message) = self.0.next().await {
            if let Message::Binary(bytes) = message?
                && let Some((channel, bytes)) = bytes.split_first()
            {
                return Ok(Some((*channel, bytes.to_vec())));
            }
        }
        Ok(None)
    }

    /// Reads a channel until it has brought a text.
    pub async fn until(&mut self, channel: u8, wanted: &str) -> Result<String> {
        let mut text = String::new();
        while !text.contains(wanted) {
            let (from, bytes) = self
                .next()
                .await?
                .with_context(|| format!("the end before {wanted:?}: {text:?}"))?;
            if from == channel {
                text.push_str(&String::from_utf8_lossy(&bytes));
            }
        }
        Ok(text)
    }

    /// Everything up to the end: stdout, stderr, and the status.
    async fn rest(&mut self) -> Result<[String; 3]> {
        let mut all = [const { String::new() }; 3];
        while let Some((channel, bytes)) = self.next().await? {
            if let Some(text) = all.get_mut(usize::from(channel.wrapping_sub(STDOUT))) {
                text.push_str(&String::from_utf8_lossy(&bytes));
            }
        }
        Ok(all)
    }
}

pub async fn exec(container: &Container, script: &str, tty: bool) -> Result<Client> {
    let request = cri::ExecRequest {
        container_id: container.id.clone(),
        cmd: ["sh", "-c", script].map(str::to_owned).to_vec(),
        tty,
        stdin: true,
        stdout: true,
        stderr: !tty,
    };
    let answer = container.daemon.runtime().exec(request).await?;
    Client::connect(&answer.into_inner().url, "v5.channel.k8s.io").await
}

pub async fn attach(container: &Container, tty: bool) -> Result<Client> {
    let request = cri::AttachRequest {
        container_id: container.id.clone(),
        tty,
        stdin: true,
        stdout: true,
        stderr: !tty,
    };
    let answer = container.daemon.runtime().attach(request).await?;
    Client::connect(&answer.into_inner().url, "v5.channel.k8s.io").await
}

async fn exec_with_all_streams(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    exec_with_all_streams_of(&daemon.run(&["sleep", "1000"]).await?).await
}

pub async fn exec_with_all_streams_of(container: &Container) -> Result<()> {
    let mut client = exec(container, "cat; echo complaint >&2; exit 3", false).await?;
    client.send(STDIN, b"some words\n").await?;
    client.send(CLOSE, &[STDIN]).await?;
    let [stdout, stderr, status] = client.rest().await?;
    assert_eq!(
        (stdout.as_str(), stderr.as_str()),
        ("some words\n", "complaint\n")
    );
    let status: serde_json::Value = serde_json::from_str(&status)?;
    assert_eq!(status["reason"], "NonZeroExitCode");
    assert_eq!(status["details"]["causes"][0]["message"], "3");
    // A background child that keeps the streams does not hold the session; all that was written comes.
    let script = "sleep 1000 & i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done";
    let [stdout, _, status] = exec(container, script, false).await?.rest().await?;
    assert_eq!(stdout.lines().count(), 20_000);
    assert!(status.contains("Success"), "{status}");
    Ok(())
}

async fn exec_on_a_terminal(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    exec_on_a_terminal_of(&daemon.run(&["sleep", "1000"]).await?).await
}

pub async fn exec_on_a_terminal_of(container: &Container) -> Result<()> {
    // In gVisor a terminal of the host's is one without a name.
    let tell = match gvisor() {
        true => "test -t 0 && echo /dev/pts/unknown",
        false => "tty",
    };
    let script = format!("{tell}; echo $TERM; read a; stty size; exit 7");
    let mut client = exec(container, &script, true).await?;
    let text = client.until(STDOUT, "xterm\r\n").await?;
    assert!(text.starts_with("/dev/pts/"), "{text}");
    client
        .send(RESIZE, br#"{"Width": 101, "Height": 33}"#)
        .await?;
    client.send(STDIN, b"go\n").await?;
    let [stdout, _, status] = client.rest().await?;
    assert_eq!(stdout, "go\r\n33 101\r\n");
    assert!(status.contains("\"7\""), "{status}");
    Ok(())
}

/// What is typed after a resize finds the terminal with its new size.
async fn sizes_and_words_keep_their_order(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    let script = "stty -echo; echo ready; while read a; do stty size; done";
    let mut client = exec(&container, script, true).await?;
    client.until(STDOUT, "ready\r\n").await?;
    for width in 100..150 {
        let size = format!(r#"{{"Width": {width}, "Height": 33}}"#);
        client.send(RESIZE, size.as_bytes()).await?;
        client.send(STDIN, b"\n").await?;
        let told = client.until(STDOUT, "\r\n").await?;
        assert_eq!(told, format!("33 {width}\r\n"));
    }
    Ok(())
}

async fn an_exec_ends_with_its_client(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = daemon.run(&["sleep", "1000"]).await?;
    let mut client = exec(&container, "echo began; sleep 1001 & sleep 1002", false).await?;
    client.until(STDOUT, "began\n").await?;
    drop(client);
    // By name: what made the container may be on its way out of the cgroup still, and must not be counted.
    eventually("the command to end", seconds(10), || async {
        if gvisor() {
            let left = crate::exec::running(&container).await?;
            return Ok(
                (!left.contains("sleep 1001") && !left.contains("sleep 1002")).then_some(()),
            );
        }
        let left: Vec<_> = container.processes().into_iter().map(command).collect();
        Ok((left == ["sleep 1000 "]).then_some(()))
    })
    .await
}

/// The command line of a process, a space behind each word.
fn command(pid: i32) -> String {
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&words).replace('\0', " ")
}

async fn attach_and_the_end_of_input(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    attach_until_the_end_of_input(&daemon.pod(|_| {}).await?).await
}

pub async fn attach_until_the_end_of_input(pod: &Pod) -> Result<()> {
    let container = pod
        .run(&["sh", "-c", "cat; echo over"], |c| {
            (c.stdin, c.stdin_once) = (true, true);
        })
        .await?;
    let mut client = attach(&container, false).await?;
    client.send(STDIN, b"some words\n").await?;
    client.until(STDOUT, "some words\n").await?;
    client.send(CLOSE, &[STDIN]).await?;
    let [stdout, ..] = client.rest().await?;
    assert_eq!(stdout, "over\n");
    assert_eq!(container.exited().await?.exit_code, 0);
    // The log has it, too.
    assert_eq!(container.stdout()?, "some words\nover\n");
    Ok(())
}

async fn attach_to_a_terminal(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    attach_to_a_terminal_of(&daemon.pod(|_| {}).await?).await
}

pub async fn attach_to_a_terminal_of(pod: &Pod) -> Result<()> {
    let daemon = &pod.daemon;
    let script = "tty; while read a; do echo got $a; done";
    let container = pod
        .run(&["sh", "-c", script], |c| (c.stdin, c.tty) = (true, true))
        .await?;
    for words in ["first", "second"] {
        let mut client = attach(&container, true).await?;
        client.send(STDIN, format!("{words}\n").as_bytes()).await?;
        client.until(STDOUT, &format!("got {words}\r\n")).await?;
    }
    // Two see the same.
    let mut clients = [
        attach(&container, true).await?,
        attach(&container, true).await?,
    ];
    // Each is attached when it sees what it typed itself.
    for client in &mut clients {
        client.send(STDIN, b"here\n").await?;
        client.until(STDOUT, "got here\r\n").await?;
    }
    clients[0].send(STDIN, b"both\n").await?;
    for client in &mut clients {
        client.until(STDOUT, "got both\r\n").await?;
    }
    // A new daemon finds the terminal again.
    drop(clients);
    daemon.kill(nix::sys::signal::Signal::SIGKILL).await?;
    daemon.launch().await?;
    let mut client = attach(&container, true).await?;
    client.send(STDIN, b"later\n\x04").await?;
    client.until(STDOUT, "got later\r\n").await?;
    client.rest().await?;
    assert_eq!(container.exited().await?.exit_code, 0);
    Ok(())
}

async fn attach_after_another(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.run(&["cat"], |c| c.stdin = true).await?;
    // Without stdin_once the input outlives those who used it.
    for words in ["first\n", "second\n"] {
        let mut client = attach(&container, false).await?;
        client.send(STDIN, words.as_bytes()).await?;
        client.until(STDOUT, words).await?;
        client.send(CLOSE, &[STDIN]).await?;
    }
    assert_eq!(
        container.status().await?.state(),
        cri::ContainerState::ContainerRunning
    );
    Ok(())
}

async fn ports_are_forwarded(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    forward(&daemon.pod(config::own_network).await?).await
}

/// All kinds of sessions.
async fn in_a_user_namespace(env: Env) -> Result<()> {
    let daemon = crate::userns::daemon(&env).await?;
    let pod = daemon.pod(crate::userns::mapped).await?;
    let container = pod
        .run(&["sh", "-c", "while read a; do echo got $a; done"], |c| {
            (c.stdin, c.tty) = (true, true);
        })
        .await?;
    let mut client = exec(&container, "id -u; cat /proc/self/uid_map; cat", false).await?;
    client.send(STDIN, b"some words\n").await?;
    client.send(CLOSE, &[STDIN]).await?;
    let [stdout, stderr, status] = client.rest().await?;
    let words: Vec<_> = stdout.split_whitespace().collect();
    assert_eq!(words, ["0", "0", "131072", "65536", "some", "words"]);
    assert!(
        stderr.is_empty() && status.contains("Success"),
        "{stderr} {status}"
    );
    // Its terminal is its own root's.
    let script = "stat -c %u $(tty); stat -c %u /dev/console; read a; echo said $a; exit 7";
    let mut client = exec(&container, script, true).await?;
    client.until(STDOUT, "0\r\n0\r\n").await?;
    client.send(STDIN, b"go\n").await?;
    let [stdout, _, status] = client.rest().await?;
    assert!(
        stdout.ends_with("said go\r\n") && status.contains("\"7\""),
        "{stdout} {status}"
    );
    let mut client = attach(&container, true).await?;
    client.send(STDIN, b"it\n").await?;
    client.until(STDOUT, "got it\r\n").await?;
    drop(client);
    container.remove().await?;
    forward(&pod).await
}

/// Forwards two ports of a pod, one of which nobody listens at.
pub async fn forward(pod: &Pod) -> Result<()> {
    let container = pod
        .run(
            &[
                "sh",
                "-c",
                "mkfifo /tmp/p && nc -l -p 8080 </tmp/p | cat >/tmp/p",
            ],
            |_| {},
        )
        .await?;
    eventually("nc to listen", seconds(10), || async {
        let exec = container.exec(&["netstat", "-ltn"]).await?;
        Ok(exec.stdout.contains(":8080").then_some(()))
    })
    .await?;
    let request = cri::PortForwardRequest {
        pod_sandbox_id: pod.id.clone(),
        port: vec![8080, 8081],
    };
    let mut runtime = pod.daemon.runtime();
    let answer = runtime.port_forward(request).await?.into_inner();
    let mut client = Client::connect(&answer.url, "v4.channel.k8s.io").await?;
    // Two channels for each port, data and errors, each of which names the port first.
    client.send(0, b"through the pod's network").await?;
    let (mut echoed, mut error) = (Vec::new(), Vec::new());
    while !echoed.ends_with(b"network") || error.len() <= 2 {
        match client.next().await?.context("the end")? {
            (0, bytes) => echoed.extend(bytes),
            (3, bytes) => error.extend(bytes),
            _ => {}
        }
    }
    assert_eq!(
        echoed,
        [&8080u16.to_le_bytes()[..], b"through the pod's network"].concat()
    );
    let error = String::from_utf8_lossy(&error[2..]).into_owned();
    assert!(
        error.contains("8081") && error.contains("refused"),
        "{error}"
    );
    Ok(())
}

async fn refusals(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.run(&["true"], |_| {}).await?;
    container.exited().await?;
    let code = async |id: &str, cmd: &[&str], stdout: bool| -> Result<Code> {
        let request = cri::ExecRequest {
            container_id: id.to_owned(),
            cmd: cmd.iter().map(|c| (*c).to_owned()).collect(),
            stdout,
            ..Default::default()
        };
        let answer = daemon.runtime().exec(request).await;
        Ok(answer
            .map(|a| a.into_inner().url)
            .expect_err("a URL")
            .code())
    };
    assert_eq!(code("nobody", &["true"], true).await?, Code::NotFound);
    assert_eq!(
        code(&container.id, &["true"], true).await?,
        Code::FailedPrecondition
    );
    let running = pod.sleeper().await?;
    assert_eq!(code(&running.id, &[], true).await?, Code::InvalidArgument);
    assert_eq!(
        code(&running.id, &["true"], false).await?,
        Code::InvalidArgument
    );
    // A command that can't be run says so, with its code.
    let mut client = exec(&running, "exec /no/such/thing", false).await?;
    let [_, stderr, status] = client.rest().await?;
    assert!(stderr.contains("/no/such/thing"), "{stderr}");
    assert!(status.contains("127"), "{status}");
    pod.stop().await?;
    let request = cri::PortForwardRequest {
        pod_sandbox_id: pod.id.clone(),
        port: vec![80],
    };
    let error = daemon.runtime().port_forward(request).await;
    let error = error.map(|a| a.into_inner().url).expect_err("a URL");
    assert_eq!(error.code(), Code::FailedPrecondition);
    Ok(())
}
