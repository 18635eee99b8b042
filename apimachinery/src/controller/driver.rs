//! Runs controllers: feeds their queues from informers, calls `reconcile`, executes the plan, tries again.
//!
//! One task per controller plus one per key in work; an idle controller holds a queue and waits on it.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use kube::Client;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::events::Recorder;
use super::executor::Executor;
use super::informer::{Change, Informer, Informers, Object};
use super::key::{ObjectKey, controller_of};
use super::plan::Plan;
use super::queue::Queue;
use super::rest::Rest;
use super::service_account::ServiceAccount;
use crate::process::error_chain;

/// A controller that decides purely from informers. It holds no API client, keeps no state between calls that could
/// not be rebuilt, and may be called at any time, any number of times.
pub trait Controller: Send + Sync + 'static {
    /// The name in logs, such as `replicaset`.
    fn name(&self) -> &'static str;
    /// The source of the events that it records, such as `replicaset-controller`.
    fn component(&self) -> &'static str;
    fn reconcile(&self, key: &ObjectKey, now: Timestamp) -> Plan;
}

pub type ReconcileError = Box<dyn std::error::Error + Send + Sync>;

/// A controller that must talk to the API server itself, because what it works on is not known before (discovered
/// kinds). Prefer [`Controller`].
#[async_trait]
pub trait Reconciler: Send + Sync + 'static {
    fn name(&self) -> &'static str;
    /// Answers when to look at the key again, if not only after a change.
    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, ReconcileError>;
}

struct Pure<C> {
    controller: C,
    executor: Executor,
}

#[async_trait]
impl<C: Controller> Reconciler for Pure<C> {
    fn name(&self) -> &'static str {
        self.controller.name()
    }

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, ReconcileError> {
        let plan = self.controller.reconcile(key, Timestamp::now());
        let again_after = plan.again_after;
        match self.executor.run(plan).await {
            Ok(()) => Ok(again_after),
            Err(error) => Err(Box::new(error)),
        }
    }
}

/// Says which changes ask for which keys.
#[derive(Clone)]
pub struct Wiring {
    queue: Arc<Queue<ObjectKey>>,
}

impl Wiring {
    /// Objects of this kind are the keys.
    pub fn primary<K: Object>(&self, informer: &Informer<K>) {
        self.map(informer, |change| change.versions().take(1).map(|object| ObjectKey::of(object.meta())).collect());
    }

    /// A change of an object asks for its managing owner of type `O`.
    pub fn owned<K: Object, O: Object>(&self, informer: &Informer<K>) {
        let (kind, api_version) = (O::kind(&()), O::api_version(&()));
        let group_of =
            |api_version: &str| api_version.rsplit_once('/').map_or(String::new(), |(group, _)| group.to_owned());
        let group = group_of(&api_version);
        self.map(informer, move |change| {
            let owners = change.versions().filter_map(|object| {
                let owner = controller_of(object.meta())?;
                (owner.kind == kind && group_of(&owner.api_version) == group)
                    .then(|| ObjectKey::new(object.meta().namespace.as_deref().unwrap_or(""), &owner.name))
            });
            owners.collect()
        });
    }

    /// A change of an object asks for any keys.
    pub fn map<K: Object>(
        &self,
        informer: &Informer<K>,
        keys: impl Fn(&Change<K>) -> Vec<ObjectKey> + Send + Sync + 'static,
    ) {
        let queue = self.queue.clone();
        informer.subscribe(move |change| {
            for key in keys(change) {
                queue.add(key);
            }
        });
    }

    pub fn queue(&self) -> &Arc<Queue<ObjectKey>> {
        &self.queue
    }
}

/// Runs controllers of one process until the shutdown.
#[derive(Clone)]
pub struct Driver {
    rest: Rest,
    informers: Arc<Informers>,
    recorder: Recorder,
    shutdown: CancellationToken,
    /// Carries the requests of service accounts; without it everything goes out under the process's own credentials.
    anonymous: Option<Client>,
}

impl Driver {
    pub fn new(rest: Rest, informers: Arc<Informers>, recorder: Recorder, shutdown: CancellationToken) -> Self {
        Self { rest, informers, recorder, shutdown, anonymous: None }
    }

    /// Lets controllers act under service accounts, through a client that has no credentials of its own.
    #[must_use]
    pub fn with_service_accounts(self, anonymous: Client) -> Self {
        Self { anonymous: Some(anonymous), ..self }
    }

    /// A driver whose writes and events go out as this service account of `kube-system`, if accounts are used at all.
    /// Informers stay shared, under the process's own credentials.
    #[must_use]
    pub fn as_service_account(&self, name: &str) -> Self {
        let Some(anonymous) = &self.anonymous else { return self.clone() };
        let account = ServiceAccount::new(name, self.rest.clone(), anonymous.clone());
        let rest = self.rest.with_service_account(Arc::new(account));
        Self { recorder: self.recorder.with_rest(rest.clone()), rest, ..self.clone() }
    }

    pub fn informers(&self) -> &Arc<Informers> {
        &self.informers
    }

    pub fn rest(&self) -> &Rest {
        &self.rest
    }

    /// An executor for a controller that makes plans and also talks to the API server itself.
    pub fn executor(&self, component: &str) -> Executor {
        Executor::new(self.rest.clone(), self.informers.clone(), self.recorder.with_component(component))
    }

    pub fn shutdown(&self) -> &CancellationToken {
        &self.shutdown
    }

    /// Starts a controller; `wire` subscribes its queue to informers. At most `workers` keys are in work at once.
    pub fn run<C: Controller>(&self, controller: C, workers: usize, wire: impl FnOnce(&C, &Wiring)) {
        let wiring = Wiring { queue: Arc::new(Queue::default()) };
        wire(&controller, &wiring);
        let executor = self.executor(controller.component());
        self.start(Pure { controller, executor }, workers, wiring);
    }

    /// Starts a controller that talks to the API server itself.
    pub fn run_reconciler<R: Reconciler>(&self, reconciler: R, workers: usize, wire: impl FnOnce(&R, &Wiring)) {
        let wiring = Wiring { queue: Arc::new(Queue::default()) };
        wire(&reconciler, &wiring);
        self.start(reconciler, workers, wiring);
    }

    fn start<R: Reconciler>(&self, reconciler: R, workers: usize, wiring: Wiring) {
        let queue = wiring.queue;
        let close = queue.clone();
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            shutdown.cancelled().await;
            close.close();
        });
        let informers = self.informers.clone();
        tokio::spawn(async move {
            informers.wait_synced().await;
            tracing::debug!(controller = reconciler.name(), "started");
            dispatch(Arc::new(reconciler), queue, workers).await;
        });
    }
}

/// Gives keys to tasks, never more than `workers` at once, until the queue is closed.
async fn dispatch<R: Reconciler>(reconciler: Arc<R>, queue: Arc<Queue<ObjectKey>>, workers: usize) {
    let slots = Arc::new(Semaphore::new(workers));
    while let Ok(slot) = slots.clone().acquire_owned().await {
        let Some(key) = queue.next().await else { return };
        let (reconciler, queue) = (reconciler.clone(), queue.clone());
        tokio::spawn(async move {
            let _slot = slot;
            let result = reconciler.reconcile(&key).await;
            settle(reconciler.name(), &queue, &key, result);
            queue.done(&key);
        });
    }
}

fn settle(name: &str, queue: &Queue<ObjectKey>, key: &ObjectKey, result: Result<Option<Duration>, ReconcileError>) {
    match result {
        Ok(again_after) => {
            queue.forget(key);
            if let Some(after) = again_after {
                queue.add_after(key.clone(), after);
            }
        }
        Err(error) => {
            let text = error_chain(error.as_ref());
            // Conflicts and races sort themselves out at the first retries; what persists is worth a warning.
            if queue.failures(key) < 3 {
                tracing::debug!(controller = name, %key, error = text, "reconcile failed; trying again");
            } else {
                tracing::warn!(controller = name, %key, error = text, "reconcile keeps failing; trying again");
            }
            queue.retry(key.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    struct FailsTwice(AtomicUsize);

    #[async_trait]
    impl Reconciler for FailsTwice {
        fn name(&self) -> &'static str {
            "fails-twice"
        }

        async fn reconcile(&self, _: &ObjectKey) -> Result<Option<Duration>, ReconcileError> {
            match self.0.fetch_add(1, Ordering::SeqCst) {
                0 | 1 => Err("not yet".into()),
                2 => Ok(Some(Duration::from_secs(60))),
                _ => Ok(None),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn failures_are_retried_and_wishes_kept() {
        let queue = Arc::new(Queue::default());
        let reconciler = Arc::new(FailsTwice(AtomicUsize::new(0)));
        let running = tokio::spawn(dispatch(reconciler.clone(), queue.clone(), 2));
        let start = tokio::time::Instant::now();
        queue.add(ObjectKey::new("ns", "a"));
        while reconciler.0.load(Ordering::SeqCst) < 4 {
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        assert!(start.elapsed() >= Duration::from_secs(60), "looked again when asked to");
        assert_eq!(queue.failures(&ObjectKey::new("ns", "a")), 0);
        queue.close();
        running.await.unwrap();
    }
}
