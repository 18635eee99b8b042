//! Publishes the certificate authority of the API server in every namespace, as the config map `kube-root-ca.crt` that
//! pods' service account volumes contain.

use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::controller::{Controller, Informer, ObjectKey, Plan, Write};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::api::ObjectMeta;

use crate::app::Context;
use crate::common::{is_deleted, name, namespace};

pub const CONFIG_MAP: &str = "kube-root-ca.crt";
const KEY: &str = "ca.crt";
const DESCRIPTION: &str = "kubernetes.io/description";
const DESCRIPTION_TEXT: &str = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal \
     endpoints such as the internal service IP or kubernetes.default.svc. No other usage is guaranteed across \
     distributions of Kubernetes clusters.";

struct RootCaController {
    certificates: String,
    namespaces: Arc<Informer<Namespace>>,
    config_maps: Arc<Informer<ConfigMap>>,
}

pub fn start(context: &Context) {
    let Some(certificates) = context.root_ca.clone() else {
        return tracing::info!("no --root-ca-file: kube-root-ca.crt is not published");
    };
    let informers = context.driver.informers();
    let controller = RootCaController { certificates, namespaces: informers.of(), config_maps: informers.of() };
    context.driver.run(controller, 1, |controller, wiring| {
        wiring.primary(&controller.namespaces);
        wiring.map(&controller.config_maps, |change| {
            let ours = change.versions().find(|map| name(&map.metadata) == CONFIG_MAP);
            ours.map(|map| ObjectKey::cluster(namespace(&map.metadata))).into_iter().collect()
        });
    });
}

impl Controller for RootCaController {
    fn name(&self) -> &'static str {
        "root-ca-certificate-publisher"
    }

    fn component(&self) -> &'static str {
        "root-ca-certificate-publisher-controller"
    }

    fn reconcile(&self, key: &ObjectKey, _: Timestamp) -> Plan {
        if self.namespaces.get(key).is_none_or(|namespace| is_deleted(&namespace.metadata)) {
            return Plan::nothing();
        }
        let data = BTreeMap::from([(KEY.to_owned(), self.certificates.clone())]);
        let map_key = ObjectKey::new(&key.name, CONFIG_MAP);
        match self.config_maps.get(&map_key) {
            None => {
                let metadata = ObjectMeta {
                    name: Some(map_key.name),
                    namespace: Some(map_key.namespace),
                    annotations: Some(BTreeMap::from([(DESCRIPTION.to_owned(), DESCRIPTION_TEXT.to_owned())])),
                    ..ObjectMeta::default()
                };
                let map = ConfigMap { metadata, data: Some(data), ..ConfigMap::default() };
                Plan::write(Write::create(&map).if_absent())
            }
            Some(map) if map.data.as_ref() == Some(&data) => Plan::nothing(),
            Some(map) => {
                // Keys that do not belong there go: the whole map is ours.
                let mut next = map.as_ref().clone();
                next.metadata
                    .annotations
                    .get_or_insert_default()
                    .insert(DESCRIPTION.to_owned(), DESCRIPTION_TEXT.to_owned());
                next.data = Some(data);
                Plan::write(Write::update(&next))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use apimachinery::controller::Verb;
    use serde_json::json;

    #[test]
    fn the_map_is_created_and_repaired() {
        let map = |namespace: &str, data: serde_json::Value| -> ConfigMap {
            serde_json::from_value(json!({"metadata": {"name": CONFIG_MAP, "namespace": namespace}, "data": data}))
                .unwrap()
        };
        let controller = RootCaController {
            certificates: "PEM".to_owned(),
            namespaces: Informer::fixed(
                ["new", "good", "bad"]
                    .map(|name| -> Namespace { serde_json::from_value(json!({"metadata": {"name": name}})).unwrap() }),
            ),
            config_maps: Informer::fixed([
                map("good", json!({"ca.crt": "PEM"})),
                map("bad", json!({"ca.crt": "old", "x": "y"})),
            ]),
        };
        let plan = |name: &str| controller.reconcile(&ObjectKey::cluster(name), Timestamp::UNIX_EPOCH).writes;
        assert_eq!(plan("new")[0].verb, Verb::Create);
        assert!(plan("good").is_empty());
        assert_eq!(plan("bad")[0].body["data"], json!({"ca.crt": "PEM"}));
    }
}
