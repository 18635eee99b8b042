use std::sync::atomic::{AtomicBool, Ordering};

use jsonwebtoken::{EncodingKey, Header, encode};
use serde_json::{Value, json};

use super::settings::AuthenticationConfig;
use super::*;
use crate::testing::JsonPeer;

const NOW: i64 = 1_700_000_000;

struct Signer {
    key: EncodingKey,
    jwk: Value,
}

fn signer(id: &str) -> Signer {
    let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let key = EncodingKey::from_ec_der(pair.serialized_der());
    let mut jwk =
        serde_json::to_value(jsonwebtoken::jwk::Jwk::from_encoding_key(&key, Algorithm::ES256).unwrap()).unwrap();
    jwk["kid"] = id.into();
    Signer { key, jwk }
}

impl Signer {
    fn token(&self, claims: &Value) -> String {
        let header = Header { kid: self.jwk["kid"].as_str().map(str::to_owned), ..Header::new(Algorithm::ES256) };
        encode(&header, claims, &self.key).unwrap()
    }
}

/// An issuer whose keys are these; the second are there once the switch is on.
async fn issuer(first: Value, second: Value, switch: &'static AtomicBool) -> JsonPeer {
    let url = std::sync::Arc::new(parking_lot::Mutex::new(String::new()));
    let own = url.clone();
    let peer = JsonPeer::start(move |path, _| {
        let url = own.lock().clone();
        match path {
            "/.well-known/openid-configuration" => (200, json!({"issuer": url, "jwks_uri": format!("{url}/keys")})),
            "/keys" if switch.load(Ordering::SeqCst) => (200, json!({"keys": [first, second]})),
            "/keys" => (200, json!({"keys": [{"kty": "strange"}, first]})),
            _ => (404, Value::Null),
        }
    })
    .await
    .unwrap();
    url.lock().clone_from(&peer.url);
    peer
}

fn authenticator(peer: &JsonPeer, mappings: Value) -> JwtAuthenticator {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("authn.json");
    let mut jwt = json!({
        "issuer": {"url": peer.url, "audiences": ["cluster"], "certificateAuthority": peer.certificate},
    });
    apimachinery::merge::merge_patch(&mut jwt, &mappings);
    let config = json!({
        "apiVersion": "apiserver.config.k8s.io/v1beta1", "kind": "AuthenticationConfiguration", "jwt": [jwt],
    });
    std::fs::write(&path, config.to_string()).unwrap();
    let issuer = AuthenticationConfig::read(&path).unwrap().issuers.remove(0);
    JwtAuthenticator::new(issuer).unwrap()
}

fn claims(peer: &JsonPeer) -> Value {
    json!({"iss": peer.url, "aud": "cluster", "sub": "jane", "groups": ["devs", "ops"], "exp": NOW + 60, "jti": "7"})
}

fn with(mut claims: Value, name: &str, value: Value) -> Value {
    claims[name] = value;
    claims
}

#[tokio::test]
async fn tokens_of_an_issuer_are_users() {
    static SWITCH: AtomicBool = AtomicBool::new(false);
    let (good, bad) = (signer("a"), signer("a"));
    let peer = issuer(good.jwk.clone(), Value::Null, &SWITCH).await;
    let mappings = json!({"claimMappings": {
        "username": {"claim": "sub", "prefix": "x:"}, "groups": {"claim": "groups", "prefix": ""},
    }});
    let known = authenticator(&peer, mappings);
    let user = known.user(&good.token(&claims(&peer)), NOW).await.unwrap().unwrap();
    assert_eq!((user.name.as_str(), user.groups.join(",").as_str()), ("x:jane", "devs,ops"));
    assert_eq!(user.extra["authentication.kubernetes.io/credential-id"], ["JTI=7"]);
    let other = with(claims(&peer), "iss", json!("https://other"));
    assert_eq!(known.user(&good.token(&other), NOW).await.unwrap(), None);
    assert_eq!(known.user("no.token", NOW).await.unwrap(), None);
    let told = |error: JwtError| error.to_string();
    let refused = [
        (bad.token(&claims(&peer)), "oidc: verify token: no key of the issuer made the signature"),
        (
            good.token(&with(claims(&peer), "exp", json!(NOW - 1))),
            "oidc: verify token: token is expired or says not when it expires",
        ),
        (
            good.token(&with(claims(&peer), "aud", json!(["b"]))),
            "oidc: verify token: expected audience in [\"cluster\"] got [\"b\"]",
        ),
        (
            good.token(&with(claims(&peer), "sub", json!(7))),
            "oidc: parse username claims \"sub\": claim not present or not of the right type",
        ),
    ];
    for (token, expected) in refused {
        assert_eq!(told(known.user(&token, NOW).await.unwrap_err()), expected);
    }
    // Discovery and keys, once.
    assert_eq!(peer.asked().len(), 2);
}

#[tokio::test]
async fn new_keys_are_fetched_when_they_are_needed() {
    static SWITCH: AtomicBool = AtomicBool::new(false);
    let (first, second) = (signer("a"), signer("b"));
    let peer = issuer(first.jwk.clone(), second.jwk.clone(), &SWITCH).await;
    let mut known = authenticator(&peer, json!({"claimMappings": {"username": {"claim": "sub", "prefix": ""}}}));
    let (old, new) = (first.token(&claims(&peer)), second.token(&claims(&peer)));
    assert!(known.user(&old, NOW).await.unwrap().is_some());
    SWITCH.store(true, Ordering::SeqCst);
    // Not so soon.
    assert!(known.user(&new, NOW).await.is_err());
    known.keys.pause = std::time::Duration::ZERO;
    assert_eq!(known.user(&new, NOW).await.unwrap().unwrap().name, "jane");
    assert_eq!(peer.asked().len(), 3);
}

#[tokio::test]
async fn expressions_make_users_and_refuse_them() {
    static SWITCH: AtomicBool = AtomicBool::new(false);
    let signer = signer("a");
    let peer = issuer(signer.jwk.clone(), Value::Null, &SWITCH).await;
    let mappings = json!({
        "claimMappings": {
            "username": {"expression": "'u:' + claims.sub"},
            "groups": {"expression": "claims.groups.filter(g, g != 'ops')"},
            "uid": {"expression": "claims.jti"},
            "extra": [{"key": "example.com/tenant", "valueExpression": "claims.?tenant.orValue('')"}],
        },
        "claimValidationRules": [
            {"claim": "hd", "requiredValue": "example.com"},
            {"expression": "claims.exp - claims.iat <= 3600", "message": "lives too long"},
        ],
        "userValidationRules": [{"expression": "!user.username.startsWith('u:system:')", "message": "reserved"}],
    });
    let known = authenticator(&peer, mappings);
    let good = with(with(claims(&peer), "iat", json!(NOW)), "hd", json!("example.com"));
    let user = known.user(&signer.token(&good), NOW).await.unwrap().unwrap();
    assert_eq!(
        (user.name.as_str(), user.uid.as_str(), user.groups.as_slice()),
        ("u:jane", "7", ["devs".to_owned()].as_slice())
    );
    assert_eq!(user.extra.len(), 1);
    let tenant = known.user(&signer.token(&with(good.clone(), "tenant", json!("t"))), NOW).await.unwrap().unwrap();
    assert_eq!(tenant.extra["example.com/tenant"], ["t"]);
    let refused = [
        (
            with(good.clone(), "hd", json!("b")),
            "oidc: required claim hd value does not match. Got = b, want = example.com",
        ),
        (
            with(good.clone(), "iat", json!(1)),
            "oidc: error evaluating claim validation expression: validation expression 'claims.exp - claims.iat <= 3600' failed: lives too long",
        ),
        (
            with(good, "sub", json!("system:x")),
            "oidc: error evaluating user info validation rule: validation expression '!user.username.startsWith('u:system:')' failed: reserved",
        ),
    ];
    for (claims, expected) in refused {
        assert_eq!(known.user(&signer.token(&claims), NOW).await.unwrap_err().to_string(), expected);
    }
}
