//! Rules for jobs and cron jobs.

use apimachinery::meta::LabelSelector;
use apimachinery::meta::validation::is_dns1123_label;
use apimachinery::status::FieldError;
use serde_json::Value;

use super::networking::domain_prefixed_path;
use super::{
    Errors, Path, immutable, job_policies, label_selector, non_negative, one_of_given, pod, required, required_one_of,
};
use crate::registry::common::same;
use crate::registry::object::ObjectExt;
use crate::registry::tables::has_condition;

/// Pods at once, of jobs that number their pods.
const MAX_INDEXED_PARALLELISM: i64 = 100_000;
const MAX_FAILED_INDEXES: i64 = 100_000;
/// More completions than this put limits on other fields.
const MANY_COMPLETIONS: i64 = 100_000;
const LIMIT_OF_MANY: i64 = 10_000;
const MAX_MANAGED_BY: usize = 63;

pub fn job(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    generated_selector(obj, &mut errors);
    job_spec(&obj["spec"], Path::SPEC, &mut errors);
    selector(&obj["spec"], &mut errors);
    index_fits_name(obj, &mut errors);
    errors
}

/// A selector that the server makes is tied to the job's uid.
fn generated_selector(obj: &Value, errors: &mut Errors) {
    if obj["spec"]["manualSelector"] == true || obj["spec"]["selector"].is_null() {
        return;
    }
    let labels = &obj["spec"]["template"]["metadata"]["labels"];
    let path = Path::SPEC.field("template");
    let path = path.field("metadata");
    let expected = [
        ("controller-uid", obj.uid()),
        ("job-name", obj.name()),
        ("batch.kubernetes.io/controller-uid", obj.uid()),
        ("batch.kubernetes.io/job-name", obj.name()),
    ];
    for (key, wanted) in expected {
        let Some(actual) = labels[key].as_str() else {
            let detail = format!("must be '{wanted}'");
            errors.push(FieldError::required(path.field("labels").key(key), detail));
            continue;
        };
        if actual != wanted {
            let detail = format!("must be '{wanted}'");
            errors.push(FieldError::invalid(path.field("labels").key(key), labels.clone(), detail));
        }
    }
    let wanted = |key: &str| expected.iter().find(|(name, _)| *name == key).map(|(_, value)| *value);
    if LabelSelector::from_json(&obj["spec"]["selector"]).is_ok_and(|s| !s.matches(wanted)) {
        let detail = "`selector` not auto-generated";
        errors.push(FieldError::invalid("spec.selector", obj["spec"]["selector"].clone(), detail));
    }
}

fn selector(spec: &Value, errors: &mut Errors) {
    let path = Path::SPEC.field("selector");
    if spec["selector"].is_null() {
        errors.push(FieldError::required(path, ""));
    } else {
        label_selector(&spec["selector"], path, errors);
    }
    let labels = &spec["template"]["metadata"]["labels"];
    if LabelSelector::from_json(&spec["selector"]).is_ok_and(|s| !s.matches_value(labels)) {
        let detail = "`selector` does not match template `labels`";
        errors.push(FieldError::invalid("spec.template.metadata.labels", labels.clone(), detail));
    }
}

/// Pods of indexed jobs are named after the job and their number, which must be a DNS label.
fn index_fits_name(obj: &Value, errors: &mut Errors) {
    let completions = obj.i64_at(&["spec", "completions"]).unwrap_or(0);
    if obj["spec"]["completionMode"] == "Indexed" && completions > 0 {
        let hostname = format!("{}-{}", obj.name(), completions - 1);
        if !is_dns1123_label(&hostname).is_empty() {
            let detail = format!("will not able to create pod with invalid DNS label: {hostname}");
            errors.push(FieldError::invalid("metadata.name", obj.name(), detail));
        }
    }
}

/// What jobs and the job templates of cron jobs have in common.
fn job_spec(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let counts = [
        "parallelism",
        "completions",
        "activeDeadlineSeconds",
        "backoffLimit",
        "ttlSecondsAfterFinished",
        "backoffLimitPerIndex",
        "maxFailedIndexes",
    ];
    for field in counts {
        non_negative(spec, field, path, errors);
    }
    if !spec["maxFailedIndexes"].is_null() && spec["backoffLimitPerIndex"].is_null() {
        errors.push(FieldError::required(path.field("backoffLimitPerIndex"), "when maxFailedIndexes is specified"));
    }
    if let Some(manager) = spec["managedBy"].as_str() {
        managed_by(manager, path.field("managedBy"), errors);
    }
    one_of_given(spec, "completionMode", &["NonIndexed", "Indexed"], path, errors);
    let mode = spec["completionMode"].as_str().unwrap_or("NonIndexed");
    if mode == "Indexed" {
        indexed(spec, path, errors);
    }
    let by_number: &[&str] = match mode {
        "Indexed" => &[],
        "NonIndexed" => &["backoffLimitPerIndex", "maxFailedIndexes", "successPolicy"],
        _ => &["successPolicy"],
    };
    for field in by_number.iter().filter(|field| !spec[**field].is_null()) {
        let detail = "requires indexed completion mode";
        errors.push(FieldError::invalid(path.field(field), spec[*field].clone(), detail));
    }
    if !spec["podFailurePolicy"].is_null() {
        job_policies::failure(spec, path, errors);
    }
    if mode == "Indexed" && !spec["successPolicy"].is_null() {
        job_policies::success(spec, path, errors);
    }
    let replacements: &[&str] =
        if spec["podFailurePolicy"].is_null() { &["Failed", "TerminatingOrFailed"] } else { &["Failed"] };
    one_of_given(spec, "podReplacementPolicy", replacements, path, errors);
    pod::template_at(&spec["template"], path.field("template"), errors);
    restart_policy(spec, path, errors);
}

/// Who runs the job, when it is not the job controller.
fn managed_by(manager: &str, path: Path<'_>, errors: &mut Errors) {
    if manager.is_empty() {
        errors.push(FieldError::required(path, ""));
    } else {
        domain_prefixed_path(manager, path, errors);
    }
    if manager.len() > MAX_MANAGED_BY {
        errors.push(FieldError::too_long(path, MAX_MANAGED_BY));
    }
}

fn indexed(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let Some(completions) = spec["completions"].as_i64() else {
        errors.push(FieldError::required(path.field("completions"), "when completion mode is Indexed"));
        return;
    };
    if let Some(parallelism) = spec["parallelism"].as_i64().filter(|p| *p > MAX_INDEXED_PARALLELISM) {
        let detail = format!("must be less than or equal to {MAX_INDEXED_PARALLELISM} when completion mode is Indexed");
        errors.push(FieldError::invalid(path.field("parallelism"), parallelism, detail));
    }
    if let Some(failed) = spec["maxFailedIndexes"].as_i64().filter(|f| *f > completions) {
        let detail = "must be less than or equal to completions";
        errors.push(FieldError::invalid(path.field("maxFailedIndexes"), failed, detail));
    }
    if let Some(failed) = spec["maxFailedIndexes"].as_i64().filter(|f| *f > MAX_FAILED_INDEXES) {
        let detail = format!("must be less than or equal to {MAX_FAILED_INDEXES}");
        errors.push(FieldError::invalid(path.field("maxFailedIndexes"), failed, detail));
    }
    if completions > MANY_COMPLETIONS && !spec["backoffLimitPerIndex"].is_null() {
        many_indexes(spec, path, errors);
    }
}

/// Jobs with very many pods that each have a limit of their own keep their lists of indexes short.
fn many_indexes(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    if spec["maxFailedIndexes"].is_null() {
        let detail = format!("must be specified when completions is above {MANY_COMPLETIONS}");
        errors.push(FieldError::required(path.field("maxFailedIndexes"), detail));
    }
    for field in ["parallelism", "maxFailedIndexes"] {
        if let Some(count) = spec[field].as_i64().filter(|count| *count > LIMIT_OF_MANY) {
            let detail = format!(
                "must be less than or equal to {LIMIT_OF_MANY} when completions are above {MANY_COMPLETIONS} and used with backoff limit per index"
            );
            errors.push(FieldError::invalid(path.field(field), count, detail));
        }
    }
}

fn restart_policy(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let template = path.field("template");
    let pod = template.field("spec");
    let path = pod.field("restartPolicy");
    match spec["template"]["spec"].str_at(&["restartPolicy"]) {
        "" | "Always" => errors.push(FieldError::required(path, r#"valid values: "OnFailure", "Never""#)),
        "OnFailure" if !spec["podFailurePolicy"].is_null() => {
            let detail = r#"only "Never" is supported when podFailurePolicy is specified"#;
            errors.push(FieldError::invalid(path, "OnFailure", detail));
        }
        "OnFailure" | "Never" => {}
        other => errors.push(FieldError::not_supported(path, other, &["OnFailure", "Never"])),
    }
}

pub fn job_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    let (spec, stored) = (&obj["spec"], &old["spec"]);
    job_spec(spec, Path::SPEC, &mut errors);
    selector(spec, &mut errors);
    completions(spec, stored, &mut errors);
    immutable(spec, stored, "selector", Path::SPEC, &mut errors);
    template_unchanged(obj, old, &mut errors);
    let frozen = ["completionMode", "podFailurePolicy", "backoffLimitPerIndex", "managedBy", "successPolicy"];
    for field in frozen {
        immutable(spec, stored, field, Path::SPEC, &mut errors);
    }
    index_fits_name(obj, &mut errors);
    errors
}

/// Indexed jobs may grow and shrink as long as all their pods run at once.
fn completions(spec: &Value, stored: &Value, errors: &mut Errors) {
    let wanted = &spec["completions"];
    if wanted == &stored["completions"] {
        return;
    }
    if spec["completionMode"] != "Indexed" {
        errors.push(FieldError::invalid("spec.completions", wanted.clone(), super::IMMUTABLE));
    } else if !wanted.is_null() && wanted != &spec["parallelism"] {
        let detail = "can only be modified in tandem with spec.parallelism";
        errors.push(FieldError::invalid("spec.completions", wanted.clone(), detail));
    }
}

/// A suspended job without pods may still change where its pods will run and what they will use.
fn template_unchanged(obj: &Value, old: &Value, errors: &mut Errors) {
    let suspended = old["spec"]["suspend"] == true;
    let idle = old["status"]["startTime"].is_null() || has_condition(old, "Suspended");
    let mutable = suspended && idle && old["status"]["active"].as_i64().unwrap_or(0) == 0;
    let (template, stored) = (&obj["spec"]["template"], &old["spec"]["template"]);
    if !mutable {
        if !same(template, stored) {
            errors.push(FieldError::invalid("spec.template", template.clone(), super::IMMUTABLE));
        }
        return;
    }
    if !same(&fixed_part(&template["spec"]), &fixed_part(&stored["spec"])) {
        errors.push(FieldError::invalid("spec.template.spec", template["spec"].clone(), super::IMMUTABLE));
    }
}

/// A pod's spec without what a suspended job may change.
fn fixed_part(pod: &Value) -> Value {
    let mut pod = pod.clone();
    for field in ["nodeSelector", "tolerations", "schedulingGates"] {
        pod.remove_at(&[field]);
    }
    pod.remove_at(&["affinity", "nodeAffinity"]);
    for list in ["containers", "initContainers"] {
        for container in pod.list_at_mut(&[list]).into_iter().flatten() {
            container.remove_at(&["resources"]);
        }
    }
    pod
}

pub fn cron_job(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    if let Some(schedule) = required(spec, "schedule", Path::SPEC, &mut errors) {
        cron_schedule(schedule, &mut errors);
    }
    if let Some(zone) = spec["timeZone"].as_str() {
        time_zone(zone, &mut errors);
    }
    for field in ["startingDeadlineSeconds", "successfulJobsHistoryLimit", "failedJobsHistoryLimit"] {
        non_negative(spec, field, Path::SPEC, &mut errors);
    }
    required_one_of(spec, "concurrencyPolicy", &["Allow", "Forbid", "Replace"], Path::SPEC, &mut errors);
    let path = Path::SPEC.field("jobTemplate");
    let template = &spec["jobTemplate"]["spec"];
    job_spec(template, path.field("spec"), &mut errors);
    if !template["selector"].is_null() {
        let path = path.field("spec");
        let detail = "`selector` will be auto-generated";
        errors.push(FieldError::invalid(path.field("selector"), template["selector"].clone(), detail));
    }
    if template["manualSelector"] == true {
        let path = path.field("spec");
        errors.push(FieldError::not_supported(path.field("manualSelector"), true, &["nil", "false"]));
    }
    // The longest suffix that the controller adds to a name is eleven characters.
    if obj.name().len() > 52 {
        errors.push(FieldError::invalid("metadata.name", obj.name(), "must be no more than 52 characters"));
    }
    errors
}

fn time_zone(zone: &str, errors: &mut Errors) {
    const PATH: &str = "spec.timeZone";
    if zone.is_empty() {
        errors.push(FieldError::invalid(PATH, zone, "timeZone must be nil or non-empty string"));
    } else if zone.eq_ignore_ascii_case("local") {
        errors.push(FieldError::invalid(
            PATH,
            zone,
            "timeZone must be an explicit time zone as defined in https://www.iana.org/time-zones",
        ));
    } else if jiff::tz::TimeZone::get(zone).is_err() {
        errors.push(FieldError::invalid(PATH, zone, format!("unknown time zone {zone}")));
    }
}

/// Five fields, or one of the `@` words.
fn cron_schedule(schedule: &str, errors: &mut Errors) {
    const PATH: &str = "spec.schedule";
    if schedule.contains("TZ") {
        let detail = "cannot use TZ or CRON_TZ in schedule, use timeZone field instead";
        errors.push(FieldError::invalid(PATH, schedule, detail));
        return;
    }
    if let Err(problem) = cron::parse(schedule) {
        errors.push(FieldError::invalid(PATH, schedule, problem));
    }
}

/// Whether a text is a schedule, with the messages of the library that upstream uses.
mod cron {
    const DESCRIPTORS: [&str; 7] = ["@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly"];
    const MONTHS: &[&str] = &["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
    const DAYS: &[&str] = &["sun", "mon", "tue", "wed", "thu", "fri", "sat"];
    /// Lowest and highest value of each field, and names that stand for values.
    const FIELDS: [(u32, u32, &[&str]); 5] = [(0, 59, &[]), (0, 23, &[]), (1, 31, &[]), (1, 12, MONTHS), (0, 6, DAYS)];

    pub fn parse(schedule: &str) -> Result<(), String> {
        if schedule.starts_with('@') {
            let known = DESCRIPTORS.contains(&schedule) || schedule.strip_prefix("@every ").is_some_and(is_duration);
            return if known { Ok(()) } else { Err(format!("unrecognized descriptor: {schedule}")) };
        }
        let fields: Vec<&str> = schedule.split_whitespace().collect();
        if fields.len() != FIELDS.len() {
            return Err(format!("expected exactly 5 fields, found {}: [{}]", fields.len(), fields.join(" ")));
        }
        fields.iter().zip(FIELDS).try_for_each(|(text, field)| text.split(',').try_for_each(|part| range(part, field)))
    }

    fn is_duration(text: &str) -> bool {
        !text.is_empty() && text.ends_with(['h', 'm', 's']) && text.starts_with(|c: char| c.is_ascii_digit())
    }

    /// `*`, `5`, `1-5`, each with an optional `/step`.
    fn range(text: &str, (low, high, names): (u32, u32, &[&str])) -> Result<(), String> {
        let (span, step) = match text.split_once('/') {
            Some((span, step)) => (span, Some(step)),
            None => (text, None),
        };
        let value = |part: &str| match names.iter().position(|name| name.eq_ignore_ascii_case(part)) {
            Some(index) => Ok(index as u32 + low),
            None => part.parse::<u32>().map_err(|_| {
                format!("failed to parse int from {part}: strconv.Atoi: parsing {part:?}: invalid syntax")
            }),
        };
        let (start, end) = match span {
            "*" | "?" => (low, high),
            _ => match span.split_once('-') {
                Some((a, b)) => (value(a)?, value(b)?),
                None => (value(span)?, value(span)?),
            },
        };
        if step.map(value).transpose()? == Some(0) {
            return Err(format!("step of range should be a positive number: {text}"));
        }
        if start < low {
            return Err(format!("beginning of range ({start}) below minimum ({low}): {text}"));
        }
        if end > high {
            return Err(format!("end of range ({end}) above maximum ({high}): {text}"));
        }
        if start > end {
            return Err(format!("beginning of range ({start}) beyond end of range ({end}): {text}"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;
    use crate::registry::defaults;

    fn job_with(change: impl FnOnce(&mut Value)) -> Value {
        let mut obj = json!({"metadata": {"name": "pi", "uid": "u"}, "spec": {"template": {"spec": {
            "restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}}});
        change(&mut obj);
        defaults::batch::job(&mut obj);
        crate::registry::batch::job::generate_selector(&mut obj);
        obj
    }

    #[test]
    fn jobs_do_not_restart_for_ever() {
        assert_eq!(texts(&job(&job_with(|_| {}))), Vec::<String>::new());
        let always = job_with(|j| j["spec"]["template"]["spec"]["restartPolicy"] = "Always".into());
        let expected = [r#"spec.template.spec.restartPolicy: Required value: valid values: "OnFailure", "Never""#];
        assert_eq!(texts(&job(&always)), expected);
        let indexed = job_with(|j| {
            j["spec"]["completionMode"] = "Indexed".into();
            j["spec"]["parallelism"] = 2.into();
        });
        assert_eq!(texts(&job(&indexed)), ["spec.completions: Required value: when completion mode is Indexed"]);
    }

    #[test]
    fn templates_change_only_before_the_start() {
        let change = |j: &mut Value| j["spec"]["template"]["spec"]["nodeSelector"] = json!({"a": "b"});
        let old = job_with(|j| j["spec"]["suspend"] = true.into());
        let new = job_with(|j| {
            j["spec"]["suspend"] = true.into();
            change(j);
        });
        assert!(job_update(&new, &old).is_empty());
        assert_eq!(job_update(&job_with(change), &job_with(|_| {})).len(), 1);
    }

    #[test]
    fn schedules_are_parsed() {
        let good = ["* * * * *", "*/5 0-12 1,15 jan MON-FRI", "@hourly", "@every 1h30m", "0 0 31 12 6"];
        for schedule in good {
            assert_eq!(cron::parse(schedule), Ok(()), "{schedule}");
        }
        let bad = [
            ("* * * *", "expected exactly 5 fields, found 4: [* * * *]"),
            ("60 * * * *", "end of range (60) above maximum (59): 60"),
            ("5-1 * * * *", "beginning of range (5) beyond end of range (1): 5-1"),
            ("@never", "unrecognized descriptor: @never"),
            ("x * * * *", r#"failed to parse int from x: strconv.Atoi: parsing "x": invalid syntax"#),
        ];
        for (schedule, problem) in bad {
            assert_eq!(cron::parse(schedule), Err(problem.into()));
        }
    }
}
