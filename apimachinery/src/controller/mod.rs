//! What every component that watches the API and acts on it is built from: shared informers, a rate-limited work
//! queue, plans and the driver that executes them, event recording and leader election.
//!
//! A controller decides purely: `reconcile(key, now) -> Plan` reads informers and answers what should be written; only
//! the driver talks to the API server. The pieces are usable alone: the scheduler takes informers, events and leader
//! election, and no driver.
//!
//! Reading one's own writes: instead of counting expected creations and deletions, the driver holds a key back until the
//! informers have seen everything that was written for it. A reconcile therefore never acts on a state older than its
//! own last actions, without any bookkeeping that could be lost in a restart.

mod driver;
mod duration;
mod events;
mod executor;
mod informer;
mod key;
mod leader;
mod plan;
mod queue;
mod rest;
mod service_account;

pub use driver::{Controller, Driver, ReconcileError, Reconciler, Wiring};
pub use duration::parse_duration;
pub use events::{EventApi, EventRecord, EventType, Recorder};
pub use executor::{Executor, WriteError};
pub use informer::{AnyInformer, Change, Informer, Informers, MetadataChange, Object};
pub use key::{ObjectKey, controller_of, is_controlled_by, object_reference};
pub use leader::{LeaderElection, LeaderElectionArgs, LeaderElectionError, Leadership};
pub use plan::{OnFailure, Plan, Propagation, Report, Verb, Write};
pub use queue::{Backoff, Queue};
pub use rest::{ResourceId, Rest};
pub use service_account::{ServiceAccount, ServiceAccountError};
