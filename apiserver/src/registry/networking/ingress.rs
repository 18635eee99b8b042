//! `Ingress` and `IngressClass`: HTTP from outside the cluster.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::Value;

use crate::registry::common::{self, StatusOf};
use crate::registry::declared::{Declared, Shape};
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Cx, Strategy, Subresource};
use crate::registry::tables::{NONE, age, name, text, text_or};
use crate::registry::{defaults, validation};

pub struct Ingress;

const COLUMNS: &[Column] = &[
    Column::name(),
    Column::new("Class", "string"),
    Column::new("Hosts", "string"),
    Column::new("Address", "string"),
    Column::new("Ports", "string"),
    Column::age(),
];

static STATUS: StatusOf = StatusOf::new().validated(validation::networking::ingress_status);

pub static INGRESS_CLASS: Declared = Declared::new(Shape::Counted)
    .defaults(defaults::networking::ingress_class)
    .rules(validation::networking::ingress_class)
    .update_rules(validation::networking::ingress_class_update)
    .table(
        &[Column::name(), Column::new("Controller", "string"), Column::new("Parameters", "string"), Column::age()],
        |obj, now| {
            let is_default = obj.annotation("ingressclass.kubernetes.io/is-default-class") == Some("true");
            let shown = if is_default { format!("{} (default)", obj.name()) } else { obj.name().to_owned() };
            vec![shown.into(), text(obj, &["spec", "controller"]), parameters(obj).into(), age(obj, now)]
        },
    );

fn parameters(class: &Value) -> String {
    let reference = &class["spec"]["parameters"];
    let (kind, name) = (reference.str_at(&["kind"]), reference.str_at(&["name"]));
    match reference["apiGroup"].as_str() {
        _ if reference.is_null() => NONE.into(),
        Some(group) => format!("{kind}.{group}/{name}"),
        None => format!("{kind}/{name}"),
    }
}

fn hosts(ingress: &Value) -> String {
    const SHOWN: usize = 3;
    let rules = ingress.list_at(&["spec", "rules"]);
    let named: Vec<&str> = rules.iter().map(|rule| rule.str_at(&["host"])).filter(|host| !host.is_empty()).collect();
    match named.len() {
        0 => "*".into(),
        all if all > SHOWN => format!("{} + {} more...", named[..SHOWN].join(","), rules.len() - SHOWN),
        _ => named.join(","),
    }
}

/// Addresses or names of a load balancer, sorted.
pub fn load_balancer(status: &Value) -> String {
    let address = |ingress: &Value| match ingress.str_at(&["ip"]) {
        "" => ingress.str_at(&["hostname"]).to_owned(),
        ip => ip.to_owned(),
    };
    let mut all: Vec<String> = status.list_at(&["loadBalancer", "ingress"]).iter().map(address).collect();
    all.retain(|address| !address.is_empty());
    all.sort();
    all.dedup();
    all.join(",")
}

impl Strategy for Ingress {
    fn prepare_for_create(&self, _cx: &Cx<'_>, obj: &mut Value) {
        common::create(obj);
        obj.set(&["status", "loadBalancer"], serde_json::json!({}));
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        common::update(obj, old);
    }

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::networking::ingress(obj)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, _old: &Value) -> Vec<FieldError> {
        validation::networking::ingress(obj)
    }

    fn warnings(&self, _cx: &Cx<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        const ANNOTATION: &str = "kubernetes.io/ingress.class";
        if old.is_none() && obj.annotation(ANNOTATION).is_some() && obj["spec"]["ingressClassName"].is_null() {
            return vec![format!(
                "annotation {ANNOTATION:?} is deprecated, please use 'spec.ingressClassName' instead"
            )];
        }
        Vec::new()
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let ports = if obj.list_at(&["spec", "tls"]).is_empty() { "80" } else { "80, 443" };
        vec![
            name(obj),
            text_or(obj, &["spec", "ingressClassName"], NONE),
            hosts(obj).into(),
            load_balancer(&obj["status"]).into(),
            ports.into(),
            age(obj, now),
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
    fn hosts_and_addresses_are_shown() {
        assert_eq!(hosts(&json!({"spec": {"rules": [{}]}})), "*");
        let rules: Vec<Value> = ["a", "b", "c", "d"].iter().map(|host| json!({"host": host})).collect();
        assert_eq!(hosts(&json!({"spec": {"rules": rules}})), "a,b,c + 1 more...");
        let status = json!({"loadBalancer": {"ingress": [{"ip": "2.2.2.2"}, {"hostname": "a.b"}, {"ip": "1.1.1.1"}]}});
        assert_eq!(load_balancer(&status), "1.1.1.1,2.2.2.2,a.b");
    }
}
