//! An API client whose certificate can be exchanged while it runs: each new connection shows the one of that moment.

use std::path::Path;
use std::sync::Arc;

use hyper_util::rt::TokioExecutor;
use kube::client::ConfigExt;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use super::{CertificateError, Live};

/// A client for the kubeconfig's server, with `live` in place of the certificate that the kubeconfig names.
pub async fn client(kubeconfig: &Path, user_agent: &str, live: Arc<Live>) -> Result<Client, CertificateError> {
    let failed = |source| CertificateError::ReadKubeconfig { path: kubeconfig.to_owned(), source };
    let known = Kubeconfig::read_from(kubeconfig).map_err(failed)?;
    let mut config = Config::from_custom_kubeconfig(known, &KubeConfigOptions::default()).await.map_err(failed)?;
    config.headers.extend(http::HeaderValue::from_str(user_agent).ok().map(|value| (http::header::USER_AGENT, value)));
    let mut tls = config.rustls_client_config().map_err(CertificateError::Client)?;
    tls.client_auth_cert_resolver = live;
    let connector =
        hyper_rustls::HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().build();
    let service = tower::ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .layer(config.extra_headers_layer().map_err(CertificateError::Client)?)
        .map_err(tower::BoxError::from)
        .service(hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build(connector));
    Ok(Client::new(service, config.default_namespace))
}
