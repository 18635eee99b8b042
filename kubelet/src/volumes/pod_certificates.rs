//! Certificates of pods (`podCertificate` projections): for each one a key is made here, a PodCertificateRequest is
//! created, and what its signer issues is shown with the key. Nothing is kept over a restart: then all are asked for
//! anew, as the key of an open request is in memory only.
//!
//! ```text
//! (none) ── asked ──▶ Pending ── issued ──▶ Issued ── refresh is due, asked ──▶ Pending, with the old one
//!                        └── denied or failed ──▶ Refused, for good
//! ```

use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{PodCertificateRequest, PodCertificateRequestSpec};
use k8s_openapi::api::core::v1::{Pod, PodCertificateProjection, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::PostParams;
use kube::{Api, Client};
use parking_lot::Mutex;
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rsa::pkcs8::EncodePrivateKey;
use tokio::sync::watch;

use super::pem;
use crate::events::{Level, Recorder};
use crate::objects::api_error;

/// How long a pod's start waits for its signer before it says so and tries again.
const PATIENCE: Duration = Duration::from_secs(30);
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// Spreads the refreshes of pods that started together.
const MAX_JITTER: Duration = Duration::from_secs(300);

#[derive(Debug, thiserror::Error)]
pub enum PodCertificateError {
    #[error("unknown key type {0:?}")]
    KeyType(String),
    #[error("while generating RSA key")]
    Rsa(#[source] rsa::Error),
    #[error("while encoding RSA key")]
    EncodeRsa(#[source] rsa::pkcs8::Error),
    #[error("while generating keypair or its proof of possession")]
    Key(#[source] rcgen::Error),
    #[error("while generating keypair: the task was ended")]
    Ended(#[source] tokio::task::JoinError),
    #[error("while fetching service account {name:?}: {}", api_error(.source))]
    Account { name: String, source: Box<kube::Error> },
    #[error("while creating initial PodCertificateRequest: {}", api_error(.0))]
    Create(Box<kube::Error>),
    #[error("while getting PodCertificateRequest {name:?}: {}", api_error(.source))]
    Get { name: String, source: Box<kube::Error> },
    #[error("credential bundle is not issued yet")]
    NotIssued,
    #[error("PodCertificateRequest was permanently {outcome}: reason={reason:?} message={message:?}")]
    Refused { outcome: &'static str, reason: String, message: String },
    #[error("the certificate chain of PodCertificateRequest {name:?} cannot be read: {source:?}")]
    Chain { name: String, source: rustls::pki_types::pem::Error },
    #[error("the node is not registered yet")]
    NoNode,
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub pod_uid: String,
    pub volume: String,
    /// The position of the projection among the volume's sources.
    pub source: usize,
}

/// What the pod sees.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Credentials {
    pub key: String,
    pub chain: String,
    pub refresh_at: Timestamp,
}

#[derive(Clone)]
enum State {
    /// The request is open; `old` is shown meanwhile.
    Pending {
        request: String,
        key: String,
        old: Option<Credentials>,
    },
    Issued(Credentials),
    Refused {
        outcome: &'static str,
        reason: String,
        message: String,
    },
}

pub struct PodCertificates {
    client: Client,
    recorder: Recorder,
    node_name: String,
    node_uid: watch::Receiver<Option<String>>,
    known: Mutex<HashMap<Key, State>>,
}

impl PodCertificates {
    pub fn new(
        client: Client,
        recorder: Recorder,
        node_name: String,
        node_uid: watch::Receiver<Option<String>>,
    ) -> Self {
        Self { client, recorder, node_name, node_uid, known: Mutex::default() }
    }

    pub fn forget(&self, pod_uid: &str) {
        self.known.lock().retain(|key, _| key.pod_uid != pod_uid);
    }

    /// The credentials of one projection; waits a while for the first ones.
    pub(super) async fn get(
        &self,
        pod: &Pod,
        key: Key,
        source: &PodCertificateProjection,
    ) -> Result<Credentials, PodCertificateError> {
        let known = self.known.lock().get(&key).cloned();
        let old = match known {
            Some(State::Issued(credentials)) if Timestamp::now() < credentials.refresh_at => return Ok(credentials),
            Some(State::Refused { outcome, reason, message }) => {
                return Err(PodCertificateError::Refused { outcome, reason, message });
            }
            Some(State::Issued(credentials)) => Some(credentials),
            Some(State::Pending { .. }) => return self.wait(pod, &key).await,
            None => None,
        };
        let (request, private_key) = self.request(pod, source).await?;
        self.known.lock().insert(key.clone(), State::Pending { request, key: private_key, old });
        self.wait(pod, &key).await
    }

    /// Follows the open request: briefly when there are older credentials to go on with, else until it is answered.
    async fn wait(&self, pod: &Pod, key: &Key) -> Result<Credentials, PodCertificateError> {
        let begun = tokio::time::Instant::now();
        let mut pause = Duration::from_millis(50);
        loop {
            let known = self.known.lock().get(key).cloned();
            let Some(State::Pending { request, key: private_key, old }) = known else {
                return Err(PodCertificateError::NotIssued);
            };
            let answer = self.answer(pod, &request, &private_key).await?;
            let (state, result) = match answer {
                Answer::Issued(credentials) => (Some(State::Issued(credentials.clone())), Ok(credentials)),
                Answer::Refused { outcome, reason, message } => {
                    self.tell(pod, &request, outcome, &reason, &message);
                    let state = State::Refused { outcome, reason: reason.clone(), message: message.clone() };
                    (Some(state), Err(PodCertificateError::Refused { outcome, reason, message }))
                }
                Answer::Gone => (old.map(State::Issued), Err(PodCertificateError::NotIssued)),
                Answer::Open => match old {
                    Some(old) => {
                        let refresh_at = Timestamp::now().checked_add(LOOK_AGAIN).unwrap_or(Timestamp::MAX);
                        return Ok(Credentials { refresh_at, ..old });
                    }
                    None if begun.elapsed() > PATIENCE => return Err(PodCertificateError::NotIssued),
                    None => {
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(Duration::from_secs(1));
                        continue;
                    }
                },
            };
            let mut known = self.known.lock();
            match state {
                Some(state) => drop(known.insert(key.clone(), state)),
                None => drop(known.remove(key)),
            }
            return result;
        }
    }

    async fn answer(&self, pod: &Pod, name: &str, key: &str) -> Result<Answer, PodCertificateError> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let api = Api::<PodCertificateRequest>::namespaced(self.client.clone(), namespace);
        match api.get(name).await {
            Ok(request) => judge(&request, key),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(Answer::Gone),
            Err(source) => Err(PodCertificateError::Get { name: name.to_owned(), source: Box::new(source) }),
        }
    }

    fn tell(&self, pod: &Pod, request: &str, outcome: &'static str, reason: &str, message: &str) {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let event = if outcome == "denied" { "Denied" } else { "Failed" };
        let text = format!(
            "PodCertificateRequest {namespace}/{request} was {outcome}, reason={reason:?}, message={message:?}"
        );
        self.recorder.pod(pod, Level::Warning, event, text);
    }

    /// Creates a request; returns its name and the private key that belongs to it.
    async fn request(
        &self,
        pod: &Pod,
        source: &PodCertificateProjection,
    ) -> Result<(String, String), PodCertificateError> {
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let namespace = text(&pod.metadata.namespace);
        let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone()).unwrap_or_default();
        let accounts = Api::<ServiceAccount>::namespaced(self.client.clone(), &namespace);
        let found = accounts
            .get(&account)
            .await
            .map_err(|source| PodCertificateError::Account { name: account.clone(), source: Box::new(source) })?;
        let node_uid = self.node_uid.borrow().clone().ok_or(PodCertificateError::NoNode)?;
        let key_type = source.key_type.clone();
        let made = tokio::task::spawn_blocking(move || key_and_proof(&key_type)).await;
        let (key, proof) = made.map_err(PodCertificateError::Ended)??;
        let (name, uid) = (text(&pod.metadata.name), text(&pod.metadata.uid));
        let owner = OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Pod".to_owned(),
            name: name.clone(),
            uid: uid.clone(),
            ..OwnerReference::default()
        };
        let request = PodCertificateRequest {
            metadata: ObjectMeta {
                namespace: Some(namespace.clone()),
                generate_name: Some("req-".to_owned()),
                owner_references: Some(vec![owner]),
                ..ObjectMeta::default()
            },
            spec: PodCertificateRequestSpec {
                signer_name: source.signer_name.clone(),
                pod_name: name,
                pod_uid: uid,
                service_account_name: account,
                service_account_uid: text(&found.metadata.uid),
                node_name: self.node_name.clone(),
                node_uid,
                max_expiration_seconds: source.max_expiration_seconds,
                stub_pkc_s10_request: ByteString(proof),
                unverified_user_annotations: source.user_annotations.clone(),
            },
            ..PodCertificateRequest::default()
        };
        let api = Api::<PodCertificateRequest>::namespaced(self.client.clone(), &namespace);
        let created = api.create(&PostParams::default(), &request).await;
        let created = created.map_err(|error| PodCertificateError::Create(Box::new(error)))?;
        Ok((text(&created.metadata.name), key))
    }
}

enum Answer {
    Open,
    Issued(Credentials),
    Refused { outcome: &'static str, reason: String, message: String },
    Gone,
}

/// What the request's conditions say.
fn judge(request: &PodCertificateRequest, key: &str) -> Result<Answer, PodCertificateError> {
    let status = request.status.clone().unwrap_or_default();
    for condition in status.conditions.iter().flatten() {
        let refused =
            |outcome| Answer::Refused { outcome, reason: condition.reason.clone(), message: condition.message.clone() };
        match condition.type_.as_str() {
            "Denied" => return Ok(refused("denied")),
            "Failed" => return Ok(refused("failed")),
            "Issued" => {}
            _ => continue,
        }
        let chain = status.certificate_chain.as_deref().unwrap_or_default();
        let certificates = pem::certificates(chain).map_err(|source| PodCertificateError::Chain {
            name: request.metadata.name.clone().unwrap_or_default(),
            source,
        })?;
        let jitter = MAX_JITTER.mul_f64(rand::random::<f64>());
        let refresh_at = status.begin_refresh_at.as_ref().map_or(Timestamp::MAX, |time| time.0);
        return Ok(Answer::Issued(Credentials {
            key: key.to_owned(),
            chain: pem::encode(&certificates),
            refresh_at: refresh_at.checked_add(jitter).unwrap_or(Timestamp::MAX),
        }));
    }
    Ok(Answer::Open)
}

/// A new private key as PKCS#8 text, and an empty PKCS#10 request signed with it as the proof of having it.
fn key_and_proof(key_type: &str) -> Result<(String, Vec<u8>), PodCertificateError> {
    let pair = match key_type {
        "RSA3072" => rsa_pair(3072)?,
        "RSA4096" => rsa_pair(4096)?,
        "ECDSAP256" => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(PodCertificateError::Key)?,
        "ECDSAP384" => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).map_err(PodCertificateError::Key)?,
        "ED25519" => KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(PodCertificateError::Key)?,
        other => return Err(PodCertificateError::KeyType(other.to_owned())),
    };
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let request = params.serialize_request(&pair).map_err(PodCertificateError::Key)?;
    Ok((pair.serialize_pem(), request.der().to_vec()))
}

fn rsa_pair(bits: usize) -> Result<KeyPair, PodCertificateError> {
    let key = rsa::RsaPrivateKey::new(&mut rsa::rand_core::OsRng, bits).map_err(PodCertificateError::Rsa)?;
    let text = key.to_pkcs8_pem(rsa::pkcs8::LineEnding::LF).map_err(PodCertificateError::EncodeRsa)?;
    KeyPair::from_pkcs8_pem_and_sign_algo(&text, &rcgen::PKCS_RSA_SHA256).map_err(PodCertificateError::Key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_with_proofs() {
        for key_type in ["ECDSAP256", "ECDSAP384", "ED25519"] {
            let (key, proof) = key_and_proof(key_type).unwrap();
            assert!(key.starts_with("-----BEGIN PRIVATE KEY-----"), "{key_type}");
            use x509_parser::prelude::FromDer;
            let (rest, request) =
                x509_parser::certification_request::X509CertificationRequest::from_der(&proof).unwrap();
            assert!(
                rest.is_empty() && request.certification_request_info.subject.iter().next().is_none(),
                "{key_type}"
            );
        }
        assert!(matches!(key_and_proof("DSA"), Err(PodCertificateError::KeyType(_))));
    }

    #[test]
    fn answers_of_signers() {
        let request = |condition: &str, chain: &str| PodCertificateRequest {
            status: serde_json::from_value(serde_json::json!({
                "conditions": [{"type": condition, "status": "True", "reason": "R", "message": "m",
                    "lastTransitionTime": "2026-01-01T00:00:00Z"}],
                "certificateChain": chain,
                "beginRefreshAt": "2026-01-02T00:00:00Z",
            }))
            .unwrap(),
            ..PodCertificateRequest::default()
        };
        let chain = pem::encode(&[vec![1, 2, 3]]);
        match judge(&request("Issued", &format!("# leaf\n{chain}")), "k").unwrap() {
            Answer::Issued(credentials) => {
                assert_eq!((credentials.key.as_str(), &credentials.chain), ("k", &chain));
                let due: Timestamp = "2026-01-02T00:00:00Z".parse().unwrap();
                assert!(credentials.refresh_at >= due && credentials.refresh_at <= due + MAX_JITTER);
            }
            _ => panic!("not issued"),
        }
        assert!(matches!(judge(&request("Denied", ""), "k").unwrap(), Answer::Refused { outcome: "denied", .. }));
        assert!(matches!(judge(&request("Failed", ""), "k").unwrap(), Answer::Refused { outcome: "failed", .. }));
        assert!(matches!(judge(&request("Other", ""), "k").unwrap(), Answer::Open));
    }
}
