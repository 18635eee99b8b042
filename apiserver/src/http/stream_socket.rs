//! A response's body through a WebSocket, for clients that read `log` or watch that way: every piece of a log and every
//! event of a watch is a message, and what the client sends is ignored. Carries bytes in one direction only; `upgrade` joins whole connections.

use apimachinery::status::{Result, Status};
use base64::Engine;
use bytes::{Buf, Bytes};
use futures::{SinkExt, StreamExt};
use http::header::{
    CONNECTION, CONTENT_TYPE, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, UPGRADE,
};
use http::{HeaderMap, HeaderValue, StatusCode};
use http_body_util::BodyExt;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_util::sync::CancellationToken;

use super::{BoxError, Request, Response, full};

/// Nothing that a client says here is of interest, so it need not be long.
const MAX_MESSAGE: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Binary,
    Base64,
    /// Events of a watch: lines of JSON, or frames behind their length.
    Events,
}

impl Form {
    /// A piece of the body as messages. Events are never split between pieces.
    fn messages(self, data: Bytes, is_json: bool) -> Vec<Message> {
        match self {
            Self::Binary => vec![Message::Binary(data)],
            Self::Base64 => vec![Message::Text(base64::engine::general_purpose::STANDARD.encode(&data).into())],
            Self::Events if is_json => {
                let lines = data.split_inclusive(|byte| *byte == b'\n');
                lines.map(|line| Message::Text(String::from_utf8_lossy(line).into_owned().into())).collect()
            }
            Self::Events => frames(data),
        }
    }
}

/// Frames without the four bytes that tell their lengths.
fn frames(mut data: Bytes) -> Vec<Message> {
    let mut messages = Vec::new();
    while data.len() > 4 {
        let length = data.get_u32() as usize;
        messages.push(Message::Binary(data.split_to(length.min(data.len()))));
    }
    messages
}

/// A client that has asked for a WebSocket and can be given one.
pub struct Wanted {
    upgrade: OnUpgrade,
    accept: String,
    protocol: Option<&'static str>,
    form: Form,
}

/// `None` for a client that wants a plain answer.
pub fn wanted(request: &mut Request) -> Result<Option<Wanted>> {
    let Some(accept) = accept(request.headers())? else { return Ok(None) };
    let (protocol, form) = protocol(request.headers())?;
    Ok(Some(Wanted { upgrade: hyper::upgrade::on(request), accept, protocol, form }))
}

/// The same for a watch, which speaks no protocol of its own.
pub fn wanted_for_events(request: &mut Request) -> Result<Option<Wanted>> {
    let Some(accept) = accept(request.headers())? else { return Ok(None) };
    Ok(Some(Wanted { upgrade: hyper::upgrade::on(request), accept, protocol: None, form: Form::Events }))
}

/// What proves to the client that it was understood. `None`: it does not ask for a WebSocket.
fn accept(headers: &HeaderMap) -> Result<Option<String>> {
    let is_socket = headers.get(UPGRADE).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"websocket"));
    if !is_socket || !super::upgrade::wants_upgrade(headers) {
        return Ok(None);
    }
    let key = headers.get(SEC_WEBSOCKET_KEY).ok_or_else(|| Status::bad_request("missing or bad Sec-WebSocket-Key"))?;
    Ok(Some(derive_accept_key(key.as_bytes())))
}

/// The first offered protocol that is known; a client that offers none gets plain bytes.
fn protocol(headers: &HeaderMap) -> Result<(Option<&'static str>, Form)> {
    let lines = headers.get_all(SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|value| value.to_str().ok());
    let offered: Vec<&str> = lines.flat_map(|line| line.split(',')).map(str::trim).collect();
    if offered.is_empty() {
        return Ok((None, Form::Binary));
    }
    let known = offered.iter().find_map(|name| match *name {
        "binary.k8s.io" => Some((Some("binary.k8s.io"), Form::Binary)),
        "base64.binary.k8s.io" => Some((Some("base64.binary.k8s.io"), Form::Base64)),
        _ => None,
    });
    known.ok_or_else(|| {
        Status::bad_request(format!(
            "requested protocol(s) are not supported: {offered:?}; supports binary.k8s.io, base64.binary.k8s.io"
        ))
    })
}

/// Switches protocols and sends the body of `response` from then on.
pub fn send(wanted: Wanted, response: Response, shutdown: CancellationToken) -> Response {
    let Wanted { upgrade, accept, protocol, form } = wanted;
    tokio::spawn(async move {
        tokio::select! {
            outcome = copy(upgrade, response, form) => if let Err(error) = outcome {
                tracing::debug!(%error, "a stream through a WebSocket broke");
            },
            () = shutdown.cancelled() => {}
        }
    });
    let mut answer = Response::new(full(""));
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    // Base64 text is a valid header.
    headers.extend(HeaderValue::from_str(&accept).ok().map(|value| (SEC_WEBSOCKET_ACCEPT, value)));
    headers.extend(protocol.map(|name| (SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(name))));
    answer
}

async fn copy(upgrade: OnUpgrade, response: Response, form: Form) -> std::result::Result<(), BoxError> {
    let config = WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE)).max_frame_size(Some(MAX_MESSAGE));
    let io = TokioIo::new(upgrade.await?);
    let (mut sink, mut source) = WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await.split();
    let is_json =
        response.headers().get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
    let mut body = response.into_body();
    let outward = async {
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame?.into_data() else { continue };
            for message in form.messages(data, is_json) {
                sink.feed(message).await?;
            }
            sink.flush().await?;
        }
        let normal = CloseFrame { code: CloseCode::Normal, reason: "".into() };
        sink.send(Message::Close(Some(normal))).await?;
        Ok::<(), BoxError>(())
    };
    let inward = async { while let Some(Ok(_)) = source.next().await {} };
    tokio::select! {
        outcome = outward => outcome,
        // The client has gone.
        () = inward => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_messages_of_their_own() {
        let lines = Form::Events.messages(Bytes::from_static(b"{\"a\":1}\n{\"b\":2}\n"), true);
        assert_eq!(lines, [Message::Text("{\"a\":1}\n".into()), Message::Text("{\"b\":2}\n".into())]);
        let frames = Form::Events.messages(Bytes::from_static(b"\0\0\0\x01a\0\0\0\x02bc"), false);
        assert_eq!(frames, [Message::Binary("a".into()), Message::Binary("bc".into())]);
    }

    #[test]
    fn the_first_known_protocol_is_taken() {
        for (offered, want) in [
            (None, Some((None, Form::Binary))),
            (Some("binary.k8s.io"), Some((Some("binary.k8s.io"), Form::Binary))),
            (Some("x, base64.binary.k8s.io"), Some((Some("base64.binary.k8s.io"), Form::Base64))),
            (Some("v5.channel.k8s.io"), None),
        ] {
            let mut headers = HeaderMap::new();
            headers.extend(offered.map(|line| (SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(line))));
            assert_eq!(protocol(&headers).ok(), want, "{offered:?}");
        }
    }
}
