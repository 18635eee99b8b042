//! Service account tokens: JSON web tokens that this server signs and checks. A token is good while its signature,
//! times and audience are, and the account and the object that it is bound to still exist with the same uid.

use std::collections::HashMap;
use std::sync::Arc;

use jsonwebtoken::{Header, Validation, decode, decode_header, encode};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::UserInfo;
use super::keys::{KeyError, PublicKey, SigningKey, read_public_keys, read_signing_key};
use super::objects::Objects;
use super::tokens::constant_time_equal;
use crate::config::Config;

/// Issuer of the unbound tokens that are kept in secrets.
const LEGACY_ISSUER: &str = "kubernetes/serviceaccount";
/// Clock skew that is forgiven, in seconds.
const LEEWAY: i64 = 60;
/// Tokens whose signature is remembered to be right.
const REMEMBERED: usize = 4096;

/// What a bound token says. Names are those of RFC 7519 and of upstream's private claims.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Claims {
    #[serde(deserialize_with = "one_or_many")]
    pub aud: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exp: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iat: Option<i64>,
    pub iss: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub jti: String,
    #[serde(rename = "kubernetes.io", skip_serializing_if = "Option::is_none")]
    pub kubernetes: Option<Private>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nbf: Option<i64>,
    pub sub: String,
    #[serde(flatten)]
    pub legacy: Legacy,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Private {
    pub namespace: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<Ref>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<Ref>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret: Option<Ref>,
    pub serviceaccount: Ref,
    /// When a client that still uses the token should have fetched a new one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warnafter: Option<i64>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ref {
    pub name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub uid: String,
}

/// The claims of tokens in secrets.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Legacy {
    #[serde(rename = "kubernetes.io/serviceaccount/namespace", skip_serializing_if = "String::is_empty")]
    namespace: String,
    #[serde(rename = "kubernetes.io/serviceaccount/secret.name", skip_serializing_if = "String::is_empty")]
    secret: String,
    #[serde(rename = "kubernetes.io/serviceaccount/service-account.name", skip_serializing_if = "String::is_empty")]
    account: String,
    #[serde(rename = "kubernetes.io/serviceaccount/service-account.uid", skip_serializing_if = "String::is_empty")]
    uid: String,
}

fn one_or_many<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    Ok(match Value::deserialize(from)? {
        Value::String(one) => vec![one],
        Value::Array(many) => many.into_iter().filter_map(|v| v.as_str().map(str::to_owned)).collect(),
        _ => Vec::new(),
    })
}

#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("token cannot be parsed")]
    Malformed,
    #[error("no known key made the token's signature")]
    Signature,
    #[error("service account token has expired")]
    Expired,
    #[error("service account token is not valid yet")]
    NotYet,
    #[error("token audiences {given:?} is invalid for the target audiences {wanted:?}")]
    Audience { given: Vec<String>, wanted: Vec<String> },
    #[error("service account {namespace}/{name} is gone or not the one the token was made for")]
    Account { namespace: String, name: String },
    #[error("service account token has been invalidated")]
    Invalidated,
    #[error("the token names no service account")]
    NoAccount,
}

#[derive(Debug, thiserror::Error)]
#[error("the token cannot be signed")]
pub struct SignError(#[from] jsonwebtoken::errors::Error);

/// A token that proved to be good.
pub struct Verified {
    pub user: UserInfo,
    /// Those of the wanted audiences that the token is meant for.
    pub audiences: Vec<String>,
}

/// The server's keys, issuers and audiences.
pub struct ServiceAccountTokens {
    issuers: Vec<String>,
    audiences: Vec<String>,
    keys: Vec<PublicKey>,
    signer: Option<SigningKey>,
    /// `--service-account-lookup=false` trusts unbound tokens of deleted accounts.
    lookup: bool,
    verified: Mutex<HashMap<[u8; 32], Arc<Claims>>>,
}

impl ServiceAccountTokens {
    pub fn new(config: &Config) -> Result<Self, KeyError> {
        let (signer, own) = match &config.service_account_signing_key_file {
            Some(path) => {
                let (signer, public) = read_signing_key(path)?;
                (Some(signer), Some(public))
            }
            None => (None, None),
        };
        let mut keys = Vec::new();
        for path in &config.service_account_key_file {
            keys.extend(read_public_keys(path)?);
        }
        keys.extend(own.filter(|own| keys.iter().all(|key: &PublicKey| key.id != own.id)));
        let issuers = config.service_account_issuer.clone();
        let audiences = if config.api_audiences.is_empty() { issuers.clone() } else { config.api_audiences.clone() };
        Ok(Self { issuers, audiences, keys, signer, lookup: config.service_account_lookup, verified: Mutex::default() })
    }

    /// What tokens are meant for when their request names no audience.
    pub fn audiences(&self) -> &[String] {
        &self.audiences
    }

    pub fn issuer(&self) -> &str {
        self.issuers.first().map_or("", String::as_str)
    }

    pub fn keys(&self) -> &[PublicKey] {
        &self.keys
    }

    pub fn can_sign(&self) -> bool {
        self.signer.is_some()
    }

    /// The signed token; `None` when the server has no signing key.
    pub fn sign(&self, claims: &Claims) -> Option<Result<String, SignError>> {
        let signer = self.signer.as_ref()?;
        let header = Header { typ: None, kid: Some(signer.id.clone()), ..Header::new(signer.algorithm) };
        Some(encode(&header, claims, &signer.key).map_err(SignError))
    }

    /// `None`: not a token of ours. `wanted` empty stands for the server's own audiences.
    pub fn verify(
        &self,
        objects: &dyn Objects,
        token: &str,
        wanted: &[String],
        now: i64,
    ) -> Result<Option<Verified>, TokenError> {
        let Some(issuer) = issuer_of(token) else { return Ok(None) };
        let legacy = issuer == LEGACY_ISSUER;
        if !legacy && !self.issuers.contains(&issuer) {
            return Ok(None);
        }
        let claims = self.checked_claims(token)?;
        if claims.exp.is_some_and(|exp| exp < now - LEEWAY) {
            return Err(TokenError::Expired);
        }
        if claims.nbf.is_some_and(|nbf| nbf > now + LEEWAY) {
            return Err(TokenError::NotYet);
        }
        if legacy {
            let user = self.legacy_user(objects, &claims, token)?;
            return Ok(Some(Verified { user, audiences: wanted.to_vec() }));
        }
        let wanted = if wanted.is_empty() { &self.audiences } else { wanted };
        let audiences: Vec<String> = wanted.iter().filter(|audience| claims.aud.contains(audience)).cloned().collect();
        if audiences.is_empty() {
            return Err(TokenError::Audience { given: claims.aud.clone(), wanted: wanted.to_vec() });
        }
        Ok(Some(Verified { user: self.bound_user(objects, &claims)?, audiences }))
    }

    /// The claims of a token whose signature is right; a signature is checked once and then remembered.
    fn checked_claims(&self, token: &str) -> Result<Arc<Claims>, TokenError> {
        let digest: [u8; 32] = Sha256::digest(token).into();
        if let Some(claims) = self.verified.lock().get(&digest) {
            return Ok(claims.clone());
        }
        let header = decode_header(token).map_err(|_| TokenError::Malformed)?;
        let named = |key: &&PublicKey| header.kid.as_ref().is_none_or(|kid| *kid == key.id);
        let by_id: Vec<&PublicKey> = self.keys.iter().filter(named).collect();
        let candidates = if by_id.is_empty() { self.keys.iter().collect() } else { by_id };
        let claims = candidates.iter().filter(|key| key.algorithm == header.alg).find_map(|key| {
            let mut validation = Validation::new(key.algorithm);
            validation.required_spec_claims.clear();
            (validation.validate_exp, validation.validate_nbf, validation.validate_aud) = (false, false, false);
            decode::<Claims>(token, &key.key, &validation).ok()
        });
        let claims = Arc::new(claims.ok_or(TokenError::Signature)?.claims);
        let mut verified = self.verified.lock();
        if verified.len() >= REMEMBERED {
            verified.clear();
        }
        verified.insert(digest, claims.clone());
        Ok(claims)
    }

    fn bound_user(&self, objects: &dyn Objects, claims: &Claims) -> Result<UserInfo, TokenError> {
        let Some(private) = &claims.kubernetes else { return Err(TokenError::NoAccount) };
        let Private { namespace, serviceaccount, pod, node, secret, .. } = private;
        check_account(objects, namespace, serviceaccount)?;
        let check = |resource, namespace: &str, bound: &Option<Ref>| match bound {
            Some(bound) if !is_alive(objects, resource, namespace, bound) => Err(TokenError::Invalidated),
            _ => Ok(()),
        };
        check("secrets", namespace, secret)?;
        check("pods", namespace, pod)?;
        if pod.is_none() {
            check("nodes", "", node)?;
        }
        let mut user = user_info(namespace, &serviceaccount.name, &serviceaccount.uid);
        let mut extra =
            |key: &str, value: String| user.extra.insert(format!("authentication.kubernetes.io/{key}"), vec![value]);
        for (kind, bound) in [("pod", pod), ("node", node)] {
            let Some(bound) = bound else { continue };
            extra(&format!("{kind}-name"), bound.name.clone());
            if !bound.uid.is_empty() {
                extra(&format!("{kind}-uid"), bound.uid.clone());
            }
        }
        if !claims.jti.is_empty() {
            extra("credential-id", format!("JTI={}", claims.jti));
        }
        Ok(user)
    }

    fn legacy_user(&self, objects: &dyn Objects, claims: &Claims, token: &str) -> Result<UserInfo, TokenError> {
        let Legacy { namespace, secret, account, uid } = &claims.legacy;
        if namespace.is_empty() || account.is_empty() || claims.sub != username(namespace, account) {
            return Err(TokenError::NoAccount);
        }
        if self.lookup {
            let object = objects.get("", "secrets", namespace, secret).ok_or(TokenError::Invalidated)?;
            let known = object.pointer("/data/token").and_then(Value::as_str).unwrap_or_default();
            let known = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, known).unwrap_or_default();
            if object["metadata"].get("deletionTimestamp").is_some() || !constant_time_equal(&known, token.as_bytes()) {
                return Err(TokenError::Invalidated);
            }
            check_account(objects, namespace, &Ref { name: account.clone(), uid: uid.clone() })?;
        }
        Ok(user_info(namespace, account, uid))
    }
}

fn check_account(objects: &dyn Objects, namespace: &str, account: &Ref) -> Result<(), TokenError> {
    match is_alive(objects, "serviceaccounts", namespace, account) {
        true => Ok(()),
        false => Err(TokenError::Account { namespace: namespace.to_owned(), name: account.name.clone() }),
    }
}

/// Whether the object exists with this uid and was not deleted longer ago than the leeway.
fn is_alive(objects: &dyn Objects, resource: &str, namespace: &str, wanted: &Ref) -> bool {
    let Some(object) = objects.get("", resource, namespace, &wanted.name) else { return false };
    let meta = &object["metadata"];
    let deleted = meta["deletionTimestamp"].as_str().and_then(|at| at.parse::<jiff::Timestamp>().ok());
    let long_gone = deleted.is_some_and(|at| at.as_second() < jiff::Timestamp::now().as_second() - LEEWAY);
    meta["uid"] == wanted.uid.as_str() && !long_gone
}

/// The `iss` of an unchecked token.
fn issuer_of(token: &str) -> Option<String> {
    let mut parts = token.split('.');
    let (_, payload, _, None) = (parts.next()?, parts.next()?, parts.next()?, parts.next()) else { return None };
    let bytes = base64::Engine::decode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, payload).ok()?;
    let claims: Value = serde_json::from_slice(&bytes).ok()?;
    claims["iss"].as_str().map(str::to_owned)
}

pub fn username(namespace: &str, name: &str) -> String {
    format!("system:serviceaccount:{namespace}:{name}")
}

/// Namespace and name of a service account's user name.
pub fn split_username(user: &str) -> Option<(&str, &str)> {
    let (namespace, name) = user.strip_prefix("system:serviceaccount:")?.split_once(':')?;
    (!namespace.is_empty() && !name.is_empty() && !name.contains(':')).then_some((namespace, name))
}

pub fn groups(namespace: &str) -> Vec<String> {
    vec!["system:serviceaccounts".to_owned(), format!("system:serviceaccounts:{namespace}")]
}

/// The user that a service account is.
pub fn user_info(namespace: &str, name: &str, uid: &str) -> UserInfo {
    UserInfo { name: username(namespace, name), uid: uid.to_owned(), groups: groups(namespace), ..UserInfo::default() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::objects::Fake;
    use super::*;

    fn tokens() -> ServiceAccountTokens {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sa.key");
        std::fs::write(&path, rcgen::KeyPair::generate().unwrap().serialize_pem()).unwrap();
        let mut config = Config::for_etcd("http://127.0.0.1:1");
        config.service_account_signing_key_file = Some(path);
        config.service_account_issuer = vec!["https://issuer".into()];
        ServiceAccountTokens::new(&config).unwrap()
    }

    fn claims() -> Claims {
        let reference = |name: &str, uid: &str| Ref { name: name.into(), uid: uid.into() };
        Claims {
            aud: vec!["https://issuer".into()],
            exp: Some(2000),
            nbf: Some(1000),
            iss: "https://issuer".into(),
            jti: "j".into(),
            sub: username("a", "default"),
            kubernetes: Some(Private {
                namespace: "a".into(),
                serviceaccount: reference("default", "1"),
                pod: Some(reference("p", "2")),
                node: Some(reference("n", "3")),
                ..Private::default()
            }),
            ..Claims::default()
        }
    }

    fn cluster(pod_uid: &str) -> Fake {
        let object = |name: &str, uid: &str| json!({"metadata": {"namespace": "a", "name": name, "uid": uid}});
        Fake(vec![("", "serviceaccounts", object("default", "1")), ("", "pods", object("p", pod_uid))])
    }

    #[test]
    fn a_bound_token_is_as_good_as_its_pod() {
        let tokens = tokens();
        let token = tokens.sign(&claims()).unwrap().unwrap();
        let verified = tokens.verify(&cluster("2"), &token, &[], 1500).unwrap().unwrap();
        assert_eq!(verified.user.name, "system:serviceaccount:a:default");
        assert_eq!(verified.user.extra["authentication.kubernetes.io/node-name"], ["n"]);
        let outcome = |objects: &Fake, wanted: &[String], now| {
            tokens.verify(objects, &token, wanted, now).err().map(|e| e.to_string())
        };
        assert_eq!(outcome(&cluster("9"), &[], 1500).as_deref(), Some("service account token has been invalidated"));
        assert_eq!(outcome(&cluster("2"), &[], 3000).as_deref(), Some("service account token has expired"));
        assert_eq!(outcome(&cluster("2"), &[], 100).as_deref(), Some("service account token is not valid yet"));
        assert!(outcome(&cluster("2"), &["vault".into()], 1500).is_some());
        assert!(outcome(&Fake::default(), &[], 1500).is_some());
    }

    #[test]
    fn forged_and_foreign_tokens() {
        let (ours, theirs) = (tokens(), tokens());
        let forged = theirs.sign(&claims()).unwrap().unwrap();
        assert!(matches!(ours.verify(&cluster("2"), &forged, &[], 1500), Err(TokenError::Signature)));
        let foreign = theirs.sign(&Claims { iss: "https://other".into(), ..claims() }).unwrap().unwrap();
        assert!(ours.verify(&cluster("2"), &foreign, &[], 1500).unwrap().is_none());
        for junk in ["", "a.b", "a.b.c", "....", "x"] {
            assert!(ours.verify(&cluster("2"), junk, &[], 1500).unwrap().is_none(), "{junk}");
        }
    }
}
