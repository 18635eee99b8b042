//! Passing a request on to another server and its answer back, streaming both ways. When the other side switches
//! protocols (WebSocket, SPDY), the two connections are joined byte for byte; nothing here understands the protocols.

use http::header::{
    AUTHORIZATION, CONNECTION, HOST, HeaderName, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, SEC_WEBSOCKET_PROTOCOL, TE,
    TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderMap, HeaderValue, StatusCode, Uri};
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use tokio_util::sync::CancellationToken;

use super::outbound::Outbound;
use super::{Request, Response, full};

/// Names of the headers that only concern one hop.
const HOP_BY_HOP: [HeaderName; 9] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// Whether the client asks to switch protocols.
pub fn wants_upgrade(headers: &HeaderMap) -> bool {
    let connection = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let asks = connection.flat_map(|line| line.split(',')).any(|token| token.trim().eq_ignore_ascii_case("upgrade"));
    asks && headers.contains_key(UPGRADE)
}

/// Sends the request to `target` and answers what the backend answers. Credentials of the client stay here.
pub async fn forward(
    client: &Outbound,
    target: Uri,
    mut request: Request,
    shutdown: &CancellationToken,
) -> Result<Response, hyper_util::client::legacy::Error> {
    let upgrade = wants_upgrade(request.headers()).then(|| request.headers().get(UPGRADE).cloned()).flatten();
    let from_client = upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
    let (mut parts, body) = request.into_parts();
    strip(&mut parts.headers);
    if let Some(protocol) = upgrade {
        parts.headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        parts.headers.insert(UPGRADE, protocol);
    }
    let mut outgoing = Request::new(body);
    *outgoing.method_mut() = parts.method;
    *outgoing.uri_mut() = target;
    *outgoing.headers_mut() = parts.headers;
    let mut answer = client.request(outgoing).await?;
    if answer.status() == StatusCode::SWITCHING_PROTOCOLS
        && let Some(from_client) = from_client
    {
        join(from_client, hyper::upgrade::on(&mut answer), shutdown.clone());
        let (parts, _) = answer.into_parts();
        return Ok(Response::from_parts(parts, full("")));
    }
    let (mut parts, body) = answer.into_parts();
    for name in &HOP_BY_HOP {
        parts.headers.remove(name);
    }
    parts.version = http::Version::default();
    Ok(Response::from_parts(parts, body.map_err(Into::into).boxed_unsync()))
}

/// What went wrong on the way to a backend, in the words that users of upstream search for.
pub fn reach_error(target: &str, error: &(dyn std::error::Error + 'static)) -> String {
    let address =
        target.split_once("://").map_or(target, |(_, rest)| rest).split(['/', '?']).next().unwrap_or_default();
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return match io.kind() {
                std::io::ErrorKind::ConnectionRefused => format!("dial tcp {address}: connect: connection refused"),
                std::io::ErrorKind::HostUnreachable => format!("dial tcp {address}: connect: no route to host"),
                std::io::ErrorKind::TimedOut => format!("dial tcp {address}: i/o timeout"),
                _ => format!("dial tcp {address}: {io}"),
            };
        }
        cause = error.source();
    }
    apimachinery::process::error_chain(error)
}

/// Copies bytes both ways until either side is done, off the request's task: the answer must go out first.
fn join(client: hyper::upgrade::OnUpgrade, backend: hyper::upgrade::OnUpgrade, shutdown: CancellationToken) {
    tokio::spawn(async move {
        let copy = async {
            let (client, backend) = tokio::try_join!(client, backend)?;
            tokio::io::copy_bidirectional(&mut TokioIo::new(client), &mut TokioIo::new(backend)).await?;
            Ok::<(), super::BoxError>(())
        };
        tokio::select! {
            outcome = copy => if let Err(error) = outcome {
                tracing::debug!(%error, "an upgraded connection broke");
            },
            () = shutdown.cancelled() => {}
        }
    });
}

/// Takes out what is for this server only: hop-by-hop headers, credentials, impersonation.
fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|line| line.split(','))
        .filter_map(|token| token.trim().parse().ok())
        .collect();
    for name in HOP_BY_HOP.iter().chain(&named).chain(&[HOST, AUTHORIZATION]) {
        headers.remove(name);
    }
    let impersonation: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with("impersonate-")).cloned().collect();
    for name in impersonation {
        headers.remove(name);
    }
    hide_token_protocol(headers);
}

/// Browsers send their bearer token as a WebSocket protocol; the backend must not see it.
fn hide_token_protocol(headers: &mut HeaderMap) {
    let Some(line) = headers.get(SEC_WEBSOCKET_PROTOCOL).and_then(|value| value.to_str().ok()) else { return };
    let kept: Vec<&str> =
        line.split(',').map(str::trim).filter(|p| !p.starts_with("base64url.bearer.authorization.k8s.io.")).collect();
    let kept = kept.join(", ");
    match HeaderValue::from_str(&kept) {
        Ok(value) if !kept.is_empty() => headers.insert(SEC_WEBSOCKET_PROTOCOL, value),
        _ => headers.remove(SEC_WEBSOCKET_PROTOCOL),
    };
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::super::outbound::{Identity, Trust, outbound};
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn upgrades_are_asked_for_by_two_headers() {
        assert!(wants_upgrade(&headers(&[("connection", "keep-alive, Upgrade"), ("upgrade", "SPDY/3.1")])));
        assert!(!wants_upgrade(&headers(&[("connection", "upgrade")])));
        assert!(!wants_upgrade(&headers(&[("upgrade", "websocket")])));
    }

    #[test]
    fn credentials_stay_here() {
        let mut all = headers(&[
            ("authorization", "Bearer x"),
            ("impersonate-user", "y"),
            ("connection", "x-hop, close"),
            ("x-hop", "1"),
            ("accept", "*/*"),
            ("sec-websocket-protocol", "v5.channel.k8s.io, base64url.bearer.authorization.k8s.io.YQ"),
        ]);
        strip(&mut all);
        assert_eq!(all, headers(&[("accept", "*/*"), ("sec-websocket-protocol", "v5.channel.k8s.io")]));
    }

    /// A backend that switches protocols and then sends back what it gets.
    async fn echo_backend() -> std::net::SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            assert!(!String::from_utf8_lossy(&head).to_lowercase().contains("authorization"));
            let answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n";
            stream.write_all(answer.as_bytes()).await.unwrap();
            let (mut from, mut to) = stream.split();
            tokio::io::copy(&mut from, &mut to).await.unwrap();
        });
        address
    }

    /// A server that passes its one connection's requests on to `backend`.
    async fn front(backend: std::net::SocketAddr) -> std::net::SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let client = outbound(&Identity::new(Trust::Anyone), None, Duration::from_secs(5)).unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let service = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
                let client = client.clone();
                async move {
                    let request = request.map(|body| body.map_err(Into::into).boxed_unsync());
                    let target = format!("http://{backend}/exec").parse().unwrap();
                    forward(&client, target, request, &CancellationToken::new()).await
                }
            });
            let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            connection.with_upgrades().await.unwrap();
        });
        address
    }

    #[tokio::test]
    async fn bytes_pass_both_ways_after_an_upgrade() {
        apimachinery::process::install_crypto_provider();
        let mut client = tokio::net::TcpStream::connect(front(echo_backend().await).await).await.unwrap();
        let request = "GET /x HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: echo\r\nAuthorization: Bearer secret\r\n\r\n";
        client.write_all(request.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(client.read_u8().await.unwrap());
        }
        assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
        client.write_all(b"hello").await.unwrap();
        let mut echo = [0; 5];
        client.read_exact(&mut echo).await.unwrap();
        assert_eq!(&echo, b"hello");
        client.shutdown().await.unwrap();
        assert_eq!(client.read(&mut echo).await.unwrap(), 0, "the end of one side ends the other");
    }
}
