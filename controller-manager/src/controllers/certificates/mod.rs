//! Certificate signing requests: approving those of kubelets, signing what is approved, removing what is old.

mod approve;
mod clean;
mod clean_pods;
mod sign;

pub use approve::start as start_approver;
pub use clean::start as start_cleaner;
pub use clean_pods::start as start_pod_cleaner;
pub use sign::start as start_signer;

use apimachinery::controller::{Plan, Write};
use jiff::Timestamp;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use kube::Resource;

use crate::common::elapsed;

pub const CLIENT: &str = "kubernetes.io/kube-apiserver-client";
pub const KUBELET_CLIENT: &str = "kubernetes.io/kube-apiserver-client-kubelet";
pub const KUBELET_SERVING: &str = "kubernetes.io/kubelet-serving";
pub const LEGACY: &str = "kubernetes.io/legacy-unknown";

fn has(request: &CertificateSigningRequest, type_: &str) -> bool {
    let conditions = request.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|condition| condition.type_ == type_)
}

fn is_issued(request: &CertificateSigningRequest) -> bool {
    request.status.as_ref().and_then(|status| status.certificate.as_ref()).is_some_and(|pem| !pem.0.is_empty())
}

/// Deletes a request when its time has come.
fn delete_at<K: Resource<DynamicType = ()>>(request: &K, due: Timestamp, now: Timestamp) -> Plan {
    if due <= now {
        return Plan::write(Write::delete(request));
    }
    let mut plan = Plan::nothing();
    plan.again_after(elapsed(now, due));
    plan
}
