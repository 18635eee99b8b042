//! Turns measurements into the tables that people read: Markdown, aligned so that it reads well in a terminal too.
//! Pure: no clock, no files, no cluster.

use std::time::Duration;

use super::collect::Usage;
use super::latency::Latency;
use crate::cluster::up::Times;

const CONTROL_PLANE: [&str; 3] = ["kube-apiserver", "kube-controller-manager", "kube-scheduler"];
const NODE_PROGRAMS: [&str; 3] = ["kubelet", "kube-proxy", "flanneld"];

/// Everything that is known about one running cluster.
pub struct Measurements {
    pub usage: Vec<Usage>,
    pub latency: Latency,
    /// Missing when the cluster was brought up by a version that did not record it.
    pub up: Option<Times>,
    pub conditions: Conditions,
}

/// What else bears on the figures.
pub struct Conditions {
    pub interval: Duration,
    pub cpus: usize,
    /// Runnable processes of the whole machine, averaged over the minute before the idle interval's end.
    pub load: String,
}

/// A figure that can be compared. `None` when it could not be measured, as of a program that does not run.
struct Figure {
    name: String,
    value: Option<f64>,
    unit: Unit,
}

#[derive(Clone, Copy)]
pub(super) enum Unit {
    Mebibytes,
    Millicores,
    Seconds,
}

/// One cluster's figures, and below them every program on every node.
pub fn single(measured: &Measurements) -> String {
    let rows: Vec<_> = figures(measured).into_iter().map(|f| vec![f.name, show(f.value, f.unit)]).collect();
    let header = ["figure".to_owned(), "value".to_owned()];
    format!("{}\n{}\n{}", table(&header, &rows), processes(measured), footer(&measured.conditions))
}

/// Two clusters' figures beside each other with their ratios; the details of each below.
pub fn comparison(ours: (&str, &Measurements), theirs: (&str, &Measurements)) -> String {
    let rows: Vec<_> = figures(ours.1)
        .into_iter()
        .zip(figures(theirs.1))
        .map(|(a, b)| vec![a.name, show(a.value, a.unit), show(b.value, b.unit), ratio(a.value, b.value)])
        .collect();
    let header = ["figure".to_owned(), ours.0.to_owned(), theirs.0.to_owned(), format!("{} ÷ {}", theirs.0, ours.0)];
    let mut text = table(&header, &rows);
    for (name, measured) in [ours, theirs] {
        text += &format!("\nPrograms of {name}, idle:\n\n{}\n{}", processes(measured), footer(&measured.conditions));
    }
    text
}

/// Always the same figures in the same order.
fn figures(measured: &Measurements) -> Vec<Figure> {
    let mut all = Vec::new();
    let mut add = |name: String, value, unit| all.push(Figure { name, value, unit });
    for (what, pick) in [("Pss", pss as fn(&Usage) -> f64), ("RSS", rss)] {
        let together = together(&measured.usage, &CONTROL_PLANE, pick);
        add(format!("idle {what} of the control plane"), together, Unit::Mebibytes);
        for program in CONTROL_PLANE {
            add(format!("idle {what} of {program}"), per_node(&measured.usage, program, pick), Unit::Mebibytes);
        }
        for program in NODE_PROGRAMS {
            let mean = per_node(&measured.usage, program, pick);
            add(format!("idle {what} of {program}, per node"), mean, Unit::Mebibytes);
        }
    }
    let together = together(&measured.usage, &CONTROL_PLANE, millicores);
    add("idle CPU of the control plane".into(), together, Unit::Millicores);
    for program in NODE_PROGRAMS {
        let mean = per_node(&measured.usage, program, millicores);
        add(format!("idle CPU of {program}, per node"), mean, Unit::Millicores);
    }
    let (ready, gone) = (&measured.latency.ready, &measured.latency.gone);
    add("pod create → Ready, median".into(), median(ready), Unit::Seconds);
    add("pod create → Ready, p99".into(), percentile(ready, 99), Unit::Seconds);
    add("pod delete (grace 1 s) → gone, median".into(), median(gone), Unit::Seconds);
    let up = measured.up;
    add("up → all nodes Ready".into(), up.map(|t| t.nodes_ready.as_secs_f64()), Unit::Seconds);
    add("up → DNS answers".into(), up.map(|t| t.dns_answers.as_secs_f64()), Unit::Seconds);
    all
}

fn pss(usage: &Usage) -> f64 {
    usage.pss
}

fn rss(usage: &Usage) -> f64 {
    usage.rss
}

fn millicores(usage: &Usage) -> f64 {
    usage.millicores
}

/// The sum over the programs, all of which must run.
fn together(usage: &[Usage], programs: &[&str], pick: fn(&Usage) -> f64) -> Option<f64> {
    programs.iter().map(|program| per_node(usage, program, pick)).sum()
}

/// The mean over the nodes on which the program runs.
fn per_node(usage: &[Usage], program: &str, pick: fn(&Usage) -> f64) -> Option<f64> {
    let values: Vec<f64> = usage.iter().filter(|u| u.program == program).map(pick).collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// In seconds; of an even number of samples the mean of the middle two.
pub(super) fn median(samples: &[Duration]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    let upper = sorted.get(sorted.len() / 2)?.as_secs_f64();
    let lower = sorted.get((sorted.len() - 1) / 2)?.as_secs_f64();
    Some((lower + upper) / 2.0)
}

/// In seconds: the smallest sample that at least `percent` of all do not exceed.
pub(super) fn percentile(samples: &[Duration], percent: usize) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() * percent).div_ceil(100);
    Some(sorted.get(rank.checked_sub(1)?)?.as_secs_f64())
}

pub(super) fn show(value: Option<f64>, unit: Unit) -> String {
    let Some(value) = value else { return "–".into() };
    match unit {
        Unit::Mebibytes => format!("{value:.1} MiB"),
        Unit::Millicores => format!("{value:.1} m"),
        Unit::Seconds => format!("{value:.2} s"),
    }
}

pub(super) fn ratio(ours: Option<f64>, theirs: Option<f64>) -> String {
    match (ours, theirs) {
        (Some(ours), Some(theirs)) if ours > 0.0 => format!("{:.1}×", theirs / ours),
        _ => "–".into(),
    }
}

fn processes(measured: &Measurements) -> String {
    let header = ["node", "program", "processes", "Pss", "RSS", "CPU"].map(str::to_owned);
    let rows = measured.usage.iter().map(|u| {
        vec![
            u.node.clone(),
            u.program.clone(),
            u.processes.to_string(),
            show(Some(u.pss), Unit::Mebibytes),
            show(Some(u.rss), Unit::Mebibytes),
            show(Some(u.millicores), Unit::Millicores),
        ]
    });
    table(&header, &rows.collect::<Vec<_>>())
}

fn footer(conditions: &Conditions) -> String {
    format!(
        "CPU over {} s on a machine with {} CPUs; load of the whole machine {}.\n",
        conditions.interval.as_secs(),
        conditions.cpus,
        conditions.load
    )
}

/// A Markdown table; every column but the leading ones with names is aligned to the right.
pub(super) fn table(header: &[String], rows: &[Vec<String>]) -> String {
    let numeric = |column: usize| rows.iter().all(|r| r[column].starts_with(|c: char| c.is_ascii_digit() || c == '–'));
    let right: Vec<bool> = (0..header.len()).map(|column| column > 0 && numeric(column)).collect();
    let width = |column: usize| {
        rows.iter().map(|r| &r[column]).chain([&header[column]]).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: &[String]| {
        let padded = cells.iter().enumerate().map(|(column, cell)| {
            let width = widths[column];
            if right[column] { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        format!("| {} |\n", padded.collect::<Vec<_>>().join(" | "))
    };
    let rule = widths.iter().zip(&right).map(|(width, right)| {
        let dashes = "-".repeat(width - usize::from(*right));
        if *right { format!("{dashes}:") } else { dashes }
    });
    let rule: Vec<String> = rule.collect();
    std::iter::once(line(header)).chain([line(&rule)]).chain(rows.iter().map(|row| line(row))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(node: &str, program: &str, pss: f64, millicores: f64) -> Usage {
        Usage { node: node.into(), program: program.into(), processes: 1, pss, rss: 2.0 * pss, millicores }
    }

    fn measurements(factor: f64) -> Measurements {
        let seconds = |s: f64| Duration::from_secs_f64(s * factor);
        Measurements {
            usage: vec![
                usage("master", "kube-apiserver", 30.0 * factor, 2.0 * factor),
                usage("master", "kube-controller-manager", 20.0 * factor, 1.0 * factor),
                usage("master", "kube-scheduler", 10.0 * factor, 0.5 * factor),
                usage("master", "kubelet", 10.0 * factor, 4.0 * factor),
                usage("node1", "kubelet", 20.0 * factor, 0.0),
            ],
            latency: Latency { ready: vec![seconds(0.4), seconds(0.2), seconds(0.3)], gone: vec![seconds(1.5)] },
            up: Some(Times { nodes_ready: seconds(5.0), dns_answers: seconds(7.0) }),
            conditions: Conditions { interval: Duration::from_secs(30), cpus: 2, load: "0.10".into() },
        }
    }

    #[test]
    fn two_clusters_are_compared_figure_by_figure() {
        let text = comparison(("Ketch", &measurements(1.0)), ("upstream", &measurements(4.0)));
        let row = |name: &str| {
            let line = text.lines().find(|l| l.contains(name)).unwrap_or_else(|| panic!("no {name} in\n{text}"));
            line.split('|').map(str::trim).filter(|c| !c.is_empty()).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(row("idle Pss of the control plane")[1..], ["60.0 MiB", "240.0 MiB", "4.0×"]);
        assert_eq!(row("idle Pss of kubelet, per node")[1..], ["15.0 MiB", "60.0 MiB", "4.0×"]);
        assert_eq!(row("idle Pss of flanneld, per node")[1..], ["–", "–", "–"], "it does not run");
        assert_eq!(row("idle CPU of the control plane")[1..], ["3.5 m", "14.0 m", "4.0×"]);
        assert_eq!(row("pod create → Ready, median")[1..], ["0.30 s", "1.20 s", "4.0×"]);
        assert_eq!(row("up → DNS answers")[1..], ["7.00 s", "28.00 s", "4.0×"]);
    }

    #[test]
    fn tables_are_markdown_with_numbers_to_the_right() {
        let rows = vec![vec!["a".to_owned(), "10.0 m".to_owned()], vec!["long name".to_owned(), "–".to_owned()]];
        let expected =
            "| figure    |  value |\n| --------- | -----: |\n| a         | 10.0 m |\n| long name |      – |\n";
        assert_eq!(table(&["figure".to_owned(), "value".to_owned()], &rows), expected);
    }

    #[test]
    fn medians_and_percentiles() {
        let samples = |values: &[u64]| values.iter().map(|s| Duration::from_secs(*s)).collect::<Vec<_>>();
        assert_eq!(median(&[]), None);
        assert_eq!(median(&samples(&[3, 1, 2])), Some(2.0));
        assert_eq!(median(&samples(&[4, 1, 2, 3])), Some(2.5));
        assert_eq!(percentile(&[], 99), None);
        assert_eq!(percentile(&samples(&[5, 9, 1]), 99), Some(9.0));
        assert_eq!(percentile(&samples(&(1..=200).collect::<Vec<_>>()), 99), Some(198.0));
    }
}
