//! Bearer tokens that a webhook knows: it is sent a `TokenReview` and says whose the token is. Its answers are kept for
//! a while; one that cannot be had knows nobody.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::UserInfo;
use super::answers::Answers;
use super::kubeconfig::{KubeconfigError, Webhook};
use super::reviews::user_of_review;
use crate::http::json_client::{ExchangeError, with_retries};
use crate::registry::object::ObjectExt;

const TIMEOUT: Duration = Duration::from_secs(30);

/// A user and the audiences that its token is good for.
pub type Known = (UserInfo, Vec<String>);

pub struct TokenWebhook {
    webhook: Webhook,
    /// `v1` or `v1beta1`.
    version: String,
    good_for: Duration,
    /// Of the server, for tokens that nobody wants for another audience.
    audiences: Vec<String>,
    answers: Answers<Option<Known>>,
}

#[derive(Debug, thiserror::Error)]
pub enum TokenWebhookError {
    #[error("unsupported authentication webhook version {0:?}, supported are v1 and v1beta1")]
    Version(String),
    #[error(transparent)]
    Kubeconfig(#[from] KubeconfigError),
}

impl TokenWebhook {
    pub fn new(
        path: &Path,
        version: &str,
        good_for: Duration,
        audiences: Vec<String>,
    ) -> Result<Self, TokenWebhookError> {
        if !["v1", "v1beta1"].contains(&version) {
            return Err(TokenWebhookError::Version(version.to_owned()));
        }
        let webhook = Webhook::read(path, TIMEOUT)?;
        Ok(Self { webhook, version: version.to_owned(), good_for, audiences, answers: Answers::default() })
    }

    /// `Ok(None)`: the webhook does not know the token.
    pub async fn user(&self, token: &str, wanted: &[String]) -> Result<Option<Known>, ExchangeError> {
        let wanted = if wanted.is_empty() { &self.audiences } else { wanted };
        let question = format!("{token}\0{}", wanted.join("\0"));
        if let Some(known) = self.answers.get(&question) {
            return Ok(known);
        }
        let review = json!({
            "kind": "TokenReview",
            "apiVersion": format!("authentication.k8s.io/{}", self.version),
            "metadata": {},
            "spec": {"token": token, "audiences": wanted},
            "status": {"user": {}},
        });
        let answer = with_retries(|| self.webhook.client.post(&self.webhook.url, &review)).await?;
        let known = known(&answer["status"], wanted);
        self.answers.keep(&question, known.clone(), self.good_for);
        Ok(known)
    }
}

fn known(status: &Value, wanted: &[String]) -> Option<Known> {
    if status["authenticated"] != true {
        if !status.str_at(&["error"]).is_empty() {
            tracing::info!(error = status.str_at(&["error"]), "a webhook refused a token");
        }
        return None;
    }
    let given: Vec<&str> = status.list_at(&["audiences"]).iter().filter_map(Value::as_str).collect();
    // A webhook that says nothing of audiences knows only this server's.
    let good_for = match given.is_empty() {
        true => wanted.to_vec(),
        false => wanted.iter().filter(|audience| given.contains(&audience.as_str())).cloned().collect(),
    };
    if !wanted.is_empty() && good_for.is_empty() {
        return None;
    }
    Some((user_of_review(&status["user"]), good_for))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_become_users() {
        let audiences = ["api".to_owned()];
        let status =
            json!({"authenticated": true, "user": {"username": "jane", "groups": ["g"], "extra": {"k": ["v"]}}});
        let (user, good_for) = known(&status, &audiences).unwrap();
        assert_eq!((user.name.as_str(), user.groups[0].as_str(), good_for), ("jane", "g", audiences.to_vec()));
        let other = json!({"authenticated": true, "user": {"username": "jane"}, "audiences": ["other"]});
        assert!(known(&other, &audiences).is_none());
        assert!(known(&json!({"authenticated": false}), &audiences).is_none());
    }
}
