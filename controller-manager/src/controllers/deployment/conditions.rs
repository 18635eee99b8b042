//! A deployment's conditions, and what each reason means.

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

pub const AVAILABLE: &str = "Available";
pub const PROGRESSING: &str = "Progressing";
pub const REPLICA_FAILURE: &str = "ReplicaFailure";

/// Reasons of the Progressing condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    NewReplicaSetCreated,
    FoundNewReplicaSet,
    /// Pods are coming or going.
    ReplicaSetUpdated,
    /// The rollout is complete.
    NewReplicaSetAvailable,
    FailedCreate,
    DeadlineExceeded,
    DeploymentPaused,
    DeploymentResumed,
}

impl Progress {
    pub fn reason(self) -> &'static str {
        match self {
            Self::NewReplicaSetCreated => "NewReplicaSetCreated",
            Self::FoundNewReplicaSet => "FoundNewReplicaSet",
            Self::ReplicaSetUpdated => "ReplicaSetUpdated",
            Self::NewReplicaSetAvailable => "NewReplicaSetAvailable",
            Self::FailedCreate => "ReplicaSetCreateError",
            Self::DeadlineExceeded => "ProgressDeadlineExceeded",
            Self::DeploymentPaused => "DeploymentPaused",
            Self::DeploymentResumed => "DeploymentResumed",
        }
    }

    fn status(self) -> &'static str {
        match self {
            Self::FailedCreate | Self::DeadlineExceeded => "False",
            Self::DeploymentPaused | Self::DeploymentResumed => "Unknown",
            _ => "True",
        }
    }
}

pub fn find<'a>(deployment: &'a Deployment, type_: &str) -> Option<&'a DeploymentCondition> {
    deployment.status.as_ref()?.conditions.as_ref()?.iter().find(|condition| condition.type_.as_deref() == Some(type_))
}

pub fn remove(deployment: &mut Deployment, type_: &str) {
    if let Some(conditions) = deployment.status.as_mut().and_then(|status| status.conditions.as_mut()) {
        conditions.retain(|condition| condition.type_.as_deref() != Some(type_));
    }
}

/// Sets a condition; when status and reason are as they were, nothing changes, not even the message.
pub fn set(deployment: &mut Deployment, type_: &str, status: &str, reason: &str, message: String, now: Timestamp) {
    let current = find(deployment, type_);
    if current.is_some_and(|c| c.status.as_deref() == Some(status) && c.reason.as_deref() == Some(reason)) {
        return;
    }
    replace(deployment, type_, status, reason, message, now);
}

/// Like `set`, but the update time moves even when only that is new.
pub fn replace(deployment: &mut Deployment, type_: &str, status: &str, reason: &str, message: String, now: Timestamp) {
    let since = find(deployment, type_)
        .filter(|c| c.status.as_deref() == Some(status))
        .and_then(|c| c.last_transition_time.clone());
    let condition = DeploymentCondition {
        type_: Some(type_.to_owned()),
        status: Some(status.to_owned()),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_update_time: Some(Time(now)),
        last_transition_time: Some(since.unwrap_or(Time(now))),
    };
    remove(deployment, type_);
    deployment.status.get_or_insert_default().conditions.get_or_insert_default().push(condition);
}

pub fn set_progress(deployment: &mut Deployment, progress: Progress, message: String, now: Timestamp) {
    set(deployment, PROGRESSING, progress.status(), progress.reason(), message, now);
}

/// The same progress again counts from now on: something has moved.
pub fn renew_progress(deployment: &mut Deployment, progress: Progress, message: String, now: Timestamp) {
    replace(deployment, PROGRESSING, progress.status(), progress.reason(), message, now);
}
