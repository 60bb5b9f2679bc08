//! A WebSocket client.

use super::LIMIT;
use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

pub struct Client {
    pub socket: WebSocketStream<TcpStream>,
    /// What came on each channel.
    pub got: Vec<Vec<u8>>,
    pub close: Option<u16>,
}

pub async fn try_connect(url: &str, protocol: &str) -> Result<Client, Error> {
    let mut request = url.replace("http://", "ws://").into_client_request()?;
    if !protocol.is_empty() {
        let value = protocol.parse().unwrap();
        request
            .headers_mut()
            .insert("sec-websocket-protocol", value);
    }
    let host = url.split('/').nth(2).unwrap();
    let socket = TcpStream::connect(host).await.unwrap();
    let (socket, _) = client_async(request, socket).await?;
    Ok(Client {
        socket,
        got: vec![Vec::new(); 256],
        close: None,
    })
}

impl Client {
    pub async fn connect(url: &str, protocol: &str) -> Self {
        try_connect(url, protocol).await.unwrap()
    }

    pub async fn send(&mut self, channel: u8, data: &[u8]) {
        let message = [&[channel][..], data].concat();
        self.socket
            .send(Message::Binary(message.into()))
            .await
            .unwrap();
    }

    /// Reads a message. False at the end of the connection.
    pub async fn step(&mut self) -> bool {
        match timeout(LIMIT, self.socket.next())
            .await
            .expect("nothing comes")
        {
            Some(Ok(Message::Binary(bytes))) => {
                self.got[usize::from(bytes[0])].extend_from_slice(&bytes[1..]);
                true
            }
            Some(Ok(Message::Close(frame))) => {
                self.close = frame.map(|frame| frame.code.into());
                true
            }
            Some(Ok(_)) => true,
            None | Some(Err(_)) => false,
        }
    }

    pub async fn finish(&mut self) {
        while self.step().await {}
    }

    pub fn text(&self, channel: usize) -> String {
        String::from_utf8(self.got[channel].clone()).unwrap()
    }
}
