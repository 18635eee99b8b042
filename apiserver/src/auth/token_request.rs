//! `serviceaccounts/<name>/token`: makes a bound token. The answer is the request with its status filled in.

use apimachinery::meta::{GroupKind, GroupResource, GroupVersion, GroupVersionKind};
use apimachinery::status::{FieldError, Result, Status};
use async_trait::async_trait;
use serde_json::{Value, json};

use super::service_account::{Claims, Private, Ref, username};
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Cx, SubresourceHandler};
use crate::verbs::stale;

/// Clients that ask for exactly this many seconds are kubelets with the default projected volume: their tokens live a
/// year, so that programs that never read the file again keep working, and carry `warnafter`.
const EXTENDED_FOR: i64 = 60 * 60 + 7;
const EXTENDED: i64 = 365 * 24 * 60 * 60;
const DEFAULT: i64 = 60 * 60;
const MINIMUM: i64 = 10 * 60;

pub struct TokenRequest;

pub static TOKEN_REQUEST: TokenRequest = TokenRequest;

#[async_trait]
impl SubresourceHandler for TokenRequest {
    async fn handle(&self, cx: &Cx<'_>, name: &str, _verb: &str, mut body: Value) -> Result<Value> {
        // A token is often asked for right after its account or pod was made.
        cx.server.freshness.reach_present(&cx.server.caches).await.map_err(|error| stale(&error))?;
        let account = find(cx, "serviceaccounts", cx.namespace, name)?;
        check_metadata(cx, name, &body, &account)?;
        let tokens = cx.server.auth.service_accounts();
        body.set_default(&["spec", "expirationSeconds"], DEFAULT);
        if body.list_at(&["spec", "audiences"]).is_empty() {
            body.set(&["spec", "audiences"], tokens.audiences().to_vec());
        }
        for (field, value) in [("name", name), ("namespace", cx.namespace), ("uid", account.uid())] {
            body.set(&["metadata", field], value);
        }
        body.set(&["metadata", "creationTimestamp"], seconds_text(cx.now.as_second()));
        let errors = validate(&body);
        if !errors.is_empty() {
            return Err(Status::invalid(&kind(), "", &errors));
        }
        let max = i64::try_from(cx.server.config.service_account_max_token_expiration.as_secs()).unwrap_or(i64::MAX);
        if max > 0 && body.i64_at(&["spec", "expirationSeconds"]) > Some(max) {
            body.set(&["spec", "expirationSeconds"], max);
        }
        let claims = claims(cx, &account, &body)?;
        let signed = tokens.sign(&claims).ok_or_else(Status::path_not_found)?;
        let token = signed.map_err(|error| Status::internal(format!("failed to generate token: {error}")))?;
        let expires = cx.now.as_second() + body.i64_at(&["spec", "expirationSeconds"]).unwrap_or(DEFAULT);
        body.set(&["status"], json!({"token": token, "expirationTimestamp": seconds_text(expires)}));
        body.set_gvk(&GroupVersionKind::new("authentication.k8s.io", "v1", "TokenRequest"));
        Ok(body)
    }
}

fn kind() -> GroupKind {
    GroupKind::new("authentication.k8s.io", "TokenRequest")
}

fn seconds_text(seconds: i64) -> String {
    jiff::Timestamp::from_second(seconds).unwrap_or(jiff::Timestamp::MAX).to_string()
}

fn find(cx: &Cx<'_>, resource: &'static str, namespace: &str, name: &str) -> Result<Value> {
    let stored = cx.server.caches.get("", resource).and_then(|cache| cache.get(namespace, name));
    stored.map(|stored| stored.value()).ok_or_else(|| Status::not_found(&GroupResource::new("", resource), name))
}

fn check_metadata(cx: &Cx<'_>, name: &str, body: &Value, account: &Value) -> Result<()> {
    let differs = |given: &str, wanted: &str| !given.is_empty() && given != wanted;
    let mut errors = Vec::new();
    if differs(body.name(), name) {
        errors.push(FieldError::invalid(
            "metadata.name",
            body.name(),
            "must match the service account name if specified",
        ));
    }
    if differs(body.namespace(), cx.namespace) {
        let detail = "must match the service account namespace if specified";
        errors.push(FieldError::invalid("metadata.namespace", body.namespace(), detail));
    }
    if !errors.is_empty() {
        return Err(Status::invalid(&kind(), name, &errors));
    }
    if differs(body.uid(), account.uid()) {
        let why = format!(
            "the UID in the token request ({}) does not match the UID of the service account ({})",
            body.uid(),
            account.uid()
        );
        return Err(Status::conflict(&GroupResource::new("authentication.k8s.io", "TokenRequest"), name, why));
    }
    Ok(())
}

fn validate(body: &Value) -> Vec<FieldError> {
    let seconds = body.i64_at(&["spec", "expirationSeconds"]).unwrap_or(DEFAULT);
    let error = |detail: &str| vec![FieldError::invalid("spec.expirationSeconds", seconds, detail)];
    match seconds {
        ..MINIMUM => error("may not specify a duration less than 10 minutes"),
        0x1_0000_0001.. => error("may not specify a duration larger than 2^32 seconds"),
        _ => Vec::new(),
    }
}

/// What the token is bound to: nothing, or one live object.
#[derive(Default)]
struct Binding {
    pod: Option<Ref>,
    node: Option<Ref>,
    secret: Option<Ref>,
}

fn reference(object: &Value) -> Ref {
    Ref { name: object.name().to_owned(), uid: object.uid().to_owned() }
}

fn bind(cx: &Cx<'_>, account: &Value, wanted: &Value) -> Result<Binding> {
    let (kind, name) = (wanted.str_at(&["kind"]), wanted.str_at(&["name"]));
    let api_version = wanted.str_at(&["apiVersion"]);
    let group = GroupVersion::parse(api_version).map(|version| version.group).unwrap_or_default();
    let mut binding = Binding::default();
    let (resource, object) = match (&*group, kind) {
        ("", "Pod") => {
            let pod = find(cx, "pods", cx.namespace, name)?;
            if pod.str_at(&["spec", "serviceAccountName"]) != account.name() {
                return Err(Status::bad_request(format!(
                    "cannot bind token for serviceaccount {:?} to pod running with different serviceaccount name.",
                    account.name()
                )));
            }
            let node = pod.str_at(&["spec", "nodeName"]);
            if !node.is_empty() {
                let found = find(cx, "nodes", "", node).map(|node| reference(&node));
                binding.node = Some(found.unwrap_or_else(|_| Ref { name: node.to_owned(), ..Ref::default() }));
            }
            binding.pod = Some(reference(&pod));
            ("Pod", pod)
        }
        ("", "Node") => {
            let node = find(cx, "nodes", "", name)?;
            binding.node = Some(reference(&node));
            ("Node", node)
        }
        ("", "Secret") => {
            let secret = find(cx, "secrets", cx.namespace, name)?;
            binding.secret = Some(reference(&secret));
            ("Secret", secret)
        }
        _ => {
            let core = if api_version.contains('/') { "" } else { "/" };
            return Err(Status::bad_request(format!(
                "cannot bind token to object of type {core}{api_version}, Kind={kind}"
            )));
        }
    };
    let uid = wanted.str_at(&["uid"]);
    if !uid.is_empty() && uid != object.uid() {
        let why = format!(
            "the UID in the bound object reference ({uid}) does not match the UID in record. The object might have been deleted and then recreated"
        );
        return Err(Status::conflict(&GroupResource::new("", resource), name, why));
    }
    Ok(binding)
}

fn claims(cx: &Cx<'_>, account: &Value, body: &Value) -> Result<Claims> {
    let wanted = body.at(&["spec", "boundObjectRef"]).filter(|wanted| !wanted.is_null());
    let Binding { pod, node, secret } =
        wanted.map_or_else(|| Ok(Binding::default()), |wanted| bind(cx, account, wanted))?;
    let tokens = cx.server.auth.service_accounts();
    let aud: Vec<String> =
        body.list_at(&["spec", "audiences"]).iter().filter_map(Value::as_str).map(str::to_owned).collect();
    let mut seconds = body.i64_at(&["spec", "expirationSeconds"]).unwrap_or(DEFAULT);
    let mut warnafter = None;
    let for_server = aud.iter().all(|audience| tokens.audiences().contains(audience));
    let extends = cx.server.config.service_account_extend_token_expiration;
    if extends && pod.is_some() && seconds == EXTENDED_FOR && for_server {
        warnafter = Some(cx.now.as_second() + seconds);
        seconds = EXTENDED;
    }
    let now = cx.now.as_second();
    Ok(Claims {
        aud,
        exp: Some(now + seconds),
        iat: Some(now),
        nbf: Some(now),
        iss: tokens.issuer().to_owned(),
        jti: uuid::Uuid::new_v4().to_string(),
        sub: username(account.namespace(), account.name()),
        kubernetes: Some(Private {
            namespace: account.namespace().to_owned(),
            serviceaccount: reference(account),
            pod,
            node,
            secret,
            warnafter,
        }),
        ..Claims::default()
    })
}
