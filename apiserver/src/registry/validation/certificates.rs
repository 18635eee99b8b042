//! Rules for certificate signing requests and bundles of trust anchors.

use apimachinery::meta::validation::is_dns1123_subdomain;
use apimachinery::status::FieldError;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use x509_parser::prelude::{FromDer, X509CertificationRequest};

use super::{Errors, IMMUTABLE, Path, immutable, required};
use crate::registry::common::same;
use crate::registry::object::ObjectExt;

const USAGES: [&str; 23] = [
    "any",
    "cert sign",
    "client auth",
    "code signing",
    "content commitment",
    "crl sign",
    "data encipherment",
    "decipher only",
    "digital signature",
    "email protection",
    "encipher only",
    "ipsec end system",
    "ipsec tunnel",
    "ipsec user",
    "key agreement",
    "key encipherment",
    "microsoft sgc",
    "netscape sgc",
    "ocsp signing",
    "s/mime",
    "server auth",
    "signing",
    "timestamping",
];
/// The shortest life of a certificate that may be asked for.
const SHORTEST_SECONDS: i64 = 600;

pub fn request(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    if let Err(problem) = parse_request(spec.str_at(&["request"])) {
        errors.push(FieldError::invalid("spec.request", spec["request"].clone(), problem));
    }
    let usages = Path::SPEC.field("usages");
    if spec.list_at(&["usages"]).is_empty() {
        errors.push(FieldError::required(usages, "usages must not be empty"));
    }
    for (index, usage) in spec.list_at(&["usages"]).iter().enumerate() {
        let text = usage.as_str().unwrap_or_default();
        if !USAGES.contains(&text) {
            errors.push(FieldError::not_supported(usages.index(index), text, &USAGES));
        }
    }
    if let Some(name) = required(spec, "signerName", Path::SPEC, &mut errors) {
        signer_name(name, &mut errors);
    }
    if let Some(seconds) = spec["expirationSeconds"].as_i64().filter(|s| *s < SHORTEST_SECONDS) {
        let detail = "may not specify a duration less than 600 seconds (10 minutes)";
        errors.push(FieldError::invalid("spec.expirationSeconds", seconds, detail));
    }
    errors
}

fn parse_request(encoded: &str) -> Result<(), &'static str> {
    let bytes = STANDARD.decode(encoded).map_err(|_| "PEM block type must be CERTIFICATE REQUEST")?;
    let (_, pem) =
        x509_parser::pem::parse_x509_pem(&bytes).map_err(|_| "PEM block type must be CERTIFICATE REQUEST")?;
    if pem.label != "CERTIFICATE REQUEST" && pem.label != "NEW CERTIFICATE REQUEST" {
        return Err("PEM block type must be CERTIFICATE REQUEST");
    }
    X509CertificationRequest::from_der(&pem.contents)
        .map_err(|_| "asn1: structure error: malformed certificate request")?;
    Ok(())
}

/// `domain/path`.
fn signer_name(name: &str, errors: &mut Errors) {
    use apimachinery::meta::validation::is_dns1123_subdomain;
    const PATH: &str = "spec.signerName";
    let Some((domain, rest)) = name.split_once('/') else {
        let detail = "must be a fully qualified domain and path of the form 'example.com/signer-name'";
        errors.push(FieldError::invalid(PATH, name, detail));
        return;
    };
    if !domain.contains('.') {
        errors.push(FieldError::invalid(PATH, name, "should be a domain with at least two segments separated by dots"));
    }
    for part in [domain, rest] {
        errors.extend(is_dns1123_subdomain(part).into_iter().map(|message| FieldError::invalid(PATH, part, message)));
    }
}

fn conditions(obj: &Value, errors: &mut Errors) {
    let list = Path::STATUS.field("conditions");
    let (mut approved, mut denied) = (false, false);
    for (index, condition) in obj.list_at(&["status", "conditions"]).iter().enumerate() {
        let path = list.index(index);
        let Some(kind) = required(condition, "type", path, errors) else { continue };
        approved |= kind == "Approved";
        denied |= kind == "Denied";
        match condition.str_at(&["status"]) {
            "True" => {}
            "" => errors.push(FieldError::required(path.field("status"), "")),
            other if matches!(kind, "Approved" | "Denied" | "Failed") => {
                errors.push(FieldError::not_supported(path.field("status"), other, &["True"]));
            }
            _ => {}
        }
    }
    if approved && denied {
        let detail = "Approved and Denied conditions are mutually exclusive";
        errors.push(FieldError::invalid(list, Value::Null, detail));
    }
}

fn removed(obj: &Value, old: &Value, kinds: &[&str], errors: &mut Errors) {
    let count =
        |obj: &Value, kind: &str| obj.list_at(&["status", "conditions"]).iter().filter(|c| c["type"] == kind).count();
    for kind in kinds {
        if count(obj, kind) < count(old, kind) {
            let detail = format!("updates may not remove a condition of type {kind:?}");
            errors.push(FieldError::forbidden("status.conditions", detail));
        }
    }
}

pub fn status_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    conditions(obj, &mut errors);
    removed(obj, old, &["Approved", "Denied", "Failed"], &mut errors);
    let has = |obj: &Value, kind: &str| obj.list_at(&["status", "conditions"]).iter().any(|c| c["type"] == kind);
    for kind in ["Approved", "Denied"] {
        if has(obj, kind) && !has(old, kind) {
            let detail = format!("updates may not add a condition of type {kind:?}");
            errors.push(FieldError::forbidden("status.conditions", detail));
        }
    }
    let (new, stored) = (obj.str_at(&["status", "certificate"]), old.str_at(&["status", "certificate"]));
    if !stored.is_empty() && new != stored {
        errors.push(FieldError::forbidden("status.certificate", "updates may not modify existing certificate content"));
    }
    errors
}

pub fn approval_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    conditions(obj, &mut errors);
    removed(obj, old, &["Approved", "Denied", "Failed"], &mut errors);
    errors
}

/// What follows the signer in the name of a bundle is a DNS name; whether the signer is right, `bundle` checks.
pub fn bundle_name(name: &str, is_prefix: bool) -> Vec<String> {
    let own = name.rsplit_once(':').map_or(name, |(_, own)| own);
    match own.strip_suffix('-') {
        Some(stem) if is_prefix => is_dns1123_subdomain(&format!("{stem}-a")),
        _ => is_dns1123_subdomain(own),
    }
}

pub fn bundle(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let (name, signer) = (obj.name(), obj.str_at(&["spec", "signerName"]));
    let prefix = format!("{}:", signer.replace('/', ":"));
    let complaint = if signer.is_empty() {
        name.contains(':').then(|| "ClusterTrustBundle without signer name must not have \":\" in its name".to_owned())
    } else {
        let own = name.strip_prefix(&prefix);
        own.is_none_or(|own| own.contains(':'))
            .then(|| format!("ClusterTrustBundle for signerName {signer} must be named with prefix {prefix}"))
    };
    errors.extend(complaint.map(|detail| FieldError::invalid("metadata.name", name, detail)));
    if obj.str_at(&["spec", "trustBundle"]).is_empty() {
        errors.push(FieldError::invalid(
            "spec.trustBundle",
            "<value omitted>",
            "at least one trust anchor must be provided",
        ));
    }
    errors
}

pub fn bundle_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    immutable(&obj["spec"], &old["spec"], "signerName", Path::SPEC, &mut errors);
    errors
}

pub fn pod_request_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    if !same(&obj["spec"], &old["spec"]) {
        errors.push(FieldError::invalid(Path::SPEC, obj["spec"].clone(), IMMUTABLE));
    }
    errors
}

/// Signers answer once.
pub fn pod_request_status(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    let answers = |obj: &Value| {
        let conditions = obj.list_at(&["status", "conditions"]).iter();
        conditions.filter(|c| matches!(c["type"].as_str(), Some("Issued" | "Denied" | "Failed"))).count()
    };
    let conditions = Path::STATUS.field("conditions");
    if answers(obj) > 1 {
        let detail = "There may be at most one condition with type \"Issued\", \"Denied\", or \"Failed\"";
        errors.push(FieldError::invalid(conditions, obj["status"]["conditions"].clone(), detail));
    }
    if answers(old) > 0 && !same(&obj["status"], &old["status"]) {
        let detail = "immutable after PodCertificateRequest is issued, denied, or failed";
        errors.push(FieldError::invalid(Path::STATUS, obj["status"].clone(), detail));
    }
    errors
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn pod_requests_are_answered_once() {
        let with = |conditions: Value| json!({"spec": {"podName": "p"}, "status": {"conditions": conditions}});
        let (open, issued) = (with(json!([])), with(json!([{"type": "Issued"}])));
        assert!(pod_request_status(&issued, &open).is_empty());
        assert!(pod_request_status(&issued, &issued).is_empty());
        assert_eq!(pod_request_status(&open, &issued).len(), 1);
        assert_eq!(pod_request_status(&with(json!([{"type": "Issued"}, {"type": "Failed"}])), &open).len(), 1);
        let renamed = json!({"spec": {"podName": "q"}});
        assert_eq!(pod_request_update(&renamed, &open).len(), 1);
    }

    #[test]
    fn bundles_are_named_after_their_signer() {
        for (name, signer, is_right) in [
            ("anchors", "", true),
            ("test.test:signer-one:anchors", "test.test/signer-one", true),
            ("anchors", "test.test/signer-one", false),
            ("test.test:signer-two:anchors", "test.test/signer-one", false),
            ("test.test:signer-one:a:b", "test.test/signer-one", false),
            ("test.test:signer-one:", "test.test/signer-one", false),
            ("a:b", "", false),
            ("Anchors", "", false),
        ] {
            let obj = json!({"metadata": {"name": name}, "spec": {"signerName": signer, "trustBundle": "pem"}});
            let found = bundle_name(name, false).is_empty() && bundle(&obj).is_empty();
            assert_eq!(found, is_right, "{name} of {signer}");
        }
        assert!(bundle_name("a:b:c-", true).is_empty());
    }
}
