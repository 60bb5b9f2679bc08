//! A backend whose commands are a few lines of Rust.

use super::noise;
use slipway_stream::{
    AttachRequest, Backend, ExecRequest, ExitStatus, PortStream, SessionIo, StreamError,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::TcpStream;
use tokio::sync::Notify;

#[derive(Clone, Default)]
pub struct Fake {
    /// Bytes that "produce" got rid of.
    pub produced: Arc<AtomicUsize>,
    /// Notified when "hang" saw its client go.
    pub gone: Arc<Notify>,
}

impl Backend for Fake {
    async fn exec(&self, request: ExecRequest, io: SessionIo) -> Result<ExitStatus, StreamError> {
        let SessionIo {
            mut stdin,
            mut stdout,
            mut stderr,
            mut resizes,
            gone,
        } = io;
        let argument = request.command.get(1).map(String::as_str);
        let number = argument.and_then(|a| a.parse().ok()).unwrap_or(0);
        match request.command[0].as_str() {
            "cat" => {
                copy(stdin.as_mut().unwrap(), stdout.as_mut().unwrap()).await?;
            }
            "both" => {
                stdout.as_mut().unwrap().write_all(b"to stdout").await?;
                match &mut stderr {
                    Some(stderr) => stderr.write_all(b"to stderr").await?,
                    None => stdout.as_mut().unwrap().write_all(b", to stderr").await?,
                }
            }
            "produce" => {
                let mut out = stdout.unwrap();
                for chunk in noise(number).chunks(10_000) {
                    out.write_all(chunk).await?;
                    self.produced.fetch_add(chunk.len(), Ordering::Relaxed);
                }
            }
            "exit" => return Ok(ExitStatus(number as i32)),
            "sizes" => {
                let mut out = stdout.unwrap();
                while let Some(size) = resizes.next().await {
                    let text = format!("{}x{}\n", size.width, size.height);
                    out.write_all(text.as_bytes()).await?;
                    if size.width == 0 {
                        break;
                    }
                }
            }
            "hang" => {
                gone.cancelled().await;
                self.gone.notify_one();
            }
            // Ends at once, and somebody keeps writing.
            "leave" => {
                let mut out = stdout.unwrap();
                out.write_all(b"before").await?;
                tokio::spawn(async move {
                    while out.write_all(&[b'x'; 1000]).await.is_ok() {
                        tokio::task::yield_now().await;
                    }
                });
            }
            "stuck" => std::future::pending().await,
            other => return Err(StreamError::NotFound(format!("no command {other:?}"))),
        }
        Ok(ExitStatus(0))
    }

    async fn attach(&self, request: AttachRequest, io: SessionIo) -> Result<(), StreamError> {
        if request.container_id == "gone" {
            return Err(StreamError::NotRunning("container gone has ended".into()));
        }
        let mut stdout = io.stdout.unwrap();
        stdout.write_all(b"attached: ").await?;
        if let Some(mut stdin) = io.stdin {
            let mut byte = [0];
            while stdin.read(&mut byte).await? > 0 {
                stdout.write_all(&byte).await?;
            }
        }
        Ok(())
    }

    async fn port_forward(&self, _: &str, port: u16) -> Result<PortStream, StreamError> {
        let connection = TcpStream::connect(("127.0.0.1", port)).await?;
        Ok(Box::new(connection))
    }
}
