//! Environment variables of a container: from services, config maps, secrets, the pod itself and its resources, with
//! `$(NAME)` references expanded as upstream does.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container as Spec, EnvVar, EnvVarSource, Pod};

use super::{downward, services::ServiceEnv};
use crate::objects::{ObjectError, Objects};

/// Shown to users as the message of CreateContainerConfigError, in upstream's words.
#[derive(Debug, thiserror::Error)]
pub enum EnvError {
    #[error(transparent)]
    Fetch(#[from] ObjectError),
    #[error("couldn't find key {key} in {kind} {namespace}/{name}")]
    NoKey { key: String, kind: &'static str, namespace: String, name: String },
    #[error(transparent)]
    Downward(#[from] downward::DownwardError),
}

/// What environments are made from beside the container.
pub struct EnvContext<'a> {
    pub objects: &'a Objects,
    pub services: &'a ServiceEnv,
    pub downward: &'a downward::Downward<'a>,
}

/// Replaces `$(NAME)` where the name is known, and `$$` by `$`.
pub fn expand(text: &str, lookup: impl Fn(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(tail) = rest.strip_prefix('$') {
            out.push('$');
            rest = tail;
        } else if let Some((name, tail)) = rest.strip_prefix('(').and_then(|tail| tail.split_once(')')) {
            match lookup(name) {
                Some(value) => out.push_str(&value),
                None => {
                    out.push_str("$(");
                    out.push_str(name);
                    out.push(')');
                }
            }
            rest = tail;
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    out
}

/// The container's environment, in the order: services, `envFrom`, `env`; a later name wins.
pub async fn environment(pod: &Pod, spec: &Spec, cx: &EnvContext<'_>) -> Result<Vec<(String, String)>, EnvError> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let links = pod.spec.as_ref().and_then(|spec| spec.enable_service_links).unwrap_or(true);
    let services = cx.services.variables(namespace, links);
    let mut known: BTreeMap<String, String> = BTreeMap::new();
    for source in spec.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        if let Some(reference) = &source.config_map_ref {
            let optional = reference.optional.unwrap_or(false);
            if let Some(map) = found(cx.objects.config_map(namespace, &reference.name).await, optional)? {
                known.extend(map.data.iter().flatten().map(|(k, v)| (format!("{prefix}{k}"), v.clone())));
            }
        } else if let Some(reference) = &source.secret_ref {
            let optional = reference.optional.unwrap_or(false);
            if let Some(secret) = found(cx.objects.secret(namespace, &reference.name).await, optional)? {
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                known.extend(secret.data.iter().flatten().map(|(k, v)| (format!("{prefix}{k}"), text(&v.0))));
            }
        }
    }
    for variable in spec.env.iter().flatten() {
        if let Some(value) = value_of(variable, namespace, spec, &known, &services, cx).await? {
            known.insert(variable.name.clone(), value);
        }
    }
    for (name, value) in services {
        known.entry(name).or_insert(value);
    }
    Ok(known.into_iter().collect())
}

async fn value_of(
    variable: &EnvVar,
    namespace: &str,
    spec: &Spec,
    known: &BTreeMap<String, String>,
    services: &BTreeMap<String, String>,
    cx: &EnvContext<'_>,
) -> Result<Option<String>, EnvError> {
    if let Some(source) = &variable.value_from {
        return from_source(source, namespace, spec, cx).await;
    }
    let text = variable.value.as_deref().unwrap_or_default();
    Ok(Some(expand(text, |name| known.get(name).or_else(|| services.get(name)).cloned())))
}

async fn from_source(
    source: &EnvVarSource,
    namespace: &str,
    spec: &Spec,
    cx: &EnvContext<'_>,
) -> Result<Option<String>, EnvError> {
    if let Some(field) = &source.field_ref {
        return Ok(Some(cx.downward.field(&field.field_path)?));
    }
    if let Some(resource) = &source.resource_field_ref {
        return Ok(Some(cx.downward.resource(resource, Some(spec))?));
    }
    if let Some(selector) = &source.config_map_key_ref {
        let optional = selector.optional.unwrap_or(false);
        let map = found(cx.objects.config_map(namespace, &selector.name).await, optional)?;
        let value = map.as_ref().and_then(|map| map.data.as_ref()?.get(&selector.key).cloned());
        return present(value, optional, &selector.key, "ConfigMap", namespace, &selector.name);
    }
    if let Some(selector) = &source.secret_key_ref {
        let optional = selector.optional.unwrap_or(false);
        let secret = found(cx.objects.secret(namespace, &selector.name).await, optional)?;
        let bytes = secret.as_ref().and_then(|secret| secret.data.as_ref()?.get(&selector.key));
        let value = bytes.map(|bytes| String::from_utf8_lossy(&bytes.0).into_owned());
        return present(value, optional, &selector.key, "Secret", namespace, &selector.name);
    }
    Ok(None)
}

/// An optional source that does not exist is as good as empty.
fn found<T>(result: Result<T, ObjectError>, optional: bool) -> Result<Option<T>, EnvError> {
    match result {
        Ok(object) => Ok(Some(object)),
        Err(error) if optional && error.is_not_found() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn present(
    value: Option<String>,
    optional: bool,
    key: &str,
    kind: &'static str,
    namespace: &str,
    name: &str,
) -> Result<Option<String>, EnvError> {
    if value.is_some() || optional {
        return Ok(value);
    }
    Err(EnvError::NoKey { key: key.to_owned(), kind, namespace: namespace.to_owned(), name: name.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_expand() {
        let known = |name: &str| (name == "A").then(|| "1".to_owned());
        for (text, want) in [
            ("plain", "plain"),
            ("$(A)", "1"),
            ("x$(A)y$(A)", "x1y1"),
            ("$(B)", "$(B)"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$A $", "$A $"),
            ("$(A", "$(A"),
        ] {
            assert_eq!(expand(text, known), want, "{text}");
        }
    }
}
