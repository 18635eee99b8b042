//! Acting under a service account of `kube-system`: its token, asked for at the first use, kept in memory only, renewed
//! before it ends. The account is made when it is missing. It decides nothing about what the account may do.

use std::time::Duration;

use http::HeaderValue;
use jiff::Timestamp;
use kube::Client;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::rest::Rest;

const ACCOUNTS: &str = "/api/v1/namespaces/kube-system/serviceaccounts";
/// The validity that is asked for; the server may grant another.
const VALIDITY: Duration = Duration::from_secs(3600);
/// How often, and after what pauses, a new account is asked for until the server sees it.
const VISIBLE_TRIES: usize = 20;
const VISIBLE_PAUSE: Duration = Duration::from_millis(50);

#[derive(Debug, thiserror::Error)]
pub enum ServiceAccountError {
    #[error("cannot make the service account kube-system/{account}")]
    Create { account: String, source: kube::Error },
    #[error("cannot get a token of the service account kube-system/{account}")]
    RequestToken { account: String, source: kube::Error },
    #[error("the API server answered with no usable token for the service account kube-system/{account}")]
    UnusableToken { account: String },
}

/// A service account that requests are made as.
pub struct ServiceAccount {
    name: String,
    /// Asks for tokens, under the process's own credentials.
    own: Rest,
    /// Carries the account's requests: it has no credentials, which would go before the token.
    anonymous: Client,
    token: Mutex<Option<Token>>,
}

struct Token {
    authorization: HeaderValue,
    renew_at: Instant,
}

impl ServiceAccount {
    pub fn new(name: &str, own: Rest, anonymous: Client) -> Self {
        Self { name: name.to_owned(), own, anonymous, token: Mutex::default() }
    }

    pub(super) fn client(&self) -> &Client {
        &self.anonymous
    }

    /// The value of the `Authorization` header. Of several callers one asks the server, the others wait for it.
    pub(super) async fn authorization(&self) -> Result<HeaderValue, ServiceAccountError> {
        let mut token = self.token.lock().await;
        if let Some(token) = token.as_ref().filter(|token| Instant::now() < token.renew_at) {
            return Ok(token.authorization.clone());
        }
        let answer = self.request_token().await?;
        let new = read(&answer, Timestamp::now())
            .ok_or_else(|| ServiceAccountError::UnusableToken { account: self.name.clone() })?;
        Ok(token.insert(new).authorization.clone())
    }

    /// Drops a token that the server refused, unless it has been replaced meanwhile.
    pub(super) async fn forget(&self, refused: &HeaderValue) {
        let mut token = self.token.lock().await;
        if token.as_ref().is_some_and(|token| token.authorization == *refused) {
            *token = None;
        }
    }

    async fn request_token(&self) -> Result<Value, ServiceAccountError> {
        let failed = |source| ServiceAccountError::RequestToken { account: self.name.clone(), source };
        let path = format!("{ACCOUNTS}/{}/token", self.name);
        let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": {"expirationSeconds": VALIDITY.as_secs()}});
        match self.own.create(&path, &request).await {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            other => return other.map_err(failed),
        }
        let account = json!({"apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": self.name, "namespace": "kube-system"}});
        match self.own.create(ACCOUNTS, &account).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {}
            Err(source) => return Err(ServiceAccountError::Create { account: self.name.clone(), source }),
        }
        // The server may take a moment to see the account that it has just stored.
        for _ in 0..VISIBLE_TRIES {
            match self.own.create(&path, &request).await {
                Err(kube::Error::Api(status)) if status.code == 404 => tokio::time::sleep(VISIBLE_PAUSE).await,
                other => return other.map_err(failed),
            }
        }
        self.own.create(&path, &request).await.map_err(failed)
    }
}

/// Reads a TokenRequest's answer. The token is renewed after four fifths of its life.
fn read(answer: &Value, now: Timestamp) -> Option<Token> {
    let status = answer.get("status")?;
    let mut authorization = HeaderValue::try_from(format!("Bearer {}", status.get("token")?.as_str()?)).ok()?;
    authorization.set_sensitive(true);
    let expires: Timestamp = status.get("expirationTimestamp")?.as_str()?.parse().ok()?;
    let life = Duration::try_from(expires.duration_since(now)).unwrap_or(Duration::ZERO);
    Some(Token { authorization, renew_at: Instant::now() + life.min(Duration::from_secs(86_400)) * 4 / 5 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn tokens_are_renewed_after_four_fifths_of_their_life() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        for (expires, renewed_after) in [("2026-01-01T01:00:00Z", 2880), ("2025-12-31T00:00:00Z", 0)] {
            let answer = json!({"status": {"token": "abc", "expirationTimestamp": expires}});
            let token = read(&answer, now).unwrap();
            assert_eq!(token.renew_at - Instant::now(), Duration::from_secs(renewed_after), "{expires}");
            assert_eq!(token.authorization, "Bearer abc");
        }
        for unusable in [json!({}), json!({"status": {"token": "a\n", "expirationTimestamp": "2026-01-01T01:00:00Z"}})]
        {
            assert!(read(&unusable, now).is_none(), "{unusable}");
        }
    }
}
