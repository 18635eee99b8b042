//! Starts jobs on schedules, with rules for overlapping and for late starts, and keeps a history of ended ones.

use std::sync::Arc;

use apimachinery::controller::{
    Controller, EventType, Informer, ObjectKey, Plan, Propagation, Report, Write, object_reference,
};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::ObjectMeta;

use super::job::{condition, finished_at};
use crate::app::Context;
use crate::common::schedule::Schedule;
use crate::common::{controller_reference, elapsed, is_deleted, name, namespace, uid};

const SCHEDULED_AT: &str = "batch.kubernetes.io/cronjob-scheduled-timestamp";
/// More missed starts than this are not counted: a clock has jumped, or nobody was there for long.
const COUNTED: usize = 100;

struct CronJobController {
    cron_jobs: Arc<Informer<CronJob>>,
    jobs: Arc<Informer<Job>>,
}

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let controller = CronJobController { cron_jobs: informers.of(), jobs: informers.of() };
    context.driver.run(controller, 5, |controller, wiring| {
        wiring.primary(&controller.cron_jobs);
        wiring.owned::<Job, CronJob>(&controller.jobs);
    });
}

impl Controller for CronJobController {
    fn name(&self) -> &'static str {
        "cronjob"
    }

    fn component(&self) -> &'static str {
        "cronjob-controller"
    }

    fn reconcile(&self, key: &ObjectKey, now: Timestamp) -> Plan {
        let Some(cron_job) = self.cron_jobs.get(key).filter(|cron_job| !is_deleted(&cron_job.metadata)) else {
            return Plan::nothing();
        };
        let jobs = self.jobs.owned_by(uid(&cron_job.metadata));
        let mut next = cron_job.as_ref().clone();
        let mut plan = Plan::nothing();
        note_jobs(&cron_job, &mut next, &jobs, &mut plan);
        self.schedule(&cron_job, &mut next, &jobs, now, &mut plan);
        plan.writes.extend(history(&cron_job, &jobs));
        plan.writes.extend(Write::status(cron_job.as_ref(), &next));
        plan
    }
}

impl CronJobController {
    fn schedule(&self, cron_job: &CronJob, next: &mut CronJob, jobs: &[Arc<Job>], now: Timestamp, plan: &mut Plan) {
        let spec = &cron_job.spec;
        if spec.suspend == Some(true) {
            return;
        }
        let on = object_reference(cron_job);
        let Ok(schedule) = Schedule::parse(&spec.schedule) else {
            let message = format!("unparseable schedule: {:?}", spec.schedule);
            plan.event(on, EventType::Warning, "UnparseableSchedule", message);
            return;
        };
        let zone = match spec.time_zone.as_deref().map(TimeZone::get) {
            None => TimeZone::UTC,
            Some(Ok(zone)) => zone,
            Some(Err(error)) => {
                let message = format!("invalid timeZone: {:?}: {error}", spec.time_zone.as_deref().unwrap_or(""));
                plan.event(on, EventType::Warning, "UnknownTimeZone", message);
                return;
            }
        };
        if let Some(upcoming) = schedule.next(now, &zone) {
            // A little late rather than a little early.
            plan.again_after(elapsed(now, upcoming) + std::time::Duration::from_millis(100));
        }
        let Some((due, missed)) = last_due(cron_job, &schedule, &zone, now) else { return };
        if missed > COUNTED {
            let message = format!(
                "too many missed start times ({missed}). Set or decrease .spec.startingDeadlineSeconds or check clock skew"
            );
            plan.event(on.clone(), EventType::Warning, "TooManyMissedTimes", message);
        }
        let deadline = spec.starting_deadline_seconds.map(crate::common::seconds);
        if deadline.is_some_and(|deadline| elapsed(due, now) > deadline) {
            plan.event(on, EventType::Warning, "MissSchedule", format!("Missed scheduled time to start a job: {due}"));
            return;
        }
        let running: Vec<_> = jobs.iter().filter(|job| finished_at(job).is_none()).collect();
        match spec.concurrency_policy.as_deref() {
            Some("Forbid") if !running.is_empty() => {
                let message = "Not starting job because prior execution is running and concurrency policy is Forbid";
                plan.event(on, EventType::Normal, "JobAlreadyActive", message.to_owned());
                return;
            }
            Some("Replace") => plan.writes.extend(running.iter().map(|job| delete_job(cron_job, job))),
            _ => {}
        }
        let job = job_for(cron_job, due, &zone);
        if self.jobs.get(&ObjectKey::of(&job.metadata)).is_none() {
            plan.push(Write::create(&job).if_absent().report(Report {
                on: object_reference(cron_job),
                done: ("SuccessfulCreate", "Created job {}".to_owned()),
                failed: ("FailedCreate", "Error creating job: {}".to_owned()),
            }));
        }
        next.status.get_or_insert_default().last_schedule_time = Some(Time(due));
    }
}

/// The newest start time that has come since the last one, and how many there were.
fn last_due(cron_job: &CronJob, schedule: &Schedule, zone: &TimeZone, now: Timestamp) -> Option<(Timestamp, usize)> {
    let created = cron_job.metadata.creation_timestamp.as_ref().map_or(now, |time| time.0);
    let mut from =
        cron_job.status.as_ref().and_then(|status| status.last_schedule_time.as_ref()).map_or(created, |t| t.0);
    if let Some(deadline) = cron_job.spec.starting_deadline_seconds {
        let earliest = now.checked_sub(jiff::SignedDuration::from_secs(deadline)).unwrap_or(Timestamp::MIN);
        from = from.max(earliest);
    }
    let first = schedule.next(from, zone).filter(|due| *due <= now)?;
    let (mut due, mut missed) = (first, 1);
    while let Some(next) = schedule.next(due, zone).filter(|next| *next <= now) {
        due = next;
        missed += 1;
        if missed > COUNTED {
            // Too many to walk through: the newest one lies in the last period before now.
            let period = elapsed(first, schedule.next(first, zone).unwrap_or(first));
            let near = now.checked_sub(period).and_then(|t| t.checked_sub(period)).unwrap_or(from).max(due);
            let mut last = schedule.next(near, zone).filter(|time| *time <= now).unwrap_or(due);
            while let Some(next) = schedule.next(last, zone).filter(|next| *next <= now) {
                last = next;
            }
            return Some((last, missed));
        }
    }
    Some((due, missed))
}

/// Brings the list of running jobs and the time of the last success up to date.
fn note_jobs(cron_job: &CronJob, next: &mut CronJob, jobs: &[Arc<Job>], plan: &mut Plan) {
    let status = next.status.get_or_insert_default();
    let known = |job: &Job| status.active.iter().flatten().any(|active| active.uid == job.metadata.uid);
    for job in jobs.iter().filter(|job| finished_at(job).is_some() && known(job)) {
        let complete = condition(job, "Complete").is_some();
        let message = format!(
            "Saw completed job: {}, condition: {}",
            name(&job.metadata),
            if complete { "Complete" } else { "Failed" }
        );
        plan.event(object_reference(cron_job), EventType::Normal, "SawCompletedJob", message);
    }
    let active: Vec<_> = jobs
        .iter()
        .filter(|job| finished_at(job).is_none())
        .map(|job| k8s_openapi::api::core::v1::ObjectReference {
            resource_version: None,
            ..object_reference(job.as_ref())
        })
        .collect();
    status.active = (!active.is_empty()).then_some(active);
    let succeeded = jobs.iter().filter(|job| condition(job, "Complete").is_some());
    let last = succeeded.filter_map(|job| job.status.as_ref()?.completion_time.as_ref().map(|time| time.0)).max();
    if let Some(last) = last.filter(|last| status.last_successful_time.as_ref().is_none_or(|time| time.0 < *last)) {
        status.last_successful_time = Some(Time(last));
    }
}

/// Ended jobs beyond the limits go, oldest first.
fn history(cron_job: &CronJob, jobs: &[Arc<Job>]) -> Vec<Write> {
    let spec = &cron_job.spec;
    let kinds = [
        ("Complete", spec.successful_jobs_history_limit.unwrap_or(3)),
        ("Failed", spec.failed_jobs_history_limit.unwrap_or(1)),
    ];
    let mut writes = Vec::new();
    for (type_, limit) in kinds {
        let mut ended: Vec<_> =
            jobs.iter().filter(|job| condition(job, type_).is_some() && !is_deleted(&job.metadata)).collect();
        ended.sort_by_key(|job| {
            (job.status.as_ref().and_then(|status| status.start_time.clone()), name(&job.metadata).to_owned())
        });
        let surplus = ended.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
        writes.extend(ended[..surplus].iter().map(|job| delete_job(cron_job, job)));
    }
    writes
}

fn delete_job(cron_job: &CronJob, job: &Job) -> Write {
    let job_name = name(&job.metadata);
    Write::delete(job).propagation(Propagation::Background).report(Report {
        on: object_reference(cron_job),
        done: ("SuccessfulDelete", format!("Deleted job {job_name}")),
        failed: ("FailedDelete", "Deleted job: {}".to_owned()),
    })
}

/// The job of a start time; its name is the same for every try.
fn job_for(cron_job: &CronJob, due: Timestamp, zone: &TimeZone) -> Job {
    let template = cron_job.spec.job_template.clone();
    let meta = template.metadata.unwrap_or_default();
    let mut annotations = meta.annotations.unwrap_or_default();
    let local = due.to_zoned(zone.clone());
    let text =
        if *zone == TimeZone::UTC { due.to_string() } else { local.strftime("%Y-%m-%dT%H:%M:%S%:z").to_string() };
    annotations.insert(SCHEDULED_AT.to_owned(), text);
    Job {
        metadata: ObjectMeta {
            name: Some(format!("{}-{}", name(&cron_job.metadata), due.as_second() / 60)),
            namespace: Some(namespace(&cron_job.metadata).to_owned()),
            labels: meta.labels,
            annotations: Some(annotations),
            owner_references: Some(vec![controller_reference(cron_job)]),
            ..ObjectMeta::default()
        },
        spec: template.spec,
        status: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use apimachinery::controller::Verb;
    use serde_json::{Value, json};

    fn cron_job(extra: Value) -> CronJob {
        let mut spec =
            json!({"schedule": "*/1 * * * *", "concurrencyPolicy": "Allow", "jobTemplate": {"spec": {"template": {}}}});
        for (key, value) in extra.as_object().unwrap() {
            spec[key] = value.clone();
        }
        serde_json::from_value(json!({"metadata": {"name": "c", "namespace": "ns", "uid": "c", "creationTimestamp": "1970-01-01T00:00:00Z"}, "spec": spec})).unwrap()
    }

    fn job(cron_job: &CronJob, minute: i64, ended: Option<&str>) -> Job {
        let mut job = job_for(cron_job, Timestamp::from_second(minute * 60).unwrap(), &TimeZone::UTC);
        job.metadata.uid = Some(format!("j{minute}"));
        let start = Timestamp::from_second(minute * 60).unwrap().to_string();
        let conditions: Vec<_> = ended
            .map(|type_| json!({"type": type_, "status": "True", "lastTransitionTime": start}))
            .into_iter()
            .collect();
        job.status = serde_json::from_value(
            json!({"startTime": start, "completionTime": ended.map(|_| start.clone()), "conditions": conditions}),
        )
        .unwrap();
        job
    }

    fn plan(cron_job: &CronJob, jobs: Vec<Job>, second: i64) -> Plan {
        let controller =
            CronJobController { cron_jobs: Informer::fixed([cron_job.clone()]), jobs: Informer::fixed(jobs) };
        controller.reconcile(&ObjectKey::new("ns", "c"), Timestamp::from_second(second).unwrap())
    }

    fn summary(plan: &Plan) -> Vec<(Verb, String)> {
        plan.writes
            .iter()
            .filter(|write| write.resource.kind == "Job")
            .map(|write| (write.verb.clone(), write.name.clone()))
            .collect()
    }

    #[test]
    fn jobs_start_on_schedule() {
        let cron = cron_job(json!({}));
        let early = plan(&cron, vec![], 30);
        assert!(summary(&early).is_empty());
        assert_eq!(early.again_after, Some(std::time::Duration::from_millis(30_100)));
        let due = plan(&cron, vec![], 61);
        assert_eq!(summary(&due), [(Verb::Create, "c-1".to_owned())]);
        assert_eq!(due.writes[0].body["metadata"]["annotations"][SCHEDULED_AT], "1970-01-01T00:01:00Z");
        assert_eq!(
            summary(&plan(&cron, vec![], 190)),
            [(Verb::Create, "c-3".to_owned())],
            "only the newest missed start"
        );
    }

    #[test]
    fn overlapping_follows_the_policy() {
        let running = |cron: &CronJob| vec![job(cron, 1, None)];
        let forbid = cron_job(json!({"concurrencyPolicy": "Forbid"}));
        assert!(summary(&plan(&forbid, running(&forbid), 121)).is_empty());
        let replace = cron_job(json!({"concurrencyPolicy": "Replace"}));
        let expected = [(Verb::Delete, "c-1".to_owned()), (Verb::Create, "c-2".to_owned())];
        assert_eq!(summary(&plan(&replace, running(&replace), 121)), expected);
    }

    #[test]
    fn late_and_suspended_starts_do_not_happen() {
        let daily = cron_job(json!({"schedule": "@daily", "startingDeadlineSeconds": 10}));
        assert!(summary(&plan(&daily, vec![], 86_400 + 60)).is_empty());
        let suspended = cron_job(json!({"suspend": true}));
        assert!(summary(&plan(&suspended, vec![], 61)).is_empty());
    }

    #[test]
    fn history_is_limited() {
        let cron = cron_job(json!({"successfulJobsHistoryLimit": 1, "failedJobsHistoryLimit": 0, "suspend": true}));
        let jobs =
            vec![job(&cron, 1, Some("Complete")), job(&cron, 2, Some("Complete")), job(&cron, 3, Some("Failed"))];
        let plan = plan(&cron, jobs, 300);
        assert_eq!(summary(&plan), [(Verb::Delete, "c-1".to_owned()), (Verb::Delete, "c-3".to_owned())]);
        let status = &plan.writes.last().unwrap().body["status"];
        assert_eq!(status["lastSuccessfulTime"], "1970-01-01T00:02:00Z");
    }

    #[test]
    fn many_missed_starts_end_in_one() {
        let cron = cron_job(json!({}));
        let plan = plan(&cron, vec![], 86_400 * 30 + 5);
        assert_eq!(summary(&plan), [(Verb::Create, "c-43200".to_owned())]);
        assert!(plan.events.iter().any(|event| event.reason == "TooManyMissedTimes"));
    }
}
