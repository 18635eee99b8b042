//! A priority level: its seats, and queues for requests that find none. A flow's requests go to the shortest of a few
//! queues that are always the same for it, so that one flow cannot fill them all; queues are served in turn.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderValue;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::registry::object::ObjectExt;

/// There are too many before this request.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused;

/// What a `PriorityLevelConfiguration` says, in seats.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Everybody has a seat.
    pub exempt: bool,
    /// Its seats when nothing is lent or borrowed.
    pub nominal: usize,
    /// The fewest and the most when something is.
    pub least: usize,
    pub most: usize,
    queues: usize,
    hand: usize,
    longest: usize,
}

/// The part of all seats that a level asks for.
pub fn shares(object: &Value) -> u64 {
    let spec = &object["spec"];
    let (part, default) = if spec["type"] == "Exempt" { ("exempt", 0) } else { ("limited", 30) };
    let shares = spec.i64_at(&[part, "nominalConcurrencyShares"]).unwrap_or(default);
    u64::try_from(shares).unwrap_or(0)
}

impl Settings {
    /// `shares`: those of all levels together.
    pub fn read(object: &Value, total: usize, shares: u64) -> Self {
        let spec = &object["spec"];
        let exempt = spec["type"] == "Exempt";
        let part = &spec[if exempt { "exempt" } else { "limited" }];
        let own = self::shares(object);
        let nominal = usize::try_from((total as u64 * own).div_ceil(shares.max(1))).unwrap_or(total);
        let percent = |field: &str| part.i64_at(&[field]).and_then(|percent| usize::try_from(percent).ok());
        let lendable = (nominal * percent("lendablePercent").unwrap_or(0)).div_ceil(100).min(nominal);
        let borrowed = percent("borrowingLimitPercent").map_or(total, |percent| (nominal * percent).div_ceil(100));
        let response = &part["limitResponse"];
        let queuing = &response["queuing"];
        let number = |field: &str, default: usize| {
            let given = queuing.i64_at(&[field]).and_then(|number| usize::try_from(number).ok());
            given.unwrap_or(default).max(1)
        };
        let queues = if response["type"] == "Queue" { number("queues", 64) } else { 0 };
        Self {
            exempt,
            nominal,
            least: nominal - lendable,
            most: nominal.saturating_add(borrowed).min(total.max(1)),
            queues,
            hand: number("handSize", 8).min(queues.max(1)),
            longest: number("queueLengthLimit", 50),
        }
    }
}

pub struct Level {
    pub uid: HeaderValue,
    state: Mutex<State>,
}

struct State {
    settings: Settings,
    /// Its seats at present.
    limit: usize,
    taken: usize,
    queues: Vec<VecDeque<Waiting>>,
    /// The queue whose turn it is.
    turn: usize,
    waiting: usize,
    /// The most seats that were wanted at once since it was asked last.
    peak: usize,
}

struct Waiting {
    width: usize,
    call: oneshot::Sender<Seats>,
}

/// Seats of a level, given back when dropped.
pub struct Seats {
    level: Arc<Level>,
    width: usize,
}

impl Drop for Seats {
    fn drop(&mut self) {
        if self.width > 0 {
            self.level.clone().give_back(self.width);
        }
    }
}

impl Level {
    pub fn new(uid: &str, settings: Settings) -> Self {
        let queues = (0..settings.queues).map(|_| VecDeque::new()).collect();
        let state = State { limit: settings.nominal, settings, taken: 0, queues, turn: 0, waiting: 0, peak: 0 };
        let uid = HeaderValue::from_str(uid).unwrap_or_else(|_| HeaderValue::from_static(""));
        Self { uid, state: Mutex::new(state) }
    }

    /// New settings; those who wait keep waiting where they are.
    pub fn set(&self, settings: Settings) {
        let mut state = self.state.lock();
        if state.settings == settings {
            return;
        }
        let queues =
            settings.queues.max(state.queues.iter().rposition(|queue| !queue.is_empty()).map_or(0, |at| at + 1));
        state.queues.resize_with(queues, VecDeque::new);
        state.limit = settings.nominal;
        state.settings = settings;
    }

    /// Its settings, and how many seats were wanted at most since the last time.
    pub fn demand(&self) -> (Settings, usize) {
        let mut state = self.state.lock();
        let now = state.taken + state.waiting;
        let peak = std::mem::replace(&mut state.peak, now).max(now);
        (state.settings.clone(), peak)
    }

    pub fn limit_to(self: &Arc<Self>, limit: usize) {
        let called = {
            let mut state = self.state.lock();
            state.limit = limit;
            state.call()
        };
        self.seat(called);
    }

    /// Waits for seats, at most for so long.
    pub async fn enter(self: &Arc<Self>, flow: u64, width: usize, patience: Duration) -> Result<Seats, Refused> {
        let mut called = {
            let mut state = self.state.lock();
            if state.settings.exempt {
                return Ok(Seats { level: self.clone(), width: 0 });
            }
            let width = width.min(state.settings.nominal.max(1));
            state.peak = state.peak.max(state.taken + state.waiting + width);
            if state.waiting == 0 && state.has_room(width) {
                state.taken += width;
                return Ok(Seats { level: self.clone(), width });
            }
            let (call, called) = oneshot::channel();
            state.wait(flow, Waiting { width, call })?;
            called
        };
        match timeout(patience, &mut called).await {
            Ok(Ok(seats)) => Ok(seats),
            // Whoever goes away unseated is passed over when its turn comes; seats that come too late are dropped with
            // the channel, and so given back.
            _ => Err(Refused),
        }
    }

    fn give_back(self: Arc<Self>, width: usize) {
        let called = {
            let mut state = self.state.lock();
            state.taken -= width;
            state.call()
        };
        self.seat(called);
    }

    /// Seats those whose turn it is. Must not be called under the lock: seats nobody takes are given back at once.
    fn seat(self: &Arc<Self>, called: Vec<Waiting>) {
        for Waiting { width, call } in called {
            drop(call.send(Seats { level: self.clone(), width }));
        }
    }
}

impl State {
    /// A level without seats lets one request through at a time: nothing waits for ever.
    fn has_room(&self, width: usize) -> bool {
        self.taken == 0 || self.taken + width <= self.limit
    }

    fn wait(&mut self, flow: u64, waiting: Waiting) -> Result<(), Refused> {
        if self.settings.queues == 0 {
            return Err(Refused);
        }
        let queue = self.shortest_of_hand(flow);
        // Those who have gone take no place.
        let queue = &mut self.queues[queue];
        let before: usize = queue.iter().map(|waiting| waiting.width).sum();
        queue.retain(|waiting| !waiting.call.is_closed());
        self.waiting -= before - queue.iter().map(|waiting| waiting.width).sum::<usize>();
        if queue.len() >= self.settings.longest {
            return Err(Refused);
        }
        self.waiting += waiting.width;
        queue.push_back(waiting);
        Ok(())
    }

    /// A hand of different queues is dealt to each flow, as cards are: always the same.
    fn shortest_of_hand(&self, mut flow: u64) -> usize {
        let queues = self.settings.queues;
        let mut hand: Vec<usize> = Vec::with_capacity(self.settings.hand);
        for dealt in 0..self.settings.hand {
            let left = (queues - dealt) as u64;
            let mut card = usize::try_from(flow % left).unwrap_or(0);
            flow /= left;
            hand.sort_unstable();
            for other in &hand {
                if *other <= card {
                    card += 1;
                }
            }
            hand.push(card);
        }
        hand.into_iter().min_by_key(|queue| self.queues[*queue].len()).unwrap_or(0)
    }

    /// Takes those from the queues for whom there is room now.
    fn call(&mut self) -> Vec<Waiting> {
        let mut called = Vec::new();
        while let Some(at) = self.next_queue() {
            let Some(width) = self.queues[at].front().map(|waiting| waiting.width) else { break };
            let is_gone = self.queues[at].front().is_some_and(|waiting| waiting.call.is_closed());
            if !is_gone && !self.has_room(width) {
                break;
            }
            let Some(waiting) = self.queues[at].pop_front() else { break };
            self.waiting -= width;
            if !is_gone {
                self.turn = at + 1;
                self.taken += width;
                called.push(waiting);
            }
        }
        called
    }

    fn next_queue(&self) -> Option<usize> {
        let count = self.queues.len();
        (0..count).map(|step| (self.turn + step) % count).find(|at| !self.queues[*at].is_empty())
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use serde_json::json;

    use super::*;

    fn level(nominal: i64, limited: Value) -> Arc<Level> {
        let mut object = json!({"spec": {"type": "Limited", "limited": limited}});
        object["spec"]["limited"]["nominalConcurrencyShares"] = nominal.into();
        let total = usize::try_from(nominal).unwrap();
        Arc::new(Level::new("uid", Settings::read(&object, total, u64::try_from(nominal).unwrap())))
    }

    fn queued() -> Value {
        json!({"limitResponse": {"type": "Queue", "queuing": {"queues": 4, "handSize": 1, "queueLengthLimit": 2}}})
    }

    const LONG: Duration = Duration::from_secs(10);

    #[test]
    fn seats_are_parts_of_all() {
        let object = json!({"spec": {"type": "Limited", "limited": {
            "nominalConcurrencyShares": 10, "lendablePercent": 50, "borrowingLimitPercent": 100}}});
        let settings = Settings::read(&object, 600, 245);
        assert_eq!((settings.nominal, settings.least, settings.most), (25, 12, 50));
        let exempt = Settings::read(&json!({"spec": {"type": "Exempt"}}), 600, 245);
        assert!(exempt.exempt && exempt.nominal == 0);
    }

    #[tokio::test]
    async fn those_without_a_seat_are_refused_or_wait() {
        let rejecting = level(1, json!({"limitResponse": {"type": "Reject"}}));
        let first = rejecting.enter(0, 1, LONG).await.unwrap();
        assert!(rejecting.enter(0, 1, LONG).await.is_err());
        drop(first);
        assert!(rejecting.enter(0, 1, LONG).await.is_ok());

        let queuing = level(1, queued());
        let first = queuing.enter(0, 1, LONG).await.unwrap();
        let mut second = Box::pin(queuing.enter(0, 1, LONG));
        let mut third = Box::pin(queuing.enter(0, 1, LONG));
        assert!(second.as_mut().now_or_never().is_none() && third.as_mut().now_or_never().is_none());
        // The queue of this flow is full; another flow has its own.
        assert!(queuing.enter(0, 1, LONG).now_or_never().unwrap().is_err());
        let mut other = Box::pin(queuing.enter(1, 1, LONG));
        assert!(other.as_mut().now_or_never().is_none());
        drop(first);
        let second = second.now_or_never().unwrap().unwrap();
        assert!(third.as_mut().now_or_never().is_none());
        drop(second);
        // In turn: the other flow does not wait for the whole queue of the first.
        let other = other.now_or_never().unwrap().unwrap();
        assert!(third.as_mut().now_or_never().is_none());
        drop(other);
        assert!(third.now_or_never().unwrap().is_ok());
    }

    #[tokio::test]
    async fn patience_ends_and_nothing_is_lost() {
        let level = level(1, queued());
        let first = level.enter(0, 1, LONG).await.unwrap();
        assert!(level.enter(0, 1, Duration::from_millis(5)).await.is_err());
        drop(first);
        assert_eq!(level.state.lock().taken, 0);
        assert!(level.enter(0, 1, LONG).now_or_never().unwrap().is_ok());
    }

    #[tokio::test]
    async fn wide_requests_take_many_seats() {
        let level = level(3, queued());
        let wide = level.enter(0, 10, LONG).await.unwrap();
        assert_eq!(level.state.lock().taken, 3);
        let mut next = Box::pin(level.enter(0, 1, LONG));
        assert!(next.as_mut().now_or_never().is_none());
        drop(wide);
        assert!(next.now_or_never().unwrap().is_ok());
    }
}
