//! What the turns have measured, and the tables that people read. Pure: no clock, no servers.

use std::collections::BTreeMap;
use std::time::Duration;

use super::load::Cost;
use super::rows::{Row, Unit};
use crate::bench::report::{median, percentile, table};

/// The figures of one row on one side, turn by turn.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// One for each turn, in the row's unit.
    values: Vec<f64>,
    costs: Vec<Cost>,
}

/// Ours first, then upstream's.
pub type Results = BTreeMap<Row, [Figures; 2]>;

impl Figures {
    pub fn add_cost(&mut self, cost: Cost) {
        if cost.requests > 0 {
            self.values.push(cost.server_cpu.as_secs_f64() / cost.requests as f64);
            self.costs.push(cost);
        }
    }

    pub fn add_value(&mut self, value: f64) {
        self.values.push(value);
    }

    /// The median of the turns: one that a busy neighbour spoiled does not count.
    pub fn value(&self) -> Option<f64> {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        Some((sorted.get((sorted.len().checked_sub(1)?) / 2)? + sorted.get(sorted.len() / 2)?) / 2.0)
    }

    fn per_request(&self, pick: impl Fn(&Cost) -> f64) -> Option<f64> {
        let requests: usize = self.costs.iter().map(|cost| cost.requests).sum();
        (requests > 0).then(|| self.costs.iter().map(pick).sum::<f64>() / requests as f64)
    }

    fn latencies(&self) -> Vec<Duration> {
        self.costs.iter().flat_map(|cost| cost.latencies.iter().copied()).collect()
    }
}

/// Each row beside upstream's, with the ratio, its target and whether it is met.
pub fn summary(results: &Results) -> String {
    let header = ["work", "Ketch", "upstream", "upstream ÷ Ketch", "target", "met"].map(str::to_owned);
    let rows = results.iter().map(|(row, [ours, theirs])| {
        let (ours, theirs) = (ours.value(), theirs.value());
        let ratio = ours.zip(theirs).filter(|(ours, _)| *ours > 0.0).map(|(ours, theirs)| theirs / ours);
        let met = row.target().zip(ratio).map(|(target, ratio)| if ratio >= target { "yes" } else { "NO" });
        vec![
            row.name().to_owned(),
            show(ours, row.unit()),
            show(theirs, row.unit()),
            ratio.map_or_else(dash, |ratio| format!("{ratio:.1}×")),
            row.target().map_or_else(dash, |target| format!("{target:.0}×")),
            met.map_or_else(dash, str::to_owned),
        ]
    });
    table(&header, &rows.collect::<Vec<_>>())
}

/// What else each request costs, and how long it takes.
pub fn details(results: &Results) -> String {
    let header =
        ["work", "side", "requests", "server CPU by turn", "etcd CPU", "bytes received", "p50", "p99", "per second"];
    let mut rows = Vec::new();
    for (row, both) in results.iter().filter(|(row, _)| row.unit() == Unit::Cpu) {
        for (side, figures) in ["Ketch", "upstream"].into_iter().zip(both) {
            rows.push(detail(*row, side, figures));
        }
    }
    table(&header.map(str::to_owned), &rows)
}

fn detail(row: Row, side: &str, figures: &Figures) -> Vec<String> {
    let latencies = figures.latencies();
    let turns: Vec<String> = figures.values.iter().map(|value| duration(*value)).collect();
    let wall = figures.per_request(|cost| cost.wall.as_secs_f64()).filter(|wall| *wall > 0.0);
    vec![
        row.name().to_owned(),
        side.to_owned(),
        figures.costs.iter().map(|cost| cost.requests).sum::<usize>().to_string(),
        turns.join(" / "),
        figures.per_request(|cost| cost.etcd_cpu.as_secs_f64()).map_or_else(dash, duration),
        figures.per_request(|cost| cost.received as f64).map_or_else(dash, |bytes| format!("{bytes:.0}")),
        median(&latencies).map_or_else(dash, duration),
        percentile(&latencies, 99).map_or_else(dash, duration),
        wall.map_or_else(dash, |wall| format!("{:.1}", 1.0 / wall)),
    ]
}

fn dash() -> String {
    "–".into()
}

fn show(value: Option<f64>, unit: Unit) -> String {
    let Some(value) = value else { return dash() };
    match unit {
        Unit::Cpu => duration(value),
        Unit::Seconds => format!("{value:.3} s"),
        Unit::Mebibytes => format!("{value:.1} MiB"),
    }
}

/// Seconds with three digits that matter.
fn duration(seconds: f64) -> String {
    let (value, unit) = match seconds {
        s if s >= 1.0 => (s, "s"),
        s if s >= 1e-3 => (s * 1e3, "ms"),
        s => (s * 1e6, "µs"),
    };
    let digits = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(requests: usize, cpu_ms: u64) -> Cost {
        Cost {
            requests,
            server_cpu: Duration::from_millis(cpu_ms),
            received: 5000,
            wall: Duration::from_secs(1),
            latencies: vec![Duration::from_millis(2); requests],
            ..Cost::default()
        }
    }

    fn results() -> Results {
        let mut results = Results::new();
        let [ours, theirs] = results.entry(Row::GetPod).or_default();
        for cpu in [100, 900, 200] {
            ours.add_cost(cost(1000, cpu));
        }
        theirs.add_cost(cost(1000, 1000));
        let [ours, theirs] = results.entry(Row::MemoryFresh).or_default();
        ours.add_value(50.0);
        theirs.add_value(200.0);
        results.entry(Row::StartFresh).or_default()[0].add_value(0.25);
        results
    }

    #[test]
    fn rows_say_whether_the_target_is_met() {
        let text = summary(&results());
        let cells = |name: &str| -> Vec<String> {
            let line = text.lines().find(|line| line.contains(name)).unwrap_or_else(|| panic!("no {name} in\n{text}"));
            line.split('|').map(|cell| cell.trim().to_owned()).filter(|cell| !cell.is_empty()).skip(1).collect()
        };
        assert_eq!(cells("get a pod"), ["200 µs", "1.00 ms", "5.0×", "4×", "yes"], "the median turn counts");
        assert_eq!(cells("memory, fresh"), ["50.0 MiB", "200.0 MiB", "4.0×", "8×", "NO"]);
        assert_eq!(cells("start to ready, fresh"), ["0.250 s", "–", "–", "10×", "–"], "one side was not measured");
    }

    #[test]
    fn details_are_per_request() {
        let text = details(&results());
        let line = text.lines().find(|line| line.contains("Ketch")).unwrap();
        for part in ["3000", "100 µs / 900 µs / 200 µs", " 5 ", "2.00 ms", "1000.0"] {
            assert!(line.contains(part), "no {part} in {line}");
        }
        assert!(!text.contains("memory"), "memory has no requests");
    }

    #[test]
    fn durations_have_three_digits() {
        for (seconds, expected) in [(1.234, "1.23 s"), (0.0456, "45.6 ms"), (0.000_789, "789 µs"), (2e-6, "2.00 µs")]
        {
            assert_eq!(duration(seconds), expected);
        }
    }
}
