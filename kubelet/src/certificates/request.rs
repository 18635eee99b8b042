//! Asking the cluster for a certificate: a key is made, a CertificateSigningRequest created, its answer awaited.

use std::path::Path;
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::PostParams;
use kube::{Api, Client};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

use super::store::{Pair, StoreError};
use crate::objects::api_error;

/// How long an approver and a signer may take; then a new request is made.
const PATIENCE: Duration = Duration::from_secs(900);
const MAX_PAUSE: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error("cannot make a key and a request")]
    Make(#[source] rcgen::Error),
    #[error("cannot create a certificate signing request: {}", api_error(.0))]
    Create(Box<kube::Error>),
    #[error("cannot read certificate signing request {name:?}: {}", api_error(.source))]
    Get { name: String, source: Box<kube::Error> },
    #[error("certificate signing request {name:?} was {outcome}: {message}")]
    Refused { name: String, outcome: &'static str, message: String },
    #[error("certificate signing request {0:?} was not answered in time")]
    NoAnswer(String),
    #[error("the certificate that was issued for {name:?} cannot be used")]
    Issued { name: String, source: StoreError },
}

/// What a certificate is asked for with.
pub struct Wanted {
    pub signer: &'static str,
    pub usages: &'static [&'static str],
    pub common_name: String,
    /// Host names and addresses.
    pub names: Vec<String>,
}

fn make(wanted: &Wanted) -> Result<(KeyPair, String), rcgen::Error> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::new(wanted.names.clone())?;
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationName, "system:nodes");
    subject.push(DnType::CommonName, wanted.common_name.as_str());
    params.distinguished_name = subject;
    let request = params.serialize_request(&key)?.pem()?;
    Ok((key, request))
}

/// Gets a certificate; takes as long as the approver and the signer take.
pub async fn issue(client: &Client, wanted: &Wanted) -> Result<Pair, RequestError> {
    let (key, request) = make(wanted).map_err(RequestError::Make)?;
    let object = CertificateSigningRequest {
        metadata: ObjectMeta { generate_name: Some("csr-".to_owned()), ..ObjectMeta::default() },
        spec: CertificateSigningRequestSpec {
            request: ByteString(request.into_bytes()),
            signer_name: wanted.signer.to_owned(),
            usages: Some(wanted.usages.iter().map(|usage| (*usage).to_owned()).collect()),
            ..CertificateSigningRequestSpec::default()
        },
        ..CertificateSigningRequest::default()
    };
    let api = Api::<CertificateSigningRequest>::all(client.clone());
    let created = api.create(&PostParams::default(), &object).await;
    let name = created.map_err(|error| RequestError::Create(Box::new(error)))?.metadata.name.unwrap_or_default();
    let certificate = wait(&api, &name).await?;
    let text = format!("{}\n{}", certificate.trim_end(), key.serialize_pem());
    Pair::read(text, Path::new(&name)).map_err(|source| RequestError::Issued { name, source })
}

/// The certificate as text, once it is issued.
async fn wait(api: &Api<CertificateSigningRequest>, name: &str) -> Result<String, RequestError> {
    let begun = tokio::time::Instant::now();
    let mut pause = Duration::from_millis(100);
    while begun.elapsed() < PATIENCE {
        let request = api.get(name).await;
        let request =
            request.map_err(|source| RequestError::Get { name: name.to_owned(), source: Box::new(source) })?;
        let status = request.status.unwrap_or_default();
        for condition in status.conditions.iter().flatten() {
            let outcome = match condition.type_.as_str() {
                "Denied" => "denied",
                "Failed" => "failed",
                _ => continue,
            };
            let message = condition.message.clone().unwrap_or_default();
            return Err(RequestError::Refused { name: name.to_owned(), outcome, message });
        }
        if let Some(certificate) = status.certificate.filter(|certificate| !certificate.0.is_empty()) {
            return Ok(String::from_utf8_lossy(&certificate.0).into_owned());
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
    Err(RequestError::NoAnswer(name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use x509_parser::prelude::{FromDer, ParsedExtension, X509CertificationRequest};

    #[test]
    fn a_request_names_the_node_and_its_addresses() {
        let wanted = super::super::server_wanted("n1", vec!["n1".into(), "192.0.2.1".into()]);
        let (_, text) = make(&wanted).unwrap();
        let (_, pem) = x509_parser::pem::parse_x509_pem(text.as_bytes()).unwrap();
        let (_, request) = X509CertificationRequest::from_der(&pem.contents).unwrap();
        let subject = request.certification_request_info.subject.to_string();
        assert!(subject.contains("O=system:nodes") && subject.contains("CN=system:node:n1"), "{subject}");
        let names = request.requested_extensions().into_iter().flatten().find_map(|extension| match extension {
            ParsedExtension::SubjectAlternativeName(names) => Some(names.general_names.len()),
            _ => None,
        });
        assert_eq!(names, Some(2));
    }
}
