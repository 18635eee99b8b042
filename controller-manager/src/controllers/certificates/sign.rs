//! Signs approved certificate requests with the cluster's authority, for the signers that Kubernetes defines.

use std::sync::Arc;
use std::time::Duration;

use apimachinery::controller::{Controller, Informer, ObjectKey, Plan, Write};
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequest, CertificateSigningRequestCondition, CertificateSigningRequestSpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use rcgen::{
    CertificateSigningRequestParams, DnType, DnValue, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType, SerialNumber,
};

use super::{CLIENT, KUBELET_CLIENT, KUBELET_SERVING, LEGACY, has, is_issued};
use crate::app::Context;

/// Clocks of clients may be so much behind.
const BACKDATE: Duration = Duration::from_secs(300);
/// No certificate is valid for less.
const SHORTEST: Duration = Duration::from_secs(600);

struct SigningController {
    requests: Arc<Informer<CertificateSigningRequest>>,
    issuer: Issuer<'static, KeyPair>,
    longest: Duration,
}

/// Why a request cannot be signed.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("cannot parse the request: {0}")]
    Parse(rcgen::Error),
    #[error("subject organization is not system:nodes")]
    Organization,
    #[error("subject common name does not begin with system:node:")]
    CommonName,
    #[error("subject common name is not the requester's name")]
    Requester,
    #[error("usages did not match {0}")]
    Usages(&'static str),
    #[error("subjectAltNames of this kind are not allowed")]
    AltNames,
    #[error("DNS or IP subjectAltName is required")]
    AltNamesRequired,
    #[error("cannot sign: {0}")]
    Sign(rcgen::Error),
}

pub fn start(context: &Context) {
    let (Some(certificate), Some(key)) = (&context.signing_certificate, &context.signing_key) else {
        return tracing::info!("no --cluster-signing-cert-file: certificate requests are not signed");
    };
    let issuer = KeyPair::from_pem(key).and_then(|key| Issuer::from_ca_cert_pem(certificate, key));
    let issuer = match issuer {
        Ok(issuer) => issuer,
        Err(error) => return tracing::error!(%error, "the cluster's signing key cannot be used (it must be PKCS #8)"),
    };
    let longest = context.options.cluster_signing_duration;
    let controller = SigningController { requests: context.driver.informers().of(), issuer, longest };
    context.driver.run(controller, 1, |controller, wiring| wiring.primary(&controller.requests));
}

impl Controller for SigningController {
    fn name(&self) -> &'static str {
        "certificatesigningrequest-signing"
    }

    fn component(&self) -> &'static str {
        "csrsigning"
    }

    fn reconcile(&self, key: &ObjectKey, now: Timestamp) -> Plan {
        let Some(request) = self.requests.get(key) else { return Plan::nothing() };
        let ours = [CLIENT, KUBELET_CLIENT, KUBELET_SERVING, LEGACY].contains(&request.spec.signer_name.as_str());
        let open =
            has(&request, "Approved") && !has(&request, "Denied") && !has(&request, "Failed") && !is_issued(&request);
        if !ours || !open {
            return Plan::nothing();
        }
        let mut next = request.as_ref().clone();
        let status = next.status.get_or_insert_default();
        match self.sign(&request.spec, now) {
            Ok(pem) => status.certificate = Some(ByteString(pem.into_bytes())),
            Err(refusal) => status.conditions.get_or_insert_default().push(CertificateSigningRequestCondition {
                type_: "Failed".to_owned(),
                status: "True".to_owned(),
                reason: Some("SignerValidationFailure".to_owned()),
                message: Some(refusal.to_string()),
                last_update_time: Some(Time(now)),
                last_transition_time: Some(Time(now)),
            }),
        }
        Plan::write(Write::update_status(&next))
    }
}

impl SigningController {
    fn sign(&self, spec: &CertificateSigningRequestSpec, now: Timestamp) -> Result<String, Refusal> {
        let pem = String::from_utf8_lossy(&spec.request.0);
        let mut request = CertificateSigningRequestParams::from_pem(&pem).map_err(Refusal::Parse)?;
        check(spec, &request)?;
        let asked = spec.expiration_seconds.map(crate::common::seconds);
        let valid = asked.map_or(self.longest, |asked| asked.clamp(SHORTEST, self.longest.max(SHORTEST)));
        let epoch = rcgen::date_time_ymd(1970, 1, 1);
        let now = epoch + Duration::from_secs(u64::try_from(now.as_second()).unwrap_or(0));
        let params = &mut request.params;
        params.not_before = now - BACKDATE;
        params.not_after = now + valid;
        params.is_ca = IsCa::ExplicitNoCa;
        params.serial_number = Some(SerialNumber::from(rand::random::<[u8; 16]>().map(|byte| byte & 0x7f).to_vec()));
        params.use_authority_key_identifier_extension = true;
        params.key_usages.clear();
        params.extended_key_usages.clear();
        for usage in spec.usages.iter().flatten() {
            match usage.as_str() {
                "digital signature" => params.key_usages.push(KeyUsagePurpose::DigitalSignature),
                "key encipherment" => params.key_usages.push(KeyUsagePurpose::KeyEncipherment),
                "client auth" => params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth),
                "server auth" => params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth),
                _ => return Err(Refusal::Usages("those that can be signed")),
            }
        }
        Ok(request.signed_by(&self.issuer).map_err(Refusal::Sign)?.pem())
    }
}

fn text(value: Option<&DnValue>) -> String {
    match value {
        Some(DnValue::Utf8String(text)) => text.clone(),
        Some(DnValue::PrintableString(text)) => text.as_str().to_owned(),
        Some(DnValue::Ia5String(text)) => text.as_str().to_owned(),
        _ => String::new(),
    }
}

/// The rules of the signer that the request names.
fn check(spec: &CertificateSigningRequestSpec, request: &CertificateSigningRequestParams) -> Result<(), Refusal> {
    let usages: Vec<&str> = spec.usages.iter().flatten().map(String::as_str).collect();
    let only = |required: &str, allowed: &[&str]| {
        usages.contains(&required) && usages.iter().all(|usage| allowed.contains(usage))
    };
    let client = only("client auth", &["digital signature", "key encipherment", "client auth"]);
    let name = &request.params.distinguished_name;
    let common_name = text(name.get(&DnType::CommonName));
    let alt_names = &request.params.subject_alt_names;
    if [KUBELET_CLIENT, KUBELET_SERVING].contains(&spec.signer_name.as_str()) {
        if text(name.get(&DnType::OrganizationName)) != "system:nodes" {
            return Err(Refusal::Organization);
        }
        if !common_name.starts_with("system:node:") {
            return Err(Refusal::CommonName);
        }
    }
    match spec.signer_name.as_str() {
        CLIENT if !client => Err(Refusal::Usages("client auth")),
        KUBELET_CLIENT if !alt_names.is_empty() => Err(Refusal::AltNames),
        KUBELET_CLIENT if !client => Err(Refusal::Usages("client auth")),
        KUBELET_SERVING => {
            if alt_names.is_empty() {
                return Err(Refusal::AltNamesRequired);
            }
            if !alt_names.iter().all(|alt| matches!(alt, SanType::DnsName(_) | SanType::IpAddress(_))) {
                return Err(Refusal::AltNames);
            }
            if !only("server auth", &["digital signature", "key encipherment", "server auth"]) {
                return Err(Refusal::Usages("server auth"));
            }
            if spec.username.as_deref() != Some(&common_name) { Err(Refusal::Requester) } else { Ok(()) }
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::Engine;
    use rcgen::{BasicConstraints, CertificateParams};
    use serde_json::json;

    fn issuer() -> Issuer<'static, KeyPair> {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Issuer::new(params, KeyPair::generate().unwrap())
    }

    fn request(signer: &str, usages: &[&str], organization: &str, names: &[&str]) -> CertificateSigningRequest {
        let mut params =
            CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "system:node:n1");
        params.distinguished_name.push(DnType::OrganizationName, organization);
        let pem = params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap();
        serde_json::from_value(json!({"metadata": {"name": "r"},
            "spec": {"request": base64::engine::general_purpose::STANDARD.encode(pem), "signerName": signer, "usages": usages, "username": "system:node:n1", "expirationSeconds": 3600},
            "status": {"conditions": [{"type": "Approved", "status": "True"}]}}))
        .unwrap()
    }

    #[test]
    fn what_is_signed_and_what_is_refused() {
        let client = ["digital signature", "client auth"];
        let server = ["digital signature", "server auth"];
        let cases = [
            (request(KUBELET_CLIENT, &client, "system:nodes", &[]), true),
            (request(KUBELET_CLIENT, &client, "admins", &[]), false),
            (request(KUBELET_CLIENT, &server, "system:nodes", &[]), false),
            (request(KUBELET_CLIENT, &client, "system:nodes", &["evil"]), false),
            (request(KUBELET_SERVING, &server, "system:nodes", &["n1", "10.0.0.1"]), true),
            (request(KUBELET_SERVING, &server, "system:nodes", &[]), false),
            (request(CLIENT, &client, "people", &[]), true),
            (request(CLIENT, &server, "people", &[]), false),
        ];
        for (index, (request, signed)) in cases.into_iter().enumerate() {
            let controller = SigningController {
                requests: Informer::fixed([request]),
                issuer: issuer(),
                longest: Duration::from_secs(86400),
            };
            let plan = controller.reconcile(&ObjectKey::cluster("r"), Timestamp::from_second(1_800_000_000).unwrap());
            let status = &plan.writes[0].body["status"];
            assert_eq!(status["certificate"].is_string(), signed, "case {index}: {status}");
        }
    }

    #[test]
    fn the_certificate_is_valid_for_the_time_asked_for() {
        let controller =
            SigningController { requests: Informer::fixed([]), issuer: issuer(), longest: Duration::from_secs(86400) };
        let request = request(CLIENT, &["client auth"], "people", &[]);
        let pem = controller.sign(&request.spec, Timestamp::from_second(1_800_000_000).unwrap()).unwrap();
        let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap();
        let certificate = pem.parse_x509().unwrap();
        assert_eq!(certificate.validity().not_after.timestamp(), 1_800_003_600);
        assert_eq!(certificate.subject().to_string(), "CN=system:node:n1, O=people");
        assert!(!certificate.is_ca());
    }

    #[test]
    fn unapproved_requests_wait() {
        let mut open = request(CLIENT, &["client auth"], "people", &[]);
        open.status = None;
        let controller =
            SigningController { requests: Informer::fixed([open]), issuer: issuer(), longest: Duration::from_secs(60) };
        assert!(controller.reconcile(&ObjectKey::cluster("r"), Timestamp::UNIX_EPOCH).is_empty());
    }
}
