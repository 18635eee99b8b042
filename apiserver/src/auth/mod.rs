//! Who a request comes from and whether it may be done.

use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::status::Status;
use async_trait::async_trait;
use http::HeaderMap;
use rustls::pki_types::CertificateDer;

use crate::config::Config;
use crate::server::Server;

/// The authenticated caller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserInfo {
    pub name: String,
    pub uid: String,
    pub groups: Vec<String>,
    pub extra: BTreeMap<String, Vec<String>>,
}

impl UserInfo {
    /// The server itself: its bootstrap, admission plugins and allocators.
    pub fn server() -> Self {
        Self {
            name: "system:apiserver".into(),
            groups: vec!["system:authenticated".into(), "system:masters".into()],
            ..Self::default()
        }
    }
}

/// What authenticators may look at.
pub struct AuthnRequest<'a> {
    pub headers: &'a HeaderMap,
    /// The client's certificate chain, leaf first; unverified.
    pub peer_certs: &'a [CertificateDer<'static>],
    /// The `Sec-WebSocket-Protocol` token and alike are in the headers.
    pub server: &'a Arc<Server>,
}

#[derive(Debug, thiserror::Error)]
pub enum AuthnError {
    #[error("invalid credentials: {0}")]
    Invalid(String),
}

#[async_trait]
pub trait Authenticator: Send + Sync + 'static {
    /// `None`: no credentials of this sort were given.
    async fn authenticate(&self, request: &AuthnRequest<'_>) -> Result<Option<UserInfo>, AuthnError>;
}

/// What is asked of authorizers.
#[derive(Clone, Debug)]
pub struct Attributes<'a> {
    pub user: &'a UserInfo,
    pub verb: &'a str,
    pub namespace: &'a str,
    pub api_group: &'a str,
    pub api_version: &'a str,
    pub resource: &'a str,
    pub subresource: &'a str,
    pub name: &'a str,
    pub path: &'a str,
    pub is_resource: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Allow(String),
    Deny(String),
    NoOpinion(String),
}

pub trait Authorizer: Send + Sync + 'static {
    fn authorize(&self, server: &Arc<Server>, attributes: &Attributes<'_>) -> Decision;
}

#[derive(Debug, thiserror::Error)]
pub enum AuthSetupError {
    #[error("cannot read {path}")]
    Read { path: std::path::PathBuf, source: std::io::Error },
}

/// All authenticators and authorizers, in the order in which they are asked.
pub struct Chain {}

impl Chain {
    pub fn build(_config: &Config) -> Result<Self, AuthSetupError> {
        Ok(Self {})
    }

    pub async fn authenticate(&self, _request: &AuthnRequest<'_>) -> Result<UserInfo, Status> {
        Err(Status::unauthorized("Unauthorized"))
    }

    /// The user that the `Impersonate-*` headers ask for, if the caller may.
    pub async fn impersonate(
        &self,
        _server: &Arc<Server>,
        user: UserInfo,
        _headers: &HeaderMap,
    ) -> Result<UserInfo, Status> {
        Ok(user)
    }

    pub fn authorize(&self, _server: &Arc<Server>, _attributes: &Attributes<'_>) -> Decision {
        Decision::NoOpinion(String::new())
    }
}
