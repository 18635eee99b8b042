//! Which authorizers there are and in which order they are asked: `--authorization-mode`, or a file of
//! `AuthorizationConfiguration` (`apiserver.config.k8s.io`).
//! <https://kubernetes.io/docs/reference/access-authn-authz/authorization/#using-configuration-file-for-authorization>

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::kubeconfig::{KubeconfigError, read_yaml};
use super::node::NodeAuthorizer;
use super::objects::Objects;
use super::rbac::Rbac;
use super::webhook_access::{AccessWebhook, AccessWebhookError, Settings};
use super::{Attributes, Authorizer, Decision};
use crate::config::{Config, go_duration};
use crate::registry::object::ObjectExt;

const VERSIONS: [&str; 3] =
    ["apiserver.config.k8s.io/v1", "apiserver.config.k8s.io/v1beta1", "apiserver.config.k8s.io/v1alpha1"];

#[derive(Debug, thiserror::Error)]
pub enum ModeError {
    #[error("unknown authorization mode {0:?}: known are Node, RBAC, Webhook, AlwaysAllow and AlwaysDeny")]
    Unknown(String),
    #[error("--authorization-mode=Webhook needs --authorization-webhook-config-file")]
    NoWebhookFile,
    #[error(
        "--authorization-config can not be specified when --authorization-mode or --authorization-webhook-* flags are"
    )]
    Both,
    #[error(transparent)]
    File(#[from] KubeconfigError),
    #[error("{path}: {field}: {what}")]
    Field { path: PathBuf, field: String, what: String },
    #[error(transparent)]
    Webhook(#[from] AccessWebhookError),
}

pub enum Mode {
    AlwaysAllow,
    AlwaysDeny,
    Node(NodeAuthorizer),
    Rbac(Rbac),
    Webhook(Box<AccessWebhook>),
}

impl Mode {
    /// All modes, in their order.
    pub fn read(config: &Config) -> Result<Vec<Self>, ModeError> {
        let Some(path) = &config.authorization_config else {
            return config.authorization_mode.iter().map(|name| Self::of_flag(name, config)).collect();
        };
        if config.authorization_mode != ["AlwaysAllow"] || config.authorization_webhook_config_file.is_some() {
            return Err(ModeError::Both);
        }
        let file = read_yaml(path)?;
        let modes = of_file(&file).map_err(|(field, what)| ModeError::Field { path: path.clone(), field, what })?;
        modes.into_iter().map(Self::of_entry).collect()
    }

    fn of_flag(name: &str, config: &Config) -> Result<Self, ModeError> {
        if name != "Webhook" {
            return Self::builtin(name);
        }
        let path = config.authorization_webhook_config_file.as_ref().ok_or(ModeError::NoWebhookFile)?;
        let settings = Settings {
            version: config.authorization_webhook_version.clone(),
            allowed_for: config.authorization_webhook_cache_authorized_ttl,
            refused_for: config.authorization_webhook_cache_unauthorized_ttl,
            ..Settings::new(path)
        };
        Ok(Self::Webhook(Box::new(AccessWebhook::new(settings)?)))
    }

    fn of_entry(entry: Entry) -> Result<Self, ModeError> {
        match entry {
            Entry::Builtin(name) => Self::builtin(&name),
            Entry::Webhook(settings) => Ok(Self::Webhook(Box::new(AccessWebhook::new(settings)?))),
        }
    }

    fn builtin(name: &str) -> Result<Self, ModeError> {
        match name {
            "AlwaysAllow" => Ok(Self::AlwaysAllow),
            "AlwaysDeny" => Ok(Self::AlwaysDeny),
            "Node" => Ok(Self::Node(NodeAuthorizer::new(crate::bootstrap::policy::node_rules()))),
            "RBAC" => Ok(Self::Rbac(Rbac::default())),
            other => Err(ModeError::Unknown(other.to_owned())),
        }
    }

    /// Only a webhook waits.
    pub async fn authorize(&self, objects: &dyn Objects, attributes: &Attributes<'_>) -> Decision {
        match self {
            Self::AlwaysAllow => Decision::Allow(String::new()),
            Self::AlwaysDeny => Decision::NoOpinion("Everything is forbidden.".into()),
            Self::Node(node) => node.authorize(objects, attributes),
            Self::Rbac(rbac) => rbac.authorize(objects, attributes),
            Self::Webhook(webhook) => webhook.authorize(attributes).await,
        }
    }
}

enum Entry {
    Builtin(String),
    Webhook(Settings),
}

/// A field that is wrong, and why.
type Wrong = (String, String);

fn wrong(field: impl Into<String>, what: impl Into<String>) -> Wrong {
    (field.into(), what.into())
}

fn of_file(file: &Value) -> Result<Vec<Entry>, Wrong> {
    if file["kind"] != "AuthorizationConfiguration" {
        return Err(wrong("kind", "must be AuthorizationConfiguration"));
    }
    if !VERSIONS.contains(&file.api_version()) {
        return Err(wrong("apiVersion", format!("must be one of {}", VERSIONS.join(", "))));
    }
    let authorizers = file.list_at(&["authorizers"]);
    if authorizers.is_empty() {
        return Err(wrong("authorizers", "at least one authorization mode must be defined"));
    }
    let mut entries = Vec::new();
    let mut names = Vec::new();
    for (index, authorizer) in authorizers.iter().enumerate() {
        let at = format!("authorizers[{index}]");
        let (kind, name) = (authorizer.str_at(&["type"]), authorizer.str_at(&["name"]));
        if name.is_empty() {
            return Err(wrong(format!("{at}.name"), "Required value"));
        }
        if names.contains(&name) {
            return Err(wrong(format!("{at}.name"), format!("Duplicate value: {name:?}")));
        }
        names.push(name);
        entries.push(match (kind, &authorizer["webhook"]) {
            ("Webhook", webhook) => Entry::Webhook(webhook_settings(name, webhook, &format!("{at}.webhook"))?),
            (_, webhook) if !webhook.is_null() => {
                return Err(wrong(format!("{at}.webhook"), "may only be specified when type=Webhook"));
            }
            (kind, _) => Entry::Builtin(kind.to_owned()),
        });
    }
    Ok(entries)
}

fn webhook_settings(name: &str, webhook: &Value, at: &str) -> Result<Settings, Wrong> {
    let field = |name: &str| format!("{at}.{name}");
    let duration = |name: &str, default: Option<Duration>| match (webhook.str_at(&[name]), default) {
        ("", Some(default)) => Ok(default),
        ("", None) => Err(wrong(field(name), "Required value")),
        (text, _) => go_duration(text).map_err(|why| wrong(field(name), why)),
    };
    let connection = &webhook["connectionInfo"];
    let kubeconfig = match connection.str_at(&["type"]) {
        "KubeConfigFile" => connection.str_at(&["kubeConfigFile"]),
        other => {
            let what = format!("{other:?} is not supported: this server knows KubeConfigFile");
            return Err(wrong(field("connectionInfo.type"), what));
        }
    };
    if !Path::new(kubeconfig).is_absolute() {
        return Err(wrong(field("connectionInfo.kubeConfigFile"), "must be an absolute path"));
    }
    let fails_closed = match webhook.str_at(&["failurePolicy"]) {
        "Deny" => true,
        "NoOpinion" => false,
        other => return Err(wrong(field("failurePolicy"), format!("{other:?}: must be Deny or NoOpinion"))),
    };
    let conditions = webhook.list_at(&["matchConditions"]);
    if !conditions.is_empty() && webhook.str_at(&["matchConditionSubjectAccessReviewVersion"]) != "v1" {
        return Err(wrong(field("matchConditionSubjectAccessReviewVersion"), "must be v1"));
    }
    let timeout = duration("timeout", None)?;
    if timeout.is_zero() || timeout > Duration::from_secs(30) {
        return Err(wrong(field("timeout"), "must be > 0s and <= 30s"));
    }
    // A cache that is switched off keeps nothing.
    let kept = |name: &str, switch: &str, default: u64| match webhook[switch] == false {
        true => Ok(Duration::ZERO),
        false => duration(name, Some(Duration::from_secs(default))),
    };
    Ok(Settings {
        name: name.to_owned(),
        version: webhook.str_at(&["subjectAccessReviewVersion"]).to_owned(),
        timeout,
        allowed_for: kept("authorizedTTL", "cacheAuthorizedRequests", 300)?,
        refused_for: kept("unauthorizedTTL", "cacheUnauthorizedRequests", 30)?,
        fails_closed,
        conditions: conditions.iter().map(|condition| condition.str_at(&["expression"]).to_owned()).collect(),
        ..Settings::new(Path::new(kubeconfig))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(authorizers: Value) -> Result<usize, String> {
        let file = json!({
            "apiVersion": "apiserver.config.k8s.io/v1", "kind": "AuthorizationConfiguration", "authorizers": authorizers,
        });
        of_file(&file).map(|entries| entries.len()).map_err(|(field, what)| format!("{field}: {what}"))
    }

    #[test]
    fn files_name_their_authorizers() {
        let webhook = json!({
            "timeout": "3s", "subjectAccessReviewVersion": "v1", "failurePolicy": "Deny",
            "matchConditionSubjectAccessReviewVersion": "v1", "matchConditions": [{"expression": "has(request.user)"}],
            "connectionInfo": {"type": "KubeConfigFile", "kubeConfigFile": "/etc/hook"},
        });
        let named = |webhook: Value| json!([{"type": "Webhook", "name": "a", "webhook": webhook}]);
        assert_eq!(read(named(webhook.clone())), Ok(1));
        assert_eq!(read(json!([{"type": "Node", "name": "n"}, {"type": "RBAC", "name": "r"}])), Ok(2));
        let with = |field: &str, value: Value| {
            let mut webhook = webhook.clone();
            webhook[field] = value;
            read(named(webhook))
        };
        let cases = [
            (read(json!([])), "authorizers: at least one authorization mode must be defined"),
            (
                read(json!([{"type": "RBAC", "name": "r"}, {"type": "Node", "name": "r"}])),
                "authorizers[1].name: Duplicate value: \"r\"",
            ),
            (
                read(json!([{"type": "RBAC", "name": "r", "webhook": {}}])),
                "authorizers[0].webhook: may only be specified when type=Webhook",
            ),
            (with("timeout", json!("1m")), "authorizers[0].webhook.timeout: must be > 0s and <= 30s"),
            (with("failurePolicy", json!("")), "authorizers[0].webhook.failurePolicy: \"\": must be Deny or NoOpinion"),
        ];
        for (found, expected) in cases {
            assert_eq!(found, Err(expected.to_owned()));
        }
    }
}
