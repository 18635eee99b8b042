//! Priority and fairness: which requests go first when there are too many. A flow schema says which priority level a
//! request belongs to and which flow of it (`classify`); a priority level has seats, and queues for those that find none
//! (`level`). What is not needed of the seats of one level is lent to others (`share`).
//! <https://kubernetes.io/docs/concepts/cluster-administration/flow-control/>

mod classify;
mod level;
mod share;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::process::CancellationToken;
use apimachinery::status::Status;
use arc_swap::ArcSwap;
use http::{HeaderName, HeaderValue};
use parking_lot::Mutex;

use crate::auth::UserInfo;
use crate::cache::{Caches, ResourceCache};
use crate::http::{RequestInfo, Response};
use crate::registry::object::ObjectExt;
use classify::Schema;
use level::{Level, Seats, Settings};

pub const GROUP: &str = "flowcontrol.apiserver.k8s.io";
pub const SCHEMAS: &str = "flowschemas";
pub const LEVELS: &str = "prioritylevelconfigurations";
const SCHEMA_HEADER: HeaderName = HeaderName::from_static("x-kubernetes-pf-flowschema-uid");
const LEVEL_HEADER: HeaderName = HeaderName::from_static("x-kubernetes-pf-prioritylevel-uid");
/// How often seats are lent anew.
const LENDING: Duration = Duration::from_secs(10);
/// A list takes a seat for each so many objects, and this many seats at most.
const OBJECTS_PER_SEAT: usize = 100;
const MOST_SEATS: usize = 10;

/// What the objects of the cluster say, as of one change of them.
#[derive(Default)]
struct Generation {
    revisions: [u64; 2],
    /// By precedence.
    schemas: Vec<Schema>,
}

pub struct Flow {
    /// Of schemas and levels; `None` where they are not served.
    caches: Option<[Arc<ResourceCache>; 2]>,
    /// All seats there are.
    total: usize,
    current: ArcSwap<Generation>,
    levels: Mutex<HashMap<String, Arc<Level>>>,
    /// How long a request may wait for a seat.
    patience: Duration,
}

/// A request's place; gives its seats back when dropped.
pub struct Place {
    seats: Option<Seats>,
    schema: HeaderValue,
    level: HeaderValue,
}

impl Place {
    /// Tells the client what its request was classified as.
    pub fn mark(&self, response: &mut Response) {
        response.headers_mut().insert(SCHEMA_HEADER, self.schema.clone());
        response.headers_mut().insert(LEVEL_HEADER, self.level.clone());
    }
}

impl Flow {
    /// `total` requests at once; a request waits for at most a quarter of the time that it may take.
    pub fn new(caches: &Caches, total: usize, request_timeout: Duration) -> Self {
        let caches = caches.get(GROUP, SCHEMAS).zip(caches.get(GROUP, LEVELS));
        Self {
            caches: caches.map(|(schemas, levels)| [schemas, levels]),
            total,
            current: ArcSwap::default(),
            levels: Mutex::default(),
            patience: (request_timeout / 4).min(Duration::from_secs(60)),
        }
    }

    /// Whether requests of this sort are counted at all: those that go on for long only while they begin.
    pub fn counts(info: &RequestInfo) -> bool {
        !info.is_long_running() || info.verb == "watch"
    }

    /// Waits for a seat. `Ok(None)`: nothing classifies the request, as before there are any schemas. `Err`: there are
    /// too many before it; with its place, for the headers.
    pub async fn admit(
        &self,
        user: &UserInfo,
        info: &RequestInfo,
        count: usize,
    ) -> Result<Option<Place>, (Status, Place)> {
        let Some(generation) = self.generation() else { return Ok(None) };
        let Some(schema) = generation.schemas.iter().find(|schema| schema.fits(user, info)) else { return Ok(None) };
        let mut place = Place { seats: None, schema: schema.uid.clone(), level: schema.level.uid.clone() };
        let seats = schema.level.enter(schema.flow(user, info), width(info, count), self.patience).await;
        match seats {
            Ok(seats) => {
                place.seats = Some(seats);
                Ok(Some(place))
            }
            Err(_) => Err((Status::too_many_requests("Too many requests, please try again later.", 1), place)),
        }
    }

    fn generation(&self) -> Option<Arc<Generation>> {
        let caches = self.caches.as_ref()?;
        let revisions = [caches[0].changed(), caches[1].changed()];
        let current = self.current.load();
        if current.revisions == revisions {
            return Some(Arc::clone(&current));
        }
        let generation = Arc::new(self.build(caches, revisions));
        self.current.store(generation.clone());
        Some(generation)
    }

    /// Levels that stay keep their queues.
    fn build(&self, [schemas, levels]: &[Arc<ResourceCache>; 2], revisions: [u64; 2]) -> Generation {
        let found: Vec<serde_json::Value> = levels.list(None).iter().map(|level| level.value()).collect();
        let shares: u64 = found.iter().map(level::shares).sum();
        let mut levels = self.levels.lock();
        levels.retain(|name, _| found.iter().any(|object| object.name() == name));
        for object in &found {
            let settings = Settings::read(object, self.total, shares);
            match levels.get(object.name()) {
                Some(level) if level.uid == *object.uid() => level.set(settings),
                _ => {
                    levels.insert(object.name().to_owned(), Arc::new(Level::new(object.uid(), settings)));
                }
            }
        }
        let schemas = schemas.list(None);
        let mut schemas: Vec<Schema> =
            schemas.iter().filter_map(|schema| Schema::read(&schema.value(), &levels)).collect();
        schemas.sort_by(|a, b| (a.precedence, &a.name).cmp(&(b.precedence, &b.name)));
        Generation { revisions, schemas }
    }

    /// Lends what is not needed, until shutdown.
    pub async fn lend(self: Arc<Self>, shutdown: CancellationToken) {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(LENDING) => {}
            }
            let levels: Vec<Arc<Level>> = self.levels.lock().values().cloned().collect();
            share::lend(&levels);
        }
    }
}

/// How many seats a request takes. `count`: the objects of its resource.
fn width(info: &RequestInfo, count: usize) -> usize {
    if info.verb != "list" {
        return 1;
    }
    let limit = info.param("limit").and_then(|limit| limit.parse().ok()).filter(|limit| *limit > 0);
    let count = limit.map_or(count, |limit: usize| limit.min(count));
    count.div_ceil(OBJECTS_PER_SEAT).clamp(1, MOST_SEATS)
}
