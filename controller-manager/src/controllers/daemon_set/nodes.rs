//! Which nodes a daemon pod may run on, decided here and not by the scheduler, and how a pod is bound to its node.

use k8s_openapi::api::core::v1::{
    Node, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec, Taint, Toleration,
};

use crate::common::{labels, name};

/// Where a daemon pod stands with a node.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Placement {
    pub may_run: bool,
    /// A pod that is there already may stay.
    pub may_continue: bool,
}

const NODE_NAME_FIELD: &str = "metadata.name";
/// What every daemon pod tolerates: key and effect.
const TOLERATED: [(&str, &str); 6] = [
    ("node.kubernetes.io/not-ready", "NoExecute"),
    ("node.kubernetes.io/unreachable", "NoExecute"),
    ("node.kubernetes.io/disk-pressure", "NoSchedule"),
    ("node.kubernetes.io/memory-pressure", "NoSchedule"),
    ("node.kubernetes.io/pid-pressure", "NoSchedule"),
    ("node.kubernetes.io/unschedulable", "NoSchedule"),
];
const NETWORK_UNAVAILABLE: (&str, &str) = ("node.kubernetes.io/network-unavailable", "NoSchedule");

/// Judges a node for pods like `template`.
pub fn placement(template: &Pod, node: &Node) -> Placement {
    let nowhere = Placement { may_run: false, may_continue: false };
    let Some(spec) = &template.spec else { return nowhere };
    let wants_other =
        spec.node_name.as_deref().is_some_and(|wanted| !wanted.is_empty() && wanted != name(&node.metadata));
    if wants_other || !is_selected(spec, node) {
        return nowhere;
    }
    let mut tolerant = template.clone();
    add_tolerations(&mut tolerant);
    let tolerations = tolerant.spec.and_then(|spec| spec.tolerations).unwrap_or_default();
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    let untolerated = |effects: &[&str]| {
        taints
            .clone()
            .any(|taint| effects.contains(&taint.effect.as_str()) && !tolerations.iter().any(|t| tolerates(t, taint)))
    };
    Placement { may_run: !untolerated(&["NoSchedule", "NoExecute"]), may_continue: !untolerated(&["NoExecute"]) }
}

fn is_selected(spec: &PodSpec, node: &Node) -> bool {
    let have = labels(&node.metadata);
    let by_labels = spec.node_selector.iter().flatten().all(|(key, value)| have.get(key) == Some(value));
    let required = spec
        .affinity
        .as_ref()
        .and_then(|affinity| affinity.node_affinity.as_ref())
        .and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    by_labels
        && required.is_none_or(|required| required.node_selector_terms.iter().any(|term| term_matches(term, node)))
}

fn term_matches(term: &NodeSelectorTerm, node: &Node) -> bool {
    let expressions = term.match_expressions.iter().flatten();
    let fields = term.match_fields.iter().flatten();
    if expressions.clone().next().is_none() && fields.clone().next().is_none() {
        return false;
    }
    let field =
        |requirement: &NodeSelectorRequirement| (requirement.key == NODE_NAME_FIELD).then(|| name(&node.metadata));
    expressions.clone().all(|r| requirement_holds(r, labels(&node.metadata).get(&r.key).map(String::as_str)))
        && fields.clone().all(|r| requirement_holds(r, field(r)))
}

fn requirement_holds(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let listed = |value: &str| values.iter().any(|listed| listed == value);
    let numbers = || -> Option<(i64, i64)> { Some((value?.parse().ok()?, values.first()?.parse().ok()?)) };
    match requirement.operator.as_str() {
        "In" => value.is_some_and(listed),
        "NotIn" => !value.is_some_and(listed),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => numbers().is_some_and(|(have, bound)| have > bound),
        "Lt" => numbers().is_some_and(|(have, bound)| have < bound),
        _ => false,
    }
}

fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let (effect, key) = (toleration.effect.as_deref().unwrap_or(""), toleration.key.as_deref().unwrap_or(""));
    if !effect.is_empty() && effect != taint.effect || !key.is_empty() && key != taint.key {
        return false;
    }
    match toleration.operator.as_deref().unwrap_or("Equal") {
        "Exists" => true,
        _ => !key.is_empty() && toleration.value.as_deref().unwrap_or("") == taint.value.as_deref().unwrap_or(""),
    }
}

/// Makes the scheduler bind the pod to this node and no other.
pub fn pin(pod: &mut Pod, node: &str) {
    let Some(spec) = &mut pod.spec else { return };
    let affinity = spec.affinity.get_or_insert_default().node_affinity.get_or_insert_default();
    let this_node = NodeSelectorRequirement {
        key: NODE_NAME_FIELD.to_owned(),
        operator: "In".to_owned(),
        values: Some(vec![node.to_owned()]),
    };
    let required = affinity
        .required_during_scheduling_ignored_during_execution
        .get_or_insert_with(|| NodeSelector { node_selector_terms: Vec::new() });
    if required.node_selector_terms.is_empty() {
        required.node_selector_terms.push(NodeSelectorTerm::default());
    }
    // Each term alone would allow the pod: all must name the node.
    for term in &mut required.node_selector_terms {
        term.match_fields = Some(vec![this_node.clone()]);
    }
}

/// The node that the pod is pinned to.
pub fn pinned_node(pod: &Pod) -> Option<&str> {
    let affinity = pod.spec.as_ref()?.affinity.as_ref()?.node_affinity.as_ref()?;
    let terms = &affinity.required_during_scheduling_ignored_during_execution.as_ref()?.node_selector_terms;
    let mut fields = terms.iter().flat_map(|term| term.match_fields.iter().flatten());
    let field = fields.find(|field| field.key == NODE_NAME_FIELD && field.operator == "In")?;
    field.values.as_ref()?.first().map(String::as_str)
}

/// Daemons run on nodes that other pods are kept away from.
pub fn add_tolerations(pod: &mut Pod) {
    let Some(spec) = &mut pod.spec else { return };
    let host_network = spec.host_network == Some(true);
    let tolerations = spec.tolerations.get_or_insert_default();
    for (key, effect) in TOLERATED.into_iter().chain(host_network.then_some(NETWORK_UNAVAILABLE)) {
        let toleration = Toleration {
            key: Some(key.to_owned()),
            operator: Some("Exists".to_owned()),
            effect: Some(effect.to_owned()),
            ..Toleration::default()
        };
        if !tolerations.contains(&toleration) {
            tolerations.push(toleration);
        }
    }
}
