//! Sends requests from a few workers at once and measures what they cost the server. The first wrong answer ends the
//! measurement: figures of a server that answers wrongly mean nothing.

use std::cell::RefCell;
use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::time::sleep;

use super::client::{Answer, Request};
use super::side::{Counters, Side};

/// Both sides are left alone for this long before each measurement.
const QUIET: Duration = Duration::from_millis(300);

/// What one turn has cost.
#[derive(Clone, Debug, Default)]
pub struct Cost {
    pub requests: usize,
    pub server_cpu: Duration,
    pub etcd_cpu: Duration,
    /// Bytes on the wire, TLS included.
    pub received: u64,
    pub wall: Duration,
    pub latencies: Vec<Duration>,
}

impl Cost {
    /// From the counters before and after.
    pub fn between(before: Counters, after: Counters, requests: usize, latencies: Vec<Duration>) -> Self {
        Self {
            requests,
            server_cpu: after.server_cpu.saturating_sub(before.server_cpu),
            etcd_cpu: after.etcd_cpu.saturating_sub(before.etcd_cpu),
            received: after.received.saturating_sub(before.received),
            wall: after.at - before.at,
            latencies,
        }
    }
}

pub async fn quiet() {
    sleep(QUIET).await;
}

/// A kind of request, and what its answer must be. Request `index` is always the same worker's, who waits for each
/// answer: indices that are equal modulo the workers never run at the same time.
pub trait Requests {
    const WORKERS: usize;

    fn request(&self, side: &Side, index: usize) -> Request;

    /// `floor`: the highest version that was answered to anybody before the request was sent.
    fn check(&self, side: &Side, index: usize, floor: u64, answer: &Answer) -> Result<()>;
}

/// Sends the requests of the range; every answer is checked, outside of its latency.
pub async fn run<R: Requests>(side: &Side, requests: &R, range: Range<usize>) -> Result<Cost> {
    quiet().await;
    let latencies = RefCell::new(Vec::with_capacity(range.len()));
    let before = side.counters()?;
    let workers = (0..R::WORKERS).map(|worker| {
        let connection = &side.connections[worker % side.connections.len()];
        let (latencies, range) = (&latencies, range.clone());
        async move {
            let first = range.start + (worker + R::WORKERS - range.start % R::WORKERS) % R::WORKERS;
            for index in (first..range.end).step_by(R::WORKERS) {
                let request = requests.request(side, index);
                let floor = side.floor();
                let answer = connection.ask(&request).await?;
                latencies.borrow_mut().push(answer.latency);
                requests
                    .check(side, index, floor, &answer)
                    .with_context(|| format!("{} {}", request.method, request.path))?;
            }
            anyhow::Ok(())
        }
    });
    futures::future::try_join_all(workers).await?;
    Ok(Cost::between(before, side.counters()?, range.len(), latencies.into_inner()))
}
