//! The kernel's own figures about the machine and about pods' networks. What cannot be read is left out.

use std::fs;
use std::path::Path;

use jiff::Timestamp;
use nix::sys::statvfs::statvfs;

/// `/proc/stat` counts in hundredths of a second on every architecture that Linux shows to programs.
const NANOSECONDS_PER_TICK: u64 = 10_000_000;
/// A pod's log directory has a handful of files; no more are looked at.
const MAX_FILES: usize = 1000;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub rx_bytes: u64,
    pub rx_errors: u64,
    pub tx_bytes: u64,
    pub tx_errors: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filesystem {
    pub available: u64,
    pub capacity: u64,
    pub used: u64,
    pub inodes: u64,
    pub inodes_free: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    pub used: u64,
    pub working_set: u64,
    pub available: u64,
}

/// Nanoseconds that all processors have worked since the machine was started.
pub fn cpu_time() -> Option<u64> {
    parse_cpu(&fs::read_to_string("/proc/stat").ok()?)
}

fn parse_cpu(stat: &str) -> Option<u64> {
    let fields = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
    let ticks: Vec<u64> = fields.map_while(|field| field.parse().ok()).collect();
    // user, nice, system, idle, iowait, irq, softirq, steal; guests' time is in the user's already.
    let [user, nice, system, _, _, irq, softirq, ..] = ticks.as_slice() else { return None };
    Some((user + nice + system + irq + softirq) * NANOSECONDS_PER_TICK)
}

pub fn boot_time() -> Option<Timestamp> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let seconds = stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    Timestamp::from_second(seconds).ok()
}

pub fn memory() -> Memory {
    fs::read_to_string("/proc/meminfo").map(|text| parse_memory(&text)).unwrap_or_default()
}

fn parse_memory(meminfo: &str) -> Memory {
    let field = |name: &str| {
        let rest = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        rest.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    let (total, free, available) = (field("MemTotal"), field("MemFree"), field("MemAvailable"));
    Memory { used: total.saturating_sub(free), working_set: total.saturating_sub(available), available }
}

/// The interfaces that `process` sees, or we; without the loopback.
pub fn interfaces(process: Option<u32>) -> Vec<Interface> {
    let process = process.map_or_else(|| "self".to_owned(), |process| process.to_string());
    fs::read_to_string(format!("/proc/{process}/net/dev")).map(|text| parse_interfaces(&text)).unwrap_or_default()
}

fn parse_interfaces(dev: &str) -> Vec<Interface> {
    let line = |line: &str| {
        let (name, counters) = line.split_once(':')?;
        let counters: Vec<u64> = counters.split_whitespace().map_while(|c| c.parse().ok()).collect();
        let [rx_bytes, _, rx_errors, _, _, _, _, _, tx_bytes, _, tx_errors, ..] = *counters.as_slice() else {
            return None;
        };
        Some(Interface { name: name.trim().to_owned(), rx_bytes, rx_errors, tx_bytes, tx_errors })
    };
    dev.lines().filter_map(line).filter(|interface| interface.name != "lo").collect()
}

pub fn filesystem(path: &Path) -> Option<Filesystem> {
    let disk = statvfs(path).ok()?;
    let bytes = |blocks: u64| blocks.saturating_mul(disk.fragment_size());
    Some(Filesystem {
        available: bytes(disk.blocks_available()),
        capacity: bytes(disk.blocks()),
        used: bytes(disk.blocks().saturating_sub(disk.blocks_free())),
        inodes: disk.files(),
        inodes_free: disk.files_free(),
    })
}

/// Bytes of the files in a directory, without those below it.
pub fn directory_size(path: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(path) else { return 0 };
    let sizes = entries.take(MAX_FILES).filter_map(|entry| entry.ok()?.metadata().ok());
    sizes.filter(|metadata| metadata.is_file()).map(|metadata| metadata.len()).sum()
}

/// Processes and threads of the machine, and how many there may be.
pub fn processes() -> (u64, u64) {
    let loads = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let running = loads.split_whitespace().nth(3).and_then(|field| field.split_once('/')?.1.parse().ok());
    let limit = fs::read_to_string("/proc/sys/kernel/pid_max").unwrap_or_default();
    (running.unwrap_or(0), limit.trim().parse().unwrap_or(0))
}

/// What this process uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnProcess {
    /// Nanoseconds of processor time.
    pub cpu: u64,
    pub resident: u64,
    pub files: usize,
}

pub fn own_process() -> Option<OwnProcess> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The name, in parentheses, may hold anything.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let resident = resident.split_whitespace().next()?.parse::<u64>().ok()? * 1024;
    Some(OwnProcess { cpu: ticks * NANOSECONDS_PER_TICK, resident, files: fs::read_dir("/proc/self/fd").ok()?.count() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_read() {
        assert_eq!(parse_cpu("cpu  10 1 5 1000 50 2 3 9 4 0\ncpu0 1"), Some(21 * NANOSECONDS_PER_TICK));
        assert_eq!(parse_cpu("intr 1"), None);
        let memory = parse_memory("MemTotal: 100 kB\nMemFree:  20 kB\nMemAvailable:  60 kB\n");
        assert_eq!(memory, Memory { used: 80 << 10, working_set: 40 << 10, available: 60 << 10 });
        let dev = "Inter-|   Receive\n face |bytes\n    lo: 1 2 0 0 0 0 0 0 1 2 0 0 0 0 0 0\n  eth0:100 2 3 0 0 0 0 0 200 2 4 0 0 0 0 0\n";
        let eth0 = Interface { name: "eth0".into(), rx_bytes: 100, rx_errors: 3, tx_bytes: 200, tx_errors: 4 };
        assert_eq!(parse_interfaces(dev), [eth0]);
    }
}
