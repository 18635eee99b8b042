//! What a cluster's processes use, read from procfs: memory by `smaps_rollup`, CPU time by `stat`. Processes are found
//! through the cgroups of the nodes, so that those inside containers count and those of other clusters do not.
//! It observes only: nothing here talks to the cluster or changes it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::cluster::cgroups;
use crate::cluster::plan::Plan;

/// The unit of times in procfs. It is 100 a second in the interface of every Linux platform that this runs on,
/// whatever the kernel's own tick is.
const TICK: Duration = Duration::from_millis(10);
/// CPU use is looked at in windows of this length until it stops falling, for at most this long.
const SETTLE_WINDOW: Duration = Duration::from_secs(5);
const SETTLE_LIMIT: Duration = Duration::from_secs(90);

/// A process at one moment.
#[derive(Clone, Debug)]
struct Process {
    pid: i32,
    /// In ticks since the machine's start: tells a process from a later one with the same pid.
    started: u64,
    node: String,
    program: String,
    memory: Memory,
    cpu: Duration,
}

/// In KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Memory {
    pub pss: u64,
    rss: u64,
}

/// What one process has used so far: Pss in MiB, and CPU time. `None` when it has ended.
pub fn of_process(pid: u32) -> Option<(f64, Duration)> {
    let file = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).ok();
    let (_, cpu) = parse_stat(&file("stat")?)?;
    Some((parse_rollup(&file("smaps_rollup")?)?.pss as f64 / 1024.0, cpu))
}

/// What all processes of one program on one node used together during an interval.
#[derive(Clone, Debug, PartialEq)]
pub struct Usage {
    pub node: String,
    pub program: String,
    pub processes: usize,
    /// Proportional set size at the interval's end, in MiB. Pages that processes share count by share, so that a program
    /// that runs on every node of this machine shows less than on a machine of its own: between this and `rss`.
    pub pss: f64,
    /// Resident set size at the interval's end, in MiB: shared pages count in every process.
    pub rss: f64,
    /// CPU time per time, in thousandths of a CPU.
    pub millicores: f64,
}

/// Waits until the cluster's CPU use stops falling: what it still does then, it does for ever.
pub async fn settle(plan: &Plan) -> Result<()> {
    let mut windows = Vec::new();
    while !settled(&windows) && SETTLE_WINDOW * (windows.len() as u32) < SETTLE_LIMIT {
        let usage = observe(plan, SETTLE_WINDOW).await?;
        windows.push(usage.iter().map(|u| u.millicores).sum());
    }
    Ok(())
}

/// Whether the newest of a few windows' CPU uses is no longer clearly below the ones before it.
fn settled(windows: &[f64]) -> bool {
    match windows {
        [.., a, b, newest] => *newest >= 0.9 * a.min(*b),
        _ => false,
    }
}

/// Watches the cluster's processes for an interval in which nobody uses the cluster. Ordered by node, then by size.
pub async fn observe(plan: &Plan, interval: Duration) -> Result<Vec<Usage>> {
    let before = processes(plan);
    let start = tokio::time::Instant::now();
    tokio::time::sleep(interval).await;
    let after = processes(plan);
    let passed = start.elapsed();
    ensure!(!after.is_empty(), "cluster {} has no processes: is it up?", plan.name);
    let mut usage = sum(&before, &after, passed);
    let order = plan.node_names();
    usage.sort_by(|a, b| {
        let place = |u: &Usage| order.iter().position(|n| *n == u.node);
        place(a).cmp(&place(b)).then(b.pss.total_cmp(&a.pss))
    });
    Ok(usage)
}

/// A process that started in between counts with all of its CPU time; one that ended does not count.
fn sum(before: &[Process], after: &[Process], passed: Duration) -> Vec<Usage> {
    let earlier: BTreeMap<(i32, u64), Duration> = before.iter().map(|p| ((p.pid, p.started), p.cpu)).collect();
    let mut sums: BTreeMap<(&str, &str), Usage> = BTreeMap::new();
    for process in after {
        let usage = sums.entry((&process.node, &process.program)).or_insert_with(|| Usage {
            node: process.node.clone(),
            program: process.program.clone(),
            processes: 0,
            pss: 0.0,
            rss: 0.0,
            millicores: 0.0,
        });
        let used =
            process.cpu.saturating_sub(earlier.get(&(process.pid, process.started)).copied().unwrap_or_default());
        usage.processes += 1;
        usage.pss += process.memory.pss as f64 / 1024.0;
        usage.rss += process.memory.rss as f64 / 1024.0;
        usage.millicores += 1000.0 * used.as_secs_f64() / passed.as_secs_f64();
    }
    sums.into_values().collect()
}

fn processes(plan: &Plan) -> Vec<Process> {
    let read = |node: &String| -> Vec<Process> {
        cgroups::node_processes(&plan.name, node).into_iter().filter_map(|pid| read_process(plan, node, pid)).collect()
    };
    plan.node_names().iter().flat_map(read).collect()
}

/// Nothing for a process that has ended meanwhile, and for one that waits to be reaped.
fn read_process(plan: &Plan, node: &str, pid: i32) -> Option<Process> {
    let file = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).ok();
    let (started, cpu) = parse_stat(&file("stat")?)?;
    Some(Process {
        pid,
        started,
        node: node.to_owned(),
        program: program_name(&file("cmdline")?, &plan.bins)?,
        memory: memory_of(pid)?,
        cpu,
    })
}

/// The component that the process runs, whatever the name of its file is; of other programs the file's name.
fn program_name(cmdline: &str, bins: &BTreeMap<String, PathBuf>) -> Option<String> {
    let program = Path::new(cmdline.split('\0').next()?);
    let component = bins.iter().find(|(_, path)| *path == program).map(|(name, _)| name.as_str());
    component.or_else(|| program.file_name()?.to_str()).map(str::to_owned)
}

/// The memory of one process; `None` when it has ended.
pub(super) fn memory_of(pid: i32) -> Option<Memory> {
    parse_rollup(&std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?)
}

fn parse_rollup(text: &str) -> Option<Memory> {
    let kib = |key: &str| -> Option<u64> {
        text.lines().find_map(|line| line.strip_prefix(key))?.split_whitespace().next()?.parse().ok()
    };
    Some(Memory { pss: kib("Pss:")?, rss: kib("Rss:")? })
}

/// The start and the CPU time of a process. The second field is a name that can hold anything, even parentheses.
fn parse_stat(text: &str) -> Option<(u64, Duration)> {
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    let ticks = number(11)?.checked_add(number(12)?)?;
    Some((number(19)?, TICK.saturating_mul(u32::try_from(ticks).unwrap_or(u32::MAX))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_comes_from_the_rollup() {
        let text = "55d0-7ffd ---p 00000000 00:00 0    [rollup]\nRss:    2048 kB\nPss:    1024 kB\nPss_Dirty:  7 kB\n";
        assert_eq!(parse_rollup(text), Some(Memory { pss: 1024, rss: 2048 }));
        assert_eq!(parse_rollup(""), None, "a process that waits to be reaped has no memory");
    }

    #[test]
    fn cpu_time_is_found_behind_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 9 0 0 0 150 50 0 0 20 0 1 0 4321 1000 2 18446744073709551615 1";
        assert_eq!(parse_stat(stat), Some((4321, Duration::from_secs(2))));
        assert_eq!(parse_stat("7 (short) S 1"), None);
    }

    #[test]
    fn a_replaced_component_keeps_its_name() {
        let bins = BTreeMap::from([("kubelet".to_owned(), PathBuf::from("/opt/kubelet-old"))]);
        let name = |cmdline| program_name(cmdline, &bins);
        assert_eq!(name("/opt/kubelet-old\0--config=x\0").as_deref(), Some("kubelet"));
        assert_eq!(name("/usr/bin/etcd\0--name=a\0").as_deref(), Some("etcd"));
        assert_eq!(name(""), None, "kernel threads have no command line");
    }

    #[test]
    fn use_is_summed_by_node_and_program() {
        let process = |pid, started, node: &str, cpu| Process {
            pid,
            started,
            node: node.into(),
            program: "pause".into(),
            memory: Memory { pss: 512, rss: 1024 },
            cpu: Duration::from_millis(cpu),
        };
        let before = [process(1, 10, "node1", 1000), process(2, 20, "node1", 9000), process(3, 30, "node2", 500)];
        // Process 2 has ended, and its pid is used again.
        let after = [process(1, 10, "node1", 1100), process(2, 99, "node1", 50), process(3, 30, "node2", 500)];
        let usage = sum(&before, &after, Duration::from_secs(10));
        let expected = |node: &str, processes, pss, rss, millicores| Usage {
            node: node.into(),
            program: "pause".into(),
            processes,
            pss,
            rss,
            millicores,
        };
        assert_eq!(usage, [expected("node1", 2, 1.0, 2.0, 15.0), expected("node2", 1, 0.5, 1.0, 0.0)]);
    }

    #[test]
    fn a_cluster_is_settled_when_its_use_stops_falling() {
        for (windows, expected) in [
            (&[][..], false),
            (&[5.0, 5.0], false),
            (&[900.0, 500.0, 100.0], false),
            (&[900.0, 500.0, 100.0, 40.0], false),
            (&[100.0, 40.0, 42.0], true),
            (&[40.0, 41.0, 38.0], true),
            (&[0.0, 0.0, 0.0], true),
        ] {
            assert_eq!(settled(windows), expected, "{windows:?}");
        }
    }
}
