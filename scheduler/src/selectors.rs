//! Label selectors and node selectors, compiled once per pod instead of once per node.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Node, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

pub type Labels = BTreeMap<String, String>;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    DoesNotExist,
    /// The label's value as an integer is greater (or, when `false`, less) than this.
    Compare(i64, bool),
    /// Never true: what an operator or a value that cannot be read becomes.
    Never,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    test: Test,
}

impl Requirement {
    fn new(key: &str, operator: &str, values: &[String]) -> Self {
        let number = || values.first().and_then(|value| value.parse().ok());
        let test = match operator {
            "In" => Test::In(values.to_vec()),
            "NotIn" => Test::NotIn(values.to_vec()),
            "Exists" => Test::Exists,
            "DoesNotExist" => Test::DoesNotExist,
            "Gt" => number().map_or(Test::Never, |n| Test::Compare(n, true)),
            "Lt" => number().map_or(Test::Never, |n| Test::Compare(n, false)),
            _ => Test::Never,
        };
        Self { key: key.to_owned(), test }
    }

    fn matches(&self, value: Option<&str>) -> bool {
        match (&self.test, value) {
            (Test::In(values), Some(value)) => values.iter().any(|v| v == value),
            (Test::NotIn(values), Some(value)) => !values.iter().any(|v| v == value),
            (Test::Exists, Some(_)) | (Test::NotIn(_) | Test::DoesNotExist, None) => true,
            (Test::Compare(limit, greater), Some(value)) => {
                value.parse::<i64>().is_ok_and(|n| if *greater { n > *limit } else { n < *limit })
            }
            _ => false,
        }
    }
}

/// A selector over labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    /// An absent selector.
    Nothing,
    All(Vec<Match>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Match(Requirement);

impl Selector {
    pub fn compile(selector: Option<&LabelSelector>) -> Self {
        let Some(selector) = selector else { return Self::Nothing };
        let mut all = Vec::new();
        for (key, value) in selector.match_labels.iter().flatten() {
            all.push(Match(Requirement::new(key, "In", std::slice::from_ref(value))));
        }
        for r in selector.match_expressions.iter().flatten() {
            all.push(Match(Requirement::new(&r.key, &r.operator, r.values.as_deref().unwrap_or_default())));
        }
        Self::All(all)
    }

    /// Adds `key in (value)` (or `key notin (value)`).
    pub fn require(&mut self, key: &str, value: &str, positive: bool) {
        if let Self::All(all) = self {
            let operator = if positive { "In" } else { "NotIn" };
            all.push(Match(Requirement::new(key, operator, &[value.to_owned()])));
        }
    }

    pub fn matches(&self, labels: &Labels) -> bool {
        match self {
            Self::Nothing => false,
            Self::All(all) => all.iter().all(|m| m.0.matches(labels.get(&m.0.key).map(String::as_str))),
        }
    }
}

/// One term of a node selector: all of its requirements must hold. A term without any matches no node.
#[derive(Clone, Debug)]
pub struct NodeTerm {
    labels: Vec<Requirement>,
    fields: Vec<Requirement>,
}

impl NodeTerm {
    pub fn compile(term: &NodeSelectorTerm) -> Self {
        let compile = |list: &Option<Vec<NodeSelectorRequirement>>| {
            list.iter()
                .flatten()
                .map(|r| Requirement::new(&r.key, &r.operator, r.values.as_deref().unwrap_or_default()))
                .collect()
        };
        Self { labels: compile(&term.match_expressions), fields: compile(&term.match_fields) }
    }

    pub fn matches(&self, node: &Node) -> bool {
        if self.labels.is_empty() && self.fields.is_empty() {
            return false;
        }
        let labels = node.metadata.labels.as_ref();
        self.labels.iter().all(|r| r.matches(labels.and_then(|l| l.get(&r.key)).map(String::as_str)))
            && self.fields.iter().all(|r| r.key == "metadata.name" && r.matches(node.metadata.name.as_deref()))
    }
}

/// What nodes a pod accepts: every label of `nodeSelector`, and one of the terms of the required node affinity.
#[derive(Clone, Debug, Default)]
pub struct NodeRequirement {
    labels: Labels,
    terms: Option<Vec<NodeTerm>>,
}

impl NodeRequirement {
    pub fn compile(labels: Option<&Labels>, required: Option<&NodeSelector>) -> Self {
        Self {
            labels: labels.cloned().unwrap_or_default(),
            terms: required.map(|s| s.node_selector_terms.iter().map(NodeTerm::compile).collect()),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.terms.is_none()
    }

    pub fn matches(&self, node: &Node) -> bool {
        let own = node.metadata.labels.as_ref();
        self.labels.iter().all(|(key, value)| own.and_then(|l| l.get(key)) == Some(value))
            && self.terms.as_ref().is_none_or(|terms| terms.iter().any(|term| term.matches(node)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn label_selectors() {
        let selector: LabelSelector = serde_json::from_value(json!({
            "matchLabels": {"app": "a"},
            "matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["x"]}],
        }))
        .unwrap();
        let compiled = Selector::compile(Some(&selector));
        let labels =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<Labels>();
        assert!(compiled.matches(&labels(&[("app", "a")])));
        assert!(!compiled.matches(&labels(&[("app", "a"), ("tier", "x")])));
        assert!(!compiled.matches(&labels(&[])));
        assert!(Selector::compile(Some(&LabelSelector::default())).matches(&labels(&[])));
        assert!(!Selector::compile(None).matches(&labels(&[("app", "a")])));
    }

    #[test]
    fn node_terms() {
        let node: Node = serde_json::from_value(json!({"metadata": {"name": "n", "labels": {"cores": "8"}}})).unwrap();
        for (term, expected) in [
            (json!({"matchExpressions": [{"key": "cores", "operator": "Gt", "values": ["4"]}]}), true),
            (json!({"matchExpressions": [{"key": "cores", "operator": "Lt", "values": ["4"]}]}), false),
            (json!({"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n"]}]}), true),
            (json!({}), false),
        ] {
            let term: NodeSelectorTerm = serde_json::from_value(term).unwrap();
            assert_eq!(NodeTerm::compile(&term).matches(&node), expected, "{term:?}");
        }
    }
}
