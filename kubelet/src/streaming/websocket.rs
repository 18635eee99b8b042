//! Accepting WebSocket clients.

use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use http::header::{CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, UPGRADE};
use http::{HeaderValue, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{self, Message};

use super::StreamError;
use crate::server::body::{self, Body};

pub type Socket = WebSocketStream<TokioIo<Upgraded>>;
pub type Sink = SplitSink<Socket, Message>;
pub type Source = SplitStream<Socket>;

/// Larger messages than this are not sent by any client of ours: kubectl uses 32 KiB.
const MAX_MESSAGE: usize = 1 << 20;
const TUNNEL_BUFFER: usize = 64 * 1024;

/// The answer that accepts `protocol`, and the promise of the socket, which is kept once the answer has been sent.
pub fn accept(request: &mut Request<Incoming>, protocol: &str) -> Result<(Response<Body>, OnUpgrade), StreamError> {
    let key = request.headers().get(SEC_WEBSOCKET_KEY).ok_or(StreamError::NoUpgrade)?;
    let accepted = derive_accept_key(key.as_bytes());
    let mut response = Response::new(body::full(bytes::Bytes::new()));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    let value = |text: &str| HeaderValue::from_str(text).map_err(|_| StreamError::NoUpgrade);
    headers.insert(SEC_WEBSOCKET_ACCEPT, value(&accepted)?);
    headers.insert(SEC_WEBSOCKET_PROTOCOL, value(protocol)?);
    Ok((response, hyper::upgrade::on(request)))
}

pub async fn socket(upgraded: Upgraded) -> (Sink, Source) {
    let config = WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE))
        .read_buffer_size(16 * 1024)
        .write_buffer_size(0);
    WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config)).await.split()
}

/// Says that all is said. Clients take a closing without the normal code for a broken connection.
pub async fn end(sink: &mut Sink) -> Result<(), tungstenite::Error> {
    let frame = CloseFrame { code: CloseCode::Normal, reason: "".into() };
    sink.send(Message::Close(Some(frame))).await
}

/// The bytes inside a socket's binary messages as one byte stream, for protocols tunnelled through it.
pub async fn tunnel(upgraded: Upgraded) -> DuplexStream {
    let (mut sink, mut source) = socket(upgraded).await;
    let (ours, theirs) = tokio::io::duplex(TUNNEL_BUFFER);
    let (mut read, mut write) = tokio::io::split(theirs);
    tokio::spawn(async move {
        let inward = async {
            while let Some(message) = source.next().await {
                match message? {
                    Message::Binary(data) => write.write_all(&data).await?,
                    Message::Close(_) => break,
                    _ => {}
                }
            }
            Ok::<_, tungstenite::Error>(())
        };
        let outward = async {
            let mut buffer = bytes::BytesMut::new();
            loop {
                buffer.reserve(16 * 1024);
                if read.read_buf(&mut buffer).await? == 0 {
                    break;
                }
                sink.send(Message::Binary(buffer.split().freeze())).await?;
            }
            end(&mut sink).await
        };
        let ended = tokio::select! {
            ended = inward => ended,
            ended = outward => ended,
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "tunnel ended");
        }
    });
    ours
}
