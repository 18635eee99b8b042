//! The kubelet's HTTPS server on port 10250, for the API server, metrics collectors and people with the right to
//! `nodes/proxy`: logs, exec, attach, port-forward, the pods as this node knows them, statistics and metrics.
//!
//! It only reads the node's state. Nothing is answered before the caller is authenticated and authorized, and no
//! answer is held in memory as a whole when it may be large.

pub mod auth;
pub mod body;
mod inspect;
#[cfg(test)]
mod live_tests;
pub mod logs;
mod routes;
pub mod stats;
mod system_logs;
mod tls;

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::certificates::Live;
use crate::state::NodeState;
use crate::volumes::csi::Csi;
use auth::{Auth, PeerCertificate};
use body::Body;

pub use tls::TlsError;

/// Connections at one time; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 1000;
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("{0:?} is not an IP address to listen on")]
    Address(String),
    #[error("cannot listen on {address}")]
    Bind { address: SocketAddr, source: std::io::Error },
    #[error("cannot set up TLS")]
    Tls(#[from] TlsError),
}

/// What every request handler gets.
pub struct Server {
    state: Arc<NodeState>,
    csi: Arc<Csi>,
    auth: Auth,
    history: stats::History,
}

/// Binds the port now, so that a port in use is an error at start, and serves in the background until `shutdown`.
///
/// `certificate_dir` is where a self-signed certificate is kept when the configuration names none and the cluster
/// issues none (`certificate`).
pub async fn start(
    state: Arc<NodeState>,
    csi: Arc<Csi>,
    certificate_dir: &std::path::Path,
    certificate: Option<Arc<Live>>,
    shutdown: CancellationToken,
) -> Result<(), ServerError> {
    let config = state.config.clone();
    let ip: IpAddr = config.address.parse().map_err(|_| ServerError::Address(config.address.clone()))?;
    let address = SocketAddr::new(ip, config.port);
    let acceptor = tls::acceptor(&config, &state.node_name, certificate_dir, certificate)?;
    let listener = TcpListener::bind(address).await.map_err(|source| ServerError::Bind { address, source })?;
    let server = Arc::new(Server { auth: Auth::new(&state), state, csi, history: stats::History::default() });
    tokio::spawn(accept(listener, acceptor, server, shutdown));
    Ok(())
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, server: Arc<Server>, shutdown: CancellationToken) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let stream = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let (acceptor, server) = (acceptor.clone(), server.clone());
        tokio::spawn(async move {
            serve(stream, &acceptor, server).await;
            drop(slot);
        });
    }
}

async fn serve(stream: TcpStream, acceptor: &TlsAcceptor, server: Arc<Server>) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot set TCP_NODELAY");
    }
    let stream = match tokio::time::timeout(HANDSHAKE_LIMIT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%error, "TLS handshake failed"),
        Err(_) => return tracing::debug!("TLS handshake took too long"),
    };
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| PeerCertificate::read(chain.first()?));
    serve_http(stream, server, certificate).await;
}

async fn serve_http<S>(stream: S, server: Arc<Server>, certificate: Option<PeerCertificate>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let certificate = Arc::new(certificate);
    let service = service_fn(move |request: Request<Incoming>| {
        let (server, certificate) = (server.clone(), certificate.clone());
        async move { Ok::<_, Infallible>(server.answer(request, certificate.as_ref().as_ref()).await) }
    });
    let builder = auto::Builder::new(TokioExecutor::new());
    if let Err(error) = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await {
        tracing::debug!(%error, "connection ended");
    }
}

impl Server {
    async fn answer(&self, request: Request<Incoming>, certificate: Option<&PeerCertificate>) -> Response<Body> {
        match self.auth.check(&request, certificate).await {
            Ok(()) => routes::route(self, request).await,
            Err(refusal) => body::text(refusal.code(), refusal.to_string()),
        }
    }
}

/// The decoded pairs of a query, in order.
pub(crate) fn query_pairs(query: &str) -> impl Iterator<Item = (String, String)> + '_ {
    form_urlencoded::parse(query.as_bytes()).map(|(name, value)| (name.into_owned(), value.into_owned()))
}
