//! Certificate signing requests: who approves or signs needs a right on the signer, and nobody gets into
//! `system:masters` by a certificate of the API's own client signer.

use std::sync::Arc;

use apimachinery::status::Result;
use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::pem::Pem;
use x509_parser::prelude::FromDer;

use super::{AdmissionRequest, Operation, Plugin};
use crate::auth::{Attributes, MASTERS};
use crate::registry::object::ObjectExt;
use crate::server::Server;

const GROUP: &str = "certificates.k8s.io";
const RESOURCE: &str = "certificatesigningrequests";

/// Whom a signing request is for.
pub struct Subject {
    pub common_name: String,
    pub organizations: Vec<String>,
}

/// The subject of the PEM request in `spec.request`.
pub fn subject(object: &Value) -> Option<Subject> {
    let pem = STANDARD.decode(object.str_at(&["spec", "request"])).ok()?;
    let pem = Pem::iter_from_buffer(&pem).next()?.ok()?;
    let (_, request) = X509CertificationRequest::from_der(&pem.contents).ok()?;
    let name = &request.certification_request_info.subject;
    let common_name =
        name.iter_common_name().filter_map(|name| name.as_str().ok()).last().unwrap_or_default().to_owned();
    let organizations = name.iter_organization().filter_map(|name| name.as_str().ok()).map(str::to_owned).collect();
    Some(Subject { common_name, organizations })
}

/// Whether the user may `verb` the signer by its full name or all signers of its domain.
fn may(server: &Arc<Server>, request: &AdmissionRequest<'_>, verb: &str, signer: &str) -> bool {
    let domain = signer.split('/').next().unwrap_or_default();
    let wildcard = format!("{domain}/*");
    let allowed = |name: &str| {
        let attributes =
            Attributes { name, api_version: "*", ..Attributes::resource(request.user, verb, GROUP, "signers") };
        server.auth.authorize(server, &attributes).is_allowed()
    };
    allowed(signer) || allowed(&wildcard)
}

fn signer<'a>(request: &'a AdmissionRequest<'_>) -> &'a str {
    request.old.map_or("", |old| old.str_at(&["spec", "signerName"]))
}

pub struct CertificateApproval;

#[async_trait]
impl Plugin for CertificateApproval {
    fn name(&self) -> &'static str {
        "CertificateApproval"
    }

    async fn validate(&self, server: &Arc<Server>, request: &AdmissionRequest<'_>) -> Result<()> {
        let concerns = request.is_any(GROUP, RESOURCE) && request.subresource == "approval";
        if !concerns || request.operation != Operation::Update || may(server, request, "approve", signer(request)) {
            return Ok(());
        }
        let signer = signer(request);
        Err(request.forbidden(format!("user not permitted to approve requests with signerName {signer:?}")))
    }
}

pub struct CertificateSigning;

#[async_trait]
impl Plugin for CertificateSigning {
    fn name(&self) -> &'static str {
        "CertificateSigning"
    }

    async fn validate(&self, server: &Arc<Server>, request: &AdmissionRequest<'_>) -> Result<()> {
        let (true, "status", Some(old)) = (request.is_any(GROUP, RESOURCE), request.subresource, request.old) else {
            return Ok(());
        };
        let field = |object: &Value, field: &str| object.at(&["status", field]).cloned();
        let same = ["certificate"].iter().all(|name| field(old, name) == field(request.object, name));
        if same || may(server, request, "sign", signer(request)) {
            return Ok(());
        }
        let signer = signer(request);
        Err(request.forbidden(format!("user not permitted to sign requests with signerName {signer:?}")))
    }
}

pub struct CertificateSubjectRestriction;

#[async_trait]
impl Plugin for CertificateSubjectRestriction {
    fn name(&self) -> &'static str {
        "CertificateSubjectRestriction"
    }

    async fn validate(&self, _server: &Arc<Server>, request: &AdmissionRequest<'_>) -> Result<()> {
        let is_client = request.object.str_at(&["spec", "signerName"]) == "kubernetes.io/kube-apiserver-client";
        if !request.creates(GROUP, RESOURCE) || !is_client {
            return Ok(());
        }
        match subject(request.object) {
            Some(subject) if subject.organizations.iter().any(|group| group == MASTERS) => Err(request.forbidden(
                format!("use of kubernetes.io/kube-apiserver-client signer with {MASTERS} group is not allowed"),
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};
    use serde_json::json;

    use super::*;

    #[test]
    fn subjects_are_read_from_the_request() {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "system:node:n1");
        params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
        let pem = params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap();
        let subject = subject(&json!({"spec": {"request": STANDARD.encode(pem)}})).unwrap();
        assert_eq!(
            (subject.common_name.as_str(), subject.organizations.as_slice()),
            ("system:node:n1", ["system:nodes".to_owned()].as_slice())
        );
        assert!(super::subject(&json!({"spec": {"request": "junk"}})).is_none());
    }
}
