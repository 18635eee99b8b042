//! Signs the public config map `cluster-info` with every bootstrap token that is meant for signing, so that somebody who
//! knows one token can trust the map: a detached JWS (RFC 7515, appendix F) over its kubeconfig, under the token's name.

use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::controller::{Controller, Informer, ObjectKey, Plan, Write};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use jiff::Timestamp;
use jsonwebtoken::{Algorithm, EncodingKey};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use serde_json::json;

use super::{Life, NAMESPACE, is_token, life, text};
use crate::app::Context;
use crate::common::name;

const CLUSTER_INFO: &str = "cluster-info";
const PUBLIC: &str = "kube-public";
const CONTENT: &str = "kubeconfig";
const SIGNATURE: &str = "jws-kubeconfig-";

struct Signer {
    maps: Arc<Informer<ConfigMap>>,
    secrets: Arc<Informer<Secret>>,
}

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let controller = Signer { maps: informers.of(), secrets: informers.of() };
    context.driver.run(controller, 1, |controller, wiring| {
        let map = || ObjectKey::new(PUBLIC, CLUSTER_INFO);
        wiring.map(&controller.maps, move |change| {
            change.new.iter().map(|map| ObjectKey::of(&map.metadata)).filter(|key| *key == map()).collect()
        });
        wiring.map(&controller.secrets, move |change| {
            if change.versions().any(|secret| is_token(secret)) { vec![map()] } else { Vec::new() }
        });
    });
}

impl Controller for Signer {
    fn name(&self) -> &'static str {
        "bootstrap-signer"
    }

    fn component(&self) -> &'static str {
        "bootstrap-signer"
    }

    fn reconcile(&self, key: &ObjectKey, now: Timestamp) -> Plan {
        let mut plan = Plan::nothing();
        let Some(map) = self.maps.get(key) else { return plan };
        let Some(content) = map.data.as_ref().and_then(|data| data.get(CONTENT)) else { return plan };
        let mut data = map.data.clone().unwrap_or_default();
        data.retain(|key, _| !key.starts_with(SIGNATURE));
        for (id, secret) in self.tokens(now, &mut plan) {
            match sign(content, &id, &secret) {
                Ok(signature) => {
                    data.insert(format!("{SIGNATURE}{id}"), signature);
                }
                Err(error) => tracing::warn!(id, %error, "cluster-info cannot be signed with a bootstrap token"),
            }
        }
        if map.data.as_ref() != Some(&data) {
            let mut next = map.as_ref().clone();
            next.data = Some(data);
            plan.push(Write::update(&next));
        }
        plan
    }
}

impl Signer {
    /// The secrets of the tokens that sign now, by the tokens' ids; the plan looks again when the first one ends.
    fn tokens(&self, now: Timestamp, plan: &mut Plan) -> BTreeMap<String, String> {
        let mut tokens = BTreeMap::new();
        for secret in self.secrets.in_namespace(NAMESPACE).iter().filter(|secret| is_token(secret)) {
            let Some((id, value)) = signing_token(secret) else { continue };
            match life(secret, now) {
                Life::Over => continue,
                Life::For(left) => {
                    plan.again_after(left);
                }
                Life::Forever => {}
            }
            tokens.insert(id.to_owned(), value.to_owned());
        }
        tokens
    }
}

/// Id and secret of a token that may sign and is named after its id.
fn signing_token(secret: &Secret) -> Option<(&str, &str)> {
    let id = text(secret, "token-id")?;
    let is_id = id.len() == 6 && id.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    let named = name(&secret.metadata).strip_prefix("bootstrap-token-") == Some(id);
    let signs = text(secret, "usage-bootstrap-signing") == Some("true");
    text(secret, "token-secret").filter(|_| is_id && named && signs).map(|value| (id, value))
}

/// A detached signature: header and signature, without the content between them.
fn sign(content: &str, id: &str, secret: &str) -> jsonwebtoken::errors::Result<String> {
    // Readers compute the signature again and compare it as text: the header is exactly this one.
    let header = BASE64_URL_SAFE_NO_PAD.encode(json!({"alg": "HS256", "kid": id}).to_string());
    let message = format!("{header}.{}", BASE64_URL_SAFE_NO_PAD.encode(content));
    let key = EncodingKey::from_secret(secret.as_bytes());
    let signature = jsonwebtoken::crypto::sign(message.as_bytes(), &key, Algorithm::HS256)?;
    Ok(format!("{header}..{signature}"))
}

#[cfg(test)]
mod tests {
    use super::super::tests::token;
    use super::*;

    /// Upstream's vectors.
    #[test]
    fn signatures_are_upstreams() {
        let content = "Hello from the other side. I must have called a thousand times.";
        for (content, secret, signature) in [
            (content, "my voice is my passcode", "VShe2taLd-YTrmWuRkcL_8QTNDHYxQIEBsAYYiIj1_8"),
            ("", "my voice is my passcode", "7Ui1ALizW4jXphVUB7xUqC9vLYLL9RZeOFfVLoB7Tgk"),
            (content, "", "UfkqvDGiIFxrMnFseDj9LYJOLNrvjW8aHhF71mvvAs8"),
        ] {
            let expected = format!("eyJhbGciOiJIUzI1NiIsImtpZCI6Impvc2h1YSJ9..{signature}");
            assert_eq!(sign(content, "joshua", secret).unwrap(), expected);
        }
    }

    #[test]
    fn the_map_has_a_signature_of_each_token_that_signs() {
        let signing = |id: &str, more: &[(&str, &str)]| {
            let texts = [("token-id", id), ("token-secret", "s"), ("usage-bootstrap-signing", "true")];
            token("bootstrap-token-abcdef", &[&texts[..], more].concat())
        };
        let map = |data: serde_json::Value| -> ConfigMap {
            serde_json::from_value(json!({"metadata": {"name": CLUSTER_INFO, "namespace": PUBLIC}, "data": data}))
                .unwrap()
        };
        let plan = |data: serde_json::Value, token: Secret| {
            let controller = Signer { maps: Informer::fixed([map(data)]), secrets: Informer::fixed([token]) };
            controller.reconcile(&ObjectKey::new(PUBLIC, CLUSTER_INFO), Timestamp::from_second(100).unwrap())
        };
        let unsigned = json!({"kubeconfig": "k"});
        let stale = json!({"kubeconfig": "k", "jws-kubeconfig-abcdef": "old", "jws-kubeconfig-gonego": "x"});
        let right = json!({"kubeconfig": "k", "jws-kubeconfig-abcdef": sign("k", "abcdef", "s").unwrap()});
        let data = |plan: &Plan| plan.writes.first().map(|write| write.body["data"].clone());
        assert_eq!(data(&plan(unsigned.clone(), signing("abcdef", &[]))), Some(right.clone()));
        assert_eq!(data(&plan(stale, signing("abcdef", &[]))), Some(right.clone()));
        assert!(plan(right.clone(), signing("abcdef", &[])).is_empty());
        let ended = signing("abcdef", &[("expiration", "1970-01-01T00:01:00Z")]);
        assert_eq!(data(&plan(right, ended)), Some(unsigned.clone()));
        let ending = plan(unsigned.clone(), signing("abcdef", &[("expiration", "1970-01-01T00:02:00Z")]));
        assert_eq!(ending.again_after, Some(std::time::Duration::from_secs(20)));
        assert!(plan(unsigned, signing("ghijkl", &[])).is_empty());
        assert!(plan(json!({}), signing("abcdef", &[])).is_empty());
    }
}
