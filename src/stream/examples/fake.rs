//! A streaming server with a backend that needs no container: commands run on this machine, ports
//! are this machine's. To try real clients against it:
//!
//! ```sh
//! cargo run -p slipway-stream --example fake -- exec cat        # stdin, stdout, stderr
//! cargo run -p slipway-stream --example fake -- forward 8080
//! ```
//!
//! prints a URL that works once, and a new one for each line on stdin.

use slipway_stream::{
    AttachRequest, Backend, Config, ExecRequest, ExitStatus, PortStream, SessionIo, StreamError,
    StreamServer, TlsFiles,
};
use std::process::Stdio;
use std::sync::Arc;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, copy};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

struct ThisMachine;

impl Backend for ThisMachine {
    async fn exec(&self, request: ExecRequest, io: SessionIo) -> Result<ExitStatus, StreamError> {
        let SessionIo {
            stdin,
            stdout,
            stderr,
            mut resizes,
            gone,
        } = io;
        let mut command = Command::new(&request.command[0]);
        command
            .args(&request.command[1..])
            .kill_on_drop(true)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(if request.stderr {
                Stdio::piped()
            } else {
                Stdio::null()
            });
        let mut child = command.spawn()?;
        let input = child.stdin.take();
        tokio::spawn(async move {
            if let (Some(mut from), Some(mut to)) = (stdin, input) {
                let _ = copy(&mut from, &mut to).await;
            }
        });
        let watch = tokio::spawn(async move {
            while let Some(size) = resizes.next().await {
                eprintln!("terminal: {} x {}", size.width, size.height);
            }
        });
        let (output, errors) = (child.stdout.take(), child.stderr.take());
        let out = async {
            if let (Some(mut from), Some(mut to)) = (output, stdout) {
                let _ = copy(&mut from, &mut to).await;
            }
        };
        let err = async {
            if let (Some(mut from), Some(mut to)) = (errors, stderr) {
                let _ = copy(&mut from, &mut to).await;
            }
        };
        let work = async {
            tokio::join!(out, err);
            child.wait().await
        };
        let result = tokio::select! {
            status = work => Ok(ExitStatus(status?.code().unwrap_or(137))),
            () = gone.cancelled() => Err(StreamError::Failed("the client has gone".into())),
        };
        watch.abort();
        eprintln!("exec ended: {result:?}");
        result
    }

    async fn attach(&self, request: AttachRequest, io: SessionIo) -> Result<(), StreamError> {
        if let Some(mut stdout) = io.stdout {
            stdout.write_all(request.container_id.as_bytes()).await?;
        }
        Ok(())
    }

    async fn port_forward(&self, _: &str, port: u16) -> Result<PortStream, StreamError> {
        Ok(Box::new(TcpStream::connect(("127.0.0.1", port)).await?))
    }
}

#[tokio::main]
async fn main() -> Result<(), StreamError> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let tls = std::env::var_os("FAKE_TLS").map(|directory| {
        let directory = std::path::PathBuf::from(directory);
        TlsFiles {
            certificate: directory.join("tls.crt"),
            key: directory.join("tls.key"),
        }
    });
    let config = Config {
        tls,
        ..Config::default()
    };
    let server = Arc::new(StreamServer::new(config, ThisMachine).await?);
    let shutdown = CancellationToken::new();
    let serving = {
        let (server, shutdown) = (server.clone(), shutdown.clone());
        tokio::spawn(async move { server.serve(shutdown).await })
    };
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    loop {
        let url = match arguments.split_first() {
            Some((what, ports)) if what == "forward" => {
                let ports = ports.iter().filter_map(|port| port.parse().ok()).collect();
                server.port_forward_url("this-machine", ports)?
            }
            Some((what, command)) if what == "exec" || what == "tty" => {
                server.exec_url(ExecRequest {
                    container_id: "this-machine".into(),
                    command: command.to_vec(),
                    tty: what == "tty",
                    stdin: true,
                    stdout: true,
                    stderr: what == "exec",
                })?
            }
            _ => server.attach_url(AttachRequest {
                container_id: "this-machine".into(),
                stdout: true,
                ..AttachRequest::default()
            })?,
        };
        println!("{url}");
        if lines.next_line().await?.is_none() {
            break;
        }
    }
    shutdown.cancel();
    let _ = serving.await;
    Ok(())
}
