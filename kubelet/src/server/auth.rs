//! Who calls, and whether they may: client certificates, bearer tokens by `TokenReview`, anonymous callers if the
//! configuration allows them; then `SubjectAccessReview` for a subresource of this node. Answers of the API server
//! are cached for as long as the configuration says, in a bounded cache.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request, StatusCode, header};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::Api;
use kube::api::PostParams;
use parking_lot::Mutex;
use rustls::pki_types::CertificateDer;
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use crate::state::NodeState;

/// Callers remembered at one time.
const CACHE_SIZE: usize = 1024;

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct User {
    pub name: String,
    pub uid: String,
    pub groups: Vec<String>,
    pub extra: BTreeMap<String, Vec<String>>,
}

#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("Unauthorized")]
    Unauthenticated,
    #[error("Forbidden (user={user}, verb={verb}, resource=nodes, subresource(s)=[{}])\n", .subresources.join(" "))]
    Forbidden { user: String, verb: &'static str, subresources: Vec<&'static str> },
    #[error("Authorization error (user={user}, verb={verb}, resource=nodes, subresource={subresource})")]
    Undecided { user: String, verb: &'static str, subresource: &'static str },
}

impl Refusal {
    pub fn code(&self) -> StatusCode {
        match self {
            Self::Unauthenticated => StatusCode::UNAUTHORIZED,
            Self::Forbidden { .. } => StatusCode::FORBIDDEN,
            Self::Undecided { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// The identity in a client certificate that the TLS layer has verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerCertificate {
    name: String,
    organizations: Vec<String>,
}

impl PeerCertificate {
    /// `None` when the certificate names nobody.
    pub fn read(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
        let text =
            |attribute: &x509_parser::x509::AttributeTypeAndValue<'_>| attribute.as_str().ok().map(str::to_owned);
        let subject = parsed.subject();
        let name = subject.iter_common_name().next().and_then(text)?;
        Some(Self { name, organizations: subject.iter_organization().filter_map(text).collect() })
    }
}

/// Answers with an expiry; full, it forgets what has expired, and everything when nothing has.
struct Cache<K, V>(Mutex<HashMap<K, (V, Instant)>>);

impl<K: Eq + Hash, V: Clone> Cache<K, V> {
    fn new() -> Self {
        Self(Mutex::default())
    }

    fn get(&self, key: &K) -> Option<V> {
        self.0.lock().get(key).filter(|(_, until)| *until > Instant::now()).map(|(value, _)| value.clone())
    }

    fn put(&self, key: K, value: V, ttl: Duration) {
        let now = Instant::now();
        let mut entries = self.0.lock();
        if entries.len() >= CACHE_SIZE {
            entries.retain(|_, (_, until)| *until > now);
            if entries.len() >= CACHE_SIZE {
                entries.clear();
            }
        }
        entries.insert(key, (value, now + ttl));
    }
}

type Question = (User, &'static str, &'static str);

pub struct Auth {
    state: Arc<NodeState>,
    /// By the token's hash, so that no token stays in memory.
    tokens: Cache<[u8; 32], Option<User>>,
    decisions: Cache<Question, bool>,
}

impl Auth {
    pub fn new(state: &Arc<NodeState>) -> Self {
        Self { state: state.clone(), tokens: Cache::new(), decisions: Cache::new() }
    }

    pub async fn check<B>(&self, request: &Request<B>, certificate: Option<&PeerCertificate>) -> Result<(), Refusal> {
        let user = self.authenticate(request, certificate).await?;
        if self.state.config.authorization.mode == "AlwaysAllow" {
            return Ok(());
        }
        let verb = api_verb(request.method());
        let subresources = subresources(request.uri().path());
        for subresource in &subresources {
            if self.may(&user, verb, subresource).await? {
                return Ok(());
            }
        }
        Err(Refusal::Forbidden { user: user.name, verb, subresources })
    }

    async fn authenticate<B>(&self, request: &Request<B>, peer: Option<&PeerCertificate>) -> Result<User, Refusal> {
        if let Some(peer) = peer {
            let mut groups = peer.organizations.clone();
            groups.push("system:authenticated".to_owned());
            return Ok(User { name: peer.name.clone(), groups, ..User::default() });
        }
        let authentication = &self.state.config.authentication;
        let bearer = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = bearer.and_then(|value| value.strip_prefix("Bearer ")).map(str::trim).filter(|t| !t.is_empty());
        if let Some(token) = token
            && authentication.webhook.enabled
            && let Some(user) = self.review_token(token).await?
        {
            return Ok(user);
        }
        if !authentication.anonymous.enabled {
            return Err(Refusal::Unauthenticated);
        }
        let groups = vec!["system:unauthenticated".to_owned()];
        Ok(User { name: "system:anonymous".to_owned(), groups, ..User::default() })
    }

    async fn review_token(&self, token: &str) -> Result<Option<User>, Refusal> {
        let key: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        if let Some(known) = self.tokens.get(&key) {
            return Ok(known);
        }
        let spec = TokenReviewSpec { token: token.to_owned(), audiences: None };
        let review = TokenReview { spec, ..TokenReview::default() };
        let api = Api::<TokenReview>::all(self.state.client.clone());
        let answer = api.create(&PostParams::default(), &review).await.map_err(|error| {
            tracing::warn!(%error, "a token cannot be reviewed");
            Refusal::Unauthenticated
        })?;
        let status = answer.status.unwrap_or_default();
        let user = status.user.filter(|_| status.authenticated == Some(true)).map(|user| User {
            name: user.username.unwrap_or_default(),
            uid: user.uid.unwrap_or_default(),
            groups: user.groups.unwrap_or_default(),
            extra: user.extra.unwrap_or_default(),
        });
        self.tokens.put(key, user.clone(), self.state.config.authentication.webhook.cache_ttl.0);
        Ok(user)
    }

    async fn may(&self, user: &User, verb: &'static str, subresource: &'static str) -> Result<bool, Refusal> {
        let question = (user.clone(), verb, subresource);
        if let Some(known) = self.decisions.get(&question) {
            return Ok(known);
        }
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(user.name.clone()),
                uid: Some(user.uid.clone()).filter(|uid| !uid.is_empty()),
                groups: Some(user.groups.clone()),
                extra: Some(user.extra.clone()).filter(|extra| !extra.is_empty()),
                resource_attributes: Some(ResourceAttributes {
                    verb: Some(verb.to_owned()),
                    version: Some("v1".to_owned()),
                    resource: Some("nodes".to_owned()),
                    subresource: Some(subresource.to_owned()),
                    name: Some(self.state.node_name.clone()),
                    ..ResourceAttributes::default()
                }),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let api = Api::<SubjectAccessReview>::all(self.state.client.clone());
        let answer = api.create(&PostParams::default(), &review).await.map_err(|error| {
            tracing::warn!(%error, user = user.name, "access cannot be reviewed");
            Refusal::Undecided { user: user.name.clone(), verb, subresource }
        })?;
        let allowed = answer.status.is_some_and(|status| status.allowed);
        let webhook = &self.state.config.authorization.webhook;
        let ttl = if allowed { webhook.cache_authorized_ttl } else { webhook.cache_unauthorized_ttl };
        self.decisions.put(question, allowed, ttl.0);
        Ok(allowed)
    }
}

fn api_verb(method: &Method) -> &'static str {
    match *method {
        Method::POST => "create",
        Method::GET => "get",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "",
    }
}

/// The subresources of the node any of which opens `path`, the narrowest first.
fn subresources(path: &str) -> Vec<&'static str> {
    let under = |prefix: &str| path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    let broad = [("/stats", "stats"), ("/metrics", "metrics"), ("/logs", "log"), ("/checkpoint", "checkpoint")]
        .into_iter()
        .chain([("/statusz", "statusz"), ("/flagz", "configz")])
        .find(|(prefix, _)| under(prefix));
    if let Some((_, subresource)) = broad {
        return vec![subresource];
    }
    let narrow = [("/allocatedPods", "pods"), ("/pods", "pods"), ("/runningpods", "pods")]
        .into_iter()
        .chain([("/healthz", "healthz"), ("/configz", "configz")])
        .find(|(prefix, _)| under(prefix));
    narrow.map(|(_, subresource)| subresource).into_iter().chain(["proxy"]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_open_with_upstreams_subresources() {
        let cases: [(&str, &[&str]); 10] = [
            ("/exec/ns/pod/c", &["proxy"]),
            ("/containerLogs/ns/pod/c", &["proxy"]),
            ("/pods", &["pods", "proxy"]),
            ("/podsx", &["proxy"]),
            ("/runningpods/", &["pods", "proxy"]),
            ("/healthz/ping", &["healthz", "proxy"]),
            ("/configz", &["configz", "proxy"]),
            ("/stats/summary", &["stats"]),
            ("/metrics/cadvisor", &["metrics"]),
            ("/logs/", &["log"]),
        ];
        for (path, expected) in cases {
            assert_eq!(subresources(path), expected, "{path}");
        }
    }

    #[test]
    fn a_refusal_reads_like_upstreams() {
        let refusal = Refusal::Forbidden { user: "a".into(), verb: "get", subresources: vec!["pods", "proxy"] };
        assert_eq!(refusal.to_string(), "Forbidden (user=a, verb=get, resource=nodes, subresource(s)=[pods proxy])\n");
    }

    #[tokio::test(start_paused = true)]
    async fn answers_expire_and_the_cache_stays_bounded() {
        let cache = Cache::new();
        cache.put(0, true, Duration::from_secs(5));
        assert_eq!(cache.get(&0), Some(true));
        tokio::time::advance(Duration::from_secs(6)).await;
        assert_eq!(cache.get(&0), None);
        for key in 0..CACHE_SIZE * 3 {
            cache.put(key, true, Duration::from_secs(5));
        }
        assert!(cache.0.lock().len() <= CACHE_SIZE);
    }
}
