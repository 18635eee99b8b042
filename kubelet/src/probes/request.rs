//! HTTP and TCP requests to containers, for probes and hooks. Certificates are not verified, as upstream: the request
//! goes to an address that the kubelet has just given out. Answers are read only as far as a message needs.

use std::sync::Arc;

use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Container as Spec, HTTPGetAction};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::net::TcpStream;

const MAX_REDIRECTS: usize = 10;

#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    #[error("failed: {0}")]
    Failed(String),
    #[error("failed: timeout: context deadline exceeded")]
    Timeout,
    #[error("failed: dial tcp {address}: {source}")]
    Connect { address: String, source: std::io::Error },
    #[error("failed: Get {url:?}: {source}")]
    Http { url: String, source: hyper::Error },
    #[error("failed: Get {url:?}: TLS handshake: {source}")]
    Tls { url: String, source: std::io::Error },
    #[error("errored and resulted in unknown state: invalid URL or header: {0}")]
    Url(http::Error),
    #[error("errored and resulted in unknown state: couldn't find port: {0}")]
    Port(String),
    #[error("errored and resulted in unknown state: {0}")]
    Exec(crate::cri::RuntimeError),
    #[error("failed: timeout: failed to connect service {address:?}: {source}")]
    Grpc { address: String, source: tonic::transport::Error },
}

pub struct Answer {
    pub status: StatusCode,
}

pub(super) async fn connect(host: &str, port: u16) -> Result<TcpStream, ProbeError> {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    TcpStream::connect((host, port))
        .await
        .map_err(|source| ProbeError::Connect { address: format!("{host}:{port}"), source })
}

/// Sends the request of a probe or hook; follows redirects to the same host.
pub async fn http_get(action: &HTTPGetAction, spec: &Spec, pod_ip: &str, agent: &str) -> Result<Answer, ProbeError> {
    let port = super::port(&action.port, spec)?;
    let host = action.host.as_deref().filter(|host| !host.is_empty()).unwrap_or(pod_ip);
    let tls = action.scheme.as_deref().is_some_and(|scheme| scheme.eq_ignore_ascii_case("https"));
    let path = action.path.as_deref().unwrap_or_default();
    let mut target = format!("/{}", path.trim_start_matches('/'));
    for _ in 0..MAX_REDIRECTS {
        let (status, location) = once(action, host, port, tls, &target, agent).await?;
        match location.filter(|_| status.is_redirection()).and_then(|location| same_host(&location, host)) {
            Some(next) => target = next,
            None => return Ok(Answer { status }),
        }
    }
    Err(ProbeError::Failed("stopped after 10 redirects".to_owned()))
}

/// The path of a redirect if it stays on the host.
fn same_host(location: &str, host: &str) -> Option<String> {
    let uri: Uri = location.parse().ok()?;
    let stays = uri.host().is_none_or(|other| other == host);
    stays.then(|| uri.path_and_query().map_or_else(|| "/".to_owned(), ToString::to_string))
}

async fn once(
    action: &HTTPGetAction,
    host: &str,
    port: u16,
    tls: bool,
    target: &str,
    agent: &str,
) -> Result<(StatusCode, Option<String>), ProbeError> {
    let bracketed = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let authority = format!("{bracketed}:{port}");
    let url = format!("{}://{authority}{target}", if tls { "https" } else { "http" });
    let mut request = Request::get(target);
    let mut own_host = false;
    let mut own_agent = false;
    for header in action.http_headers.iter().flatten() {
        own_host |= header.name.eq_ignore_ascii_case("host");
        own_agent |= header.name.eq_ignore_ascii_case("user-agent");
        request = request.header(&header.name, &header.value);
    }
    if !own_host {
        request = request.header(header::HOST, &authority);
    }
    if !own_agent {
        let version = apimachinery::process::KUBERNETES_VERSION.trim_start_matches('v');
        request = request.header(header::USER_AGENT, format!("{agent}/{version}"));
    }
    if !action.http_headers.iter().flatten().any(|header| header.name.eq_ignore_ascii_case("accept")) {
        request = request.header(header::ACCEPT, "*/*");
    }
    let request = request.header(header::CONNECTION, "close").body(Empty::<Bytes>::new()).map_err(ProbeError::Url)?;
    let stream = connect(host, port).await?;
    let result = if tls {
        let name = ServerName::try_from(host.to_owned())
            .unwrap_or(ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into()));
        let connector = tokio_rustls::TlsConnector::from(Arc::new(unverified()));
        let stream =
            connector.connect(name, stream).await.map_err(|source| ProbeError::Tls { url: url.clone(), source })?;
        send(TokioIo::new(stream), request).await
    } else {
        send(TokioIo::new(stream), request).await
    };
    result.map_err(|source| ProbeError::Http { url, source })
}

async fn send<S>(io: S, request: Request<Empty<Bytes>>) -> Result<(StatusCode, Option<String>), hyper::Error>
where
    S: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
    let driver = tokio::spawn(connection);
    let answer = sender.send_request(request).await;
    driver.abort();
    let answer = answer?;
    let location = answer.headers().get(header::LOCATION).and_then(|value| value.to_str().ok()).map(str::to_owned);
    Ok((answer.status(), location))
}

fn unverified() -> rustls::ClientConfig {
    rustls::ClientConfig::builder()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AcceptAny(rustls::crypto::ring::default_provider())))
        .with_no_client_auth()
}

#[derive(Debug)]
struct AcceptAny(CryptoProvider);

impl ServerCertVerifier for AcceptAny {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_stay_on_the_host() {
        assert_eq!(same_host("/x?y=1", "10.0.0.1").as_deref(), Some("/x?y=1"));
        assert_eq!(same_host("http://10.0.0.1:80/z", "10.0.0.1").as_deref(), Some("/z"));
        assert_eq!(same_host("http://elsewhere/", "10.0.0.1"), None);
    }
}
