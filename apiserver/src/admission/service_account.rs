//! Gives every new pod its service account: the name, the volume with the account's token, and the account's image
//! pull secrets. Waits a little for the `default` account, which a controller makes in new namespaces.

use std::sync::Arc;
use std::time::Duration;

use apimachinery::meta::GroupResource;
use apimachinery::status::{Result, Status};
use async_trait::async_trait;
use serde_json::{Value, json};

use super::{AdmissionRequest, Operation, Plugin, present};
use crate::registry::object::ObjectExt;
use crate::server::Server;

const MOUNT_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const VOLUME_PREFIX: &str = "kube-api-access-";
const MIRROR: &str = "kubernetes.io/config.mirror";
const ENFORCE_MOUNTABLE: &str = "kubernetes.io/enforce-mountable-secrets";
/// One hour and seven seconds: the token request recognizes a kubelet's default volume by it.
const TOKEN_SECONDS: i64 = 3607;

pub struct ServiceAccount;

#[async_trait]
impl Plugin for ServiceAccount {
    fn name(&self) -> &'static str {
        "ServiceAccount"
    }

    async fn admit(&self, server: &Arc<Server>, request: &mut AdmissionRequest<'_>) -> Result<()> {
        if !request.creates("", "pods") || request.object.annotation(MIRROR).is_some() {
            return Ok(());
        }
        if request.object.str_at(&["spec", "serviceAccountName"]).is_empty() {
            request.object.set(&["spec", "serviceAccountName"], "default");
        }
        let name = request.object.str_at(&["spec", "serviceAccountName"]).to_owned();
        request.object.set(&["spec", "serviceAccount"], name.as_str());
        let account = find(server, request, &name).await?;
        let automount =
            ["spec"].iter().find_map(|spec| request.object.bool_at(&[spec, "automountServiceAccountToken"]));
        if automount.or_else(|| account.bool_at(&["automountServiceAccountToken"])).unwrap_or(true) {
            mount_token(request.object);
        }
        let pull_secrets = account.list_at(&["imagePullSecrets"]);
        if request.object.list_at(&["spec", "imagePullSecrets"]).is_empty() && !pull_secrets.is_empty() {
            request.object.set(&["spec", "imagePullSecrets"], pull_secrets.to_vec());
        }
        Ok(())
    }

    async fn validate(&self, server: &Arc<Server>, request: &AdmissionRequest<'_>) -> Result<()> {
        let debugs = request.is_any("", "pods") && request.subresource == "ephemeralcontainers";
        let creates = request.creates("", "pods");
        if !(creates || debugs && request.operation == Operation::Update) {
            return Ok(());
        }
        if request.object.annotation(MIRROR).is_some() {
            return if creates { check_mirror(request) } else { Ok(()) };
        }
        let name = request.object.str_at(&["spec", "serviceAccountName"]);
        if name.is_empty() {
            let (namespace, pod) = (request.namespace, request.object.name());
            return Err(request.forbidden(format!("no service account specified for pod {namespace}/{pod}")));
        }
        let account = find(server, request, name).await?;
        let enforces =
            matches!(account.annotation(ENFORCE_MOUNTABLE), Some("true" | "True" | "TRUE" | "1" | "t" | "T"));
        match enforces.then(|| foreign_secret(request.object, &account)).flatten() {
            Some(why) => Err(request.forbidden(why)),
            None => Ok(()),
        }
    }
}

/// The account, waiting up to two seconds for `default`.
async fn find(server: &Arc<Server>, request: &AdmissionRequest<'_>, name: &str) -> Result<Value> {
    let attempts = if name == "default" { 10 } else { 0 };
    for attempt in 0..=attempts {
        if let Some(account) = present(server, "", "serviceaccounts", request.namespace, name).await? {
            return Ok(account);
        }
        if attempt < attempts {
            tokio::time::sleep(Duration::from_millis(rand::random_range(100..200))).await;
        }
    }
    let missing = Status::not_found(&GroupResource::new("", "serviceaccount"), name);
    Err(request
        .forbidden(format!("error looking up service account {}/{name}: {}", request.namespace, missing.message)))
}

/// Adds the projected token volume, and its mount to every container that mounts nothing at its place.
fn mount_token(pod: &mut Value) {
    let existing = pod.list_at(&["spec", "volumes"]).iter().map(|volume| volume.str_at(&["name"]));
    let existing = existing.filter(|name| name.starts_with(VOLUME_PREFIX)).map(str::to_owned).next();
    let volume = existing.clone().unwrap_or_else(|| format!("{VOLUME_PREFIX}{}", random_suffix()));
    let mut needed = false;
    for list in ["initContainers", "containers"] {
        for container in pod.list_at_mut(&["spec", list]).into_iter().flatten() {
            if container.list_at(&["volumeMounts"]).iter().any(|mount| mount["mountPath"] == MOUNT_PATH) {
                continue;
            }
            let mut mounts = container.list_at(&["volumeMounts"]).to_vec();
            mounts.push(json!({"name": volume, "readOnly": true, "mountPath": MOUNT_PATH}));
            container.set(&["volumeMounts"], mounts);
            needed = true;
        }
    }
    if needed && existing.is_none() {
        let mut volumes = pod.list_at(&["spec", "volumes"]).to_vec();
        volumes.push(token_volume(&volume));
        pod.set(&["spec", "volumes"], volumes);
    }
}

/// Five characters of the alphabet of generated names, which spells no words.
fn random_suffix() -> String {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    (0..5).map(|_| char::from(ALPHABET[rand::random_range(0..ALPHABET.len())])).collect()
}

fn token_volume(name: &str) -> Value {
    json!({
        "name": name,
        "projected": {
            "defaultMode": 0o644,
            "sources": [
                {"serviceAccountToken": {"path": "token", "expirationSeconds": TOKEN_SECONDS}},
                {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                {"downwardAPI": {"items": [
                    {"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}},
                ]}},
            ],
        },
    })
}

/// Mirror pods of static pods have no account, so they may use nothing that an account gives.
fn check_mirror(request: &AdmissionRequest<'_>) -> Result<()> {
    let pod = &*request.object;
    if !pod.str_at(&["spec", "serviceAccountName"]).is_empty() {
        return Err(request.forbidden("a mirror pod may not reference service accounts"));
    }
    let mut secrets = Vec::new();
    visit_secrets(pod, &mut |_, name| secrets.push(name.to_owned()));
    if !secrets.is_empty() {
        return Err(request.forbidden("a mirror pod may not reference secrets"));
    }
    let sources = pod.list_at(&["spec", "volumes"]).iter().flat_map(|volume| volume.list_at(&["projected", "sources"]));
    if sources.into_iter().any(|source| source.get("serviceAccountToken").is_some()) {
        return Err(request.forbidden("a mirror pod may not use ServiceAccountToken volume projections"));
    }
    Ok(())
}

/// Shows every secret that the pod names, with where it does.
fn visit_secrets(pod: &Value, see: &mut impl FnMut(String, &str)) {
    for volume in pod.list_at(&["spec", "volumes"]) {
        let name = volume.str_at(&["secret", "secretName"]);
        if !name.is_empty() {
            see(format!("volume with secret.secretName={name:?}"), name);
        }
    }
    for (list, kind) in [
        ("initContainers", "init container"),
        ("containers", "container"),
        ("ephemeralContainers", "ephemeral container"),
    ] {
        for container in pod.list_at(&["spec", list]) {
            let of = |what: String, secret: &str| {
                format!("{kind} {} with {what} referencing secret.secretName={secret:?}", container.str_at(&["name"]))
            };
            for env in container.list_at(&["env"]) {
                let secret = env.str_at(&["valueFrom", "secretKeyRef", "name"]);
                if !secret.is_empty() {
                    see(of(format!("envVar {}", env.str_at(&["name"])), secret), secret);
                }
            }
            for from in container.list_at(&["envFrom"]) {
                let secret = from.str_at(&["secretRef", "name"]);
                if !secret.is_empty() {
                    see(of("envFrom".into(), secret), secret);
                }
            }
        }
    }
}

/// For accounts that limit their pods to the secrets they list: the first that is not listed.
fn foreign_secret(pod: &Value, account: &Value) -> Option<String> {
    let listed = |field: &str, name: &str| account.list_at(&[field]).iter().any(|entry| entry["name"] == name);
    let account_name = account.name();
    let mut foreign = None;
    visit_secrets(pod, &mut |place, name| {
        if foreign.is_none() && !listed("secrets", name) {
            foreign = Some(format!(
                "{place} is not allowed because service account {account_name} does not reference that secret"
            ));
        }
    });
    let pulls = pod.list_at(&["spec", "imagePullSecrets"]).iter().map(|pull| pull.str_at(&["name"])).enumerate();
    let mut foreign_pulls = pulls.filter(|(_, name)| !listed("imagePullSecrets", name));
    foreign.or_else(|| {
        let (index, name) = foreign_pulls.next()?;
        Some(format!(
            "imagePullSecrets[{index}].name={name:?} is not allowed because service account {account_name} does not reference that imagePullSecret"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_mounted_once() {
        let mut pod = json!({"spec": {"containers": [{"name": "a"}, {"name": "b", "volumeMounts": [{"name": "x", "mountPath": MOUNT_PATH}]}]}});
        mount_token(&mut pod);
        let once = pod.clone();
        mount_token(&mut pod);
        assert_eq!(pod, once);
        assert_eq!(pod["spec"]["volumes"].as_array().map(Vec::len), Some(1));
        assert_eq!(pod["spec"]["containers"][0]["volumeMounts"][0]["name"], pod["spec"]["volumes"][0]["name"]);
        assert_eq!(pod["spec"]["containers"][1]["volumeMounts"].as_array().map(Vec::len), Some(1));
    }

    #[test]
    fn limited_accounts_keep_other_secrets_out() {
        let pod = json!({"spec": {"volumes": [{"secret": {"secretName": "s"}}], "imagePullSecrets": [{"name": "p"}]}});
        let account = |secrets: Value, pulls: Value| json!({"metadata": {"name": "sa"}, "secrets": secrets, "imagePullSecrets": pulls});
        assert!(
            foreign_secret(&pod, &account(json!([]), json!([])))
                .unwrap()
                .starts_with("volume with secret.secretName=\"s\"")
        );
        assert!(
            foreign_secret(&pod, &account(json!([{"name": "s"}]), json!([])))
                .unwrap()
                .starts_with("imagePullSecrets[0]")
        );
        assert_eq!(foreign_secret(&pod, &account(json!([{"name": "s"}]), json!([{"name": "p"}]))), None);
    }
}
