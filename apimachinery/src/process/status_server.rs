//! The small HTTP server beside every component: `/healthz`, `/livez`, `/readyz` (each with named checks and
//! `?verbose`) and `/metrics`. It serves nothing else and never blocks the component.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

struct Check {
    ask: Box<dyn Fn() -> Result<(), String> + Send + Sync>,
    /// Asked for `/readyz` only: a component that is not ready yet is alive.
    readiness_only: bool,
}

/// Named health checks; a component registers them at start and they are asked on each request.
#[derive(Clone, Default)]
pub struct HealthChecks {
    checks: Arc<Mutex<BTreeMap<String, Check>>>,
}

impl HealthChecks {
    /// Adds (or replaces) the check `name`; it must answer at once.
    pub fn register(&self, name: &str, check: impl Fn() -> Result<(), String> + Send + Sync + 'static) {
        self.checks.lock().insert(name.to_owned(), Check { ask: Box::new(check), readiness_only: false });
    }

    /// The same for what only `/readyz` tells: a component that is not ready yet must not be restarted for it.
    pub fn register_readiness(&self, name: &str, check: impl Fn() -> Result<(), String> + Send + Sync + 'static) {
        self.checks.lock().insert(name.to_owned(), Check { ask: Box::new(check), readiness_only: true });
    }

    fn report(&self, endpoint: &str, verbose: bool) -> (StatusCode, String) {
        let mut lines = vec!["[+]ping ok".to_owned()];
        let mut failed = false;
        for (name, check) in self.checks.lock().iter().filter(|(_, c)| !c.readiness_only || endpoint == "readyz") {
            match (check.ask)() {
                Ok(()) => lines.push(format!("[+]{name} ok")),
                Err(why) => {
                    failed = true;
                    lines.push(format!("[-]{name} failed: {why}"));
                }
            }
        }
        match (failed, verbose) {
            (false, false) => (StatusCode::OK, "ok".to_owned()),
            (false, true) => (StatusCode::OK, format!("{}\n{endpoint} check passed\n", lines.join("\n"))),
            (true, _) => {
                (StatusCode::INTERNAL_SERVER_ERROR, format!("{}\n{endpoint} check failed\n", lines.join("\n")))
            }
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StatusServerError {
    #[error("cannot listen on {address} for health checks and metrics")]
    Bind { address: SocketAddr, source: std::io::Error },
}

/// Serves health and metrics until the token is cancelled.
pub struct StatusServer {
    pub address: SocketAddr,
    pub checks: HealthChecks,
    pub metrics: Arc<Registry>,
    /// HTTPS when given.
    pub tls: Option<TlsAcceptor>,
}

impl StatusServer {
    /// Binds the address now, so that a port in use is an error at start, and serves in the background.
    pub async fn start(self, shutdown: CancellationToken) -> Result<(), StatusServerError> {
        let listener = TcpListener::bind(self.address)
            .await
            .map_err(|source| StatusServerError::Bind { address: self.address, source })?;
        let server = Arc::new(self);
        tokio::spawn(async move {
            loop {
                let stream = tokio::select! {
                    () = shutdown.cancelled() => break,
                    accepted = listener.accept() => match accepted {
                        Ok((stream, _)) => stream,
                        Err(error) => {
                            tracing::warn!(%error, "cannot accept a connection");
                            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                            continue;
                        }
                    },
                };
                let server = server.clone();
                tokio::spawn(async move {
                    match server.tls.clone() {
                        None => server.serve(stream).await,
                        Some(tls) => match tls.accept(stream).await {
                            Ok(stream) => server.serve(stream).await,
                            Err(error) => tracing::debug!(%error, "TLS handshake failed"),
                        },
                    }
                });
            }
        });
        Ok(())
    }

    async fn serve(
        self: Arc<Self>,
        stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    ) {
        let service = service_fn(move |request: Request<Incoming>| {
            let server = self.clone();
            async move { Ok::<_, Infallible>(server.answer(&request)) }
        });
        if let Err(error) =
            auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await
        {
            tracing::debug!(%error, "status connection ended");
        }
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let verbose =
            request.uri().query().is_some_and(|q| q.split('&').any(|p| p.split('=').next() == Some("verbose")));
        let (status, content_type, body) = match request.uri().path() {
            path @ ("/healthz" | "/livez" | "/readyz") => {
                let (status, body) = self.checks.report(&path[1..], verbose);
                (status, "text/plain; charset=utf-8", body)
            }
            "/metrics" => {
                let mut body = String::new();
                match prometheus_client::encoding::text::encode(&mut body, &self.metrics) {
                    Ok(()) => (StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", body),
                    Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, "text/plain", error.to_string()),
                }
            }
            _ => (StatusCode::NOT_FOUND, "text/plain; charset=utf-8", "404 page not found\n".to_owned()),
        };
        let mut response = Response::new(Full::new(Bytes::from(body)));
        *response.status_mut() = status;
        response.headers_mut().insert(header::CONTENT_TYPE, http::HeaderValue::from_static(content_type));
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_check_is_named() {
        let checks = HealthChecks::default();
        assert_eq!(checks.report("healthz", false), (StatusCode::OK, "ok".to_owned()));
        checks.register("etcd", || Err("no leader".to_owned()));
        let (status, body) = checks.report("healthz", false);
        assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(body, "[+]ping ok\n[-]etcd failed: no leader\nhealthz check failed\n");
    }

    #[test]
    fn readiness_does_not_count_for_liveness() {
        let checks = HealthChecks::default();
        checks.register_readiness("rules", || Err("not yet".to_owned()));
        assert_eq!(checks.report("healthz", false).0, StatusCode::OK);
        assert_eq!(checks.report("readyz", false).0, StatusCode::INTERNAL_SERVER_ERROR);
    }
}
