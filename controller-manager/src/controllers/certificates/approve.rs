//! Approves the client certificates that kubelets ask for, when the requester is allowed to have one.
//!
//! Whether it is allowed, the API server says (SubjectAccessReview), so this controller talks to it itself.

use std::sync::Arc;
use std::time::Duration;

use apimachinery::controller::{Informer, ObjectKey, ReconcileError, Reconciler, Rest};
use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use rcgen::CertificateSigningRequestParams;
use serde_json::json;

use super::{KUBELET_CLIENT, has, is_issued};
use crate::app::Context;
use crate::common::name;

struct ApprovingController {
    rest: Rest,
    requests: Arc<Informer<CertificateSigningRequest>>,
}

pub fn start(context: &Context) {
    let driver = &context.driver;
    let controller = ApprovingController { rest: driver.rest().clone(), requests: driver.informers().of() };
    driver.run_reconciler(controller, 1, |controller, wiring| wiring.primary(&controller.requests));
}

#[async_trait]
impl Reconciler for ApprovingController {
    fn name(&self) -> &'static str {
        "certificatesigningrequest-approving"
    }

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, ReconcileError> {
        let Some(request) = self.requests.get(key) else { return Ok(None) };
        if has(&request, "Approved") || has(&request, "Denied") || is_issued(&request) {
            return Ok(None);
        }
        let Some(common_name) = node_of(&request.spec) else { return Ok(None) };
        let own = request.spec.username.as_deref() == Some(&common_name);
        let candidates = [
            (own, "selfnodeclient", "Auto approving self kubelet client certificate after SubjectAccessReview."),
            (true, "nodeclient", "Auto approving kubelet client certificate after SubjectAccessReview."),
        ];
        for (applies, subresource, message) in candidates {
            if applies && self.is_allowed(&request.spec, subresource).await? {
                self.approve(&request, message).await?;
                break;
            }
        }
        Ok(None)
    }
}

impl ApprovingController {
    async fn is_allowed(&self, spec: &CertificateSigningRequestSpec, subresource: &str) -> kube::Result<bool> {
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
            "spec": {
                "user": spec.username, "uid": spec.uid, "groups": spec.groups, "extra": spec.extra,
                "resourceAttributes": {"group": "certificates.k8s.io", "resource": "certificatesigningrequests",
                    "verb": "create", "subresource": subresource, "version": "*"},
            },
        });
        let answer = self.rest.create("/apis/authorization.k8s.io/v1/subjectaccessreviews", &review).await?;
        Ok(answer["status"]["allowed"] == true)
    }

    async fn approve(&self, request: &CertificateSigningRequest, message: &str) -> kube::Result<()> {
        let mut object = serde_json::to_value(request).map_err(kube::Error::SerdeError)?;
        let now = jiff::fmt::strtime::format("%Y-%m-%dT%H:%M:%SZ", Timestamp::now()).unwrap_or_default();
        let approval = json!({"type": "Approved", "status": "True", "reason": "AutoApproved", "message": message,
            "lastUpdateTime": now, "lastTransitionTime": now});
        match object["status"]["conditions"].as_array_mut() {
            Some(conditions) => conditions.push(approval),
            None => object["status"]["conditions"] = json!([approval]),
        }
        let path =
            format!("/apis/certificates.k8s.io/v1/certificatesigningrequests/{}/approval", name(&request.metadata));
        self.rest.replace(&path, &object).await.map(drop)
    }
}

/// The common name of a well-formed request for a kubelet's client certificate.
fn node_of(spec: &CertificateSigningRequestSpec) -> Option<String> {
    use rcgen::{DnType, DnValue};
    if spec.signer_name != KUBELET_CLIENT {
        return None;
    }
    let request = CertificateSigningRequestParams::from_pem(&String::from_utf8_lossy(&spec.request.0)).ok()?;
    let text = |type_: DnType| match request.params.distinguished_name.get(&type_) {
        Some(DnValue::Utf8String(text)) => Some(text.clone()),
        Some(DnValue::PrintableString(text)) => Some(text.as_str().to_owned()),
        _ => None,
    };
    let usages: Vec<_> = spec.usages.iter().flatten().map(String::as_str).collect();
    let client = usages.contains(&"client auth")
        && usages.iter().all(|usage| ["digital signature", "key encipherment", "client auth"].contains(usage));
    let common_name = text(DnType::CommonName).filter(|name| name.starts_with("system:node:"))?;
    let nodes = text(DnType::OrganizationName).as_deref() == Some("system:nodes");
    (nodes && client && request.params.subject_alt_names.is_empty()).then_some(common_name)
}
