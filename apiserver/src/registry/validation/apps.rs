//! Rules for the workload controllers.

use apimachinery::meta::LabelSelector;
use apimachinery::meta::validation::is_dns1123_label;
use apimachinery::status::FieldError;
use serde_json::Value;

use super::{
    Errors, Path, at_most_all, complain, each, immutable, int_or_percent, label_selector, non_negative, percent, pod,
    required_one_of, selects_all, storage,
};
use crate::registry::object::ObjectExt;

const MALFORMED: &str = "invalid label selector";

/// The selector is there, is well formed, selects something, and selects the template's pods. `malformed` is what is
/// said about the whole of one that is not.
fn selector_and_template(spec: &Value, empty: &str, malformed: &str, errors: &mut Errors) {
    let path = Path::SPEC.field("selector");
    if spec["selector"].is_null() {
        errors.push(FieldError::required(path, ""));
    } else {
        label_selector(&spec["selector"], path, errors);
        if selects_all(&spec["selector"]) {
            errors.push(FieldError::invalid(path, spec["selector"].clone(), empty));
        }
    }
    match LabelSelector::from_json(&spec["selector"]) {
        Ok(selector) => matches_template(&selector, spec, errors),
        Err(_) => errors.push(FieldError::invalid(path, spec["selector"].clone(), malformed)),
    }
}

/// The same for daemon sets, which are silent about a selector that is not there, and about the whole of a bad one.
fn daemon_set_selector(spec: &Value, errors: &mut Errors) {
    let path = Path::SPEC.field("selector");
    label_selector(&spec["selector"], path, errors);
    if let Ok(selector) = LabelSelector::from_json(&spec["selector"]) {
        matches_template(&selector, spec, errors);
    }
    if !spec["selector"].is_null() && selects_all(&spec["selector"]) {
        let detail = "empty selector is invalid for daemonset";
        errors.push(FieldError::invalid(path, spec["selector"].clone(), detail));
    }
}

fn matches_template(selector: &LabelSelector, spec: &Value, errors: &mut Errors) {
    let labels = &spec["template"]["metadata"]["labels"];
    if !selector.is_empty() && !selector.matches_value(labels) {
        let detail = "`selector` does not match template `labels`";
        errors.push(FieldError::invalid("spec.template.metadata.labels", labels.clone(), detail));
    }
}

/// Pods of controllers that keep a number of them alive restart for ever and have no deadline.
fn always_running(spec: &Value, kind: &str, errors: &mut Errors) {
    let pod = &spec["template"]["spec"];
    if pod["restartPolicy"] != "Always" {
        let policy = pod.str_at(&["restartPolicy"]);
        errors.push(FieldError::not_supported("spec.template.spec.restartPolicy", policy, &["Always"]));
    }
    if !pod["activeDeadlineSeconds"].is_null() {
        let detail = format!("activeDeadlineSeconds in {kind} is not Supported");
        errors.push(FieldError::forbidden("spec.template.spec.activeDeadlineSeconds", detail));
    }
}

fn template(spec: &Value, errors: &mut Errors) {
    pod::template_at(&spec["template"], Path::SPEC.field("template"), errors);
}

pub fn replication_controller(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    non_negative(spec, "minReadySeconds", Path::SPEC, &mut errors);
    if selects_nothing(&spec["selector"]) {
        errors.push(FieldError::required("spec.selector", ""));
    }
    non_negative(spec, "replicas", Path::SPEC, &mut errors);
    if spec["template"].is_null() {
        errors.push(FieldError::required("spec.template", ""));
        return errors;
    }
    matches_template(&LabelSelector::from_map(&spec["selector"]), spec, &mut errors);
    template(spec, &mut errors);
    always_running(spec, "ReplicationController", &mut errors);
    errors
}

fn selects_nothing(labels: &Value) -> bool {
    labels.as_object().is_none_or(serde_json::Map::is_empty)
}

pub fn replica_set(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    non_negative(spec, "replicas", Path::SPEC, &mut errors);
    non_negative(spec, "minReadySeconds", Path::SPEC, &mut errors);
    selector_and_template(spec, "empty selector is invalid for deployment", MALFORMED, &mut errors);
    template(spec, &mut errors);
    always_running(spec, "ReplicaSet", &mut errors);
    errors
}

pub fn replica_set_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = replica_set(obj);
    immutable(&obj["spec"], &old["spec"], "selector", Path::SPEC, &mut errors);
    errors
}

pub fn deployment(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    non_negative(spec, "replicas", Path::SPEC, &mut errors);
    selector_and_template(spec, "empty selector is invalid for deployment", MALFORMED, &mut errors);
    template(spec, &mut errors);
    always_running(spec, "ReplicaSet", &mut errors);
    deployment_strategy(&spec["strategy"], &mut errors);
    non_negative(spec, "minReadySeconds", Path::SPEC, &mut errors);
    non_negative(spec, "revisionHistoryLimit", Path::SPEC, &mut errors);
    if let Some(deadline) = spec["progressDeadlineSeconds"].as_i64() {
        non_negative(spec, "progressDeadlineSeconds", Path::SPEC, &mut errors);
        if deadline <= spec["minReadySeconds"].as_i64().unwrap_or(0) {
            let detail = "must be greater than minReadySeconds";
            errors.push(FieldError::invalid("spec.progressDeadlineSeconds", deadline, detail));
        }
    }
    errors
}

fn deployment_strategy(strategy: &Value, errors: &mut Errors) {
    let path = Path::SPEC.field("strategy");
    match strategy.str_at(&["type"]) {
        "Recreate" if !strategy["rollingUpdate"].is_null() => {
            let detail = "may not be specified when strategy `type` is 'Recreate'";
            errors.push(FieldError::forbidden(path.field("rollingUpdate"), detail));
        }
        "Recreate" => {}
        "RollingUpdate" => rolling_update(&strategy["rollingUpdate"], path.field("rollingUpdate"), errors),
        _ => errors.push(FieldError::not_supported(path, strategy.clone(), &["Recreate", "RollingUpdate"])),
    }
}

/// `maxUnavailable` and `maxSurge` of deployments.
fn rolling_update(rolling: &Value, path: Path<'_>, errors: &mut Errors) {
    let (unavailable, surge) = (&rolling["maxUnavailable"], &rolling["maxSurge"]);
    int_or_percent(unavailable, path.field("maxUnavailable"), errors);
    int_or_percent(surge, path.field("maxSurge"), errors);
    let amount = |value: &Value| percent(value).or(value.as_i64()).unwrap_or(0);
    if amount(unavailable) == 0 && amount(surge) == 0 {
        let detail = "may not be 0 when `maxSurge` is 0";
        errors.push(FieldError::invalid(path.field("maxUnavailable"), unavailable.clone(), detail));
    }
    at_most_all(unavailable, path.field("maxUnavailable"), errors);
}

pub fn deployment_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = deployment(obj);
    immutable(&obj["spec"], &old["spec"], "selector", Path::SPEC, &mut errors);
    errors
}

pub fn daemon_set(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    daemon_set_selector(spec, &mut errors);
    template(spec, &mut errors);
    let pod = &spec["template"]["spec"];
    if pod["restartPolicy"] != "Always" {
        let policy = pod.str_at(&["restartPolicy"]);
        errors.push(FieldError::not_supported("spec.template.spec.restartPolicy", policy, &["Always"]));
    }
    if !pod["activeDeadlineSeconds"].is_null() {
        let detail = "activeDeadlineSeconds in DaemonSet is not Supported";
        errors.push(FieldError::forbidden("spec.template.spec.activeDeadlineSeconds", detail));
    }
    non_negative(spec, "minReadySeconds", Path::SPEC, &mut errors);
    daemon_set_strategy(&spec["updateStrategy"], &mut errors);
    non_negative(spec, "revisionHistoryLimit", Path::SPEC, &mut errors);
    errors
}

fn daemon_set_strategy(strategy: &Value, errors: &mut Errors) {
    let path = Path::SPEC.field("updateStrategy");
    match strategy.str_at(&["type"]) {
        "OnDelete" => {}
        "RollingUpdate" => {
            let path = path.field("rollingUpdate");
            let rolling = &strategy["rollingUpdate"];
            if rolling.is_null() {
                errors.push(FieldError::required(path, ""));
                return;
            }
            let zero = |value: &Value| percent(value).or(value.as_i64()).unwrap_or(0) == 0;
            let (unavailable, surge) = (&rolling["maxUnavailable"], &rolling["maxSurge"]);
            int_or_percent(unavailable, path.field("maxUnavailable"), errors);
            int_or_percent(surge, path.field("maxSurge"), errors);
            if !zero(unavailable) && !zero(surge) {
                let detail = "may not be set when maxUnavailable is non-zero";
                errors.push(FieldError::invalid(path.field("maxSurge"), surge.clone(), detail));
            }
            if zero(unavailable) && zero(surge) {
                let detail = "cannot be 0 when maxSurge is 0";
                errors.push(FieldError::required(path.field("maxUnavailable"), detail));
            }
            at_most_all(unavailable, path.field("maxUnavailable"), errors);
            at_most_all(surge, path.field("maxSurge"), errors);
        }
        _ => errors.push(FieldError::not_supported(path, strategy.clone(), &["RollingUpdate", "OnDelete"])),
    }
}

pub fn daemon_set_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = daemon_set(obj);
    immutable(&obj["spec"], &old["spec"], "selector", Path::SPEC, &mut errors);
    errors
}

pub fn stateful_set(obj: &Value) -> Errors {
    let mut errors = stateful_set_spec(obj);
    let spec = &obj["spec"];
    each(spec, "volumeClaimTemplates", Path::SPEC, &mut errors, |claim, path, errors| {
        storage::claim_spec(&claim["spec"], false, path.field("spec"), errors);
    });
    let service = spec.str_at(&["serviceName"]);
    if !service.is_empty() {
        complain(is_dns1123_label(service), service, Path::SPEC.field("serviceName"), &mut errors);
    }
    errors
}

/// What holds for changed sets, too: the rest cannot be changed, so that old sets may break it.
fn stateful_set_spec(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    let policy = spec.str_at(&["podManagementPolicy"]);
    match policy {
        "" => errors.push(FieldError::required("spec.podManagementPolicy", "")),
        "OrderedReady" | "Parallel" => {}
        other => {
            let detail = "must be 'OrderedReady' or 'Parallel'";
            errors.push(FieldError::invalid("spec.podManagementPolicy", other, detail));
        }
    }
    stateful_set_strategy(&spec["updateStrategy"], &mut errors);
    let path = Path::SPEC.field("persistentVolumeClaimRetentionPolicy");
    for field in ["whenDeleted", "whenScaled"] {
        required_one_of(&spec["persistentVolumeClaimRetentionPolicy"], field, &["Retain", "Delete"], path, &mut errors);
    }
    non_negative(spec, "replicas", Path::SPEC, &mut errors);
    non_negative(spec, "minReadySeconds", Path::SPEC, &mut errors);
    non_negative(&spec["ordinals"], "start", Path::SPEC.field("ordinals"), &mut errors);
    selector_and_template(spec, "empty selector is invalid for statefulset", "", &mut errors);
    let volumes = with_claims_as_volumes(spec);
    template(&volumes, &mut errors);
    always_running(spec, "StatefulSet", &mut errors);
    errors
}

/// The template as its pods will be: with a volume for every claim, and without names that the controller sets.
fn with_claims_as_volumes(spec: &Value) -> Value {
    let mut spec = spec.clone();
    let mut names: Vec<Value> = Vec::new();
    for claim in spec.list_at(&["volumeClaimTemplates"]) {
        let name = &claim["metadata"]["name"];
        if !names.contains(name) {
            names.push(name.clone());
        }
    }
    let mut volumes: Vec<Value> = names
        .iter()
        .map(|name| serde_json::json!({"name": name, "persistentVolumeClaim": {"claimName": name}}))
        .collect();
    let own = spec.list_at(&["template", "spec", "volumes"]).iter().filter(|volume| !names.contains(&volume["name"]));
    volumes.extend(own.cloned());
    if spec["template"]["spec"].is_object() {
        for field in ["hostname", "subdomain"] {
            spec.remove_at(&["template", "spec", field]);
        }
        spec.set(&["template", "spec", "volumes"], volumes);
    }
    spec
}

fn stateful_set_strategy(strategy: &Value, errors: &mut Errors) {
    let path = Path::SPEC.field("updateStrategy");
    match strategy.str_at(&["type"]) {
        "" => errors.push(FieldError::required(path, "")),
        "OnDelete" => {
            if !strategy["rollingUpdate"].is_null() {
                let detail = "only allowed for updateStrategy 'RollingUpdate'";
                let value = strategy["rollingUpdate"].clone();
                errors.push(FieldError::invalid(path.field("rollingUpdate"), value, detail));
            }
        }
        "RollingUpdate" => {
            let rolling = &strategy["rollingUpdate"];
            let path = path.field("rollingUpdate");
            non_negative(rolling, "partition", path, errors);
            let unavailable = &rolling["maxUnavailable"];
            if !unavailable.is_null() {
                let path = path.field("maxUnavailable");
                int_or_percent(unavailable, path, errors);
                if percent(unavailable).or(unavailable.as_i64()).unwrap_or(0) == 0 {
                    errors.push(FieldError::invalid(path, unavailable.clone(), "cannot be 0"));
                }
                at_most_all(unavailable, path, errors);
            }
        }
        _ => {
            let detail = "must be 'RollingUpdate' or 'OnDelete'";
            errors.push(FieldError::invalid(path, strategy.clone(), detail));
        }
    }
}

pub fn stateful_set_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = stateful_set_spec(obj);
    for field in ["selector", "volumeClaimTemplates", "serviceName", "podManagementPolicy"] {
        immutable(&obj["spec"], &old["spec"], field, Path::SPEC, &mut errors);
    }
    errors
}

/// The counts in a status, and those of them that cannot be more than `replicas`.
struct Counts {
    all: &'static [&'static str],
    parts: &'static [&'static str],
    /// What more available than ready pods are said to be.
    ready: &'static str,
}

const DEPLOYMENT_COUNTS: Counts = Counts {
    all: &[
        "observedGeneration",
        "replicas",
        "updatedReplicas",
        "readyReplicas",
        "availableReplicas",
        "unavailableReplicas",
        "terminatingReplicas",
        "collisionCount",
    ],
    parts: &["updatedReplicas", "readyReplicas", "availableReplicas"],
    ready: "cannot be greater than readyReplicas",
};

const REPLICA_SET_COUNTS: Counts = Counts {
    all: &[
        "replicas",
        "fullyLabeledReplicas",
        "readyReplicas",
        "availableReplicas",
        "observedGeneration",
        "terminatingReplicas",
    ],
    parts: &["fullyLabeledReplicas", "readyReplicas", "availableReplicas"],
    ready: "cannot be greater than readyReplicas",
};

const STATEFUL_SET_COUNTS: Counts = Counts {
    all: &[
        "replicas",
        "readyReplicas",
        "currentReplicas",
        "updatedReplicas",
        "availableReplicas",
        "observedGeneration",
        "collisionCount",
    ],
    parts: &["readyReplicas", "currentReplicas", "updatedReplicas", "availableReplicas"],
    ready: "cannot be greater than status.readyReplicas",
};

const DAEMON_SET_COUNTS: Counts = Counts {
    all: &[
        "currentNumberScheduled",
        "numberMisscheduled",
        "desiredNumberScheduled",
        "numberReady",
        "observedGeneration",
        "updatedNumberScheduled",
        "numberAvailable",
        "numberUnavailable",
        "collisionCount",
    ],
    parts: &[],
    ready: "",
};

pub fn deployment_status(obj: &Value, old: &Value) -> Errors {
    counts(&DEPLOYMENT_COUNTS, obj, old)
}

/// Replication controllers have the same counts.
pub fn replica_set_status(obj: &Value, old: &Value) -> Errors {
    counts(&REPLICA_SET_COUNTS, obj, old)
}

pub fn stateful_set_status(obj: &Value, old: &Value) -> Errors {
    counts(&STATEFUL_SET_COUNTS, obj, old)
}

pub fn daemon_set_status(obj: &Value, old: &Value) -> Errors {
    counts(&DAEMON_SET_COUNTS, obj, old)
}

fn counts(counts: &Counts, obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    let status = &obj["status"];
    let count = |field: &str| status[field].as_i64().unwrap_or(0);
    for field in counts.all {
        non_negative(status, field, Path::STATUS, &mut errors);
    }
    for field in counts.parts.iter().filter(|field| count(field) > count("replicas")) {
        let detail = "cannot be greater than status.replicas";
        errors.push(FieldError::invalid(Path::STATUS.field(field), count(field), detail));
    }
    if counts.parts.contains(&"availableReplicas") && count("availableReplicas") > count("readyReplicas") {
        errors.push(FieldError::invalid("status.availableReplicas", count("availableReplicas"), counts.ready));
    }
    if count("collisionCount") < old["status"]["collisionCount"].as_i64().unwrap_or(0) {
        errors.push(FieldError::invalid("status.collisionCount", count("collisionCount"), "cannot be decremented"));
    }
    errors
}

pub fn controller_revision(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    revision(obj, &mut errors);
    match &obj["data"] {
        Value::Null => errors.push(FieldError::required("data", "data is mandatory")),
        Value::Object(_) => {}
        _ => errors.push(FieldError::required("data", "data must be a valid JSON object")),
    }
    errors
}

fn revision(obj: &Value, errors: &mut Errors) {
    if let Some(revision) = obj["revision"].as_i64().filter(|revision| *revision < 0) {
        errors.push(FieldError::invalid("revision", revision, super::IS_NEGATIVE));
    }
}

pub fn controller_revision_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    revision(obj, &mut errors);
    if obj["data"] != old["data"] {
        errors.push(FieldError::invalid("data", obj["data"].clone(), super::IMMUTABLE));
    }
    errors
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;
    use crate::registry::defaults;

    fn deployment_with(change: impl FnOnce(&mut Value)) -> Value {
        let mut obj = json!({"spec": {
            "selector": {"matchLabels": {"app": "a"}},
            "template": {"metadata": {"labels": {"app": "a"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}}});
        change(&mut obj);
        defaults::apps::deployment(&mut obj);
        obj
    }

    #[test]
    fn deployments_select_their_own_pods() {
        let cases = [
            (deployment_with(|_| {}), vec![]),
            (
                deployment_with(|d| d["spec"]["selector"]["matchLabels"]["app"] = "b".into()),
                vec![
                    r#"spec.template.metadata.labels: Invalid value: {"app":"a"}: `selector` does not match template `labels`"#,
                ],
            ),
            (
                deployment_with(|d| d["spec"]["replicas"] = (-1).into()),
                vec!["spec.replicas: Invalid value: -1: must be greater than or equal to 0"],
            ),
            (
                deployment_with(|d| d["spec"]["template"]["spec"]["restartPolicy"] = "Never".into()),
                vec![r#"spec.template.spec.restartPolicy: Unsupported value: "Never": supported values: "Always""#],
            ),
            (
                deployment_with(|d| {
                    d["spec"]["strategy"] = json!({"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}})
                }),
                vec!["spec.strategy.rollingUpdate.maxUnavailable: Invalid value: 0: may not be 0 when `maxSurge` is 0"],
            ),
        ];
        for (obj, expected) in cases {
            assert_eq!(texts(&deployment(&obj)), expected);
        }
    }

    #[test]
    fn selectors_do_not_change() {
        let old = deployment_with(|_| {});
        let new = deployment_with(|d| {
            d["spec"]["selector"]["matchLabels"] = json!({"b": "c"});
            d["spec"]["template"]["metadata"]["labels"] = json!({"b": "c"});
        });
        let expected = [r#"spec.selector: Invalid value: {"matchLabels":{"b":"c"}}: field is immutable"#];
        assert_eq!(texts(&deployment_update(&new, &old)), expected);
    }

    #[test]
    fn statuses_add_up() {
        let obj = json!({"status": {"replicas": 1, "readyReplicas": 2}});
        let expected = ["status.readyReplicas: Invalid value: 2: cannot be greater than status.replicas"];
        for rules in [deployment_status, replica_set_status, stateful_set_status] {
            assert_eq!(texts(&rules(&obj, &json!({}))), expected);
        }
        let old = json!({"status": {"collisionCount": 2}});
        let expected = ["status.collisionCount: Invalid value: 1: cannot be decremented"];
        assert_eq!(texts(&daemon_set_status(&json!({"status": {"collisionCount": 1}}), &old)), expected);
    }
}
