//! Leader election by a Lease object: of several processes with the same role one works, the others wait.
//!
//! The times are compared on this machine's clock only: a holder is dead when its lease has not *changed* for the lease
//! duration since we saw it change, whatever times it wrote. A process that cannot renew stops before others may start.

use std::time::Duration;

use clap::{ArgAction, Args};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::Client;
use kube::api::{Api, ObjectMeta, PostParams};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::duration::parse_duration;
use crate::process::error_chain;

/// Upstream's flags; the component gives the default name of the lease.
#[derive(Args, Clone, Debug)]
pub struct LeaderElectionArgs {
    /// Work only while holding the lease; needed when several of these processes run.
    #[arg(long, default_value_t = true, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub leader_elect: bool,
    /// How long others wait after the last renewal before one of them takes the lease.
    #[arg(long, default_value = "15s", value_parser = parse_duration)]
    pub leader_elect_lease_duration: Duration,
    /// How long the holder tries to renew before it stops working.
    #[arg(long, default_value = "10s", value_parser = parse_duration)]
    pub leader_elect_renew_deadline: Duration,
    /// The time between tries.
    #[arg(long, default_value = "2s", value_parser = parse_duration)]
    pub leader_elect_retry_period: Duration,
    /// The kind of the lock object; only `leases` exists.
    #[arg(long, default_value = "leases")]
    pub leader_elect_resource_lock: String,
    /// The name of the lease.
    #[arg(long)]
    pub leader_elect_resource_name: Option<String>,
    /// The namespace of the lease.
    #[arg(long, default_value = "kube-system")]
    pub leader_elect_resource_namespace: String,
}

impl LeaderElectionArgs {
    /// The settings for a component whose lease has this name unless the flags say otherwise.
    pub fn settings(&self, default_name: &str, identity: String) -> LeaderElection {
        LeaderElection {
            namespace: self.leader_elect_resource_namespace.clone(),
            name: self.leader_elect_resource_name.clone().unwrap_or_else(|| default_name.to_owned()),
            identity,
            lease_duration: self.leader_elect_lease_duration,
            renew_deadline: self.leader_elect_renew_deadline,
            retry_period: self.leader_elect_retry_period,
        }
    }
}

#[derive(Clone, Debug)]
pub struct LeaderElection {
    pub namespace: String,
    pub name: String,
    /// Unique among all processes, such as `host_uuid`.
    pub identity: String,
    pub lease_duration: Duration,
    pub renew_deadline: Duration,
    pub retry_period: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum LeaderElectionError {
    #[error("--leader-elect-lease-duration must be longer than --leader-elect-renew-deadline")]
    LeaseShorterThanDeadline,
    #[error("--leader-elect-renew-deadline must be longer than 1.2 times --leader-elect-retry-period")]
    DeadlineShorterThanRetry,
    #[error("stopped before becoming the leader")]
    Stopped,
}

/// Being the leader; renewed in the background until dropped, released or lost.
pub struct Leadership {
    /// Cancelled when the lease could not be renewed in time: all work must stop at once.
    pub lost: CancellationToken,
    stop: CancellationToken,
    renewing: tokio::task::JoinHandle<()>,
}

impl Leadership {
    /// Gives the lease up, so that another process can take over without waiting.
    pub async fn release(self) {
        self.stop.cancel();
        if let Err(error) = self.renewing.await {
            tracing::warn!(%error, "the renewal of the lease ended badly");
        }
    }
}

impl LeaderElection {
    /// Waits until this process is the leader.
    pub async fn acquire(
        self,
        client: Client,
        shutdown: &CancellationToken,
    ) -> Result<Leadership, LeaderElectionError> {
        if self.lease_duration <= self.renew_deadline {
            return Err(LeaderElectionError::LeaseShorterThanDeadline);
        }
        if self.renew_deadline <= self.retry_period.mul_f64(1.2) {
            return Err(LeaderElectionError::DeadlineShorterThanRetry);
        }
        let api: Api<Lease> = Api::namespaced(client, &self.namespace);
        let mut candidate = Candidate { settings: self, observed: None };
        tracing::info!(lease = candidate.settings.name, "waiting to become the leader");
        while !candidate.attempt(&api).await {
            let pause = candidate.settings.retry_period.mul_f64(1.0 + rand::random::<f64>() * 1.2);
            tokio::select! {
                () = shutdown.cancelled() => return Err(LeaderElectionError::Stopped),
                () = tokio::time::sleep(pause) => {}
            }
        }
        tracing::info!(lease = candidate.settings.name, identity = candidate.settings.identity, "became the leader");
        let (lost, stop) = (CancellationToken::new(), CancellationToken::new());
        let renewing = tokio::spawn(renew(candidate, api, lost.clone(), stop.clone()));
        Ok(Leadership { lost, stop, renewing })
    }
}

async fn renew(mut candidate: Candidate, api: Api<Lease>, lost: CancellationToken, stop: CancellationToken) {
    let mut renewed = Instant::now();
    loop {
        tokio::select! {
            () = stop.cancelled() => return candidate.give_up(&api).await,
            () = tokio::time::sleep(candidate.settings.retry_period) => {}
        }
        let deadline = renewed + candidate.settings.renew_deadline;
        match tokio::time::timeout_at(deadline, candidate.attempt(&api)).await {
            Ok(true) => renewed = Instant::now(),
            Ok(false) if Instant::now() < deadline && candidate.holds() => {}
            Ok(false) | Err(_) => {
                tracing::error!(lease = candidate.settings.name, "lost the lease");
                lost.cancel();
                return;
            }
        }
    }
}

/// A lease as last seen, and when it was seen to change.
struct Observed {
    lease: Lease,
    changed: Instant,
}

struct Candidate {
    settings: LeaderElection,
    observed: Option<Observed>,
}

/// What to do about the lease.
#[derive(Debug, PartialEq)]
enum Step {
    Create,
    Renew,
    Take,
    Wait,
}

impl Candidate {
    /// One try to get or renew the lease; true when this process holds it now.
    async fn attempt(&mut self, api: &Api<Lease>) -> bool {
        match self.try_attempt(api).await {
            Ok(holds) => holds,
            Err(kube::Error::Api(status)) if status.code == 409 => {
                // Somebody else wrote: look again the next time.
                tracing::debug!(lease = self.settings.name, "another process changed the lease");
                if let Ok(lease) = api.get(&self.settings.name).await {
                    self.observe(lease, Instant::now());
                }
                false
            }
            Err(error) => {
                tracing::warn!(
                    lease = self.settings.name,
                    error = error_chain(&error),
                    "cannot get or renew the lease"
                );
                false
            }
        }
    }

    async fn try_attempt(&mut self, api: &Api<Lease>) -> kube::Result<bool> {
        let now = Instant::now();
        // A holder renews on what it wrote last; the resourceVersion tells if somebody else came between.
        if !self.holds() {
            match api.get_opt(&self.settings.name).await? {
                Some(lease) => self.observe(lease, now),
                None => self.observed = None,
            }
        }
        let wish = match self.step(now) {
            Step::Wait => return Ok(false),
            step => self.lease(&step, Timestamp::now()),
        };
        let written = if self.observed.is_none() {
            api.create(&PostParams::default(), &wish).await?
        } else {
            api.replace(&self.settings.name, &PostParams::default(), &wish).await?
        };
        self.observe(written, now);
        Ok(true)
    }

    async fn give_up(&mut self, api: &Api<Lease>) {
        let Some(observed) = self.observed.as_ref().filter(|_| self.holds()) else { return };
        let mut lease = observed.lease.clone();
        let now = MicroTime(Timestamp::now());
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(String::new()),
            lease_duration_seconds: Some(1),
            acquire_time: Some(now.clone()),
            renew_time: Some(now),
            ..lease.spec.unwrap_or_default()
        });
        if let Err(error) = api.replace(&self.settings.name, &PostParams::default(), &lease).await {
            tracing::warn!(error = error_chain(&error), "cannot release the lease");
        }
    }

    fn observe(&mut self, lease: Lease, now: Instant) {
        if self.observed.as_ref().is_none_or(|seen| seen.lease.spec != lease.spec) {
            self.observed = Some(Observed { lease, changed: now });
        } else if let Some(seen) = &mut self.observed {
            seen.lease = lease;
        }
    }

    fn holder(&self) -> Option<&str> {
        self.observed.as_ref()?.lease.spec.as_ref()?.holder_identity.as_deref().filter(|holder| !holder.is_empty())
    }

    fn holds(&self) -> bool {
        self.holder() == Some(&self.settings.identity)
    }

    fn step(&self, now: Instant) -> Step {
        let Some(observed) = &self.observed else { return Step::Create };
        match self.holder() {
            Some(holder) if holder == self.settings.identity => Step::Renew,
            Some(_) if now < observed.changed + self.settings.lease_duration => Step::Wait,
            _ => Step::Take,
        }
    }

    fn lease(&self, step: &Step, now: Timestamp) -> Lease {
        let old = self.observed.as_ref().map(|observed| observed.lease.clone()).unwrap_or_default();
        let old_spec = old.spec.unwrap_or_default();
        let transitions = old_spec.lease_transitions.unwrap_or(0);
        let mut metadata = ObjectMeta { managed_fields: None, ..old.metadata };
        metadata.name = Some(self.settings.name.clone());
        metadata.namespace = Some(self.settings.namespace.clone());
        Lease {
            metadata,
            spec: Some(LeaseSpec {
                holder_identity: Some(self.settings.identity.clone()),
                lease_duration_seconds: Some(i32::try_from(self.settings.lease_duration.as_secs()).unwrap_or(i32::MAX)),
                acquire_time: if *step == Step::Renew { old_spec.acquire_time } else { Some(MicroTime(now)) },
                renew_time: Some(MicroTime(now)),
                lease_transitions: Some(transitions + i32::from(*step == Step::Take)),
                ..LeaseSpec::default()
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(identity: &str) -> Candidate {
        let settings = LeaderElection {
            namespace: "kube-system".to_owned(),
            name: "lock".to_owned(),
            identity: identity.to_owned(),
            lease_duration: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry_period: Duration::from_secs(2),
        };
        Candidate { settings, observed: None }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_is_created_renewed_and_taken_from_the_dead() {
        let (mut a, mut b) = (candidate("a"), candidate("b"));
        let now = Instant::now;
        assert_eq!(a.step(now()), Step::Create);
        let lease = a.lease(&Step::Create, at(0));
        a.observe(lease.clone(), now());
        b.observe(lease, now());
        assert_eq!((a.step(now()), b.step(now())), (Step::Renew, Step::Wait));

        tokio::time::advance(Duration::from_secs(14)).await;
        let renewed = a.lease(&Step::Renew, at(14));
        b.observe(renewed.clone(), now());
        tokio::time::advance(Duration::from_secs(14)).await;
        b.observe(renewed, now());
        assert_eq!(b.step(now()), Step::Wait, "the renewal counts from when it was seen");
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(b.step(now()), Step::Take);
        let spec = b.lease(&Step::Take, at(29)).spec.unwrap();
        assert_eq!((spec.holder_identity.as_deref(), spec.lease_transitions), (Some("b"), Some(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_released_lease_is_taken_at_once() {
        let mut b = candidate("b");
        let mut lease = candidate("a").lease(&Step::Create, at(0));
        lease.spec.as_mut().unwrap().holder_identity = Some(String::new());
        b.observe(lease, Instant::now());
        assert_eq!(b.step(Instant::now()), Step::Take);
    }
}
