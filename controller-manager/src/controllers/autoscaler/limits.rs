//! What stands between a proposed number of replicas and the number that is set: the bounds of the spec, how fast the
//! number may change, and what was proposed shortly before. Pure but for the history, which the caller keeps.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::autoscaling::v2::{HPAScalingPolicy, HPAScalingRules, HorizontalPodAutoscalerBehavior};

use crate::common::{after, seconds};

/// Without a behaviour the number at most doubles, or becomes this.
const UP_AT_LEAST: i32 = 4;

/// What happened to one autoscaler lately. A restart forgets it, and thereby waits no longer for what it has forgotten.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Proposals as they were before any limit.
    proposals: Vec<(Timestamp, i32)>,
    /// By how much the number was raised, and lowered.
    raised: Vec<(Timestamp, i32)>,
    lowered: Vec<(Timestamp, i32)>,
}

/// The proposal and where it is to lie.
pub struct Range {
    pub current: i32,
    pub proposed: i32,
    pub min: i32,
    pub max: i32,
}

/// The number to set, and why: a reason and a message each for the conditions `AbleToScale` and `ScalingLimited`.
#[derive(Debug, PartialEq)]
pub struct Limited {
    pub replicas: i32,
    pub able: (&'static str, &'static str),
    pub limited: bool,
    pub limit: (&'static str, &'static str),
}

const READY: (&str, &str) = ("ReadyForNewScale", "recommended size matches current size");
const DOWN_STABILIZED: (&str, &str) = (
    "ScaleDownStabilized",
    "recent recommendations were higher than current one, applying the highest recent recommendation",
);
const UP_STABILIZED: (&str, &str) = (
    "ScaleUpStabilized",
    "recent recommendations were lower than current one, applying the lowest recent recommendation",
);
const WITHIN: (&str, &str) = ("DesiredWithinRange", "the desired count is within the acceptable range");
const TOO_FEW: (&str, &str) = ("TooFewReplicas", "the desired replica count is less than the minimum replica count");
const TOO_MANY: (&str, &str) = ("TooManyReplicas", "the desired replica count is more than the maximum replica count");
const UP_LIMIT: (&str, &str) =
    ("ScaleUpLimit", "the desired replica count is increasing faster than the maximum scale rate");
const DOWN_LIMIT: (&str, &str) =
    ("ScaleDownLimit", "the desired replica count is decreasing faster than the maximum scale rate");

impl History {
    /// The first thing that is known of an autoscaler: until a window has passed, nothing goes below the number found.
    pub fn begin(&mut self, current: i32, now: Timestamp) {
        if self.proposals.is_empty() {
            self.proposals.push((now, current));
        }
    }

    /// Remembers a change that was made, as far as the policies of the behaviour ask about it.
    pub fn changed(&mut self, behavior: Option<&HorizontalPodAutoscalerBehavior>, from: i32, to: i32, now: Timestamp) {
        let Some(behavior) = behavior else { return };
        let (rules, list) = if to > from {
            (behavior.scale_up.as_ref(), &mut self.raised)
        } else {
            (behavior.scale_down.as_ref(), &mut self.lowered)
        };
        let longest = policies(rules, if to > from { UP_POLICIES } else { DOWN_POLICIES })
            .iter()
            .map(|policy| policy.period)
            .max();
        let longest = longest.unwrap_or_default();
        list.retain(|(time, _)| !is_older(*time, longest, now));
        list.push((now, (to - from).abs()));
    }

    /// Limits a proposal and remembers it. `window` is how long smaller numbers wait, unless the behaviour says it.
    pub fn limit(
        &mut self,
        behavior: Option<&HorizontalPodAutoscalerBehavior>,
        window: Duration,
        range: &Range,
        now: Timestamp,
    ) -> Limited {
        let (stable, able, (replicas, limit)) = match behavior {
            None => {
                let stable = self.stabilize(window, range.proposed, now);
                (stable, DOWN_STABILIZED, limit_plainly(range, stable))
            }
            Some(behavior) => {
                let stable = self.stabilize_both(behavior, window, range, now);
                let able = if range.proposed >= range.current { UP_STABILIZED } else { DOWN_STABILIZED };
                (stable, able, self.limit_rate(behavior, range, stable, now))
            }
        };
        let able = if stable == range.proposed { READY } else { able };
        Limited { replicas, able, limited: replicas != stable, limit }
    }

    /// The largest of the proposals of the window.
    fn stabilize(&mut self, window: Duration, proposed: i32, now: Timestamp) -> i32 {
        self.proposals.retain(|(time, _)| !is_older(*time, window, now));
        let largest = self.proposals.iter().map(|(_, replicas)| *replicas).fold(proposed, i32::max);
        self.proposals.push((now, proposed));
        largest
    }

    /// The current number, moved as little as the proposals of both windows agree on.
    fn stabilize_both(
        &mut self,
        behavior: &HorizontalPodAutoscalerBehavior,
        window: Duration,
        range: &Range,
        now: Timestamp,
    ) -> i32 {
        let window_of = |rules: &Option<HPAScalingRules>, default: Duration| {
            rules.as_ref().and_then(|rules| rules.stabilization_window_seconds).map_or(default, seconds)
        };
        let up = window_of(&behavior.scale_up, Duration::ZERO);
        let down = window_of(&behavior.scale_down, window);
        let within = |window: Duration| self.proposals.iter().filter(move |(time, _)| is_within(*time, window, now));
        let lowest = within(up).map(|(_, replicas)| *replicas).fold(range.proposed, i32::min);
        let highest = within(down).map(|(_, replicas)| *replicas).fold(range.proposed, i32::max);
        self.proposals.retain(|(time, _)| !is_older(*time, up.max(down), now));
        self.proposals.push((now, range.proposed));
        range.current.max(lowest).min(highest)
    }

    fn limit_rate(
        &self,
        behavior: &HorizontalPodAutoscalerBehavior,
        range: &Range,
        stable: i32,
        now: Timestamp,
    ) -> (i32, (&'static str, &'static str)) {
        if stable > range.current {
            let most = self.most(behavior.scale_up.as_ref(), range.current, now).max(range.current);
            let (most, why) = if range.max > most { (most, UP_LIMIT) } else { (range.max, TOO_MANY) };
            if stable > most {
                return (most, why);
            }
        } else if stable < range.current {
            let least = self.least(behavior.scale_down.as_ref(), range.current, now).min(range.current);
            let (least, why) = if range.min < least { (least, DOWN_LIMIT) } else { (range.min, TOO_FEW) };
            if stable < least {
                return (least, why);
            }
        }
        (stable, WITHIN)
    }

    /// The most replicas that the policies allow now.
    fn most(&self, rules: Option<&HPAScalingRules>, current: i32, now: Timestamp) -> i32 {
        let allowed = policies(rules, UP_POLICIES).into_iter().map(|policy| {
            let start = self.at_start(policy.period, current, now);
            match policy.amount {
                Amount::Pods(pods) => start.saturating_add(pods),
                // Rounded up, or few replicas would never become more.
                Amount::Percent(percent) => (f64::from(start) * (1.0 + f64::from(percent) / 100.0)).ceil() as i32,
            }
        });
        match rules.and_then(|rules| rules.select_policy.as_deref()) {
            Some("Disabled") => current,
            Some("Min") => allowed.min().unwrap_or(current),
            _ => allowed.max().unwrap_or(current),
        }
    }

    /// The fewest replicas that the policies allow now.
    fn least(&self, rules: Option<&HPAScalingRules>, current: i32, now: Timestamp) -> i32 {
        let allowed = policies(rules, DOWN_POLICIES).into_iter().map(|policy| {
            let start = self.at_start(policy.period, current, now);
            match policy.amount {
                Amount::Pods(pods) => start.saturating_sub(pods),
                Amount::Percent(percent) => (f64::from(start) * (1.0 - f64::from(percent) / 100.0)) as i32,
            }
        });
        match rules.and_then(|rules| rules.select_policy.as_deref()) {
            Some("Disabled") => current,
            Some("Min") => allowed.max().unwrap_or(current),
            _ => allowed.min().unwrap_or(current),
        }
    }

    /// How many replicas there were when the period that ends now began.
    fn at_start(&self, period: Duration, current: i32, now: Timestamp) -> i32 {
        let sum = |list: &[(Timestamp, i32)]| {
            list.iter()
                .filter(|(time, _)| is_within(*time, period, now))
                .fold(0, |sum: i32, (_, by)| sum.saturating_add(*by))
        };
        current.saturating_sub(sum(&self.raised)).saturating_add(sum(&self.lowered))
    }
}

/// The bounds, and at most twice as many as there are.
fn limit_plainly(range: &Range, stable: i32) -> (i32, (&'static str, &'static str)) {
    let most = range.current.saturating_mul(2).max(UP_AT_LEAST);
    let (most, why) = if range.max > most { (most, UP_LIMIT) } else { (range.max, TOO_MANY) };
    if stable < range.min {
        (range.min, TOO_FEW)
    } else if stable > most {
        (most, why)
    } else {
        (stable, WITHIN)
    }
}

#[derive(Clone, Copy)]
enum Amount {
    Pods(i32),
    Percent(i32),
}

#[derive(Clone, Copy)]
struct Policy {
    amount: Amount,
    period: Duration,
}

const QUARTER: Duration = Duration::from_secs(15);
/// The API's defaults, for rules that name no policy.
const UP_POLICIES: &[Policy] =
    &[Policy { amount: Amount::Pods(4), period: QUARTER }, Policy { amount: Amount::Percent(100), period: QUARTER }];
const DOWN_POLICIES: &[Policy] = &[Policy { amount: Amount::Percent(100), period: QUARTER }];

fn policies(rules: Option<&HPAScalingRules>, default: &[Policy]) -> Vec<Policy> {
    let policy = |policy: &HPAScalingPolicy| Policy {
        amount: if policy.type_ == "Pods" { Amount::Pods(policy.value) } else { Amount::Percent(policy.value) },
        period: seconds(policy.period_seconds),
    };
    match rules.and_then(|rules| rules.policies.as_deref()) {
        Some(policies) if !policies.is_empty() => policies.iter().map(policy).collect(),
        _ => default.to_vec(),
    }
}

/// Later than the beginning of the window.
fn is_within(time: Timestamp, window: Duration, now: Timestamp) -> bool {
    after(time, window) > now
}

/// Earlier than the beginning of the window.
fn is_older(time: Timestamp, window: Duration, now: Timestamp) -> bool {
    after(time, window) < now
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// Rules with up to two policies, each an amount and a period in seconds; 0 leaves one out.
    fn rules(pods: (i32, i32), percent: (i32, i32), window: i32) -> Value {
        let policy = |type_: &str, (value, period): (i32, i32)| {
            (value != 0).then(|| json!({"type": type_, "value": value, "periodSeconds": period}))
        };
        let policies: Vec<_> = policy("Pods", pods).into_iter().chain(policy("Percent", percent)).collect();
        json!({"policies": policies, "selectPolicy": "Max", "stabilizationWindowSeconds": window})
    }

    /// Changes spread evenly over the 120 seconds before second 1000.
    fn spread(changes: &[i32]) -> Vec<(Timestamp, i32)> {
        let segment = 120.0 / changes.len() as f64;
        let time = |index: usize| 1000 - (120.0 - segment * (index as f64 + 1.0) + segment / 2.0) as i64;
        changes.iter().enumerate().map(|(index, change)| (at(time(index)), *change)).collect()
    }

    #[test]
    fn without_a_behaviour_bounds_and_doubling_limit() {
        for (current, proposed, min, max, replicas, reason) in [
            (5, 7, 3, 8, 7, "DesiredWithinRange"),
            (3, 1, 2, 8, 2, "TooFewReplicas"),
            (1, 0, 0, 10, 0, "DesiredWithinRange"),
            (20, 1000, 1, 10, 10, "TooManyReplicas"),
            (3, 1000, 1, 2000, 6, "ScaleUpLimit"),
            (1, 1000, 1, 2000, 4, "ScaleUpLimit"),
        ] {
            let range = Range { current, proposed, min, max };
            let limited = History::default().limit(None, Duration::from_secs(300), &range, at(1000));
            assert_eq!((limited.replicas, limited.limit.0), (replicas, reason), "{current} to {proposed}");
            assert_eq!((limited.limited, limited.able), (replicas != proposed, READY));
        }
    }

    #[test]
    fn a_window_keeps_the_largest_of_its_proposals() {
        let mut history = History { proposals: vec![(at(400), 10), (at(940), 4)], ..History::default() };
        let range = Range { current: 4, proposed: 2, min: 1, max: 5 };
        let limited = history.limit(None, Duration::from_secs(300), &range, at(1000));
        assert_eq!((limited.replicas, limited.able.0), (4, "ScaleDownStabilized"));
        assert_eq!(history.proposals, [(at(940), 4), (at(1000), 2)]);
    }

    /// Upstream's table for the rates of behaviours.
    #[test]
    fn policies_limit_the_rate() {
        type Case = (&'static [i32], &'static [i32], (i32, i32), (i32, i32), (i32, i32), (i32, &'static str));
        let up: &[(Case, (i32, i32))] = &[
            ((&[], &[], (0, 0), (1, 60), (1, 2000), (4, "ScaleUpLimit")), (3, 1000)),
            ((&[], &[], (0, 0), (0, 0), (1, 1000), (20, "ScaleUpLimit")), (10, 50)),
            ((&[], &[], (100, 60), (100, 60), (1, 1000), (110, "ScaleUpLimit")), (10, 500)),
            ((&[], &[], (2, 60), (100, 60), (1, 1000), (20, "ScaleUpLimit")), (10, 500)),
            ((&[], &[], (100, 60), (0, 0), (1, 1000), (50, "DesiredWithinRange")), (10, 50)),
            ((&[], &[], (30, 60), (0, 0), (1, 1000), (40, "ScaleUpLimit")), (10, 50)),
            ((&[], &[], (0, 0), (200, 60), (1, 1000), (30, "ScaleUpLimit")), (10, 50)),
            ((&[], &[], (0, 0), (0, 0), (100, 150), (150, "TooManyReplicas")), (100, 1000)),
            ((&[1, 5, 9], &[], (300, 60), (0, 0), (1, 200), (200, "TooManyReplicas")), (100, 500)),
            ((&[1, 5, 9], &[], (5, 120), (0, 0), (1, 1000), (100, "ScaleUpLimit")), (100, 500)),
            ((&[1, 5, 9], &[], (150, 120), (0, 0), (1, 1000), (235, "ScaleUpLimit")), (100, 500)),
            ((&[1, 5, 9], &[], (0, 0), (200, 120), (1, 1000), (255, "ScaleUpLimit")), (100, 500)),
            ((&[4], &[2], (0, 0), (300, 300), (1, 1000), (16, "ScaleUpLimit")), (6, 24)),
            ((&[8, 12, 9, 11], &[], (1000, 120), (100, 60), (1, 1000), (200, "DesiredWithinRange")), (100, 200)),
        ];
        let down: &[(Case, (i32, i32))] = &[
            ((&[], &[], (0, 0), (0, 0), (2, 8), (2, "TooFewReplicas")), (3, 1)),
            ((&[], &[], (100, 60), (0, 0), (1, 1000), (1, "TooFewReplicas")), (10, 0)),
            ((&[], &[], (0, 0), (100, 60), (5, 1000), (5, "TooFewReplicas")), (10, 2)),
            ((&[], &[], (5, 60), (0, 0), (1, 1000), (5, "ScaleDownLimit")), (10, 2)),
            ((&[], &[], (0, 0), (50, 60), (1, 1000), (5, "DesiredWithinRange")), (10, 5)),
            ((&[], &[1, 5, 9], (115, 120), (0, 0), (1, 1000), (1, "TooFewReplicas")), (100, 0)),
            ((&[], &[1, 5, 9], (5, 120), (0, 0), (1, 1000), (100, "ScaleDownLimit")), (100, 2)),
            ((&[], &[2, 4, 6], (0, 0), (50, 120), (1, 1000), (56, "ScaleDownLimit")), (100, 0)),
            ((&[2], &[4], (0, 0), (50, 180), (1, 1000), (6, "ScaleDownLimit")), (10, 1)),
            ((&[], &[10, 10, 10], (0, 0), (10, 120), (1, 1000), (100, "ScaleDownLimit")), (100, 0)),
            ((&[], &[10, 10, 10], (0, 0), (1000, 120), (1, 1000), (5, "DesiredWithinRange")), (10, 5)),
            ((&[], &[8, 12, 9, 11], (1000, 30), (100, 60), (1, 1000), (5, "DesiredWithinRange")), (100, 5)),
        ];
        for (direction, cases) in [("scaleUp", up), ("scaleDown", down)] {
            for ((raised, lowered, pods, percent, (min, max), (replicas, reason)), (current, proposed)) in cases {
                let history = History { raised: spread(raised), lowered: spread(lowered), ..History::default() };
                let behavior = serde_json::from_value(json!({direction: rules(*pods, *percent, 0)})).unwrap();
                let range = Range { current: *current, proposed: *proposed, min: *min, max: *max };
                let (limited, why) = history.limit_rate(&behavior, &range, *proposed, at(1000));
                assert_eq!(
                    (limited, why.0),
                    (*replicas, *reason),
                    "{direction} {current} to {proposed}, {pods:?} {percent:?}"
                );
            }
        }
    }

    #[test]
    fn of_several_policies_one_is_selected() {
        let behavior = |direction: &str, select: &str| -> HorizontalPodAutoscalerBehavior {
            let mut rules = rules((2, 60), (50, 60), 300);
            rules["selectPolicy"] = json!(select);
            serde_json::from_value(json!({direction: rules})).unwrap()
        };
        let history = History::default();
        for (select, most) in [("Min", 2), ("Max", 3), ("Disabled", 1)] {
            assert_eq!(history.most(behavior("scaleUp", select).scale_up.as_ref(), 1, at(0)), most, "{select}");
        }
        for (select, least) in [("Min", 3), ("Max", 2), ("Disabled", 5)] {
            assert_eq!(history.least(behavior("scaleDown", select).scale_down.as_ref(), 5, at(0)), least, "{select}");
        }
    }

    #[test]
    fn both_windows_hold_the_number() {
        let behavior: HorizontalPodAutoscalerBehavior = serde_json::from_value(
            json!({"scaleUp": rules((0, 0), (900, 60), 60), "scaleDown": rules((0, 0), (100, 60), 120)}),
        )
        .unwrap();
        for (proposals, current, proposed, replicas, able) in [
            (vec![(970, 12)], 10, 20, 12, "ScaleUpStabilized"),
            (vec![(930, 12)], 10, 20, 20, "ReadyForNewScale"),
            (vec![(930, 8)], 10, 5, 8, "ScaleDownStabilized"),
            (vec![(870, 8)], 10, 5, 5, "ReadyForNewScale"),
            (vec![(970, 8), (980, 15)], 10, 20, 10, "ScaleUpStabilized"),
        ] {
            let proposals: Vec<_> = proposals.into_iter().map(|(second, replicas)| (at(second), replicas)).collect();
            let mut history = History { proposals, ..History::default() };
            let range = Range { current, proposed, min: 1, max: 100 };
            let limited = history.limit(Some(&behavior), Duration::from_secs(300), &range, at(1000));
            assert_eq!((limited.replicas, limited.able.0), (replicas, able), "{current} to {proposed}");
        }
    }

    #[test]
    fn changes_are_remembered_as_long_as_a_policy_asks_for_them() {
        let behavior: HorizontalPodAutoscalerBehavior = serde_json::from_value(
            json!({"scaleUp": rules((2, 60), (50, 30), 0), "scaleDown": rules((2, 90), (0, 0), 0)}),
        )
        .unwrap();
        let mut history = History { raised: vec![(at(930), 1), (at(950), 2)], ..History::default() };
        history.changed(Some(&behavior), 5, 8, at(1000));
        history.changed(Some(&behavior), 8, 6, at(1000));
        history.changed(None, 6, 1, at(1000));
        assert_eq!(history.raised, [(at(950), 2), (at(1000), 3)]);
        assert_eq!(history.lowered, [(at(1000), 2)]);
    }
}
