//! Pod security standards: a namespace's labels say how much its pods may ask for. What each level forbids is in
//! `checks`; pods are judged by the newest version of the standards, whichever version the label names.

mod checks;

use std::sync::Arc;

use apimachinery::meta::GroupKind;
use apimachinery::status::{FieldError, Result, Status};
use async_trait::async_trait;
use serde_json::Value;

use super::{AdmissionRequest, Operation, Plugin, cached};
use crate::registry::object::ObjectExt;
use crate::server::Server;

const LABEL: &str = "pod-security.kubernetes.io/";

/// Orders from the least to the most strict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    Privileged,
    Baseline,
    Restricted,
}

impl Level {
    fn parse(text: &str) -> Option<Self> {
        match text {
            "privileged" => Some(Self::Privileged),
            "baseline" => Some(Self::Baseline),
            "restricted" => Some(Self::Restricted),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Privileged => "privileged",
            Self::Baseline => "baseline",
            Self::Restricted => "restricted",
        }
    }
}

pub struct PodSecurity;

#[async_trait]
impl Plugin for PodSecurity {
    fn name(&self) -> &'static str {
        "PodSecurity"
    }

    async fn validate(&self, server: &Arc<Server>, request: &AdmissionRequest<'_>) -> Result<()> {
        if request.is("", "namespaces") {
            return check_labels(request);
        }
        let changes_pod = matches!(request.subresource, "" | "ephemeralcontainers" | "resize");
        if !request.is_any("", "pods") || !changes_pod || !is_significant(request) {
            return Ok(());
        }
        let Some(namespace) = cached(server, "", "namespaces", "", request.namespace) else {
            return Err(Status::internal(format!("failed to lookup namespace {:?}", request.namespace)));
        };
        let (level, version) = enforced(&namespace);
        let violations = checks::violations(level, request.object);
        if violations.is_empty() {
            return Ok(());
        }
        let policy = format!("{}:{version}", level.name());
        Err(request.forbidden(format!("violates PodSecurity {policy:?}: {}", violations.join(", "))))
    }
}

/// The enforced level and the version as the labels write it; a level that is none counts as the strictest.
fn enforced(namespace: &Value) -> (Level, String) {
    let level = namespace.label(&format!("{LABEL}enforce"));
    let version = namespace.label(&format!("{LABEL}enforce-version")).unwrap_or("latest");
    let level = level.map_or(Level::Privileged, |level| Level::parse(level).unwrap_or(Level::Restricted));
    (level, version.to_owned())
}

/// Updates count only when they change what the standards look at.
fn is_significant(request: &AdmissionRequest<'_>) -> bool {
    let (Operation::Update, Some(old)) = (request.operation, request.old) else { return true };
    let annotations = |pod: &Value| -> Vec<(String, Value)> {
        let all = pod.annotations().into_iter().flatten();
        let security = all.filter(|(key, _)| key.contains("seccomp.") || key.contains("apparmor."));
        security.map(|(key, value)| (key.clone(), value.clone())).collect()
    };
    old.get("spec") != request.object.get("spec") || annotations(old) != annotations(request.object)
}

fn check_labels(request: &AdmissionRequest<'_>) -> Result<()> {
    let mut errors = Vec::new();
    for mode in ["enforce", "audit", "warn"] {
        let key = format!("{LABEL}{mode}");
        let label = |object: &Value, key: &str| object.label(key).map(str::to_owned);
        let given = label(request.object, &key);
        let changed = request.old.is_none_or(|old| label(old, &key) != given);
        if let Some(level) = given.filter(|level| changed && Level::parse(level).is_none()) {
            let detail = "must be one of privileged, baseline, restricted";
            errors.push(FieldError::invalid(format!("metadata.labels[{key}]"), level, detail));
        }
        let key = format!("{key}-version");
        let is_version = |text: &str| {
            let number = text.strip_prefix("v1.").is_some_and(|minor| minor.parse::<u32>().is_ok());
            text == "latest" || number
        };
        if let Some(version) = label(request.object, &key).filter(|version| !is_version(version)) {
            let detail = "must be \"latest\" or \"v1.x\"";
            errors.push(FieldError::invalid(format!("metadata.labels[{key}]"), version, detail));
        }
    }
    match errors.is_empty() {
        true => Ok(()),
        false => Err(Status::invalid(&GroupKind::new("", "Namespace"), request.shown_name(), &errors)),
    }
}
