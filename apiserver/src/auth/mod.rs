//! Who a request comes from and whether it may be done. One authenticator or authorizer, one file; this file asks them
//! in upstream's order. Nothing here looks at the content of what is written: that is admission's business.

mod answers;
mod attributes;
mod certificates;
mod front_proxy;
mod impersonation;
mod jwt;
pub mod keys;
pub mod kubeconfig;
mod modes;
pub mod node;
pub mod objects;
pub mod rbac;
pub mod reviews;
pub mod rules;
pub mod service_account;
pub mod token_request;
mod tokens;
mod webhook_access;
mod webhook_token;

use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::process;
use apimachinery::status::Status;
use futures::FutureExt;
use http::HeaderMap;
use rustls::pki_types::CertificateDer;

pub use attributes::{Attributes, Authorizer, Decision};
use certificates::{Authorities, AuthorityError};
use front_proxy::FrontProxy;
use impersonation::add_group_of_everybody;
use jwt::{AuthenticationConfig, JwtAuthenticator, SettingsError};
use keys::KeyError;
use modes::{Mode, ModeError};
use objects::Objects;
use rbac::Rbac;
use service_account::ServiceAccountTokens;
use tokens::{TokenFile, TokenFileError, bearer_token, bootstrap_user};
use webhook_token::{TokenWebhook, TokenWebhookError};

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
    pub path: &'a str,
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
    #[error("setting up trust in issuers of tokens")]
    Jwt(#[from] SettingsError),
    #[error("setting up webhook authentication")]
    TokenWebhook(#[from] TokenWebhookError),
    #[error("setting up authorization")]
    Mode(#[from] ModeError),
    #[error("--authentication-config can not be specified together with the --oidc-* flags")]
    TwoIssuers,
}

/// All authenticators and authorizers, in the order in which they are asked.
pub struct Chain {
    front_proxy: Option<FrontProxy>,
    clients: Option<Authorities>,
    token_file: TokenFile,
    service_accounts: ServiceAccountTokens,
    bootstrap_tokens: bool,
    issuers: Vec<JwtAuthenticator>,
    token_webhook: Option<TokenWebhook>,
    anonymous: bool,
    /// Where anonymous requests are let in; none: everywhere.
    anonymous_paths: Vec<String>,
    authorizers: Vec<Mode>,
}

impl Chain {
    pub fn build(config: &Config) -> Result<Self, AuthSetupError> {
        let front_proxy = config.requestheader_client_ca_file.as_ref().map(|path| FrontProxy::new(path, config));
        let clients = config.client_ca_file.as_ref().map(|path| Authorities::read(path));
        let token_file = config.token_auth_file.as_ref().map(|path| TokenFile::read(path));
        let authentication = config.authentication_config.as_ref().map(|path| AuthenticationConfig::read(path));
        let authentication = authentication.transpose()?;
        let of_flags = jwt::of_flags(config)?;
        if authentication.is_some() && of_flags.is_some() {
            return Err(AuthSetupError::TwoIssuers);
        }
        let service_accounts = ServiceAccountTokens::new(config)?;
        let webhook = config.authentication_token_webhook_config_file.as_ref().map(|path| {
            let good_for = config.authentication_token_webhook_cache_ttl;
            let audiences = service_accounts.audiences().to_vec();
            TokenWebhook::new(path, &config.authentication_token_webhook_version, good_for, audiences)
        });
        let anonymous = authentication.as_ref().and_then(|file| file.anonymous).unwrap_or(config.anonymous_auth);
        let (issuers, anonymous_paths) =
            authentication.map(|file| (file.issuers, file.anonymous_paths)).unwrap_or_default();
        let issuers = issuers.into_iter().chain(of_flags).map(JwtAuthenticator::new);
        Ok(Self {
            front_proxy: front_proxy.transpose()?,
            clients: clients.transpose()?,
            token_file: token_file.transpose()?.unwrap_or_default(),
            service_accounts,
            bootstrap_tokens: config.enable_bootstrap_token_auth,
            issuers: issuers.collect::<Result<_, _>>()?,
            token_webhook: webhook.transpose()?,
            anonymous,
            anonymous_paths,
            authorizers: Mode::read(config)?,
        })
    }

    pub fn service_accounts(&self) -> &ServiceAccountTokens {
        &self.service_accounts
    }

    pub async fn authenticate(&self, request: &AuthnRequest<'_>) -> Result<UserInfo, Status> {
        let user = self.authenticate_with(&*request.server.caches, request.headers, request.peer_certs).await?;
        let is_elsewhere = || !self.anonymous_paths.iter().any(|path| path == request.path);
        if user.name == ANONYMOUS && !self.anonymous_paths.is_empty() && is_elsewhere() {
            return Err(Status::unauthorized("Unauthorized"));
        }
        Ok(user)
    }

    /// The first authenticator that knows the caller counts. Wrong credentials are an error only when no other are
    /// right; no credentials at all are `system:anonymous`.
    async fn authenticate_with(
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
                    tracing::info!(error = process::error_chain(&error), "client certificate refused");
                    wrong = true;
                }
            }
        }
        if found.is_none()
            && let Some(token) = bearer_token(headers)
        {
            match self.token_user(objects, &token, &[]).await {
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
    pub async fn token_user(
        &self,
        objects: &dyn Objects,
        token: &str,
        wanted: &[String],
    ) -> Option<(UserInfo, Vec<String>)> {
        let now = jiff::Timestamp::now();
        if let Some(user) = self.token_file.user(token) {
            return Some((user, self.for_server(wanted)?));
        }
        match self.service_accounts.verify(objects, token, wanted, now.as_second()) {
            Ok(Some(verified)) => return Some((verified.user, verified.audiences)),
            Ok(None) => {}
            Err(error) => tracing::info!(%error, "service account token refused"),
        }
        if self.bootstrap_tokens
            && let Some(user) = bootstrap_user(objects, token, now)
        {
            return Some((user, self.for_server(wanted)?));
        }
        for issuer in &self.issuers {
            match issuer.user(token, now.as_second()).await {
                Ok(Some(user)) => return Some((user, self.for_server(wanted)?)),
                Ok(None) => {}
                Err(error) => tracing::info!(error = process::error_chain(&error), "token refused"),
            }
        }
        match self.token_webhook.as_ref()?.user(token, wanted).await {
            Ok(known) => known,
            Err(error) => {
                tracing::warn!(error = process::error_chain(&error), "the webhook of tokens cannot be asked");
                None
            }
        }
    }

    /// The audiences of a token that is for this server. `None`: it is wanted for others.
    fn for_server(&self, wanted: &[String]) -> Option<Vec<String>> {
        let own = self.service_accounts.audiences();
        let audiences: Vec<String> = wanted.iter().filter(|audience| own.contains(audience)).cloned().collect();
        (wanted.is_empty() || !audiences.is_empty()).then_some(audiences)
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

    /// Members of `system:masters` may everything; then the modes in the order of `--authorization-mode`.
    pub async fn decide(&self, objects: &dyn Objects, attributes: &Attributes<'_>) -> Decision {
        if attributes.user.is_in(MASTERS) {
            return Decision::Allow(String::new());
        }
        let mut reasons = Vec::new();
        for mode in &self.authorizers {
            match mode.authorize(objects, attributes).await {
                Decision::NoOpinion(reason) => reasons.extend((!reason.is_empty()).then_some(reason)),
                decided => return decided,
            }
        }
        Decision::NoOpinion(reasons.join("\n"))
    }

    /// The same for those who cannot wait: admission, expressions. Where a webhook is one of the modes, their thread
    /// waits with them.
    pub fn authorize(&self, server: &Arc<Server>, attributes: &Attributes<'_>) -> Decision {
        let decision = self.decide(&*server.caches, attributes);
        if self.authorizers.iter().any(|mode| matches!(mode, Mode::Webhook(_))) {
            return tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(decision));
        }
        decision.now_or_never().unwrap_or_else(Decision::none)
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
