//! `Service`: one address for many pods. Its cluster addresses and node ports come from `registry/alloc`.

use apimachinery::status::{FieldError, Result};
use async_trait::async_trait;
use jiff::Timestamp;
use serde_json::Value;

use crate::registry::common::{self, StatusOf, same};
use crate::registry::networking::ingress::load_balancer;
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Cx, NameRule, Strategy, Subresource, Undo};
use crate::registry::tables::{NONE, age, labels, name, scalar, text};
use crate::registry::validation::service::{is_external, needs_health_check};
use crate::registry::{alloc, defaults, validation};

pub struct Service;

const COLUMNS: &[Column] = &[
    Column::name(),
    Column::new("Type", "string"),
    Column::new("Cluster-IP", "string"),
    Column::new("External-IP", "string"),
    Column::new("Port(s)", "string"),
    Column::age(),
    Column::new("Selector", "string").wide(),
];

static STATUS: StatusOf = StatusOf::new().validated(|obj, _| validation::service::status(obj));

fn external_ip(obj: &Value) -> String {
    let own: Vec<&str> = obj.list_at(&["spec", "externalIPs"]).iter().filter_map(Value::as_str).collect();
    match obj.str_at(&["spec", "type"]) {
        "ClusterIP" | "NodePort" if own.is_empty() => NONE.into(),
        "ClusterIP" | "NodePort" => own.join(","),
        "LoadBalancer" => {
            let balancer = load_balancer(&obj["status"]);
            let all: Vec<&str> = balancer.split(',').filter(|ip| !ip.is_empty()).chain(own).collect();
            if all.is_empty() { "<pending>".into() } else { all.join(",") }
        }
        "ExternalName" => obj.str_at(&["spec", "externalName"]).to_owned(),
        _ => "<unknown>".into(),
    }
}

fn ports(obj: &Value) -> String {
    let port = |port: &Value| {
        let number = scalar(&port["port"]);
        let protocol = port.str_at(&["protocol"]);
        match port["nodePort"].as_i64().unwrap_or(0) {
            0 => format!("{number}/{protocol}"),
            node => format!("{number}:{node}/{protocol}"),
        }
    };
    let cells: Vec<String> = obj.list_at(&["spec", "ports"]).iter().map(port).collect();
    if cells.is_empty() { NONE.into() } else { cells.join(",") }
}

fn needs_node_ports(spec: &Value) -> bool {
    match spec.str_at(&["type"]) {
        "NodePort" => true,
        "LoadBalancer" => spec["allocateLoadBalancerNodePorts"] != false,
        _ => false,
    }
}

fn needs_cluster_ip(spec: &Value) -> bool {
    matches!(spec.str_at(&["type"]), "ClusterIP" | "NodePort" | "LoadBalancer")
}

/// What the type of the service no longer allows goes, where the user did not touch it.
fn drop_outdated(spec: &mut Value, old: &Value) {
    type Allowed = fn(&Value) -> bool;
    let is_balanced: Allowed = |spec| spec["type"] == "LoadBalancer";
    let rules: [(Allowed, &[&str]); 4] = [
        (needs_cluster_ip, &["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"]),
        (needs_health_check, &["healthCheckNodePort"]),
        (is_balanced, &["allocateLoadBalancerNodePorts", "loadBalancerClass"]),
        (is_external, &["externalTrafficPolicy"]),
    ];
    for (allowed, fields) in rules {
        if !allowed(old) || allowed(spec) {
            continue;
        }
        for field in fields {
            if same(&spec[*field], &old[*field]) {
                spec.remove_at(&[field]);
            }
        }
    }
    let node_ports =
        |spec: &Value| -> Vec<Value> { spec.list_at(&["ports"]).iter().map(|port| port["nodePort"].clone()).collect() };
    if needs_node_ports(old) && !needs_node_ports(spec) && node_ports(spec) == node_ports(old) {
        for port in spec.list_at_mut(&["ports"]).into_iter().flatten() {
            port.remove_at(&["nodePort"]);
        }
    }
    if spec["type"] == "ExternalName" && same(&spec["internalTrafficPolicy"], &old["internalTrafficPolicy"]) {
        spec.remove_at(&["internalTrafficPolicy"]);
    }
}

/// What was allocated and is still needed is taken over where the user left it out.
fn keep_allocated(spec: &mut Value, old: &Value) {
    if needs_cluster_ip(old) && needs_cluster_ip(spec) {
        keep_cluster_ips(spec, old);
    }
    if needs_node_ports(old) && needs_node_ports(spec) {
        let taken: Vec<Value> = spec.list_at(&["ports"]).iter().map(|port| port["nodePort"].clone()).collect();
        for port in spec.list_at_mut(&["ports"]).into_iter().flatten() {
            let before = old.list_at(&["ports"]).iter().find(|known| known.str_at(&["name"]) == port.str_at(&["name"]));
            let number = before.map(|known| known["nodePort"].clone()).unwrap_or_default();
            if port["nodePort"].as_i64().unwrap_or(0) == 0 && !number.is_null() && !taken.contains(&number) {
                port.set(&["nodePort"], number);
            }
        }
    }
    if needs_health_check(old) && needs_health_check(spec) && spec["healthCheckNodePort"].as_i64().unwrap_or(0) == 0 {
        spec.set(&["healthCheckNodePort"], old["healthCheckNodePort"].clone());
    }
}

/// Older clients know only `clusterIP`, newer ones both fields: what one of them says goes for the other.
fn keep_cluster_ips(spec: &mut Value, old: &Value) {
    let (first, stored_first) = (spec.str_at(&["clusterIP"]).to_owned(), old.str_at(&["clusterIP"]));
    let unchanged = same(&spec["clusterIPs"], &old["clusterIPs"]);
    if spec.list_at(&["clusterIPs"]).is_empty() && (first.is_empty() || first == stored_first) {
        spec.set(&["clusterIPs"], old["clusterIPs"].clone());
    }
    match (first.is_empty(), first == stored_first) {
        (true, false) => spec.set(&["clusterIP"], stored_first),
        (false, false) if unchanged => spec.set(&["clusterIPs"], vec![first]),
        _ => {}
    }
}

#[async_trait]
impl Strategy for Service {
    fn default(&self, obj: &mut Value) {
        defaults::service::service(obj);
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, obj: &mut Value) {
        obj.set(&["status"], serde_json::json!({"loadBalancer": {}}));
        if let Some(first) = obj["spec"]["clusterIP"].as_str().filter(|ip| !ip.is_empty()).map(str::to_owned)
            && obj.list_at(&["spec", "clusterIPs"]).is_empty()
        {
            obj.set(&["spec", "clusterIPs"], vec![first]);
        }
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        common::update_uncounted(obj, old);
        if let Some(spec) = obj.get_mut("spec").filter(|spec| spec.is_object()) {
            keep_allocated(spec, &old["spec"]);
            drop_outdated(spec, &old["spec"]);
        }
        if obj["spec"]["type"] != "LoadBalancer" {
            obj.set(&["status", "loadBalancer"], serde_json::json!({}));
        }
    }

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::service::create(obj)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::service::update(obj, old)
    }

    async fn begin_create(&self, cx: &Cx<'_>, obj: &mut Value) -> Result<Undo> {
        alloc::allocate(cx, obj, None).await
    }

    async fn begin_update(&self, cx: &Cx<'_>, obj: &mut Value, old: &Value) -> Result<Undo> {
        alloc::allocate(cx, obj, Some(old)).await
    }

    async fn after_update(&self, cx: &Cx<'_>, obj: &Value, old: &Value) {
        alloc::release_difference(cx, obj, old).await;
    }

    async fn after_delete(&self, cx: &Cx<'_>, obj: &Value) {
        alloc::release(cx, obj).await;
    }

    fn name_rule(&self) -> NameRule {
        NameRule::Dns1123Label
    }

    fn allow_create_on_update(&self) -> bool {
        true
    }

    fn selectable_fields(&self) -> &'static [&'static str] {
        &["spec.clusterIP", "spec.type"]
    }

    fn warnings(&self, _cx: &Cx<'_>, obj: &Value, _old: Option<&Value>) -> Vec<String> {
        validation::warnings::service(obj)
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![
            name(obj),
            text(obj, &["spec", "type"]),
            obj["spec"]["clusterIPs"][0].as_str().unwrap_or(NONE).into(),
            external_ip(obj).into(),
            ports(obj).into(),
            age(obj, now),
            labels(&obj["spec"]["selector"]),
        ]
    }

    fn subresource(&self, name: &str) -> Option<Subresource> {
        (name == "status").then_some(Subresource::Update(&STATUS))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_row_shows_addresses_and_ports() {
        let obj = json!({"metadata": {"name": "web"}, "spec": {"type": "NodePort", "clusterIPs": ["10.0.0.5"],
            "ports": [{"port": 80, "nodePort": 30001, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}], "selector": {"app": "web"}}});
        let expected = json!(["web", "NodePort", "10.0.0.5", "<none>", "80:30001/TCP,53/UDP", "<unknown>", "app=web"]);
        assert_eq!(json!(Service.row(&obj, Timestamp::UNIX_EPOCH)), expected);
    }

    #[test]
    fn updates_keep_what_was_allocated() {
        let old = json!({"type": "NodePort", "clusterIP": "10.0.0.5", "clusterIPs": ["10.0.0.5"],
            "ports": [{"port": 80, "nodePort": 30001}]});
        let mut spec = json!({"type": "NodePort", "ports": [{"port": 81}]});
        keep_allocated(&mut spec, &old);
        assert_eq!(spec["clusterIP"], "10.0.0.5");
        assert_eq!(spec["clusterIPs"], json!(["10.0.0.5"]));
        assert_eq!(spec["ports"], json!([{"port": 81, "nodePort": 30001}]));
    }

    #[test]
    fn a_change_of_type_drops_what_no_longer_applies() {
        let old = json!({"type": "NodePort", "clusterIP": "10.0.0.5", "clusterIPs": ["10.0.0.5"], "externalTrafficPolicy": "Cluster",
            "ports": [{"port": 80, "nodePort": 30001}]});
        let mut spec = old.clone();
        spec["type"] = "ClusterIP".into();
        drop_outdated(&mut spec, &old);
        assert_eq!(
            spec,
            json!({"type": "ClusterIP", "clusterIP": "10.0.0.5", "clusterIPs": ["10.0.0.5"], "ports": [{"port": 80}]})
        );
        spec["type"] = "ExternalName".into();
        drop_outdated(&mut spec, &old);
        assert_eq!(spec, json!({"type": "ExternalName", "ports": [{"port": 80}]}));
    }
}
