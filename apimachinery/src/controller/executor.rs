//! Carries out plans: the only place of a controller process that writes to the API server. It decides nothing but what
//! an answer means: whether a refusal is an outcome that was wanted anyway, or a failure to be tried again.

use std::sync::Arc;
use std::time::Duration;

use futures::stream::{FuturesOrdered, StreamExt};
use serde_json::Value;

use super::events::Recorder;
use super::informer::Informers;
use super::key::ObjectKey;
use super::plan::{Plan, Verb, Write};
use super::rest::Rest;
use crate::process::error_chain;

/// How long a key waits for the informers to see its writes before it goes on regardless.
const VISIBLE_WITHIN: Duration = Duration::from_secs(10);
/// The most requests of one plan in flight.
const BATCH: usize = 64;

/// A write that the server refused or that did not reach it.
#[derive(Debug, thiserror::Error)]
#[error("cannot {verb} {kind} {key}")]
pub struct WriteError {
    verb: &'static str,
    kind: String,
    key: ObjectKey,
    pub source: Box<kube::Error>,
}

impl WriteError {
    /// The server's words when it answered, else what went wrong on the way.
    pub fn message(&self) -> String {
        match self.source.as_ref() {
            kube::Error::Api(status) => status.message.clone(),
            other => error_chain(other),
        }
    }

    /// Somebody else wrote first; a new look at the state decides again.
    pub fn is_conflict(&self) -> bool {
        matches!(self.source.as_ref(), kube::Error::Api(status) if status.code == 409 && status.reason == "Conflict")
    }

    pub fn is_already_exists(&self) -> bool {
        matches!(self.source.as_ref(), kube::Error::Api(status) if status.reason == "AlreadyExists")
    }

    pub fn is_invalid(&self) -> bool {
        matches!(self.source.as_ref(), kube::Error::Api(status) if status.reason == "Invalid")
    }
}

/// What became of a write that did not fail.
enum Done {
    Written(Value),
    /// There was nothing (more) to write.
    Moot,
    /// The namespace is going away: nothing can be created in it, and that is nobody's fault.
    NamespaceGoes,
}

/// Executes plans.
pub struct Executor {
    rest: Rest,
    informers: Arc<Informers>,
    recorder: Recorder,
}

impl Executor {
    pub fn new(rest: Rest, informers: Arc<Informers>, recorder: Recorder) -> Self {
        Self { rest, informers, recorder }
    }

    /// Executes the plan and returns once the informers have seen its writes.
    pub async fn run(&self, plan: Plan) -> Result<(), WriteError> {
        for event in plan.events {
            self.recorder.record(event);
        }
        let mut written = Vec::new();
        let result = self.write_all(&plan.writes, &mut written).await;
        let result = match (result, plan.on_failure) {
            (Err(error), Some(on_failure)) if !error.is_conflict() => {
                let writes = on_failure(&error);
                if let Err(second) = self.write_all(&writes, &mut written).await {
                    tracing::debug!(error = error_chain(&second), "the failure could not be reported");
                }
                Err(error)
            }
            (result, _) => result,
        };
        self.wait_visible(&written).await;
        result
    }

    async fn write_all(&self, writes: &[Write], written: &mut Vec<(Write, Value)>) -> Result<(), WriteError> {
        let mut rest = writes;
        let mut size = 1;
        while let Some(first) = rest.first() {
            let similar = rest.iter().take_while(|write| goes_with(first, write)).count();
            // Slow start: when the first creation is refused, a thousand more need not be.
            let (batch, later) = rest.split_at(similar.min(size));
            size = if similar > size { (size * 2).min(BATCH) } else { 1 };
            rest = later;
            let mut answers: FuturesOrdered<_> = batch.iter().map(|write| self.write(write)).collect();
            let mut failure = None;
            let mut index = 0;
            while let Some(answer) = answers.next().await {
                let write = &batch[index];
                index += 1;
                match answer {
                    Ok(Done::Written(object)) => written.push((write.clone(), object)),
                    Ok(Done::Moot) => {}
                    Ok(Done::NamespaceGoes) => rest = &[],
                    Err(error) => failure = failure.or(Some(error)),
                }
            }
            if let Some(error) = failure {
                return Err(error);
            }
        }
        Ok(())
    }

    async fn write(&self, write: &Write) -> Result<Done, WriteError> {
        let path = write.path();
        let answer = match &write.verb {
            Verb::Create => self.rest.create(&path, &write.body).await,
            Verb::Update => self.rest.replace(&path, &write.body).await,
            Verb::Amend(base) => self.amend(write, base.as_ref()).await,
            Verb::MergePatch => self.rest.patch(&path, "application/merge-patch+json", &write.body).await,
            Verb::JsonPatch => self.rest.patch(&path, "application/json-patch+json", &write.body).await,
            Verb::StrategicMergePatch => {
                self.rest.patch(&path, "application/strategic-merge-patch+json", &write.body).await
            }
            Verb::Delete => self.rest.delete(&path, &write.body).await,
        };
        let source = match answer {
            Ok(object) => {
                if let Some(report) = &write.report {
                    let name = object["metadata"]["name"].as_str().unwrap_or(&write.name);
                    self.recorder.record(report.event(Ok(if name.is_empty() { &write.name } else { name })));
                }
                return Ok(Done::Written(object));
            }
            Err(kube::Error::Api(status)) => {
                if let Some(done) = wanted_anyway(write, &status) {
                    return Ok(done);
                }
                kube::Error::Api(status)
            }
            Err(other) => other,
        };
        let error = WriteError {
            verb: verb_name(&write.verb),
            kind: write.resource.kind.to_string(),
            key: ObjectKey::new(&write.namespace, &write.name),
            source: Box::new(source),
        };
        if let Some(report) = &write.report {
            self.recorder.record(report.event(Err(&error.message())));
        }
        Err(error)
    }

    async fn amend(&self, write: &Write, base: Option<&Value>) -> kube::Result<Value> {
        let mut object = match base {
            Some(base) => base.clone(),
            None => self.rest.get(&write.resource.path(&write.namespace, &write.name, "")).await?,
        };
        json_patch::merge(&mut object, &write.body);
        self.rest.replace(&write.path(), &object).await
    }

    async fn wait_visible(&self, written: &[(Write, Value)]) {
        let wait = async {
            for (write, answer) in written {
                let Some(informer) = self.informers.find(&write.resource) else { continue };
                let meta = &answer["metadata"];
                if write.verb == Verb::Delete {
                    let key = ObjectKey::new(&write.namespace, &write.name);
                    informer.wait_gone(&key, write.uid.as_deref().unwrap_or("")).await;
                } else if write.subresource.is_empty() || write.subresource == "status" {
                    let version = meta["resourceVersion"].as_str().and_then(|v| v.parse().ok());
                    informer.wait_seen(version.unwrap_or(0)).await;
                }
            }
        };
        if tokio::time::timeout(VISIBLE_WITHIN, wait).await.is_err() {
            tracing::debug!("own writes were not seen by the informers in time");
        }
    }
}

/// Whether two neighbours of a plan may be in flight together.
fn goes_with(first: &Write, other: &Write) -> bool {
    first.verb == other.verb
        && first.resource == other.resource
        && first.subresource == other.subresource
        && (matches!(first.verb, Verb::Create | Verb::Delete) || first == other)
}

/// Refusals that mean that the state is as it was wanted.
fn wanted_anyway(write: &Write, status: &kube::core::Status) -> Option<Done> {
    let gone = status.code == 404 && status.reason == "NotFound";
    match write.verb {
        Verb::Delete if gone || (status.code == 409 && write.uid.is_some()) => Some(Done::Moot),
        Verb::Update | Verb::Amend(_) | Verb::MergePatch | Verb::JsonPatch | Verb::StrategicMergePatch if gone => {
            Some(Done::Moot)
        }
        Verb::Create if write.if_absent && status.reason == "AlreadyExists" => Some(Done::Moot),
        Verb::Create if namespace_goes(status) => Some(Done::NamespaceGoes),
        _ => None,
    }
}

fn namespace_goes(status: &kube::core::Status) -> bool {
    status.code == 403
        && status
            .details
            .as_ref()
            .is_some_and(|details| details.causes.iter().any(|cause| cause.reason == "NamespaceTerminating"))
}

fn verb_name(verb: &Verb) -> &'static str {
    match verb {
        Verb::Create => "create",
        Verb::Update | Verb::Amend(_) => "update",
        Verb::MergePatch | Verb::JsonPatch | Verb::StrategicMergePatch => "patch",
        Verb::Delete => "delete",
    }
}
