//! Recounts what a namespace uses against its quotas (`status.used`). Admission counts up when something is created;
//! this controller counts down when something goes, and everything anew when a quota changes.

use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::controller::{AnyInformer, Controller, Informer, Object, ObjectKey, Plan, Wiring, Write};
use apimachinery::meta::{Quantity, QuantityFormat};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::core::v1::{
    ConfigMap, Container, Endpoints, PersistentVolumeClaim, Pod, PodSpec, ReplicationController, ResourceQuota,
    ResourceQuotaSpec, Secret, Service, ServiceAccount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;

use crate::app::Context;
use crate::common::{namespace, pods};

type Usage = BTreeMap<String, Quantity>;
/// Subscribes the queue to one counted kind.
type WireKind = Box<dyn FnOnce(&Wiring, &Arc<Informer<ResourceQuota>>)>;

struct QuotaController {
    quotas: Arc<Informer<ResourceQuota>>,
    pods: Arc<Informer<Pod>>,
    services: Arc<Informer<Service>>,
    claims: Arc<Informer<PersistentVolumeClaim>>,
    /// Kinds that are only counted, by `plural` or `plural.group`.
    counted: BTreeMap<String, Arc<dyn AnyInformer>>,
}

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let mut counted = BTreeMap::new();
    let mut kinds: Vec<WireKind> = Vec::new();
    macro_rules! count {
        ($($kind:ty),*) => {$(
            let informer = informers.of::<$kind>();
            counted.insert(counted_name(informer.as_ref()), informer.clone() as Arc<dyn AnyInformer>);
            kinds.push(Box::new(move |wiring, quotas| wire(wiring, informer.as_ref(), quotas, |_| true)));
        )*};
    }
    count!(ConfigMap, Secret, ServiceAccount, ReplicationController, Endpoints);
    count!(Deployment, ReplicaSet, StatefulSet, DaemonSet, ControllerRevision, Job, CronJob);
    let controller = QuotaController {
        quotas: informers.of(),
        pods: informers.of(),
        services: informers.of(),
        claims: informers.of(),
        counted,
    };
    context.driver.run(controller, 2, |controller, wiring| {
        let quotas = &controller.quotas;
        // Admission changes `used` all the time; only what a person changes asks for a recount.
        wiring.map(quotas, |change| {
            let hard = |quota: &ResourceQuota| quota.status.as_ref().and_then(|status| status.hard.clone());
            let changed = match (&change.old, &change.new) {
                (Some(old), Some(new)) => {
                    old.spec != new.spec || hard(new) != new.spec.as_ref().and_then(|s| s.hard.clone())
                }
                _ => true,
            };
            change.new.iter().filter(|_| changed).map(|quota| ObjectKey::of(&quota.metadata)).collect()
        });
        wire(wiring, controller.pods.as_ref(), quotas, |pod| !pods::is_finished(pod));
        wire(wiring, controller.services.as_ref(), quotas, |_| true);
        wire(wiring, controller.claims.as_ref(), quotas, |_| true);
        kinds.into_iter().for_each(|wire_kind| wire_kind(wiring, quotas));
    });
}

fn counted_name(informer: &dyn AnyInformer) -> String {
    let id = informer.resource();
    if id.group.is_empty() { id.plural.to_string() } else { format!("{}.{}", id.plural, id.group) }
}

/// Something that counted and does so no more, or uses something else, asks for a recount of its namespace's quotas.
fn wire<K: Object>(
    wiring: &Wiring,
    informer: &Informer<K>,
    quotas: &Arc<Informer<ResourceQuota>>,
    counts: fn(&K) -> bool,
) {
    let quotas = quotas.clone();
    wiring.map(informer, move |change| {
        let counted = change.old.as_ref().is_some_and(|old| counts(old));
        let counts_still = change.new.as_ref().is_some_and(|new| counts(new));
        let respecified = match (&change.old, &change.new) {
            (Some(old), Some(new)) => old.meta().generation != new.meta().generation,
            _ => false,
        };
        if !counted || counts_still && !respecified {
            return Vec::new();
        }
        let namespaces = change.versions().take(1).map(|object| namespace(object.meta()).to_owned());
        namespaces
            .flat_map(|namespace| quotas.in_namespace(&namespace))
            .map(|quota| ObjectKey::of(&quota.metadata))
            .collect()
    });
}

impl Controller for QuotaController {
    fn name(&self) -> &'static str {
        "resourcequota"
    }

    fn component(&self) -> &'static str {
        "resourcequota-controller"
    }

    fn reconcile(&self, key: &ObjectKey, _: Timestamp) -> Plan {
        let Some(quota) = self.quotas.get(key) else { return Plan::nothing() };
        let Some(spec) = &quota.spec else { return Plan::nothing() };
        let usage = self.usage(&key.namespace, spec);
        let hard = spec.hard.clone().unwrap_or_default();
        let used = hard.keys().map(|resource| {
            let amount = usage.get(resource).copied().unwrap_or(Quantity::ZERO);
            (resource.clone(), ApiQuantity(amount.to_string()))
        });
        let mut next = quota.as_ref().clone();
        let status = next.status.get_or_insert_default();
        status.used = Some(used.collect());
        status.hard = Some(hard);
        Plan { writes: Write::status(quota.as_ref(), &next).into_iter().collect(), ..Plan::default() }
    }
}

impl QuotaController {
    fn usage(&self, namespace: &str, spec: &ResourceQuotaSpec) -> Usage {
        let mut usage = Usage::new();
        for pod in self.pods.in_namespace(namespace).iter().filter(|pod| !pods::is_finished(pod) && in_scope(spec, pod))
        {
            add_pod(&mut usage, pod);
        }
        let scoped = spec.scopes.as_ref().is_some_and(|scopes| !scopes.is_empty()) || spec.scope_selector.is_some();
        if scoped {
            return usage;
        }
        for service in self.services.in_namespace(namespace) {
            add_service(&mut usage, &service);
        }
        for claim in self.claims.in_namespace(namespace) {
            add_claim(&mut usage, &claim);
        }
        for (name, informer) in &self.counted {
            let count = i64::try_from(informer.count(namespace)).unwrap_or(i64::MAX);
            add_number(&mut usage, &format!("count/{name}"), count);
            if !name.contains('.') {
                add_number(&mut usage, name, count);
            }
        }
        add_number(
            &mut usage,
            "resourcequotas",
            i64::try_from(self.quotas.in_namespace(namespace).len()).unwrap_or(i64::MAX),
        );
        usage
    }
}

fn add(usage: &mut Usage, name: &str, amount: Quantity) {
    let sum = usage.get(name).copied().map_or(amount, |have| have.add(amount));
    usage.insert(name.to_owned(), sum);
}

fn add_number(usage: &mut Usage, name: &str, number: i64) {
    add(usage, name, Quantity::from_value(number, QuantityFormat::DecimalSi));
}

fn add_service(usage: &mut Usage, service: &Service) {
    add_number(usage, "services", 1);
    add_number(usage, "count/services", 1);
    let Some(spec) = &service.spec else { return };
    let ports = i64::try_from(spec.ports.iter().flatten().count()).unwrap_or(i64::MAX);
    match spec.type_.as_deref() {
        Some("NodePort") => add_number(usage, "services.nodeports", ports),
        Some("LoadBalancer") => {
            add_number(usage, "services.loadbalancers", 1);
            if spec.allocate_load_balancer_node_ports != Some(false) {
                add_number(usage, "services.nodeports", ports);
            }
        }
        _ => {}
    }
}

fn add_claim(usage: &mut Usage, claim: &PersistentVolumeClaim) {
    let class = claim.spec.as_ref().and_then(|spec| spec.storage_class_name.as_deref());
    let requests = claim.spec.as_ref().and_then(|spec| spec.resources.as_ref()?.requests.as_ref()?.get("storage"));
    let storage = requests.and_then(|quantity| quantity.0.parse::<Quantity>().ok());
    let prefixes =
        ["".to_owned()].into_iter().chain(class.map(|class| format!("{class}.storageclass.storage.k8s.io/")));
    for prefix in prefixes {
        add_number(usage, &format!("{prefix}persistentvolumeclaims"), 1);
        if let Some(storage) = storage {
            add(usage, &format!("{prefix}requests.storage"), storage);
        }
    }
    add_number(usage, "count/persistentvolumeclaims", 1);
}

fn add_pod(usage: &mut Usage, pod: &Pod) {
    add_number(usage, "pods", 1);
    add_number(usage, "count/pods", 1);
    let Some(spec) = &pod.spec else { return };
    for (resource, amount) in total(spec, |container| container.resources.as_ref()?.requests.as_ref()) {
        let plain =
            matches!(resource.as_str(), "cpu" | "memory" | "ephemeral-storage") || resource.starts_with("hugepages-");
        if plain {
            add(usage, &resource, amount);
        }
        add(usage, &format!("requests.{resource}"), amount);
    }
    for (resource, amount) in total(spec, |container| container.resources.as_ref()?.limits.as_ref()) {
        add(usage, &format!("limits.{resource}"), amount);
    }
}

type Amounts = BTreeMap<String, ApiQuantity>;

/// What all containers together take: the running ones' sum, or the hungriest init container with the sidecars that run
/// beside it; and the overhead.
fn total(spec: &PodSpec, of: impl Fn(&Container) -> Option<&Amounts>) -> Usage {
    let parse = |amounts: Option<&Amounts>| -> Usage {
        let parsed = amounts.into_iter().flatten();
        parsed.filter_map(|(name, amount)| Some((name.clone(), amount.0.parse().ok()?))).collect()
    };
    let mut sum = Usage::new();
    for container in &spec.containers {
        parse(of(container)).into_iter().for_each(|(name, amount)| add(&mut sum, &name, amount));
    }
    let (mut sidecars, mut peak) = (Usage::new(), Usage::new());
    for container in spec.init_containers.iter().flatten() {
        let mut at_work = sidecars.clone();
        let amounts = parse(of(container));
        amounts.iter().for_each(|(name, amount)| add(&mut at_work, name, *amount));
        if container.restart_policy.as_deref() == Some("Always") {
            amounts.iter().for_each(|(name, amount)| add(&mut sum, name, *amount));
            sidecars.clone_from(&at_work);
        }
        for (name, amount) in at_work {
            let highest = peak.get(&name).copied().map_or(amount, |have| have.max(amount));
            peak.insert(name, highest);
        }
    }
    for (name, amount) in peak {
        let highest = sum.get(&name).copied().map_or(amount, |have| have.max(amount));
        sum.insert(name, highest);
    }
    for (name, amount) in parse(spec.overhead.as_ref()) {
        add(&mut sum, &name, amount);
    }
    sum
}

fn in_scope(spec: &ResourceQuotaSpec, pod: &Pod) -> bool {
    let Some(pod_spec) = &pod.spec else { return false };
    let simple = spec.scopes.iter().flatten().all(|scope| scope_holds(scope, "Exists", &[], pod_spec));
    let selected = spec.scope_selector.iter().flat_map(|selector| selector.match_expressions.iter().flatten());
    simple
        && selected.into_iter().all(|requirement| {
            let values = requirement.values.as_deref().unwrap_or_default();
            scope_holds(&requirement.scope_name, &requirement.operator, values, pod_spec)
        })
}

fn scope_holds(scope: &str, operator: &str, values: &[String], spec: &PodSpec) -> bool {
    match scope {
        "Terminating" => spec.active_deadline_seconds.is_some(),
        "NotTerminating" => spec.active_deadline_seconds.is_none(),
        "BestEffort" => is_best_effort(spec),
        "NotBestEffort" => !is_best_effort(spec),
        "PriorityClass" => {
            let class = spec.priority_class_name.as_deref().filter(|class| !class.is_empty());
            let listed = class.is_some_and(|class| values.iter().any(|value| value == class));
            match operator {
                "In" => listed,
                "NotIn" => !listed,
                "DoesNotExist" => class.is_none(),
                _ => class.is_some(),
            }
        }
        "CrossNamespacePodAffinity" => crosses_namespaces(spec),
        _ => false,
    }
}

fn is_best_effort(spec: &PodSpec) -> bool {
    spec.containers.iter().chain(spec.init_containers.iter().flatten()).all(|container| {
        container.resources.as_ref().is_none_or(|resources| {
            let empty =
                |amounts: &Option<Amounts>| amounts.iter().flatten().all(|(name, _)| name != "cpu" && name != "memory");
            empty(&resources.requests) && empty(&resources.limits)
        })
    })
}

fn crosses_namespaces(spec: &PodSpec) -> bool {
    let Some(affinity) = &spec.affinity else { return false };
    let mut terms = Vec::new();
    if let Some(affinity) = &affinity.pod_affinity {
        terms.extend(affinity.required_during_scheduling_ignored_during_execution.iter().flatten());
        terms.extend(
            affinity
                .preferred_during_scheduling_ignored_during_execution
                .iter()
                .flatten()
                .map(|t| &t.pod_affinity_term),
        );
    }
    if let Some(affinity) = &affinity.pod_anti_affinity {
        terms.extend(affinity.required_during_scheduling_ignored_during_execution.iter().flatten());
        terms.extend(
            affinity
                .preferred_during_scheduling_ignored_during_execution
                .iter()
                .flatten()
                .map(|t| &t.pod_affinity_term),
        );
    }
    terms
        .iter()
        .any(|term| term.namespaces.as_ref().is_some_and(|n| !n.is_empty()) || term.namespace_selector.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn used(quota_spec: serde_json::Value) -> serde_json::Value {
        let pod = |name: &str, phase: &str, spec: serde_json::Value| -> Pod {
            serde_json::from_value(
                json!({"metadata": {"name": name, "namespace": "ns"}, "spec": spec, "status": {"phase": phase}}),
            )
            .unwrap()
        };
        let container =
            |cpu: &str| json!({"name": "c", "resources": {"requests": {"cpu": cpu}, "limits": {"cpu": "1"}}});
        let pods = [
            pod(
                "a",
                "Running",
                json!({"containers": [container("100m"), container("200m")], "initContainers": [container("250m")]}),
            ),
            pod(
                "b",
                "Running",
                json!({"containers": [container("100m")], "initContainers": [container("500m")], "priorityClassName": "high"}),
            ),
            pod("done", "Succeeded", json!({"containers": [container("9")]})),
            pod("free", "Pending", json!({"containers": [{"name": "c"}], "activeDeadlineSeconds": 5})),
        ];
        let service: Service = serde_json::from_value(json!({"metadata": {"name": "s", "namespace": "ns"}, "spec": {"type": "NodePort", "ports": [{"port": 1}, {"port": 2}]}})).unwrap();
        let maps: Arc<Informer<ConfigMap>> =
            Informer::fixed([serde_json::from_value(json!({"metadata": {"name": "m", "namespace": "ns"}})).unwrap()]);
        let quota: ResourceQuota =
            serde_json::from_value(json!({"metadata": {"name": "q", "namespace": "ns"}, "spec": quota_spec})).unwrap();
        let controller = QuotaController {
            quotas: Informer::fixed([quota]),
            pods: Informer::fixed(pods),
            services: Informer::fixed([service]),
            claims: Informer::fixed([]),
            counted: BTreeMap::from([("configmaps".to_owned(), maps as Arc<dyn AnyInformer>)]),
        };
        controller.reconcile(&ObjectKey::new("ns", "q"), Timestamp::UNIX_EPOCH).writes[0].body["status"]["used"].clone()
    }

    #[test]
    fn everything_is_counted() {
        let hard = json!({"pods": "9", "requests.cpu": "9", "limits.cpu": "9", "services.nodeports": "9", "configmaps": "9", "count/configmaps": "9", "secrets": "9"});
        let expected = json!({"pods": "3", "requests.cpu": "800m", "limits.cpu": "3", "services.nodeports": "2", "configmaps": "1", "count/configmaps": "1", "secrets": "0"});
        assert_eq!(used(json!({"hard": hard})), expected);
    }

    #[test]
    fn scopes_select_pods() {
        let pods = |extra: serde_json::Value| {
            let mut spec = extra;
            spec["hard"] = json!({"pods": "9"});
            used(spec)["pods"].as_str().unwrap().to_owned()
        };
        assert_eq!(pods(json!({"scopes": ["BestEffort"]})), "1");
        assert_eq!(pods(json!({"scopes": ["NotBestEffort"]})), "2");
        assert_eq!(pods(json!({"scopes": ["Terminating"]})), "1");
        assert_eq!(
            pods(
                json!({"scopeSelector": {"matchExpressions": [{"scopeName": "PriorityClass", "operator": "In", "values": ["high"]}]}})
            ),
            "1"
        );
    }
}
