//! The HTTP/1.1 upgrade towards the container runtime's streaming server, and passing an upgraded session's bytes.

use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, HOST, HeaderName, UPGRADE};
use http::{Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::StreamError;
use crate::server::body::{self, Body};

/// What a session's two ends negotiate with; everything else in the client's request is between it and us.
const NEGOTIATION: [HeaderName; 6] = [
    UPGRADE,
    HeaderName::from_static("x-stream-protocol-version"),
    http::header::SEC_WEBSOCKET_KEY,
    http::header::SEC_WEBSOCKET_VERSION,
    http::header::SEC_WEBSOCKET_PROTOCOL,
    http::header::SEC_WEBSOCKET_ACCEPT,
];
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Sends an upgrade request to `url` with the negotiation headers of `like` and returns the answer, upgraded or not.
pub async fn request<B>(url: &str, like: &Request<B>) -> Result<Response<Incoming>, StreamError> {
    let bad_address = || StreamError::Address(url.to_owned());
    let uri: Uri = url.parse().map_err(|_| bad_address())?;
    let authority = uri.authority().ok_or_else(bad_address)?.clone();
    let connect = TcpStream::connect((authority.host(), authority.port_u16().unwrap_or(80)));
    let stream = match tokio::time::timeout(CONNECT_LIMIT, connect).await {
        Ok(connected) => connected,
        Err(elapsed) => Err(elapsed.into()),
    };
    let failed = |source| StreamError::Connect { address: authority.to_string(), source };
    let stream = stream.map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "connection to the container runtime's streaming server ended");
        }
    });
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let mut request = Request::builder().method(like.method().clone()).uri(path).header(HOST, authority.as_str());
    request = request.header(CONNECTION, "Upgrade");
    for name in &NEGOTIATION {
        for value in like.headers().get_all(name) {
            request = request.header(name, value);
        }
    }
    let request = request.body(Empty::<Bytes>::new()).map_err(|_| bad_address())?;
    Ok(sender.send_request(request).await?)
}

/// Lets client and runtime talk to each other; an answer that is no upgrade is handed to the client as it is.
pub async fn serve(mut client: Request<Incoming>, url: &str) -> Result<Response<Body>, StreamError> {
    let client_upgrade = hyper::upgrade::on(&mut client);
    let mut answer = request(url, &client).await?;
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        let (parts, content) = answer.into_parts();
        return Ok(Response::from_parts(parts, content.boxed_unsync()));
    }
    let mut response = Response::new(body::full(Bytes::new()));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(CONNECTION, http::HeaderValue::from_static("Upgrade"));
    for name in &NEGOTIATION {
        for value in answer.headers().get_all(name) {
            response.headers_mut().append(name, value.clone());
        }
    }
    let runtime_upgrade = hyper::upgrade::on(&mut answer);
    tokio::spawn(async move {
        match tokio::try_join!(client_upgrade, runtime_upgrade) {
            Ok((client, runtime)) => copy(client, runtime).await,
            Err(error) => tracing::debug!(%error, "session was not upgraded"),
        }
    });
    Ok(response)
}

async fn copy(client: Upgraded, runtime: Upgraded) {
    let (mut client, mut runtime) = (TokioIo::new(client), TokioIo::new(runtime));
    if let Err(error) = tokio::io::copy_bidirectional(&mut client, &mut runtime).await {
        tracing::debug!(%error, "session ended");
    }
}
