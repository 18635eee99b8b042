//! Rules for the policies of jobs: what happens when pods fail, and when a job has succeeded.

use apimachinery::meta::validation::is_qualified_name;
use apimachinery::status::FieldError;
use serde_json::Value;

use super::{Errors, Path, complain, non_negative, one_of};
use crate::registry::object::ObjectExt;

const MAX_RULES: usize = 20;
const MAX_EXIT_CODES: usize = 255;
const MAX_CONDITIONS: usize = 20;
const MAX_INDEXES: usize = 64 * 1024;
const ACTIONS: [&str; 4] = ["Count", "FailIndex", "FailJob", "Ignore"];
const OPERATORS: [&str; 2] = ["In", "NotIn"];
const STATUSES: [&str; 3] = ["False", "True", "Unknown"];

/// A text that must be one of these, which are listed when it is missing, too.
fn needed(obj: &Value, field: &str, allowed: &[&str], path: Path<'_>, errors: &mut Errors) {
    if obj.str_at(&[field]).is_empty() {
        let quoted: Vec<String> = allowed.iter().map(|value| format!("{value:?}")).collect();
        errors.push(FieldError::required(path.field(field), format!("valid values: [{}]", quoted.join(" "))));
    } else {
        one_of(obj, field, allowed, path, errors);
    }
}

fn at_most(count: usize, limit: usize, path: Path<'_>, errors: &mut Errors) {
    if count > limit {
        errors.push(FieldError::too_many(path, count, limit));
    }
}

/// `podFailurePolicy` of the job spec at `path`.
pub fn failure(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let path = path.field("podFailurePolicy");
    let rules = path.field("rules");
    at_most(spec.list_at(&["podFailurePolicy", "rules"]).len(), MAX_RULES, rules, errors);
    let pod = &spec["template"]["spec"];
    let containers: Vec<&str> = ["containers", "initContainers"]
        .iter()
        .flat_map(|list| pod.list_at(&[*list]))
        .map(|container| container.str_at(&["name"]))
        .collect();
    super::each(&spec["podFailurePolicy"], "rules", path, errors, |rule, path, errors| {
        if rule["action"] == "FailIndex" {
            if spec["backoffLimitPerIndex"].is_null() {
                let detail = "requires the backoffLimitPerIndex to be set";
                errors.push(FieldError::invalid(path.field("action"), "FailIndex", detail));
            }
        } else {
            needed(rule, "action", &ACTIONS, path, errors);
        }
        let (codes, conditions) = (&rule["onExitCodes"], rule.list_at(&["onPodConditions"]));
        if codes.is_object() {
            exit_codes(codes, &containers, path.field("onExitCodes"), errors);
        }
        pod_conditions(conditions, path.field("onPodConditions"), errors);
        if codes.is_object() && !conditions.is_empty() {
            let detail = "specifying both OnExitCodes and OnPodConditions is not supported";
            errors.push(FieldError::invalid_omitted(path, detail));
        } else if codes.is_null() && conditions.is_empty() {
            let detail = "specifying one of OnExitCodes and OnPodConditions is required";
            errors.push(FieldError::invalid_omitted(path, detail));
        }
    });
}

fn exit_codes(codes: &Value, containers: &[&str], path: Path<'_>, errors: &mut Errors) {
    needed(codes, "operator", &OPERATORS, path, errors);
    if let Some(name) = codes["containerName"].as_str().filter(|name| !containers.contains(name)) {
        let detail = "must be one of the container or initContainer names in the pod template";
        errors.push(FieldError::invalid(path.field("containerName"), name, detail));
    }
    let path = path.field("values");
    let values: Vec<i64> = codes.list_at(&["values"]).iter().filter_map(Value::as_i64).collect();
    if values.is_empty() {
        errors.push(FieldError::invalid(path, codes["values"].clone(), "at least one value is required"));
    }
    at_most(values.len(), MAX_EXIT_CODES, path, errors);
    for (index, value) in values.iter().enumerate() {
        if codes["operator"] == "In" && *value == 0 {
            errors.push(FieldError::invalid(path.index(index), 0, "must not be 0 for the In operator"));
        }
        if values[..index].contains(value) {
            errors.push(FieldError::duplicate(path.index(index), *value));
        }
    }
    if !values.is_sorted() {
        errors.push(FieldError::invalid(path, codes["values"].clone(), "must be ordered"));
    }
}

fn pod_conditions(conditions: &[Value], path: Path<'_>, errors: &mut Errors) {
    at_most(conditions.len(), MAX_CONDITIONS, path, errors);
    for (index, pattern) in conditions.iter().enumerate() {
        let path = path.index(index);
        let kind = pattern.str_at(&["type"]);
        complain(is_qualified_name(kind), kind, path.field("type"), errors);
        needed(pattern, "status", &STATUSES, path, errors);
    }
}

/// `successPolicy` of the job spec at `path`, which numbers its pods.
pub fn success(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let path = path.field("successPolicy");
    let rules = spec.list_at(&["successPolicy", "rules"]);
    if rules.is_empty() {
        let detail = "at least one rules must be specified when the successPolicy is specified";
        errors.push(FieldError::required(path.field("rules"), detail));
    }
    at_most(rules.len(), MAX_RULES, path.field("rules"), errors);
    let Some(completions) = spec["completions"].as_i64() else { return };
    super::each(&spec["successPolicy"], "rules", path, errors, |rule, path, errors| {
        success_rule(rule, completions, path, errors);
    });
}

fn success_rule(rule: &Value, completions: i64, path: Path<'_>, errors: &mut Errors) {
    let indexes = rule["succeededIndexes"].as_str();
    if indexes.is_none() && rule["succeededCount"].is_null() {
        let detail = "at least one of succeededCount or succeededIndexes must be specified";
        errors.push(FieldError::required(path, detail));
    }
    let listed = indexes.map(|text| {
        let path = path.field("succeededIndexes");
        if text.len() > MAX_INDEXES {
            errors.push(FieldError::too_long(path, MAX_INDEXES));
        }
        count_indexes(text, completions).unwrap_or_else(|problem| {
            errors.push(FieldError::invalid(path, text, format!("error parsing succeededIndexes: {problem}")));
            0
        })
    });
    let Some(count) = rule["succeededCount"].as_i64() else { return };
    non_negative(rule, "succeededCount", path, errors);
    let path = path.field("succeededCount");
    if count > completions {
        let detail = format!("must be less than or equal to {completions} (the number of specified completions)");
        errors.push(FieldError::invalid(path, count, detail));
    }
    if let Some(listed) = listed.filter(|listed| count > *listed) {
        let detail = format!(
            "must be less than or equal to {listed} (the number of indexes in the specified succeededIndexes field)"
        );
        errors.push(FieldError::invalid(path, count, detail));
    }
}

/// How many indexes a text such as `1,3-5` lists, in rising order and below `completions`.
pub fn count_indexes(text: &str, completions: i64) -> Result<i64, String> {
    let mut total = 0;
    let mut last = None;
    for interval in text.split(',').filter(|_| !text.is_empty()) {
        let (first, end) = interval_of(interval, completions)?;
        if let Some(last) = last.filter(|last| *last >= first) {
            return Err(format!("non-increasing order, previous: {last}, current: {first}"));
        }
        total += end - first + 1;
        last = Some(end);
    }
    Ok(total)
}

/// `3-5`, or `4` for the interval that is one index.
fn interval_of(text: &str, completions: i64) -> Result<(i64, i64), String> {
    let limits: Vec<&str> = text.split('-').collect();
    if limits.len() > 2 {
        return Err(format!(
            "the fragment {text:?} violates the requirement that an index interval can have at most two parts separated by '-'"
        ));
    }
    let index = |text: &str| {
        let index: i64 = text.parse().map_err(|_| format!("cannot convert string to integer for index: {text:?}"))?;
        if index >= completions { Err(format!("too large index: {text:?}")) } else { Ok(index) }
    };
    let first = index(limits[0])?;
    let Some(end) = limits.get(1).map(|text| index(text)).transpose()? else { return Ok((first, first)) };
    if first >= end {
        return Err(format!("non-increasing order, previous: {first}, current: {end}"));
    }
    Ok((first, end))
}

/// An index that both texts list. Intervals that cannot be read are passed over.
pub fn overlap(a: &str, b: &str, completions: i64) -> Option<i64> {
    let intervals = |text: &str| -> Vec<(i64, i64)> {
        text.split(',').filter_map(|interval| interval_of(interval, completions).ok()).collect()
    };
    let (a, b) = (intervals(a), intervals(b));
    a.iter()
        .flat_map(|x| b.iter().map(move |y| (x.0.max(y.0), x.1.min(y.1))))
        .find(|(from, to)| from <= to)
        .map(|(from, _)| from)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    #[test]
    fn failure_policies_name_containers_and_ordered_codes() {
        let spec = |rule: Value| json!({"template": {"spec": {"containers": [{"name": "a"}]}}, "podFailurePolicy": {"rules": [rule]}});
        let cases = [
            (
                json!({"action": "FailJob", "onExitCodes": {"containerName": "a", "operator": "In", "values": [1, 2]}}),
                vec![],
            ),
            (
                json!({"action": "FailJob"}),
                vec![
                    "spec.podFailurePolicy.rules[0]: Invalid value: specifying one of OnExitCodes and OnPodConditions is required",
                ],
            ),
            (
                json!({"action": "FailJob", "onExitCodes": {"containerName": "b", "operator": "In", "values": [2, 0]}}),
                vec![
                    r#"spec.podFailurePolicy.rules[0].onExitCodes.containerName: Invalid value: "b": must be one of the container or initContainer names in the pod template"#,
                    "spec.podFailurePolicy.rules[0].onExitCodes.values[1]: Invalid value: 0: must not be 0 for the In operator",
                    "spec.podFailurePolicy.rules[0].onExitCodes.values: Invalid value: [2,0]: must be ordered",
                ],
            ),
            (
                json!({"onPodConditions": [{"type": "T", "status": "Maybe"}]}),
                vec![
                    r#"spec.podFailurePolicy.rules[0].action: Required value: valid values: ["Count" "FailIndex" "FailJob" "Ignore"]"#,
                    r#"spec.podFailurePolicy.rules[0].onPodConditions[0].status: Unsupported value: "Maybe": supported values: "False", "True", "Unknown""#,
                ],
            ),
        ];
        for (rule, expected) in cases {
            let mut errors = Errors::new();
            failure(&spec(rule), Path::SPEC, &mut errors);
            assert_eq!(texts(&errors), expected);
        }
    }

    #[test]
    fn indexes_are_counted_and_compared() {
        let cases = [
            ("", Ok(0)),
            ("1,3-5", Ok(4)),
            ("5-1", Err("non-increasing order, previous: 5, current: 1")),
            ("1,1", Err("non-increasing order, previous: 1, current: 1")),
            ("1x", Err(r#"cannot convert string to integer for index: "1x""#)),
            ("12", Err(r#"too large index: "12""#)),
        ];
        for (text, expected) in cases {
            assert_eq!(count_indexes(text, 10), expected.map_err(String::from), "{text}");
        }
        assert_eq!(overlap("1-3", "5,2", 10), Some(2));
        assert_eq!(overlap("1-3", "5", 10), None);
    }
}
