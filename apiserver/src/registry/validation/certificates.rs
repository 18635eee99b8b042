//! Rules for certificate signing requests and bundles of trust anchors.

use apimachinery::meta::validation::{is_dns1123_label, is_dns1123_subdomain};
use apimachinery::status::FieldError;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use x509_parser::oid_registry::OID_SIG_ED25519;
use x509_parser::pem::Pem;
use x509_parser::prelude::{FromDer, X509CertificationRequest};
use x509_parser::public_key::PublicKey;

use super::{Errors, IMMUTABLE, Path, complain, conditions, immutable, required};
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
const DOMAIN_MAX: usize = 253;
/// A domain, a slash, and room for a label and a name.
const SIGNER_NAME_MAX: usize = DOMAIN_MAX + 1 + DOMAIN_MAX + 63 + 1;
const UID_MAX: usize = 128;
const STUB_MAX: usize = 10 * 1024;
const BUNDLE_MAX: usize = 1024 * 1024;
const HOUR: i64 = 3600;

pub fn request(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    if let Err(problem) = parse_request(spec.str_at(&["request"])) {
        errors.push(FieldError::invalid("spec.request", spec["request"].clone(), problem));
    }
    let usages = Path::SPEC.field("usages");
    if spec.list_at(&["usages"]).is_empty() {
        errors.push(FieldError::required(usages, ""));
    }
    let mut seen = Vec::new();
    for (index, usage) in spec.list_at(&["usages"]).iter().enumerate() {
        let text = usage.as_str().unwrap_or_default();
        if !USAGES.contains(&text) {
            errors.push(FieldError::not_supported(usages.index(index), text, &USAGES));
        }
        super::unique(&mut seen, text, usages.index(index), &mut errors);
    }
    if let Some(name) = required(spec, "signerName", Path::SPEC, &mut errors) {
        signer_name(name, Path::SPEC.field("signerName"), &mut errors);
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
pub fn signer_name(name: &str, path: Path<'_>, errors: &mut Errors) {
    if name.is_empty() {
        errors.push(FieldError::required(path, ""));
        return;
    }
    let mut complain = |part: &str, detail: String| errors.push(FieldError::invalid(path, part, detail));
    let Some((domain, rest)) = name.split_once('/').filter(|(_, rest)| !rest.contains('/')) else {
        let detail = "must be a fully qualified domain and path of the form 'example.com/signer-name'";
        complain(name, detail.into());
        return;
    };
    // Of each half only the first label that is wrong is named.
    let first_wrong = |part: &str, check: fn(&str) -> Vec<String>| {
        part.split('.').find_map(|label| {
            let problems = check(label);
            (!problems.is_empty()).then(|| (label.to_owned(), problems))
        })
    };
    for (part, check) in [(domain, is_dns1123_label as fn(&str) -> Vec<String>), (rest, is_dns1123_subdomain)] {
        if let Some((label, problems)) = first_wrong(part, check) {
            for problem in problems {
                complain(part, format!("validating label {label:?}: {problem}"));
            }
        }
        if part == domain && !domain.contains('.') {
            complain(domain, "should be a domain with at least two segments separated by dots".into());
        }
    }
    let limits = [(domain.len(), DOMAIN_MAX), (name.len(), SIGNER_NAME_MAX)];
    errors.extend(limits.iter().filter(|(length, max)| length > max).map(|(_, max)| FieldError::too_long(path, *max)));
}

fn answers(obj: &Value, errors: &mut Errors) {
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
        // The declared rule, which names what it found.
        const BOTH: [&str; 2] = [r#"conditions[{"type": "Approved"}]"#, r#"conditions[{"type": "Denied"}]"#];
        let detail = format!("must specify at most one of: `{}`", BOTH.join("`, `"));
        errors.push(FieldError::invalid(list, format!("{{{}}}", BOTH.join(", ")), detail));
    }
}

/// Texts between `BEGIN` and `END` lines, as Go reads them: what stands between and around them is passed over.
fn pem_blocks(text: &[u8]) -> Vec<Pem> {
    Pem::iter_from_buffer(text).map_while(Result::ok).collect()
}

/// What signers hand out are certificates and nothing else.
fn issued_certificate(encoded: &str) -> Result<(), String> {
    let text = STANDARD.decode(encoded).unwrap_or_default();
    let blocks = pem_blocks(&text);
    for block in &blocks {
        if block.label != "CERTIFICATE" {
            return Err(format!("only CERTIFICATE PEM blocks are allowed, found {:?}", block.label));
        }
        block.parse_x509().map_err(|_| "x509: malformed certificate".to_owned())?;
    }
    if blocks.is_empty() && !text.is_empty() {
        return Err("must contain at least one CERTIFICATE PEM block".into());
    }
    Ok(())
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
    answers(obj, &mut errors);
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
    if new != stored
        && let Err(problem) = issued_certificate(new)
    {
        errors.push(FieldError::invalid("status.certificate", "<certificate data>", problem));
    }
    errors
}

pub fn approval_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    answers(obj, &mut errors);
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

/// What is wrong with the name of a bundle of this signer, beyond its own part.
fn bundle_prefix(name: &str, signer: &str) -> Option<String> {
    let prefix = format!("{}:", signer.replace('/', ":"));
    if signer.is_empty() {
        return name
            .contains(':')
            .then(|| "ClusterTrustBundle without signer name must not have \":\" in its name".to_owned());
    }
    let own = name.strip_prefix(&prefix);
    own.is_none_or(|own| own.contains(':'))
        .then(|| format!("ClusterTrustBundle for signerName {signer} must be named with prefix {prefix}"))
}

/// What is wrong with the name of a bundle that is referred to; the name says whose it is.
pub fn bundle_reference(name: &str) -> Vec<String> {
    let signer = match name.split(':').collect::<Vec<_>>()[..] {
        [domain, path, _] => format!("{domain}/{path}"),
        _ => String::new(),
    };
    match bundle_prefix(name, &signer) {
        Some(problem) => vec![problem],
        None => bundle_name(name, false),
    }
}

pub fn bundle(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let (name, signer) = (obj.name(), obj.str_at(&["spec", "signerName"]));
    let complaint = bundle_prefix(name, signer);
    errors.extend(complaint.map(|detail| FieldError::invalid("metadata.name", name, detail)));
    if !signer.is_empty() {
        signer_name(signer, Path::SPEC.field("signerName"), &mut errors);
    }
    errors
}

pub fn bundle_create(obj: &Value) -> Errors {
    let mut errors = bundle(obj);
    trust_anchors(obj.str_at(&["spec", "trustBundle"]), &mut errors);
    errors
}

/// Certificates of authorities, each once.
fn trust_anchors(text: &str, errors: &mut Errors) {
    const PATH: &str = "spec.trustBundle";
    if text.len() > BUNDLE_MAX {
        errors.push(FieldError::too_long(PATH, BUNDLE_MAX));
        return;
    }
    let blocks = pem_blocks(text.as_bytes());
    let mut complain = |detail: String| errors.push(FieldError::invalid(PATH, "<value omitted>", detail));
    let mut malformed = false;
    for (index, block) in blocks.iter().enumerate() {
        let problem = match block.parse_x509() {
            _ if block.label != "CERTIFICATE" => format!("has bad block type: {}", block.label),
            Err(_) => "does not parse as X.509".into(),
            Ok(certificate) if !certificate.is_ca() => "does not have the CA bit set".into(),
            Ok(_) => continue,
        };
        malformed = true;
        complain(format!("entry {index} {problem}"));
    }
    if malformed {
        return;
    }
    if blocks.is_empty() {
        complain("at least one trust anchor must be provided".into());
    }
    for (index, block) in blocks.iter().enumerate() {
        let same: Vec<String> = (0..blocks.len())
            .filter(|other| blocks[*other].contents == block.contents)
            .map(|other| other.to_string())
            .collect();
        if same.len() > 1 && same[0] == index.to_string() {
            complain(format!("duplicate trust anchor (indices [{}])", same.join(" ")));
        }
    }
}

pub fn bundle_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = bundle(obj);
    let text = obj.str_at(&["spec", "trustBundle"]);
    if text != old.str_at(&["spec", "trustBundle"]) {
        trust_anchors(text, &mut errors);
    }
    immutable(&obj["spec"], &old["spec"], "signerName", Path::SPEC, &mut errors);
    errors
}

pub fn pod_request(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    let signer = spec.str_at(&["signerName"]);
    if required(spec, "signerName", Path::SPEC, &mut errors).is_some() {
        signer_name(signer, Path::SPEC.field("signerName"), &mut errors);
    }
    for (name, uid) in [("podName", "podUID"), ("serviceAccountName", "serviceAccountUID"), ("nodeName", "nodeUID")] {
        let text = spec.str_at(&[name]);
        complain(is_dns1123_subdomain(text), text, Path::SPEC.field(name), &mut errors);
        let (text, path) = (spec.str_at(&[uid]), Path::SPEC.field(uid));
        if text.is_empty() {
            errors.push(FieldError::invalid(path, text, "must not be empty"));
        }
        if text.len() > UID_MAX {
            errors.push(FieldError::too_long(path, UID_MAX));
        }
    }
    let Some(seconds) = spec["maxExpirationSeconds"].as_i64() else {
        errors.push(FieldError::required("spec.maxExpirationSeconds", "must be set"));
        return errors;
    };
    let is_own = signer.split('/').next().is_some_and(|d| d == "kubernetes.io" || d.ends_with(".kubernetes.io"));
    let longest = if is_own { 24 * HOUR } else { 91 * 24 * HOUR };
    if !(HOUR..=longest).contains(&seconds) {
        let detail = format!("must be in the range [{HOUR}, {longest}]");
        errors.push(FieldError::invalid("spec.maxExpirationSeconds", seconds, detail));
    }
    stub_request(spec.str_at(&["stubPKCS10Request"]), &mut errors);
    errors
}

/// A request whose only content is the key that the certificate will be for, signed with it.
fn stub_request(encoded: &str, errors: &mut Errors) {
    const PATH: &str = "spec.stubPKCS10Request";
    let bytes = STANDARD.decode(encoded).unwrap_or_default();
    if bytes.is_empty() {
        let detail = "exactly one of (stubPKCS10Request) or (pkixPublicKey, proofOfPossession) must be set";
        errors.push(FieldError::invalid_omitted(Path::SPEC, detail));
        return;
    }
    if bytes.len() > STUB_MAX {
        errors.push(FieldError::too_long(PATH, STUB_MAX));
        return;
    }
    let request = match X509CertificationRequest::from_der(&bytes) {
        Ok(([], request)) => request,
        _ => {
            errors.push(FieldError::invalid_omitted(PATH, "must be a valid PKCS#10 CSR"));
            return;
        }
    };
    match acceptable_key(&request) {
        Some(error) => errors.push(error),
        None if request.verify_signature().is_err() => {
            errors.push(FieldError::invalid_omitted(PATH, "invalid signature"));
        }
        None => {}
    }
}

/// What is wrong with the key of a stub request.
fn acceptable_key(request: &X509CertificationRequest<'_>) -> Option<FieldError> {
    const PATH: &str = "spec.stubPKCS10Request";
    let info = &request.certification_request_info.subject_pki;
    match info.parsed() {
        Ok(PublicKey::EC(point)) if matches!(point.key_size(), 256 | 384 | 521 | 528) => None,
        Ok(PublicKey::EC(_)) => {
            let detail = "elliptic public keys must use curve P256, P384, or P521";
            Some(FieldError::invalid(PATH, "curve P-224", detail))
        }
        Ok(PublicKey::RSA(key)) if matches!(key.key_size(), 3072 | 4096) => None,
        Ok(PublicKey::RSA(key)) => {
            let detail = "RSA keys must have modulus size 3072 or 4096";
            Some(FieldError::invalid(PATH, format!("{}-bit modulus", key.key_size()), detail))
        }
        _ if info.algorithm.algorithm == OID_SIG_ED25519 => None,
        _ => {
            let detail = "unknown public key type; supported types are Ed25519, ECDSA, and RSA";
            Some(FieldError::invalid_omitted(PATH, detail))
        }
    }
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
    const ANSWERS: [&str; 3] = ["Issued", "Denied", "Failed"];
    let mut errors = Errors::new();
    let mut answers = 0;
    for (index, condition) in obj.list_at(&["status", "conditions"]).iter().enumerate() {
        // Upstream spells these paths so.
        let path = format!("status.conditions.[{index}]");
        let kind = condition.str_at(&["type"]);
        if !ANSWERS.contains(&kind) {
            errors.push(FieldError::not_supported(format!("{path}.type"), kind, &ANSWERS));
            continue;
        }
        answers += 1;
        if answers > 1 {
            let detail = "There may be at most one condition with type \"Issued\", \"Denied\", or \"Failed\"";
            errors.push(FieldError::invalid(format!("{path}.type"), kind, detail));
        }
        let status = condition.str_at(&["status"]);
        if status != "True" {
            errors.push(FieldError::not_supported(format!("{path}.status"), status, &["True"]));
        }
    }
    conditions::conditions(&obj["status"], Path::STATUS, &mut errors);
    let answered = old.list_at(&["status", "conditions"]).iter().any(|c| ANSWERS.iter().any(|a| c["type"] == *a));
    if errors.is_empty() && answered && !same(&obj["status"], &old["status"]) {
        let detail = "immutable after PodCertificateRequest is issued, denied, or failed";
        errors.push(FieldError::invalid_omitted(Path::STATUS, detail));
    }
    errors
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn pod_requests_are_answered_once() {
        let with = |kinds: &[&str]| {
            let conditions: Vec<Value> = kinds
                .iter()
                .map(|kind| json!({"type": kind, "status": "True", "reason": "R", "lastTransitionTime": "2020-01-01T00:00:00Z"}))
                .collect();
            json!({"spec": {"podName": "p"}, "status": {"conditions": conditions}})
        };
        let (open, issued) = (with(&[]), with(&["Issued"]));
        assert!(pod_request_status(&issued, &open).is_empty());
        assert!(pod_request_status(&issued, &issued).is_empty());
        assert_eq!(pod_request_status(&open, &issued).len(), 1);
        assert_eq!(pod_request_status(&with(&["Issued", "Failed"]), &open).len(), 1);
        let renamed = json!({"spec": {"podName": "q"}});
        assert_eq!(pod_request_update(&renamed, &open).len(), 1);
    }

    #[test]
    fn pod_requests_bring_a_signed_key() {
        const STUB: &str = "MIG6MGICAQAwADBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABPwLBnkT/LiydCbgoPtpCikT+tEpYHpmUHaRbgKJtnKSvS2giIgmWySG8SOCxQ7/Zgc+Am+1R4+zewmqbtSmqrOgADAKBggqhkjOPQQDAgNIADBFAiEA8kyuiT9Rs9Nh9ITJ8x80PJdIQuoMLeA90+Gc5PQG0gQCIDAhcpJ4MDd2RbunBtAB4lM8dMs9lnNslDwTNwTVeZ5p";
        let request = |stub: &str, seconds: i64| {
            json!({"spec": {"signerName": "example.com/s", "podName": "p", "podUID": "1", "serviceAccountName": "s",
                "serviceAccountUID": "2", "nodeName": "n", "nodeUID": "3", "maxExpirationSeconds": seconds, "stubPKCS10Request": stub}})
        };
        let forged = STANDARD.encode(
            STANDARD.decode(STUB).unwrap().split_last().map(|(last, rest)| [rest, &[last ^ 1]].concat()).unwrap(),
        );
        let cases = [
            (request(STUB, 3600), vec![]),
            (request(&forged, 3600), vec!["spec.stubPKCS10Request: Invalid value: invalid signature"]),
            (request("AAAA", 3600), vec!["spec.stubPKCS10Request: Invalid value: must be a valid PKCS#10 CSR"]),
            (
                request(STUB, 0),
                vec!["spec.maxExpirationSeconds: Invalid value: 0: must be in the range [3600, 7862400]"],
            ),
            (
                request("", 3600),
                vec![
                    "spec: Invalid value: exactly one of (stubPKCS10Request) or (pkixPublicKey, proofOfPossession) must be set",
                ],
            ),
        ];
        for (obj, expected) in cases {
            assert_eq!(super::super::tests::texts(&pod_request(&obj)), expected);
        }
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
