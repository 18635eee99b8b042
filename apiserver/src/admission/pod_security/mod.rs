//! Pod security standards: a namespace's labels say how much its pods may ask for, and what is only warned of. What each
//! level forbids is in `checks`, in the version of the standards that the labels name.

mod checks;

use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::meta::GroupKind;
use apimachinery::status::{FieldError, Result, Status};
use async_trait::async_trait;
use serde_json::Value;

use super::{AdmissionRequest, Operation, Plugin, cached, cached_list};
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
            check_labels(request)?;
            warn_of_present_pods(server, request);
            return Ok(());
        }
        let template = template(request);
        let changes_pod = matches!(request.subresource, "" | "ephemeralcontainers" | "resize");
        let is_pod = request.is_any("", "pods") && changes_pod && is_significant(request);
        if !is_pod && template.is_none() {
            return Ok(());
        }
        let Some(namespace) = cached(server, "", "namespaces", "", request.namespace) else {
            return Err(Status::internal(format!("failed to lookup namespace {:?}", request.namespace)));
        };
        if is_pod {
            let policy = Policy::read(&namespace, "enforce");
            let violations = policy.violations(request.object);
            if !violations.is_empty() {
                let why = format!("violates PodSecurity {:?}: {}", policy.to_string(), violations.join(", "));
                return Err(request.forbidden(why));
            }
        }
        let policy = Policy::read(&namespace, "warn");
        let violations = policy.violations(template.unwrap_or(request.object));
        if !violations.is_empty() {
            let text = format!("would violate PodSecurity {:?}: {}", policy.to_string(), violations.join(", "));
            request.warnings.add(&text);
        }
        Ok(())
    }
}

/// What the pods of a workload will be like.
fn template<'r>(request: &'r AdmissionRequest<'_>) -> Option<&'r Value> {
    let path: &[&str] = match (&*request.gvr.group, &*request.gvr.resource) {
        _ if !request.subresource.is_empty() => return None,
        ("", "podtemplates") => &["template"],
        ("", "replicationcontrollers")
        | ("apps", "daemonsets" | "deployments" | "replicasets" | "statefulsets")
        | ("batch", "jobs") => &["spec", "template"],
        ("batch", "cronjobs") => &["spec", "jobTemplate", "spec", "template"],
        _ => return None,
    };
    request.object.at(path)
}

/// A level in a version, as the labels of a namespace write them for enforcing or warning.
#[derive(PartialEq, Eq)]
struct Policy {
    level: Level,
    version: String,
}

impl Policy {
    /// A level that is none counts as the strictest where it is enforced.
    fn read(namespace: &Value, mode: &str) -> Self {
        let level = namespace.label(&format!("{LABEL}{mode}"));
        let version = namespace.label(&format!("{LABEL}{mode}-version")).unwrap_or("latest");
        let unknown = if mode == "enforce" { Level::Restricted } else { Level::Privileged };
        let level = level.map_or(Level::Privileged, |level| Level::parse(level).unwrap_or(unknown));
        Self { level, version: version.to_owned() }
    }

    fn violations(&self, pod: &Value) -> Vec<String> {
        let minor = self.version.strip_prefix("v1.").and_then(|minor| minor.parse().ok()).unwrap_or(u32::MAX);
        checks::violations(self.level, minor, pod)
    }
}

impl std::fmt::Display for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.level.name(), self.version)
    }
}

/// Pods that are there already may stay, but whoever makes the rules stricter is told of them.
fn warn_of_present_pods(server: &Server, request: &AdmissionRequest<'_>) {
    let Some(old) = request.old else { return };
    let (before, policy) = (Policy::read(old, "enforce"), Policy::read(request.object, "enforce"));
    let is_relaxed = before.version == policy.version && policy.level < before.level;
    if policy == before || policy.level == Level::Privileged || is_relaxed {
        return;
    }
    let mut pods_by_reasons: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for pod in cached_list(server, "", "pods", Some(request.name)) {
        let violations = policy.violations(&pod);
        let reasons: Vec<&str> =
            violations.iter().map(|text| text.split_once(" (").map_or(text.as_str(), |(reason, _)| reason)).collect();
        if !reasons.is_empty() {
            pods_by_reasons.entry(reasons.join(", ")).or_default().push(pod.name().to_owned());
        }
    }
    if pods_by_reasons.is_empty() {
        return;
    }
    let namespace = request.name;
    request.warnings.add(&format!(
        "existing pods in namespace {namespace:?} violate the new PodSecurity enforce level {:?}",
        policy.to_string()
    ));
    let mut lines: Vec<String> = pods_by_reasons.into_iter().map(|(reasons, pods)| present(&reasons, pods)).collect();
    lines.sort();
    lines.iter().for_each(|line| request.warnings.add(line));
}

/// The first of the pods, how many more there are, and what is wrong with them.
fn present(reasons: &str, mut pods: Vec<String>) -> String {
    pods.sort();
    let first = pods.first().map_or("", String::as_str);
    match pods.len() {
        0 | 1 => format!("{first}: {reasons}"),
        2 => format!("{first} (and 1 other pod): {reasons}"),
        count => format!("{first} (and {} other pods): {reasons}", count - 1),
    }
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
