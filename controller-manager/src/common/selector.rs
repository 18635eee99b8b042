//! Label selectors as controllers use them: parsed once, matching nothing when they are not valid.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::core::{Selector as Expressions, SelectorExt};

/// A selector that matches labels, everything, or nothing.
#[derive(Clone, Debug)]
pub enum Selector {
    Nothing,
    Everything,
    Expressions(Expressions),
}

impl Selector {
    /// A null selector matches nothing, an empty one everything; one that is not valid nothing.
    pub fn of(selector: Option<&LabelSelector>) -> Self {
        let Some(selector) = selector else { return Self::Nothing };
        let empty = selector.match_labels.as_ref().is_none_or(BTreeMap::is_empty)
            && selector.match_expressions.as_ref().is_none_or(Vec::is_empty);
        if empty {
            return Self::Everything;
        }
        Expressions::try_from(selector.clone()).map_or(Self::Nothing, Self::Expressions)
    }

    /// The selector of services and replication controllers: an empty one matches nothing.
    pub fn of_map(selector: Option<&BTreeMap<String, String>>) -> Self {
        match selector {
            Some(map) if !map.is_empty() => Self::Expressions(map.clone().into_iter().collect()),
            _ => Self::Nothing,
        }
    }

    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        match self {
            Self::Nothing => false,
            Self::Everything => true,
            Self::Expressions(expressions) => expressions.matches(labels),
        }
    }

    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Everything)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_selectors_match() {
        let labels = BTreeMap::from([("app".to_owned(), "web".to_owned())]);
        let cases = [
            (json!({}), true),
            (json!({"matchLabels": {"app": "web"}}), true),
            (json!({"matchLabels": {"app": "db"}}), false),
            (json!({"matchExpressions": [{"key": "app", "operator": "In", "values": ["web", "db"]}]}), true),
            (json!({"matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["web"]}]}), true),
            (json!({"matchExpressions": [{"key": "tier", "operator": "Exists"}]}), false),
            (json!({"matchExpressions": [{"key": "tier", "operator": "Bogus"}]}), false),
        ];
        for (selector, expected) in cases {
            let parsed: LabelSelector = serde_json::from_value(selector.clone()).unwrap();
            assert_eq!(Selector::of(Some(&parsed)).matches(&labels), expected, "{selector}");
        }
        assert!(!Selector::of(None).matches(&labels));
        assert!(!Selector::of_map(Some(&BTreeMap::new())).matches(&labels));
    }
}
