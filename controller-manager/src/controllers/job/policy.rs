//! What a pod's failure means (pod failure policy) and when enough has succeeded (success policy).

use k8s_openapi::api::batch::v1::{JobSpec, PodFailurePolicyRule};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};

use super::indexes::Indexes;
use crate::common::{name, namespace, pods};

#[derive(Clone, Debug, PartialEq)]
pub enum Failure {
    /// Counts towards the limit.
    Count,
    /// Does not count; the pod is replaced.
    Ignore,
    /// Ends the pod's index.
    FailIndex,
    /// Ends the job, for this reason.
    FailJob(String),
}

/// Judges a failed pod by the first rule that matches.
pub fn judge(spec: &JobSpec, pod: &Pod) -> Failure {
    let rules = spec.pod_failure_policy.iter().flat_map(|policy| &policy.rules);
    for (index, rule) in rules.enumerate() {
        let Some(why) = matches(rule, pod) else { continue };
        return match rule.action.as_str() {
            "FailJob" => Failure::FailJob(format!("{why} matching FailJob rule at index {index}")),
            "Ignore" => Failure::Ignore,
            "FailIndex" => Failure::FailIndex,
            _ => Failure::Count,
        };
    }
    Failure::Count
}

fn matches(rule: &PodFailurePolicyRule, pod: &Pod) -> Option<String> {
    let key = format!("{}/{}", namespace(&pod.metadata), name(&pod.metadata));
    if let Some(codes) = &rule.on_exit_codes {
        let statuses = pod.status.iter().flat_map(|status| {
            status.init_container_statuses.iter().flatten().chain(status.container_statuses.iter().flatten())
        });
        for status in statuses.filter(|status| codes.container_name.as_ref().is_none_or(|name| *name == status.name)) {
            let Some(code) = exit_code(status).filter(|code| *code != 0) else { continue };
            if codes.values.contains(&code) == (codes.operator == "In") {
                return Some(format!("Container {} for pod {key} failed with exit code {code}", status.name));
            }
        }
        return None;
    }
    let pattern = rule.on_pod_conditions.iter().flatten().find(|pattern| {
        pods::condition(pod, &pattern.type_).is_some_and(|c| c.status == pattern.status.as_deref().unwrap_or("True"))
    })?;
    Some(format!("Pod {key} has condition {}", pattern.type_))
}

fn exit_code(status: &ContainerStatus) -> Option<i32> {
    Some(status.state.as_ref()?.terminated.as_ref()?.exit_code)
}

/// The message of the first rule of the success policy that is met.
pub fn success(spec: &JobSpec, completed: &Indexes) -> Option<String> {
    let rules = spec.success_policy.iter().flat_map(|policy| &policy.rules);
    for (index, rule) in rules.enumerate() {
        let wanted = rule.succeeded_indexes.as_deref().map(|text| Indexes::parse(text, spec.completions.unwrap_or(0)));
        let have = match &wanted {
            Some(wanted) => i32::try_from(wanted.0.intersection(&completed.0).count()).unwrap_or(i32::MAX),
            None => completed.len(),
        };
        let needed = rule.succeeded_count.or_else(|| wanted.as_ref().map(Indexes::len));
        if needed.is_some_and(|needed| needed > 0 && have >= needed) {
            return Some(format!("Matched rules at index {index}"));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn spec(extra: Value) -> JobSpec {
        let mut spec = json!({"completions": 5, "template": {}});
        for (key, value) in extra.as_object().unwrap() {
            spec[key] = value.clone();
        }
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn the_first_matching_rule_decides() {
        let spec = spec(json!({"podFailurePolicy": {"rules": [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [42], "containerName": "c"}},
            {"action": "FailIndex", "onExitCodes": {"operator": "NotIn", "values": [1, 42]}},
        ]}}));
        let pod = |code: i32, conditions: Value| -> Pod {
            serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "ns"}, "status": {"phase": "Failed", "conditions": conditions,
                "containerStatuses": [{"name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": {"terminated": {"exitCode": code}}}]}}))
            .unwrap()
        };
        let disrupted = json!([{"type": "DisruptionTarget", "status": "True"}]);
        assert_eq!(judge(&spec, &pod(42, disrupted)), Failure::Ignore);
        assert_eq!(
            judge(&spec, &pod(42, json!([]))),
            Failure::FailJob(
                "Container c for pod ns/p failed with exit code 42 matching FailJob rule at index 1".to_owned()
            )
        );
        assert_eq!(judge(&spec, &pod(7, json!([]))), Failure::FailIndex);
        assert_eq!(judge(&spec, &pod(1, json!([]))), Failure::Count);
    }

    #[test]
    fn success_by_indexes_and_counts() {
        let completed = Indexes::parse("0,2,3", 5);
        let met = |rule: Value| success(&spec(json!({"successPolicy": {"rules": [rule]}})), &completed).is_some();
        assert!(met(json!({"succeededIndexes": "2-3"})));
        assert!(!met(json!({"succeededIndexes": "1-2"})));
        assert!(met(json!({"succeededIndexes": "1-2", "succeededCount": 1})));
        assert!(met(json!({"succeededCount": 3})));
        assert!(!met(json!({"succeededCount": 4})));
    }
}
