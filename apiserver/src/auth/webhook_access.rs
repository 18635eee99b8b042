//! The authorizer that asks a webhook: it is sent a `SubjectAccessReview`, unless an expression says that it need not
//! be. Its answers are kept for a while.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::answers::Answers;
use super::kubeconfig::{KubeconfigError, Webhook};
use super::{Attributes, Decision};
use crate::cel::{Expression, Scope, budget};
use crate::http::json_client::with_retries;

/// Longer questions are asked anew each time, so that nobody fills the memory with them.
const LONGEST_KEPT: usize = 10_000;

/// How a webhook is asked.
pub struct Settings {
    pub name: String,
    pub kubeconfig: PathBuf,
    /// `v1` or `v1beta1`.
    pub version: String,
    pub timeout: Duration,
    pub allowed_for: Duration,
    pub refused_for: Duration,
    /// A webhook that cannot be asked refuses; else it has no opinion.
    pub fails_closed: bool,
    /// Expressions that must hold for the webhook to be asked.
    pub conditions: Vec<String>,
}

impl Settings {
    /// As `--authorization-mode=Webhook` without a configuration file.
    pub fn new(kubeconfig: &Path) -> Self {
        Self {
            name: "default".into(),
            kubeconfig: kubeconfig.to_owned(),
            version: "v1beta1".into(),
            timeout: Duration::from_secs(30),
            allowed_for: Duration::from_secs(300),
            refused_for: Duration::from_secs(30),
            fails_closed: false,
            conditions: vec![],
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum AccessWebhookError {
    #[error("unsupported authorization webhook version {0:?}, supported are v1 and v1beta1")]
    Version(String),
    #[error("authorization webhook {name:?}: match condition {source_text:?}: {why}")]
    Condition { name: String, source_text: String, why: String },
    #[error(transparent)]
    Kubeconfig(#[from] KubeconfigError),
}

pub struct AccessWebhook {
    settings: Settings,
    webhook: Webhook,
    conditions: Vec<Expression>,
    answers: Answers<Decision>,
}

impl AccessWebhook {
    pub fn new(settings: Settings) -> Result<Self, AccessWebhookError> {
        if !["v1", "v1beta1"].contains(&settings.version.as_str()) {
            return Err(AccessWebhookError::Version(settings.version));
        }
        let compile = |source: &String| {
            Expression::compile(source).map_err(|error| AccessWebhookError::Condition {
                name: settings.name.clone(),
                source_text: source.clone(),
                why: error.to_string(),
            })
        };
        let conditions = settings.conditions.iter().map(compile).collect::<Result<_, _>>()?;
        let webhook = Webhook::read(&settings.kubeconfig, settings.timeout)?;
        Ok(Self { settings, webhook, conditions, answers: Answers::default() })
    }

    pub async fn authorize(&self, attributes: &Attributes<'_>) -> Decision {
        let spec = question(attributes);
        match self.is_asked(&spec) {
            Ok(true) => {}
            Ok(false) => return Decision::none(),
            Err(why) => return self.failed(&why),
        }
        let text = spec.to_string();
        let is_kept = text.len() <= LONGEST_KEPT;
        if is_kept && let Some(known) = self.answers.get(&text) {
            return known;
        }
        let review = json!({
            "kind": "SubjectAccessReview",
            "apiVersion": format!("authorization.k8s.io/{}", self.settings.version),
            "metadata": {},
            "spec": if self.settings.version == "v1" { spec } else { with_old_names(spec) },
            "status": {"allowed": false},
        });
        let answer = match with_retries(|| self.webhook.client.post(&self.webhook.url, &review)).await {
            Ok(answer) => answer,
            Err(error) => return self.failed(&apimachinery::process::error_chain(&error)),
        };
        let decision = decision(&answer["status"]);
        if is_kept {
            let good_for = if decision.is_allowed() { self.settings.allowed_for } else { self.settings.refused_for };
            self.answers.keep(&text, decision.clone(), good_for);
        }
        decision
    }

    /// Whether all conditions hold. One that is false decides, also when others fail.
    fn is_asked(&self, spec: &Value) -> Result<bool, String> {
        if self.conditions.is_empty() {
            return Ok(true);
        }
        let mut scope = Scope::default();
        scope.set_json("request", spec);
        let mut failed = None;
        for condition in &self.conditions {
            match condition.evaluate_bool(&scope) {
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(error) => failed = failed.or(Some(error.to_string())),
            }
            if scope.spent() > budget::PER_CONDITIONS {
                return Err("match conditions cost too much".into());
            }
        }
        failed.map_or(Ok(true), Err)
    }

    fn failed(&self, why: &str) -> Decision {
        tracing::warn!(webhook = self.settings.name, error = why, "an authorization webhook cannot be asked");
        match self.settings.fails_closed {
            true => Decision::Deny(String::new()),
            false => Decision::none(),
        }
    }
}

/// The `spec` of a `SubjectAccessReview`.
fn question(attributes: &Attributes<'_>) -> Value {
    let user = attributes.user;
    let mut spec = Map::new();
    let text = |fields: &[(&str, &str)]| -> Value {
        let given = fields.iter().filter(|(_, value)| !value.is_empty());
        given.map(|(name, value)| ((*name).to_owned(), Value::from(*value))).collect::<Map<_, _>>().into()
    };
    if attributes.is_resource {
        let mut resource = text(&[
            ("namespace", attributes.namespace),
            ("verb", attributes.verb),
            ("group", attributes.api_group),
            ("version", attributes.api_version),
            ("resource", attributes.resource),
            ("subresource", attributes.subresource),
            ("name", attributes.name),
        ]);
        if !attributes.field_selector.is_empty() {
            resource["fieldSelector"] = json!({"rawSelector": attributes.field_selector});
        }
        spec.insert("resourceAttributes".into(), resource);
    } else {
        spec.insert("nonResourceAttributes".into(), text(&[("path", attributes.path), ("verb", attributes.verb)]));
    }
    for (name, value) in [("user", &user.name), ("uid", &user.uid)] {
        if !value.is_empty() {
            spec.insert(name.into(), value.as_str().into());
        }
    }
    if !user.groups.is_empty() {
        spec.insert("groups".into(), user.groups.clone().into());
    }
    if !user.extra.is_empty() {
        spec.insert("extra".into(), json!(user.extra));
    }
    spec.into()
}

/// v1beta1 calls the groups `group`.
fn with_old_names(mut spec: Value) -> Value {
    if let Some(groups) = spec.as_object_mut().and_then(|spec| spec.remove("groups")) {
        spec["group"] = groups;
    }
    spec
}

fn decision(status: &Value) -> Decision {
    let reason = status["reason"].as_str().unwrap_or_default().to_owned();
    match (status["allowed"] == true, status["denied"] == true) {
        (true, true) => Decision::Deny("webhook subject access review returned both allow and deny response".into()),
        (_, true) => Decision::Deny(reason),
        (true, _) => Decision::Allow(reason),
        (false, false) => Decision::NoOpinion(reason),
    }
}

#[cfg(test)]
mod tests {
    use super::super::UserInfo;
    use super::*;

    #[test]
    fn questions_are_upstreams() {
        let user = UserInfo { name: "jane".into(), groups: vec!["g".into()], ..UserInfo::default() };
        let get = Attributes { namespace: "a", name: "n", ..Attributes::resource(&user, "get", "apps", "deployments") };
        let expected = json!({
            "resourceAttributes":
                {"namespace": "a", "verb": "get", "group": "apps", "resource": "deployments", "name": "n"},
            "user": "jane", "groups": ["g"],
        });
        assert_eq!(question(&get), expected);
        assert_eq!(with_old_names(question(&get))["group"], json!(["g"]));
        let path = question(&Attributes::path(&user, "get", "/healthz"));
        assert_eq!(path["nonResourceAttributes"], json!({"path": "/healthz", "verb": "get"}));
    }

    #[test]
    fn answers_become_decisions() {
        let cases = [
            (json!({"allowed": true, "reason": "r"}), Decision::Allow("r".into())),
            (json!({"allowed": false, "denied": true}), Decision::Deny(String::new())),
            (json!({"allowed": false}), Decision::NoOpinion(String::new())),
        ];
        for (status, expected) in cases {
            assert_eq!(decision(&status), expected);
        }
    }
}
