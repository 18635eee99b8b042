//! Who a request comes from and whether it may be done. One authenticator or authorizer, one file; this file asks them
//! in upstream's order. Nothing here looks at the content of what is written: that is admission's business.

mod attributes;
mod certificates;
mod front_proxy;
mod impersonation;
pub mod keys;
pub mod node;
pub mod objects;
pub mod rbac;
pub mod reviews;
pub mod rules;
pub mod service_account;
pub mod token_request;
mod tokens;

use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::status::Status;
use http::HeaderMap;
use rustls::pki_types::CertificateDer;

pub use attributes::{Attributes, Authorizer, Decision};
use certificates::{Authorities, AuthorityError};
use front_proxy::FrontProxy;
use impersonation::add_group_of_everybody;
use keys::KeyError;
use node::NodeAuthorizer;
use objects::Objects;
use rbac::Rbac;
use service_account::ServiceAccountTokens;
use tokens::{TokenFile, TokenFileError, bearer_token, bootstrap_user};

use crate::config::Config;
use crate::server::Server;

pub const ANONYMOUS: &str = "system:anonymous";
pub const AUTHENTICATED: &str = "system:authenticated";
pub const UNAUTHENTICATED: &str = "system:unauthenticated";
pub const MASTERS: &str = "system:masters";

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
        Self { name: "system:apiserver".into(), groups: vec![AUTHENTICATED.into(), MASTERS.into()], ..Self::default() }
    }

    pub fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|own| own == group)
    }
}

/// What authenticators may look at.
pub struct AuthnRequest<'a> {
    pub headers: &'a HeaderMap,
    /// The client's certificate chain, leaf first; unverified.
    pub peer_certs: &'a [CertificateDer<'static>],
    pub server: &'a Arc<Server>,
}

#[derive(Debug, thiserror::Error)]
pub enum AuthSetupError {
    #[error("reading certificate authorities")]
    Authority(#[from] AuthorityError),
    #[error("reading keys of service account tokens")]
    Key(#[from] KeyError),
    #[error("reading the token file")]
    TokenFile(#[from] TokenFileError),
    #[error("unknown authorization mode {0:?}: known are Node, RBAC, AlwaysAllow and AlwaysDeny")]
    Mode(String),
}

/// All authenticators and authorizers, in the order in which they are asked.
pub struct Chain {
    front_proxy: Option<FrontProxy>,
    clients: Option<Authorities>,
    token_file: TokenFile,
    service_accounts: ServiceAccountTokens,
    bootstrap_tokens: bool,
    anonymous: bool,
    authorizers: Vec<Mode>,
}

enum Mode {
    AlwaysAllow,
    AlwaysDeny,
    Node(NodeAuthorizer),
    Rbac(Rbac),
}

impl Mode {
    fn parse(name: &str) -> Result<Self, AuthSetupError> {
        match name {
            "AlwaysAllow" => Ok(Self::AlwaysAllow),
            "AlwaysDeny" => Ok(Self::AlwaysDeny),
            "Node" => Ok(Self::Node(NodeAuthorizer::new(crate::bootstrap::policy::node_rules()))),
            "RBAC" => Ok(Self::Rbac(Rbac::default())),
            other => Err(AuthSetupError::Mode(other.to_owned())),
        }
    }

    fn authorize(&self, objects: &dyn Objects, attributes: &Attributes<'_>) -> Decision {
        match self {
            Self::AlwaysAllow => Decision::Allow(String::new()),
            Self::AlwaysDeny => Decision::NoOpinion("Everything is forbidden.".into()),
            Self::Node(node) => node.authorize(objects, attributes),
            Self::Rbac(rbac) => rbac.authorize(objects, attributes),
        }
    }
}

impl Chain {
    pub fn build(config: &Config) -> Result<Self, AuthSetupError> {
        let front_proxy = config.requestheader_client_ca_file.as_ref().map(|path| FrontProxy::new(path, config));
        let clients = config.client_ca_file.as_ref().map(|path| Authorities::read(path));
        let token_file = config.token_auth_file.as_ref().map(|path| TokenFile::read(path));
        Ok(Self {
            front_proxy: front_proxy.transpose()?,
            clients: clients.transpose()?,
            token_file: token_file.transpose()?.unwrap_or_default(),
            service_accounts: ServiceAccountTokens::new(config)?,
            bootstrap_tokens: config.enable_bootstrap_token_auth,
            anonymous: config.anonymous_auth,
            authorizers: config.authorization_mode.iter().map(|name| Mode::parse(name)).collect::<Result<_, _>>()?,
        })
    }

    pub fn service_accounts(&self) -> &ServiceAccountTokens {
        &self.service_accounts
    }

    pub async fn authenticate(&self, request: &AuthnRequest<'_>) -> Result<UserInfo, Status> {
        self.authenticate_with(&*request.server.caches, request.headers, request.peer_certs)
    }

    /// The first authenticator that knows the caller counts. Wrong credentials are an error only when no other are
    /// right; no credentials at all are `system:anonymous`.
    fn authenticate_with(
        &self,
        objects: &dyn Objects,
        headers: &HeaderMap,
        certificates: &[CertificateDer<'static>],
    ) -> Result<UserInfo, Status> {
        let mut wrong = false;
        let mut found = None;
        if let Some(proxy) = &self.front_proxy {
            match proxy.user(headers, certificates) {
                Ok(user) => found = user,
                Err(error) => tracing::debug!(%error, "certificate is not of an authenticating proxy"),
            }
        }
        if found.is_none()
            && let Some(clients) = &self.clients
        {
            match clients.user(certificates) {
                Ok(user) => found = user,
                Err(error) => {
                    tracing::info!(error = apimachinery::process::error_chain(&error), "client certificate refused");
                    wrong = true;
                }
            }
        }
        if found.is_none()
            && let Some(token) = bearer_token(headers)
        {
            match self.token_user(objects, &token, &[]) {
                Some((user, _)) => found = Some(user),
                None => wrong = true,
            }
        }
        match found {
            Some(mut user) => {
                add_group_of_everybody(&mut user);
                Ok(user)
            }
            None if wrong || !self.anonymous => Err(Status::unauthorized("Unauthorized")),
            None => {
                Ok(UserInfo { name: ANONYMOUS.into(), groups: vec![UNAUTHENTICATED.into()], ..UserInfo::default() })
            }
        }
    }

    /// The user of a bearer token and the audiences that it is good for; `wanted` empty means the server itself.
    pub fn token_user(&self, objects: &dyn Objects, token: &str, wanted: &[String]) -> Option<(UserInfo, Vec<String>)> {
        let now = jiff::Timestamp::now();
        let for_server = || {
            let own = self.service_accounts.audiences();
            let audiences: Vec<String> = wanted.iter().filter(|audience| own.contains(audience)).cloned().collect();
            (wanted.is_empty() || !audiences.is_empty()).then_some(audiences)
        };
        if let Some(user) = self.token_file.user(token) {
            return Some((user, for_server()?));
        }
        match self.service_accounts.verify(objects, token, wanted, now.as_second()) {
            Ok(Some(verified)) => return Some((verified.user, verified.audiences)),
            Ok(None) => {}
            Err(error) => tracing::info!(%error, "service account token refused"),
        }
        if self.bootstrap_tokens
            && let Some(user) = bootstrap_user(objects, token, now)
        {
            return Some((user, for_server()?));
        }
        None
    }

    /// The user that the `Impersonate-*` headers ask for, if the caller may.
    pub async fn impersonate(
        &self,
        server: &Arc<Server>,
        user: UserInfo,
        headers: &HeaderMap,
    ) -> Result<UserInfo, Status> {
        impersonation::impersonate(user, headers, |attributes| self.authorize(server, attributes))
    }

    pub fn authorize(&self, server: &Arc<Server>, attributes: &Attributes<'_>) -> Decision {
        self.authorize_with(&*server.caches, attributes)
    }

    /// Members of `system:masters` may everything; then the modes in the order of `--authorization-mode`.
    fn authorize_with(&self, objects: &dyn Objects, attributes: &Attributes<'_>) -> Decision {
        if attributes.user.is_in(MASTERS) {
            return Decision::Allow(String::new());
        }
        let mut reasons = Vec::new();
        for mode in &self.authorizers {
            match mode.authorize(objects, attributes) {
                Decision::NoOpinion(reason) => reasons.extend((!reason.is_empty()).then_some(reason)),
                decided => return decided,
            }
        }
        Decision::NoOpinion(reasons.join("\n"))
    }

    /// The RBAC authorizer, when it is one of the modes.
    pub fn rbac(&self) -> Option<&Rbac> {
        self.authorizers.iter().find_map(|mode| match mode {
            Mode::Rbac(rbac) => Some(rbac),
            _ => None,
        })
    }

    /// Whether every authenticated or anonymous request is allowed.
    pub fn allows_everything(&self) -> bool {
        self.authorizers.iter().any(|mode| matches!(mode, Mode::AlwaysAllow))
    }
}
