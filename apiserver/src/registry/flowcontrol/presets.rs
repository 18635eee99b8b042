//! The flow schemas and priority levels that every cluster starts with, as tables. The mandatory ones may not be changed
//! (but for the shares of `exempt`), the suggested ones are an administrator's to change.

use serde_json::{Value, json};

/// Whoever removes this annotation, or says `false`, keeps the object as it is.
pub const AUTO_UPDATE: &str = "apf.kubernetes.io/autoupdate-spec";
pub const EXEMPT: &str = "exempt";
pub const CATCH_ALL: &str = "catch-all";

const EVERYBODY: [&str; 2] = ["system:unauthenticated", "system:authenticated"];

struct Level {
    name: &'static str,
    shares: u32,
    lendable: u32,
    /// Queues and the number of them that one flow is dealt; none: what is too much is refused.
    queues: Option<(u32, u32)>,
}

const QUEUE_LENGTH: u32 = 50;

const LEVELS: &[Level] = &[
    Level { name: CATCH_ALL, shares: 5, lendable: 0, queues: None },
    Level { name: "system", shares: 30, lendable: 33, queues: Some((64, 6)) },
    Level { name: "node-high", shares: 40, lendable: 25, queues: Some((64, 6)) },
    Level { name: "leader-election", shares: 10, lendable: 0, queues: Some((16, 4)) },
    Level { name: "workload-high", shares: 40, lendable: 50, queues: Some((128, 6)) },
    Level { name: "workload-low", shares: 100, lendable: 90, queues: Some((128, 6)) },
    Level { name: "global-default", shares: 20, lendable: 50, queues: Some((128, 6)) },
];

enum Who {
    Groups(&'static [&'static str]),
    Users(&'static [&'static str]),
    /// All service accounts of `kube-system`, after these users.
    SystemAccounts(&'static [&'static str]),
}

enum What {
    Everything,
    Probes,
    /// Verbs, group, resources, and whether those without a namespace are meant too.
    Resources(&'static [(&'static [&'static str], &'static str, &'static [&'static str], bool)]),
}

struct Schema {
    name: &'static str,
    level: &'static str,
    precedence: u32,
    distinguisher: &'static str,
    who: Who,
    what: What,
}

const CONTROLLERS: &str = "system:kube-controller-manager";
const SCHEDULER: &str = "system:kube-scheduler";
const NODES: &[&str] = &["system:nodes"];

const SCHEMAS: &[Schema] = &[
    Schema {
        name: EXEMPT,
        level: EXEMPT,
        precedence: 1,
        distinguisher: "",
        who: Who::Groups(&["system:masters"]),
        what: What::Everything,
    },
    Schema {
        name: "probes",
        level: EXEMPT,
        precedence: 2,
        distinguisher: "",
        who: Who::Groups(&EVERYBODY),
        what: What::Probes,
    },
    Schema {
        name: "system-leader-election",
        level: "leader-election",
        precedence: 100,
        distinguisher: "ByUser",
        who: Who::SystemAccounts(&[CONTROLLERS, SCHEDULER]),
        what: What::Resources(&[(&["get", "create", "update"], "coordination.k8s.io", &["leases"], false)]),
    },
    Schema {
        name: "system-node-high",
        level: "node-high",
        precedence: 400,
        distinguisher: "ByUser",
        who: Who::Groups(NODES),
        what: What::Resources(&[
            (&["*"], "", &["nodes", "nodes/status"], true),
            (&["*"], "coordination.k8s.io", &["leases"], false),
        ]),
    },
    Schema {
        name: "system-nodes",
        level: "system",
        precedence: 500,
        distinguisher: "ByUser",
        who: Who::Groups(NODES),
        what: What::Everything,
    },
    Schema {
        name: "kube-controller-manager",
        level: "workload-high",
        precedence: 800,
        distinguisher: "ByNamespace",
        who: Who::Users(&[CONTROLLERS]),
        what: What::Everything,
    },
    Schema {
        name: "kube-scheduler",
        level: "workload-high",
        precedence: 800,
        distinguisher: "ByNamespace",
        who: Who::Users(&[SCHEDULER]),
        what: What::Everything,
    },
    Schema {
        name: "kube-system-service-accounts",
        level: "workload-high",
        precedence: 900,
        distinguisher: "ByNamespace",
        who: Who::SystemAccounts(&[]),
        what: What::Everything,
    },
    Schema {
        name: "service-accounts",
        level: "workload-low",
        precedence: 9000,
        distinguisher: "ByUser",
        who: Who::Groups(&["system:serviceaccounts"]),
        what: What::Everything,
    },
    Schema {
        name: "global-default",
        level: "global-default",
        precedence: 9900,
        distinguisher: "ByUser",
        who: Who::Groups(&EVERYBODY),
        what: What::Everything,
    },
    Schema {
        name: CATCH_ALL,
        level: CATCH_ALL,
        precedence: 10_000,
        distinguisher: "ByUser",
        who: Who::Groups(&EVERYBODY),
        what: What::Everything,
    },
];

fn subjects(who: &Who) -> Vec<Value> {
    let user = |name: &&str| json!({"kind": "User", "user": {"name": name}});
    match who {
        Who::Groups(names) => names.iter().map(|name| json!({"kind": "Group", "group": {"name": name}})).collect(),
        Who::Users(names) => names.iter().map(user).collect(),
        Who::SystemAccounts(users) => {
            let accounts =
                json!({"kind": "ServiceAccount", "serviceAccount": {"name": "*", "namespace": "kube-system"}});
            users.iter().map(user).chain([accounts]).collect()
        }
    }
}

fn rule(schema: &Schema) -> Value {
    let subjects = subjects(&schema.who);
    match schema.what {
        What::Everything => json!({
            "subjects": subjects,
            "resourceRules": [{
                "verbs": ["*"], "apiGroups": ["*"], "resources": ["*"], "namespaces": ["*"], "clusterScope": true,
            }],
            "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}],
        }),
        What::Probes => json!({
            "subjects": subjects,
            "nonResourceRules": [{"verbs": ["get"], "nonResourceURLs": ["/healthz", "/readyz", "/livez"]}],
        }),
        What::Resources(rules) => {
            let rules = rules.iter().map(|(verbs, group, resources, cluster)| {
                let mut rule =
                    json!({"verbs": verbs, "apiGroups": [group], "resources": resources, "namespaces": ["*"]});
                if *cluster {
                    rule["clusterScope"] = true.into();
                }
                rule
            });
            json!({"subjects": subjects, "resourceRules": rules.collect::<Vec<_>>()})
        }
    }
}

fn schema_spec(schema: &Schema) -> Value {
    let mut spec = json!({
        "priorityLevelConfiguration": {"name": schema.level},
        "matchingPrecedence": schema.precedence,
        "rules": [rule(schema)],
    });
    if !schema.distinguisher.is_empty() {
        spec["distinguisherMethod"] = json!({"type": schema.distinguisher});
    }
    spec
}

fn level_spec(level: &Level) -> Value {
    let response = match level.queues {
        None => json!({"type": "Reject"}),
        Some((queues, hand)) => json!({
            "type": "Queue",
            "queuing": {"queues": queues, "handSize": hand, "queueLengthLimit": QUEUE_LENGTH},
        }),
    };
    json!({
        "type": "Limited",
        "limited": {
            "nominalConcurrencyShares": level.shares, "lendablePercent": level.lendable, "limitResponse": response,
        },
    })
}

fn exempt_level_spec() -> Value {
    json!({"type": "Exempt", "exempt": {"nominalConcurrencyShares": 0, "lendablePercent": 0}})
}

fn object(kind: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "flowcontrol.apiserver.k8s.io/v1",
        "kind": kind,
        "metadata": {"name": name, "annotations": {AUTO_UPDATE: "true"}},
        "spec": spec,
    })
}

pub fn priority_levels() -> Vec<Value> {
    let exempt = object("PriorityLevelConfiguration", EXEMPT, exempt_level_spec());
    let limited = LEVELS.iter().map(|level| object("PriorityLevelConfiguration", level.name, level_spec(level)));
    [exempt].into_iter().chain(limited).collect()
}

pub fn flow_schemas() -> Vec<Value> {
    SCHEMAS.iter().map(|schema| object("FlowSchema", schema.name, schema_spec(schema))).collect()
}

/// Mandatory objects may not differ from what they are here.
pub fn is_mandatory(name: &str) -> bool {
    name == EXEMPT || name == CATCH_ALL
}

/// The spec that a mandatory flow schema has.
pub fn mandatory_flow_schema(name: &str) -> Option<Value> {
    SCHEMAS.iter().find(|schema| is_mandatory(name) && schema.name == name).map(schema_spec)
}

/// The spec that a mandatory priority level has.
pub fn mandatory_priority_level(name: &str) -> Option<Value> {
    match name {
        EXEMPT => Some(exempt_level_spec()),
        name => LEVELS.iter().find(|level| is_mandatory(name) && level.name == name).map(level_spec),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::validation::flowcontrol::{flow_schema, priority_level};
    use crate::registry::validation::tests::texts;

    #[test]
    fn presets_are_valid_and_complete() {
        let (schemas, levels) = (flow_schemas(), priority_levels());
        assert_eq!((schemas.len(), levels.len()), (11, 8));
        for schema in &schemas {
            assert_eq!(texts(&flow_schema(schema)), Vec::<String>::new(), "{schema}");
            let level = &schema["spec"]["priorityLevelConfiguration"]["name"];
            assert!(levels.iter().any(|found| found["metadata"]["name"] == *level), "{level}");
        }
        for level in &levels {
            assert_eq!(texts(&priority_level(level)), Vec::<String>::new(), "{level}");
        }
    }
}
