//! Publishes the certificate authority of the API server as the cluster trust bundle of the signer
//! `kubernetes.io/kube-apiserver-serving`. The bundle's name has its hash; other bundles of the signer go.

use std::sync::Arc;

use apimachinery::controller::{Controller, Informer, ObjectKey, Plan, Write};
use jiff::Timestamp;
use k8s_openapi::api::certificates::v1::{ClusterTrustBundle, ClusterTrustBundleSpec};
use kube::api::ObjectMeta;
use sha2::{Digest, Sha256};

use crate::app::Context;
use crate::common::name;

const SIGNER: &str = "kubernetes.io/kube-apiserver-serving";
/// So many bytes of the hash are in the name.
const HASH: usize = 12;

struct TrustBundleController {
    certificates: String,
    bundles: Arc<Informer<ClusterTrustBundle>>,
}

pub fn start(context: &Context) {
    let Some(certificates) = context.root_ca.clone() else { return };
    let controller = TrustBundleController { certificates, bundles: context.driver.informers().of() };
    let key = controller.key();
    context.driver.run(controller, 1, |controller, wiring| {
        wiring.queue().add(key.clone());
        wiring.map(&controller.bundles, move |change| {
            if change.versions().any(|bundle| is_ours(bundle)) { vec![key.clone()] } else { Vec::new() }
        });
    });
}

fn is_ours(bundle: &ClusterTrustBundle) -> bool {
    bundle.spec.signer_name.as_deref() == Some(SIGNER)
}

impl TrustBundleController {
    fn key(&self) -> ObjectKey {
        let hash = Sha256::digest(&self.certificates);
        let prefix = format!("{}:", SIGNER.replace('/', ":"));
        ObjectKey::cluster(&hash.iter().take(HASH).fold(prefix, |name, byte| format!("{name}{byte:02x}")))
    }
}

impl Controller for TrustBundleController {
    fn name(&self) -> &'static str {
        "kube-apiserver-serving-clustertrustbundle-publisher"
    }

    fn component(&self) -> &'static str {
        "kube-apiserver-serving-clustertrustbundle-publisher-controller"
    }

    fn reconcile(&self, key: &ObjectKey, _: Timestamp) -> Plan {
        let mut plan = Plan::nothing();
        match self.bundles.get(key) {
            None => {
                let spec = ClusterTrustBundleSpec {
                    signer_name: Some(SIGNER.to_owned()),
                    trust_bundle: self.certificates.clone(),
                };
                let metadata = ObjectMeta { name: Some(key.name.clone()), ..ObjectMeta::default() };
                plan.push(Write::create(&ClusterTrustBundle { metadata, spec }).if_absent());
            }
            Some(bundle) if bundle.spec.trust_bundle != self.certificates => {
                let mut next = bundle.as_ref().clone();
                next.spec.trust_bundle.clone_from(&self.certificates);
                plan.push(Write::update(&next));
            }
            Some(_) => {}
        }
        let bundles = self.bundles.list();
        let others = bundles.iter().filter(|bundle| is_ours(bundle) && name(&bundle.metadata) != key.name);
        plan.writes.extend(others.map(|bundle| Write::delete(bundle.as_ref())));
        plan
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use apimachinery::controller::Verb;
    use serde_json::json;

    #[test]
    fn exactly_the_present_bundle_is_published() {
        let bundle = |name: &str, signer: &str, trust: &str| -> ClusterTrustBundle {
            serde_json::from_value(
                json!({"metadata": {"name": name, "uid": name}, "spec": {"signerName": signer, "trustBundle": trust}}),
            )
            .unwrap()
        };
        // sha256("PEM")
        let own = "kubernetes.io:kube-apiserver-serving:384fb9a44fabe158be2757b9";
        let verbs = |bundles: Vec<ClusterTrustBundle>| {
            let controller =
                TrustBundleController { certificates: "PEM".to_owned(), bundles: Informer::fixed(bundles) };
            assert_eq!(controller.key().name, own);
            let plan = controller.reconcile(&controller.key(), Timestamp::UNIX_EPOCH);
            plan.writes.into_iter().map(|write| write.verb).collect::<Vec<_>>()
        };
        assert_eq!(verbs(vec![bundle("other", "a/b", "PEM")]), [Verb::Create]);
        assert_eq!(verbs(vec![bundle(own, SIGNER, "PEM")]), []);
        assert_eq!(
            verbs(vec![bundle(own, SIGNER, "tampered"), bundle("old", SIGNER, "OLD")]),
            [Verb::Update, Verb::Delete]
        );
    }
}
