//! Fills secrets of type `kubernetes.io/service-account-token` with a signed token of their service account, and
//! removes them with the account.

use std::sync::Arc;

use apimachinery::controller::{Controller, Informer, ObjectKey, Plan, Write};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use k8s_openapi::api::core::v1::{Secret, ServiceAccount};
use serde_json::json;

use crate::app::Context;
use crate::common::{annotation, is_deleted, name, namespace, uid};

const TYPE: &str = "kubernetes.io/service-account-token";
const ACCOUNT_NAME: &str = "kubernetes.io/service-account.name";
const ACCOUNT_UID: &str = "kubernetes.io/service-account.uid";
const ISSUER: &str = "kubernetes/serviceaccount";

struct TokenController {
    key: EncodingKey,
    algorithm: Algorithm,
    root_ca: Option<String>,
    secrets: Arc<Informer<Secret>>,
    accounts: Arc<Informer<ServiceAccount>>,
}

pub fn start(context: &Context) {
    let Some(pem) = &context.service_account_key else {
        return tracing::info!("no --service-account-private-key-file: token secrets are not filled");
    };
    let Some((key, algorithm)) = parse_key(pem) else {
        return tracing::error!("--service-account-private-key-file is neither an RSA nor an EC key");
    };
    let informers = context.driver.informers();
    let controller = TokenController {
        key,
        algorithm,
        root_ca: context.root_ca.clone(),
        secrets: informers.of(),
        accounts: informers.of(),
    };
    context.driver.run(controller, 2, |controller, wiring| {
        let of_type = |secret: &Secret| secret.type_.as_deref() == Some(TYPE);
        wiring.map(&controller.secrets, move |change| {
            change.new.iter().filter(|secret| of_type(secret)).map(|secret| ObjectKey::of(&secret.metadata)).collect()
        });
        let secrets = controller.secrets.clone();
        wiring.map(&controller.accounts, move |change| {
            let account = change.versions().next();
            let secrets = account.map(|account| secrets.in_namespace(namespace(&account.metadata))).unwrap_or_default();
            secrets.iter().filter(|secret| of_type(secret)).map(|secret| ObjectKey::of(&secret.metadata)).collect()
        });
    });
}

fn parse_key(pem: &str) -> Option<(EncodingKey, Algorithm)> {
    let rsa = EncodingKey::from_rsa_pem(pem.as_bytes()).map(|key| (key, Algorithm::RS256));
    rsa.or_else(|_| EncodingKey::from_ec_pem(pem.as_bytes()).map(|key| (key, Algorithm::ES256))).ok()
}

impl Controller for TokenController {
    fn name(&self) -> &'static str {
        "serviceaccount-token"
    }

    fn component(&self) -> &'static str {
        "serviceaccount-token-controller"
    }

    fn reconcile(&self, key: &ObjectKey, _: Timestamp) -> Plan {
        let Some(secret) = self.secrets.get(key).filter(|secret| secret.type_.as_deref() == Some(TYPE)) else {
            return Plan::nothing();
        };
        let Some(account_name) = annotation(&secret.metadata, ACCOUNT_NAME).filter(|_| !is_deleted(&secret.metadata))
        else {
            return Plan::nothing();
        };
        let account = self.accounts.get(&ObjectKey::new(&key.namespace, account_name));
        let known_uid = annotation(&secret.metadata, ACCOUNT_UID).filter(|uid| !uid.is_empty());
        let account = account.filter(|account| known_uid.is_none_or(|known| known == uid(&account.metadata)));
        match account {
            None => Plan::write(Write::delete(secret.as_ref())),
            Some(account) => self.fill(key, &secret, &account),
        }
    }
}

impl TokenController {
    fn fill(&self, key: &ObjectKey, secret: &Secret, account: &ServiceAccount) -> Plan {
        let have = |field: &str| secret.data.as_ref().and_then(|data| data.get(field)).map(|bytes| bytes.0.as_slice());
        let mut data = serde_json::Map::new();
        if have("token").is_none_or(<[u8]>::is_empty) {
            match self.token(secret, account) {
                Ok(token) => drop(data.insert("token".to_owned(), json!(STANDARD.encode(token)))),
                Err(error) => tracing::error!(%key, %error, "cannot sign a service account token"),
            }
        }
        let wanted = [("ca.crt", self.root_ca.as_deref()), ("namespace", Some(key.namespace.as_str()))];
        for (field, value) in wanted {
            if let Some(value) = value.filter(|value| have(field) != Some(value.as_bytes())) {
                data.insert(field.to_owned(), json!(STANDARD.encode(value)));
            }
        }
        let annotated = annotation(&secret.metadata, ACCOUNT_UID) == Some(uid(&account.metadata));
        if data.is_empty() && annotated {
            return Plan::nothing();
        }
        let patch = json!({
            "metadata": {"uid": secret.metadata.uid, "annotations": {ACCOUNT_UID: account.metadata.uid}},
            "data": data,
        });
        Plan::write(Write::merge_patch::<Secret>(key.clone(), patch))
    }

    fn token(&self, secret: &Secret, account: &ServiceAccount) -> jsonwebtoken::errors::Result<String> {
        let (account_namespace, account_name) = (namespace(&account.metadata), name(&account.metadata));
        let claims = json!({
            "iss": ISSUER,
            "sub": format!("system:serviceaccount:{account_namespace}:{account_name}"),
            "kubernetes.io/serviceaccount/namespace": account_namespace,
            "kubernetes.io/serviceaccount/secret.name": name(&secret.metadata),
            "kubernetes.io/serviceaccount/service-account.name": account_name,
            "kubernetes.io/serviceaccount/service-account.uid": uid(&account.metadata),
        });
        jsonwebtoken::encode(&Header::new(self.algorithm), &claims, &self.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn plan(secret: Value, account: Option<Value>) -> Plan {
        let pem = rcgen::KeyPair::generate().unwrap().serialize_pem();
        let (key, algorithm) = parse_key(&pem).unwrap();
        let controller = TokenController {
            key,
            algorithm,
            root_ca: Some("PEM".to_owned()),
            secrets: Informer::fixed([serde_json::from_value::<Secret>(secret).unwrap()]),
            accounts: Informer::fixed(
                account.map(|account| serde_json::from_value::<ServiceAccount>(account).unwrap()),
            ),
        };
        controller.reconcile(&ObjectKey::new("ns", "s"), Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn secrets_are_filled_and_go_with_their_account() {
        let secret = json!({"metadata": {"name": "s", "namespace": "ns", "uid": "s", "annotations": {ACCOUNT_NAME: "a"}}, "type": TYPE});
        let account = json!({"metadata": {"name": "a", "namespace": "ns", "uid": "u"}});
        let filled = plan(secret.clone(), Some(account.clone()));
        let data = &filled.writes[0].body["data"];
        assert_eq!((&data["namespace"], &data["ca.crt"]), (&json!("bnM="), &json!("UEVN")));
        let token = String::from_utf8(STANDARD.decode(data["token"].as_str().unwrap()).unwrap()).unwrap();
        let claims = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap()).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&claims).unwrap()["sub"], "system:serviceaccount:ns:a");
        assert_eq!(filled.writes[0].body["metadata"]["annotations"][ACCOUNT_UID], "u");

        let mut settled = secret.clone();
        settled["data"] = data.clone();
        settled["metadata"]["annotations"][ACCOUNT_UID] = json!("u");
        assert!(plan(settled.clone(), Some(account.clone())).is_empty());
        settled["metadata"]["annotations"][ACCOUNT_UID] = json!("another account of the same name");
        assert_eq!(plan(settled, Some(account)).writes[0].verb, apimachinery::controller::Verb::Delete);
        assert_eq!(plan(secret, None).writes[0].verb, apimachinery::controller::Verb::Delete);
    }
}
